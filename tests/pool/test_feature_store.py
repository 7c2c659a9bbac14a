# SPDX-License-Identifier: Apache-2.0
"""The features of a pool within a budget of memory."""

import pytest
import torch
from runs import assert_same, by_path, predict_loader
from seeded import randn
from torch.testing import assert_close

from anomalib_musc import MuSc
from anomalib_musc.distances import MemoryBudgetError
from anomalib_musc.distances.storage import GIB
from anomalib_musc.pool.feature_store import FeatureStore


@pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf")])
def test_the_models_budget_is_a_positive_number(budget, own_backbone):
    with pytest.raises(ValueError, match="memory_budget must be a positive number of GiB"):
        MuSc(own_backbone, memory_budget=budget)


@pytest.mark.parametrize("num_images", [12, None], ids=["known", "unknown"])
@pytest.mark.parametrize("budget", [1.0, 2e-5], ids=["memory", "file"])
def test_features_are_kept_whole(num_images, budget):
    layers = [randn(12, 8, 6, 5), randn(12, 3, 2, 2, seed=1)]
    batches = [[layer[:5] for layer in layers], [layer[5:10] for layer in layers], [layer[10:] for layer in layers]]
    store = FeatureStore(budget, batches[0], num_images, least=0)
    for batch in batches:
        store.append(batch)
    assert_close(store.layers, layers, rtol=0, atol=0)
    spent = budget - store.remaining_budget
    assert (spent < 1e-8) == (budget < 1)


def test_features_of_unknown_number_stay_within_half_the_budget_as_they_grow():
    batch = [torch.zeros(8, 64, 8, 8)]  # 128 KiB
    room = 4 * batch[0].nbytes  # in memory: half the budget
    store = FeatureStore(2 * room / GIB, batch, None, least=0)
    store.append(batch)
    assert store.remaining_budget < 2 * room / GIB
    store.append(batch)  # grows to 32 images, the room's, while there are the 8 of before
    assert store.remaining_budget == 2 * room / GIB


def test_musc_within_a_budget(folder, own_backbone, make_engine):
    reference = by_path(make_engine().predict(MuSc(own_backbone), dataloaders=predict_loader(folder)))
    model = MuSc(own_backbone, memory_budget=7e-4)
    assert_same(by_path(make_engine().predict(model, dataloaders=predict_loader(folder))), reference)


def test_musc_in_too_small_a_budget_stops_after_one_batch(folder, own_backbone, make_engine):
    model = MuSc(own_backbone, memory_budget=1e-6, batch_size=2)
    with pytest.raises(MemoryBudgetError, match="memory_budget must be at least"):
        make_engine().predict(model, dataloaders=predict_loader(folder, batch_size=2))
    assert own_backbone.num_images == 2
