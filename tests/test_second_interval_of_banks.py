# SPDX-License-Identifier: Apache-2.0
"""A bank of unlabelled references with a second interval: its own median ratio, against the equations in float64."""

from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from anomalib.data.utils import read_image
from commands import TINY
from conftest import OwnBackbone
from runs import AnomalyMaps, assert_same, by_path, datamodule
from seeded import assert_close, randn, to_numpy

from anomalib_musc import MuSc, MuScModel
from anomalib_musc.functional import layer_scores
from anomalib_musc.inference.detector import Detector
from anomalib_musc.memory_bank.bank import ReferenceBank

FIRST, SECOND = (0.0, 0.3), (0.4, 0.7)


def filled(references: list[torch.Tensor], degrees: tuple[int, ...], **arguments) -> ReferenceBank:
    bank = ReferenceBank(degrees, FIRST, second_interval=SECOND, **arguments)
    bank.fill(references, torch.zeros(len(references[0]), 1), torch.zeros(len(references[0])))
    return bank


def ascending(queries: np.ndarray, references: np.ndarray, radius: int | None, width: int) -> np.ndarray:
    """Distances of every patch to the nearest one near its place in every reference, ascending: (M, B, L)."""
    num_patches = queries.shape[1]
    places = np.array([divmod(place, width) for place in range(num_patches)])
    is_near = np.abs(places[:, None] - places).max(axis=2) <= (num_patches if radius is None else radius)
    found = np.empty((len(references), *queries.shape[:2]))
    for j, reference in enumerate(references):
        for i, query in enumerate(queries):
            for p in range(num_patches):
                found[j, i, p] = np.linalg.norm(reference[is_near[p]] - query[p], axis=1).min()
    return np.sort(found, axis=0)


