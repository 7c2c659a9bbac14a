# SPDX-License-Identifier: Apache-2.0
"""Files and folders with any name, and links that lead nowhere: in predictions, references and roots of data."""

import shutil

import pytest
from anomalib.data import Folder
from commands import SMALL, TINY, anomalib, read_table
from conftest import OwnBackbone, write_products
from runs import by_path, datamodule

from anomalib_musc import MuSc

NAMES = ["Größe", "产品", "日本", "gro\u0308ße", "a\u3000b c", "файл"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name(name, tmp_path, make_engine):
    paths = write_products(tmp_path / name, range(4))
    references = tmp_path / f"{name} {name}"
    write_products(references, range(20, 24))
    model = MuSc(OwnBackbone(), mode="both", references=references)
    predicted = by_path(make_engine().predict(model, data_path=tmp_path / name))
    assert predicted.keys() == set(map(str, paths))
    assert read_table(tmp_path).keys() == {path.name for path in paths}
    assert len(list((tmp_path / "results").rglob("*.png"))) == 4


def test_one_file_of_any_name(tmp_path, make_engine):
    (path,) = write_products(tmp_path / "日本", range(1))
    path = path.rename(path.with_name("Größe 1.png"))
    write_products(tmp_path / "ok", range(20, 24))
    model = MuSc(OwnBackbone(), mode="reference", references=tmp_path / "ok")
    assert by_path(make_engine().predict(model, data_path=path)).keys() == {str(path)}


def test_from_the_command_line(tmp_path):
    write_products(tmp_path / "Größe/产品", range(4))
    done = anomalib("predict", "--model", "MuSc", *SMALL, "--data", "Größe", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(read_table(tmp_path / "results")) == 4


def test_roots_of_data(tmp_path, mvtec_root, make_engine):
    shutil.copytree(mvtec_root, tmp_path / "产品")
    (metrics,) = make_engine().test(MuSc(**TINY), datamodule=datamodule(tmp_path / "产品"))
    assert metrics["image_AUROC"] > 0.5
    root, seeded = tmp_path / "产品/widget", {"num_workers": 0, "seed": 0}
    data = Folder(name="Größe", root=root, normal_dir="train/good", abnormal_dir="test/scratch", **seeded)
    make_engine().test(MuSc(**TINY), datamodule=data)


@pytest.fixture
def linked(tmp_path):
    """Four images, and a link to one that is gone."""
    write_products(tmp_path / "images", range(4))
    (tmp_path / "images/gone.png").symlink_to(tmp_path / "deleted.png")
    return tmp_path / "images"


def test_a_dangling_link_is_left_out_and_named(linked, tmp_path, make_engine):
    with pytest.warns(UserWarning, match=r"Skipped .*gone.png: a link that leads nowhere"):
        predictions = make_engine().predict(MuSc(OwnBackbone()), data_path=linked)
    assert len(predictions) == 4
    row = read_table(tmp_path)["gone.png"]
    assert (row["label"], row["note"]) == ("skipped", "a link that leads nowhere")


def test_a_dangling_link_among_references(linked, tmp_path, make_engine):
    write_products(tmp_path / "query", range(10, 12))
    model = MuSc(OwnBackbone(), mode="reference", references=linked)
    with pytest.warns(UserWarning, match=r"Left out of the references.*gone.png"):
        make_engine().predict(model, data_path=tmp_path / "query")
    assert len(model.model.bank) == 4
