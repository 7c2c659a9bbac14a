# SPDX-License-Identifier: Apache-2.0
"""A pool that is not what its user thinks says so; a good one does not."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, ImageItem
from conftest import OwnBackbone, product, write_products
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from anomalib_musc import MuSc, RsCINPostProcessor
from anomalib_musc.pool.warnings import warn_of_labels

QUIET = {"visualizer": False}


def write_discs(folder: Path, seeds: range) -> None:
    """Another product: bright discs on black, in colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        image = np.random.default_rng(seed).normal(20, 4, (64, 64, 3)).clip(0, 255).astype(np.uint8)
        cv2.circle(image, (32, 32), 22, (40, 160, 220), -1)
        cv2.imwrite(str(folder / f"disc{seed:03d}.png"), image)


def test_a_good_pool_is_silent(folder, make_engine):
    model = MuSc(OwnBackbone(), **QUIET)
    make_engine().predict(model, data_path=folder)
    assert model.pool_warnings == []


def test_two_products_in_one_folder(tmp_path, make_engine):
    write_products(tmp_path / "pile/a", range(31))
    write_discs(tmp_path / "pile/b", range(19))
    model = MuSc(OwnBackbone(), **QUIET)
    with pytest.warns(UserWarning, match=r"Two groups of images that differ all over \(31 and 19\).*disc000"):
        make_engine().predict(model, data_path=tmp_path / "pile")
    assert any("Two groups" in warning for warning in model.pool_warnings)


def test_references_of_another_product(tmp_path, folder, make_engine):
    write_discs(tmp_path / "references", range(6))
    model = MuSc(OwnBackbone(), mode="reference", references=tmp_path / "references", **QUIET)
    with pytest.warns(UserWarning, match="references look like another product"):
        make_engine().predict(model, data_path=folder)
    assert any("Most images are flagged (12 of 12)" in warning for warning in model.pool_warnings)
    model = MuSc(OwnBackbone(), mode="reference", references=folder.parent / "train/good", **QUIET)
    make_engine().predict(model, data_path=folder)
    assert not any("another product" in warning for warning in model.pool_warnings)


def test_grey_among_colour(tmp_path, make_engine):
    write_discs(tmp_path / "pile", range(8))
    path = tmp_path / "pile/disc003.png"
    Image.open(path).convert("L").save(path)
    model = MuSc(OwnBackbone(), **QUIET)
    with pytest.warns(UserWarning, match=r"Grey and coloured images are mixed \(1 and 7\), such as .*disc003"):
        make_engine().predict(model, data_path=tmp_path / "pile")


def test_a_threshold_that_flags_most(folder, make_engine):
    model = MuSc(OwnBackbone(), post_processor=RsCINPostProcessor(image_threshold=0.0), **QUIET)
    make_engine().predict(model, data_path=folder)
    assert any("Most images are flagged (12 of 12)" in warning for warning in model.pool_warnings)


@pytest.mark.parametrize(("flagged", "says"), [(20, False), (25, False), (28, True), (40, True)])
def test_most_means_more_than_half_beyond_chance(flagged, says):
    scores = torch.cat([torch.ones(flagged), torch.zeros(40 - flagged)])
    assert bool(warn_of_labels(scores, 0.5)) == says


class Tiles(Dataset):
    """A user's tiles, which share the path of their photograph, or have names of their own."""

    def __init__(self, path: Path, *, is_one: bool = False, name: str = "") -> None:
        self.path, self.is_one, self.name = path, is_one, name

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> ImageItem:
        image = torch.from_numpy(product(0 if self.is_one else index)[0]).permute(2, 0, 1) / 255
        return ImageItem(image=image, image_path=f"{self.path}{self.name.format(index)}")


def test_different_images_of_one_path_are_refused(tmp_path, make_engine):
    (path,) = write_products(tmp_path, range(1))
    loader = DataLoader(Tiles(path), collate_fn=ImageBatch.collate, batch_size=4)
    backbone = OwnBackbone()
    with pytest.raises(ValueError, match=r"Different images have the image_path .*000\.png.*leave image_path out"):
        make_engine().predict(MuSc(backbone), dataloaders=loader)
    loader = DataLoader(Tiles(path, is_one=True), collate_fn=ImageBatch.collate)
    assert len(make_engine().predict(MuSc(OwnBackbone()), dataloaders=loader)) == 6


def test_tiles_with_names_of_their_own_are_scored_as_they_are(tmp_path, make_engine):
    loader = DataLoader(Tiles(tmp_path / "photograph.tif", name="#{}"), collate_fn=ImageBatch.collate, batch_size=4)
    model = MuSc(OwnBackbone(), prediction_writer=False, grey_range=(0, 4095), **QUIET)
    make_engine().predict(model, dataloaders=loader)
    assert len(set(model.pools[0].raw_scores.tolist())) == 6
