# SPDX-License-Identifier: Apache-2.0
"""Backbones: equality with the official release's numbers, and with the libraries' own forward passes."""

import copy
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import timm
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from torch.nn import functional as F  # noqa: N812

from anomalib_musc.backbones import ALIASES, WeightsUnavailableError, create_backbone
from anomalib_musc.backbones.base import quarter_ends, resize_position_embedding
from anomalib_musc.backbones.clip import uses_quick_gelu

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
    assert activations == {"GELU"}
    assert "ViT-B-32: activation GELU, weights of QuickGELU" in caplog.text
    assert backbone.mean == open_clip.OPENAI_DATASET_MEAN
    assert backbone.std == open_clip.OPENAI_DATASET_STD
    assert backbone.interpolation == "bicubic"


def test_a_local_file_under_an_official_name_has_its_activation(tmp_path):
    other = create_backbone("ViT-B-32", pretrained=False, image_size=64, activation="weights")
    file = save({f"visual.{name}": value for name, value in other.network.state_dict().items()}, tmp_path / "b32.pt")
    loaded = create_backbone("ViT-B-32", pretrained=file, image_size=64, activation="weights")
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    equal(loaded(images)[1], other(images)[1])
    plain = create_backbone("ViT-B-32-256", pretrained=False, image_size=64)  # of GELU, as no tag says otherwise
    plain.network.load_state_dict(other.network.state_dict(), strict=False)
    assert (plain(images)[1] - other(images)[1]).abs().max() > 1e-4


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
    equal(image_feature, final[:, 0] if token else F.normalize(network.forward_head(final, pre_logits=True), dim=-1))


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


EMBEDDINGS = [
    ("test_vit", 1, (192, 128)),  # a class token; this one would resample in every forward pass if it were let
    ("test_vit2", 1, (96, 96)),  # a register, no class token
    ("test_vit3", 1, (192, 128)),  # pooled by attention, as SigLIP is
    ("vit_small_patch14_reg4_dinov2", 0, (70, 98)),  # class token and registers outside the embedding
]


@pytest.mark.parametrize(("name", "prefix", "size"), EMBEDDINGS)
def test_timm_embedding_is_resized_without_antialiasing(name, prefix, size):
    torch.manual_seed(0)
    native = timm.create_model(name, num_classes=0).eval()
    torch.manual_seed(0)
    backbone = create_backbone(name, pretrained=False, image_size=size)
    patch = backbone.patch_size[0]
    new_grid = (size[0] // patch, size[1] // patch)
    embedding = resized(native.pos_embed.data, prefix, native.patch_embed.grid_size, new_grid)
    equal(backbone.network.pos_embed.data, embedding)

    reference = timm.create_model(name, num_classes=0, img_size=size).eval()
    reference.load_state_dict(native.state_dict() | {"pos_embed": embedding})
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        final, expected = reference.forward_intermediates(images, indices=list(backbone.layers), norm=True)
        pooled = F.normalize(reference.forward_head(final, pre_logits=True), dim=-1)
    maps, image_feature = backbone(images)
    for ours, theirs in zip(maps, expected, strict=True):
        assert ours.shape[2:] == new_grid
        equal(ours, theirs, atol=1e-6)
    equal(image_feature, final[:, 0] if reference.has_class_token else pooled, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "test_vit_relpos",
        "test_resnet",
        "test_convnext",
        "test_efficientnet",
        "test_maxvit",
        "test_mambaout",
        "mobilenetv2_050",
        "deit_tiny_patch16_224",
        "eva02_tiny_patch14_224",  # rotary positions besides learned ones
        "vit_small_patch16_dinov3",  # rotary positions alone
        "vit_tiny_r_s16_p8_224",  # a convolutional stem
        "swin_tiny_patch4_window7_224",
        "pvt_v2_b0",
    ],
)
def test_families_work_at_other_sizes(name):
    if not timm.is_model(name):
        pytest.skip(f"this timm does not know {name} yet")
    size = (112, 224) if name.startswith("eva02") else (96, 160)
    backbone = create_backbone(name, pretrained=False, image_size=size)
    images = torch.randn(2, 3, *size)
    maps, image_feature = backbone(images)
    network = backbone.network
    with torch.no_grad():
        final = network.forward_features(images)
    token = backbone.patch_size not in (None, (4, 4)) and not isinstance(network.norm, torch.nn.Identity)
    equal(
        image_feature,
        final[:, 0] if token else F.normalize(network.forward_head(final, pre_logits=True), dim=-1),
        atol=1e-5,
    )
    strides = [size[0] / feature_map.shape[2] for feature_map in maps]
    assert strides == [size[1] / feature_map.shape[3] for feature_map in maps]
    assert (strides == [8, 16]) if len(maps) == 2 else (len(maps) == 4 and len(set(strides)) == 1)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not any(module.training for module in backbone.train().modules())
    with torch.autocast("cpu", torch.bfloat16):
        half_maps, half_feature = backbone(images)
    for exact, half in zip([*maps, image_feature], [*half_maps, half_feature], strict=True):
        assert (exact - half).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_timm_file_gives_the_same_features(name, suffix, tmp_path):
    original = timm.create_model(name).eval()  # with its classifier, as users save it
    file = save(original.state_dict(), tmp_path / f"weights{suffix}")
    backbone = create_backbone(name, pretrained=file)
    images = torch.randn(2, 3, 160, 160)
    expected = original.forward_intermediates(images, indices=list(backbone.layers), norm=True)[1]
    for ours, theirs in zip(backbone(images)[0], expected, strict=True):
        equal(ours, theirs)
    assert "state_dict" not in backbone.network.pretrained_cfg


