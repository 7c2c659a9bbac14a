# SPDX-License-Identifier: Apache-2.0
"""Large images in tiles: where they are cut, how maps are joined, and what is refused."""

import pytest
import torch
from anomalib.data.utils.tiler import Tiler
from conftest import OwnBackbone
from runs import AnomalyMaps
from seeded import rand, randn

from anomalib_musc import MuSc, MuScModel
from anomalib_musc.backbones.tiles import make_tiles

SIZES = [
    ((96, 96), (96, 96), 0),
    ((160, 224), (96, 96), 32),
    ((176, 96), (64, 48), (16, 32)),
    ((320, 320), (80, 96), None),
]


@pytest.mark.parametrize(("image_size", "tile_size", "overlap"), SIZES)
def test_tiles_cover_an_image_and_none_passes_its_edge(image_size, tile_size, overlap):
    tiles = make_tiles(image_size, tile_size, overlap, (16, 16))
    covered = torch.zeros(image_size, dtype=torch.int)
    for top, left in tiles.offsets:
        assert top + tile_size[0] <= image_size[0]
        assert left + tile_size[1] <= image_size[1]
        covered[top : top + tile_size[0], left : left + tile_size[1]] += 1
    assert covered.min() >= 1
    images = rand(2, 3, *image_size)
    cut = tiles.cut(images)
    assert cut.shape == (2 * len(tiles.offsets), 3, *tile_size)
    top, left = tiles.offsets[-1]
    assert torch.equal(cut[-1], images[1, :, top : top + tile_size[0], left : left + tile_size[1]])


