# SPDX-License-Identifier: Apache-2.0
"""Names by which users know a network, and what is proposed where a name is nearly one."""

import re

import pytest
import timm
import torch

from anomalib_musc.backbones import ALIASES, create_backbone


@pytest.mark.parametrize("name", [name for name in ALIASES if name.startswith("dino")])
def test_every_dino_is_one_of_timms_with_such_weights(name):
    alias = ALIASES[name]
    assert timm.is_model(alias.model)
    assert f"{alias.model}.{alias.tag}" in timm.list_models(f"{alias.model}.*", pretrained=True)


@pytest.mark.parametrize(
    ("name", "patch", "channels", "size"),
    [
        ("dino_vits8", 8, 384, 512),
        ("dinov2_vits14", 14, 384, 518),
        ("dinov2_vits14_reg", 14, 384, 518),
        ("dinov3_vits16", 16, 384, 256),
        ("dinov3_vitb16", 16, 768, 256),
    ],
)
def test_small_ones_are_built(name, patch, channels, size):
    backbone = create_backbone(name, pretrained=False)
    assert backbone.image_size == (size, size)
    assert backbone.patch_size == (patch, patch)
    small = create_backbone(name, pretrained=False, image_size=(4 * patch, 6 * patch))
    maps, image_feature = small(torch.rand(1, 3, 4 * patch, 6 * patch))
    assert [tuple(found.shape) for found in maps] == [(1, channels, 4, 6)] * 4
    assert image_feature.shape == (1, channels)


def test_registers_go_without_the_offset_of_the_sampling_grid():
    names = ("dinov2_vits14_reg", "vit_small_patch14_reg4_dinov2")
    ours, timms = (create_backbone(name, pretrained=False, image_size=(98, 70)).network.pos_embed for name in names)
    assert ours.shape == (1, 7 * 5, 384)
    assert torch.equal(ours, timms)


def test_a_convolutional_one_is_built():
    backbone = create_backbone("dinov3_convnext_tiny", pretrained=False)
    assert (backbone.image_size, backbone.layers) == ((224, 224), (1, 2))
    maps, image_feature = backbone(torch.rand(1, 3, 224, 224))
    assert [tuple(found.shape) for found in maps] == [(1, 192, 28, 28), (1, 384, 14, 14)]
    assert image_feature.shape == (1, 768)


@pytest.mark.parametrize("prefix", ["timm/", "hf_hub:timm/", "hf-hub:timm/", "HF-hub:timm/"])
def test_prefixes_of_timms_own_models(prefix):
    images = torch.rand(1, 3, 64, 64)
    name = "test_vit.r160_in1k"
    plain, prefixed = (create_backbone(full, pretrained=False, image_size=64) for full in (name, prefix + name))
    assert torch.equal(prefixed(images)[1], plain(images)[1])


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("dinov2_vitb_14", "dinov2_vitb14"),
        ("dinov2-vit-b14", "dinov2_vitb14"),
        ("hf_hub:facebook/dinov2-base", "dinov2_vitb14"),
        ("facebook/dinov3-vitl16-pretrain-lvd1689m", "dinov3_vitl16"),
        ("timm/dinov2_vitb14", "dinov2_vitb14"),
        ("dinov2_vit_large_14", "dinov2_vitl14"),
        ("dino_vitbase_16", "dino_vitbase16"),
        ("DINOv2_ViTL14", "dinov2_vitl14"),
        ("dino_vit_b16", "dino_vitb16"),
        ("dinov3_vitl_16", "dinov3_vitl16"),
        ("ViT-L14-336", "ViT-L-14-336"),
        ("vit-l-14", "ViT-L-14"),
        ("musc_tiny", "musc-tiny"),
        ("timm/musc-tiny", "musc-tiny"),
        ("efficientnet_lite-2", "efficientnet-lite2"),
        ("timm/efficientnet-lite2", "efficientnet-lite2"),
        ("efficientnet_lite", "efficientnet-lite2"),
        ("lite2", "efficientnet-lite2"),
        ("facebook/dinov3-vits16-pretrain-lvd1689m", "dinov3_vits16"),
        ("dinov2_vitb14_pretrain.pth", "dinov2_vitb14"),
        ("facebook/dinov2-with-registers-base", "dinov2_vitb14_reg"),
        ("facebook/dinov2-with-registers-small", "dinov2_vits14_reg"),
        ("openai/clip-vit-large-patch14-336", "ViT-L-14-336"),
        ("openai/clip-vit-base-patch16", "ViT-B-16"),
        ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "ViT-B-32"),
        ("ViT-L/14@336px", "ViT-L-14-336"),
        ("dinov2", "dinov2_vitb14"),
        ("dinov3_vith16", "dinov3_vith16plus"),
        ("dinov3_vits16+", "dinov3_vits16plus"),
        ("vit_small_patch14_dinov2_reg4", "vit_small_patch14_reg4_dinov2"),
        ("resnt18", "resnet18"),
    ],
)
def test_a_near_miss_proposes_the_right_name(name, meant):
    with pytest.raises(ValueError, match=re.escape(f"backbone {name!r} is not known; did you mean {meant!r}")):
        create_backbone(name)


@pytest.mark.parametrize("name", ["§§§", "timm/"])
def test_a_name_like_none(name):
    with pytest.raises(ValueError, match=rf"backbone '{name}' is not known; no name is like it"):
        create_backbone(name)


def test_timms_name_without_weights_proposes_the_network_that_has_some():
    with pytest.raises(ValueError, match=r"no weights of 'efficientnet_lite2'.*backbone='efficientnet-lite2'"):
        create_backbone("efficientnet_lite2")


@pytest.mark.parametrize("name", [5, None, "", ["ViT-L-14"], True])
def test_what_is_no_name(name):
    with pytest.raises(ValueError, match=r"backbone must be a name, such as .* or a torch\.nn\.Module, got"):
        create_backbone(name)
