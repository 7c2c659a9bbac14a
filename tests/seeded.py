# SPDX-License-Identifier: Apache-2.0
"""Seeded numbers, and how close they must be."""

import numpy as np
import torch
from torch.nn.functional import normalize


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return normalize(randn(*shape, seed=seed, dtype=torch.float64), dim=-1).to(dtype)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def assert_close(actual: torch.Tensor, expected: np.ndarray | torch.Tensor, atol: float) -> None:
    expected = to_numpy(expected) if isinstance(expected, torch.Tensor) else expected
    np.testing.assert_allclose(to_numpy(actual), expected, rtol=0, atol=atol)
