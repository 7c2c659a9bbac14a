# SPDX-License-Identifier: Apache-2.0
"""Every file beneath a folder for prediction has its row: a score, or the reason why it has none."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from commands import read_table
from conftest import OwnBackbone, product, write_products
from PIL import Image
from runs import predict_loader

from anomalib_musc import MuSc

QUIET = {"visualizer": False}


def rows_of(folder: Path, results: Path, **arguments) -> dict[str, dict[str, str]]:
    engine = Engine(default_root_dir=results, enable_progress_bar=False)
    engine.predict(MuSc(OwnBackbone(), **{**QUIET, **arguments}), data_path=folder)
    return read_table(results)


def notes(rows: dict[str, dict[str, str]]) -> dict[str, str]:
    return {name: row["note"] for name, row in rows.items() if row["label"] == "skipped"}


def test_formats_that_anomalib_does_not_list_are_named(tmp_path, recwarn):
    write_products(tmp_path / "pile/deeper", range(6))
    picture = Image.fromarray(product(7)[0])
    for name in ("a.gif", "b.jp2", "c.avif"):
        picture.save(tmp_path / "pile" / name)
    picture.save(tmp_path / "pile/d.jfif", format="JPEG")
    (tmp_path / "pile/e.heic").write_bytes(b"phone")
    (tmp_path / "pile/README").write_text("a note")
    (tmp_path / "pile/broken.png").symlink_to(tmp_path / "nowhere.png")
    write_products(tmp_path / "elsewhere", range(2))
    (tmp_path / "pile/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "pile/twice").symlink_to(tmp_path / "pile/deeper")
    found = notes(rows_of(tmp_path / "pile", tmp_path / "results"))
    for name in ("a.gif", "b.jp2", "c.avif", "d.jfif", "e.heic", "README"):
        assert "not among the image formats that anomalib lists" in found.pop(name)
    assert found == {"broken.png": "a link that leads nowhere", "linked": "a link to a folder, which is not followed"}
    said = " ".join(str(warning.message) for warning in recwarn)
    assert all(name in said for name in ("a.gif", "b.jp2", "d.jfif", "e.heic", "README", "broken.png", "linked"))


def test_a_folder_of_links_and_odd_files_does_not_hang(tmp_path):
    paths = write_products(tmp_path / "pile", range(6))
    os.mkfifo(tmp_path / "pile/pipe.png")
    (tmp_path / "pile/folder.png").mkdir()
    (tmp_path / "pile/link.png").symlink_to(paths[0])
    (tmp_path / "pile/gone.png").symlink_to(tmp_path / "nowhere.png")
    rows = rows_of(tmp_path / "pile", tmp_path / "results")
    assert {name for name, row in rows.items() if row["score"]} == {path.name for path in paths} | {"link.png"}
    assert set(notes(rows)) == {"pipe.png", "folder.png", "gone.png"}


def test_further_pages_and_frames_are_named(tmp_path, recwarn):
    paths = write_products(tmp_path / "pile", range(6))
    pages = [Image.fromarray(product(seed)[0]) for seed in range(10, 13)]
    pages[0].save(tmp_path / "pile/pages.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "pile/frames.webp", save_all=True, append_images=pages[1:], lossless=True)
    rows = rows_of(tmp_path / "pile", tmp_path / "results")
    for name in ("pages.tif", "frames.webp"):
        assert rows[name]["score"]
        assert rows[name]["note"] == "only the first of 3 pages or frames is looked at"
    assert not rows[paths[0].name]["note"]
    said = [str(warning.message) for warning in recwarn if "only the first of 3 pages" in str(warning.message)]
    assert len(said) == 1
    assert said[0].startswith("Of 2 files: ")
    assert all(name in said[0] for name in ("pages.tif", "frames.webp"))


def test_masks_of_a_dataset_are_no_products(mvtec_root, tmp_path, caplog):
    shutil.copytree(mvtec_root / "widget", tmp_path / "widget")
    with caplog.at_level("INFO"):
        rows = rows_of(tmp_path / "widget", tmp_path / "results")
    assert set(notes(rows)) == {f"{number:03d}_mask.png" for number in range(4)}
    assert set(notes(rows).values()) == {"a mask of a dataset, in ground_truth"}
    assert "12 of test, 4 of train are taken as one pool, 4 masks are not" in caplog.text
    masks = rows_of(tmp_path / "widget/ground_truth", tmp_path / "other")  # whoever names them means them
    assert not notes(masks)


def test_pictures_of_earlier_tests_are_no_input(mvtec_root, tmp_path):
    shutil.copytree(mvtec_root, tmp_path / "data")
    engine = Engine(default_root_dir=tmp_path / "data/results", enable_progress_bar=False)
    engine.test(MuSc(OwnBackbone()), datamodule=MVTecAD(tmp_path / "data", category="widget", num_workers=0))
    assert len(list((tmp_path / "data/results").rglob("*.png"))) >= 12
    rows = rows_of(tmp_path / "data", tmp_path / "results")
    assert sum(bool(row["score"]) for row in rows.values()) <= 16
    table = next((tmp_path / "results").rglob("predictions.csv")).read_text().splitlines()
    assert sum(",anomalous," in line or ",normal," in line for line in table) == 16


@pytest.mark.parametrize("place", ["Patchcore/MVTecAD/widget/latest", "Padim/data/v3", "other/v1"])
def test_pictures_of_other_models_are_no_input(place, tmp_path):
    write_products(tmp_path / "pile/images", range(6))
    run = tmp_path / "pile/results" / place
    write_products(run / "images", range(10, 14))
    if place == "other/v1":
        (run.parent / "latest").symlink_to("v1")
    rows_of(tmp_path / "pile", tmp_path / "results")
    table = next((tmp_path / "results").rglob("predictions.csv")).read_text().splitlines()
    assert sum("a result of an earlier run" in line for line in table) == 4


def test_a_users_own_folder_v1_is_input(tmp_path):
    write_products(tmp_path / "pile/v1/images", range(6))
    assert not notes(rows_of(tmp_path / "pile", tmp_path / "results"))


def test_rows_are_found_anew_where_the_pool_is_known(tmp_path, make_engine):
    write_products(tmp_path / "pile", range(6))
    engine, model = make_engine(), MuSc(OwnBackbone(), **QUIET)
    engine.predict(model, data_path=tmp_path / "pile")
    (tmp_path / "pile/new.txt").write_text("new")
    engine.predict(model, data_path=tmp_path / "pile")
    assert model.model.backbone.num_images == 6
    assert "new.txt" in notes(read_table(tmp_path))
    engine.test(model, dataloaders=predict_loader(tmp_path / "pile"))  # of whose images none is missing


def test_too_many_pixels_are_said_plainly(tmp_path, monkeypatch):
    write_products(tmp_path / "pile", range(6))
    Image.fromarray(np.zeros((300, 300), np.uint8)).save(tmp_path / "pile/huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    note = notes(rows_of(tmp_path / "pile", tmp_path / "results"))["huge.png"]
    assert note.startswith("90000 pixels, more than twice Pillow's limit of 10000")
    assert "PIL.Image.MAX_IMAGE_PIXELS = None" in note
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert not notes(rows_of(tmp_path / "pile", tmp_path / "again"))
