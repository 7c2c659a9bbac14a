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
from anomalib_musc.distances.rounding import ScaledParts
from anomalib_musc.functional import Precision, layer_scores, mutual_scores

PAIRS = [(0, 1), (2, 0), (3, 1), (1, 1), (0, 1)]  # repeated images and pairs, both orders, itself
GPU_RTOL = 5e-5  # tensor cores truncate their float32 sums, at each of up to 1024 / 16 steps
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def images(num: int, patches: int, channels: int, opposite: bool = False) -> torch.Tensor:
    """Patches of unequal norms; with ``opposite``, every product of an even image with an odd one is negative."""
    generator = torch.Generator().manual_seed(patches * channels)
    features = torch.randn(num, patches, channels, generator=generator) * channels**-0.5
    if opposite:
        features = features.abs() + 0.1
        features[1::2] *= -1
    return features * torch.linspace(0.5, 1.5, patches)[:, None]  # (N, L, C)


def operands_of(features: torch.Tensor, num_parts: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Return what the kernel takes, and what its parts add up to in float64."""
    rounding = ScaledParts(num_parts)
    parts, scales = encoded = rounding.allocate(features)
    rounding.encode(features, encoded)
    values = (parts.double().sum(dim=2) * scales.double()[:, None, None])[..., : features.shape[2]]
    return (parts, scales, (values.square().sum(dim=-1) / 2).float()), values


def assert_nearest(
    features: torch.Tensor, num_parts: int, first: torch.Tensor, second: torch.Tensor, rtol: float = 1e-5
) -> None:
    """Compare with float64; the error of a float32 sum is relative to its terms, here to the largest squared norm."""
    operands, values = operands_of(features, num_parts)
    if num_parts == 2:
        torch.testing.assert_close(values, features.double(), rtol=2**-22, atol=1e-9)
    half_norms = values.square().sum(dim=-1) / 2  # (N, L)
    rows, columns = nearest_pairs(*operands, *(part.clone() for part in operands), first, second)
    assert rows.dtype == columns.dtype == torch.float32
    atol = rtol * 2 * half_norms.max().item()
    for k, (i, j) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        product = values[i] @ values[j].T  # (L, L)
        expected_rows = (product - half_norms[j]).amax(dim=1)
        expected_columns = (product - half_norms[i][:, None]).amax(dim=0)
        torch.testing.assert_close(rows[k].double(), expected_rows, rtol=0, atol=atol)
        torch.testing.assert_close(columns[k].double(), expected_columns, rtol=0, atol=atol)


def check_interpreted() -> None:
    first, second = torch.tensor(PAIRS).T  # not contiguous
    for by_blocks in (False, True):
        triton_kernel.reads_blocks = lambda _, by_blocks=by_blocks: by_blocks
        for num_parts in (1, 2):
            for shape in [(37, 50), (130, 96), (64, 128), (1, 1)]:
                assert_nearest(images(4, *shape), num_parts, first, second)
    for num_parts in (1, 2):
        negative = images(4, 37, 50, opposite=True)
        assert (negative[::2].flatten(0, 1) @ negative[1::2].flatten(0, 1).T < 0).all()
        assert_nearest(negative, num_parts, torch.tensor([0, 2, 1]), torch.tensor([1, 3, 2]))
        sizes = torch.tensor([1e-9, 1e5, 1.0, 1e9])[:, None, None]  # far beyond float16
        assert_nearest(images(4, 37, 50) * sizes, num_parts, torch.arange(4), torch.arange(4))
        assert_nearest(images(4, 37, 50), num_parts, first.int(), second.int())
    few, _ = operands_of(images(2, 5, 4), 1)
    empty = nearest_pairs(*few, *few, *torch.empty(2, 0, dtype=torch.int64))
    assert [tuple(output.shape) for output in empty] == [(0, 5), (0, 5)]
    check_same_places(first, second)
    check_slices(first, second)
    check_errors()
    check_scores()


def check_same_places(first: torch.Tensor, second: torch.Tensor) -> None:
    """The patches at the same place are left out."""
    operands, values = operands_of(images(4, 37, 50), 2)
    half_norms = values.square().sum(dim=-1) / 2
    rows, columns = nearest_pairs(*operands, *operands, first, second, skips_same=True)
    for k, (i, j) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        product = values[i] @ values[j].T
        product.diagonal().fill_(float("-inf"))
        torch.testing.assert_close(rows[k].double(), (product - half_norms[j]).amax(dim=1), rtol=0, atol=1e-5)
        expected = (product - half_norms[i][:, None]).amax(dim=0)
        torch.testing.assert_close(columns[k].double(), expected, rtol=0, atol=1e-5)


def check_slices(first: torch.Tensor, second: torch.Tensor) -> None:
    """Force several slices, the last one shorter, by a bound that no slice of 16 pairs meets."""
    triton_kernel._PARTIAL_NUMBERS = 1
    assert_nearest(images(4, 37, 50), 1, first.repeat(5), second.repeat(5))


def check_errors() -> None:
    parts, scales, norms = torch.ones(2, 5, 1, 64).half(), torch.ones(2), torch.ones(2, 5)
    index = torch.zeros(3, dtype=torch.int64)
    left = right = (parts, scales, norms)
    wrong = [
        ("left must be", ((parts.float(), scales, norms), right, index, index)),
        ("left must be", ((parts.transpose(0, 1), scales, norms), right, index, index)),
        ("left must be", ((parts[..., :50].contiguous(), scales, norms), right, index, index)),
        ("left must be", ((parts[:, :0], scales, norms[:, :0]), right, index, index)),
        ("left must be", ((parts.repeat(1, 1, 3, 1), scales, norms), right, index, index)),
        ("left_scales must be", ((parts, norms, norms), right, index, index)),
        ("left_half_norms must be", ((parts, scales, norms.double()), right, index, index)),
        ("right_half_norms must be", (left, (parts, scales, norms[:1]), index, index)),
        ("left and right must be", ((parts.repeat(1, 1, 2, 1), scales, norms), right, index, index)),
        ("first and second must be", (left, right, index.float(), index)),
        ("first and second must be", (left, right, index, index[:2])),
    ]
    for message, (one, other, first, second) in wrong:
        with pytest.raises(ValueError, match=message):
            nearest_pairs(*one, *other, first, second)


def check_scores() -> None:
    """The interpreter takes the place of a GPU: the scores are those of the plain path."""
    pool = torch.nn.functional.normalize(images(5, 30, 20), dim=-1)
    pool[3] = pool[1]
    plain = mutual_scores(pool.double()).float()
    for budget in (None, 2**-11):  # several tiles, and a file
        torch.testing.assert_close(mutual_scores(pool, memory_budget=budget), plain, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            mutual_scores(pool, precision="fast", memory_budget=budget), plain, rtol=0, atol=5e-4
        )
    for size in (1e-19, 1e-5, 1e5):
        torch.testing.assert_close(mutual_scores(pool * size, precision="fast"), plain * size, rtol=0, atol=5e-4 * size)
    maps = images(5, 30, 300).mT.reshape(5, 300, 5, 6)
    for features in (maps, torch.cat([maps[:1].expand_as(maps)[:, :, :3], maps[:, :, 3:]], dim=2)):  # and a static one
        expected = layer_scores(features.double()).float()
        torch.testing.assert_close(layer_scores(features), expected, rtol=0, atol=1e-5)


def test_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    if "only 0-dimensional arrays can be converted" in done.stderr and "interpreter.py" in done.stderr:
        pytest.skip("the interpreter of this Triton needs NumPy before 2.5")
    assert done.returncode == 0, done.stderr


def on_gpu(*pairs: tuple[int, int]) -> list[torch.Tensor]:
    return list(torch.tensor(pairs, device="cuda").T)


@needs_gpu
@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("shape", [(1369, 1024), (257, 768), (130, 96), (37, 50), (1, 1)])
def test_gpu(shape: tuple[int, int], num_parts: int) -> None:
    assert_nearest(images(4, *shape).cuda(), num_parts, *on_gpu(*PAIRS), rtol=GPU_RTOL)


@needs_gpu
@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize("num_parts", [1, 2])
def test_gpu_configurations(num_parts: int, by_blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every configuration gives the same result, also those that are not the fastest on this GPU."""
    if by_blocks and not triton_kernel.reads_blocks(torch.device("cuda")):
        pytest.skip("this GPU reads no blocks")
    monkeypatch.setattr(triton_kernel, "reads_blocks", lambda _: by_blocks)
    ran = 0
    for configuration in list(triton_kernel._TUNED.configs):
        monkeypatch.setattr(triton_kernel._TUNED, "configs", [configuration])
        for shape in [(600, 384), (300, 50)]:
            try:
                assert_nearest(images(4, *shape).cuda(), num_parts, *on_gpu(*PAIRS), rtol=GPU_RTOL)
            except triton_kernel.triton.runtime.errors.OutOfResources:  # of this GPU
                continue
            ran += 1
    assert ran


@needs_gpu
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_gpu_scores(precision: Precision) -> None:
    """Pools on a GPU and on the host, equal patches, an offset, little memory: as float64 on the host."""
    maps = images(9, 300, 100).mT.reshape(9, 100, 15, 20)
    maps[:, :, :4] = maps[0, :, :1, :1]  # a plain background
    maps[:, :, 4:8] = maps[0, :, 4:8]  # one that does not move
    maps += 5
    expected = layer_scores(maps.double()).float()
    atol = 1e-4 if precision == "exact" else 5e-3
    for features in (maps, maps.cuda()):
        for budget in (None, 0.01):
            for search_radius in (None, 20):
                scores = layer_scores(
                    features, precision=precision, memory_budget=budget, device="cuda", search_radius=search_radius
                )
                torch.testing.assert_close(scores.cpu(), expected, rtol=0, atol=atol)


@needs_gpu
def test_gpu_offsets_beyond_32_bits() -> None:
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GB of free GPU memory")
    (some, _, _), _ = operands_of(images(3, 1024, 1024), 1)
    parts = torch.zeros(2**31 // (1024 * 1024) + 2, 1024, 1, 1024, dtype=torch.float16, device="cuda")
    used = [0, len(parts) - 2, len(parts) - 1]
    parts[used] = some.cuda()
    scales = torch.full((len(parts),), 2.0**-15, device="cuda")
    half_norms = torch.stack([image.float().square().sum(dim=-1)[:, 0] * 2.0**-31 for image in parts])
    pairs = [(0, used[2]), (used[1], used[2]), (used[2], 0)]
    all_of_them = parts, scales, half_norms
    rows, columns = nearest_pairs(*all_of_them, *all_of_them, *on_gpu(*pairs))
    few = tuple(part[used] for part in all_of_them)
    same = nearest_pairs(*few, *few, *on_gpu(*[(used.index(i), used.index(j)) for i, j in pairs]))
    torch.testing.assert_close((rows, columns), same, rtol=0, atol=0)


if __name__ == "__main__":
    check_interpreted()
