# SPDX-License-Identifier: Apache-2.0
"""A budget of memory, and tensors that lie in a temporary file where it does not suffice."""

import ctypes
import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakValueDictionary

import torch

GIB = 2**30
CACHE_BYTES = 2**23  # what stays in a processor's cache
BUSY_NUMBERS = 2**24  # what keeps a GPU busy
_SHARE = 0.5
_FILES: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by address


class MemoryBudgetError(ValueError):
    """A budget that does not suffice.

    Args:
        least: What would do, in bytes; an attribute too.
        budget: What was given, in bytes.
    """

    def __init__(self, least: int, budget: int) -> None:
        self.least = least
        super().__init__(
            f"memory_budget must be at least {math.ceil(1000 * least / GIB) / 1000:.3f} GiB to compare two of these "
            f"images, got {budget / GIB:.3f}; smaller images, or fewer, need less."
        )


def check_budget(memory_budget: float | None) -> None:
    """Raise a ValueError unless ``memory_budget`` is a positive number of GiB, or ``None``."""
    is_number = isinstance(memory_budget, (int, float)) and math.isfinite(memory_budget)
    if memory_budget is not None and not (is_number and memory_budget > 0):
        msg = f"memory_budget must be a positive number of GiB, got {memory_budget!r}."
        raise ValueError(msg)


def budget_in_bytes(memory_budget: float | None, device: torch.device) -> int:
    """Return ``memory_budget`` GiB in bytes; without one, half of what is free on the device."""
    check_budget(memory_budget)
    if memory_budget is not None:
        return int(memory_budget * GIB)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_memory()
    return int(free * _SHARE)


def free_host_memory() -> int:
    """Return what this process can still allocate on the host, in bytes."""
    free = [_available_memory()]
    group = Path("/sys/fs/cgroup")  # a container's limit, in its own two versions
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            free.append(int((group / limit).read_text()) - int((group / used).read_text()))
        except (OSError, ValueError):  # no such file, or no limit: "max"
            continue
    return max(0, min(free))


def _available_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        return pages * os.sysconf("SC_PAGE_SIZE") // 2 if pages else 4 * GIB


def file_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Create a tensor in a memory-mapped temporary file, which vanishes with it, even where the process is killed.

    Args:
        shape: Its shape.
        dtype: Its type.

    Raises:
        OSError: If the folder of temporary files has no room; it says how to choose another.
    """
    size = math.prod(shape) * dtype.itemsize
    with tempfile.TemporaryFile() as file:
        _reserve(file.fileno(), size)
        memory = mmap.mmap(file.fileno(), size)
    tensor = torch.frombuffer(memory, dtype=dtype).view(shape)  # holds the memory
    _FILES[tensor.data_ptr()] = memory
    return tensor


def first_bytes(memory: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in the first bytes of some memory, which is given as bytes."""
    return memory[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def release(tensor: torch.Tensor) -> None:
    """Give the pages of a tensor in a file back to the system, which keep what they hold; nothing for other tensors."""
    memory = _FILES.get(tensor.untyped_storage().data_ptr())
    if memory is not None and hasattr(memory, "madvise"):
        memory.madvise(mmap.MADV_DONTNEED)


def write_lines(buffer: torch.Tensor, target: torch.Tensor, block: torch.Tensor) -> None:
    """Copy a block to a part of a buffer, ``(D, n, ...)`` each, image by image where the buffer is in a file.

    Args:
        buffer: The tensor that the target is a part of.
        target: Where the block goes.
        block: What is written.
    """
    for line in range(target.shape[1]):
        target[:, line] = block[:, line]
        release(buffer)


def trim() -> None:
    """Let the allocator give freed memory back to the system: glibc's keeps up to 64 MiB, beyond a small budget."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its size and the room for it, as a full disk would kill the process when a page is written."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.truncate(descriptor, size)
    except OSError as error:
        msg = (
            f"{size / GIB:.1f} GiB of temporary files are needed within the memory_budget, but {tempfile.gettempdir()} "
            "has no room for them. Raise memory_budget, or set TMPDIR to a folder with more room."
        )
        raise OSError(error.errno, msg) from error