def test_timm_takes_a_file_of_another_grid(tmp_path):
    larger = timm.create_model("test_vit", img_size=224).eval()
    file = save(larger.state_dict(), tmp_path / "larger.safetensors")
    assert create_backbone("test_vit", pretrained=file).image_size == (224, 224)
    backbone = create_backbone("test_vit", pretrained=file, image_size=(96, 160))
    equal(backbone.network.pos_embed.data, resized(larger.pos_embed.data, 1, (14, 14), (6, 10)))


def test_files_of_the_original_dinov2_are_converted(tmp_path):
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=56)
    file = save(network.state_dict() | {"mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2_vits14_pretrain.pth")
    backbone = create_backbone("vit_small_patch14_dinov2", pretrained=file)
    assert backbone.image_size == (56, 56)
    equal(backbone.network.blocks[3].mlp.fc1.weight.data, network.blocks[3].mlp.fc1.weight.data)


ORDER = """
import sys, torch
from anomalib_musc.backbones import create_backbone
def patch():
    from anomalib.models.components.feature_extractors import TimmFeatureExtractor
    TimmFeatureExtractor("test_vit", layers=["blocks.1"], pre_trained=False)
    import timm.models.vision_transformer as vit
    assert getattr(vit.resample_abs_pos_embed, "_anomalib_no_antialias", False)
def features():
    torch.manual_seed(0)
    backbone = create_backbone("test_vit", pretrained=False, image_size=(96, 224))
    maps, image_feature = backbone(torch.randn(1, 3, 96, 224))
    return torch.cat([feature_map.flatten() for feature_map in [*maps, image_feature]])
before = features()
patch()
torch.testing.assert_close(features(), before, rtol=0, atol=0)
"""


def test_features_do_not_depend_on_anomalibs_patch():
    """In a process of its own, for the patch cannot be undone: once without it, once with it."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    run = subprocess.run([sys.executable, "-c", ORDER], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


# ---- names, sizes, layers, errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALIASES)
def test_official_names_stand_for_models_and_weights_that_exist(name):
    alias = ALIASES[name]
    if name.startswith("dino"):
        config = timm.get_pretrained_cfg(f"{alias.model}.{alias.tag}")
        assert config.hf_hub_id
        assert (config.mean, config.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        patch = 32 if "convnext" in name else int(alias.model.split("patch")[1].split("_")[0])
    else:
        assert alias.tag in open_clip.list_pretrained_tags_by_model(alias.model)
        patch = open_clip.get_model_config(alias.model)["vision_cfg"]["patch_size"]
    assert alias.image_size % patch == 0


def test_default_layers_are_the_ends_of_the_quarters():
    assert quarter_ends(24) == (5, 11, 17, 23)
    assert quarter_ends(12) == (2, 5, 8, 11)
    assert quarter_ends(32) == (7, 15, 23, 31)
    assert quarter_ends(1) == (0,)


def test_early_layers_leave_the_image_feature_alone():
    backbone = create_backbone("hiera_tiny_224", pretrained=False, layers=[1])
    images = torch.randn(1, 3, 224, 224)
    maps, image_feature = backbone(images)
    assert [tuple(feature_map.shape) for feature_map in maps] == [(1, 192, 28, 28)]
    pooled = backbone.network.forward_head(backbone.network.forward_features(images), pre_logits=True)
    equal(image_feature, F.normalize(pooled, dim=-1))


def test_prefix_tokens_and_equal_grids_are_left_alone():
    embedding = torch.randn(1, 2 + 9, 4)
    assert resize_position_embedding(embedding, (3, 3), (3, 3), 2) is embedding
    equal(resize_position_embedding(embedding, (3, 3), (5, 4), 2)[:, :2], embedding[:, :2])


def test_half_precision_copies_and_checkpoints():
    backbone = create_backbone("test_vit", pretrained=False)
    images = torch.randn(1, 3, 160, 160)
    equal(copy.deepcopy(backbone)(images)[1], backbone(images)[1])
    exact, half = backbone(images)[1], copy.deepcopy(backbone).half()(images.half())[1]
    assert half.dtype == torch.float16
    assert (exact - half).norm() < 0.05 * exact.norm()


def test_clip_copies_and_half_precision(tiny_clip):
    backbone = create_backbone(tiny_clip[0], pretrained=False, image_size=48)
    copied, images = copy.deepcopy(backbone), torch.randn(1, 3, 48, 48)
    equal(copied(images)[0][1], backbone(images)[0][1])
    exact = backbone(images)
    with torch.autocast("cpu", torch.bfloat16):
        auto = backbone(images)
    half = copied.half()(images.half())
    for variant in (auto, half):
        for ours, theirs in zip([*variant[0], variant[1]], [*exact[0], exact[1]], strict=True):
            assert (ours.float() - theirs).norm() < 0.05 * theirs.norm()


def unreadable(folder):
    (folder / "broken.pth").write_bytes(b"no weights at all")
    (folder / "broken.safetensors").write_bytes(b"no weights at all")
    torch.save({"epoch": 1}, folder / "empty.pth")
    save(timm.create_model("test_resnet").state_dict(), folder / "resnet.safetensors")
    state = timm.create_model("test_vit").state_dict()
    save({k: v for k, v in state.items() if "blocks.3" not in k}, folder / "incomplete.pth")
    save(state | {"pos_embed": torch.zeros(1, 1 + 7, 64)}, folder / "odd.pth")
    return folder


@pytest.mark.parametrize("file", ["broken.pth", "broken.safetensors", "empty.pth", "resnet.safetensors"])
@pytest.mark.parametrize("name", ["test_vit", "ViT-B-32"])
def test_files_that_do_not_fit(name, file, tmp_path):
    path = unreadable(tmp_path) / file
    with pytest.raises(ValueError, match=f"pretrained='{path}'"):
        create_backbone(name, pretrained=path)


def test_files_that_almost_fit(tiny_clip, tmp_path):
    folder = unreadable(tmp_path)
    with pytest.raises(ValueError, match=r"Missing key.*blocks\.3"):
        create_backbone("test_vit", pretrained=folder / "incomplete.pth")
    with pytest.raises(ValueError, match="no square grid"):
        create_backbone("test_vit", pretrained=folder / "odd.pth")
    name, state = tiny_clip
    visual = {key: value for key, value in state.items() if key.startswith("visual.")}
    del visual["visual.proj"]
    with pytest.raises(ValueError, match=r"Missing key.*proj"):
        create_backbone(name, pretrained=save(visual, tmp_path / "noproj.pt"))
    visual["visual.proj"] = torch.zeros(32, 7)
    with pytest.raises(ValueError, match="size mismatch for proj"):
        create_backbone(name, pretrained=save(visual, tmp_path / "wide.pt"))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"name": "ViT-L-14-363"}, ValueError, "backbone 'ViT-L-14-363'.*ViT-L-14-336.*timm.list_models"),
        ({"name": "resnet18.no_such_tag"}, ValueError, "'no_such_tag'.*a1_in1k"),
        ({"name": "RN50"}, ValueError, "'RN50' is CLIP's own ResNet"),
        ({"pretrained": "lion"}, ValueError, "'lion' is no known weights tag"),
        ({"name": "ViT-B-16", "pretrained": "lion"}, ValueError, "'lion'.*openai"),
        ({"name": "ViT-M-32", "pretrained": True}, ValueError, "open_clip lists no weights of 'ViT-M-32'"),
        ({"pretrained": "weights/no.pth"}, FileNotFoundError, r"pretrained='weights.no\.pth'"),
        ({"pretrained": "no.safetensors"}, FileNotFoundError, "no.safetensors"),
        ({"pretrained": Path("nowhere")}, FileNotFoundError, "nowhere"),
        ({"pretrained": ""}, FileNotFoundError, "pretrained=''"),
        ({"image_size": 100}, ValueError, r"image_size.*\(16, 16\), got 100.*\[96, 112\]"),
        ({"image_size": (96, 7)}, ValueError, r"image_size.*widths \[16\]"),
        ({"image_size": 0}, ValueError, "image_size must be .*got 0"),
        ({"image_size": (1, 2, 3)}, ValueError, "image_size must be "),
        ({"image_size": 96.0}, ValueError, "image_size must be "),
        ({"name": "xcit_nano_12_p8_224", "image_size": 96}, ValueError, "Xcit works at its native size only"),
        ({"layers": []}, ValueError, "layers must be .*at least one"),
        ({"layers": [1, 1]}, ValueError, r"layers must be distinct.*\[1, 1\]"),
        ({"layers": 5}, ValueError, "layers must be distinct integers.* got 5"),
        ({"layers": [2.0]}, ValueError, r"layers must be distinct integers.* got \[2.0\]"),
        ({"pretrained": 3}, ValueError, "pretrained must be True, False, a weights tag or a file, got 3"),
        ({"layers": [6]}, ValueError, "from 0 to 5.*6"),
        ({"layers": [-1]}, ValueError, "from 0 to 5.*-1"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        create_backbone(**{"name": "test_vit", "pretrained": False} | kwargs)


@pytest.mark.parametrize("shape", [(1, 3, 160, 128), (3, 160, 160), (1, 1, 160, 160)])
def test_images_of_another_shape(shape):
    backbone = create_backbone("test_vit", pretrained=False)
    with pytest.raises(ValueError, match=r"images must have the shape \(B, 3, 160, 160\)"):
        backbone(torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("ViT-B-32", "openaipublic"),
        ("vit_tiny_patch16_224", "model.safetensors of .* timm/vit_tiny_patch16_224.augreg"),
    ],
)
def test_weights_that_cannot_be_fetched_say_where_they_are(name, place, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        WeightsUnavailableError, match=rf"{place}.*pretrained='(openai:)?/path/to/file'.*backbone='musc-tiny'"
    ):
        create_backbone(name)
