# SPDX-License-Identifier: Apache-2.0
"""`nearest_pairs` against a float64 product: in Triton's interpreter, and on a GPU where there is one.

This file is also the script that the interpreted test runs, since Triton chooses the interpreter when it is imported.
"""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; it belongs to PyTorch for GPUs.")

from anomalib_musc.distances.kernels import triton_kernel
from anomalib_musc.distances.kernels.triton_kernel import nearest_pairs
from anomalib_musc.functional import layer_scores, mutual_scores

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
PAIRS = [(0, 1), (2, 0), (3, 1), (1, 1), (0, 1)]  # repeated images and pairs, both orders, itself
GPU_RTOL = 5e-5  # tensor cores truncate their float32 sums, at each of up to 1024 / 16 steps
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def images(num: int, patches: int, channels: int, dtype: torch.dtype, opposite: bool = False) -> torch.Tensor:
    """Patches of unequal norms; with ``opposite``, every product of an even image with an odd one is negative."""
    generator = torch.Generator().manual_seed(patches * channels)
    features = torch.randn(num, patches, channels, generator=generator) * channels**-0.5
    if opposite:
        features = features.abs() + 0.1
        features[1::2] *= -1
    return (features * torch.linspace(0.5, 1.5, patches)[:, None]).to(dtype)  # (N, L, C)


def assert_nearest(features: torch.Tensor, first: torch.Tensor, second: torch.Tensor, rtol: float = 1e-5) -> None:
    """Compare with float64; the error of a float32 sum is relative to its terms, here to the largest squared norm."""
    half_norms = features.double().square().sum(dim=-1) / 2  # (N, L)
    left, right = features.clone(), features
    rows, columns = nearest_pairs(left, half_norms.float(), right, half_norms.float(), first, second)
    assert rows.dtype == columns.dtype == torch.float32
    atol = rtol * max(1.0, 2 * half_norms.max().item())
    for k, (i, j) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        product = features[i].double() @ features[j].double().T  # (L, L)
        expected_rows = (product - half_norms[j]).amax(dim=1)
        expected_columns = (product - half_norms[i][:, None]).amax(dim=0)
        torch.testing.assert_close(rows[k].double(), expected_rows, rtol=0, atol=atol)
        torch.testing.assert_close(columns[k].double(), expected_columns, rtol=0, atol=atol)


def check_interpreted() -> None:
    first, second = torch.tensor(PAIRS).T  # not contiguous
    for dtype in DTYPES:
        for shape in [(37, 50), (130, 96), (64, 32), (1, 1)]:
            assert_nearest(images(4, *shape, dtype), first, second)
        negative = images(4, 37, 50, dtype, opposite=True)
        assert (negative[::2].flatten(0, 1).float() @ negative[1::2].flatten(0, 1).float().T < 0).all()
        assert_nearest(negative, torch.tensor([0, 2, 1]), torch.tensor([1, 3, 2]))
        assert_nearest(images(4, 37, 50, dtype), first.int(), second.int())
    few, norms = images(2, 5, 4, torch.float32), torch.ones(2, 5)
    empty = nearest_pairs(few, norms, few, norms, *torch.empty(2, 0, dtype=torch.int64))
    assert [tuple(output.shape) for output in empty] == [(0, 5), (0, 5)]
    check_slices(first, second)
    check_errors()
    check_scores()
    check_descriptors(first, second)


def check_descriptors(first: torch.Tensor, second: torch.Tensor) -> None:
    """Read blocks by descriptors, as since Hopper."""
    triton_kernel.reads_blocks = lambda _: True
    for dtype in DTYPES:
        for shape in [(37, 50), (130, 96), (64, 32), (1, 1)]:
            assert_nearest(images(4, *shape, dtype), first, second)


def check_slices(first: torch.Tensor, second: torch.Tensor) -> None:
    """Force several slices, the last one shorter, by a bound that no slice of 16 pairs meets."""
    triton_kernel._PARTIAL_NUMBERS = 1
    assert_nearest(images(4, 37, 50, torch.float16), first.repeat(5), second.repeat(5))


