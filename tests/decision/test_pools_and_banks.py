# SPDX-License-Identifier: Apache-2.0
"""Decisions of several pools, of banks, of pixels, and where nothing is normalised, through Engine."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from conftest import OwnBackbone, write_products
from runs import by_path, datamodule, predict_loader

from anomalib_musc import MuSc, RsCINPostProcessor

BROKEN = {f"b/{number:03d}.png" for number in range(5)}


@pytest.fixture
def pile(tmp_path):
    """Thirty products, five of them broken."""
    write_products(tmp_path / "pile/a", range(25))
    write_products(tmp_path / "pile/b", range(30, 35), masks=tmp_path / "masks")
    return tmp_path / "pile"


def quiet(mode: str = "mutual", precision: str = "exact", **kwargs) -> MuSc:
    """A model that writes nothing; other arguments are the post-processor's."""
    post_processor = RsCINPostProcessor(**kwargs)
    shared = {"visualizer": False, "prediction_writer": False, "mode": mode, "precision": precision}
    return MuSc(OwnBackbone(), post_processor=post_processor, **shared)


def flagged(batches: list[ImageBatch]) -> set[str]:
    """Names, with their folder, of the images that are labelled anomalous."""
    return {
        "/".join(Path(path).parts[-2:])
        for batch in batches
        for path, label in zip(batch.image_path, batch.pred_label, strict=True)
        if label
    }


def test_no_score_is_clipped(pile, make_engine):
    """So that the order of all images can be read from what users see."""
    model = quiet()
    found = by_path(make_engine().predict(model, data_path=pile))
    (pool,) = model.pools
    scores = [found[name][0] for name in pool.names]
    assert 0 <= min(scores) < max(scores) <= 1
    assert np.corrcoef(scores, pool.scores)[0, 1] == pytest.approx(1)


@pytest.mark.parametrize("sensitivity", [0.0, 0.5, 1.0])
def test_pixels_lie_above_a_share_of_their_images_own_maximum(sensitivity, pile, make_engine):
    model, num_regions = quiet(pixel_sensitivity=sensitivity, enable_normalization=False), 0
    for batch in make_engine().predict(model, data_path=pile):
        highest = batch.anomaly_map.amax(dim=(-2, -1), keepdim=True)
        above = batch.anomaly_map >= highest * (1 - 0.4 * sensitivity)
        assert torch.equal(batch.pred_mask, above & batch.pred_label.bool().view(-1, 1, 1))
        num_regions += int(batch.pred_mask.any())
    assert num_regions >= 5


def test_labels_are_the_same_where_nothing_is_normalised(pile, mvtec_root, make_engine):
    for arguments in ({"data_path": pile}, {"datamodule": datamodule(mvtec_root)}):
        found = []
        for is_normalised in (False, True):
            model = quiet(enable_normalization=is_normalised)
            if "datamodule" in arguments:
                make_engine().validate(model, **arguments)
            batches = make_engine().predict(model, **arguments)
            found.append((flagged(batches), sum(int(batch.pred_mask.sum()) for batch in batches)))
        assert found[0] == found[1]
        assert found[0][0]


def test_each_pool_decides_for_itself(tmp_path, pile, make_engine):
    write_products(tmp_path / "others/good", range(40, 60))
    loaders = [predict_loader(tmp_path / "others/good"), predict_loader(pile / "a"), predict_loader(pile / "b")]
    batches = make_engine().predict(quiet(), dataloaders=loaders)
    for of_loader, folder in zip(batches, (tmp_path / "others/good", pile / "a", pile / "b"), strict=True):
        assert flagged(of_loader) == flagged(make_engine().predict(quiet(), data_path=folder))


def test_a_threshold_by_hand_is_no_other_beside_another_pool(tmp_path, pile, make_engine):
    write_products(tmp_path / "others/good", range(40, 52))
    model = quiet(image_threshold=0.05)
    make_engine().predict(model, dataloaders=[predict_loader(pile), predict_loader(tmp_path / "others/good")])
    for pool, folder in zip(model.pools, (pile, tmp_path / "others/good"), strict=True):
        alone = quiet(image_threshold=1.0)
        make_engine().predict(alone, data_path=folder)
        torch.testing.assert_close(pool.scores, alone.pools[0].scores)


@pytest.mark.parametrize(("threshold", "count"), [(0.0, 30), (2.0, 0)])
def test_everything_or_nothing_by_hand(threshold, count, pile, make_engine):
    assert len(flagged(make_engine().predict(quiet(image_threshold=threshold), data_path=pile))) == count


def test_the_sensitivity_moves_a_banks_threshold(mvtec_root, folder, make_engine):
    counts = []
    for sensitivity in (0.0, 0.5, 1.0):
        model = quiet("reference", image_sensitivity=sensitivity)
        make_engine().fit(model, datamodule=datamodule(mvtec_root, val_split_mode="none"))
        counts.append(len(flagged(make_engine().predict(model, data_path=folder))))
    assert counts == sorted(counts)
    assert counts[0] < counts[2]


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_identical_images_are_normal(precision, tmp_path, make_engine):
    for number in range(5):
        write_products(tmp_path / f"pile/{number}", range(1))
    assert not flagged(make_engine().predict(quiet(precision=precision), data_path=tmp_path / "pile"))


@pytest.mark.parametrize("num_images", range(2, 6))
def test_few_good_images_are_normal(num_images, tmp_path, make_engine):
    write_products(tmp_path / "pile", range(20, 20 + num_images))
    assert len(flagged(make_engine().predict(quiet(), data_path=tmp_path / "pile"))) <= 1


@pytest.mark.parametrize(("folder", "seed"), [("a", 3), ("b", 30)])
def test_copies_leave_the_other_images_labels(folder, seed, tmp_path, pile, make_engine):
    before = flagged(make_engine().predict(quiet(), data_path=pile))
    for number in range(12):
        masks = tmp_path / "masks" if folder == "b" else None
        write_products(pile / f"copy{number}", range(seed, seed + 1), masks=masks)
    after = {name for name in flagged(make_engine().predict(quiet(), data_path=pile)) if not name.startswith("copy")}
    assert before ^ after <= {"a/003.png", "b/000.png"}  # what was copied finds itself, and is normal


def test_a_sensitivity_of_zero_flags_nothing_with_labels_either(mvtec_root, make_engine):
    model, engine = quiet(image_sensitivity=0.0), make_engine()
    engine.validate(model, datamodule=datamodule(mvtec_root))
    assert not flagged(engine.predict(model, datamodule=datamodule(mvtec_root)))
