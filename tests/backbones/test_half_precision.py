# SPDX-License-Identifier: Apache-2.0
"""Backbones in 16 bits: only in fast precision, only where it is faster, never against a trainer's own precision."""

import logging
import time

import pytest
import torch
from conftest import OwnBackbone, write_products
from seeded import rand

from anomalib_musc import MuSc, MuScModel
from anomalib_musc.backbones.half_precision import agrees

VIT = {"backbone": "vit_small_patch16_224", "pretrained": False, "image_size": 160}


@pytest.fixture(scope="module")
def models() -> tuple[MuScModel, MuScModel]:
    torch.manual_seed(0)
    exact, fast = MuScModel(**VIT), MuScModel(**VIT, precision="fast")
    fast.backbone.load_state_dict(exact.backbone.state_dict())
    return exact, fast


def test_fast_features_are_all_but_those_of_float32(models):
    images = rand(2, 3, 160, 160)
    (exact, tokens), (fast, fast_tokens) = (model.extract(images) for model in models)
    for one, other in zip(exact, fast, strict=True):
        assert other.dtype == torch.float32
        assert torch.cosine_similarity(one, other, dim=1).min() > 0.999
    assert torch.cosine_similarity(tokens, fast_tokens, dim=1).min() > 0.999
    is_half = not torch.equal(exact[-1], fast[-1])
    assert is_half == (models[1].half_precision.trial(models[1].backbone, images).dtype is not None)


def test_exact_features_are_the_backbones_own(models):
    images = rand(1, 3, 160, 160)
    for one, other in zip(models[0].extract(images)[0], models[0].backbone(images)[0], strict=True):
        assert torch.equal(one, other)


def test_it_is_tried_once(models):
    images = rand(3, 3, 160, 160)
    half, backbone = models[1].half_precision, models[1].backbone
    trial = half.trial(backbone, images)
    assert half.trial(backbone, images[:1]) is trial
    assert (trial.gain > 1) == (trial.dtype is not None)


def test_a_trainers_own_precision_wins(models):
    images = rand(2, 3, 160, 160)
    with torch.autocast("cpu", dtype=torch.float16):
        expected = [maps.float() for maps in models[0].backbone(images)[0]]
        found, _ = models[1].extract(images)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


class OnlyFloat32(OwnBackbone):
    """A module that knows no other type."""

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        maps, feature = super().forward(images)
        written = torch.zeros_like(maps[0], dtype=torch.float32)
        written[:, torch.arange(written.shape[1])] = torch.nn.functional.conv2d(
            maps[0], torch.eye(len(maps[0][0]))[..., None, None]
        )
        return [written, *maps[1:]], feature


def test_a_backbone_that_cannot_run_in_16_bits_runs_in_float32():
    images = rand(2, 3, 64, 64)
    exact, fast = (MuScModel(OnlyFloat32(), precision=precision) for precision in ("exact", "fast"))
    assert fast.gain_of_half_precision(images) == 1
    torch.testing.assert_close(fast.extract(images)[0][0], exact.extract(images)[0][0])


class Cancelling(OwnBackbone):
    """Its features are small differences of large products, of which 16 bits keep little."""

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        maps, feature = super().forward(images)
        channels = maps[0].shape[1]
        weight = torch.eye(channels)[..., None, None]
        large = torch.nn.functional.conv2d(maps[0] + 100, weight) - 100
        return [large.to(maps[0].dtype), *maps[1:]], feature


def test_a_backbone_whose_features_change_in_16_bits_runs_in_float32():
    images = rand(2, 3, 64, 64)
    exact, fast = (MuScModel(Cancelling(), precision=precision) for precision in ("exact", "fast"))
    assert fast.gain_of_half_precision(images) == 1
    torch.testing.assert_close(fast.extract(images)[0][0], exact.extract(images)[0][0])


class WithoutImageFeature(OwnBackbone):
    """Its image features are zeros, the same in any type."""

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        maps, feature = super().forward(images)
        return maps, torch.zeros_like(feature)


class OddFeature(OwnBackbone):
    """Its image features have no second dimension."""

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        maps, feature = super().forward(images)
        return maps, feature[:, 0]


def test_features_that_are_zero_are_the_same_and_odd_ones_are_for_others_to_refuse():
    images = rand(1, 3, 64, 64)
    plain, zeros = (agrees(backbone, images, torch.bfloat16) for backbone in (OwnBackbone(), WithoutImageFeature()))
    assert plain == zeros
    assert not agrees(OddFeature(), images, torch.bfloat16)


class SlowAtFirst(OwnBackbone):
    """Its first batch tells how long all of them will take."""

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        assert images.shape[2:] == (64, 64)  # a whole image, or a tile
        if not hasattr(self, "is_warm"):
            self.is_warm = True
            time.sleep(2)
        return super().forward(images)


@pytest.mark.parametrize("tiles", [{}, {"image_size": 96, "tile_size": 64, "tile_overlap": 32}])
def test_a_long_extraction_says_how_long(tiles, tmp_path, make_engine, caplog):
    write_products(tmp_path / "images", range(42))
    model = MuSc(SlowAtFirst(), **tiles, batch_size=1, visualizer=False)
    with caplog.at_level(logging.INFO):
        make_engine().predict(model, data_path=tmp_path / "images")
    assert any("Extracting the other features will take about 8" in record.message for record in caplog.records)
