# SPDX-License-Identifier: Apache-2.0
"""What is anomalous where no labels say it, through Engine; and where labels do."""

from functools import partial

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Padim
from anomalib.post_processing import MEBinPostProcessor, PostProcessor
from commands import read_paths, read_table
from conftest import OwnBackbone, write_products
from runs import Recorder, by_path, datamodule

from anomalib_musc import MuSc, PredictionWriter, RsCINPostProcessor

# --- through Engine ------------------------------------------------------------------------------------------------


@pytest.fixture
def pile(tmp_path):
    """Thirty products, five of them broken."""
    write_products(tmp_path / "pile/a", range(25))
    write_products(tmp_path / "pile/b", range(30, 35), masks=tmp_path / "masks")
    return tmp_path / "pile"


def labels(tmp_path) -> dict[str, str]:
    return {path.split("/pile/")[1]: row["label"] for path, row in read_paths(tmp_path).items()}


def test_a_folder_is_decided_without_labels(tmp_path, pile, own_backbone, make_engine):
    batches = make_engine().predict(MuSc(own_backbone), data_path=pile)
    flagged = {name for name, label in labels(tmp_path).items() if label == "anomalous"}
    assert flagged >= {f"b/{number:03d}.png" for number in range(5)}
    assert len(flagged) <= 8  # of 25 good ones at most 3
    for batch in batches:
        assert bool(batch.pred_mask.any()) == bool(batch.pred_label)  # a region where there is a label, and only there


@pytest.mark.parametrize("post_processor", [PostProcessor, partial(MEBinPostProcessor, sample_rate=85)])
def test_anomalibs_post_processors_get_thresholds_too(post_processor, tmp_path, pile, own_backbone, make_engine):
    model = MuSc(own_backbone, post_processor=post_processor())
    make_engine().predict(model, data_path=pile)
    found = {name for name, label in labels(tmp_path).items() if label == "anomalous"}
    assert found >= {f"b/{number:03d}.png" for number in range(5)}
    assert len(found) <= 8


def test_sensitivity_moves_the_factor(tmp_path, pile, make_engine):
    counts = []
    for sensitivity in (0.0, 0.5, 1.0):
        post_processor = RsCINPostProcessor(image_sensitivity=sensitivity)
        make_engine().predict(MuSc(OwnBackbone(), post_processor=post_processor), data_path=pile)
        counts.append(list(labels(tmp_path).values()).count("anomalous"))
    assert counts[0] == 0
    assert 5 <= counts[1] <= 8
    assert counts[2] > counts[1]


def test_a_threshold_by_hand(tmp_path, pile, mvtec_root, make_engine):
    post_processor = RsCINPostProcessor(image_threshold=1.5, pixel_threshold=2.0)
    model, engine = MuSc(OwnBackbone(), post_processor=post_processor), make_engine()
    engine.predict(model, data_path=pile)
    assert list(labels(tmp_path).values()).count("anomalous") == 0
    assert {row["regions"] for row in read_paths(tmp_path).values()} == {"0"}
    engine.validate(model, datamodule=datamodule(mvtec_root))  # labels do not overrule a hand
    assert post_processor.image_threshold.item() == pytest.approx(1.5)
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = MuSc.load_from_checkpoint(tmp_path / "model.ckpt", backbone=OwnBackbone())
    assert loaded.post_processor.pixel_threshold.item() == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("image_threshold", value) for value in ("0.5", 70, -0.1, True)],
        ("pixel_threshold", float("nan")),
        *[("contamination", value) for value in (0, 0.6, -0.1, "many", None)],
        *[("image_sensitivity", value) for value in (2, -1, float("nan"))],
        ("pixel_sensitivity", 1.01),
    ],
)
def test_arguments_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value!r}"):
        RsCINPostProcessor(**{name: value})


