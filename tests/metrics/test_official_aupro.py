# SPDX-License-Identifier: Apache-2.0
"""AUPRO as the official release computes it, against loops over thresholds and regions; and metrics leave no state."""

from pathlib import Path

import anomalib.metrics
import cv2
import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from anomalib.metrics import Evaluator, F1Score
from commands import TINY
from runs import datamodule
from sklearn.metrics import auc

from anomalib_musc import MuSc
from anomalib_musc.metrics import AUPRO, PaperEvaluator
from anomalib_musc.metrics.ranking import aupro, official_aupro, rank, region_sizes


def by_loops(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """200 thresholds from the lowest value up; the mean overlap of regions over the false positive rate, rescaled."""
    maps = maps.astype(np.float64)
    low, high = maps.min(), maps.max()
    regions = []
    for index, mask in enumerate(masks):
        count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        regions += [(index, labels == label) for label in range(1, count)]
    rates, overlaps = [], []
    for step in range(200):
        above = maps > low + step * (high - low) / 200
        rates.append(above[~masks].mean())
        overlaps.append(np.mean([above[index][region].mean() for index, region in regions]))
    kept = np.array(rates) < limit
    rates, overlaps = np.array(rates)[kept], np.array(overlaps)[kept]
    return auc((rates - rates.min()) / (rates.max() - rates.min()), overlaps)


def blobs(seed: int, shape: tuple[int, int, int], decimals: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw smooth maps and masks of several regions an image."""
    rng = np.random.default_rng(seed)
    masks = np.stack([cv2.GaussianBlur(rng.normal(size=shape[1:]), (0, 0), 2) for _ in range(shape[0])]) > 0.18
    noise = np.stack([cv2.GaussianBlur(rng.normal(size=shape[1:]), (0, 0), 1) for _ in range(shape[0])])
    return torch.from_numpy((noise + 0.3 * masks).round(decimals)), torch.from_numpy(masks)


def ranked(maps: torch.Tensor, masks: torch.Tensor):
    return rank(maps[~masks], maps[masks], region_sizes(masks))


@pytest.mark.parametrize("shape", [(4, 24, 24), (3, 17, 40), (1, 60, 31)])
@pytest.mark.parametrize("decimals", [1, 12], ids=["ties", "no ties"])
@pytest.mark.parametrize("limit", [0.3, 0.05, 1.0])
def test_it_is_the_loops(shape, decimals, limit):
    maps, masks = blobs(sum(shape), shape, decimals)
    assert official_aupro(ranked(maps, masks), limit).item() == pytest.approx(
        by_loops(maps.numpy(), masks.numpy(), limit), abs=1e-6
    )


def test_it_is_what_one_computes_by_hand():
    # Ten normal pixels, 0, 0.05, ..., 0.45, and a region of two, 0.225 and 1: thresholds are 0, 0.005, ..., 0.995.
    ranks = rank(torch.arange(10) * 0.05, torch.tensor([0.225, 1.0]), torch.tensor([2, 2]))
    # The overlap is 1 below 0.225, where rates are 0.5 and more, and 1/2 above, where they are 0.5 and less.
    assert official_aupro(ranks).item() == pytest.approx(0.5)
    assert official_aupro(ranks, 0.75).item() == pytest.approx((0.2 * 1 + 0.5 * 0.5) / 0.7)


def test_it_is_not_the_exact_area():
    ranks = ranked(*blobs(0, (4, 40, 40), 12))
    assert abs(official_aupro(ranks) - aupro(ranks)) > 1e-3


def test_where_the_official_release_has_no_answer():
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    assert official_aupro(ranked(torch.rand(1, 4, 4), masks)) == 0  # no region
    masks[0, :2] = True
    with pytest.warns(UserWarning, match="Fewer than two false positive rates"):
        assert official_aupro(ranked(torch.ones(1, 4, 4), masks)) == 0  # constant maps
    with pytest.warns(UserWarning, match="Fewer than two false positive rates"):
        assert official_aupro(ranked(masks.float(), masks)) == 1  # no normal pixel above any threshold
    masks[0, :2, 2:] = False
    maps = torch.ones(1, 4, 4)
    maps[0, 0, 0] = 0
    with pytest.warns(UserWarning, match="Fewer than two false positive rates .* below fpr_limit=0.3"):
        assert official_aupro(ranked(maps, masks)) == 0  # every rate is above the limit


def test_an_evaluator_may_report_it():
    assert "pixel_AUPRO_official" in [metric.name for metric in PaperEvaluator(aupro="official").test_metrics]
    with pytest.raises(ValueError, match="method must be 'exact' or 'official', got 'paper'"):
        PaperEvaluator(aupro="paper")
    metric = AUPRO(fields=["anomaly_map", "gt_mask"], method="official")
    assert metric.name == "AUPRO_official"


def test_engine_reports_it(mvtec_root, own_backbone, make_engine):
    data = datamodule(mvtec_root)
    (exact,) = make_engine().test(MuSc(own_backbone), datamodule=data)
    (found,) = make_engine().test(MuSc(own_backbone, evaluator=PaperEvaluator(aupro="official")), datamodule=data)
    assert "pixel_AUPRO" not in found
    assert found["pixel_AUPRO_official"] == pytest.approx(exact["pixel_AUPRO"], abs=0.1)


# --- state ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def old_checkpoint(tmp_path_factory, mvtec_root) -> Path:
    """A checkpoint with what metrics of version 0.1 left in it."""
    folder = tmp_path_factory.mktemp("old")
    engine = Engine(default_root_dir=folder, enable_progress_bar=False, logger=False, accelerator="cpu")
    engine.validate(MuSc(**TINY), datamodule=datamodule(mvtec_root))
    engine.trainer.save_checkpoint(folder / "model.ckpt")
    content = torch.load(folder / "model.ckpt", weights_only=True)
    assert not [key for key in content["state_dict"] if "evaluator" in key]
    content["state_dict"]["evaluator.test_metrics.7.fpr_limit"] = torch.tensor(0.3)
    torch.save(content, folder / "model.ckpt")
    return folder / "model.ckpt"


def test_no_metric_leaves_a_trace():
    assert not PaperEvaluator().state_dict()
    assert not [key for key in MuSc(**TINY).state_dict() if "evaluator" in key]


@pytest.mark.parametrize(
    "evaluator",
    [
        True,
        False,
        PaperEvaluator(aupro="official"),
        Evaluator(test_metrics=[F1Score(["pred_label", "gt_label"])]),
        Evaluator(test_metrics=[anomalib.metrics.AUPRO(["anomaly_map", "gt_mask"], fpr_limit=0.1)]),
    ],
    ids=["default", "none", "official", "anomalib's", "anomalib's with a buffer"],
)
def test_a_checkpoint_loads_with_any_evaluator(evaluator, old_checkpoint, mvtec_root, make_engine):
    loaded = MuSc.load_from_checkpoint(old_checkpoint, evaluator=evaluator)
    assert bool(loaded.evaluator) == bool(evaluator)
    make_engine().test(MuSc(**TINY, evaluator=evaluator), datamodule=datamodule(mvtec_root), ckpt_path=old_checkpoint)


def test_a_limit_is_the_evaluators_and_not_the_files(old_checkpoint):
    evaluator = Evaluator(test_metrics=[anomalib.metrics.AUPRO(["anomaly_map", "gt_mask"], fpr_limit=0.1)])
    MuSc.load_from_checkpoint(old_checkpoint, evaluator=evaluator)
    assert evaluator.test_metrics[0].fpr_limit == pytest.approx(0.1)


def test_other_models_load_what_older_versions_wrote():
    assert PaperEvaluator().load_state_dict({"test_metrics.7.fpr_limit": torch.tensor(0.3)})


def test_a_wrong_key_is_still_refused(old_checkpoint, tmp_path):
    content = torch.load(old_checkpoint, weights_only=True)
    content["state_dict"]["post_processor.nosuch"] = torch.zeros(1)
    torch.save(content, tmp_path / "wrong.ckpt")
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "post_processor.nosuch"'):
        MuSc.load_from_checkpoint(tmp_path / "wrong.ckpt")


def test_a_file_of_0_1_loads_without_an_evaluator():
    from conftest import OwnBackbone

    path = Path(__file__).parents[1] / "data/musc_0_1.ckpt"
    assert "evaluator.test_metrics.7.fpr_limit" in torch.load(path, weights_only=False)["state_dict"]
    loaded = MuSc.load_from_checkpoint(path, backbone=OwnBackbone(), evaluator=False, weights_only=False)
    assert loaded.evaluator is None
