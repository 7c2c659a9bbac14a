# SPDX-License-Identifier: Apache-2.0
"""The position embedding under the official names of DINO and DINOv2, sampled where their own code samples it."""

import numpy as np
import pytest
import timm
import torch
from lightning import Trainer

from anomalib_musc import MuSc
from anomalib_musc.backbones import ALIASES, create_backbone
from anomalib_musc.backbones.factory import Alias


def cubic(distance: float) -> float:
    """The cubic kernel of a = -0.75 (Keys, 1981)."""
    d, a = abs(distance), -0.75
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def samples(new: int, old: int) -> np.ndarray:
    """The weights (new, old) of an axis: place i is sampled at (i + 0.5) / scale - 0.5, scale = (new + 0.1) / old."""
    weights = np.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) * old / (new + 0.1) - 0.5
        for neighbour in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            weights[i, min(max(neighbour, 0), old - 1)] += cubic(place - neighbour)
    return weights


def expected(embedding: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """An embedding (1, 1 + s*s, C), the class token first, on another grid; in float64."""
    prefix, patches = embedding[0, :1].double(), embedding[0, 1:].double().numpy()
    side = round(len(patches) ** 0.5)
    patches = patches.reshape(side, side, -1)
    resized = np.einsum("ih,jw,hwc->ijc", samples(grid[0], side), samples(grid[1], side), patches)
    return torch.cat([prefix, torch.from_numpy(resized).flatten(0, 1)])[None]


def embedding_of(name: str, image_size: int | tuple[int, int] | None = None, **kwargs) -> torch.Tensor:
    backbone = create_backbone(name, **{"pretrained": False, "image_size": image_size, **kwargs})
    return backbone.network.pos_embed.detach()


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-6 + 1e-5 * theirs.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    ("name", "native", "patch", "sizes"),
    [
        ("dino_vitbase16", 224, 16, [(512, 512), (96, 160), (112, 448), (208, 224)]),  # 112 x 448: as many patches
        ("dino_vitbase8", 224, 8, [(512, 512), (64, 40)]),
        ("dinov2_vitb14", 518, 14, [(224, 224), (98, 70), (518, 504)]),
        ("dinov2_vits14", 518, 14, [(98, 70)]),
        ("dino_vits8", 224, 8, [(64, 40)]),
    ],
)
def test_official_names_sample_it_as_their_own_code(name, native, patch, sizes):
    at_native_size = embedding_of(name, native)
    assert torch.equal(at_native_size, timm_embedding(name))
    for size in sizes:
        grid = (size[0] // patch, size[1] // patch)
        assert_near(embedding_of(name, size), expected(at_native_size, grid))


def timm_embedding(name: str) -> torch.Tensor:
    """The random embedding that timm's network has at the size of its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        alias = ALIASES[name]
        return timm.create_model(f"{alias.model}.{alias.tag}", num_classes=0).pos_embed.detach()


def test_at_the_default_sizes():
    assert_near(embedding_of("dino_vitbase16"), expected(embedding_of("dino_vitbase16", 224), (32, 32)))
    assert torch.equal(embedding_of("dinov2_vitb14"), embedding_of("dinov2_vitb14", 518))


@pytest.mark.parametrize("name", ["vit_base_patch16_224.dino", "vit_small_patch14_dinov2"])
def test_timms_names_do_not(name):
    native, other = embedding_of(name), embedding_of(name, 112)
    side, grid = round((native.shape[1] - 1) ** 0.5), round((other.shape[1] - 1) ** 0.5)
    patches = native[:, 1:].mT.unflatten(2, (side, side))
    plain = torch.nn.functional.interpolate(patches, (grid, grid), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(other[:, 1:], plain, atol=0, rtol=0)
    assert (other - expected(native, (grid, grid))).abs().max() > 0.01 * native.abs().max()


@pytest.fixture
def dino(monkeypatch):
    """A tiny network under a name like those of DINO."""
    monkeypatch.setitem(ALIASES, "dino_vittest", Alias("test_vit", "r160_in1k", 128))
    return "dino_vittest"


def test_a_files_own_grid_is_what_is_resized(dino, tmp_path):
    network = timm.create_model("test_vit", num_classes=0, img_size=96)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    of_file = embedding_of(dino, (80, 208), pretrained=tmp_path / "weights.pth")
    assert_near(of_file, expected(network.pos_embed.detach(), (5, 13)))
    assert torch.equal(embedding_of(dino, 96, pretrained=tmp_path / "weights.pth"), network.pos_embed)


def test_a_checkpoint_is_loaded_as_it_is(dino, tmp_path):
    model, trainer = MuSc(dino, pretrained=False, visualizer=False), Trainer(logger=False, accelerator="cpu")
    plain = torch.randn_like(model.model.backbone.network.pos_embed)  # of a version that resized it otherwise
    model.model.backbone.network.pos_embed.data = plain
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = MuSc.load_from_checkpoint(tmp_path / "model.ckpt")
    assert torch.equal(loaded.model.backbone.network.pos_embed, plain)
