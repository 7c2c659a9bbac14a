# SPDX-License-Identifier: Apache-2.0
"""Several processes through Engine and the command: what one process finds, with every image read once."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from commands import anomalib_from_the_shell, metric, read_table
from conftest import OwnBackbone, write_products
from lightning.pytorch import Callback
from runs import datamodule, predict_loader
from together import results, run_together
from torch.utils.data import DataLoader, WeightedRandomSampler

from anomalib_musc import MuSc, PredictionWriter

BOTH: dict[str, Any] = {"mode": "both", "k_shot": 3}
MODELS: dict[str, dict[str, Any]] = {
    "whole search": {},
    "same-place search, second interval": {"search_radius": 1, "second_interval": (0.4, 0.7)},
    "subsets": {"num_subsets": 2},
    "reference": {"mode": "reference", "k_shot": 3, "bank_size": 2},
    "both": BOTH,
    "both, in subsets": {**BOTH, "num_subsets": 2},
    "a small budget": {"memory_budget": 0.004},
    "fast": {"precision": "fast"},  # where a trial in one process may choose another rounding
}


class Read(Callback):
    """Notes the images that leave the steps of this process."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, *args):  # noqa: ARG002
        self.names += batch.image_path


class Found(NamedTuple):
    """What a process knows at the end."""

    metrics: list[dict[str, float]]
    scores: list[dict[str, float]]
    maps: list[dict[str, torch.Tensor]]
    thresholds: list[float]
    groups: list[str]
    read: list[str]


def engine(folder: Path, number: int, **kwargs: Any) -> Engine:
    return Engine(
        default_root_dir=folder,
        accelerator="cpu",
        devices=number,
        strategy="ddp" if number > 1 else "auto",
        enable_progress_bar=False,
        logger=False,
        **kwargs,
    )


def found_by(model: MuSc, metrics: Any, read: Read) -> Found:
    pools = model.pools
    scores = [dict(zip(pool.names, pool.scores.tolist(), strict=True)) for pool in pools]
    maps = [dict(zip(pool.names, pool.patch_scores, strict=True)) for pool in pools]
    thresholds = [model.post_processor.image_threshold.item(), model.post_processor.pixel_threshold.item()]
    groups = [group.text for pool in pools for group in pool.groups]
    return Found([dict(one) for one in metrics or []], scores, maps, thresholds, groups, read.names)


def run_models(root: Path, folder: Path, number: int) -> dict[str, Found]:
    """Test and validate each of the models, with pools of 11 images."""
    found = {}
    for name, arguments in MODELS.items():
        read = Read()
        model = MuSc(OwnBackbone(), visualizer=False, **arguments)
        data = datamodule(root, eval_batch_size=2)
        metrics = engine(folder / name, number, callbacks=[read]).test(model, datamodule=data)
        found[name] = found_by(model, metrics, read)
    return found


@pytest.fixture(scope="module")
def root(mvtec_root: Path, tmp_path_factory) -> Path:
    """The test data less one image, so that shares differ, and one in grey values of 16 bits."""
    copy = shutil.copytree(mvtec_root, tmp_path_factory.mktemp("data") / "mvtec")
    images = sorted((copy / "widget/test/good").glob("*.png"))
    images[0].unlink()
    return copy


@pytest.fixture(scope="module")
def one(root, tmp_path_factory) -> dict[str, Found]:
    return run_models(root, tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module", params=[2, 3])
def several(request, root, tmp_path_factory) -> list[dict[str, Found]]:
    cwd = tmp_path_factory.mktemp("several")
    return results(run_models, root, cwd, request.param, number=request.param, cwd=cwd)


@pytest.mark.parametrize("name", MODELS)
def test_every_process_knows_what_one_does(name, one, several):
    expected, tolerance = one[name], 5e-3 if name == "fast" else 2e-5
    for process in several:
        found = process[name]
        assert found.thresholds == pytest.approx(expected.thresholds, abs=tolerance)
        assert found.groups == expected.groups
        for ours, theirs in zip(found.scores, expected.scores, strict=True):
            assert ours == pytest.approx(theirs, abs=tolerance)
        for our_maps, their_maps in zip(found.maps, expected.maps, strict=True):
            assert list(our_maps) == list(their_maps)
            for path, patch_scores in their_maps.items():
                torch.testing.assert_close(our_maps[path], patch_scores, atol=tolerance, rtol=0)
        for ours, theirs in zip(found.metrics, expected.metrics, strict=True):
            assert ours == pytest.approx(theirs, abs=max(tolerance, 1e-3))  # at a threshold, one pixel more or less
    every = [path for process in several for path in process[name].read]
    assert sorted(every) == sorted(expected.read)


def predict(folders: list[Path], cwd: Path, number: int) -> tuple[list[dict[str, float]], list[str]]:
    model = MuSc(OwnBackbone(), prediction_writer=PredictionWriter(heatmaps=["npy"]))
    loaders = [predict_loader(folder, batch_size=2) for folder in folders]
    engine(cwd / "results", number).predict(model, dataloaders=loaders)
    scores = [dict(zip(pool.names, pool.scores.tolist(), strict=True)) for pool in model.pools]
    return scores, [Path(path).name for path in model.skipped_images]


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """Two products, one with files that cannot be read and grey images of 16 bits."""
    first, second = tmp_path / "first", tmp_path / "second"
    write_products(first, range(7))
    for path in write_products(second, range(20, 25)):
        grey = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2GRAY)
        cv2.imwrite(str(path), grey.astype(np.uint16) * 11)
    (second / "001_broken.png").write_bytes(b"no image")
    (second / "003_empty.png").touch()
    return [first, second]


