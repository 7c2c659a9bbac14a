# SPDX-License-Identifier: Apache-2.0
"""Backbones in 16-bit numbers, where a trial finds the device faster with them, and the features the same."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_musc.distances.kernels.products import SixteenBitProduct
from anomalib_musc.distances.trial import shortest_seconds

# The least mean cosine between the features in 16 bits and in float32. Transformers stay above it; convolutional
# networks, whose batch norms scale what was rounded, do not, and gain little.
LEAST_COSINE = 0.9999


class Trial(NamedTuple):
    """What a trial has found.

    Attributes:
        dtype: The 16-bit type in which autocast is faster; ``None`` where none is, or where features change.
        gain: How many times faster that is.
    """

    dtype: torch.dtype | None
    gain: float


class HalfPrecision:
    """Runs a backbone in 16 bits where that is faster; tried once for a device and a size of images."""

    def __init__(self) -> None:
        self._trials: dict[object, Trial] = {}

    def trial(self, backbone: nn.Module, images: torch.Tensor) -> Trial:
        """Return what a trial on images like these, ``(B, 3, H, W)``, has found."""
        key = images.device, images.shape[1:], torch.get_num_threads()
        trial = self._trials.get(key)
        if trial is None:
            trial = try_half_precision(backbone, images[:1])
            self._trials = {key: trial}
        return trial

    def autocast(self, backbone: nn.Module, images: torch.Tensor) -> AbstractContextManager[object]:
        """Return the context to run a backbone in; a trainer's own precision, and an export's, stay as they are."""
        is_told = images.dtype != torch.float32 or torch.is_autocast_enabled(images.device.type)
        if is_told or torch.compiler.is_compiling():
            return nullcontext()
        dtype = self.trial(backbone, images).dtype
        return torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None)


@torch.no_grad()
def try_half_precision(backbone: nn.Module, image: torch.Tensor) -> Trial:
    """Run a backbone on one image, ``(1, 3, H, W)``, in float32 and in the 16-bit type that its device has.

    It stays in float32 where it cannot run in that type, or where a layer's features or the image's have a lower mean
    cosine than ``LEAST_COSINE`` to those in float32.
    """
    dtype = _dtype_of(image)
    if dtype is None or not agrees(backbone, image, dtype):
        return Trial(None, 1.0)
    single, half = (
        shortest_seconds(partial(_run, backbone, image, some), image.device, is_warm=True) for some in (None, dtype)
    )
    return Trial(dtype, single / half) if half < single else Trial(None, 1.0)


def _dtype_of(like: torch.Tensor) -> torch.dtype | None:
    """Return the 16-bit type that a device multiplies by instructions of its own."""
    if like.device.type == "cpu":
        return torch.bfloat16 if torch.bfloat16 in SixteenBitProduct.supported(like) else None
    return torch.float16 if like.device.type in {"cuda", "mps"} else None


def agrees(backbone: nn.Module, image: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a backbone finds the same features in a type; one of a user's own may know no other than float32."""
    try:
        with torch.autocast(image.device.type, dtype=dtype):
            feature_maps, class_tokens = backbone(image)
        expected_maps, expected_tokens = backbone(image)
        pairs = zip((*feature_maps, class_tokens), (*expected_maps, expected_tokens), strict=True)
        return all(mean_cosine(some.float(), expected.float()) >= LEAST_COSINE for some, expected in pairs)
    except Exception:  # what is not of the type, or of no backbone's form, is raised again in float32
        return False


def mean_cosine(some: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the mean cosine between vectors along the second dimension; 1 of equal ones, of zeros too."""
    are_equal = (some == expected).all(dim=1)
    return torch.where(are_equal, 1.0, F.cosine_similarity(some, expected, dim=1)).mean().item()


def _run(backbone: nn.Module, image: torch.Tensor, dtype: torch.dtype | None) -> None:
    with torch.autocast(image.device.type, dtype=dtype, enabled=dtype is not None):
        backbone(image)
