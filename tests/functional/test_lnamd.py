# SPDX-License-Identifier: Apache-2.0
"""Step 1 against the official release's numbers, an independent oracle and its own promises."""

import re

import golden
import numpy as np
import oracle
import pytest
import torch
from seeded import assert_close, randn, to_numpy

from anomalib_musc.functional import lnamd, mutual_scores

ATOL = {torch.float32: 1e-5, torch.float64: 1e-9}


@golden.needs_golden
@pytest.mark.parametrize("name", golden.CHAINS)
def test_lnamd_equals_golden(name: str) -> None:
    chain = golden.load(name)
    for degree in golden.settings(chain)["degrees"]:
        for layer, feature_map in enumerate(golden.feature_maps(chain)):
            actual = lnamd(torch.from_numpy(feature_map), degree)
            assert_close(actual, chain[f"lnamd_r{degree}"][layer], 1e-5)


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("degree", [1, 3, 5])
@pytest.mark.parametrize("shape", [(2, 7, 4, 6), (3, 5, 6, 3), (6, 1, 4, 9), (1, 9, 1, 5), (4, 16, 3, 3)])
def test_lnamd_equals_oracle(shape: tuple[int, ...], degree: int, dtype: torch.dtype) -> None:
    feature_map = 3 * randn(*shape, seed=degree, dtype=dtype) + 0.5
    actual = lnamd(feature_map, degree)
    assert actual.shape == (shape[0], shape[2] * shape[3], shape[1])
    assert_close(actual, oracle.lnamd(to_numpy(feature_map), degree), ATOL[dtype])


def test_lnamd_by_hand() -> None:
    """Mean 0 and variance 1 leave the map alone; zeros pad it, the window's sum has one direction per patch."""
    feature_map = torch.tensor([[[[1.0, -1.0]], [[1.0, -1.0]]]])  # (1, 2, 1, 2)
    root = 0.5**0.5
    assert_close(lnamd(feature_map, 1), np.array([[[root, root], [-root, -root]]]), 1e-6)
    assert_close(lnamd(feature_map, 3), np.zeros((1, 2, 2)), 1e-6)  # both windows hold both patches: they cancel


@pytest.mark.parametrize(("shape", "degree"), [((2, 3, 2, 3), 7), ((3, 4, 1, 1), 5), ((2, 5, 3, 2), 9)])
def test_lnamd_degree_above_the_map(shape: tuple[int, ...], degree: int) -> None:
    feature_map = randn(*shape, seed=4)
    assert_close(lnamd(feature_map, degree), oracle.lnamd(to_numpy(feature_map), degree), 1e-5)


@pytest.mark.parametrize("degree", [1, 3])
def test_lnamd_rows_are_unit_vectors(degree: int) -> None:
    norms = lnamd(randn(3, 8, 5, 4), degree).norm(dim=-1)
    assert_close(norms, np.ones((3, 20)), 1e-5)


@pytest.mark.parametrize("degree", [1, 3, 5])
def test_lnamd_ignores_scale_and_offset_of_an_image(degree: int) -> None:
    feature_map = randn(4, 6, 5, 4)
    scale = torch.tensor([0.5, 2.0, 10.0, 100.0]).view(4, 1, 1, 1)
    offset = torch.tensor([0.0, -1.0, 3.0, 20.0]).view(4, 1, 1, 1)
    assert_close(lnamd(feature_map * scale + offset, degree), lnamd(feature_map, degree), 2e-5)


@pytest.mark.parametrize("degree", [1, 3])
def test_lnamd_treats_images_alone(degree: int) -> None:
    feature_map = randn(5, 6, 4, 3)
    order = torch.tensor([3, 0, 4, 2, 1])
    whole = lnamd(feature_map, degree)
    assert_close(lnamd(feature_map[order], degree), whole[order], 1e-6)
    assert_close(lnamd(feature_map[2:3], degree), whole[2:3], 1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 3.7, -1e4])
@pytest.mark.parametrize("degree", [1, 3, 5])
def test_lnamd_of_a_constant_map_is_finite(value: float, degree: int) -> None:
    features = lnamd(torch.full((2, 3, 4, 5), value), degree)
    assert features.isfinite().all()
    assert (features.norm(dim=-1) <= 1 + 1e-5).all()
    assert mutual_scores(features).isfinite().all()


def test_lnamd_of_zeros_is_zero() -> None:
    assert_close(lnamd(torch.zeros(2, 3, 4, 5), 3), np.zeros((2, 20, 3)), 0)


@pytest.mark.parametrize("degree", [0, -1, -3, 2, 4])
def test_lnamd_refuses_a_degree(degree: int) -> None:
    with pytest.raises(ValueError, match=f"^degree must be .* got {degree}"):
        lnamd(randn(2, 3, 4, 5), degree)


@pytest.mark.parametrize("shape", [(4,), (3, 4, 5), (1, 2, 3, 4, 5)])
def test_lnamd_refuses_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"feature_map must have shape (N, C, H, W), got {shape}")):
        lnamd(randn(*shape), 3)
