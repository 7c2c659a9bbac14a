# SPDX-License-Identifier: Apache-2.0
"""The picture of each image: proportions, outlines, enlarged regions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.visualization import ImageVisualizer
from commands import read_paths
from conftest import product, write_products
from PIL import Image
from runs import datamodule

from anomalib_musc import MuSc
from anomalib_musc.output.fonts import legible
from anomalib_musc.output.picture import SIDE, draw_picture
from anomalib_musc.output.regions import Region

GREY = 120


def panels(picture: Image.Image, number: int, ratio: float) -> list[np.ndarray]:
    """Cut a picture into its panels."""
    pixels = np.asarray(picture)
    width = (picture.width - 8) // number - 8
    height = round(width / ratio)
    return [pixels[-8 - height : -8, 8 + index * (width + 8) :][:, :width] for index in range(number)]


@pytest.mark.parametrize("size", [(640, 320), (300, 900), (4000, 3000), (20, 10), (3, 500)])
def test_panels_have_the_images_proportions(size):
    width, height = size
    picture = draw_picture(np.full((height, width, 3), GREY, np.uint8), "x.png", torch.zeros(8, 8))
    scale = min(SIDE / max(size), 4)
    panel = max(1, round(width * scale))
    assert picture.width == 8 + 2 * (8 + max(panel, 160))  # of narrow ones the caption is to be read
    shown = (np.asarray(picture)[-20] == GREY).all(axis=-1)
    assert abs(int(shown[: picture.width // 2].sum()) - panel) <= 1
    assert abs(picture.height - round(height * scale) - 60) <= 1


def test_only_a_mask_that_holds_something_is_outlined():
    image = np.full((128, 128, 3), GREY, np.uint8)
    mask = np.zeros((64, 64), bool)
    plain = draw_picture(image, "x", torch.zeros(64, 64), mask)
    assert plain.tobytes() == draw_picture(image, "x", torch.zeros(64, 64)).tobytes()
    mask[20:40, 20:40] = True
    first, second = panels(draw_picture(image, "x", torch.zeros(64, 64), mask), 2, 1)
    assert (first == GREY).all()
    white = np.argwhere((second > 240).all(axis=-1))
    assert white.min() == pytest.approx(160, abs=4)  # of 512
    assert white.max() == pytest.approx(320, abs=4)


@pytest.mark.parametrize(("side", "is_enlarged"), [(40, True), (200, False)])
def test_a_region_too_small_to_be_seen_is_enlarged_beside_the_whole(side, is_enlarged):
    image = np.full((2000, 3000, 3), GREY, np.uint8)
    image[500 : 500 + side, 2900 : 2900 + side] = (250, 0, 0)
    mask = (image[::10, ::10, 0] > 200).astype(np.uint8)
    region = Region(2900, 500, side, side, side * side)
    picture = draw_picture(image, "x", torch.zeros(64, 64), mask, regions=[region])
    if not is_enlarged:
        assert picture.width == 8 + 2 * 520
        return
    *_, detail = panels(picture, 3, 1.5)
    red = (detail[..., 0].astype(int) - detail[..., 1] > 100).sum()
    assert red > 60 * 60  # 7 x 7 pixels in the whole


@pytest.mark.parametrize("caption", ["", "Größe 部品 \udcff.png", "long " * 200])
def test_any_caption_fits(caption):
    assert draw_picture(np.zeros((30, 40, 3), np.uint8), caption).size == (176, 180)


def test_pictures_are_files_that_every_viewer_shows(tmp_path, own_backbone, make_engine):
    (tmp_path / "pile").mkdir()
    for number, ending in enumerate(("png", "jpg", "bmp", "tiff", "webp", "TIF", "JPG")):
        Image.fromarray(product(number)[0]).save(tmp_path / f"pile/{number}.{ending}")
    Image.fromarray(product(30, defect=True)[0]).resize((640, 320)).save(tmp_path / "pile/defect.bmp")
    make_engine().predict(MuSc(own_backbone), data_path=tmp_path / "pile")
    (run,) = (path.parent for path in tmp_path.rglob("predictions.csv"))
    rows = read_paths(tmp_path)
    assert len(rows) == 8
    for row in rows.values():
        with Image.open(run / row["picture"]) as picture:
            assert picture.format in {"PNG", "JPEG"}
            if row["path"].endswith("defect.bmp"):
                assert row["label"] == "anomalous"
                assert picture.width == 8 + 2 * (8 + SIDE)
                _, heatmap = panels(picture, 2, 2)
                assert (heatmap > 240).all(axis=-1).any()


def test_a_test_shows_the_true_mask(tmp_path, mvtec_root, own_backbone, make_engine):
    make_engine().test(MuSc(own_backbone), datamodule=datamodule(mvtec_root))
    shown = {path.parent.name: Image.open(path) for path in tmp_path.rglob("images/**/*.png")}
    assert shown["scratch"].width == shown["good"].width == 8 + 3 * (8 + 256)
    _, true_mask, _ = panels(shown["scratch"], 3, 1)
    assert (true_mask > 250).all(axis=-1).any()


def test_anomalibs_visualizer_works_in_its_place(tmp_path, folder, own_backbone, make_engine):
    make_engine().predict(MuSc(own_backbone, visualizer=ImageVisualizer()), data_path=folder)
    pictures = list(tmp_path.rglob("images/**/*.png"))
    assert len(pictures) == 12
    assert len(read_paths(tmp_path)) == 12
    assert {Path(picture).parent.name for picture in pictures} == {"good", "scratch"}


def test_pictures_of_grey_images_are_grey(tmp_path, own_backbone, make_engine):
    write_products(tmp_path / "pile", range(6))
    deep = np.asarray(Image.fromarray(product(7)[0]).convert("L")).astype(np.uint16) * 16
    Image.fromarray(deep).save(tmp_path / "pile/deep.png")
    make_engine().predict(MuSc(own_backbone), data_path=tmp_path / "pile")
    (picture,) = tmp_path.rglob("images/**/deep.png")
    first, _ = panels(Image.open(picture), 2, 1)
    assert first.std() > 20
    assert (first[..., 0] == first[..., 1]).all()


@pytest.mark.parametrize("text", ["Größe œuvre Łódź.png", "деталь 7.png", "Ωμέγα", "部品.png", "產品 ไทย 🙂"])
def test_no_letter_of_a_caption_is_a_box(text):
    shown, font = legible(text, 14)
    nothing = font.getmask("\U000f8ff0")  # of a private plane
    assert all(bytes(font.getmask(letter)) != bytes(nothing) for letter in shown if not letter.isspace())
    assert len(shown) == len(text)


def test_letters_of_europe_are_shown_as_they_are():
    for text in ("Größe œuvre Łódź.png", "деталь 7.png", "Ωμέγα"):
        assert legible(text, 14)[0] == text
