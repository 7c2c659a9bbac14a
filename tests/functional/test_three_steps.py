# SPDX-License-Identifier: Apache-2.0
"""The three steps in a row, and the manners that they share."""

import subprocess
import sys
from pathlib import Path

import golden
import numpy as np
import oracle
import pytest
import torch
from seeded import assert_close, rand, randn, to_numpy, unit
from torch.nn.functional import interpolate

from anomalib_musc.functional import lnamd, mutual_scores, rscin

LOW_PRECISION = [torch.float16, torch.bfloat16]


@golden.needs_golden
@pytest.mark.parametrize("name", golden.CHAINS)
def test_oracle_equals_golden(name: str) -> None:
    chain = golden.load(name)
    options, maps = golden.settings(chain), golden.feature_maps(chain)
    for degree in options["degrees"]:
        for layer, feature_map in enumerate(maps):
            features = chain[f"lnamd_r{degree}"][layer]
            np.testing.assert_allclose(oracle.lnamd(feature_map, degree), features, rtol=0, atol=1e-6)
            scores = oracle.mutual_scores(features, options["interval"])
            np.testing.assert_allclose(scores, chain[f"msm_r{degree}"][layer], rtol=0, atol=1e-5)
    result = oracle.anomaly_scores(maps, chain["class_tokens"], **options)
    np.testing.assert_allclose(result.patch_scores, chain["patch_scores"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(result.anomaly_maps, chain["anomaly_maps"][:, 0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(result.raw_scores, chain["raw_scores"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(result.rscin_scores, chain["rscin_scores"], rtol=0, atol=1e-5)


def chain_scores(
    maps: list[torch.Tensor],
    class_tokens: torch.Tensor,
    degrees: tuple[int, ...],
    interval: tuple[float, float],
    windows: tuple[int, ...],
    image_size: int | tuple[int, int],
) -> oracle.AnomalyScores:
    """The oracle's chain over the functions under test."""
    num_images, _, height, width = maps[0].shape
    patch_scores = torch.stack([mutual_scores(lnamd(x, r), interval) for r in degrees for x in maps]).mean(0)
    grid = patch_scores.view(num_images, 1, height, width)
    anomaly_maps = interpolate(grid, image_size, mode="bilinear", align_corners=True)[:, 0]
    raw_scores = anomaly_maps.flatten(1).amax(1)
    return oracle.AnomalyScores(patch_scores, anomaly_maps, raw_scores, rscin(raw_scores, class_tokens, windows))


@golden.needs_golden
@pytest.mark.parametrize("name", golden.CHAINS)
def test_chain_equals_golden(name: str) -> None:
    chain = golden.load(name)
    maps = [torch.from_numpy(x) for x in golden.feature_maps(chain)]
    actual = chain_scores(maps, torch.from_numpy(chain["class_tokens"]), **golden.settings(chain))
    assert_close(actual.patch_scores, chain["patch_scores"], 1e-4)
    assert_close(actual.anomaly_maps, chain["anomaly_maps"][:, 0], 1e-4)
    assert_close(actual.raw_scores, chain["raw_scores"], 1e-4)
    assert_close(actual.rscin_scores, chain["rscin_scores"], 1e-4)


def test_chain_on_oblong_maps_equals_oracle() -> None:
    maps = [randn(5, 6, 4, 7, seed=seed) for seed in (1, 2)]
    class_tokens = unit(5, 8, seed=3)
    settings = {"degrees": (1, 3), "interval": (0.0, 0.6), "windows": (1, 2), "image_size": (9, 15)}
    expected = oracle.anomaly_scores([to_numpy(x) for x in maps], to_numpy(class_tokens), **settings)
    for actual, reference in zip(chain_scores(maps, class_tokens, **settings), expected, strict=True):
        assert_close(actual, reference, 1e-4)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2],
)
def test_output_dtype(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert lnamd(randn(2, 3, 4, 5, dtype=dtype), 3).dtype == expected
    assert mutual_scores(unit(3, 4, 5, dtype=dtype)).dtype == expected
    assert rscin(rand(4, dtype=dtype), unit(4, 5, dtype=dtype)).dtype == expected


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_inputs_lose_nothing_more(dtype: torch.dtype) -> None:
    feature_map = 20 * randn(3, 64, 6, 5, dtype=dtype)
    assert_close(lnamd(feature_map, 3), oracle.lnamd(to_numpy(feature_map), 3), 1e-5)
    features = unit(4, 10, 64, dtype=dtype)
    assert_close(mutual_scores(features), oracle.mutual_scores(to_numpy(features)), 1e-4)
    scores, class_tokens = rand(6, dtype=dtype), unit(6, 5, dtype=dtype)
    assert_close(rscin(scores, class_tokens), oracle.rscin(to_numpy(scores), to_numpy(class_tokens)), 1e-5)


def all_three(feature_map: torch.Tensor, features: torch.Tensor, scores: torch.Tensor, class_tokens: torch.Tensor):
    return lnamd(feature_map, 3), mutual_scores(features), rscin(scores, class_tokens)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, ...]:
    """A feature map, features, scores and class tokens."""
    return randn(4, 32, 6, 5), unit(5, 12, 64), rand(6), unit(6, 16, seed=1)


@pytest.fixture
def expected(inputs: tuple[torch.Tensor, ...]) -> tuple[np.ndarray, ...]:
    feature_map, features, scores, class_tokens = map(to_numpy, inputs)
    return oracle.lnamd(feature_map, 3), oracle.mutual_scores(features), oracle.rscin(scores, class_tokens)


def assert_all_close(actual: tuple[torch.Tensor, ...], expected: tuple[np.ndarray, ...]) -> None:
    for result, reference, atol in zip(actual, expected, (1e-5, 1e-4, 1e-5), strict=True):
        assert result.dtype == torch.float32
        assert_close(result, reference, atol)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_autocast_loses_no_precision(inputs, expected, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=dtype):
        assert (torch.eye(2) @ torch.eye(2)).dtype == dtype  # autocast is at work
        assert_all_close(all_three(*inputs), expected)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes(inputs, expected, mode: type) -> None:
    with mode():
        assert_all_close(all_three(*inputs), expected)


def test_inputs_that_require_grad(inputs, expected) -> None:
    assert_all_close(all_three(*(x.requires_grad_() for x in inputs)), expected)


def test_inputs_that_are_not_contiguous(inputs, expected) -> None:
    views = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs[:2]]
    views += [inputs[2].repeat_interleave(2)[::2], inputs[3].T.contiguous().T]
    assert not any(x.is_contiguous() for x in views)
    assert_all_close(all_three(*views), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_inputs_are_left_alone(inputs, dtype: torch.dtype) -> None:
    given = [x.to(dtype) for x in inputs]
    copies = [x.clone() for x in given]
    all_three(*given)
    assert all(torch.equal(x, copy) for x, copy in zip(given, copies, strict=True))


def loaded_by(code: str) -> set[str]:
    """Top-level modules of a fresh interpreter after `code`."""
    report = f"{code}\nimport sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", report], cwd=root, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_functional_needs_torch_alone() -> None:
    code = """
import torch
from anomalib_musc.functional import lnamd, mutual_scores, rscin
rscin(mutual_scores(lnamd(torch.rand(3, 4, 5, 6), 3)).amax(1), torch.rand(3, 7))
"""
    loaded = loaded_by(code)
    assert {"anomalib_musc", "torch"} <= loaded
    heavy = {"anomalib", "lightning", "pytorch_lightning", "timm", "open_clip", "torchvision", "cv2", "pandas"}
    assert not loaded & (heavy | {"sklearn"})


def test_package_alone_does_not_import_torch() -> None:
    loaded = loaded_by("import anomalib_musc")
    assert "anomalib_musc" in loaded
    assert not loaded & {"torch", "anomalib", "lightning"}
