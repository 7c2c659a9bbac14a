# SPDX-License-Identifier: Apache-2.0
"""Products in the precision of their operands."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Multiply float32 in float32, whatever autocast or ``torch.set_float32_matmul_precision`` say."""
    onednn: Any = torch.backends.mkldnn  # which has no types
    settings = onednn.matmul, onednn.conv, torch.backends.cuda.matmul
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
