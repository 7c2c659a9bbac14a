# SPDX-License-Identifier: Apache-2.0
"""Backbones: equality with the official release's numbers, and with the libraries' own forward passes."""

import copy
import inspect
import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from torch.nn import functional as F  # noqa: N812

from anomalib_musc.backbones import ALIASES, Backbone, WeightsUnavailableError, create_backbone
from anomalib_musc.backbones.base import quarter_ends, resize_position_embedding
from anomalib_musc.backbones.clip import uses_quick_gelu

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "clip_visual_quickgelu.npz"
TINY_CLIP = {"image_size": 32, "layers": 4, "width": 32, "patch_size": 8, "head_width": 16}


def register_clip(folder, name, vision_cfg, embed_dim=12, **model_cfg):
    text_cfg = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": embed_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg, **model_cfg}
    path = Path(folder) / f"{name}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return name


@pytest.fixture
def tiny_clip(tmp_path):
    """A registered architecture and the state dict of one random CLIP of it."""
    name = register_clip(tmp_path, "musc-tiny-clip", TINY_CLIP, quick_gelu=True)
    torch.manual_seed(0)
    return name, open_clip.create_model(name, pretrained=None).state_dict()


def save(state, path):
    state = {key: value.contiguous().clone() for key, value in state.items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def resized(embedding, prefix, grid, new_grid):
    """The reference, in torch alone: bicubic, corners not aligned, no antialiasing."""
    patches = embedding[:, prefix:].reshape(1, *grid, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False, antialias=False)
    return torch.cat([embedding[:, :prefix], patches.flatten(2).transpose(1, 2)], dim=1)


def equal(ours, theirs, **tolerance):
    torch.testing.assert_close(ours, theirs, **({"rtol": 0, "atol": 0} | tolerance))


# ---- CLIP ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the official release's numbers are not part of the repository")
def test_clip_equals_the_official_release(tmp_path):
    golden = np.load(GOLDEN)
    native, size, patch, width, heads, depth, embed_dim, quick_gelu = (int(v) for v in golden["config"])
    vision = {"image_size": native, "layers": depth, "width": width, "patch_size": patch, "head_width": width // heads}
    name = register_clip(tmp_path, "musc-golden", vision, embed_dim, quick_gelu=bool(quick_gelu))
    weights = {k.removeprefix("param/"): torch.from_numpy(golden[k]) for k in golden.files if k.startswith("param/")}
    file = save(weights, tmp_path / "visual.safetensors")

    backbone = create_backbone(name, pretrained=file, image_size=size, layers=[2, 5, 8, 11])
    maps, image_feature = backbone(torch.from_numpy(golden["image"]))

    expected = torch.from_numpy(golden["patch_tokens"])[:, :, 1:]
    assert len(maps) == len(expected)
    for feature_map, tokens in zip(maps, expected, strict=True):
        equal(feature_map.flatten(2).transpose(1, 2), tokens, atol=1e-5)
    equal(image_feature, torch.from_numpy(golden["class_token"]), atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (40, 64)])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_clip_equals_open_clips_tower_with_a_plainly_resized_embedding(tiny_clip, tmp_path, size, suffix):
    name, state = tiny_clip
    backbone = create_backbone(name, pretrained=str(save(state, tmp_path / f"clip{suffix}")), image_size=size)
    images = torch.randn(2, 3, *size)
    maps, image_feature = backbone(images)

    grid = (size[0] // 8, size[1] // 8)
    kwargs = {"patch_size": 8, "width": 32, "layers": 4, "heads": 2, "mlp_ratio": 4.0, "output_dim": 12}
    tower = VisionTransformer(image_size=size, act_layer=open_clip.transformer.QuickGELU, **kwargs).eval()
    visual = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    visual["positional_embedding"] = resized(visual["positional_embedding"][None], 1, (4, 4), grid)[0]
    tower.load_state_dict(visual)
    outputs = []
    for block in tower.transformer.resblocks:
        block.register_forward_hook(lambda _block, _inputs, output: outputs.append(output))
    with torch.no_grad():
        expected = F.normalize(tower(images), dim=-1)

    equal(image_feature, expected)
    assert backbone.layers == (0, 1, 2, 3)
    for feature_map, output in zip(maps, outputs, strict=True):
        tokens = output if getattr(tower.transformer, "batch_first", False) else output.transpose(0, 1)
        equal(feature_map, tokens[:, 1:].transpose(1, 2).reshape(2, 32, *grid))


def test_clip_takes_a_file_of_another_grid(tiny_clip, tmp_path):
    name, state = tiny_clip
    larger = state | {"visual.positional_embedding": torch.randn(1 + 6 * 6, 32)}
    file = save(larger, tmp_path / "larger.pth")
    assert create_backbone(name, pretrained=file).image_size == (48, 48)
    network = create_backbone(name, pretrained=file, image_size=40).network
    expected = resized(larger["visual.positional_embedding"][None], 1, (6, 6), (5, 5))[0]
    equal(network.positional_embedding.data, expected)


def test_clip_reads_torchscript_and_wrapped_checkpoints(tiny_clip, tmp_path):
    name, state = tiny_clip
    plain = create_backbone(name, pretrained=save(state, tmp_path / "plain.pt"))
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "train.pt")
    wrapped = create_backbone(name, pretrained=tmp_path / "train.pt")
    script = torch.nn.Module()
    script.visual = copy.deepcopy(plain.network)
    script.visual.forward = None
    holder = torch.nn.Module()
    for key, value in state.items():
        owner = holder
        *parents, leaf = key.split(".")
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, torch.nn.Module())
            owner = getattr(owner, parent)
        owner.register_buffer(leaf, value)
    torch.jit.save(torch.jit.script(holder), tmp_path / "jit.pt")
    scripted = create_backbone(name, pretrained=tmp_path / "jit.pt")
    for backbone in (wrapped, scripted):
        for key, value in plain.state_dict().items():
            equal(backbone.state_dict()[key], value)


