# SPDX-License-Identifier: Apache-2.0
"""Records of cells, means of them, and RsCIN for any model's predictions."""

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.post_processing import PostProcessor
from runs import relative_scores

from anomalib_musc import MuSc
from anomalib_musc.benchmark.records import METRICS, Predictions, Record, Store
from anomalib_musc.benchmark.summary import MEAN, best_of, rows_of
from anomalib_musc.functional import rscin
from anomalib_musc.metrics.ranking import aupro, pro_curve, rank
from anomalib_musc.pool.rescoring import image_features, rescore


def record(model: str, category: str, value: float, **changes: object) -> Record:
    made = Record(f"{model}-{category}", model, "d", category, 0, metrics=dict.fromkeys(METRICS, value), num_test=10)
    made.seconds = {"setup": 1.0, "fit": 2.0, "test": 5.0}
    vars(made).update(changes)
    return made


def test_means_are_over_categories_and_not_of_models_that_failed():
    rows = rows_of(
        [record("A", "x", 0.5), record("A", "y", 0.7), record("B", "x", 0.9), record("B", "y", 0, error="no")]
    )
    means = {row.model: row for row in rows if row.category == MEAN}
    assert set(means) == {"A"}
    assert means["A"].metrics["aupro"] == pytest.approx(0.6)
    assert means["A"].seconds == 16
    assert means["A"].images_per_second == pytest.approx(2)
    assert best_of(row for row in rows if row.category == "x")["image_ap"] == 0.9


def test_several_seeds_are_averaged():
    rows = rows_of([record("A", "x", 0.5), record("A", "x", 0.7, seed=1)])
    assert rows[0].metrics["aupro"] == pytest.approx(0.6)
    assert rows[0].spreads["aupro"] == pytest.approx(0.1414, abs=1e-4)
    assert rows[0].seconds == 8


def test_pro_curve_has_the_area_that_is_reported():
    generator = torch.Generator().manual_seed(0)
    anomalous = torch.randn(400, generator=generator) + 2
    sizes = torch.cat([torch.full((100,), 100), torch.full((300,), 300)])
    ranks = rank(torch.randn(20_000, generator=generator), anomalous, sizes)
    rates, overlaps = pro_curve(ranks, num_points=3001)
    assert float(torch.trapezoid(overlaps, rates) / 0.3) == pytest.approx(float(aupro(ranks)), abs=2e-3)
    above = (ranks.scores >= ranks.scores[-50]).double()
    assert overlaps[-1] <= 1
    assert float(above.sum()) == 50


def test_a_record_is_whole_or_absent(tmp_path):
    store = Store(tmp_path)
    predictions = Predictions(["a.png"], np.ones(1, np.int8), np.ones(1, np.float32))
    store.save(record("A", "x", 0.5), predictions)
    assert store.is_finished("A-x")
    assert store.predictions("A-x").paths == ["a.png"]
    store.save(record("B", "x", 0.5, error="ValueError: no"), None)
    assert not store.is_finished("B-x")
    assert not store.is_finished("C-x")
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("content", ["", "{", '{"bogus": 1}'])
@pytest.mark.parametrize("name", ["record.json", "predictions.npz"])
def test_a_damaged_cell_counts_as_not_run(name, content, tmp_path):
    store = Store(tmp_path)
    store.save(record("A", "x", 0.5), Predictions(["a.png"], np.ones(1, np.int8), np.ones(1, np.float32)))
    (tmp_path / "cells/A-x" / name).write_text(content)
    with pytest.warns(UserWarning, match=name):
        assert not store.is_finished("A-x")


class TestRescore:
    """RsCIN for the predictions of any model, from Python."""

    def test_it_is_rscin_with_a_backbones_features(self, folder, own_backbone):
        paths = sorted(map(str, folder.rglob("*.png")))
        scores = torch.rand(len(paths), generator=torch.Generator().manual_seed(0))
        batches = [
            ImageBatch(image=torch.zeros(len(part), 3, 8, 8), image_path=part, pred_score=values)
            for part, values in ((paths[:5], scores[:5]), (paths[5:], scores[5:]))
        ]
        features = image_features(paths, own_backbone)
        found = rescore(batches, own_backbone, windows=(1, 4))
        assert found.tolist() == rscin(scores, features, (1, 4)).tolist()

    def test_it_is_what_musc_does(self, folder, own_backbone, make_engine):
        options = {"post_processor": PostProcessor(enable_normalization=False), "visualizer": False}
        plain = make_engine().predict(MuSc(own_backbone, **options), data_path=folder)
        musc = MuSc(own_backbone, visualizer=False)
        make_engine().predict(musc, data_path=folder)
        found = rescore(plain, own_backbone)
        assert found.tolist() == pytest.approx(relative_scores(musc.pools[0]), abs=1e-6)

    def test_wrong_predictions_are_named(self, folder, own_backbone, tmp_path):
        path = next(folder.rglob("*.png"))
        batch = {"image": torch.zeros(1, 3, 8, 8)}
        with pytest.raises(ValueError, match="image_path"):
            rescore([ImageBatch(**batch, pred_score=torch.ones(1))], own_backbone)
        with pytest.raises(ValueError, match="pred_score"):
            rescore([ImageBatch(**batch, image_path=[str(path)])], own_backbone)
        with pytest.raises(ValueError, match="empty"):
            rescore([], own_backbone)
        whole = ImageBatch(**batch, image_path=[str(path)], pred_score=torch.tensor([float("nan")]))
        with pytest.raises(ValueError, match="1 scores that are not finite"):
            rescore([whole], own_backbone)
        with pytest.raises(ValueError, match="windows"):
            rescore([whole], own_backbone, windows=(0,))
        assert own_backbone.num_images == 0
        (tmp_path / "no.png").write_text("text")
        bad = ImageBatch(**batch, image_path=[str(tmp_path / "no.png")], pred_score=torch.ones(1))
        with pytest.raises(ValueError, match=r"no\.png"):
            rescore([bad], own_backbone)
