# SPDX-License-Identifier: Apache-2.0
"""Decisions without labels: on scores made here, where it is known what is anomalous, and through Engine."""

import csv
import json
from functools import partial

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Padim
from anomalib.post_processing import MEBinPostProcessor, PostProcessor
from commands import read_table
from conftest import SHARED, OwnBackbone, write_products
from runs import by_path, datamodule

from anomalib_musc import MuSc, PredictionWriter, RsCINPostProcessor
from anomalib_musc.decision.thresholds import (
    contrasts,
    count_anomalous,
    count_outliers,
    image_threshold,
    pixel_threshold,
    upper_group,
)
from benchmarks.same_features import MobileNet


def pool(
    num_normal: int,
    num_anomalous: int,
    seed: int = 0,
    contrast: float = 3.0,
    image_spread: float = 0.1,
    size: int = 3,
) -> np.ndarray:
    """Patch scores (N, 196) of textures that differ by place and by image; the last images have a blob each."""
    rng = np.random.default_rng(seed)
    places, images = rng.normal(0, 0.3, 196), rng.normal(0, image_spread, num_normal + num_anomalous)
    logarithms = places + images[:, None] + rng.normal(0, 0.12, (len(images), 196))
    for index in range(num_normal, len(images)):
        y, x = rng.integers(0, 11, 2)
        logarithms[index].reshape(14, 14)[y : y + size, x : x + size] += np.log(contrast)
    return np.exp(logarithms)


def flagged(patch_scores: np.ndarray) -> np.ndarray:
    scores = patch_scores.max(axis=1)
    return scores > image_threshold(scores, count_anomalous(patch_scores))


def f1(truth: np.ndarray, found: np.ndarray) -> float:
    return 2 * (truth & found).sum() / (truth.sum() + found.sum())


def best_f1(truth: np.ndarray, scores: np.ndarray) -> float:
    return max(f1(truth, scores >= threshold) for threshold in np.unique(scores))


@pytest.mark.parametrize("num_images", [8, 10, 20, 40, 80, 200])
@pytest.mark.parametrize("image_spread", [0.1, 0.3, 0.5])
def test_a_pool_of_good_images_is_left_alone(num_images, image_spread):
    shares = [flagged(pool(num_images, 0, seed, image_spread=image_spread)).mean() for seed in range(20)]
    assert max(shares) <= 0.05


@pytest.mark.parametrize("num_patches", [25, 49, 64])
def test_a_pool_of_few_patches_is_left_alone(num_patches):
    shares = [flagged(pool(40, 0, seed)[:, :num_patches]).mean() for seed in range(20)]
    assert max(shares) <= 0.05


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.3, 0.4, 0.5])
def test_clear_defects_are_found(share):
    num_anomalous, shares = round(40 * share), []
    truth = np.arange(40) >= 40 - num_anomalous
    for seed in range(10):
        patch_scores = pool(40 - num_anomalous, num_anomalous, seed)
        shares.append(f1(truth, flagged(patch_scores)) / best_f1(truth, patch_scores.max(axis=1)))
    assert np.mean(shares) >= 0.95
    assert min(shares) >= 0.85


@pytest.mark.parametrize("contrast", [6, 15])
@pytest.mark.parametrize("num_anomalous", [1, 4, 10])
def test_small_clear_defects_do_not_part_the_others(num_anomalous, contrast):
    """One patch of 196, which the 0.99 quantile does not see."""
    truth = np.arange(40) >= 40 - num_anomalous
    shares = [f1(truth, flagged(pool(40 - num_anomalous, num_anomalous, seed, contrast, size=1))) for seed in range(10)]
    assert np.mean(shares) >= 0.9


@pytest.mark.parametrize("num_images", [2, 3, 4, 5, 12])
@pytest.mark.parametrize("num_anomalous", [0, 1, "all"])
def test_never_everything(num_images, num_anomalous):
    num_anomalous = num_images if num_anomalous == "all" else num_anomalous
    for seed in range(10):
        assert not flagged(pool(num_images - num_anomalous, num_anomalous, seed, contrast=10)).all()


def test_order_and_scale_change_nothing():
    patch_scores = pool(30, 8)
    order = np.random.default_rng(1).permutation(38)
    assert count_anomalous(patch_scores) == count_anomalous(patch_scores[order]) == count_anomalous(0.01 * patch_scores)


