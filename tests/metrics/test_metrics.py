# SPDX-License-Identifier: Apache-2.0
"""The paper's metrics, against scikit-learn and anomalib."""

from functools import partial

import anomalib.metrics
import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.engine import Engine
from anomalib.models import Padim
from conftest import OwnBackbone
from runs import Recorder, datamodule
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomalib_musc import MuSc, RsCINPostProcessor
from anomalib_musc.metrics.curves import AUPRO, AUROC, AveragePrecision, F1Max, free_bytes, sorting_bytes
from anomalib_musc.metrics.evaluator import PaperEvaluator


def scikit_learns(truth, scores) -> dict[str, float]:
    precision, recall, _ = precision_recall_curve(truth, scores)
    return {
        "AUROC": roc_auc_score(truth, scores),
        "AveragePrecision": average_precision_score(truth, scores),
        "F1Max": (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max(),
    }


def image_batch(scores, labels) -> ImageBatch:
    image = torch.zeros(len(scores), 3, 2, 2)
    return ImageBatch(image=image, pred_score=torch.as_tensor(scores), gt_label=torch.as_tensor(labels))


def pixel_batch(maps, masks) -> ImageBatch:
    return ImageBatch(image=torch.zeros(len(maps), 3, 2, 2), anomaly_map=maps, gt_mask=masks)


def draw_maps(seed: int, decimals: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw maps with ties at few decimals, and masks with a share of anomalous pixels."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(5, 30, 40, generator=generator) < share
    return (torch.rand(5, 30, 40, generator=generator) * 0.7 + masks * 0.3).round(decimals=decimals), masks


def of_pixels(kind, maps, masks, **kwargs):
    metric = kind(fields=["anomaly_map", "gt_mask"], **kwargs)
    for chunk in zip(maps.split(2), masks.split(2), strict=True):
        metric.update(pixel_batch(*chunk))
    return metric.compute().item()


# --- each metric ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [1, 7], ids=["many ties", "few ties"])
@pytest.mark.parametrize("batch_size", [1, 7, 200])
def test_rankings_are_scikit_learns(decimals, batch_size):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    scores = (rng.normal(size=200) + labels).round(decimals).astype(np.float32)  # beyond [0, 1]: no sigmoid
    batches = [
        image_batch(scores[start : start + batch_size], labels[start : start + batch_size])
        for start in range(0, 200, batch_size)
    ]
    expected = scikit_learns(labels, scores)
    for kind in (AUROC, F1Max, AveragePrecision):
        for order in (batches, batches[::-1]):
            metric = kind(fields=["pred_score", "gt_label"])
            for batch in order:
                metric.update(batch)
            assert metric.compute().item() == pytest.approx(expected[kind.__name__], abs=1e-7)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("decimals", [1, 2, 7])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_pixel_metrics_are_anomalibs(decimals, share):
    maps, masks = draw_maps(0, decimals, share)
    for kind in (AUROC, F1Max):
        theirs = getattr(anomalib.metrics, kind.__name__)
        assert of_pixels(kind, maps, masks) == pytest.approx(of_pixels(theirs, maps, masks), abs=1e-6)
    for limit in (0.05, 0.3, 1.0):
        theirs = of_pixels(anomalib.metrics.AUPRO, maps, masks, fpr_limit=limit)
        assert of_pixels(AUPRO, maps, masks, fpr_limit=limit) == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("label", [0, 1], ids=["all normal", "all anomalous"])
def test_one_class_is_reported_as_anomalib_and_scikit_learn_do(label):
    scores, labels = np.float32([0.1, 0.4, 0.4]), np.full(3, label)
    with pytest.warns(UserWarning, match="metrics that need both are reported as 0"):
        values = {
            kind: kind(fields=["pred_score", "gt_label"])(image_batch(scores, labels)).item()
            for kind in (AUROC, F1Max, AveragePrecision)
        }
    assert values == {AUROC: 0, F1Max: label, AveragePrecision: label}
    for kind in (AUROC, F1Max):
        theirs = getattr(anomalib.metrics, kind.__name__)(fields=["pred_score", "gt_label"])
        theirs.update(image_batch(scores, labels))
        assert values[kind] == theirs.compute().item()


def test_one_anomalous_value_is_enough():
    batch = image_batch(np.float32([0.1, 0.4, 0.3]), np.array([0, 0, 1]))
    metric = F1Max(fields=["pred_score", "gt_label"])
    assert metric(batch).item() == pytest.approx(2 / 3)
    metric.compute()
    assert metric.threshold == pytest.approx(0.3)


def test_a_score_that_is_no_number_makes_the_metrics_none():
    maps, masks = draw_maps(0, 7, 0.3)
    maps[3, 3, 3] = torch.nan
    for kind in (AUROC, F1Max, AveragePrecision, AUPRO, partial(AUPRO, method="official")):
        assert np.isnan(of_pixels(kind, maps, masks))


def test_metrics_stand_alone():
    rng = np.random.default_rng(0)
    scores, labels = rng.random(40, dtype=np.float32), rng.integers(0, 2, 40)
    metric = AveragePrecision(fields=["pred_score", "gt_label"])
    for chunk in (slice(0, 10), slice(10, 40)):
        expected = scikit_learns(labels[chunk], scores[chunk])["AveragePrecision"]
        assert metric(image_batch(scores[chunk], labels[chunk])).item() == pytest.approx(expected, abs=1e-7)
    assert metric.compute().item() == pytest.approx(average_precision_score(labels, scores), abs=1e-7)
    metric.reset()
    metric.update(image_batch(scores[:10], labels[:10]))
    assert metric.compute().item() == pytest.approx(average_precision_score(labels[:10], scores[:10]), abs=1e-7)


def test_labels_that_fit_no_scores_are_refused():
    ranking = AUROC(fields=["pred_score", "gt_label"]).ranking
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\)"):
        ranking.update(torch.rand(2), torch.zeros(3))
    with pytest.raises(ValueError, match="0 or 1"):
        ranking.update(torch.rand(2), torch.tensor([0, 255]))


# --- what they hold, and where -------------------------------------------------------------------------------------


def test_values_are_held_once_on_the_host():
    evaluator = PaperEvaluator()
    maps, masks = draw_maps(0, 7, 0.1)
    evaluator.on_test_batch_end(None, None, None, pixel_batch(maps, masks), 0)
    metrics = [metric for metric in evaluator.test_metrics if hasattr(metric, "ranking") and "pixel" in metric.name]
    (ranking,) = {id(metric.ranking): metric.ranking for metric in metrics}.values()
    held = [value for state in ranking.metric_state.values() for value in state]
    assert sum(value.nbytes for value in held) == 4 * maps.numel() + 4 * masks.sum()  # scores; sizes of regions
    assert ranking.compute_on_cpu  # as nothing is free elsewhere
    assert free_bytes(torch.device("cpu")) == 0
    assert sorting_bytes(10, torch.float64) == 2 * sorting_bytes(10, torch.float32) > 10 * 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_with_room_sorts_its_values():
    maps, masks = draw_maps(0, 2, 0.1)
    for kind in (AUROC, F1Max, AveragePrecision, AUPRO, partial(AUPRO, method="official")):
        metric = kind(fields=["anomaly_map", "gt_mask"])
        metric.update(pixel_batch(maps.cuda(), masks.cuda()))
        assert metric.compute().is_cuda
        assert metric.compute().item() == pytest.approx(of_pixels(kind, maps, masks), abs=1e-7)


# --- the evaluator -------------------------------------------------------------------------------------------------


def test_the_paper_is_reported_next_to_anomalibs_f1():
    names = {metric.name for metric in PaperEvaluator().test_metrics}
    ranking = {f"{level}_{name}" for level in ("image", "pixel") for name in ("AUROC", "F1Max", "AveragePrecision")}
    assert names == ranking | {"pixel_AUPRO", "image_F1Score", "pixel_F1Score"}
    (aupro,) = (metric for metric in PaperEvaluator().test_metrics if metric.name == "pixel_AUPRO")
    assert aupro.fpr_limit == pytest.approx(0.3)


def assert_scikit_learns(metrics, batches):
    for level, truth, value in (("image", "gt_label", "pred_score"), ("pixel", "gt_mask", "anomaly_map")):
        labels, scores = (
            torch.cat([getattr(batch, field) for batch in batches]).flatten().cpu().numpy() for field in (truth, value)
        )
        for name, expected in scikit_learns(labels, scores).items():
            assert metrics[f"{level}_{name}"] == pytest.approx(expected, abs=1e-5)


def test_metrics_are_those_of_the_scores_before_clipping(tmp_path, mvtec_root):
    recorder = Recorder()
    data = datamodule(mvtec_root)
    engine = Engine(default_root_dir=tmp_path, enable_progress_bar=False, callbacks=[recorder])
    (metrics,) = engine.test(MuSc(OwnBackbone()), datamodule=data)

    plain = Recorder()
    model = MuSc(OwnBackbone(), post_processor=RsCINPostProcessor(enable_normalization=False))
    Engine(default_root_dir=tmp_path, enable_progress_bar=False, callbacks=[plain]).test(model, datamodule=data)
    assert_scikit_learns(metrics, plain.batches)
    clipped = torch.cat([batch.anomaly_map for batch in recorder.batches])
    assert (clipped == 0).sum() + (clipped == 1).sum() > 10  # or the test would show nothing


def test_every_run_starts_anew_and_takes_all_its_loaders(make_engine, mvtec_root):
    data = datamodule(mvtec_root, val_split_mode="from_test", val_split_ratio=0.5, seed=0)
    data.setup()
    model = MuSc(OwnBackbone(), post_processor=RsCINPostProcessor(enable_normalization=False))
    loaders = [data.val_dataloader(), data.test_dataloader()]
    for run in ([loaders[1]], loaders, [loaders[0]]):
        recorder = Recorder()
        (metrics, *_) = make_engine(callbacks=[recorder]).test(model, dataloaders=run)
        assert_scikit_learns(metrics, recorder.batches)


def test_the_evaluator_serves_other_models_as_anomalibs_does(make_engine, mvtec_root):
    evaluator = PaperEvaluator()
    theirs = [
        getattr(anomalib.metrics, name)(fields=fields, prefix=f"their_{level}_")
        for level, names, fields in (
            ("image", ("AUROC", "F1Max"), ["pred_score", "gt_label"]),
            ("pixel", ("AUROC", "F1Max", "AUPRO"), ["anomaly_map", "gt_mask"]),
        )
        for name in names
    ]
    evaluator.test_metrics.extend(theirs)
    model = Padim(backbone="resnet18", layers=["layer1"], pre_trained=False, n_features=8, evaluator=evaluator)
    (metrics,) = make_engine(max_epochs=1).train(model, datamodule=datamodule(mvtec_root))
    assert 0 < metrics["pixel_AUPRO"] < 1
    for metric in theirs:
        assert metrics[metric.name.removeprefix("their_")] == pytest.approx(metrics[metric.name], abs=1e-5)
