# SPDX-License-Identifier: Apache-2.0
"""MuScModel in plain torch, and MuSc called like a module."""

import numpy as np
import oracle
import pytest
import torch
from conftest import SIDE, OwnBackbone
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_musc import MuSc, MuScModel, RsCINPostProcessor


@pytest.fixture
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(5, 3, SIDE // 8, SIDE // 8, generator=generator)
    return F.interpolate(coarse, SIDE) + 0.1 * torch.randn(5, 3, SIDE, SIDE, generator=generator)


@pytest.mark.parametrize(("degrees", "interval"), [((1,), (0.0, 0.3)), ((1, 3, 5), (0.1, 3))])
def test_a_batch_is_scored_as_the_equations_say(images, degrees, interval):
    prediction = MuScModel(OwnBackbone(), aggregation_degrees=degrees, interval=interval)(images)
    with torch.no_grad():
        maps, class_tokens = OwnBackbone()(images)
        maps = [maps[0], F.interpolate(maps[1], maps[0].shape[-2:], mode="bilinear")]
    expected = oracle.anomaly_scores(
        [m.double().numpy() for m in maps], class_tokens.double().numpy(), degrees, interval, image_size=SIDE
    )
    np.testing.assert_allclose(prediction.anomaly_map[:, 0], expected.anomaly_maps, atol=1e-4)
    np.testing.assert_allclose(prediction.pred_score, expected.raw_scores, atol=1e-4)
    np.testing.assert_allclose(prediction.class_tokens, class_tokens, atol=1e-6)


def test_musc_called_with_a_pool_gives_final_predictions(images):
    model = MuSc(OwnBackbone(), pre_processor=False, post_processor=RsCINPostProcessor(enable_normalization=False))
    prediction = model(images)
    raw = model.model(images)
    lowest, highest = raw.pred_score.aminmax()
    relative = (prediction.pred_score - lowest) / (highest - lowest)
    np.testing.assert_allclose(relative, oracle.rscin(raw.pred_score, raw.class_tokens), atol=1e-5)
    torch.testing.assert_close(prediction.anomaly_map, raw.anomaly_map)


@pytest.mark.parametrize(("num_images", "num_subsets"), [(20, 3), (10, 2), (17, 1)])
def test_subsets_are_balanced_and_random(num_images, num_subsets):
    tokens = torch.randn(num_images, 8, generator=torch.Generator().manual_seed(0))
    model = MuScModel(OwnBackbone(), num_subsets=num_subsets)
    subsets = model.subsets(tokens)
    assert sorted(index for subset in subsets for index in subset) == list(range(num_images))
    sizes = [len(subset) for subset in subsets]
    assert len(sizes) == num_subsets
    assert max(sizes) - min(sizes) <= 1
    assert subsets == model.subsets(tokens)
    assert num_subsets == 1 or subsets[0] != list(range(sizes[0]))


def test_subsets_do_not_depend_on_the_order_of_the_images():
    tokens = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    model = MuScModel(OwnBackbone(), num_subsets=3)
    shuffled = [sorted(order[subset].tolist()) for subset in model.subsets(tokens[order])]
    assert shuffled == model.subsets(tokens)


def test_subsets_are_never_too_small(caplog):
    model = MuScModel(OwnBackbone(), num_subsets=4)
    assert [len(subset) for subset in model.subsets(torch.randn(14, 8))] == [7, 7]
    assert "num_subsets=4 would leave a pool of 14 images fewer than 5 a subset; using 2" in caplog.text
    assert [len(subset) for subset in model.subsets(torch.randn(3, 8))] == [3]


def test_subsets_are_scored_by_themselves():
    images = torch.randn(12, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    model = MuScModel(OwnBackbone(), num_subsets=2)
    together = model(images)
    _, tokens = model.extract(images)
    for subset in model.subsets(tokens):
        alone = MuScModel(OwnBackbone())(images[subset])
        torch.testing.assert_close(together.anomaly_map[subset], alone.anomaly_map, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_subsets", [0, True, 1.5])
def test_num_subsets_is_a_count(num_subsets):
    with pytest.raises(ValueError, match=f"num_subsets must be a whole number of at least 1, got {num_subsets}"):
        MuScModel(OwnBackbone(), num_subsets=num_subsets)


def test_an_oblong_image_gives_an_oblong_map():
    model = MuScModel("test_vit", pretrained=False, image_size=(48, 80), layers=(1, 3))
    prediction = model(torch.rand(3, 3, 48, 80))
    assert prediction.anomaly_map.shape == (3, 1, 48, 80)


def test_random_weights_are_the_same_ones_each_time():
    torch.manual_seed(5)
    first = MuScModel("test_vit", pretrained=False).state_dict()
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    torch.testing.assert_close(torch.rand(1), expected_next)  # and the user's random state is left alone
    second = MuScModel("test_vit", pretrained=False).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_image_alone_is_refused(images):
    with pytest.raises(ValueError, match="at least 2 images"):
        MuScModel(OwnBackbone())(images[:1])


class Normalised(OwnBackbone):
    """A backbone with a layer that learns from every batch, unless it is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        return super().forward(self.norm(images))


def test_the_backbone_is_frozen(images):
    model = MuScModel(Normalised()).train()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    together, alone = (torch.cat([model.extract(part)[1] for part in images.split(size)]) for size in (len(images), 1))
    torch.testing.assert_close(together, alone)
    assert model.backbone.norm.num_batches_tracked == 0


def test_preparation_is_taken_from_the_backbone():
    transform = MuSc(OwnBackbone()).pre_processor.transform
    assert transform.transforms[0].size == [SIDE, SIDE]
    assert transform.transforms[1].mean == [0.5, 0.5, 0.5]
    clip = MuSc("ViT-B-32", pretrained=False, image_size=64).pre_processor.transform
    assert clip.transforms[0].interpolation.value == "bicubic"
    assert clip.transforms[1].mean[0] == pytest.approx(0.48145466)


@pytest.mark.parametrize(
    ("images", "error", "got"),
    [
        ([np.zeros((8, 8, 3), np.uint8)] * 2, TypeError, "got list"),
        (np.zeros((2, 3, 64, 64)), TypeError, "got ndarray"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), TypeError, r"got torch\.uint8"),
        (torch.zeros(2, 3, 64, 96), ValueError, r"got \(2, 3, 64, 96\)"),
        (torch.zeros(2, 1, 64, 64), ValueError, r"got \(2, 1, 64, 64\)"),
        (torch.zeros(3, 64, 64), ValueError, r"got \(3, 64, 64\)"),
        (torch.zeros(2, 64, 64, 3), ValueError, r"got \(2, 64, 64, 3\)"),
    ],
)
def test_what_it_does_not_take_is_named_with_the_way(images, error, got):
    model = MuScModel("musc-tiny", image_size=64)
    with pytest.raises(error, match=rf"images must be normalised floats of the shape \(N, 3, 64, 64\), {got}.*predict"):
        model(images)
