# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a bank: what they bring, what they refuse, and what they do not need."""

import shutil
import subprocess
import sys

import pytest
import timm
import torch
from anomalib import LearningType
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from commands import SMALL, TINY, anomalib
from conftest import OwnBackbone
from lightning import Trainer
from runs import assert_same, by_path, datamodule
from safetensors.torch import save_file

from anomalib_musc import MuSc, PredictionWriter
from anomalib_musc.backbones import create_backbone
from anomalib_musc.backbones.weights import skip_download

LOAD = """
import sys, torch
from anomalib.engine import Engine
from anomalib_musc import MuSc
model = MuSc.load_from_checkpoint(sys.argv[1])
batches = Engine(default_root_dir=sys.argv[3], enable_progress_bar=False).predict(model, data_path=sys.argv[2])
torch.save([(b.image_path[0], b.pred_score.item(), bool(b.pred_label), b.anomaly_map) for b in batches], sys.argv[4])
"""


def test_a_checkpoint_in_a_new_process(tmp_path, mvtec_root, folder, make_engine):
    model, engine = MuSc(**TINY, mode="reference", k_shot=3), make_engine()
    engine.fit(model, datamodule=datamodule(mvtec_root))
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    here = engine.predict(model, data_path=folder)
    arguments = [tmp_path / "model.ckpt", folder, tmp_path / "there", tmp_path / "there.pt"]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for batch, (path, score, label, anomaly_map) in zip(
        here, torch.load(tmp_path / "there.pt", weights_only=False), strict=True
    ):
        assert (batch.image_path[0], bool(batch.pred_label)) == (path, label)
        assert batch.pred_score.item() == pytest.approx(score, abs=1e-6)
        torch.testing.assert_close(torch.Tensor(batch.anomaly_map), torch.Tensor(anomaly_map), atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def checkpoint(mvtec_root, tmp_path_factory):
    """A checkpoint of mode="reference" with a bank of two training images."""
    engine = Engine(default_root_dir=tmp_path_factory.mktemp("checkpoint"), enable_progress_bar=False)
    engine.fit(MuSc(**TINY, mode="reference", k_shot=2), datamodule=datamodule(mvtec_root))
    return engine.best_model_path


@pytest.mark.parametrize(
    "other",
    [
        {"image_size": 32},
        {"backbone": "vit_tiny_patch16_224"},
        {"layers": (0, 1)},
        {"aggregation_degrees": (1,)},
        {"interval": (0.0, 1.0)},
    ],
)
def test_a_checkpoint_of_another_network_is_refused(other, checkpoint):
    with pytest.raises(ValueError, match=f"The checkpoint is of another model: .*{next(iter(other))}"):
        MuSc.load_from_checkpoint(checkpoint, **other)


def test_the_checkpoint_knows_its_layers(checkpoint):
    saved = torch.load(checkpoint, weights_only=True)["hyper_parameters"]["layers"]
    assert saved == list(MuSc(**TINY).model.backbone.layers)  # whatever the default is when it is loaded


def test_the_checkpoint_knows_the_size_of_a_network_whose_default_may_change(tmp_path):
    model, trainer = MuSc("musc-tiny", visualizer=False), Trainer(logger=False, accelerator="cpu")
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    saved = torch.load(tmp_path / "model.ckpt", weights_only=True)["hyper_parameters"]
    assert tuple(saved["image_size"]) == model.model.image_size


def test_the_checkpoint_says_what_images_are_compared_with(checkpoint, folder, make_engine):
    expected = by_path(make_engine().predict(MuSc.load_from_checkpoint(checkpoint), data_path=folder))
    model = MuSc(**TINY)
    assert_same(by_path(make_engine().predict(model, data_path=folder, ckpt_path=checkpoint)), expected)
    assert (model.mode, model.hparams["mode"], len(model.model.bank)) == ("reference", "reference", 2)
    model = MuSc(**TINY, mode="reference")
    assert_same(by_path(make_engine().predict(model, data_path=folder, ckpt_path=checkpoint)), expected)


def test_another_mode_than_the_checkpoints_is_refused(checkpoint, folder, make_engine):
    with pytest.raises(ValueError, match=r"mode='reference', this model of mode='both'.*Load it with mode='reference'"):
        make_engine().predict(MuSc(**TINY, mode="both"), data_path=folder, ckpt_path=checkpoint)


def test_a_bank_that_was_kept_travels(tmp_path, folder, make_engine):
    model, engine = MuSc(**TINY), make_engine()
    engine.predict(model, data_path=folder)
    model.keep_bank(5)
    engine.trainer.save_checkpoint(tmp_path / "kept.ckpt")
    here = by_path(engine.predict(model, data_path=folder))
    loaded = MuSc.load_from_checkpoint(tmp_path / "kept.ckpt")
    assert (loaded.mode, loaded.learning_type) == ("reference", LearningType.ZERO_SHOT)
    assert_same(by_path(make_engine().predict(loaded, data_path=folder)), here)


def test_other_references_do_not_replace_the_checkpoints(checkpoint, mvtec_root, make_engine):
    with pytest.warns(UserWarning, match="The bank of the checkpoint is kept, for all that k_shot=3"):
        model = MuSc.load_from_checkpoint(checkpoint, k_shot=3)
    make_engine().fit(model, datamodule=datamodule(mvtec_root))
    assert len(model.model.bank) == 2


def test_no_weights_are_needed(tmp_path, mvtec_root, folder, make_engine):
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit", img_size=96, num_classes=0).state_dict(), weights)
    model, engine = MuSc("test_vit", pretrained=weights, mode="reference", k_shot=2), make_engine()
    engine.fit(model, datamodule=datamodule(mvtec_root))
    expected = by_path(engine.predict(model, data_path=folder))
    weights.unlink()
    loaded = MuSc.load_from_checkpoint(engine.best_model_path)
    assert (loaded.hparams["pretrained"], loaded.model.image_size) == (str(weights), (96, 96))
    assert_same(by_path(make_engine().predict(loaded, data_path=folder)), expected)


@pytest.mark.parametrize(
    ("name", "activation"), [("ViT-B-32", "QuickGELU"), ("ViT-B-32-256", "GELU"), ("ViT-B-16-plus-240", "GELU")]
)
def test_a_network_without_its_weights_is_that_of_the_weights(name, activation):
    with skip_download():
        backbone = create_backbone(name, activation="weights")
    assert {type(module).__name__ for module in backbone.modules() if "GELU" in type(module).__name__} == {activation}


def test_an_own_backbone_is_passed_again(tmp_path, mvtec_root, make_engine):
    model, engine = MuSc(OwnBackbone(), mode="reference", k_shot=2), make_engine()
    engine.fit(model, datamodule=datamodule(mvtec_root))
    path = engine.best_model_path
    with pytest.raises(ValueError, match=r"a backbone of your own, OwnBackbone.*export that model without ckpt_path"):
        make_engine().export(model, ExportType.TORCH, export_root=tmp_path, ckpt_path=path)
    loaded = MuSc.load_from_checkpoint(path, backbone=OwnBackbone())
    assert make_engine().export(loaded, ExportType.TORCH, export_root=tmp_path).is_file()


def test_a_writer_of_ones_own_is_passed_again(tmp_path, mvtec_root, folder, make_engine):
    writer = PredictionWriter(output_dir=tmp_path / "out", heatmaps=["npy"])
    model, engine = MuSc(**TINY, mode="reference", k_shot=2, prediction_writer=writer), make_engine()
    engine.fit(model, datamodule=datamodule(mvtec_root))
    here = by_path(engine.predict(model, data_path=folder))
    shutil.rmtree(tmp_path / "out")
    loaded = MuSc.load_from_checkpoint(engine.best_model_path)
    assert_same(by_path(make_engine().predict(loaded, data_path=folder)), here)
    assert not (tmp_path / "out").exists()
    again = MuSc(**TINY, prediction_writer=writer)
    assert_same(by_path(make_engine().predict(again, data_path=folder, ckpt_path=engine.best_model_path)), here)
    assert len(list((tmp_path / "out/heatmaps").rglob("*.npy"))) == 12


def test_the_command_line_needs_no_mode(tmp_path, checkpoint, folder):
    arguments = ["--model", "MuSc", *SMALL, "--model.image_size", "64", "--ckpt_path", checkpoint]
    done = anomalib("predict", *arguments, "--data", folder / "scratch/000.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (table,) = tmp_path.rglob("predictions.csv")
    assert len(table.read_text().splitlines()) == 2
