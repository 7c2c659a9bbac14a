# SPDX-License-Identifier: Apache-2.0
"""Products in the precision of their operands."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_LOCK = threading.Lock()
_before: list[str] = []  # what the settings were before the first of those that are inside
_inside = 0


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Multiply float32 in float32, whatever autocast or ``torch.set_float32_matmul_precision`` say.

    The settings are those of the whole process; they are as before when the last of several threads leaves.
    """
    global _inside  # noqa: PLW0603
    with _LOCK:
        if not _inside:
            _before[:] = [_own_value(setting, parent) for setting, parent in _settings()]
        _inside += 1
        for setting, _ in _settings():
            setting.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _LOCK:
            _inside -= 1
            if not _inside:
                for (setting, _), value in zip(_settings(), _before, strict=True):
                    setting.fp32_precision = value


def _settings() -> list[tuple[Any, Any]]:
    """Return the settings of products, and those that they follow unless told otherwise."""
    onednn: Any = torch.backends.mkldnn  # which has no types
    return [(onednn.matmul, onednn), (onednn.conv, onednn), (torch.backends.cuda.matmul, torch.backends)]


def _own_value(setting: Any, parent: Any) -> str:
    """Return a setting's value, or that it follows its parent."""
    value: str = setting.fp32_precision
    return "none" if value == parent.fp32_precision else value