@pytest.mark.parametrize("patch_scores", [np.zeros((6, 9)), np.ones((6, 9)), np.full((2, 1), 0.5)])
def test_equal_images_are_normal(patch_scores):
    assert not flagged(patch_scores).any()
    assert pixel_threshold(patch_scores, np.zeros(len(patch_scores), bool)) == patch_scores.max()


@pytest.mark.parametrize("seed", range(20))
def test_copies_of_one_image_are_normal(seed):
    patch_scores = np.repeat(pool(1, 0, seed), 34, axis=0)
    assert count_anomalous(patch_scores) == count_anomalous(7.3 * patch_scores) == 0


def test_one_odd_image_among_copies():
    patch_scores = np.full((12, 196), 0.1)
    patch_scores[3, 50] = 0.4
    assert flagged(patch_scores).nonzero()[0].tolist() == [3]


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.1])
@pytest.mark.parametrize("copies", [2, 12, 20])
def test_images_with_copies_do_not_stand_out(copies, noise):
    """Several shots of one thing score low all over."""
    for seed in range(5):
        patch_scores = pool(40, 0, seed)
        patch_scores[:copies] *= max(noise, 1e-7)
        assert count_anomalous(patch_scores) <= 2


@pytest.mark.parametrize("contrast", [4, 20, 60, 1000])
@pytest.mark.parametrize("num_anomalous", [2, 8, 14])
def test_defects_however_clear_make_no_copies_of_the_others(num_anomalous, contrast):
    patch_scores = np.random.default_rng(0).uniform(0.9, 1.1, (20, 196))
    patch_scores[-num_anomalous:, 40:70] *= contrast
    assert flagged(patch_scores).nonzero()[0].tolist() == list(range(20 - num_anomalous, 20))


@pytest.mark.parametrize(
    ("num_near", "num_far", "num_clear", "expected"),
    [(0, 0, 0, 0), (1, 0, 0, 1), (5, 0, 0, 2), (5, 3, 0, 3), (5, 0, 4, 4), (5, 3, 4, 7), (5, 1, 0, 1)],
)
def test_outliers(num_near, num_far, num_clear, expected):
    """Of images that nearly stand out, 5 % of 40 at most, and none beside those that do or have a clear defect."""
    heights, contrast = np.full(40, 0.3), np.zeros(40)
    heights[:num_near], heights[10 : 10 + num_far], contrast[20 : 20 + num_clear] = 0.6, 1.0, 0.9
    assert count_outliers(heights, contrast) == expected


@pytest.mark.parametrize("num_anomalous", [1, 2, 3])
@pytest.mark.parametrize("odd", [1.0, 1.8])
def test_few_images_of_far_contrast_are_the_outliers(num_anomalous, odd):
    """And neither parts the others in two groups nor takes odd ones along."""
    for seed in range(10):
        patch_scores = pool(24, num_anomalous, seed, contrast=8)
        patch_scores[:2, 40] = odd * np.median(patch_scores[:, 40])
        assert flagged(patch_scores).nonzero()[0].tolist() == list(range(24, 24 + num_anomalous))


def test_contrast_is_not_of_images_that_differ_all_over():
    patch_scores = pool(20, 2, contrast=8)
    patch_scores[:3] *= 4
    beyond = contrasts(patch_scores)
    assert beyond[20:].min() > 0.8 > beyond[:20].max()
    np.testing.assert_allclose(contrasts(0.1 * patch_scores), beyond, atol=1e-9)


def test_pixels():
    patch_scores = pool(30, 10)
    is_anomalous = np.arange(40) >= 30
    above = patch_scores > pixel_threshold(patch_scores, is_anomalous)
    assert above[:30].any(axis=1).mean() <= 0.25
    assert above[30:].any(axis=1).mean() >= 0.7
    assert above.mean() <= 0.011


def test_few_defects_give_few_pixels():
    patch_scores = pool(60, 3, contrast=8)
    patch_scores[:12, ::3] *= 2  # some good images are rough, with more than 1 % of all patches
    is_anomalous = np.arange(63) >= 60
    above = patch_scores > pixel_threshold(patch_scores, is_anomalous)
    assert above[60:].any(axis=1).all()
    assert not above[:60].any()


