# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments that several steps share."""


def check_count(name: str, number: object, *, none: str | None = None) -> None:
    """Raise a ValueError unless an argument is a whole number of at least 1, or ``None`` where that means something."""
    if number is None and none is not None:
        return
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        otherwise = "" if none is None else f", or None for {none}"
        msg = f"{name} must be a whole number of at least 1{otherwise}, got {number!r}."
        raise ValueError(msg)
