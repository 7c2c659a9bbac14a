# SPDX-License-Identifier: Apache-2.0
"""Every run writes into a folder of its own, which is never used again."""

from pathlib import Path

import pytest
from anomalib.engine import Engine
from commands import SMALL, anomalib
from conftest import OwnBackbone, write_products
from runs import datamodule

from anomalib_musc import MuSc


def engine(root: Path) -> Engine:
    return Engine(default_root_dir=root, enable_progress_bar=False, logger=False, accelerator="cpu")


def pictures(folder: Path) -> set[str]:
    return {path.relative_to(folder / "images").as_posix() for path in (folder / "images").rglob("*.png")}


@pytest.mark.parametrize("reuse", [False, True], ids=["new engine", "same engine"])
def test_a_second_prediction_leaves_the_first_alone(reuse, tmp_path):
    first, second = (tmp_path / name / "test/good" for name in ("fabric", "gear"))
    write_products(first, range(4))
    write_products(second, range(10, 15))
    runner, model = engine(tmp_path / "results"), MuSc(OwnBackbone())
    runner.predict(model, data_path=first)
    root = tmp_path / "results/MuSc"
    table = (root / "v0/predictions.csv").read_bytes()
    assert (root / "latest").resolve() == root / "v0"
    runner = runner if reuse else engine(tmp_path / "results")
    runner.predict(model, data_path=second)
    assert (root / "latest").resolve() == root / "v1"
    assert (root / "v0/predictions.csv").read_bytes() == table
    assert len(pictures(root / "v0")) == 4
    assert len(pictures(root / "v1")) == 5
    assert sorted(path.name for path in root.iterdir()) == ["latest", "v0", "v1"]


def test_every_command_in_any_order(tmp_path, mvtec_root):
    data, root = datamodule(mvtec_root), tmp_path / "results/MuSc/MVTecAD/widget"
    for number, run in enumerate(("test", "train", "test", "predict", "train")):
        getattr(engine(tmp_path / "results"), run)(MuSc(OwnBackbone()), datamodule=data)
        assert (root / "latest").resolve() == root / f"v{number}"
        assert len(pictures(root / f"v{number}")) == 12
    assert len(list(root.glob("v*"))) == 5


def test_a_plain_folder_called_latest_is_kept(tmp_path, folder):
    old = tmp_path / "results/MuSc/latest/images/1.png"
    old.parent.mkdir(parents=True)
    old.write_text("of an earlier version")
    engine(tmp_path / "results").predict(MuSc(OwnBackbone()), data_path=folder)
    assert (tmp_path / "results/MuSc/v0/images/1.png").read_text() == "of an earlier version"
    assert (tmp_path / "results/MuSc/latest").resolve().name == "v1"


def test_mvtec_and_mvtec_ad_are_one_dataset(tmp_path, mvtec_root):
    for name in ("MVTec", "MVTecAD"):
        data = ["--data", name, "--data.root", mvtec_root, "--data.category", "widget", "--data.num_workers", "0"]
        done = anomalib("test", "--model", "MuSc", *SMALL, *data, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "results/MuSc").iterdir()] == ["MVTecAD"]
    folders = sorted(path.name for path in (tmp_path / "results/MuSc/MVTecAD/widget").iterdir())
    assert folders == ["latest", "v0", "v1"]
    last = done.stdout.strip().splitlines() + done.stderr.strip().splitlines()
    assert any(line.endswith("MVTecAD/widget/v1") for line in last)