@pytest.mark.parametrize("number", [2, 3])
def test_predictions_are_written_once(folders, number, tmp_path):
    for name in ("one", "several"):
        (tmp_path / name).mkdir()
    expected, skipped = predict(folders, tmp_path / "one", 1)
    for scores, left_out in results(predict, folders, tmp_path / "several", number, number=number, cwd=tmp_path):
        assert left_out == skipped == ["001_broken.png", "003_empty.png"]
        for ours, theirs in zip(scores, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=2e-5)
    ours, theirs = (read_table(tmp_path / name) for name in ("several", "one"))
    assert ours.keys() == theirs.keys()
    for file, row in theirs.items():
        assert ours[file]["label"] == row["label"]
        assert ours[file]["rank"] == row["rank"]
        assert bool(ours[file]["picture"]) == bool(row["picture"])
    assert files_of(tmp_path / "several") == files_of(tmp_path / "one")


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_more_processes_than_images(tmp_path):
    write_products(tmp_path / "two", range(2))
    for name in ("one", "several"):
        (tmp_path / name).mkdir()
    expected, _ = predict([tmp_path / "two"], tmp_path / "one", 1)
    for scores, _ in results(predict, [tmp_path / "two"], tmp_path / "several", 3, number=3, cwd=tmp_path):
        assert scores[0] == pytest.approx(expected[0], abs=1e-5)
    ours, theirs = (read_table(tmp_path / name) for name in ("several", "one"))
    assert ours.keys() == theirs.keys()
    assert files_of(tmp_path / "several") == files_of(tmp_path / "one")


def run_limited(root: Path, cwd: Path, number: int) -> list[dict[str, float]]:
    model = MuSc(OwnBackbone(), visualizer=False)
    run = engine(cwd / "results", number, limit_val_batches=5, limit_test_batches=0.6)
    run.test(model, datamodule=datamodule(root, eval_batch_size=1))
    return [dict(zip(pool.names, pool.scores.tolist(), strict=True)) for pool in model.pools]


def test_a_limit_is_that_of_one_process(root, tmp_path):
    (expected,) = run_limited(root, tmp_path, 1)
    assert len(expected) == 6
    for (scores,) in results(run_limited, root, tmp_path, 2, number=2, cwd=tmp_path):
        assert scores == pytest.approx(expected, abs=2e-5)


def run_broken(root: Path, cwd: Path) -> None:
    engine(cwd / "results", 2).test(MuSc(OwnBackbone()), datamodule=datamodule(root))


def test_a_broken_file_of_one_process_ends_all(root, tmp_path):
    broken = shutil.copytree(root, tmp_path / "broken")
    sorted((broken / "widget/test/good").glob("*.png"))[2].write_bytes(b"no image")
    first, second = run_together(run_broken, broken, tmp_path, number=2, cwd=tmp_path)
    assert first.returncode != 0
    assert second.returncode != 0
    assert "1 of 6 images cannot be read" in first.stderr + second.stderr
    assert "failed: ValueError: 1 of" in first.stderr + second.stderr
    assert not list((tmp_path / "results").rglob("*.csv"))


def run_sampler(folder: Path, cwd: Path) -> None:
    dataset = predict_loader(folder).dataset
    loader = DataLoader(dataset, collate_fn=dataset.collate_fn, sampler=WeightedRandomSampler([1.0] * 11, 11))
    engine(cwd / "results", 2).predict(MuSc(OwnBackbone()), dataloaders=loader)


def test_a_sampler_of_ones_own_cannot_be_shared(root, tmp_path):
    for process in run_together(run_sampler, root / "widget/test", tmp_path, number=2, cwd=tmp_path):
        assert process.returncode != 0
        assert "Leave the sampler out, or use devices=1" in process.stderr


def run_fit(root: Path, cwd: Path) -> tuple[str, list[float]]:
    run = engine(cwd / "results", 2)
    model = MuSc(OwnBackbone())
    run.fit(model, datamodule=datamodule(root))
    return str(run.best_model_path), [model.post_processor.image_threshold.item()]


def test_fit_writes_one_checkpoint_with_the_thresholds_of_all(root, tmp_path):
    (first, ours), (second, theirs) = results(run_fit, root, tmp_path, number=2, cwd=tmp_path)
    assert first == second
    assert ours == theirs
    loaded = MuSc.load_from_checkpoint(first, backbone=OwnBackbone())
    assert loaded.post_processor.image_threshold.item() == pytest.approx(ours[0])


def test_the_command_starts_them(root, tmp_path):
    arguments = ["--model.backbone", "test_vit", "--model.pretrained", "false", "--model.image_size", "64"]
    command = [
        "test",
        "--model",
        "MuSc",
        *arguments,
        "--data",
        "MVTec",
        "--data.root",
        root,
        "--data.category",
        "widget",
    ]
    devices = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    run = anomalib_from_the_shell(*command, "--data.num_workers", "0", *devices, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert 0 <= metric(run.stdout, "pixel_AUPRO") <= 1
    (latest,) = tmp_path.rglob("latest")
    assert len(list(latest.resolve().rglob("images/**/*.png"))) == 11
    assert [path.name for path in latest.parent.iterdir() if path != latest] == ["v0"]
