# SPDX-License-Identifier: Apache-2.0
"""Every run writes into a folder of its own, which is never used again."""

from pathlib import Path

import pytest
import torch
from anomalib.data import MVTec, MVTecAD
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from commands import SMALL, anomalib
from conftest import OwnBackbone, write_products
from lightning.pytorch import Callback
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


class Interrupted(Callback):
    def on_predict_batch_start(self, *args):  # noqa: ARG002
        raise KeyboardInterrupt


def test_a_run_that_fails_leaves_no_folder(tmp_path):
    products, one = tmp_path / "products", tmp_path / "one"
    write_products(products, range(4))
    write_products(one, range(1))
    root = tmp_path / "results/MuSc"
    with pytest.raises(ValueError, match="at least 2 images"):
        engine(tmp_path / "results").predict(MuSc(OwnBackbone()), data_path=one)
    assert not list(root.iterdir())
    engine(tmp_path / "results").predict(MuSc(OwnBackbone()), data_path=products)
    before = sorted(tmp_path.rglob("*"))
    runner = engine(tmp_path / "results")
    for _ in range(2):
        with pytest.raises(ValueError, match="at least 2 images"):
            runner.predict(MuSc(OwnBackbone()), data_path=one)
    stopped = Engine(default_root_dir=tmp_path / "results", callbacks=[Interrupted()], logger=False)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        stopped.predict(MuSc(OwnBackbone(), prediction_writer=False), data_path=products)
    assert sorted(tmp_path.rglob("*")) == before
    assert (root / "latest").resolve() == root / "v0"
    runner.predict(MuSc(OwnBackbone()), data_path=products)
    assert (root / "latest").resolve() == root / "v1"


def test_every_command_in_any_order(tmp_path, mvtec_root):
    data, root = datamodule(mvtec_root), tmp_path / "results/MuSc/MVTecAD/widget"
    for number, run in enumerate(("test", "train", "test", "predict", "train")):
        getattr(engine(tmp_path / "results"), run)(MuSc(OwnBackbone()), datamodule=data)
        assert (root / "latest").resolve() == root / f"v{number}"
        assert len(pictures(root / f"v{number}")) == 12
    assert len(list(root.glob("v*"))) == 5


def test_every_run_has_its_own_checkpoint_in_one_tree(tmp_path, mvtec_root):
    root = tmp_path / "results/MuSc/MVTecAD/widget"
    for number, (run, kind) in enumerate(
        [("test", MVTec), ("validate", MVTecAD), ("fit", MVTec), ("validate", MVTec), ("predict", MVTecAD)]
    ):
        runner, data = engine(tmp_path / "results"), kind(root=mvtec_root, category="widget", num_workers=0)
        getattr(runner, run)(MuSc(OwnBackbone(), visualizer=False), datamodule=data)
        file = root / f"v{number}/weights/lightning/model.ckpt"
        assert Path(runner.best_model_path).resolve() == file
        assert file.is_file()
    assert len(list((tmp_path / "results").rglob("*.ckpt"))) == 5


def test_exports_of_two_products_go_to_two_folders(tmp_path, folder):
    for number in range(2):
        model = MuSc(OwnBackbone(), mode="reference", references=folder, visualizer=False)
        model.model.build_bank([torch.rand(2, 3, 64, 64)])
        path = engine(tmp_path / "results").export(model, ExportType.TORCH)  # a new engine, as on the command line
        assert path == tmp_path / f"results/MuSc/v{number}/weights/torch/model.pt"


def test_an_export_lies_beside_its_run_and_overwrites_nothing(tmp_path, mvtec_root):
    runner, model = engine(tmp_path / "results"), MuSc(OwnBackbone(), mode="reference", k_shot=2, visualizer=False)
    runner.fit(model, datamodule=datamodule(mvtec_root))
    root = tmp_path / "results/MuSc/MVTecAD/widget"
    assert runner.export(model, ExportType.TORCH) == root / "v0/weights/torch/model.pt"
    before = (root / "v0/weights/torch/model.pt").read_bytes()
    assert runner.export(model, ExportType.TORCH) == root / "v1/weights/torch/model.pt"
    assert (root / "v0/weights/torch/model.pt").read_bytes() == before
    chosen = [runner.export(model, ExportType.TORCH, export_root=tmp_path / "chosen") for _ in range(2)]
    assert set(chosen) == {tmp_path / "chosen/weights/torch/model.pt"}  # as anomalib does


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