@pytest.mark.parametrize(
    ("name", "tag", "expected"),
    [
        ("ViT-L-14-336", "openai", True),
        ("ViT-B-32", "openai", True),
        ("ViT-B-16", "laion2b_s34b_b88k", False),
        ("ViT-B-32", "laion400m_e32", True),
        ("ViT-B-16-plus-240", "laion400m_e32", False),
        ("ViT-B-32-quickgelu", None, True),
        ("ViT-B-32", None, False),
    ],
)
def test_quick_gelu_comes_from_the_tag(name, tag, expected):
    assert uses_quick_gelu(name, tag) is expected


def test_random_and_local_weights_of_an_official_name_get_its_activation(caplog):
    with caplog.at_level(logging.INFO, logger="anomalib_musc"):
        backbone = create_backbone("ViT-B-32", pretrained=False, image_size=64)
    activations = {type(module).__name__ for module in backbone.network.modules() if "GELU" in type(module).__name__}
    assert activations == {"QuickGELU"}
    assert "ViT-B-32: activation QuickGELU" in caplog.text
    assert backbone.mean == open_clip.OPENAI_DATASET_MEAN
    assert backbone.std == open_clip.OPENAI_DATASET_STD
    assert backbone.interpolation == "bicubic"


@pytest.mark.parametrize("trunk", ["test_vit", "test_vit4", "test_convnext"])
def test_clip_with_a_timm_trunk(tmp_path, trunk):
    vision = {"timm_model_name": trunk, "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    name = register_clip(tmp_path, f"musc-trunk-{trunk}", vision)
    state = open_clip.create_model(name, pretrained=None).state_dict()
    file = save({k: v for k, v in state.items() if k.startswith("visual.")}, tmp_path / "visual.safetensors")
    backbone = create_backbone(name, pretrained=file)
    images = torch.randn(2, 3, 160, 160)
    maps, image_feature = backbone(images)
    equal(image_feature, F.normalize(backbone.network(images), dim=-1))
    trunk_maps = backbone.network.trunk.forward_intermediates(images, intermediates_only=True)
    for layer, feature_map in zip(backbone.layers, maps, strict=True):
        equal(feature_map, trunk_maps[layer])
    other = create_backbone(name, pretrained=file, image_size=(96, 128))
    assert other(torch.randn(1, 3, 96, 128))[1].shape == (1, 12)
    if trunk == "test_vit":
        embedding = resized(state["visual.trunk.pos_embed"], 1, (10, 10), (6, 8))
        equal(other.network.trunk.pos_embed.data, embedding)
        larger = {k: v for k, v in state.items() if k.startswith("visual.")}
        larger["visual.trunk.pos_embed"] = torch.randn(1, 1 + 12 * 12, 64)
        other = create_backbone(name, pretrained=save(larger, tmp_path / "larger.pt"), image_size=(96, 128))
        equal(other.network.trunk.pos_embed.data, resized(larger["visual.trunk.pos_embed"], 1, (12, 12), (6, 8)))


# ---- timm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit4", "vit_tiny_patch16_224", "test_resnet"])
def test_timm_equals_forward_intermediates_at_native_size(name):
    backbone = create_backbone(name, pretrained=False)
    network = backbone.network
    images = torch.randn(2, 3, *backbone.image_size)
    maps, image_feature = backbone(images)
    final, expected = network.forward_intermediates(images, norm=True)
    for layer, feature_map in zip(backbone.layers, maps, strict=True):
        equal(feature_map, expected[layer])
    token = getattr(network, "cls_token", None) is not None and not isinstance(network.norm, torch.nn.Identity)
    equal(image_feature, final[:, 0] if token else network.forward_head(final, pre_logits=True))


def test_dino_gives_normed_blocks_and_the_class_token():
    """By hand for the one architecture that DINO and DINOv2 share: blocks, final norm, class token."""
    backbone = create_backbone("vit_tiny_patch16_224", pretrained=False, layers=[11, 3], image_size=64)
    network = backbone.network
    images = torch.randn(2, 3, 64, 64)
    tokens = network.patch_embed(images)
    tokens = torch.cat([network.cls_token.expand(2, -1, -1), tokens], dim=1) + network.pos_embed
    outputs = []
    for block in network.blocks:
        tokens = block(tokens)
        outputs.append(network.norm(tokens))
    maps, image_feature = backbone(images)
    for feature_map, layer in zip(maps, (11, 3), strict=True):
        equal(feature_map, outputs[layer][:, 1:].transpose(1, 2).reshape(2, 192, 4, 4), atol=1e-6)
    equal(image_feature, outputs[11][:, 0], atol=1e-6)
    assert backbone.interpolation == "bilinear"


@pytest.mark.parametrize("size", [(96, 96), (192, 128)])
@pytest.mark.parametrize(("name", "prefix"), [("test_vit", 1), ("musc_registers", 0), ("musc_no_class", 0)])
def test_timm_embedding_is_resized_without_antialiasing(name, prefix, size):
    torch.manual_seed(0)
    native = create_backbone(name, pretrained=False)
    torch.manual_seed(0)
    other = create_backbone(name, pretrained=False, image_size=size)
    grid, new_grid = (native.image_size[0] // 16,) * 2, (size[0] // 16, size[1] // 16)
    embedding = resized(native.network.pos_embed.data, prefix, grid, new_grid)
    equal(other.network.pos_embed.data, embedding)
    images = torch.randn(2, 3, *size)
    assert other(images)[0][0].shape[2:] == new_grid
    # the weights' own forward pass, with the embedding put in by hand
    reference = timm.create_model(name, pretrained=False, num_classes=0, img_size=size).eval()
    reference.load_state_dict(native.network.state_dict() | {"pos_embed": embedding})
    final, expected = reference.forward_intermediates(images, indices=list(other.layers), norm=True)
    maps, image_feature = other(images)
    for ours, theirs in zip(maps, expected, strict=True):
        equal(ours, theirs)
    equal(image_feature, final[:, 0] if name != "musc_no_class" else final.mean(dim=1), atol=1e-6)


@timm.models.register_model
def musc_registers(pretrained=False, **kwargs):
    """Registers, and an embedding that leaves prefix tokens out, as in ``vit_small_patch14_reg4_dinov2``."""
    size = {"img_size": kwargs.pop("img_size", None) or 160, "patch_size": 16, "embed_dim": 32, "depth": 3}
    extra = {"num_heads": 2, "reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5}
    return timm.models.vision_transformer.VisionTransformer(**size, **extra, **only(kwargs, "num_classes"))


@timm.models.register_model
def musc_no_class(pretrained=False, **kwargs):
    """No class token, as in ``vit_medium_patch16_gap_240``."""
    size = {"img_size": kwargs.pop("img_size", None) or 160, "patch_size": 16, "embed_dim": 32, "depth": 3}
    extra = {"num_heads": 2, "class_token": False, "global_pool": "avg", "fc_norm": False}
    return timm.models.vision_transformer.VisionTransformer(**size, **extra, **only(kwargs, "num_classes"))
