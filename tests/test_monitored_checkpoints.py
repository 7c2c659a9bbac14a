# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are chosen by a metric are written, or the metric is named."""

import pytest
from anomalib.callbacks import ModelCheckpoint
from commands import TINY
from lightning.pytorch.callbacks import ModelCheckpoint as LightningCheckpoint
from runs import datamodule

from anomalib_musc import MuSc


@pytest.mark.parametrize("metric", ["image_AUROC", "image_F1Max", "pixel_AUPRO"])
def test_fit_writes_the_checkpoint(metric, tmp_path, mvtec_root, make_engine):
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "own", monitor=metric, mode="max")
    engine, data = make_engine(callbacks=[checkpoint]), datamodule(mvtec_root)
    engine.fit(MuSc(**TINY), datamodule=data)
    (path,) = (tmp_path / "own").glob("*.ckpt")
    assert engine.best_model_path == str(path)
    (tested,) = engine.test(MuSc.load_from_checkpoint(path), datamodule=data)
    assert checkpoint.best_model_score.item() == pytest.approx(tested[metric], abs=1e-6)  # the same images


@pytest.mark.parametrize("metric", ["val_loss", "image_F1Score"])  # the latter needs a threshold
def test_a_metric_that_nobody_measures_is_named(metric, tmp_path, mvtec_root, make_engine):
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "own", monitor=metric)
    with pytest.raises(ValueError, match=rf"ModelCheckpoint\(monitor='{metric}'\) has saved nothing, .*gave no metric"):
        make_engine(callbacks=[checkpoint]).fit(MuSc(**TINY), datamodule=datamodule(mvtec_root))


def test_without_an_evaluator(tmp_path, mvtec_root, make_engine):
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "own", monitor="image_AUROC")
    with pytest.raises(ValueError, match=r"monitor='image_AUROC'"):
        make_engine(callbacks=[checkpoint]).fit(MuSc(**TINY, evaluator=False), datamodule=datamodule(mvtec_root))


def test_lightnings_own_is_said_to_save_nothing(tmp_path, mvtec_root, make_engine):
    checkpoint = LightningCheckpoint(dirpath=tmp_path / "own", monitor="image_AUROC")
    engine = make_engine(callbacks=[checkpoint])
    with pytest.warns(UserWarning, match=r"saved nothing, .* use anomalib\.callbacks\.ModelCheckpoint"):
        engine.fit(MuSc(**TINY), datamodule=datamodule(mvtec_root))
    assert not (tmp_path / "own").exists()
