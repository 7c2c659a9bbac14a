# SPDX-License-Identifier: Apache-2.0
"""The paper's metrics, against scikit-learn."""

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.engine import Engine
from anomalib.models import Padim
from conftest import OwnBackbone
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from test_engine import Recorder, datamodule

from anomalib_musc import MuSc, RsCINPostProcessor
from anomalib_musc.metrics import AveragePrecision, PaperEvaluator


@pytest.mark.parametrize("decimals", [1, 7], ids=["many ties", "few ties"])
@pytest.mark.parametrize("batch_size", [1, 7, 200])
def test_average_precision_is_scikit_learns(decimals, batch_size):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    scores = (
        (rng.normal(size=200) + labels).round(decimals).astype(np.float32)
    )  # beyond [0, 1]: no sigmoid may be taken
    metric = AveragePrecision(fields=["pred_score", "gt_label"])
    for start in range(0, 200, batch_size):
        chunk = slice(start, start + batch_size)
        metric.update(
            ImageBatch(
                image=torch.zeros(len(scores[chunk]), 3, 2, 2),
                pred_score=torch.tensor(scores[chunk]),
                gt_label=torch.tensor(labels[chunk]),
            )
        )
    assert metric.compute().item() == pytest.approx(average_precision_score(labels, scores), abs=1e-6)


def test_the_paper_is_reported_next_to_anomalibs_f1():
    names = {metric.name for metric in PaperEvaluator().test_metrics}
    ranking = {f"{level}_{name}" for level in ("image", "pixel") for name in ("AUROC", "F1Max", "AveragePrecision")}
    assert names == ranking | {"pixel_AUPRO", "image_F1Score", "pixel_F1Score"}
    (aupro,) = (metric for metric in PaperEvaluator().test_metrics if metric.name == "pixel_AUPRO")
    assert aupro.fpr_limit == pytest.approx(0.3)


def test_metrics_are_those_of_the_scores_before_clipping(tmp_path, mvtec_root):
    recorder = Recorder()
    data = datamodule(mvtec_root)
    engine = Engine(default_root_dir=tmp_path, enable_progress_bar=False, callbacks=[recorder])
    (metrics,) = engine.test(MuSc(OwnBackbone()), datamodule=data)

    plain = Recorder()
    model = MuSc(OwnBackbone(), post_processor=RsCINPostProcessor(enable_normalization=False))
    Engine(default_root_dir=tmp_path, enable_progress_bar=False, callbacks=[plain]).test(model, datamodule=data)
    labels, scores, masks, maps = (
        torch.cat([getattr(batch, field) for batch in plain.batches]).flatten().numpy()
        for field in ("gt_label", "pred_score", "gt_mask", "anomaly_map")
    )
    for level, truth, value in (("image", labels, scores), ("pixel", masks, maps)):
        precision, recall, _ = precision_recall_curve(truth, value)
        f1_max = (2 * precision * recall / (precision + recall + 1e-12)).max()
        assert metrics[f"{level}_AUROC"] == pytest.approx(roc_auc_score(truth, value), abs=1e-5)
        assert metrics[f"{level}_AveragePrecision"] == pytest.approx(average_precision_score(truth, value), abs=1e-5)
        assert metrics[f"{level}_F1Max"] == pytest.approx(f1_max, abs=1e-5)
    clipped = torch.cat([batch.anomaly_map for batch in recorder.batches])
    assert (clipped == 0).sum() + (clipped == 1).sum() > 10  # or the test would show nothing


def test_the_evaluator_serves_other_models(tmp_path, mvtec_root):
    model = Padim(backbone="resnet18", layers=["layer1"], pre_trained=False, n_features=8, evaluator=PaperEvaluator())
    engine = Engine(default_root_dir=tmp_path, enable_progress_bar=False, max_epochs=1)
    (metrics,) = engine.train(model, datamodule=datamodule(mvtec_root))
    assert 0 <= metrics["pixel_AUPRO"] <= 1
