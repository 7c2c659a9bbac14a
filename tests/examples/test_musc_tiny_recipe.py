# SPDX-License-Identifier: Apache-2.0
"""The recipe of ``musc-tiny``: the products that it learned from, and how."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from objective import image_loss, outranked, patch_loss, pool_loss, scores_of_each_other
from pools import Look, draw_material, draw_pool
from safetensors.torch import load_file, save_file
from textures import SIMPLE, mixed
from torch.nn import functional as F  # noqa: N812
from train import main, read_arguments
from training import Training

from anomalib_musc.backbones import create_backbone
from anomalib_musc.backbones.tiny import MuscTiny
from anomalib_musc.functional import mutual_scores

TRAIN = Path(__file__).resolve().parents[2] / "examples/musc_tiny/train.py"


@pytest.fixture(scope="module")
def materials() -> np.ndarray:
    """Twelve materials of eight pieces."""
    return np.stack([draw_material(7, index, 8) for index in range(12)])


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


@pytest.fixture
def train(monkeypatch, capsys):
    """Train in this process; what it printed."""

    def run(folder: Path, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", str(folder), *TINY, *options])
        main()
        return capsys.readouterr().out

    return run


def train_apart(folder: Path, *options: str, until: str = "musc_tiny.safetensors") -> None:
    """Train in a process of its own, killed as soon as a file is there."""
    command = [sys.executable, str(TRAIN), str(folder), *TINY, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True) as run:
        try:
            deadline = time.monotonic() + 120
            while not (folder / until).is_file():
                assert run.poll() is None, run.communicate()[1]
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            os.killpg(run.pid, signal.SIGKILL)


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


def test_training_goes_on_where_it_was_killed(tmp_path, train):
    whole, killed, changed = (tmp_path / name for name in ("whole", "killed", "changed"))
    train(whole)
    train_apart(killed, until="last.ckpt")
    assert not (killed / "musc_tiny.safetensors").exists()
    shutil.copytree(killed, changed)
    checkpoint = torch.load(changed / "last.ckpt", weights_only=False)
    checkpoint["state_dict"]["network.norm.bias"] += 1.0
    torch.save(checkpoint, changed / "last.ckpt")
    for folder in (killed, changed):
        assert "s of training on cpu, processes: 1" in train(folder)
    moved = distance(trained(whole), initial(1))
    assert moved > 1e-6
    assert distance(trained(killed), trained(whole)) < 0.05 * moved
    expected, other = (load_file(folder / "musc_tiny.safetensors") for folder in (whole, changed))
    assert (other["norm.bias"].float() - expected["norm.bias"].float()).min() > 0.9  # it did go on, not start again
    create_backbone("musc-tiny", pretrained=whole / "musc_tiny.safetensors")
    with pytest.raises(SystemExit, match="holds a training with --seed 1: ask for that, or name another folder"):
        train(killed, "--seed", "2")


def test_a_third_training_begins_with_the_mean_of_earlier_ones_and_is_averaged_with_them(tmp_path, train):
    earlier = []
    for name, shift in (("first", 1), ("second", 3)):
        network = MuscTiny()
        network.norm.bias.data += shift
        earlier.append({name: value.half().contiguous() for name, value in network.state_dict().items()})
        save_file(earlier[-1], tmp_path / name)
    train(tmp_path / "third", "--weights", str(tmp_path / "first"), str(tmp_path / "second"), "--epochs", "1")
    ended = torch.load(tmp_path / "third/last.ckpt", weights_only=False)["state_dict"]
    last, means = (load_file(tmp_path / f"third/{name}.safetensors") for name in ("last", "musc_tiny"))
    for name, mean in means.items():
        first, second = (weights[name].float() for weights in earlier)
        torch.testing.assert_close(last[name].float(), ended[f"network.{name}"], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(mean.float(), (first + second + last[name].float()) / 3, atol=2e-3, rtol=2e-3)
        assert (last[name].float() - (first + second) / 2).abs().max() < 0.1  # else it had begun with others
    with pytest.raises(SystemExit, match="holds a training with --weights"):
        train(tmp_path / "third", "--epochs", "1")


def test_materials_of_another_recipe_are_refused(tmp_path, train):
    np.save(tmp_path / "materials.npy", np.zeros((6, 8, 128, 128, 3), np.uint8))
    with pytest.raises(ValueError, match=r"of shape \(6, 8, 128, 128, 3\), not \(6, 8, 192, 192, 3\): delete"):
        train(tmp_path)


def test_weights_that_are_not_there_are_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "folder", "--weights", "nowhere.safetensors"])
    with pytest.raises(SystemExit):
        read_arguments()
    assert "argument --weights: there is no file nowhere.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--epochs", "0"), ("--materials", "2"), ("--processes", "3")])
def test_training_refuses_what_makes_no_sense(option, value, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "folder", option, value])
    with pytest.raises(SystemExit):
        read_arguments()
    assert f"argument {option}: must be at " in capsys.readouterr().err
