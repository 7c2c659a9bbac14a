# SPDX-License-Identifier: Apache-2.0
"""``musc-tiny``: the network of the package, the products it learned from, and how it learned."""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data.utils import read_image
from anomalib.deploy import ExportType, TorchInferencer
from anomalib.engine import Engine
from conftest import SHARED
from objective import image_loss, outranked, patch_loss, pool_loss, scores_of_each_other
from pools import UNSEEN, Look, draw_material, draw_pool
from safetensors.torch import load_file, save_file
from test_engine import datamodule
from textures import SIMPLE, mixed
from torch.nn import functional as F  # noqa: N812
from train import read_arguments
from training import Training
from validation import Labelled, dataset_products, judge, models

from anomalib_musc import MuSc
from anomalib_musc.backbones import WeightsMismatchError, create_backbone
from anomalib_musc.backbones.tiny import WEIGHTS
from anomalib_musc.functional import mutual_scores

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "examples/musc_tiny"


@pytest.fixture(scope="module")
def materials() -> np.ndarray:
    """Twelve materials of eight pieces."""
    return np.stack([draw_material(7, index, 8) for index in range(12)])


class TestNetwork:
    def test_weights_are_small_and_half_precision(self):
        assert WEIGHTS.stat().st_size <= 8 * 2**20
        assert {tensor.dtype for tensor in load_file(WEIGHTS).values()} == {torch.float16}

    def test_weights_are_in_the_wheel(self, tmp_path):
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        (wheel,) = tmp_path.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            assert archive.read("anomalib_musc/backbones/musc_tiny.safetensors") == WEIGHTS.read_bytes()

    @pytest.mark.parametrize("size", [(16, 16), (32, 48), (224, 224), (448, 320)])
    def test_any_size_that_the_patch_divides(self, size):
        backbone = create_backbone("musc-tiny", image_size=size)
        maps, image_feature = backbone(torch.rand(2, 3, *size))
        assert [tuple(depth.shape) for depth in maps] == [(2, 160, size[0] // 16, size[1] // 16)] * 4
        assert image_feature.shape == (2, 160)
        assert all(values.isfinite().all() for values in (*maps, image_feature))

    def test_another_size_is_refused(self):
        with pytest.raises(ValueError, match=r"image_size must be divisible by .* \(16, 16\), got 100; .*\[96, 112\]"):
            create_backbone("musc-tiny", image_size=100)

    def test_an_image_alone_is_as_in_a_batch(self):
        backbone, images = create_backbone("musc-tiny", image_size=96), torch.rand(5, 3, 96, 96)
        (maps, image_feature), (alone, alone_feature) = backbone(images), backbone(images[3:4])
        for together, single in zip([*maps, image_feature], [*alone, alone_feature], strict=True):
            torch.testing.assert_close(together[3:4], single, atol=2e-5, rtol=1e-4)

    def test_depths_in_any_order(self):
        images = torch.rand(1, 3, 64, 64)
        every = create_backbone("musc-tiny", layers=range(6), image_size=64)(images)[0]
        chosen = create_backbone("musc-tiny", layers=[4, 0], image_size=64)(images)[0]
        assert torch.equal(chosen[0], every[4])
        assert torch.equal(chosen[1], every[0])
        with pytest.raises(ValueError, match="layers must be distinct integers from 0 to 5"):
            create_backbone("musc-tiny", layers=[6])

    def test_random_weights_are_the_same_each_time_and_others(self):
        images = torch.rand(1, 3, 64, 64)
        first, again = (create_backbone("musc-tiny", pretrained=False, image_size=64)(images)[1] for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.allclose(first, create_backbone("musc-tiny", image_size=64)(images)[1], atol=0.1)

    def test_weights_from_a_file(self, tmp_path):
        other = create_backbone("musc-tiny", pretrained=False, image_size=64)
        save_file(other.network.state_dict(), tmp_path / "own.safetensors")
        loaded = create_backbone("musc-tiny", pretrained=tmp_path / "own.safetensors", image_size=64)
        images = torch.rand(1, 3, 64, 64)
        assert torch.equal(loaded(images)[1], other(images)[1])

    def test_an_unknown_tag_and_a_file_that_does_not_fit_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"'imagenet' is no known weights tag of 'musc-tiny'"):
            create_backbone("musc-tiny", pretrained="imagenet")
        save_file({"stem.0.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
        with pytest.raises(WeightsMismatchError, match="does not fit the backbone 'musc-tiny'"):
            create_backbone("musc-tiny", pretrained=tmp_path / "other.safetensors")

    def test_a_misspelt_name_finds_it(self):
        with pytest.raises(ValueError, match=r"close matches: .*'musc-tiny'"):
            create_backbone("musc_tiny")

    def test_exports_and_checkpoint_give_what_lightning_gives(self, mvtec_root, tmp_path, monkeypatch):
        engine = Engine(default_root_dir=tmp_path, enable_progress_bar=False)
        engine.fit(
            MuSc("musc-tiny", image_size=64, mode="reference", k_shot=3, visualizer=False),
            datamodule=datamodule(mvtec_root),
        )
        model = MuSc.load_from_checkpoint(engine.best_model_path)
        image = mvtec_root / "widget/test/scratch/001.png"
        (expected,) = engine.predict(model, data_path=image)
        monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
        path = engine.export(model, ExportType.TORCH, export_root=tmp_path)
        exported = TorchInferencer(path, device="cpu").predict(image)
        assert exported.pred_score.item() == pytest.approx(expected.pred_score.item(), abs=1e-5)
        torch.testing.assert_close(exported.anomaly_map.squeeze(), expected.anomaly_map.squeeze(), atol=1e-5, rtol=0)
        onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        path = engine.export(model, ExportType.ONNX, export_root=tmp_path, input_size=(64, 64))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (score,) = session.run(["pred_score"], {"input": read_image(image, as_tensor=True)[None].numpy()})
        assert score.item() == pytest.approx(expected.pred_score.item(), abs=1e-4)


class TestDrawing:
    @pytest.mark.parametrize("kind", [*SIMPLE, mixed])
    def test_pieces_of_a_material_are_alike_but_not_the_same(self, kind):
        material = kind(np.random.default_rng(3))
        first, again, other = (material(np.random.default_rng(seed), 96) for seed in (0, 0, 1))
        assert first.shape == (96, 96, 3)
        assert first.min() >= -1e-3
        assert first.max() <= 1 + 1e-3
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)
        assert np.abs(first.mean(axis=(0, 1)) - other.mean(axis=(0, 1))).max() < 0.25

    def test_a_pool_is_decided_by_its_seed(self, materials):
        pools = [draw_pool(np.random.default_rng(seed), materials, 64, 4, 2) for seed in (5, 5, 6)]
        assert all(np.array_equal(one, other) for one, other in zip(pools[0], pools[1], strict=True))
        assert not np.array_equal(pools[0].images, pools[2].images)

    def test_masks_are_where_the_pictures_changed(self, materials):
        inside, outside, areas = [], [], []
        for seed in range(600):
            look = Look(np.random.default_rng(seed))
            if look.flicker or look.slope or look.noise > 0.02:
                continue  # else the two exposures differ everywhere
            sound, damaged = (draw_pool(np.random.default_rng(seed), materials, 96, 1, count) for count in (0, 1))
            assert set(np.unique(damaged.masks)) <= {0, 1}
            change = np.abs(damaged.images[0].astype(float) - sound.images[0]).max(axis=2)
            if damaged.masks.any():
                inside.append(change[damaged.masks[0] > 0].mean())
                outside.append(change[damaged.masks[0] == 0].mean())
            areas.append(damaged.masks.mean())
        assert len(inside) >= 4
        assert len(inside) > 0.7 * len(areas)
        assert (np.array(inside) > 2 * np.array(outside)).all()
        assert 0.002 < np.median(areas) < 0.2

    def test_pools_of_sound_images_have_no_masks(self, materials):
        assert not draw_pool(np.random.default_rng(0), materials, 64, 5, 0).masks.any()


class TestObjective:
    def test_outranked_prefers_what_lies_above(self):
        above, allowed = torch.tensor([1.0, 0.9]), torch.tensor([[True, True, False]] * 2)
        well, badly = torch.tensor([[0.1, 0.2, 5.0]] * 2), torch.tensor([[1.1, 1.2, 5.0]] * 2)
        assert outranked(above, well, allowed) < 0.01 < 1 < outranked(above, badly, allowed)
        assert outranked(above, well, torch.zeros_like(allowed)) == 0

    def test_scores_are_those_of_mutual_scoring(self):
        patches = F.normalize(torch.randn(8, 9, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
        torch.testing.assert_close(scores_of_each_other(patches[None])[0], mutual_scores(patches), atol=1e-5, rtol=0)

    def test_patch_loss_is_low_where_defects_are_unlike_and_products_apart(self):
        generator = torch.Generator().manual_seed(0)
        products = F.normalize(torch.randn(2, 1, 1, 64, generator=generator), dim=-1)
        patches = F.normalize(products + 0.02 * torch.randn(2, 6, 16, 64, generator=generator), dim=-1)
        coverage = torch.zeros(2, 6, 16)
        coverage[:, 5, 3] = 1.0
        blind = patch_loss(patches, coverage, coverage, 0)
        patches[:, 5, 3] = F.normalize(torch.randn(2, 64, generator=generator), dim=-1)
        assert patch_loss(patches, coverage, coverage, 0) < 0.1 < 1 < blind

    def test_image_loss_is_low_where_sound_images_lie_together(self):
        tokens = torch.eye(4)[[0, 0, 0, 1, 2, 2, 2, 3]]
        defective = torch.tensor([False, False, False, True] * 2)
        assert image_loss(tokens, defective, 2) < 0.01 < 1 < image_loss(torch.ones(8, 4), defective, 2)

    @pytest.mark.parametrize("defective", [0, 1, 6])
    def test_gradients_are_finite_whatever_the_pools_are(self, materials, defective):
        pools = [draw_pool(np.random.default_rng(seed), materials, 64, 6, defective) for seed in range(2)]
        images = torch.from_numpy(np.concatenate([pool.images for pool in pools])).permute(0, 3, 1, 2).float()
        masks = torch.from_numpy(np.concatenate([pool.masks for pool in pools]))
        network = Training(Path("not read"), seed=0, epochs=1, steps=1).network
        maps, tokens = network(images / 127.5 - 1)
        sum(pool_loss(maps[::2], tokens, masks, 2, 0).values()).backward()
        assert all(weight.grad.isfinite().all() for weight in network.parameters())


TINY = ["--epochs", "2", "--steps", "2", "--materials", "6", "--seed", "1"]


def run_training(folder: Path, *options: str, is_killed: bool = False) -> tuple[int, str]:
    """Train until it ends, or only until there is a checkpoint to go on from."""
    command = [sys.executable, str(RECIPE / "train.py"), str(folder), *TINY, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as run:
        deadline = time.monotonic() + 120
        while is_killed and not (folder / "last.ckpt").is_file() and time.monotonic() < deadline and run.poll() is None:
            time.sleep(0.02)
        if is_killed:
            run.kill()
        try:
            output, _ = run.communicate(timeout=240)
        finally:
            run.kill()
        return run.returncode, output


def trained(folder: Path) -> torch.Tensor:
    """All weights of the last checkpoint in a row."""
    state = torch.load(folder / "last.ckpt", weights_only=False)["state_dict"]
    return torch.cat([weights.flatten() for weights in state.values()])


def initial(seed: int) -> torch.Tensor:
    """The weights that a training begins with, in a row."""
    state = Training(Path("not read"), seed=seed, epochs=2, steps=2).state_dict()
    return torch.cat([weights.flatten() for weights in state.values()])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean absolute difference."""
    return (one - other).abs().mean().item()


def test_training_goes_on_where_it_was_killed(tmp_path):
    whole, killed, changed = (tmp_path / name for name in ("whole", "killed", "changed"))
    assert run_training(whole)[0] == 0
    run_training(killed, is_killed=True)
    assert not (killed / "musc_tiny.safetensors").exists()
    shutil.copytree(killed, changed)
    checkpoint = torch.load(changed / "last.ckpt", weights_only=False)
    checkpoint["state_dict"]["network.norm.bias"] += 1.0
    torch.save(checkpoint, changed / "last.ckpt")
    for folder in (killed, changed):
        status, output = run_training(folder)
        assert status == 0, output
        assert "s of training on cpu, processes: 1" in output
    moved = distance(trained(whole), initial(1))
    assert moved > 1e-6
    assert distance(trained(killed), trained(whole)) < 0.05 * moved
    expected, other = (load_file(folder / "musc_tiny.safetensors") for folder in (whole, changed))
    assert (other["norm.bias"].float() - expected["norm.bias"].float()).min() > 0.9  # it did go on, not start again
    create_backbone("musc-tiny", pretrained=whole / "musc_tiny.safetensors")

    status, output = run_training(killed, "--seed", "2")
    assert status != 0
    assert "holds a training with --seed 1: ask for that, or name another folder" in output


def test_two_processes_learn_what_one_does(tmp_path):
    for processes in ("1", "2"):
        status, output = run_training(tmp_path / processes, "--epochs", "1", "--processes", processes)
        assert status == 0, output
    moved = distance(trained(tmp_path / "1"), initial(1))
    assert moved > 1e-6
    assert distance(trained(tmp_path / "1"), trained(tmp_path / "2")) < 0.05 * moved


def test_materials_of_another_recipe_are_refused(tmp_path):
    np.save(tmp_path / "materials.npy", np.zeros((6, 8, 128, 128, 3), np.uint8))
    status, output = run_training(tmp_path)
    assert status != 0
    assert "holds materials of shape (6, 8, 128, 128, 3), not (6, 8, 192, 192, 3): delete it" in output


@pytest.mark.parametrize(("option", "value"), [("--epochs", "0"), ("--materials", "2"), ("--processes", "3")])
def test_training_refuses_what_makes_no_sense(option, value, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "folder", option, value])
    with pytest.raises(SystemExit):
        read_arguments()
    assert f"argument {option}: must be at " in capsys.readouterr().err


def test_learned_features_find_what_random_ones_miss(materials):
    """On products that no training has drawn."""
    pools = [draw_pool(np.random.default_rng([UNSEEN, 4, product]), materials, 128, 8, 3) for product in range(12)]
    images = [torch.from_numpy(pool.images).permute(0, 3, 1, 2).float() / 255 for pool in pools]
    masks = [torch.from_numpy(pool.masks) > 0 for pool in pools]
    labelled = [Labelled("", *pair) for pair in zip(images, masks, strict=True) if pair[1].any()]
    learned, *random = (
        np.mean([judge(model, pool) for pool in labelled], axis=0)
        for weights in ("package", "random")
        for model in models(weights, 128)
    )
    assert (learned > np.max(random, axis=0) + 0.05).all()


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared/data is not here")
@pytest.mark.parametrize(("root", "image", "pixel"), [("cookies", 0.90, 0.93), ("magnetic_tile", 0.70, 0.74)])
def test_photographs(root, image, pixel):
    (pool,) = dataset_products(SHARED / "data" / root, 224)
    (learned,) = (judge(model, pool) for model in models("package"))
    random = judge(models("random")[0], pool)
    assert learned[1] > max(image, random[1])
    assert learned[2] > max(pixel, random[2])
