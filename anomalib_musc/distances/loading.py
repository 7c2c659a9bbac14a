# SPDX-License-Identifier: Apache-2.0
"""Images of a pool, from wherever they are to tiles on the compute device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from anomalib_musc.distances.plan import Workload
from anomalib_musc.distances.processes import Processes, gathered
from anomalib_musc.distances.storage import release
from anomalib_musc.distances.survey import check_values, densest_place, some_of, some_patches
from anomalib_musc.distances.tiles import CANCELLATION, Tile, tile_of_maps, tile_of_vectors
from anomalib_musc.distances.windows import unit_vectors


@dataclass(frozen=True)
class PoolLoader:
    """Images that are compared, each loaded and prepared whenever a tile needs it.

    Attributes:
        features: Patches ``(N, L, C)`` or maps ``(N, C, H, W)``, on any device.
        images: Indices of those that are compared.
        prepare: Changes the features of one image, ``(1, ...)``.
        some: A few of all images, at which one may look: of those here, the index, by the position among them.
        origin: What is subtracted from all patches, ``(C,)``, see :func:`.densest_place`.
    """

    features: torch.Tensor
    images: Sequence[int]
    prepare: Callable[[torch.Tensor], torch.Tensor] | None
    some: Mapping[int, int] = field(default_factory=dict)
    origin: torch.Tensor | None = None

    def surveyed(self, processes: Processes | None = None) -> "PoolLoader":
        """Look at all features; a ValueError if one is not finite, or its square would overflow.

        Args:
            processes: Those that load the other images, and do likewise.
        """
        shares = gathered(processes, check_values(self.features, self.images))
        rank = 0 if processes is None else processes.rank
        some = enumerate(some_of(shares))
        return replace(self, some={position: image for position, (owner, image) in some if owner == rank})

    def centred(self, workload: Workload, processes: Processes | None = None) -> "PoolLoader":
        """Return a loader that subtracts the densest place, the same one in all processes.

        Of patches whose windows are still to be summed only where a twentieth of them is all but equal: elsewhere
        products are precise enough.
        """
        if len(workload.degrees) > 1:
            one = replace(workload, degrees=workload.degrees[:1])
            if self._densest_place(one, processes)[1] ** 2 >= CANCELLATION:
                return self
        place, _ = self._densest_place(workload, processes)
        return replace(self, origin=place if place.any() else None)

    def _densest_place(self, workload: Workload, processes: Processes | None) -> tuple[torch.Tensor, float]:
        own = {
            position: some_patches(self._patches(workload, image)[0], position) for position, image in self.some.items()
        }
        shares = gathered(processes, own if processes is None else {key: own[key].cpu() for key in own})
        every = {position: patches for share in shares for position, patches in share.items()}
        return densest_place(torch.cat([every[position] for position in sorted(every)]).to(workload.like))

    def tile(self, workload: Workload, first: int, last: int) -> Tile:
        """Load the images from the first up to, not including, the last."""
        is_shared, rounding = len(workload.degrees) > 1, workload.kernel.rounding
        images = self.images[first:last]
        _, num_patches, channels = workload.shape
        width = channels + (0 if is_shared else rounding.norm_channels)
        if workload.places is None:
            storage = workload.like.new_empty(last - first, num_patches, width)
        else:  # the images lie beside each other at every place
            storage = workload.like.new_empty(num_patches, last - first, width).transpose(0, 1)
        patches = storage[..., :channels]
        for target, image in zip(patches, images, strict=True):
            target.copy_(rounding.prepare(self._patches(workload, image))[0])
            release(self.features)
        if is_shared:
            origin = None if self.origin is None else rounding.prepare(self.origin[None, None])[0, 0]
            tile = tile_of_maps(patches.unflatten(1, self.features.shape[2:]), workload.degrees, rounding, origin)
        else:
            tile = tile_of_vectors(storage, channels, rounding)
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
        if features.ndim == 4:
            patches = features.permute(0, 2, 3, 1).contiguous()
            is_shared = len(workload.degrees) > 1
            features = patches.flatten(1, 2) if is_shared else unit_vectors(patches, workload.degrees[0])
        return features if self.origin is None else features - self.origin
