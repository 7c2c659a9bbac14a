# SPDX-License-Identifier: Apache-2.0
"""Which activation CLIP runs with: the official release's or the weights' own, in features, pools and checkpoints."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from anomalib.cli import AnomalibCLI
from golden import load, needs_golden
from lightning import Trainer
from runs import assert_same, by_path, predict_loader
from torch.nn import functional as F  # noqa: N812

from anomalib_musc import MuSc, MuScModel
from anomalib_musc.backbones import ALIASES, create_backbone
from anomalib_musc.backbones.factory import Alias
from anomalib_musc.backbones.weights import skip_download

VISION = {"image_size": 32, "layers": 4, "width": 32, "patch_size": 8, "head_width": 16}


@pytest.fixture
def register(tmp_path, monkeypatch):
    """Register a tiny architecture with a tag, under a name that stands for this tag, as the official ones do."""

    def make(
        vision: dict[str, Any] = VISION, tag: str = "openai", embed_dim: int = 12, quick_in: str | None = None
    ) -> str:
        name = f"tiny-clip-{tag}-{quick_in}"
        config = {"embed_dim": embed_dim, "vision_cfg": vision, "quick_gelu": quick_in == "name"}
        text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**config, "text_cfg": text}))
        open_clip.add_model_config(path)
        weights = {"url": "https://localhost/weights.pt", "quick_gelu": quick_in == "tag"}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {tag: weights})
        monkeypatch.setitem(ALIASES, name, Alias(name, tag, vision["image_size"]))
        return name

    return make


def weights_of(name: str, folder: Path) -> Path:
    """A file with random weights of an architecture's image tower, far enough from zero for activations to differ."""
    torch.manual_seed(1)
    state = open_clip.create_model(name, pretrained=None).visual.state_dict()
    torch.save({f"visual.{key}": 1.5 * value for key, value in state.items()}, folder / "weights.pt")
    return folder / "weights.pt"


