# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments that several steps share."""

import math
from numbers import Real

import torch


def is_number(value: object) -> bool:
    """Whether a value is a finite number, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_count(name: str, number: object, *, none: str | None = None) -> None:
    """Raise a ValueError unless an argument is a whole number of at least 1, or ``None`` where that means something."""
    if number is None and none is not None:
        return
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        otherwise = "" if none is None else f", or None for {none}"
        msg = f"{name} must be a whole number of at least 1{otherwise}, got {number!r}."
        raise ValueError(msg)


def check_maps(feature_map: torch.Tensor) -> None:
    """Raise a ValueError unless ``feature_map`` has shape ``(N, C, H, W)`` with at least one patch."""
    if feature_map.ndim != 4 or 0 in feature_map.shape[1:]:
        msg = f"feature_map must have shape (N, C, H, W), got {tuple(feature_map.shape)}."
        raise ValueError(msg)
