# SPDX-License-Identifier: Apache-2.0
"""Images of a pool, from wherever they are to tiles on the compute device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from anomalib_musc.distances.plan import Workload
from anomalib_musc.distances.processes import Processes, gathered
from anomalib_musc.distances.storage import first_bytes, release
from anomalib_musc.distances.survey import check_values, densest_place, is_static, some_of, some_places
from anomalib_musc.distances.tiles import CANCELLATION, Tile, tile_of_maps, tile_of_vectors
from anomalib_musc.distances.windows import reciprocal_norms, window_sums_at, write_unit_vectors


@dataclass(frozen=True)
class PoolLoader:
    """Images that are compared, each loaded and prepared whenever a tile needs it.

    Attributes:
        features: Patches ``(N, L, C)`` or maps ``(N, C, H, W)``, on any device.
        images: Indices of those that are compared.
        prepare: Changes the features of some images, ``(n, ...)``, each by itself.
        some: A few of all images, at which one may look: of those here, the index, by the position among them.
        origin: What is subtracted from all patches, ``(C,)``, see :func:`.densest_place`.
        is_static: Whether images are all but equal at many places, see :func:`.is_static`.
        memory: Bytes that a tile of all images takes, of one degree after the other: new memory costs more than most of
            what is computed in it.
        names: The images' indices among the features that were given, where those here are held ones.
    """

    features: torch.Tensor
    images: Sequence[int]
    prepare: Callable[[torch.Tensor], torch.Tensor] | None
    some: Mapping[int, int] = field(default_factory=dict)
    origin: torch.Tensor | None = None
    is_static: bool = False
    memory: torch.Tensor | None = None
    names: Sequence[int] = ()

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
        """Return a loader that subtracts the densest place, the same one in all processes, and knows static pools.

        Of patches whose windows are still to be summed only where a twentieth of them is all but equal: elsewhere
        products are precise enough.
        """
        some, same = self._some_patches(replace(workload, degrees=workload.degrees[:1]), processes)
        place, distance = _agreed(densest_place(some), processes)
        static = is_static(same - place, CANCELLATION, "kinds" if workload.places is None else "all")
        if len(workload.degrees) > 1:
            last = replace(workload, degrees=(max(workload.degrees),))
            _, same = self._some_patches(last, processes)  # patches may be of few kinds, and windows of many
            static = static or is_static(same, CANCELLATION, "single")
            if distance**2 >= CANCELLATION:
                return replace(self, is_static=static)
            place, _ = _agreed(densest_place(self._some_patches(workload, processes)[0]), processes)
        return replace(self, is_static=static, origin=place if place.any() else None)

    def _some_patches(self, workload: Workload, processes: Processes | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return some patches of a few images, ``(n, C)``, and those at the same places of each, ``(I, k, C)``."""
        positions, num_patches = list(self.some), workload.shape[1]
        own: dict[int, torch.Tensor] = {}
        is_on_host = workload.like.device.type == "cpu"  # where images apart from each other would be copied first
        at_once = 1 if is_on_host else workload.loaded_at_once
        for first in range(0, len(positions), at_once):
            some = positions[first : first + at_once]
            features = self._prepared([self.some[position] for position in some], workload.like)
            places = [torch.stack([some_places(num_patches, it) for it in (position, 0)]) for position in some]
            patches = _patches_at(features, torch.stack(places).to(features.device), workload.degrees)
            own.update(zip(some, patches, strict=True))
            release(self.features)
        shares = gathered(processes, own if processes is None else {key: own[key].cpu() for key in own})
        every = {position: patches for share in shares for position, patches in share.items()}
        some, same = torch.stack([every[position] for position in sorted(every)], dim=1).to(workload.like)
        return some.flatten(0, 1), same

    def tile(self, workload: Workload, first: int, last: int) -> Tile:
        """Load the images from the first up to, not including, the last."""
        is_shared, rounding = len(workload.degrees) > 1, workload.kernel.rounding
        images, channels = self.images[first:last], workload.shape[2]
        storage, rest = self._storage(workload, len(images), channels + (0 if is_shared else rounding.norm_channels))
        patches, at_once = storage[..., :channels], min(workload.loaded_at_once, len(images))
        spare = self._spare(workload, at_once)

        def load(some: slice) -> None:
            target = patches[some]
            self._write_patches(workload, images[some], target, spare[: len(target)])
            rounding.change_basis(target)
            release(self.features)

        if is_shared:
            for index in range(0, len(images), at_once):
                load(slice(index, min(index + at_once, len(images))))
            origin = None if self.origin is None else self.origin.clone()
            if origin is not None:
                rounding.change_basis(origin[None])
            tile = tile_of_maps(patches.unflatten(1, self.features.shape[2:]), workload.degrees, rounding, origin, rest)
        else:
            tile = tile_of_vectors(storage, channels, rounding, rest, at_once, load)
        tile.is_static = self.is_static
        is_finite = tile.half_norms.isfinite().all(dim=-1).all(dim=0)  # (b,)
        if not is_finite.all():
            names = (self.names or self.images)[first:last]
            bad = [names[index] for index in (~is_finite).nonzero().flatten().tolist()]
            msg = f"features must be finite once prepared, got NaN or infinity in images {bad[:10]}."
            raise ValueError(msg)
        return tile

    def _storage(self, workload: Workload, num_images: int, width: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return where the patches of a tile go, ``(b, L, width)``, and what is left of the memory of all images."""
        shape = [num_images, workload.shape[1]]
        if workload.places is not None:  # the images lie beside each other at every place
            shape.reverse()
        if self.memory is None or num_images < len(self.images):
            storage, rest = workload.like.new_empty(*shape, width), None
        else:
            storage = first_bytes(self.memory, (*shape, width), workload.like.dtype)
            rest = self.memory[storage.nbytes :]
        return storage if workload.places is None else storage.transpose(0, 1), rest

    def held(self, workload: Workload, tile_bytes: int) -> "PoolLoader":
        """Return a loader of images that are prepared and held, so that it is not done again for every degree.

        Args:
            workload: One of those that they are held for.
            tile_bytes: Memory of a tile of all images, which is used again.
        """
        like, at_once = workload.like, workload.loaded_at_once
        maps = like.new_empty(len(self.images), *self.features.shape[2:], self.features.shape[1])
        for index in range(0, len(self.images), at_once):
            images = self.images[index : index + at_once]
            maps[index : index + at_once] = self._prepared(images, like).permute(0, 2, 3, 1)
            release(self.features)
        memory = torch.empty(tile_bytes, dtype=torch.uint8, device=like.device)
        places = {image: place for place, image in enumerate(self.images)}
        some = {position: places[image] for position, image in self.some.items()}
        held = replace(self, features=maps.permute(0, 3, 1, 2), images=range(len(maps)), prepare=None, some=some)
        return replace(held, memory=memory, names=tuple(self.images))

    def _prepared(self, images: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        run = range(images[0], images[0] + len(images))
        features = self.features[run.start : run.stop] if list(images) == list(run) else self.features[list(images)]
        features = features.to(like)
        return features if self.prepare is None else self.prepare(features).detach()

    def _spare(self, workload: Workload, at_once: int) -> torch.Tensor:
        """Return memory of some images, which is used for others after them: new memory costs more than a sum."""
        return workload.like.new_empty(at_once, *workload.shape[1:])

    def _write_patches(
        self, workload: Workload, images: Sequence[int], target: torch.Tensor, spare: torch.Tensor
    ) -> None:
        """Load the patches of n images to ``(n, L, C)``, less the origin, their windows summed where D is 1."""
        features = self._prepared(images, workload.like)
        if features.ndim == 3:
            target.copy_(features)
        elif len(workload.degrees) > 1:
            target.unflatten(1, features.shape[2:]).copy_(features.permute(0, 2, 3, 1))
        else:
            patches = features.permute(0, 2, 3, 1)
            if not patches.is_contiguous():
                patches = spare.unflatten(1, features.shape[2:]).copy_(patches)
            write_unit_vectors(patches, workload.degrees[0], self.origin, target)
            return
        if self.origin is not None:
            target.sub_(self.origin)


def _agreed(found: tuple[torch.Tensor, float], processes: Processes | None) -> tuple[torch.Tensor, float]:
    """Return what the first process has found: products of the same numbers may differ in their last digits."""
    place, distance = found
    first, distance = gathered(processes, (place.cpu(), distance))[0]
    return first.to(place), distance


def _patches_at(features: torch.Tensor, places: torch.Tensor, degrees: tuple[int, ...]) -> torch.Tensor:
    """Return the patches of prepared features at some places, their windows summed where D is 1: ``(n, ..., C)``.

    Args:
        features: Patches ``(n, L, C)`` or maps ``(n, C, H, W)``.
        places: Those of each image, ``(n, ...)``.
        degrees: The D degrees.
    """
    images = torch.arange(len(features), device=features.device).view(-1, *[1] * (places.ndim - 1)).expand_as(places)
    if features.ndim == 3:
        return features[images, places]
    maps = features.permute(0, 2, 3, 1)
    if len(degrees) > 1:
        return maps.flatten(1, 2)[images, places]
    sums, _ = window_sums_at(maps.contiguous(), degrees[0], images.flatten(), places.flatten())
    return (sums * reciprocal_norms(sums, degrees[0])).unflatten(0, places.shape)
