# SPDX-License-Identifier: Apache-2.0
"""What a cell takes, and on what: time, memory, device, versions."""

import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

_PACKAGES = ("anomalib", "anomalib-musc", "lightning", "open_clip_torch", "timm", "torch")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """The most memory of the host and the GPU since it was made, in a process that has done nothing before."""

    def __init__(self) -> None:
        self._start = _resident("VmRSS")

    def host(self) -> int:
        """Bytes beyond what the process held at the start."""
        return max(0, _resident("VmHWM") - self._start)

    @staticmethod
    def device(device: torch.device) -> int | None:
        """Bytes on a GPU, ``None`` for other devices."""
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long a block took, work that a GPU has yet to finish included."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - start


def describe(device: torch.device) -> str:
    """Return the name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def _resident(field: str) -> int:
    for line in _lines(_STATUS):
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows, where nobody says
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _lines(path: str | Path) -> list[str]:
    return Path(path).read_text(encoding="utf-8", errors="replace").splitlines() if Path(path).is_file() else []