def test_large_defects_are_marked_whole():
    rng = np.random.default_rng(0)
    patch_scores = np.exp(rng.normal(0, 0.05, (60, 196)))
    patch_scores[55:].reshape(5, 14, 14)[:, 2:9, 3:10] *= 4  # a quarter of five images
    is_anomalous = np.arange(60) >= 55
    above = patch_scores > pixel_threshold(patch_scores, is_anomalous)
    assert above[55:].reshape(5, 14, 14)[:, 2:9, 3:10].mean() > 0.75
    assert above.sum() < 5 * 49 + 30


def test_most_anomalous_images_have_a_region_however_many_they_are():
    patch_scores = pool(30, 25)
    patch_scores[30:35].reshape(5, 14, 14)[:, :6, :6] *= (
        8.0  # large defects, by themselves more than 1 % of all patches
    )
    is_anomalous = np.arange(55) >= 30
    above = patch_scores > pixel_threshold(patch_scores, is_anomalous)
    assert above[30:].any(axis=1).mean() >= 0.7
    assert above[:30].any(axis=1).mean() <= 0.25


def test_image_threshold_lies_between():
    scores = np.array([0.1, 0.9, 0.5, 0.7])
    for count in range(4):
        assert (scores > image_threshold(scores, count)).sum() == count
    assert (np.array([0.5, 0.5, 0.1]) > image_threshold(np.array([0.5, 0.5, 0.1]), 1)).sum() == 0


def evenly(width: float, where: slice, num_images: int = 40) -> np.ndarray:
    """Patch scores (N, 196) of which some are high, by 1 in the median image and evenly more or less in the others."""
    logarithms = np.random.default_rng(0).normal(0, 0.08, (num_images, 196))
    logarithms[:, where] += np.linspace(1 - width, 1 + width, num_images)[:, None]
    return np.exp(logarithms)


@pytest.mark.parametrize(
    ("width", "num_high", "num_images", "parted"),
    [(0.6, 6, 40, False), (0.7, 6, 40, True), (0.9, 6, 24, True), (0.75, 6, 16, False), (0.3, 30, 40, True)],
)
def test_a_wide_spread_of_the_tops_parts_the_images(width, num_high, num_images, parted):
    """At a place that is rough in all images; of a large one, the roughness is what it has within itself."""
    count = count_anomalous(evenly(width, slice(num_high), num_images))
    assert 0.25 * num_images < count < 0.75 * num_images if parted else count < 0.2 * num_images


def test_images_that_differ_in_all_but_their_tops_are_not_parted():
    patch_scores = evenly(0.0, slice(6))
    patch_scores[:, 60:] *= np.exp(np.random.default_rng(1).permutation(np.linspace(-2, 0, 40)))[:, None]
    assert count_anomalous(patch_scores) < 8


@pytest.mark.parametrize(("width", "num_images", "parted"), [(0.6, 40, False), (0.75, 40, True), (0.6, 10, False)])
def test_a_wide_spread_of_the_heights_parts_the_images(width, num_images, parted):
    """Of one patch each, which the 0.99 quantile does not see, at a place of its own."""
    patch_scores = evenly(width, slice(1), num_images)
    for index, image in enumerate(patch_scores):
        image[[0, index]] = image[[index, 0]]
    count = count_anomalous(patch_scores)
    assert 0.25 * num_images < count < 0.75 * num_images if parted else count <= 0.05 * num_images


def two_levels(num_normal: int, num_anomalous: int, difference: float, seed: int = 0) -> np.ndarray:
    """Patch scores (N, 196) that stand out at few places everywhere, of anomalous images by so much more."""
    rng = np.random.default_rng(seed)
    count = num_normal + num_anomalous
    logarithms = rng.normal(0, 0.02, (count, 196)) + rng.normal(0, 0.05, (count, 1))
    for index in range(count):
        where = rng.choice(196, 6, replace=False)
        logarithms[index, where] += rng.normal(1.0, 0.1) + (index >= num_normal) * difference
    return np.exp(logarithms)


@pytest.mark.parametrize("num_anomalous", [9, 16, 24, 29])
@pytest.mark.parametrize("seed", range(5))
def test_two_levels_of_scores_are_two_groups(num_anomalous, seed):
    patch_scores = two_levels(40 - num_anomalous, num_anomalous, 0.8, seed)
    assert count_anomalous(patch_scores) == num_anomalous
    assert flagged(patch_scores)[-num_anomalous:].all()


@pytest.mark.parametrize(
    "patch_scores",
    [
        two_levels(40, 0, 0.8),
        two_levels(24, 16, 0.3),  # levels too near
        two_levels(35, 5, 0.8),  # too few on the higher one
        two_levels(4, 3, 0.8),  # too few images
    ],
)
def test_what_are_not_two_levels(patch_scores):
    assert count_anomalous(patch_scores) <= 0.05 * len(patch_scores)