def tower(path: Path, images: torch.Tensor, *, quick_gelu: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    """CLIP's image tower written out in float64: the tokens of every block and the unit-norm image feature."""
    weights = {key.removeprefix("visual."): value.double() for key, value in torch.load(path).items()}
    width, patch = weights["conv1.weight"].shape[0], weights["conv1.weight"].shape[-1]

    def norm(tokens: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(tokens, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(tokens: torch.Tensor, name: str) -> torch.Tensor:
        return tokens @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    patches = F.conv2d(images.double(), weights["conv1.weight"], stride=patch)
    embedding, grid = weights["positional_embedding"], patches.shape[2:]
    side = int((len(embedding) - 1) ** 0.5)
    places = embedding[1:].T.reshape(1, width, side, side)
    if (side, side) != grid:
        places = F.interpolate(places, grid, mode="bicubic")
    tokens = (patches + places).flatten(2).transpose(1, 2)
    first = (weights["class_embedding"] + embedding[0]).expand(len(images), 1, -1)
    tokens, outputs = norm(torch.cat([first, tokens], dim=1), "ln_pre"), []
    for block in (f"transformer.resblocks.{i}" for i in range(VISION["layers"])):
        normed = norm(tokens, f"{block}.ln_1")
        qkv = normed @ weights[f"{block}.attn.in_proj_weight"].T + weights[f"{block}.attn.in_proj_bias"]
        query, key, value = qkv.unflatten(2, (3, -1, VISION["head_width"])).permute(2, 0, 3, 1, 4)
        attended = (query @ key.transpose(-2, -1) / VISION["head_width"] ** 0.5).softmax(dim=-1) @ value
        tokens = tokens + linear(attended.transpose(1, 2).flatten(2), f"{block}.attn.out_proj")
        hidden = linear(norm(tokens, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        slope = torch.sigmoid(1.702 * hidden) if quick_gelu else (1 + torch.erf(hidden / 2**0.5)) / 2
        tokens = tokens + linear(hidden * slope, f"{block}.mlp.c_proj")
        outputs.append(tokens)
    return outputs, F.normalize(norm(tokens[:, 0], "ln_post") @ weights["proj"], dim=-1)


@needs_golden
@pytest.mark.parametrize(("file", "activation"), [("gelu", None), ("gelu", "official"), ("quickgelu", "weights")])
def test_clip_equals_the_official_release(file, activation, register, tmp_path):
    golden = load(f"clip_visual_{file}")
    native, size, patch, width, heads, depth, embed_dim, _ = (int(value) for value in golden["config"])
    vision = {"image_size": native, "layers": depth, "width": width, "patch_size": patch, "head_width": width // heads}
    name = register(vision, embed_dim=embed_dim)
    weights = {k.removeprefix("param/"): torch.from_numpy(v) for k, v in golden.items() if k.startswith("param/")}
    torch.save(weights, tmp_path / "visual.pt")

    backbone = create_backbone(
        name, pretrained=tmp_path / "visual.pt", image_size=size, layers=[2, 5, 8, 11], activation=activation
    )
    maps, image_feature = backbone(torch.from_numpy(golden["image"]))

    expected = torch.from_numpy(golden["patch_tokens"])[:, :, 1:]
    for feature_map, tokens in zip(maps, expected, strict=True):
        torch.testing.assert_close(feature_map.flatten(2).transpose(1, 2), tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(image_feature, torch.from_numpy(golden["class_token"]), atol=1e-5, rtol=0)


SIZES = [(32, 32), (48, 48), (40, 64), (16, 64), (16, 128)]  # the native one; others, two of them with as many patches


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("tag", "quick_in", "activation", "is_quick"),
    [
        ("openai", None, None, "native"),
        ("openai", None, "official", "native"),
        ("openai", None, "weights", "always"),
        ("openai", "name", None, "always"),
        ("laion", None, None, "never"),
        ("laion", None, "weights", "never"),
        ("laion", "name", "official", "always"),
        ("laion", "tag", None, "never"),
        ("laion", "tag", "weights", "always"),
    ],
)
def test_clip_equals_a_tower_that_is_written_out(tag, quick_in, activation, is_quick, size, register, tmp_path):
    name = register(tag=tag, quick_in=quick_in)
    file = weights_of(name, tmp_path)
    backbone = create_backbone(name, pretrained=file, image_size=size, activation=activation)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    quick_gelu = is_quick == "always" or (is_quick == "native" and size == (32, 32))
    outputs, image_feature = tower(file, images, quick_gelu=quick_gelu)
    maps, ours = backbone(images)
    for feature_map, tokens in zip(maps, outputs, strict=True):
        torch.testing.assert_close(feature_map.flatten(2).mT.double(), tokens[:, 1:], atol=2e-5, rtol=0)
    torch.testing.assert_close(ours.double(), image_feature, atol=1e-5, rtol=0)
    other = tower(file, images, quick_gelu=not quick_gelu)[1]
    assert (other - image_feature).abs().max() > 1e-3


def test_random_weights_of_an_official_name():
    own = create_backbone("ViT-B-32", pretrained=False, image_size=64, activation="weights")
    assert own.activation == own.trained_with == "QuickGELU"
    assert create_backbone("ViT-B-32", pretrained=False, image_size=64).activation == "GELU"
    assert create_backbone("ViT-B-32", pretrained=False, image_size=224).activation == "QuickGELU"


@pytest.mark.parametrize("activation", ["official", "weights"])
@pytest.mark.parametrize("name", ["test_vit", "dino_vitbase16", "musc-tiny", "ViT-B-16-SigLIP"])
def test_other_networks_have_no_choice(name, activation):
    with pytest.raises(ValueError, match=rf"activation='{activation}' is for CLIP.*'{name}' always.*Leave activation"):
        create_backbone(name, pretrained=False, activation=activation)


def test_other_values_and_ones_own_module(own_backbone):
    with pytest.raises(ValueError, match="activation must be 'official', 'weights' or None, got 'gelu'"):
        create_backbone("ViT-B-32", pretrained=False, activation="gelu")
    with pytest.raises(ValueError, match="activation is for backbones given by name; your own OwnBackbone"):
        MuScModel(own_backbone, activation="weights")


def test_the_command_line_takes_it(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    clip = ["--model.backbone", "ViT-B-32", "--model.pretrained", "false", "--model.image_size", "64"]
    arguments = ["predict", "--model", "MuSc", "--data", str(folder), *clip, "--model.activation", "weights"]
    model = AnomalibCLI(args=arguments, run=False).model
    assert (model.model.backbone.activation, model.hparams["activation"]) == ("QuickGELU", "weights")


# --- checkpoints ---------------------------------------------------------------------------------------------------


def checkpoint_of(model: MuSc, path: Path) -> Path:
    trainer = Trainer(logger=False, accelerator="cpu")
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return path


def made_old(path: Path) -> Path:
    """A file as versions wrote it that knew no activation but the weights' own."""
    content = torch.load(path, weights_only=True)
    for part in (content, content["hyper_parameters"]):
        part.pop("activation", None)
    torch.save(content, path)
    return path


@pytest.fixture
def name(register):
    """An architecture with OpenAI's tag; of size 32, and run at 64 by default."""
    name = register()
    ALIASES[name] = Alias(name, "openai", 64)
    return name


def image_feature(model: MuSc) -> torch.Tensor:
    return model.model.extract(torch.linspace(-2, 2, 2 * 3 * 64 * 64).view(2, 3, 64, 64))[1]


@pytest.mark.parametrize("activation", [None, "official", "weights"])
def test_a_checkpoint_keeps_its_activation(activation, name, tmp_path):
    model = MuSc(name, pretrained=weights_of(name, tmp_path), activation=activation)
    path = checkpoint_of(model, tmp_path / "model.ckpt")
    for again in (MuSc.load_from_checkpoint(path), MuSc.load_from_checkpoint(path, activation=None)):
        assert again.model.backbone.activation == ("QuickGELU" if activation == "weights" else "GELU")
        torch.testing.assert_close(image_feature(again), image_feature(model), atol=0, rtol=0)


@pytest.mark.parametrize(("saved", "asked"), [("weights", "official"), ("official", "weights"), (None, "weights")])
def test_a_checkpoint_of_the_other_activation_is_refused(saved, asked, name, tmp_path):
    path = checkpoint_of(MuSc(name, pretrained=False, activation=saved), tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=f"checkpoint's CLIP runs with .*activation='{saved or 'official'}'"):
        MuSc.load_from_checkpoint(path, activation=asked)


def test_a_file_of_the_version_before_computes_what_it_did(name, tmp_path, folder, make_engine):
    weights = weights_of(name, tmp_path)
    plain = {"pretrained": weights, "pre_processor": False}  # whose images are known again when a checkpoint is loaded
    before = MuSc(name, **plain, activation="weights")
    path = made_old(checkpoint_of(before, tmp_path / "old.ckpt"))
    expected = by_path(make_engine().predict(before, data_path=folder))
    loaded = MuSc.load_from_checkpoint(path)
    torch.testing.assert_close(image_feature(loaded), image_feature(before), atol=0, rtol=0)
    saved_again = MuSc.load_from_checkpoint(checkpoint_of(loaded, tmp_path / "again.ckpt"))
    torch.testing.assert_close(image_feature(saved_again), image_feature(before), atol=0, rtol=0)

    model, engine, loader = MuSc(name, **plain), make_engine(), predict_loader(folder)
    today = by_path(engine.predict(model, dataloaders=loader))
    with pytest.raises(AssertionError):
        assert_same(today, expected)
    then = by_path(engine.predict(model, dataloaders=loader, ckpt_path=path))  # of images whose scores are known
    assert_same(then, expected)
    with pytest.raises(ValueError, match=r"runs with QuickGELU, this model's with GELU.*activation='weights'"):
        MuSc.load_from_checkpoint(path, activation="official")


@pytest.mark.parametrize("here", [{}, {"pretrained": False}, {"pretrained": "openai"}])
def test_an_old_file_goes_on_with_what_its_own_tag_was_trained_with(here, tmp_path):
    with skip_download():
        model = MuSc("ViT-B-32", pretrained="laion2b_s34b_b79k", image_size=64, layers=[0])
        path = made_old(checkpoint_of(model, tmp_path / "old.ckpt"))
        loaded = MuSc.load_from_checkpoint(path, **here)
    assert model.model.backbone.activation == loaded.model.backbone.activation == "GELU"


@pytest.mark.parametrize("activation", ["official", "weights"])
def test_a_file_can_be_of_another_tag_than_the_default(activation, register, tmp_path, monkeypatch):
    name = register()
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED[name], "other", {"url": "https://localhost/other.pt"})
    path = weights_of(name, tmp_path)
    backbone = create_backbone(name, pretrained=f"other:{path}", activation=activation)
    assert backbone.activation == "GELU"
    assert create_backbone(name, pretrained=path, activation=activation).activation == "QuickGELU"
    with pytest.raises(ValueError, match="'third' is no known weights tag"):
        create_backbone(name, pretrained=f"third:{path}")
    with pytest.raises(FileNotFoundError, match="is neither a file"):
        create_backbone(name, pretrained="other:/nowhere/weights.pt")


def test_a_file_of_the_version_before_of_another_network(tmp_path):
    model = MuSc("test_vit", pretrained=False, image_size=64)
    path = checkpoint_of(model, tmp_path / "model.ckpt")
    content = torch.load(path, weights_only=True)
    assert "activation" not in content
    content["hyper_parameters"].pop("activation", None)
    torch.save(content, path)
    torch.testing.assert_close(image_feature(MuSc.load_from_checkpoint(path)), image_feature(model), atol=0, rtol=0)


def test_a_backbone_that_is_passed_as_an_object_is_left_as_it_is(name, tmp_path):
    def own(activation: str) -> torch.nn.Module:
        return create_backbone(name, pretrained=False, activation=activation)

    path = made_old(checkpoint_of(MuSc(own("weights")), tmp_path / "own.ckpt"))
    backbone = own("official")
    with pytest.raises(ValueError, match=r"runs with QuickGELU.*activation='weights'"):
        MuSc.load_from_checkpoint(path, backbone=backbone)
    assert backbone.activation == "GELU"
    assert MuSc.load_from_checkpoint(path, backbone=own("weights")).model.backbone.activation == "QuickGELU"