def test_contamination_says_how_many(tmp_path, pile, make_engine):
    post_processor = RsCINPostProcessor(contamination=1 / 6)
    model, engine = MuSc(OwnBackbone(), post_processor=post_processor), make_engine()
    engine.predict(model, data_path=pile)
    assert {name for name, label in labels(tmp_path).items() if label == "anomalous"} == {
        f"b/{number:03d}.png" for number in range(5)
    }
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert (
        MuSc.load_from_checkpoint(tmp_path / "model.ckpt", backbone=OwnBackbone()).post_processor.contamination == 1 / 6
    )


def test_identical_images_are_all_normal(tmp_path, make_engine):
    write_products(tmp_path / "pile/a", range(1))
    for number in range(1, 8):
        (tmp_path / f"pile/a/{number:03d}.png").write_bytes((tmp_path / "pile/a/000.png").read_bytes())
    make_engine().predict(MuSc(OwnBackbone()), data_path=tmp_path / "pile")
    assert set(labels(tmp_path).values()) == {"normal"}


def test_a_threshold_means_the_same_for_the_next_pool(tmp_path, pile, make_engine):
    """Scores of the same images are alike in a pool of others of the product, and so is what a threshold flags."""
    first, second = MuSc(OwnBackbone()), MuSc(OwnBackbone())
    make_engine().predict(first, data_path=pile)
    write_products(tmp_path / "other/pile/a", range(40, 65))
    write_products(tmp_path / "other/pile/b", range(30, 35), masks=tmp_path / "masks")
    make_engine().predict(second, data_path=tmp_path / "other")
    ours, theirs = (
        {name.partition("/pile/")[2]: float(score) for name, score in zip(pool.names, pool.scores, strict=True)}
        for pool in (first.pools[0], second.pools[0])
    )
    for number in range(5):
        name = f"b/{number:03d}.png"
        assert theirs[name] == pytest.approx(ours[name], rel=0.1)


def test_labels_put_the_threshold_between_two_scores(mvtec_root, own_backbone, make_engine):
    model, recorder = MuSc(own_backbone), Recorder()
    make_engine(callbacks=[recorder]).test(model, datamodule=datamodule(mvtec_root))
    pool = model.pools[0]
    scores = pool.scores.sort().values
    threshold = model.post_processor.image_threshold.item()
    below, above = scores[scores < threshold].max().item(), scores[scores > threshold].min().item()
    assert threshold == pytest.approx((below + above) / 2)
    flagged = {path for b in recorder.batches for path, label in zip(b.image_path, b.pred_label, strict=True) if label}
    assert flagged == {name for name in pool.names if "/good/" not in name}


def test_a_labelled_validation_half_is_on_the_tests_scale(mvtec_root, make_engine):
    for seed in range(3):
        data = datamodule(mvtec_root, val_split_mode="from_test", val_split_ratio=0.5, seed=seed)
        model, recorder = MuSc(OwnBackbone()), Recorder()
        make_engine(callbacks=[recorder]).test(model, datamodule=data)
        flagged = {p for b in recorder.batches for p, label in zip(b.image_path, b.pred_label, strict=True) if label}
        assert flagged == {name for name in model.pools[0].names if "/good/" not in name}


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
        flagged = {path for path, row in read_paths(tmp_path).items() if row["label"] == "anomalous"}
        assert flagged >= {str(folders / "mixed/b" / name) for name in ("000.png", "001.png")}


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
    table = max(tmp_path.rglob("predictions.csv"), key=lambda path: path.stat().st_mtime_ns)
    lines = table.read_text().splitlines()
    assert len(lines) == 13
    assert len(list(table.parent.glob("heatmaps/test/**/*.npy"))) == 12
    for row in read_table(tmp_path).values():
        assert float(row["score"]) == pytest.approx(predictions[row["path"]][0], abs=1e-6)
        assert row["label"] in {"normal", "anomalous"}
        assert int(row["regions"]) >= (row["label"] == "anomalous")
