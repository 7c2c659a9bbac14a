# SPDX-License-Identifier: Apache-2.0
"""Images are scored and shown as a viewer turns them by their EXIF orientation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import read_table
from conftest import OwnBackbone, product
from PIL import Image, ImageOps
from runs import assert_same, by_path, predict_loader
from torch import nn

from anomalib_musc import MuSc, PredictionWriter
from anomalib_musc.pool.high_bit_depth import read_image_file
from anomalib_musc.pool.orientation import turned_tensor

BACK = {  # how a camera stores a picture that viewers turn
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
SIZE = (96, 64)


def store(picture: Image.Image, path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    (picture if orientation == 1 else picture.transpose(BACK[orientation])).save(path, exif=exif)


@pytest.fixture
def pile(tmp_path) -> Path:
    """One scene in all orientations and formats, as viewers show it upright; the last has a defect."""
    (tmp_path / "pile").mkdir()
    for number in range(12):
        picture = Image.fromarray(product(30 + number, defect=number == 11)[0]).resize(SIZE)
        suffix = ("png", "webp", "tif")[number % 3]
        store(picture, tmp_path / f"pile/{number:02d}.{suffix}", 1 + number % 8)
        (tmp_path / "upright").mkdir(exist_ok=True)
        picture.save(tmp_path / f"upright/{number:02d}.png")
    return tmp_path / "pile"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("is_deep", [False, True])
def test_files_are_read_as_viewers_show_them(orientation, suffix, is_deep, tmp_path):
    values = np.arange(24 * 16, dtype=np.uint16).reshape(16, 24) if is_deep else product(0)[0][:16, :24]
    path = tmp_path / f"turned.{suffix}"
    store(Image.fromarray(values), path, orientation)
    expected = torch.from_numpy(values.astype(np.float32) if is_deep else values / np.float32(255))
    found = read_image_file(path).values
    torch.testing.assert_close(found[0] if is_deep else found.permute(1, 2, 0), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tensors_turn_as_pictures_do(orientation):
    values = np.arange(24, dtype=np.uint8).reshape(4, 6)
    picture = Image.fromarray(values)
    picture.getexif()[0x0112] = orientation
    expected = torch.from_numpy(np.array(ImageOps.exif_transpose(picture)))
    torch.testing.assert_close(turned_tensor(torch.from_numpy(values)[None], orientation)[0], expected)


def stems(batches) -> dict:
    return {Path(path).stem: item for path, item in by_path(batches).items()}


def test_scores_maps_regions_and_pictures_are_upright(pile, tmp_path, make_engine):
    writer = PredictionWriter(heatmaps=["npy"])
    model = MuSc(OwnBackbone(), prediction_writer=writer)
    ours = make_engine().predict(model, data_path=pile)
    rows = read_table(tmp_path)
    twins = stems(make_engine().predict(MuSc(OwnBackbone()), data_path=pile.with_name("upright")))
    assert_same(stems(ours), twins, tolerance=0.05)  # WebP is lossy
    assert [name for name, row in rows.items() if row["label"] == "anomalous"] == ["11.tif"]
    _, mask = product(41, defect=True)
    y, x = np.argwhere(mask).mean(axis=0)
    region = {name: int(rows["11.tif"][f"region_{name}"]) for name in ("x", "y", "width", "height")}
    assert region["x"] <= x * 1.5 <= region["x"] + region["width"]
    assert region["y"] <= y <= region["y"] + region["height"]
    for name in rows:
        (heatmap,) = tmp_path.rglob(f"heatmaps/pile/{name}.npy")
        assert np.load(heatmap).shape == SIZE[::-1]
        (picture,) = tmp_path.rglob(f"v0/images/pile/{name}*")
        drawn = np.asarray(Image.open(picture).convert("L"), dtype=float)
        shown = drawn[60:-12, 12 : drawn.shape[1] // 2 - 12]  # the image, without its margins
        rows_differ, columns_differ = shown.mean(axis=1).std(), shown.mean(axis=0).std()
        assert columns_differ > 2 * rows_differ or name == "11.tif", name  # the stripes stand


def test_returned_images_lie_as_their_maps(pile, make_engine):
    model = MuSc(OwnBackbone(), visualizer=False)
    for batch in make_engine().predict(model, data_path=pile):
        for image in batch.image:
            assert image.mean(dim=0).std(dim=1).mean() > 3 * image.mean(dim=0).std(dim=0).mean()


def test_items_that_are_no_plain_files_are_turned_too(pile, make_engine):
    plain = MuSc(OwnBackbone(), visualizer=False)
    make_engine().predict(plain, data_path=pile)
    loader = predict_loader(pile)
    loader.dataset.transform = nn.Identity()
    model = MuSc(OwnBackbone(), visualizer=False)
    make_engine().predict(model, dataloaders=loader)
    torch.testing.assert_close(model.pools[0].patch_scores, plain.pools[0].patch_scores, atol=1e-5, rtol=0)


def test_references_are_turned(pile, tmp_path, make_engine):
    arguments = {"mode": "reference", "visualizer": False}
    scores = []
    for references in (pile, tmp_path / "upright"):
        model = MuSc(OwnBackbone(), references=references, **arguments)
        scores.append(stems(make_engine().predict(model, data_path=tmp_path / "upright/11.png")))
    assert_same(*scores, tolerance=0.05)
