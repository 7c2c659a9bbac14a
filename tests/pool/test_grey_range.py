# SPDX-License-Identifier: Apache-2.0
"""No outlier and no offset decides what is black and white in grey images of more than 8 bits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import read_table
from conftest import OwnBackbone, grey, write_products
from PIL import Image
from runs import by_path, datamodule, predict_loader

from anomalib_musc import MuSc, RsCINPostProcessor
from anomalib_musc.pool.grey_range import GreyRange, find_grey_range, range_of_images, sample

NUM_IMAGES, DEFECT = 8, "7.tif"
PLAIN = {"visualizer": False}


def fractions(number: int) -> np.ndarray:
    """A product in [0, 1]; the last has a defect."""
    return grey(30 + number, defect=number == NUM_IMAGES - 1).astype(np.float32) / 255


def write(folder: Path, change, suffix: str = "tif") -> Path:
    """Write the product as ``change(values in [0, 1], number)`` gives it."""
    folder.mkdir(parents=True)
    for number in range(NUM_IMAGES):
        Image.fromarray(change(fractions(number), number)).save(folder / f"{number}.{suffix}")
    return folder


def ten_bits(values: np.ndarray) -> np.ndarray:
    return np.round(values * 1023).astype(np.uint16)


def with_pixel(values: np.ndarray, value: float, number: int) -> np.ndarray:
    if number == 2:
        values[5, 5] = value
    return values


def with_hole(values: np.ndarray, value: float) -> np.ndarray:
    values[:12, :12] = value
    return values


POOLS = {
    "dead pixel in 10 bits": lambda values, number: with_pixel(ten_bits(values), 65535, number),
    "fractions above 1": lambda values, number: with_pixel(values, 1.0001, number),
    "no data is 3.4e38": lambda values, _: with_hole(values, 3.4e38),
    "no data is -9999": lambda values, _: with_hole(values, -9999),
    "no data is not a number": lambda values, _: with_hole(values, np.nan),
    "negative": lambda values, _: values - 3,
    "offset of 5000": lambda values, _: np.round(5000 + 200 * values).astype(np.uint16),
    "heights in mm": lambda values, _: 11.8 + 0.4 * values,
    "whole heights in 32 bits": lambda values, _: np.round(-70000 + 900 * values).astype(np.int32),
}


@pytest.mark.parametrize("change", POOLS.values(), ids=POOLS.keys())
def test_the_defect_stands_out_whatever_the_unit(change, tmp_path, make_engine):
    model = MuSc(OwnBackbone(), **PLAIN)
    make_engine().predict(model, data_path=write(tmp_path / "pool", change))
    rows = read_table(tmp_path)
    assert max(rows, key=lambda name: float(rows[name]["score"])) == DEFECT
    assert rows[DEFECT]["label"] == "anomalous"
    (pool,) = model.pools
    twin = MuSc(OwnBackbone(), **PLAIN)
    make_engine().predict(twin, data_path=write(tmp_path / "twin", lambda values, _: values))
    spreads = [float(pool.raw_scores.max() / pool.raw_scores.median()) for pool in (pool, *twin.pools)]
    assert spreads[0] > 0.5 * spreads[1]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.linspace(0, 4000, 5000).round(), (0, 4095)),
        (torch.linspace(300, 2500, 5000).round(), (0, 4095)),
        (torch.linspace(0, 0.8, 5000), (0, 1)),
        (torch.cat([torch.linspace(0, 1000, 5000).round(), torch.tensor([65535.0])]), (0, 1023)),
        (torch.cat([torch.zeros(3000), torch.linspace(2000, 4000, 2000).round()]), (0, 4095)),
        (torch.tensor([0.0, 65535.0]).repeat(500), (0, 65535)),
        (torch.cat([torch.full((2000,), -3.4e38), torch.linspace(11.8, 12.2, 3000)]), (11.8, 12.2)),
        (torch.linspace(-2, 3, 5000), (-2, 3)),
        (torch.zeros(50), (0, 1)),
        (torch.empty(0), (0, 1)),
    ],
)
def test_black_and_white_of_known_values(values, expected):
    assert find_grey_range(values) == pytest.approx(expected, abs=1e-5)


def test_a_small_bright_object_on_black_keeps_its_contrast():
    values = torch.cat([torch.zeros(9900) + torch.arange(9900) % 3, torch.linspace(20000, 30000, 100).round()])
    assert find_grey_range(values) == (0, 32767)


OVEREXPOSED = {
    "one of 8": ([3], 60000, (0, 1023)),
    "two of 8": ([0, 5], 65535, (0, 1023)),
    "dark ones of 12 bits": ([1], 0, None),
}


@pytest.mark.parametrize(("bad", "value", "expected"), OVEREXPOSED.values(), ids=OVEREXPOSED.keys())
@pytest.mark.parametrize("is_tested", [False, True])
def test_a_wrong_exposure_does_not_decide(bad, value, expected, is_tested, tmp_path, make_engine):
    def expose(values: np.ndarray, number: int) -> np.ndarray:
        noise = np.random.default_rng(number).integers(-300, 300, values.shape)
        return np.clip(value + noise, 0, 65535).astype(np.uint16) if number in bad else ten_bits(values)

    folder = write(tmp_path / "pool", expose, "png")
    model = MuSc(OwnBackbone(), **PLAIN)
    if is_tested:
        engine = make_engine()
        engine.test(model, dataloaders=predict_loader(folder))
        notes = model.pools[0].notes
    else:
        make_engine().predict(model, data_path=folder)
        notes = {name: row["note"] for name, row in read_table(tmp_path).items() if row["note"]}
    assert model.pools[0].grey_range == (expected or (0, 1023))
    named = {Path(name).name for name, note in notes.items() if "clipped to 0 and 1023" in note}
    assert named == ({f"{number}.png" for number in bad} if expected else set())


def test_images_of_one_camera_all_decide():
    samples = [torch.linspace(0, top, 500).round() for top in (800, 900, 1000, 4000)]
    assert range_of_images(samples) == ((0, 4095), [])
    assert range_of_images([torch.empty(0), *samples]) == ((0, 4095), [])
    assert range_of_images([torch.empty(0)]) == ((0, 1), [])
    assert range_of_images([torch.full((5,), 3.0), torch.full((5,), 60000.0)]) == ((0, 65535), [])


def test_the_log_says_the_range_and_one_by_hand_wins(tmp_path, make_engine, caplog):
    folder = write(tmp_path / "pool", POOLS["offset of 5000"])
    found = MuSc(OwnBackbone(), **PLAIN)
    with caplog.at_level("INFO"):
        make_engine().predict(found, data_path=folder)
    low, high = found.pools[0].grey_range
    assert 5000 <= low < high <= 5200
    assert f"{low:g} is black and {high:g} is white" in caplog.text
    by_hand = MuSc(OwnBackbone(), grey_range=(4900, 5300), **PLAIN)
    make_engine().predict(by_hand, data_path=folder)
    assert by_hand.pools[0].grey_range == (4900, 5300)
    torch.testing.assert_close(found.pools[0].patch_scores.shape, by_hand.pools[0].patch_scores.shape)
    assert (found.pools[0].patch_scores - by_hand.pools[0].patch_scores).abs().max() > 1e-3


@pytest.mark.parametrize("grey_range", [(1, 1), (5, 2), (0,), "ab", (0, float("nan")), (True, 3), 4095])
def test_an_impossible_range_is_named(grey_range):
    with pytest.raises(ValueError, match="grey_range must be the values of black and white"):
        MuSc(OwnBackbone(), grey_range=grey_range)


def test_a_kept_bank_sees_the_next_lot_as_its_pool_was_seen(tmp_path, make_engine):
    write(tmp_path / "pool", POOLS["offset of 5000"])
    dark = write(tmp_path / "next", lambda values, _: np.round(5000 + 60 * values).astype(np.uint16))
    model, engine = MuSc(OwnBackbone(), **PLAIN), make_engine()
    engine.predict(model, data_path=tmp_path / "pool")
    grey_range = model.pools[0].grey_range
    model.keep_bank(4)
    engine.predict(model, data_path=dark)
    assert model.pools[0].grey_range == pytest.approx(grey_range)
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    restored = MuSc.load_from_checkpoint(tmp_path / "model.ckpt", backbone=OwnBackbone())
    assert restored.model.bank.grey_range == pytest.approx(grey_range)


def test_thresholds_of_labels_keep_the_range_that_they_were_found_in(tmp_path, make_engine):
    root = tmp_path / "data/widget"
    write(root / "train/good", POOLS["offset of 5000"], "png")
    write(root / "test/good", POOLS["offset of 5000"], "png")
    write(root / "test/broken", lambda values, number: POOLS["offset of 5000"](1 - values, number), "png")
    lot = write(tmp_path / "lot", lambda values, _: np.round(5000 + 60 * values).astype(np.uint16))
    model, engine = MuSc(OwnBackbone(), **PLAIN), make_engine()
    for path in (root / "test/broken").glob("*.png"):
        mask = root / f"ground_truth/broken/{path.stem}_mask.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (64, 64), 255).save(mask)
    data = datamodule(tmp_path / "data")
    engine.test(model, datamodule=data)
    (validated,) = model.pools
    assert model.model.backbone.num_images == len(validated.names)  # not scored again for the test
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    restored = MuSc.load_from_checkpoint(tmp_path / "model.ckpt", backbone=OwnBackbone(), **PLAIN)
    for labelled in (model, restored):
        make_engine().predict(labelled, data_path=lot)
        assert labelled.pools[0].grey_range == validated.grey_range
    unlabelled = MuSc(OwnBackbone(), **PLAIN)
    make_engine().predict(unlabelled, data_path=lot)
    assert unlabelled.pools[0].grey_range != validated.grey_range


def test_a_range_by_hand_holds_for_loaders_without_files(folder, make_engine):
    loader = predict_loader(folder)
    loader.dataset.transform = torch.nn.Identity()
    model = MuSc(OwnBackbone(), grey_range=(0, 4095), **PLAIN)
    assert len(by_path(make_engine().predict(model, dataloaders=loader))) == 12
    assert model.grey_range == GreyRange(0, 4095)


# --- pools that show nothing ---------------------------------------------------------------------------------------


def test_a_blank_pool_is_named_and_labels_nothing(tmp_path, make_engine):
    (tmp_path / "blank").mkdir()
    for number in range(8):
        Image.new("L", (64, 64), 20 * number).save(tmp_path / f"blank/{number}.png")
    model = MuSc(OwnBackbone(), post_processor=RsCINPostProcessor(contamination=0.3))
    with pytest.warns(UserWarning, match="No image shows any contrast"):
        make_engine().predict(model, data_path=tmp_path / "blank")
    assert {row["label"] for row in read_table(tmp_path).values()} == {"normal"}
    assert any("No image shows any contrast" in warning for warning in model.pool_warnings)


def test_equal_scores_are_named_and_label_nothing(tmp_path, make_engine):
    for number in range(6):
        (path,) = write_products(tmp_path / "pool", range(1))
        path.rename(path.with_name(f"copy{number}.png"))
    model = MuSc(OwnBackbone(), post_processor=RsCINPostProcessor(contamination=0.3))
    with pytest.warns(UserWarning, match="scores of all images are equal"):
        make_engine().predict(model, data_path=tmp_path / "pool")
    assert {row["label"] for row in read_table(tmp_path).values()} == {"normal"}


@pytest.mark.parametrize(
    "values", [[3.4e38] * 5, [-3.4e38] * 5, [-3.4e38, 3.4e38] * 3, [1e9] * 4, [0.0] * 3, [-1e-40] * 3]
)
def test_constants_and_extremes_of_float32_stay_finite(values):
    stored = torch.tensor(values)
    shown = find_grey_range(sample(stored)).apply(stored)
    assert shown.dtype == torch.float32
    assert shown.isfinite().all()
    assert shown.min() >= 0
    assert shown.max() <= 1