def check_errors() -> None:
    features, norms, index = torch.ones(2, 5, 4), torch.ones(2, 5), torch.zeros(3, dtype=torch.int64)
    right = (features, norms)
    wrong = [
        ("left must be", (features.double(), norms, *right, index, index)),
        ("left must be", (features.mT.contiguous().mT, norms, *right, index, index)),
        ("left must be", (features[:, :0], norms[:, :0], *right, index, index)),
        ("left_half_norms must be", (features, norms.double(), *right, index, index)),
        ("right_half_norms must be", (*right, features, norms[:1], index, index)),
        ("left and right must be", (features.half(), norms, *right, index, index)),
        ("first and second must be", (*right, *right, index.float(), index)),
        ("first and second must be", (*right, *right, index, index[:2])),
    ]
    for message, arguments in wrong:
        with pytest.raises(ValueError, match=message):
            nearest_pairs(*arguments)


def check_scores() -> None:
    """The interpreter takes the place of a GPU: the scores are those of the plain path."""
    pool = torch.nn.functional.normalize(images(5, 30, 20, torch.float32), dim=-1)
    pool[3] = pool[1]
    plain = mutual_scores(pool.double()).float()
    for budget in (None, 2**-11):  # several tiles, and a file
        torch.testing.assert_close(mutual_scores(pool, memory_budget=budget), plain, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            mutual_scores(pool, precision="fast", memory_budget=budget), plain, rtol=0, atol=5e-4
        )
    with pytest.raises(ValueError, match="16-bit"):
        mutual_scores(pool * 1e5, precision="fast")
    maps = images(5, 30, 300, torch.float32).mT.reshape(5, 300, 5, 6)
    expected = layer_scores(maps.double()).float()
    torch.testing.assert_close(layer_scores(maps), expected, rtol=0, atol=1e-5)


def test_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def on_gpu(*pairs: tuple[int, int]) -> list[torch.Tensor]:
    return list(torch.tensor(pairs, device="cuda").T)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1369, 1024), (257, 768), (130, 96), (37, 50), (1, 1)])
def test_gpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_nearest(images(4, *shape, dtype).cuda(), *on_gpu(*PAIRS), rtol=GPU_RTOL)


@needs_gpu
@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_configurations(dtype: torch.dtype, by_blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every configuration gives the same result, also those that are not the fastest on this GPU."""
    if by_blocks and not triton_kernel.reads_blocks(torch.device("cuda")):
        pytest.skip("this GPU reads no blocks")
    monkeypatch.setattr(triton_kernel, "reads_blocks", lambda _: by_blocks)
    tuner = triton_kernel._SINGLE if dtype == torch.float32 else triton_kernel._HALF
    ran = 0
    for configuration in list(tuner.configs):
        monkeypatch.setattr(tuner, "configs", [configuration])
        for shape in [(600, 384), (300, 50)]:
            try:
                assert_nearest(images(4, *shape, dtype).cuda(), *on_gpu(*PAIRS), rtol=GPU_RTOL)
            except triton_kernel.triton.runtime.errors.OutOfResources:  # of this GPU
                continue
            ran += 1
    assert ran


@needs_gpu
def test_gpu_offsets_beyond_32_bits() -> None:
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GB of free GPU memory")
    features = torch.zeros(2**31 // (1024 * 1024) + 2, 1024, 1024, dtype=torch.float16, device="cuda")
    features[[0, -2, -1]] = images(3, 1024, 1024, torch.float16).cuda()
    last = len(features) - 1
    half_norms = torch.stack([image.float().square().sum(dim=-1) / 2 for image in features])
    pairs = [(0, last), (last - 1, last), (last, 0)]
    rows, columns = nearest_pairs(features, half_norms, features, half_norms, *on_gpu(*pairs))
    used = [0, last - 1, last]
    few = (features[used], half_norms[used])
    same = nearest_pairs(*few, *few, *on_gpu(*[(used.index(i), used.index(j)) for i, j in pairs]))
    torch.testing.assert_close((rows, columns), same, rtol=0, atol=0)


if __name__ == "__main__":
    check_interpreted()
