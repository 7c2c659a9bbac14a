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


def how_cut(model: MuScModel, sizes: Mapping[str, tuple[int, int]]) -> str:
    """Return a sentence that says to what size images were brought, and into what they were cut.

    Args:
        model: A model with tiles.
        sizes: (width, height) of the images, by name.
    """
    assert model.tiles is not None  # noqa: S101
    (height, width), (tile_height, tile_width) = model.tiles.image_size, model.tiles.tile_size
    others = sum(size != (width, height) for size in sizes.values())
    resized = f", {others} of {len(sizes)} from another size" if others else ""
    return (
        f"Images are compared at {height} x {width} pixels{resized}, in {len(model.tiles.offsets)} tiles of "
        f"{tile_height} x {tile_width}."
    )


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
    height, width = feature_maps[0].shape[-2:]
    return (
        f"Each of {height * width} patches is sought in all of every other image: about {in_words(seconds)}, which "
        "grow with the square of an image's size. search_radius=2 (--search-radius 2) seeks it near its own place, "
        "where camera and product do not move, and grows in proportion."
    )
