# SPDX-License-Identifier: Apache-2.0
"""A bank of references: one image at a time, in Engine, checkpoints and exports."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib import LearningType
from anomalib.data import Folder
from anomalib.data.utils import read_image
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from commands import TINY
from conftest import OwnBackbone, write_products
from runs import assert_same, by_path, datamodule, predict_loader
from torchvision.transforms.v2 import RandomRotation

from anomalib_musc import MuSc, MuScModel
from anomalib_musc.functional import lnamd, mutual_scores, reference_scores, rscin_by_references
from anomalib_musc.memory_bank.coreset import select_coreset


def maps(num_images: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 8, 5, 6, generator=generator) + torch.randn(num_images, 8, 5, 6, generator=generator)


# --- the equations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [(0.0, 0.3), (0.2, 0.7), (0, 3), (1, 2)])
@pytest.mark.parametrize("num_images", [2, 3, 7, 12])
def test_a_pool_as_its_own_bank_is_mutual_scoring(num_images, interval):
    if num_images == 2 and interval == (1, 2):
        pytest.skip("one other image has no second distance")
    pool = lnamd(maps(num_images), 3)
    by_bank = torch.cat(
        [reference_scores(pool[[i]], pool, interval, own_copies=torch.tensor([i])) for i in range(num_images)]
    )
    torch.testing.assert_close(by_bank, mutual_scores(pool, interval), atol=1e-4, rtol=0)
    together = reference_scores(pool, pool, interval, own_copies=torch.arange(num_images))
    torch.testing.assert_close(together, by_bank, atol=1e-6, rtol=0)


def test_reference_scores_are_the_oracles():
    image, bank = lnamd(maps(1, seed=1), 1), lnamd(maps(9), 1)
    distances = np.sort(
        [
            [min(np.linalg.norm(p - q) for q in reference) for p in image[0].double().numpy()]
            for reference in bank.double().numpy()
        ],
        axis=0,
    )
    expected = distances[: int(9 * 0.3)].mean(axis=0)
    np.testing.assert_allclose(reference_scores(image, bank)[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1, 4, 8), torch.zeros(0, 4, 8)), "references must hold at least 1 image"),
        ((torch.zeros(1, 4, 8), torch.zeros(2, 4, 7)), r"references must have shape .* got \(2, 4, 7\)"),
        ((torch.zeros(4, 8), torch.zeros(2, 4, 8)), r"features must have shape .* got \(4, 8\)"),
        ((torch.zeros(1, 4, 8), torch.zeros(2, 4, 8), (0.9, 0.1)), "interval must begin below its end"),
        ((torch.full((1, 4, 8), torch.nan), torch.zeros(2, 4, 8)), "must be finite.* 4 scores"),
        ((torch.zeros(1, 4, 8), torch.full((2, 4, 8), torch.nan)), "must be finite.* 4 scores"),
    ],
)
def test_reference_scores_of_what_makes_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        reference_scores(*arguments)


def test_one_reference_is_not_compared_with_its_own_copy():
    with pytest.raises(ValueError, match="at least 2 images, as each image's own copy is left out, got 1"):
        reference_scores(torch.zeros(1, 4, 8), torch.zeros(1, 4, 8), own_copies=torch.tensor([0]))


@pytest.mark.parametrize(
    ("references", "tokens", "windows", "message"),
    [
        (torch.ones(2), torch.ones(2, 3), (), "windows must be a non-empty sequence"),
        (torch.ones(0), torch.ones(0, 3), (1,), r"reference_scores must have shape \(M,\) with M >= 1"),
        (torch.ones(2), torch.ones(2, 4), (1,), "reference_scores and reference_tokens must have shapes"),
    ],
)
def test_rscin_by_references_of_what_makes_no_sense(references, tokens, windows, message):
    with pytest.raises(ValueError, match=message):
        rscin_by_references(torch.ones(1), torch.ones(1, 3), references, tokens, windows)


def test_an_image_that_is_in_the_bank_scores_zero():
    bank = lnamd(maps(5), 1)
    assert reference_scores(bank[[2]], bank, (0, 1)).max() == 0


def test_chunks_change_nothing(monkeypatch):
    image, bank = lnamd(maps(2, seed=1), 1), lnamd(maps(9), 1)
    whole = reference_scores(image, bank)
    monkeypatch.setattr("anomalib_musc.functional.reference_scoring._BLOCK", 2 * 30 * 30)
    torch.testing.assert_close(reference_scores(image, bank), whole)


def test_rscin_by_references_is_rscins_mean():
    generator = torch.Generator().manual_seed(0)
    scores, tokens = torch.rand(3, generator=generator), torch.rand(3, 4, generator=generator)
    bank_scores, bank_tokens = torch.rand(6, generator=generator), torch.rand(6, 4, generator=generator)
    ours = rscin_by_references(scores, tokens, bank_scores, bank_tokens, (1, 3))
    low, high = bank_scores.min(), bank_scores.max()
    for index in range(3):
        values = (torch.cat([scores[[index]], bank_scores]) - low) / (high - low)
        weights = torch.cat([tokens[[index]], bank_tokens]) @ tokens[index]
        means = []
        for window in (1, 3):
            top = weights.topk(window).indices
            means.append((weights[top] * values[top]).sum() / weights[top].sum())
        assert ours[index] == pytest.approx(float(sum(means) / 2), abs=1e-6)


@pytest.mark.parametrize("bank_scores", [[0.0], [0.4], [1e-4, 2e-4]])
def test_rscin_without_a_scale_leaves_scores(bank_scores):
    scores = torch.tensor([0.3, 0.7])
    bank = torch.tensor(bank_scores)
    assert torch.equal(rscin_by_references(scores, torch.eye(2), bank, torch.ones(len(bank), 2)), scores)


def test_references_that_score_alike_do_not_blow_scores_up():
    scores, bank = torch.tensor([0.4, 0.5]), torch.tensor([0.4, 0.4])
    ours = rscin_by_references(scores, torch.eye(2), bank, torch.zeros(2, 2), (1,))
    torch.testing.assert_close(ours, torch.tensor([0.0, 0.1 / 0.04]))


def test_the_bank_is_normal_and_diverse():
    scores = torch.tensor([0.1, 0.2, 0.2, 0.3, 0.9, 0.8, 0.7, 0.9])
    tokens = torch.tensor([[0.0], [0.1], [5.0], [9.0], [50.0], [60.0], [70.0], [80.0]])
    assert select_coreset(scores, tokens, 2) == [0, 3]
    assert select_coreset(scores, tokens, 3) == [0, 2, 3]
    assert len(select_coreset(scores, tokens, 6)) == 6


# --- without Engine ------------------------------------------------------------------------------------------------


def test_plain_torch():
    model, images = MuScModel(OwnBackbone()), torch.rand(6, 3, 64, 64)
    model.build_bank([images[:4], images[4:]])
    assert len(model.bank) == 6
    alone = model(images[[0]] + 0.1)
    among = model(images + 0.1)
    torch.testing.assert_close(alone.anomaly_map, among.anomaly_map[[0]])
    model.build_bank([images], size=3)
    assert len(model.bank) == 3
    other = MuScModel(OwnBackbone())
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.bank.own_patch_scores(), model.bank.own_patch_scores(), atol=1e-4, rtol=0)
    torch.testing.assert_close(other(images).anomaly_map, model(images).anomaly_map)


@pytest.mark.parametrize(
    ("batches", "size", "message"),
    [
        ([], None, "at least one image"),
        ([torch.rand(0, 3, 64, 64)], None, "at least one image"),
        *(([torch.rand(5, 3, 64, 64)], size, "size must be a whole number") for size in (0, -3, True, 2.5, "3")),
    ],
)
def test_bad_banks(batches, size, message):
    with pytest.raises(ValueError, match=message):
        MuScModel(OwnBackbone()).build_bank(batches, size)


def test_an_interval_that_ends_before_it_begins_for_this_bank():
    with pytest.raises(ValueError, match="interval must begin below its end"):
        MuScModel(OwnBackbone(), interval=(5, 0.9)).build_bank([torch.rand(4, 3, 64, 64)])


def test_a_state_without_a_bank_empties_the_bank():
    model = MuScModel(OwnBackbone())
    model.build_bank([torch.rand(3, 3, 64, 64)])
    model.load_state_dict(MuScModel(OwnBackbone()).state_dict())
    assert len(model.bank) == 0
    assert model(torch.rand(2, 3, 64, 64)).pred_score.shape == (2,)


def test_a_batch_takes_no_more_memory_than_an_image(monkeypatch):
    rows = []
    multiply = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: rows.append(len(a) * b.shape[1]) or multiply(a, b))
    monkeypatch.setattr("anomalib_musc.functional.reference_scoring._BLOCK", 4 * 30 * 30)
    bank = lnamd(maps(2), 1)
    for num_images in (1, 16):
        reference_scores(lnamd(maps(num_images, seed=1), 1), bank)
    assert max(rows) <= 4 * 30 * 30


# --- with Engine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "learning_type", "size"),
    [
        ({"mode": "reference"}, LearningType.FEW_SHOT, 4),
        ({"mode": "reference", "k_shot": 2}, LearningType.FEW_SHOT, 2),
        ({"mode": "both", "k_shot": 3}, LearningType.FEW_SHOT, 3),
        ({"mode": "reference", "references": "widget/train"}, LearningType.ZERO_SHOT, 4),
        ({"mode": "reference", "references": "widget/test", "bank_size": 5}, LearningType.ZERO_SHOT, 5),
        ({"mode": "mutual"}, LearningType.ZERO_SHOT, 0),
    ],
)
def test_modes_find_the_defects(arguments, learning_type, size, mvtec_root, own_backbone, make_engine):
    if "references" in arguments:
        arguments = {**arguments, "references": mvtec_root / arguments["references"]}
    model = MuSc(own_backbone, **arguments)
    (metrics,) = make_engine().test(model, datamodule=datamodule(mvtec_root))
    assert model.learning_type == learning_type
    assert len(model.model.bank) == size
    assert metrics["image_AUROC"] == 1
    assert metrics["pixel_AUROC"] > 0.95


def test_reference_is_mutual_with_the_pool_as_bank(folder, make_engine):
    mutual = MuSc(OwnBackbone())
    make_engine().predict(mutual, data_path=folder)
    (pool,) = mutual.pools
    reference = MuSc(OwnBackbone(), mode="reference", references=folder)
    loader = predict_loader(folder)
    make_engine().predict(reference, dataloaders=loader)
    bank = reference.model.bank
    scores = bank.patch_scores(bank.feature_maps, own_copies=torch.arange(len(bank)))
    torch.testing.assert_close(scores, pool.patch_scores, atol=1e-4, rtol=0)


def test_no_image_has_an_influence_on_another(mvtec_root, folder, make_engine):
    model, engine = MuSc(OwnBackbone(), mode="reference"), make_engine()
    engine.fit(model, datamodule=datamodule(mvtec_root))
    together = by_path(engine.predict(model, data_path=folder))
    for path in sorted(together)[::5]:
        alone = by_path(engine.predict(model, data_path=path))
        assert_same(alone, {path: together[path]}, tolerance=1e-6)
    batched = by_path(engine.predict(model, dataloaders=predict_loader(folder, batch_size=5)))
    assert_same(batched, together, tolerance=1e-6)


def test_without_labels_the_bank_decides(tmp_path, mvtec_root, make_engine):
    write_products(tmp_path / "references", range(60, 76))
    model = MuSc(OwnBackbone(), mode="reference", references=tmp_path / "references")
    batches = make_engine().predict(model, data_path=mvtec_root / "widget/test")
    labels = {batch.image_path[0]: bool(batch.pred_label) for batch in batches}
    assert all(label for path, label in labels.items() if "scratch" in path)
    assert sum(label for path, label in labels.items() if "good" in path) <= 2


def test_both_compares_with_the_union_of_bank_and_pool(mvtec_root, folder, make_engine):
    model = MuSc(OwnBackbone(), mode="both", references=mvtec_root / "widget/train")
    make_engine().predict(model, data_path=folder)
    (pool,) = model.pools
    names = [*pool.names, *sorted(map(str, (mvtec_root / "widget/train").rglob("*.png")))]
    images = torch.cat([model.pre_processor.transform(read_image(name, as_tensor=True)[None]) for name in names])
    layers, _ = model.model.extract(images)
    expected = MuScModel(OwnBackbone()).score(layers)[: len(pool.names)]
    torch.testing.assert_close(pool.patch_scores, expected, atol=1e-4, rtol=0)


def test_a_bank_of_the_pool_that_was_scored(folder, own_backbone, make_engine):
    model, engine = MuSc(own_backbone), make_engine()
    with pytest.raises(RuntimeError, match=r"No pool .* was scored"):
        model.keep_bank()
    engine.predict(model, data_path=folder)
    of_pool = model.post_processor.pixel_threshold.clone()
    model.keep_bank(5)
    assert len(model.model.bank) == 5
    assert (model.mode, model.hparams["mode"], model.learning_type) == (
        "reference",
        "reference",
        LearningType.ZERO_SHOT,
    )
    assert model.post_processor.pixel_threshold == model.model.bank.raw_scores.max() != of_pool
    batches = engine.predict(model, data_path=folder)
    scores = {batch.image_path[0]: batch.pred_score.item() for batch in batches}
    worst_good = max(score for path, score in scores.items() if "good" in path)
    assert all(score > worst_good for path, score in scores.items() if "scratch" in path)


@pytest.mark.parametrize("size", [0, -3, True, 2.5, None, "4"])
def test_a_bank_of_an_impossible_size_is_not_kept(size, own_backbone):
    model = MuSc(own_backbone)
    with pytest.raises(ValueError, match="size must be a whole number of at least 1"):
        model.keep_bank(size)
    assert model.mode == "mutual"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "other"}, "mode must be"),
        ({"mode": ["reference"]}, "mode must be"),
        ({"mode": "reference", "k_shot": 0}, "k_shot must be"),
        ({"mode": "reference", "k_shot": True}, "k_shot must be"),
        ({"mode": "reference", "bank_size": -1}, "bank_size must be"),
        ({"mode": "reference", "references": 3}, "references must be"),
        ({"mode": "reference", "references": ""}, "references must be"),
        ({"mode": "reference", "references": "x", "k_shot": 3}, "use bank_size"),
        ({"references": "x"}, "mode='mutual' has no bank"),
        ({"k_shot": 2}, "mode='mutual' has no bank"),
        ({"bank_size": 2}, "mode='mutual' has no bank"),
    ],
)
def test_bad_arguments(arguments, message, own_backbone):
    with pytest.raises(ValueError, match=message):
        MuSc(own_backbone, **arguments)


def test_no_references_is_an_error(folder, own_backbone, make_engine):
    with pytest.raises(ValueError, match=r"needs a bank of reference images: give references=FOLDER"):
        make_engine().predict(MuSc(own_backbone, mode="reference"), data_path=folder)
    assert own_backbone.num_images == 0


def test_a_folder_of_references_that_is_not_there(tmp_path, folder, own_backbone, make_engine):
    model = MuSc(own_backbone, mode="reference", references=tmp_path / "gone")
    with pytest.raises(ValueError, match=r"references='.*gone' does not exist"):
        make_engine().predict(model, data_path=folder)


def test_more_shots_than_training_images(mvtec_root, own_backbone, make_engine):
    model = MuSc(own_backbone, mode="reference", k_shot=9)
    with pytest.warns(UserWarning, match="k_shot=9, but there are 4 training images"):
        make_engine().fit(model, datamodule=datamodule(mvtec_root))
    assert len(model.model.bank) == 4


# --- which images the bank is made of ------------------------------------------------------------------------------


def test_fit_again_on_other_images(tmp_path, mvtec_root, make_engine):
    model = MuSc(OwnBackbone(), mode="reference")
    make_engine().fit(model, datamodule=datamodule(mvtec_root))
    first, reads = model.model.bank.layer_0.clone(), model.model.backbone.num_images
    make_engine().test(model, datamodule=datamodule(mvtec_root))
    assert model.model.backbone.num_images == reads  # neither the bank nor the same pool again
    write_products(tmp_path / "train", range(70, 75))
    other = Folder(name="other", root=tmp_path, normal_dir="train", val_split_mode="none", num_workers=0)
    with pytest.warns(UserWarning, match="The bank is made anew"):
        make_engine().fit(model, datamodule=other)
    assert not torch.equal(model.model.bank.layer_0, first)
    model.bank_arguments = replace(model.bank_arguments, k_shot=2)
    make_engine().fit(model, datamodule=other)
    assert len(model.model.bank) == 2


@pytest.mark.parametrize("change", ["a file more", "a file replaced", "another folder", "another size"])
def test_a_bank_of_other_references_is_made_anew(change, tmp_path, folder, make_engine):
    write_products(tmp_path / "references", range(60, 64))
    write_products(tmp_path / "others", range(70, 74))
    model = MuSc(OwnBackbone(), mode="reference", references=tmp_path / "references", bank_size=4)
    make_engine().predict(model, data_path=folder)
    first = model.model.bank.layer_0.clone()
    if change == "another folder":
        model.bank_arguments = replace(model.bank_arguments, references=tmp_path / "others")
    elif change == "another size":
        model.bank_arguments = replace(model.bank_arguments, bank_size=3)
    else:
        name = "004.png" if change == "a file more" else "000.png"
        shutil.copy(tmp_path / "others/003.png", tmp_path / "references" / name)
    with pytest.warns(UserWarning, match="The bank is made anew"):
        again = by_path(make_engine().predict(model, data_path=folder))
    assert not torch.equal(model.model.bank.layer_0, first)
    fresh = MuSc(OwnBackbone(), mode="reference", **model.bank_arguments.given)
    assert_same(again, by_path(make_engine().predict(fresh, data_path=folder)))


def test_an_emptied_bank_is_made_again(tmp_path, folder, make_engine):
    write_products(tmp_path / "references", range(60, 64))
    model = MuSc(OwnBackbone(), mode="reference", references=tmp_path / "references")
    model.model.build_bank([torch.rand(3, 3, 64, 64)])
    make_engine().predict(model, data_path=folder)
    assert len(model.model.bank) == 3
    model.model.bank.clear()
    make_engine().predict(model, data_path=folder)
    assert len(model.model.bank) == 4


def test_a_bank_by_hand_is_not_replaced(mvtec_root, folder, make_engine):
    model = MuSc(OwnBackbone(), mode="reference")
    model.model.build_bank([torch.rand(3, 3, 64, 64)])
    make_engine().fit(model, datamodule=datamodule(mvtec_root))
    assert len(model.model.bank) == 3
    kept, engine = MuSc(OwnBackbone()), make_engine()
    engine.predict(kept, data_path=folder)
    kept.keep_bank(5)
    engine.fit(kept, datamodule=datamodule(mvtec_root))
    assert len(kept.model.bank) == 5


def test_the_bank_is_read_without_augmentations(mvtec_root, make_engine):
    banks = []
    for augmentations in (None, RandomRotation((90, 90))):
        model = MuSc(OwnBackbone(), mode="reference")
        make_engine().fit(model, datamodule=datamodule(mvtec_root, train_augmentations=augmentations))
        banks.append(model.model.bank.layer_0)
    torch.testing.assert_close(*banks)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_bank_stays_in_float32(precision, mvtec_root, folder, make_engine):
    model, engine = MuSc(**TINY, mode="reference", k_shot=3), make_engine(precision=precision)
    engine.fit(model, datamodule=datamodule(mvtec_root))
    predictions = by_path(engine.predict(model, data_path=folder))
    assert {buffer.dtype for buffer in model.model.bank.buffers()} == {torch.float32}
    plain, engine = MuSc(**TINY, mode="reference", k_shot=3), make_engine()
    engine.fit(plain, datamodule=datamodule(mvtec_root))
    expected = by_path(engine.predict(plain, data_path=folder))
    scores, theirs = ([score for score, _ in sorted_by_path(found)] for found in (predictions, expected))
    np.testing.assert_allclose(scores, theirs, atol=0.05)


def sorted_by_path(predictions):
    return [predictions[path] for path in sorted(predictions)]


def test_one_good_file_beside_a_broken_one(tmp_path, mvtec_root, own_backbone, make_engine):
    (path,) = write_products(tmp_path / "images", range(1))
    (tmp_path / "images/broken.png").write_bytes(b"no image")
    model = MuSc(own_backbone, mode="reference", references=mvtec_root / "widget/train")
    (batch,) = make_engine().predict(model, data_path=tmp_path / "images")
    assert batch.image_path == [str(path)]
    assert [path.name for path in model.skipped_images] == ["broken.png"]


# --- thresholds without labels -------------------------------------------------------------------------------------


def test_fit_without_anything_but_references(mvtec_root, own_backbone, make_engine):
    model = MuSc(own_backbone, mode="reference", references=mvtec_root / "widget/train")
    make_engine().fit(model)
    assert len(model.model.bank) == 4
    assert_calibrated(model)


@pytest.mark.parametrize(
    "split", [{"val_split_mode": "none"}, {"normal_test_dir": "test/good"}, {"val_split_mode": "none", "mode": "both"}]
)
def test_fit_without_defects_in_validation(split, mvtec_root, own_backbone, make_engine):
    split = dict(split)
    model = MuSc(own_backbone, mode=split.pop("mode", "reference"))
    data = Folder(name="widget", root=mvtec_root / "widget", normal_dir="train/good", num_workers=0, **split)
    make_engine().fit(model, datamodule=data)
    assert len(model.model.bank) > 0
    if model.mode == "reference":
        assert_calibrated(model)


def assert_calibrated(model: MuSc) -> None:
    state = model.post_processor.state_dict()
    names = [f"{level}_{end}" for level in ("image", "pixel") for end in ("min", "max")]
    assert all(torch.isfinite(state[name]) for name in [*names, "_image_threshold", "_pixel_threshold"])


def test_thresholds_follow_the_bank(mvtec_root, folder, own_backbone, make_engine):
    model, engine = MuSc(own_backbone, mode="reference", references=mvtec_root / "widget/train"), make_engine()
    engine.predict(model, data_path=folder)
    model.model.build_bank([torch.rand(4, 3, 64, 64)])
    engine.predict(model, data_path=folder)
    scores = model.model.bank.raw_scores
    assert scores.min() < model.post_processor.pixel_threshold <= scores.max()


@pytest.mark.parametrize("copies", [1, 3])
def test_a_bank_without_a_scale(copies, tmp_path, folder, make_engine):
    for number in range(copies):
        write_products(tmp_path / f"references/{number}", range(60, 61))
    model = MuSc(OwnBackbone(), mode="reference", references=tmp_path / "references")
    with pytest.warns(UserWarning, match="A bank of one image, or of equal ones, has no scale"):
        predictions = by_path(make_engine().predict(model, data_path=folder))
    scores = {path: score for path, (score, _) in predictions.items()}
    assert len(set(scores.values())) == len(scores)
    assert all(0 < score < 0.5 for score in scores.values())
    assert min(s for p, s in scores.items() if "scratch" in p) > max(s for p, s in scores.items() if "good" in p)


def test_unlabelled_references_may_hold_defects(tmp_path, mvtec_root, make_engine):
    write_products(tmp_path / "references/good", range(60, 76))
    write_products(tmp_path / "references/bad", range(80, 84), masks=tmp_path / "masks")
    model = MuSc(OwnBackbone(), mode="reference", references=tmp_path / "references")
    batches = make_engine().predict(model, data_path=mvtec_root / "widget/test")
    labels = {batch.image_path[0]: bool(batch.pred_label) for batch in batches}
    assert all(label for path, label in labels.items() if "scratch" in path)
    assert sum(label for path, label in labels.items() if "good" in path) <= 2


# --- anomalib's own matrix of models -------------------------------------------------------------------------------


class TestMatrix:
    """What anomalib asks of each of its models: every entry point, and every one from a checkpoint."""

    @pytest.fixture(scope="class")
    def checkpoint(self, mvtec_root, tmp_path_factory):
        """The checkpoint that Engine.fit leaves."""
        engine = Engine(default_root_dir=tmp_path_factory.mktemp("matrix"), enable_progress_bar=False)
        engine.fit(MuSc(**TINY, mode="reference", k_shot=3), datamodule=datamodule(mvtec_root))
        assert Path(engine.best_model_path).is_file()
        return engine.best_model_path

    @pytest.mark.parametrize("from_checkpoint", [False, True])
    @pytest.mark.parametrize("entry", ["fit", "validate", "test", "train", "predict"])
    def test_entries(self, entry, from_checkpoint, checkpoint, mvtec_root, make_engine):
        if entry == "fit" and from_checkpoint:
            pytest.skip("Engine.fit of a few-shot model has no use for a checkpoint")
        model = MuSc(**TINY, mode="reference", k_shot=2)
        arguments = {"ckpt_path": checkpoint} if from_checkpoint else {}
        outputs = getattr(make_engine(), entry)(model, datamodule=datamodule(mvtec_root), **arguments)
        assert entry == "fit" or outputs is not None
        assert len(model.model.bank) == (3 if from_checkpoint else 2)
        assert not torch.isnan(model.post_processor.image_threshold)

    def test_exports(self, checkpoint, tmp_path, make_engine):
        path = make_engine().export(MuSc(**TINY), ExportType.TORCH, export_root=tmp_path, ckpt_path=checkpoint)
        assert Path(path).is_file()


def test_masks_of_a_dataset_are_no_references(mvtec_root, folder, make_engine):
    model = MuSc(OwnBackbone(), mode="reference", references=mvtec_root / "widget", visualizer=False)
    make_engine().predict(model, data_path=folder)
    assert len(model.model.bank) == 16