def by_equations(queries, references, degrees, radius=None):
    """max(s, t / ratio) of each layer; ratio: the median over the references' patches of t / s of their own."""
    scores, ratios, width = [], [], references[0].shape[3]
    for of_layer, of_bank in zip(queries, references, strict=True):
        query, bank = ([oracle.lnamd(to_numpy(maps), degree) for degree in degrees] for maps in (of_layer, of_bank))
        count = len(of_bank)
        slices = oracle.interval_slice(count, FIRST), oracle.interval_slice(max(1, count - 1), SECOND)
        sorted_ = [ascending(q, b, radius, width) for q, b in zip(query, bank, strict=True)]
        s, t = (np.mean([d[part].mean(axis=0) for d in sorted_], axis=0) for part in slices)
        ratio = np.inf
        if count > 1:
            own = [
                np.concatenate(
                    [ascending(b[[i]], np.delete(b, i, axis=0), radius, width) for i in range(count)], axis=1
                )
                for b in bank
            ]
            parts = (oracle.interval_slice(count - 1, bounds) for bounds in (FIRST, SECOND))
            own_s, own_t = (np.mean([d[part].mean(axis=0) for d in own], axis=0) for part in parts)
            ordered = np.sort(np.log(own_t / own_s), axis=None)
            ratio = np.exp(ordered[(len(ordered) - 1) // 2])  # the lower one of two in the middle, as torch's
        ratios.append(ratio)
        scores.append(np.maximum(s, t / ratio))
    return np.mean(scores, axis=0), np.array(ratios)


@pytest.mark.parametrize("radius", [None, 0, 1])
@pytest.mark.parametrize("num_references", [1, 2, 3, 4, 7, 10])
def test_it_is_that_of_the_equations(num_references, radius):
    references = [randn(num_references, 12, 4, 3), randn(num_references, 6, 4, 3, seed=1)]
    queries = [randn(2, 12, 4, 3, seed=2), randn(2, 6, 4, 3, seed=3)]
    bank = filled(references, (1, 3), search_radius=radius)
    scores, ratios = by_equations(queries, references, (1, 3), radius)
    assert_close(bank.ratios, ratios, 1e-4)
    assert_close(bank.patch_scores(queries).flatten(1), scores, 1e-4)


@pytest.mark.parametrize("num_references", range(2, 11))
def test_the_references_score_each_other_as_a_pool_does(num_references):
    references = [randn(num_references, 12, 4, 4)]
    bank = filled(references, (1, 3))
    expected = layer_scores(references[0], (1, 3), second_interval=SECOND)
    assert_close(bank.own_patch_scores().flatten(1), expected, 1e-4)


@pytest.mark.parametrize("num_references", range(1, 11))
def test_equal_references_and_ties(num_references):
    equal = [randn(1, 8, 3, 3).expand(num_references, -1, -1, -1)]
    bank = filled(equal, (1, 3))
    assert bank.patch_scores([maps[:1] for maps in equal]).abs().max() < 1e-5
    other = [randn(2, 8, 3, 3, seed=1)]
    plain = ReferenceBank((1, 3), FIRST)
    plain.fill(equal, torch.zeros(num_references, 1), torch.zeros(num_references))
    assert_close(bank.patch_scores(other), plain.patch_scores(other), 1e-5)  # every distance is the same: no second one
    twice = [torch.cat([randn(num_references, 8, 3, 3)] * 2)]
    scores = filled(twice, (1,)).patch_scores(other)
    assert scores.isfinite().all()
    assert (scores > 0).all()


@pytest.mark.parametrize("radius", [None, 1])
def test_a_defect_of_many_references_stands_out(radius):
    pattern, defect = randn(1, 32, 6, 6), 3 * randn(1, 32, 2, 2, seed=2)
    maps = pattern + 0.5 * randn(21, 32, 6, 6, seed=1)
    maps[:7, :, 2:4, 2:4] = defect + 0.3 * randn(7, 32, 2, 2, seed=3)  # a query, and six of twenty references
    is_defect = torch.zeros(6, 6, dtype=torch.bool)
    is_defect[2:4, 2:4] = True
    bank = filled([maps[1:]], (1,), search_radius=radius)
    (scores,) = bank.patch_scores([maps[:1]])
    bank.second_interval = None
    (plain,) = bank.patch_scores([maps[:1]])
    assert scores[is_defect].min() > scores[~is_defect].quantile(0.95)
    assert plain[is_defect].max() < plain[~is_defect].quantile(0.5)


def test_plain_torch_and_its_state():
    model, images = MuScModel(OwnBackbone(), second_interval=SECOND), torch.rand(8, 3, 64, 64)
    model.build_bank([images[:5], images[5:]])
    assert model.bank.ratios.shape == (model.bank.num_layers,)
    assert (model.bank.ratios >= 1).all()
    for size, lacks_ratios in ((None, False), (None, True), (4, False)):  # True: a file of before
        model.build_bank([images], size)
        state = {name: value for name, value in model.state_dict().items() if not (lacks_ratios and "ratios" in name)}
        other = MuScModel(OwnBackbone(), second_interval=SECOND)
        other.load_state_dict(state)
        torch.testing.assert_close(other.bank.ratios, model.bank.ratios, atol=1e-4, rtol=0)
        assert "bank.ratios" in state or lacks_ratios  # what a user gives is not edited
        torch.testing.assert_close(other(images + 0.1).anomaly_map, model(images + 0.1).anomaly_map, atol=1e-4, rtol=0)
    plain = MuScModel(OwnBackbone())
    plain.load_state_dict(model.state_dict())
    assert len(plain.bank.ratios) == 0
    model.load_state_dict(plain.state_dict())
    assert len(model.bank.ratios) == model.bank.num_layers


def test_a_reference_alone():
    model = MuScModel(OwnBackbone(), second_interval=SECOND)
    model.build_bank([torch.rand(1, 3, 64, 64)])
    plain = MuScModel(OwnBackbone())
    plain.load_state_dict(model.state_dict())
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(model(image).anomaly_map, plain(image).anomaly_map)


@pytest.mark.parametrize("second", [(0.2, 0.7), (2, 5)])
def test_overlapping_intervals_of_a_bank(second):
    with pytest.raises(ValueError, match="second_interval must begin where interval ends or later"):
        MuScModel(OwnBackbone(), second_interval=second).build_bank([torch.rand(8, 3, 64, 64)])


def test_checkpoints_thresholds_and_exports(mvtec_root, folder, make_engine):
    model, engine = MuSc(**TINY, mode="reference", second_interval=SECOND), make_engine()
    engine.fit(model, datamodule=datamodule(mvtec_root))
    bank = model.model.bank
    expected = model.model.anomaly_maps(bank.own_patch_scores()).amax(dim=(1, 2, 3))
    torch.testing.assert_close(bank.raw_scores, expected, atol=1e-4, rtol=0)  # of the rule that queries have
    predictions = by_path(engine.predict(model, data_path=folder))
    loaded = MuSc.load_from_checkpoint(engine.best_model_path)
    assert torch.equal(loaded.model.bank.ratios, bank.ratios)
    assert_same(by_path(make_engine().predict(loaded, data_path=folder)), predictions, tolerance=1e-6)

    images = torch.cat([loaded.pre_processor.transform(read_image(path, as_tensor=True)[None]) for path in predictions])
    exported = torch.export.export(AnomalyMaps(loaded.model.eval()), (images[:1],)).module()
    for image in images[:3]:
        torch.testing.assert_close(exported(image[None]), loaded.model(image[None]).anomaly_map, atol=1e-5, rtol=0)


def test_a_service(folder):
    detector = Detector(OwnBackbone(), second_interval=SECOND).fit(folder)
    image = sorted(Path(folder).rglob("*.png"))[0]
    assert detector.predict(image).score is not None