def test_a_black_background_does_not_hide_two_groups():
    patch_scores = np.full((40, 588), 1e-9)
    patch_scores[:, 200:396] = pool(28, 12)
    assert abs(count_anomalous(patch_scores) - 12) <= 2


def test_no_more_than_three_quarters_are_a_group():
    assert count_anomalous(two_levels(9, 31, 0.8)) == 30


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.1])
@pytest.mark.parametrize("copies", [2, 12, 20, 29, 38])
def test_copies_are_no_lower_level(copies, noise):
    """Several shots of one thing score low all over."""
    patch_scores = pool(40, 0)
    patch_scores[:copies] *= max(noise, 1e-7)
    assert count_anomalous(patch_scores) <= 0.05 * len(patch_scores)


def test_copies_do_not_hide_the_levels_of_the_others():
    patch_scores = two_levels(24, 16, 0.8)
    patch_scores[:2] = 1e-7
    assert count_anomalous(patch_scores) == 16


def test_upper_group_is_otsus():
    values = np.random.default_rng(0).normal(size=50)
    ascending = np.sort(values)
    splits = range(1, 50)
    within = [k * ascending[:k].var() + (50 - k) * ascending[k:].var() for k in splits]
    assert upper_group(values) == 50 - splits[int(np.argmin(within))]


# --- through Engine ------------------------------------------------------------------------------------------------


@pytest.fixture
def pile(tmp_path):
    """Thirty products, five of them broken."""
    write_products(tmp_path / "pile/a", range(25))
    write_products(tmp_path / "pile/b", range(30, 35), masks=tmp_path / "masks")
    return tmp_path / "pile"


def labels(tmp_path) -> dict[str, str]:
    (table,) = tmp_path.rglob("predictions.csv")
    rows = [line.split(",") for line in table.read_text().splitlines()[1:]]
    return {row[0].split("/pile/")[1]: row[2] for row in rows}


def test_a_folder_is_decided_without_labels(tmp_path, pile, own_backbone, make_engine):
    make_engine().predict(MuSc(own_backbone), data_path=pile)
    assert {name for name, label in labels(tmp_path).items() if label == "anomalous"} == {
        f"b/{number:03d}.png" for number in range(5)
    }


@pytest.mark.parametrize("post_processor", [PostProcessor, partial(MEBinPostProcessor, sample_rate=32)])
def test_anomalibs_post_processors_get_thresholds_too(post_processor, tmp_path, pile, own_backbone, make_engine):
    model = MuSc(own_backbone, post_processor=post_processor())
    make_engine().predict(model, data_path=pile)
    found = {name for name, label in labels(tmp_path).items() if label == "anomalous"}
    assert found == {f"b/{number:03d}.png" for number in range(5)}


def test_sensitivity_is_anomalibs(tmp_path, pile, make_engine):
    counts = []
    for sensitivity in (0.0, 0.5, 1.0):
        post_processor = RsCINPostProcessor(image_sensitivity=sensitivity)
        make_engine().predict(MuSc(OwnBackbone(), post_processor=post_processor), data_path=pile)
        counts.append(list(labels(tmp_path).values()).count("anomalous"))
    assert counts[0] == 0
    assert counts[1] == 5
    assert counts[2] > 5


def test_a_threshold_by_hand(tmp_path, pile, mvtec_root, make_engine):
    post_processor = RsCINPostProcessor(image_threshold=0.999, pixel_threshold=10.0)
    model, engine = MuSc(OwnBackbone(), post_processor=post_processor), make_engine()
    engine.predict(model, data_path=pile)
    assert list(labels(tmp_path).values()).count("anomalous") <= 1
    assert '"x"' not in next(tmp_path.rglob("predictions.csv")).read_text()
    engine.validate(model, datamodule=datamodule(mvtec_root))  # labels do not overrule a hand
    assert post_processor.image_threshold.item() == pytest.approx(0.999)
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = MuSc.load_from_checkpoint(tmp_path / "model.ckpt", backbone=OwnBackbone())
    assert loaded.post_processor.pixel_threshold.item() == 10