@pytest.mark.parametrize(("image_size", "tile_size", "overlap"), SIZES)
@pytest.mark.parametrize("cell", [16, 8])
def test_maps_that_agree_where_they_overlap_are_joined_to_what_they_were_cut_from(image_size, tile_size, overlap, cell):
    tiles = make_tiles(image_size, tile_size, overlap, (16, 16))
    whole = randn(2, 5, image_size[0] // cell, image_size[1] // cell)
    rows, columns = tile_size[0] // cell, tile_size[1] // cell
    places = [(top // cell, left // cell) for top, left in tiles.offsets]
    parts = torch.stack([whole[..., top : top + rows, left : left + columns] for top, left in places], dim=1)
    torch.testing.assert_close(tiles.join(parts.flatten(0, 1)), whole)


def test_overlaps_fade_from_one_tile_to_the_next():
    tiles = make_tiles((32, 96), (32, 64), (0, 32), (4, 4))
    maps = torch.stack([torch.full((1, 8, 16), value) for value in (0.0, 1.0)])
    row = tiles.join(maps)[0, 0, 0]
    assert row.shape == (24,)
    assert (row[:8] == 0).all()
    assert (row[16:] == 1).all()
    steps = row[7:17].diff()
    assert (steps > 0).all()
    assert steps.max() < 0.15  # no seam


def test_an_overlap_is_a_quarter_and_a_size_whole_patches_by_default():
    tiles = make_tiles((1000, 500), (224, 224), None, (14, 14))
    assert tiles.image_size == (994, 504)
    assert tiles.stride == (224 - 56, 224 - 56)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile_size": 96}, "tile_size=96 needs image_size, to which images are resized before they are cut"),
        ({"image_size": 64, "tile_size": 96}, r"image_size must be at least tile_size=\(96, 96\), got \(64, 64\)"),
        ({"image_size": 224, "tile_size": 100}, "image_size must be divisible by the backbone's patch size .* got 100"),
        (
            {"image_size": 224, "tile_size": 96, "tile_overlap": 10},
            r"tile_overlap must be multiples of the backbone's patch size \(16, 16\), got \(10, 10\)",
        ),
        (
            {"image_size": 224, "tile_size": 96, "tile_overlap": 96},
            r"tile_overlap must be smaller than tile_size=\(96, 96\)",
        ),
        (
            {"image_size": 224, "tile_size": 96, "tile_overlap": -16},
            "tile_overlap must be a whole number of at least 0, .* got -16",
        ),
        ({"image_size": 224, "tile_size": 96, "tile_overlap": 0.25}, "tile_overlap must be a whole number"),
        ({"image_size": 224, "tile_size": "96"}, "tile_size must be a whole number of at least 1, .* got '96'"),
        ({"tile_overlap": 16}, "tile_overlap=16 is of tiles; give tile_size, too"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MuSc("musc-tiny", **arguments)


def test_a_backbone_whose_patches_do_not_divide_the_tiles():
    model = MuScModel(OwnBackbone(), image_size=(96, 160), tile_size=64, tile_overlap=32)
    maps, tokens = model.extract(rand(2, 3, 96, 160))
    assert maps[0].shape[-2:] == (96 * maps[0].shape[-2] // 96, 160 * maps[0].shape[-2] // 96)
    assert tokens.norm(dim=1) == pytest.approx([1, 1])

    class Odd(torch.nn.Module):
        image_size = 64

        def forward(self, images):
            return [torch.nn.functional.interpolate(images, (5, 5))], images.mean(dim=(2, 3))

    with pytest.raises(
        ValueError, match=r"begin at \[32\] pixels, which the patches of this backbone, 12.8 pixels wide"
    ):
        MuScModel(Odd(), image_size=96, tile_size=64, tile_overlap=32).extract(rand(2, 3, 96, 96))


@pytest.mark.parametrize("backbone", ["musc-tiny", "test_vit", "vit_tiny_patch16_224"])
def test_anomalibs_tiler_does_what_the_arguments_do(backbone):
    pretrained = backbone == "musc-tiny"
    torch.manual_seed(0)
    model = MuScModel(backbone, pretrained=pretrained, image_size=(128, 192))
    state = {name: values.clone() for name, values in model.backbone.state_dict().items()}
    model.tiler = Tiler(tile_size=64, stride=32)
    torch.manual_seed(0)
    expected = MuScModel(backbone, pretrained=pretrained, image_size=(128, 192), tile_size=64, tile_overlap=32)
    assert model.tiles == expected.tiles
    kept = {name: values for name, values in model.backbone.state_dict().items() if values.shape == state[name].shape}
    assert all(torch.equal(values, state[name]) for name, values in kept.items())
    expected.backbone.load_state_dict(model.backbone.state_dict())
    images = rand(3, 3, 128, 192)
    torch.testing.assert_close(model(images).anomaly_map, expected(images).anomaly_map)


def test_a_tiler_that_comes_too_late_or_does_not_fit_changes_nothing():
    model = MuScModel("musc-tiny", image_size=128)
    for size, message in ((256, "image_size must be at least tile_size"), (72, "tile_size must be multiples")):
        with pytest.raises(ValueError, match=message):
            model.tiler = Tiler(tile_size=size, stride=size)
    model.build_bank([rand(3, 3, 128, 128)])
    with pytest.raises(ValueError, match="with others than which the bank was made"):
        model.tiler = Tiler(tile_size=64, stride=32)
    assert (model.tiler, model.tiles, model.backbone.image_size) == (None, None, (128, 128))
    tiled = MuScModel("musc-tiny", image_size=128, tile_size=64, tile_overlap=32)
    tiled.build_bank([rand(3, 3, 128, 128)])
    tiled.tiler = Tiler(tile_size=64, stride=32)  # as it is
    with pytest.raises(ValueError, match="with others than which the bank was made"):
        tiled.tiler = Tiler(tile_size=64, stride=64)


def test_a_tiler_that_is_taken_away():
    model, images = MuScModel("musc-tiny", image_size=128), rand(3, 3, 128, 128)
    expected = model(images).anomaly_map
    model.tiler = Tiler(tile_size=64, stride=32)
    assert (model(images).anomaly_map - expected).abs().max() > 1e-3
    model.tiler = None
    torch.testing.assert_close(model(images).anomaly_map, expected)


def test_an_export_takes_any_number_of_images():
    model = MuScModel("musc-tiny", image_size=(96, 128), tile_size=64, search_radius=1)
    model.build_bank([rand(3, 3, 96, 128)])
    number = torch.export.Dim("number", min=1, max=64)
    exported = torch.export.export(AnomalyMaps(model), (rand(2, 3, 96, 128),), dynamic_shapes=({0: number},)).module()
    for count in (1, 2, 5):
        images = rand(count, 3, 96, 128, seed=count)
        torch.testing.assert_close(exported(images), model(images).anomaly_map, atol=1e-5, rtol=0)


def test_no_image_depends_on_those_beside_it():
    model = MuScModel("musc-tiny", image_size=(96, 160), tile_size=64)
    images = rand(5, 3, 96, 160)
    maps, tokens = model.extract(images)
    for index in range(5):
        alone, token = model.extract(images[[index]])
        torch.testing.assert_close(alone[0][0], maps[0][index], atol=1e-5, rtol=0)
        torch.testing.assert_close(token[0], tokens[index], atol=1e-6, rtol=0)
