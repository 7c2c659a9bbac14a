# SPDX-License-Identifier: Apache-2.0
"""A bank of references: one image at a time, in Engine, checkpoints and exports."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib import LearningType
from anomalib.data.utils import read_image
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from conftest import OwnBackbone, write_products
from test_cli import SMALL, anomalib, metric
from test_engine import assert_same, by_path, datamodule, predict_loader

from anomalib_musc import MuSc, MuScModel
from anomalib_musc.functional import lnamd, mutual_scores, reference_scores, rscin_by_references
from anomalib_musc.torch_model import most_normal

TINY = {"backbone": "test_vit", "pretrained": False, "image_size": 64}


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


@pytest.mark.parametrize("bank_scores", [[0.0], [0.4, 0.4]])
def test_rscin_without_a_scale_leaves_scores(bank_scores):
    scores = torch.tensor([0.3, 0.7])
    bank = torch.tensor(bank_scores)
    assert torch.equal(rscin_by_references(scores, torch.eye(2), bank, torch.ones(len(bank), 2)), scores)


def test_the_bank_is_normal_and_diverse():
    scores = torch.tensor([0.1, 0.2, 0.2, 0.3, 0.9, 0.8, 0.7, 0.9])
    tokens = torch.tensor([[0.0], [0.1], [5.0], [9.0], [50.0], [60.0], [70.0], [80.0]])
    assert most_normal(scores, tokens, 2) == [0, 3]
    assert most_normal(scores, tokens, 3) == [0, 2, 3]
    assert len(most_normal(scores, tokens, 6)) == 6


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
    torch.testing.assert_close(other(images).anomaly_map, model(images).anomaly_map)


@pytest.mark.parametrize(("batches", "size", "message"), [([], None, "at least one image"), ([0], 0, "size must be")])
def test_bad_banks(batches, size, message):
    with pytest.raises(ValueError, match=message):
        MuScModel(OwnBackbone()).build_bank(batches, size)


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
    (pool,) = mutual._pools
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


def test_judges_of_both_kinds_are_the_pools_union(mvtec_root, folder, make_engine):
    model = MuSc(OwnBackbone(), mode="both", references=mvtec_root / "widget/train")
    make_engine().predict(model, data_path=folder)
    (pool,) = model._pools
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
    model.keep_bank(5)
    assert len(model.model.bank) == 5
    batches = engine.predict(model, data_path=folder)
    scores = {batch.image_path[0]: batch.pred_score.item() for batch in batches}
    worst_good = max(score for path, score in scores.items() if "good" in path)
    assert all(score > worst_good for path, score in scores.items() if "scratch" in path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "other"}, "mode must be"),
        ({"k_shot": 0}, "k_shot must be"),
        ({"bank_size": -1}, "bank_size must be"),
        ({"mode": "reference", "references": "x", "k_shot": 3}, "use bank_size"),
    ],
)
def test_bad_arguments(arguments, message, own_backbone):
    with pytest.raises(ValueError, match=message):
        MuSc(own_backbone, **arguments)


def test_no_references_is_an_error(folder, own_backbone, make_engine):
    with pytest.raises(ValueError, match=r"needs a bank of reference images: give references=FOLDER"):
        make_engine().predict(MuSc(own_backbone, mode="reference"), data_path=folder)
    assert own_backbone.num_images == 0


# --- checkpoints ---------------------------------------------------------------------------------------------------

LOAD = """
import sys, torch
from anomalib.engine import Engine
from anomalib_musc import MuSc
model = MuSc.load_from_checkpoint(sys.argv[1])
batches = Engine(default_root_dir=sys.argv[3], enable_progress_bar=False).predict(model, data_path=sys.argv[2])
torch.save([(b.image_path[0], b.pred_score.item(), bool(b.pred_label), b.anomaly_map) for b in batches], sys.argv[4])
"""


def test_a_checkpoint_in_a_new_process(tmp_path, mvtec_root, folder, make_engine):
    model, engine = MuSc(**TINY, mode="reference", k_shot=3), make_engine()
    engine.fit(model, datamodule=datamodule(mvtec_root))
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    here = engine.predict(model, data_path=folder)
    arguments = [tmp_path / "model.ckpt", folder, tmp_path / "there", tmp_path / "there.pt"]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for batch, (path, score, label, anomaly_map) in zip(
        here, torch.load(tmp_path / "there.pt", weights_only=False), strict=True
    ):
        assert (batch.image_path[0], bool(batch.pred_label)) == (path, label)
        assert batch.pred_score.item() == pytest.approx(score, abs=1e-6)
        torch.testing.assert_close(torch.Tensor(batch.anomaly_map), torch.Tensor(anomaly_map), atol=1e-6, rtol=0)


@pytest.mark.parametrize("other", [{"image_size": 32}, {"backbone": "vit_tiny_patch16_224"}, {"layers": (0, 1)}])
def test_a_checkpoint_of_another_network_is_refused(other, tmp_path, mvtec_root, make_engine):
    model, engine = MuSc(**TINY, mode="reference", k_shot=2), make_engine()
    engine.fit(model, datamodule=datamodule(mvtec_root))
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=f"The checkpoint is of another model: .*{next(iter(other))}"):
        MuSc.load_from_checkpoint(tmp_path / "model.ckpt", **other)


# --- anomalib's own matrix of models -------------------------------------------------------------------------------


class TestMatrix:
    """What anomalib asks of each of its models: every entry point, and every one from a checkpoint."""

    @pytest.fixture(scope="class")
    def checkpoint(self, mvtec_root, tmp_path_factory):
        """The checkpoint that Engine.fit leaves."""
        engine = Engine(default_root_dir=tmp_path_factory.mktemp("matrix"), enable_progress_bar=False)
        engine.fit(MuSc(**TINY, mode="reference", k_shot=2), datamodule=datamodule(mvtec_root))
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
        assert len(model.model.bank) == 2
        assert not torch.isnan(model.post_processor.image_threshold)

    @pytest.mark.parametrize("export_type", list(ExportType))
    def test_exports(self, export_type, checkpoint, tmp_path, make_engine):
        if export_type != ExportType.TORCH:
            pytest.importorskip("openvino", reason="openvino is not installed")
        path = make_engine().export(MuSc(**TINY), export_type, export_root=tmp_path, ckpt_path=checkpoint)
        assert Path(path).is_file()


# --- the command line ----------------------------------------------------------------------------------------------


def test_train_predict_export_from_the_command_line(tmp_path, mvtec_root, folder):
    data = ["--data", "MVTec", "--data.root", mvtec_root, "--data.category", "widget"]
    model = ["--model", "MuSc", *SMALL, "--model.mode", "reference", "--model.k_shot", "2"]
    done = anomalib("train", *model, *data, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert metric(done.stdout, "image_AUROC") > 0.5
    references = ["--model.references", mvtec_root / "widget/train"]
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    done = anomalib("test", *model, *data, "--ckpt_path", checkpoint, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = anomalib("export", *model, "--export_type", "torch", "--ckpt_path", checkpoint, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("model.pt"))
    done = anomalib("predict", *model[:-2], *references, "--data", folder / "scratch/000.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (table,) = tmp_path.rglob("predictions.csv")
    assert len(table.read_text().splitlines()) == 2
