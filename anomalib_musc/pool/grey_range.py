# SPDX-License-Identifier: Apache-2.0
"""What is black and what white in grey images of more than 8 bits: one range for a pool, which no outlier decides."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from anomalib_musc.functional.arguments import is_number

_TAIL = 1e-3  # of the values at either end, which may be dead pixels
_FENCE = 3.0  # interquartile ranges beyond the quartiles, where Tukey's far outliers begin (Exploratory Data Analysis)
_SAMPLES = 4096  # of an image
_LEAST = 1e-6  # of a value, which float32 tells from it
_OVERFLOWS = 1e38  # differences of float32


class GreyRange(NamedTuple):
    """The stored values that are shown black and white."""

    black: float
    white: float

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """Return stored values of any shape as intensities in [0, 1]; 0 where there is no finite value."""
        known = values.nan_to_num(self.black, posinf=self.black, neginf=self.black)
        known = known if self.white - self.black < _OVERFLOWS else known.double()
        return ((known - self.black) / (self.white - self.black)).clamp(0, 1).to(values.dtype)


def check_grey_range(grey_range: Any) -> GreyRange | None:
    """Return a user's range of black and white; a ValueError unless it is two finite numbers that ascend, or None."""
    if grey_range is None:
        return None
    is_pair = isinstance(grey_range, Sequence) and not isinstance(grey_range, str) and len(grey_range) == 2
    numbers = [value for value in grey_range if is_number(value)] if is_pair else []
    if len(numbers) < 2 or numbers[0] >= numbers[1]:
        msg = f"grey_range must be the values of black and white, such as (0, 4095), or None; got {grey_range!r}."
        raise ValueError(msg)
    return GreyRange(float(numbers[0]), float(numbers[1]))


def widest(ranges: Iterable[GreyRange | None]) -> GreyRange | None:
    """Return the range that holds all that are known, ``None`` where none is."""
    known = [found for found in ranges if found is not None]
    return GreyRange(min(found.black for found in known), max(found.white for found in known)) if known else None


def sample(values: torch.Tensor) -> torch.Tensor:
    """Return some thousand finite values of an image, drawn at places that depend on its size alone, shape ``(n,)``."""
    flat = values.flatten()
    if len(flat) > _SAMPLES:
        flat = flat[torch.randint(len(flat), (_SAMPLES,), generator=torch.Generator().manual_seed(0))]
    return flat[flat.isfinite()]


def find_grey_range(samples: torch.Tensor) -> GreyRange:
    """Find black and white from values of all images of a pool.

    All but a thousandth of the values at either end lie between them, and all that are within Tukey's far fences.
    Where zero is no further from them than they reach, they are intensities, and zero is black; white is the largest
    value of the least number of bits, of 8 or more, that holds them, so that a camera of 12 bits whose images are
    stored in 16 is not taken for a dark one. Of fractions white is 1, unless less than half of the contrast were left.

    Args:
        samples: Finite values, shape ``(n,)``.

    Example:
        >>> find_grey_range(torch.arange(4000.0))
        GreyRange(black=0.0, white=4095.0)
        >>> find_grey_range(torch.linspace(0, 0.9, 1000))
        GreyRange(black=0.0, white=1.0)
        >>> find_grey_range(torch.arange(5000.0, 5200.0))
        GreyRange(black=5000.0, white=5199.0)
    """
    if not len(samples):
        return GreyRange(0.0, 1.0)
    values = _without_markers(samples.double().sort().values)
    low, high = _robust_ends(values)
    if not 0 <= low <= high - low:
        return GreyRange(low, high if high > low else low + max(1.0, abs(low) * _LEAST))
    level = white_level(high)
    are_whole = bool((values == values.round()).all())
    return GreyRange(0.0, level if are_whole or high > level / 2 or high == 0 else high)


def range_of_images(samples: Sequence[torch.Tensor]) -> tuple[GreyRange, list[int]]:
    """Find black and white of a pool, and which of its images they do not suit, such as an overexposed one.

    That is an image whose median is a far outlier among the medians of all, and lies further from the values of the
    other images than these reach: it does not decide, and is clipped.

    Args:
        samples: Finite values, one tensor ``(n,)`` an image.

    Returns:
        The range, and the positions of the images that it does not suit.

    Example:
        >>> range_of_images([*torch.linspace(100, 900, 10).split(1), torch.tensor([60000.0])])
        (GreyRange(black=0.0, white=1023.0), [10])
    """
    medians = {place: values.double().median().item() for place, values in enumerate(samples) if len(values)}
    if not medians:
        return find_grey_range(torch.empty(0)), []
    ordered, last = sorted(medians.values()), len(medians) - 1
    lower, upper = sorted((ordered[math.ceil(last / 4)], ordered[3 * last // 4]))  # of two, both
    reach = _FENCE * (upper - lower)
    far = {place for place, median in medians.items() if not lower - reach <= median <= upper + reach}
    others = torch.cat([values for place, values in enumerate(samples) if place not in far])
    low, high = _robust_ends(_without_markers(others.double().sort().values))
    outlying = sorted(place for place in far if not 2 * low - high <= medians[place] <= 2 * high - low)
    kept = [values for place, values in enumerate(samples) if place not in outlying]
    return find_grey_range(torch.cat(kept)), outlying


def white_level(brightest: float) -> float:
    """Return the largest value of as many bits, of 8 or more, as the brightest one needs; 1 for fractions.

    Example:
        >>> white_level(0.7), white_level(100), white_level(4000)
        (1.0, 255.0, 4095.0)
    """
    return 1.0 if brightest <= 1 else 2.0 ** max(8, math.ceil(brightest).bit_length()) - 1


def _robust_ends(values: torch.Tensor) -> tuple[float, float]:
    """Return the lowest and the highest of sorted values ``(n,)``, but for a few outliers."""
    last = len(values) - 1
    low, lower, upper, high = (values[round(share * last)].item() for share in (_TAIL, 0.25, 0.75, 1 - _TAIL))
    reach = _FENCE * (upper - lower)
    within = values[(values >= lower - reach) & (values <= upper + reach)]
    return min(low, within[0].item()), max(high, within[-1].item())


def _without_markers(values: torch.Tensor) -> torch.Tensor:
    """Leave out an end of sorted values ``(n,)`` that lies further from the others than they reach: no data."""
    for _ in range(4):  # one that is repeated at either end, and another one beside it
        inner = values[(values > values[0]) & (values < values[-1])]
        if not len(inner) or inner[0] == inner[-1]:
            return values
        reach = inner[-1] - inner[0]
        keeps = torch.ones_like(values, dtype=torch.bool)
        if inner[0] - values[0] > reach:
            keeps &= values > values[0]
        if values[-1] - inner[-1] > reach:
            keeps &= values < values[-1]
        if keeps.all():
            return values
        values = values[keeps]
    return values
