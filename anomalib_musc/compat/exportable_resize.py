# SPDX-License-Identifier: Apache-2.0
"""The antialiased resize of a pre-processor, in operations that ONNX and OpenVINO have."""

from typing import Any

import torch
from anomalib.pre_processing.utils.transform import get_exportable_transform
from torchvision.transforms.v2 import Compose, InterpolationMode, Resize, Transform


class ExportableResize(Resize):
    """torchvision's antialiased ``Resize`` to a height and width, which an exporter sees as two matrix products.

    ONNX's own resize has a filter of its own, OpenVINO's has none at any size that is not known when exporting, and
    anomalib exports without antialiasing, which moves scores wherever an image is larger than the input.
    """

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Resize images ``(..., H, W)`` of floating point."""
        if not torch.compiler.is_compiling():
            resized: torch.Tensor = super().forward(image)
            return resized
        rows, columns = (
            resize_weights(side, int(wanted), is_cubic=self.interpolation == InterpolationMode.BICUBIC).to(image)
            for side, wanted in zip(image.shape[-2:], self.size, strict=True)
        )
        return rows @ image @ columns.T


def resize_weights(side: int, wanted: int, *, is_cubic: bool) -> torch.Tensor:
    """Return by how much each of ``side`` pixels counts in each of the wanted ones, as torch's antialiasing has it.

    Args:
        side: Pixels there are; may be symbolic.
        wanted: Pixels there will be.
        is_cubic: Keys' cubic with a = -0.5, else a triangle; both are widened where the image shrinks.

    Returns:
        Weights, shape ``(wanted, side)``, of which every row sums to 1.
    """
    pixels = torch.arange(side, dtype=torch.float32) + 0.5
    scale = torch.ones_like(pixels).sum() / wanted  # a tensor: a number would freeze the size in the export
    centres = (torch.arange(wanted, dtype=torch.float32) + 0.5) * scale
    distances = (pixels - centres[:, None]).abs() / scale.clamp_min(1.0)
    near = ((1.5 * distances - 2.5) * distances**2 + 1) if is_cubic else (1 - distances)
    weights = torch.where(distances < 1, near, torch.zeros_like(distances))
    if is_cubic:
        far = ((distances - 5) * distances + 8) * distances * -0.5 + 2
        weights = torch.where((distances >= 1) & (distances < 2), far, weights)
    return weights / weights.sum(dim=1, keepdim=True)


def exportable(transform: Transform | None) -> Transform | None:
    """Return anomalib's exportable form of a transform, whose antialiased resizes to a height and width stay so."""
    return _restore(get_exportable_transform(transform), transform)


def _restore(converted: Transform | None, original: Transform | None) -> Transform | None:
    if isinstance(converted, Compose) and isinstance(original, Compose):
        parts = zip(converted.transforms, original.transforms, strict=True)
        converted.transforms = [_restore(part, theirs) for part, theirs in parts]
        return converted
    smooth = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
    if isinstance(original, Resize) and original.antialias and original.interpolation in smooth:
        size: Any = original.size
        if size is not None and len(size) == 2:
            return ExportableResize(size, interpolation=original.interpolation, antialias=True)
    return converted
