# SPDX-License-Identifier: Apache-2.0
"""Images of a pool, from wherever they are to tiles on the compute device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from anomalib_musc.distances.plan import Workload
from anomalib_musc.distances.storage import release
from anomalib_musc.distances.survey import check_values, common_offset
from anomalib_musc.distances.tiles import Tile, tile_of_maps, tile_of_vectors
from anomalib_musc.distances.windows import unit_vectors


@dataclass(frozen=True)
class PoolLoader:
    """Images that are compared, each loaded and prepared whenever a tile needs it.

    Attributes:
        features: Patches ``(N, L, C)`` or maps ``(N, C, H, W)``, on any device.
        images: Indices of those that are compared.
        prepare: Changes the features of one image, ``(1, ...)``.
        offset: What is subtracted from all patches, ``(C,)``, see :func:`.common_offset`.
    """

    features: torch.Tensor
    images: Sequence[int]
    prepare: Callable[[torch.Tensor], torch.Tensor] | None
    offset: torch.Tensor | None = None

    def surveyed(self) -> "PoolLoader":
        """Look at all features; return a loader that subtracts what all patches have in common.

        Raises:
            ValueError: If one is not finite, or its square would overflow.
        """
        check_values(self.features, self.images)
        if self.features.ndim == 4:  # unit vectors
            return self
        return replace(self, offset=common_offset(self.features, self.images, self.prepare))

    def tile(self, workload: Workload, first: int, last: int) -> Tile:
        """Load the images from the first up to, not including, the last."""
        is_shared, rounding = len(workload.degrees) > 1, workload.kernel.rounding
        images = self.images[first:last]
        if self.features.ndim == 3 and self.prepare is None:  # not one by one: where nothing changes, nothing is copied
            rows = slice(first, last) if self.images == range(len(self.features)) else list(images)
            patches = rounding.prepare(self._centred(self.features[rows].to(workload.like)))
        else:
            patches = workload.like.new_empty(last - first, *workload.shape[1:])
            for target, image in zip(patches, images, strict=True):
                target.copy_(rounding.prepare(self._patches(workload, image))[0])
                release(self.features)
        if is_shared:
            tile = tile_of_maps(patches.unflatten(1, self.features.shape[2:]), workload.degrees, rounding)
        else:
            tile = tile_of_vectors(patches, rounding)
        is_finite = tile.half_norms.isfinite().all(dim=-1).all(dim=0)  # (b,)
        if not is_finite.all():
            bad = [images[index] for index in (~is_finite).nonzero().flatten().tolist()]
            msg = f"features must be finite once prepared, got NaN or infinity in images {bad[:10]}."
            raise ValueError(msg)
        return tile

    def _patches(self, workload: Workload, image: int) -> torch.Tensor:
        """Load one image's patches ``(1, L, C)``, their windows summed where there is one degree."""
        features = self.features[image : image + 1].to(workload.like)
        if self.prepare is not None:
            features = self.prepare(features)
        if features.ndim == 3:
            return self._centred(features)
        patches = features.permute(0, 2, 3, 1).contiguous()
        return patches.flatten(1, 2) if len(workload.degrees) > 1 else unit_vectors(patches, workload.degrees[0])

    def _centred(self, patches: torch.Tensor) -> torch.Tensor:
        return patches if self.offset is None else patches - self.offset.to(patches)
