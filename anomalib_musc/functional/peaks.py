# SPDX-License-Identifier: Apache-2.0
"""How far the highest-scoring patch of each image is from the other images. Not of the paper."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from anomalib_musc.distances import Processes, gathered
from anomalib_musc.functional.lnamd import lnamd


class Peaks(NamedTuple):
    """The highest-scoring patch of each of N images.

    Attributes:
        places: Its row and column, shape ``(N, 2)``.
        distances: Its distance to the nearest patch of every image, shape ``(N, N)``; 0 to the image itself.
        steps: How many rows or columns that patch lies away from its own place, the larger of both, ``(N, N)``, int16.
    """

    places: torch.Tensor
    distances: torch.Tensor
    steps: torch.Tensor

    def ordered(self, images: Sequence[int]) -> "Peaks":
        """Return the same images in another order."""
        return Peaks(self.places[images], self.distances[images][:, images], self.steps[images][:, images])


def find_peaks(
    feature_maps: Sequence[torch.Tensor],
    patch_scores: torch.Tensor,
    degree: int = 3,
    *,
    device: torch.device | str | None = None,
    processes: Processes | None = None,
) -> Peaks:
    r"""Compare the highest-scoring patch of each image with all patches of every other one.

    Of several layers, the squared distances are averaged: :math:`d^2 = \operatorname{mean}_l \lVert x^{(l)}_p -
    x^{(l)}_q \rVert^2`. That is as much work as 2 / L of mutual scoring at one degree.

    Args:
        feature_maps: One map ``(N, C, h, w)`` a layer, of one grid; on the host where memory is short.
        patch_scores: Shape ``(N, h, w)``.
        degree: LNAMD's degree, an odd number.
        device: Where to compute. Defaults to where ``feature_maps`` are.
        processes: Those that hold the other images, each its share. Defaults to none: all images are here.

    Returns:
        The peaks, on the host; those of several processes by rank.

    Example:
        >>> import torch
        >>> maps = torch.randn(4, 8, 5, 6)
        >>> peaks = find_peaks([maps], torch.rand(4, 5, 6))
        >>> peaks.distances.shape, peaks.places.shape
        (torch.Size([4, 4]), torch.Size([4, 2]))
    """
    device = feature_maps[0].device if device is None else device
    num_images, _, width = patch_scores.shape
    tops = patch_scores.flatten(1).argmax(dim=1).to(device)  # (N,)
    scale = len(feature_maps) ** -0.5

    def vectors_of(image: int) -> torch.Tensor:  # (L, C of all layers)
        return scale * torch.cat([lnamd(maps[[image]].to(device), degree)[0] for maps in feature_maps], dim=1)

    own = [vectors_of(image)[tops[image]].cpu() for image in range(num_images)]
    channels = sum(maps.shape[1] for maps in feature_maps)
    found = gathered(processes, (torch.stack(own) if own else torch.empty(0, channels), tops.cpu()))
    peaks, tops = (torch.cat(parts).to(device) for parts in zip(*found, strict=True))
    distances = torch.empty(len(peaks), num_images)
    steps = torch.empty(len(peaks), num_images, dtype=torch.int16)
    for image in range(num_images):
        vectors = vectors_of(image)
        nearest = (peaks @ vectors.T - vectors.square().sum(dim=1) / 2).argmax(dim=1)
        distances[:, image] = (vectors[nearest] - peaks).norm(dim=1).cpu()
        rows, columns = (nearest // width - tops // width).abs(), (nearest % width - tops % width).abs()
        steps[:, image] = torch.maximum(rows, columns).to(torch.int16).cpu()
    columns_of = [torch.cat(parts, dim=1) for parts in zip(*gathered(processes, (distances, steps)), strict=True)]
    return Peaks(torch.stack([tops // width, tops % width], dim=1).cpu(), *columns_of)