@pytest.mark.parametrize("arguments", [{"image_threshold": "0.5"}, {"pixel_threshold": float("nan")}])
def test_bad_thresholds(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be a finite number or None"):
        RsCINPostProcessor(**arguments)


def test_labels_decide_where_there_are_any(mvtec_root, own_backbone, make_engine):
    ours, plain = MuSc(own_backbone), MuSc(OwnBackbone(), post_processor=RsCINPostProcessor())
    engine = make_engine()
    engine.test(ours, datamodule=datamodule(mvtec_root))
    make_engine().validate(plain, datamodule=datamodule(mvtec_root))
    assert ours.post_processor.image_threshold == plain.post_processor.image_threshold
    assert ours.post_processor.pixel_threshold == plain.post_processor.pixel_threshold


def test_labels_without_masks_decide_for_images_alone(tmp_path, own_backbone, make_engine):
    write_products(tmp_path / "good", range(16))
    write_products(tmp_path / "bad", range(30, 36), masks=tmp_path / "masks")
    data = Folder(
        name="x", root=tmp_path, normal_dir="good", normal_test_dir="good", abnormal_dir="bad", num_workers=0, seed=0
    )
    model = MuSc(own_backbone)
    (batch, *_) = make_engine().predict(model, datamodule=data)
    threshold = model.post_processor.pixel_threshold.item()
    assert threshold != model.post_processor.image_threshold.item()
    assert model.post_processor.pixel_min < threshold <= model.post_processor.pixel_max
    assert 0 < batch.pred_mask.float().mean() < 0.2


def test_another_pool_gets_thresholds_of_its_own(tmp_path, pile, make_engine):
    write_products(tmp_path / "good", range(40, 60))
    engine, model = make_engine(), MuSc(OwnBackbone())
    engine.predict(model, data_path=pile)
    first = model.post_processor.image_threshold.item()
    engine.predict(model, data_path=tmp_path / "good")
    assert model.post_processor.image_threshold.item() != first
    fresh = MuSc(OwnBackbone())
    make_engine().predict(fresh, data_path=tmp_path / "good")
    assert model.post_processor.image_threshold == fresh.post_processor.image_threshold
    assert model.post_processor.pixel_threshold == fresh.post_processor.pixel_threshold


FOLDERS = {
    "unlabelled as test set": {"normal_test_dir": "mixed", "val_split_mode": "none"},
    "only normal": {"normal_test_dir": "good", "val_split_mode": "none"},
    "only abnormal": {"abnormal_dir": "bad", "test_split_mode": "none"},
    "only abnormal, no validation": {"abnormal_dir": "bad", "test_split_mode": "none", "val_split_mode": "none"},
    "no masks": {"normal_test_dir": "good", "abnormal_dir": "bad"},
    "no masks, no validation": {"normal_test_dir": "good", "abnormal_dir": "bad", "val_split_mode": "none"},
    "validation from training": {"abnormal_dir": "bad", "val_split_mode": "from_train"},
    "synthetic validation": {"abnormal_dir": "bad", "val_split_mode": "synthetic"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    write_products(root / "good", range(16))
    write_products(root / "bad", range(30, 36), masks=root / "masks")
    write_products(root / "mixed/a", range(50, 60))
    write_products(root / "mixed/b", range(36, 38), masks=root / "more")
    return root


@pytest.mark.parametrize("case", FOLDERS)
@pytest.mark.parametrize("entry", ["test", "predict"])
def test_folders(entry, case, folders, tmp_path, own_backbone, make_engine):
    data = Folder(name="x", root=folders, normal_dir="good", num_workers=0, seed=0, **FOLDERS[case])
    outputs = getattr(make_engine(), entry)(MuSc(own_backbone), datamodule=data)
    assert outputs
    if entry == "test":
        assert all(np.isfinite(value) for value in outputs[0].values())
        assert not any(name.startswith("pixel_") for name in outputs[0])
    else:
        for batch in outputs:
            assert torch.isfinite(batch.pred_score).all()
            assert batch.pred_label.dtype == batch.pred_mask.dtype == torch.bool
    if entry == "predict" and case == "unlabelled as test set":
        (table,) = tmp_path.rglob("predictions.csv")
        with table.open(newline="", encoding="utf-8") as file:
            flagged = {row["path"] for row in csv.DictReader(file) if row["label"] == "anomalous"}
        assert flagged == {str(folders / "mixed/b" / name) for name in ("000.png", "001.png")}


@pytest.mark.parametrize("val_split_mode", ["none", "from_test"])
def test_a_folder_without_test_images_is_an_error(val_split_mode, folders, own_backbone, make_engine):
    arguments = {"test_split_mode": "none", "val_split_mode": val_split_mode, "num_workers": 0}
    for entry in ("test", "predict"):
        data = Folder(name="x", root=folders, normal_dir="good", **arguments)
        with pytest.raises(ValueError, match="test_split_mode='none' leaves Folder without test images"):
            getattr(make_engine(), entry)(MuSc(own_backbone), datamodule=data)


def test_a_folder_split_too_small_says_so(folders, own_backbone, make_engine):
    data = Folder(name="x", root=folders, normal_dir="bad", num_workers=0)
    with pytest.raises(ValueError, match="where a datamodule has set images apart"):
        make_engine().test(MuSc(own_backbone), datamodule=data)


# --- the table of another model ------------------------------------------------------------------------------------


def test_the_writer_serves_other_models(tmp_path, mvtec_root, folder):
    engine = Engine(
        default_root_dir=tmp_path,
        callbacks=[PredictionWriter(heatmaps=["npy"])],
        enable_progress_bar=False,
        max_epochs=1,
    )
    model = Padim(backbone="resnet18", layers=["layer1"], pre_trained=False, n_features=16)
    engine.fit(model, datamodule=datamodule(mvtec_root))
    predictions = by_path(engine.predict(model, data_path=folder))
    (table,) = tmp_path.rglob("predictions.csv")
    lines = table.read_text().splitlines()
    assert len(lines) == 13
    assert len(list(table.parent.glob("heatmaps/test/**/*.npy"))) == 12
    for row in read_table(tmp_path).values():
        assert float(row["score"]) == pytest.approx(predictions[row["path"]][0], abs=1e-6)
        assert row["label"] in {"normal", "anomalous"}
        json.loads(row["regions"])


@pytest.mark.skipif(not (SHARED / "weights").is_dir(), reason="../shared is not here")
def test_real_photographs_are_decided_without_labels(tmp_path):
    model = MuSc(MobileNet(SHARED / "weights/mobilenetv2_100_imagenet.safetensors"), visualizer=False)
    batches = Engine(default_root_dir=tmp_path, enable_progress_bar=False).predict(
        model, data_path=SHARED / "data/cookies/cookie/test"
    )
    truth = np.array(["/good/" not in path for batch in batches for path in batch.image_path])
    scores = torch.cat([pool.scores for pool in model._pools]).numpy()
    found = torch.cat([batch.pred_label for batch in batches]).numpy()
    assert f1(truth, found) >= 0.9 * best_f1(truth, scores)
    assert f1(truth, found) > 0.75


# --- pools that are hard to decide ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.2, 0.6, 0.9])
@pytest.mark.parametrize("num_images", [12, 20, 60])
def test_patches_that_are_equal_everywhere_do_not_stand_out(num_images, share):
    for seed in range(10):
        patch_scores = pool(num_images, 0, seed)
        background = int(share * 196)
        patch_scores[:, :background] = 1e-8 * np.random.default_rng(seed).random((num_images, background))
        assert flagged(patch_scores).sum() <= max(1, 0.05 * num_images)


@pytest.mark.parametrize(("num_images", "num_copies"), [(20, 8), (60, 25), (100, 60)])
def test_copies_make_nobody_stand_out(num_images, num_copies):
    patch_scores = pool(num_images, 0)
    patch_scores[:num_copies] = 1e-9 * np.random.default_rng(0).random((num_copies, 196))
    assert flagged(patch_scores).mean() <= 0.05


def test_a_calm_image_is_no_group():
    patch_scores = pool(5, 1, contrast=10)
    patch_scores[0] = np.exp(np.log(patch_scores[0]).mean())  # its worst patch is its mean
    assert count_anomalous(patch_scores) <= 2


def test_pixels_where_every_image_is_anomalous():
    patch_scores = pool(2, 4)
    above = patch_scores > pixel_threshold(patch_scores, np.ones(6, bool))
    assert 0.5 <= above.any(axis=1).mean() < 1
    assert above.mean() < 0.05


def test_everything_may_be_anomalous_by_hand(pile, tmp_path, own_backbone, make_engine):
    post_processor = RsCINPostProcessor(image_threshold=-1.0, pixel_threshold=0.05)
    make_engine().predict(MuSc(own_backbone, post_processor=post_processor), data_path=pile)
    assert set(labels(tmp_path).values()) == {"anomalous"}
