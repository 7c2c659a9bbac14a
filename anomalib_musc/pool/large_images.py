# SPDX-License-Identifier: Apache-2.0
"""Images that are cut into tiles: the size that all are brought to, and what their comparison takes."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image

from anomalib_musc.distances import estimate_seconds
from anomalib_musc.pool.checks import in_words
from anomalib_musc.pool.orientation import SIDEWAYS, is_sideways_tiff, orientation_of
from anomalib_musc.torch_model import MuScModel

_LONG = 10  # seconds of a comparison from which on its length is said


def common_size(paths: Iterable[Path]) -> tuple[int, int] | None:
    """Return the (height, width) that most of the images have, as viewers show them; the largest of equally many.

    Files that are no images do not count; ``None`` where none is one.
    """
    sizes: Counter[tuple[int, int]] = Counter()
    for path in paths:
        with suppress(Exception), Image.open(path) as image:  # broken in whatever way
            is_sideways = orientation_of(image) >= SIDEWAYS or is_sideways_tiff(image)
            sizes[image.size if is_sideways else (image.height, image.width)] += 1
    return max(sizes, key=lambda size: (sizes[size], size)) if sizes else None


def how_cut(model: MuScModel) -> str:
    """Return a sentence that says to what size images were brought, and into what a model with tiles cut them."""
    assert model.tiles is not None  # noqa: S101
    (height, width), (tile_height, tile_width) = model.tiles.image_size, model.tiles.tile_size
    return (
        f"Images are compared at {height} x {width} pixels, in {len(model.tiles.offsets)} tiles of {tile_height} x "
        f"{tile_width}."
    )


def other_sizes(model: MuScModel, sizes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return a warning where images that are cut into tiles had another size, by more than a quarter of a tile.

    Args:
        model: The model.
        sizes: (width, height) of the images, by name.
    """
    if model.tiles is None:
        return []
    height, width = model.tiles.image_size
    tile = max(model.tiles.tile_size)
    others = [name for name, size in sizes.items() if max(abs(size[0] - width), abs(size[1] - height)) > tile // 4]
    if not others:
        return []
    return [
        f"{len(others)} of {len(sizes)} images are of another size than {height} x {width} pixels, and were resized to "
        f"it: {others[0]}{' and others' if len(others) > 1 else ''}."
    ]


def slow_search(model: MuScModel, feature_maps: Sequence[torch.Tensor], num_pairs: int) -> str | None:
    """Return a warning that says how long the search of whole large images will take; ``None`` where there is none.

    Args:
        model: The model.
        feature_maps: One map ``(N, C, h, w)`` a layer.
        num_pairs: How many pairs of images are compared.
    """
    if model.tiles is None or model.search_radius is not None:
        return None
    seconds = num_pairs * sum(
        estimate_seconds(maps.shape[1:], model.aggregation_degrees, model.precision, model.device)
        for maps in feature_maps
    )
    if seconds < _LONG:
        return None
    height, width = feature_maps[0].shape[-2:]
    return (
        f"Each of {height * width} patches is sought in all of every other image: about {in_words(seconds)}, which "
        "grow with the square of an image's size. search_radius=2 (--search-radius 2) seeks it near its own place, "
        "where camera and product do not move, and grows in proportion."
    )
