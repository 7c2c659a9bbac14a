# SPDX-License-Identifier: Apache-2.0
"""The nearest patches of many pairs of images in one GPU kernel; imports only where Triton is installed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from anomalib_musc.distances.rounding import Rounding, ScaledParts
from anomalib_musc.distances.tiles import Tile

_INTERPRETED = triton.knobs.runtime.interpret  # on the CPU, to test: TRITON_INTERPRET=1 before Triton is imported
_BLOCK_M = 32 if _INTERPRETED else 128
# Numbers that a slice of pairs writes as the column maxima of its row blocks before they are reduced: 64 MB.
_PARTIAL_NUMBERS = 2**24
_INDEX_DTYPES = {torch.int32, torch.int64}
_CHANNELS = ScaledParts.channel_multiple


@triton.jit(do_not_specialize=["num_patches"])  # so that it is compiled once for every size
def _kernel(
    left: tl.tensor_descriptor | tl.tensor,  # (N * L, parts * C)
    left_scales: tl.tensor,  # (N,)
    left_half_norms: tl.tensor,  # (N, L)
    right: tl.tensor_descriptor | tl.tensor,  # (M * L, parts * C)
    right_scales: tl.tensor,  # (M,)
    right_half_norms: tl.tensor,  # (M, L)
    first: tl.tensor,  # (P,)
    second: tl.tensor,  # (P,)
    rows: tl.tensor,  # (P, L)
    partials: tl.tensor,  # (P, row blocks, L)
    num_patches: int,
    num_channels: int,
    num_parts: tl.constexpr,
    skips_same: tl.constexpr,
    is_described: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    flatten: tl.constexpr,
) -> None:
    # Neighbouring programs are the row blocks of one pair, then of the next: they find their images in the L2 cache.
    # Offsets of images and pairs are 64-bit; those within an image stay 32-bit, which saves registers.
    program = tl.program_id(0).to(tl.int64)
    row_blocks = tl.cdiv(num_patches, block_m)
    pair = program // row_blocks
    i = tl.load(first + pair).to(tl.int64)
    j = tl.load(second + pair).to(tl.int64)

    # A block that passes an image's last patch reads the next image, or the last patch again; an infinite norm makes
    # what it read lose.
    block_start, k = (program % row_blocks).to(tl.int32) * block_m, tl.arange(0, block_k)
    p = block_start + tl.arange(0, block_m)
    norms_i = tl.load(left_half_norms + i * num_patches + p, mask=p < num_patches, other=float("inf"))
    nearest = tl.full((block_m,), float("-inf"), tl.float32)
    scale_i, scale_j = tl.load(left_scales + i), tl.load(right_scales + j)
    width = num_parts * num_channels
    if is_described:
        x, y = (i * num_patches).to(tl.int32) + block_start, (j * num_patches).to(tl.int32)
    else:
        x = left + i * num_patches * width + tl.minimum(p, num_patches - 1)[:, None] * width + k[None, :]
        y = right + j * num_patches * width + k[:, None]
    for start in tl.range(0, num_patches, block_n, flatten=flatten):
        q = start + tl.arange(0, block_n)
        near = tl.minimum(q, num_patches - 1)[None, :] * width
        product = tl.zeros((block_m, block_n), tl.float32)
        # Of two parts each, the large with the large, the large with the small and the small with the large.
        for c in range(0, num_channels if num_parts == 1 else 3 * num_channels, block_k):
            c_i = tl.where(c < num_channels, c, c - num_channels)
            c_j = tl.where(c < 2 * num_channels, c, c - 2 * num_channels)
            if is_described:
                part_i, part_j = left.load([x, c_i]), right.load([y + start, c_j]).T
            else:
                part_i, part_j = tl.load(x + c_i), tl.load(y + near + c_j)
            product = tl.dot(part_i, part_j, product)
        product = product * scale_i * scale_j  # whose product may be too small
        if skips_same:
            product = tl.where(p[:, None] == q[None, :], float("-inf"), product)
        norms_j = tl.load(right_half_norms + j * num_patches + q, mask=q < num_patches, other=float("inf"))
        nearest = tl.maximum(nearest, tl.max(product - norms_j[None, :], axis=1))
        column = tl.max(product - norms_i[:, None], axis=0)
        tl.store(partials + program * num_patches + q, column, mask=q < num_patches)
    tl.store(rows + pair * num_patches + p, nearest, mask=p < num_patches)


def _set_blocks(arguments: dict[str, Any]) -> None:
    """Let descriptors read the blocks of a configuration."""
    if arguments["is_described"]:
        for name, block in (("left", "block_m"), ("right", "block_n")):
            arguments[name].block_shape = [arguments[block], arguments["block_k"]]


def _tuned(*shapes: tuple[int, int, bool, int, int]) -> triton.runtime.Autotuner:
    """Let the kernel try the given (block_n, block_k, flatten, warps, stages) for each (L, C) that it meets."""
    configurations = [
        triton.Config(
            {"block_n": n, "block_k": k, "flatten": flatten}, num_warps=warps, num_stages=stages, pre_hook=_set_blocks
        )
        for n, k, flatten, warps, stages in (((32, 32, False, 1, 1),) if _INTERPRETED else shapes)
    ]
    bench = partial(triton.testing.do_bench, warmup=5, rep=20)  # milliseconds
    return triton.autotune(configurations, key=["num_patches", "num_channels", "num_parts"], do_bench=bench)(_kernel)


# Small blocks leave room for two programs per multiprocessor: one multiplies while the other reduces. Large ones read
# the least per product, and a flattened loop loads the next patches while it reduces these. Every GPU has its own best
# one, and passes over those that need more shared memory than it has.
_TUNED = _tuned((128, 64, False, 4, 3), (128, 64, True, 4, 4), (256, 64, True, 8, 4), (128, 32, False, 8, 4))


class TritonKernel:
    """Compares images in one GPU kernel, which never writes the products to memory.

    Args:
        is_half: Whether patches are rounded to float16, or split into the sum of two such numbers, which three products
            take the place of one for; all are added in float32.
    """

    can_share = False
    mixes_pairs = True
    block = 2**31

    def __init__(self, is_half: bool) -> None:
        self.name = "Triton, float16" if is_half else "Triton, float16 in two parts"
        self.rounding: Rounding = ScaledParts(1 if is_half else 2)

    def pair_bytes(self, num_patches: int, *, is_shared: bool) -> int:
        """See :class:`~anomalib_musc.distances.kernels.Kernel`."""
        del is_shared  # it never is
        num_partials = triton.cdiv(num_patches, _BLOCK_M) * num_patches
        return 4 * (num_partials + 4 * num_patches)

    def compare(
        self,
        left: Tile,
        right: Tile,
        at_once: int,
        targets: tuple[torch.Tensor, torch.Tensor],
        progress: Callable[[int], object] | None,
    ) -> None:
        """See :class:`~anomalib_musc.distances.kernels.Kernel`."""
        (of_left,), (of_right,) = left.half_norms, right.half_norms
        (x, x_scales), (y, y_scales) = left.operands, right.operands
        if right is left:
            pairs = torch.triu_indices(len(x), len(x), 1, device=x.device)
        else:
            pairs = torch.cartesian_prod(*(torch.arange(len(part), device=x.device) for part in (x, y))).T
        for first, second in zip(*(images.split(at_once) for images in pairs), strict=True):
            operands = x, x_scales, of_left, y, y_scales, of_right
            rows, columns = nearest_pairs(*operands, first, second, skips_same=right.is_static)
            targets[0][0, first, second] = (of_left[first] - rows).mul_(2).clamp_min_(0)
            targets[1][0, second, first] = (of_right[second] - columns).mul_(2).clamp_min_(0)
            if progress is not None:
                progress(len(first))


def is_usable(device: torch.device) -> bool:
    """Whether the kernel runs on a device: NVIDIA's GPUs since Ampere, or a CPU under Triton's interpreter."""
    if device.type == "cuda":
        return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    return _INTERPRETED and device.type == "cpu"


def reads_blocks(device: torch.device) -> bool:
    """Whether a GPU reads blocks that a descriptor tells, as since Hopper; others would wait for each of them."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def nearest_pairs(
    left: torch.Tensor,
    left_scales: torch.Tensor,
    left_half_norms: torch.Tensor,
    right: torch.Tensor,
    right_scales: torch.Tensor,
    right_half_norms: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    skips_same: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Find the nearest patches of pairs of images, in both directions (arXiv 2401.16753, section 3.2).

    Of the pair :math:`(i, j)` = ``(first[k], second[k])``, with half norms :math:`h = \lVert x \rVert^2 / 2`:

    .. math:: rows_{kp} = \max_q \; x_{ip} \cdot y_{jq} - h_{jq}, \qquad
              columns_{kq} = \max_p \; x_{ip} \cdot y_{jq} - h_{ip}

    The squared distance of patch p of image i to its nearest patch of image j is
    ``2 * (left_half_norms[i, p] - rows[k, p])``, and ``2 * (right_half_norms[j, q] - columns[k, q])`` is the other
    direction's. Products are accumulated in float32 and never reach the memory of the GPU.

    Args:
        left: Patches x in one or two parts, which add up to them, shape ``(N, L, parts, C)``, contiguous, finite, on
            a GPU, float16; C is a multiple of 64. See :class:`~anomalib_musc.distances.rounding.ScaledParts`.
        left_scales: What the parts of every image are multiplied by, shape ``(N,)``, float32.
        left_half_norms: Half the squared norm of every patch, shape ``(N, L)``, contiguous, float32.
        right: Patches y, shape ``(M, L, parts, C)``.
        right_scales: Likewise, shape ``(M,)``.
        right_half_norms: Likewise, shape ``(M, L)``.
        first: Image i of every pair, shape ``(P,)``, int64 or int32, within ``[0, N)``, which is not checked. Pairs
            run in this order: those next to each other should share images, which then stay in the cache.
        second: Image j of every pair, within ``[0, M)``.
        skips_same: Whether patches at the same place, p = q, are left out.

    Returns:
        ``rows`` and ``columns``, each of shape ``(P, L)``, float32. The first call with an (L, parts, C) times the
        configurations on its pairs; it should hold enough of them to fill the GPU.

    Raises:
        ValueError: If a shape, dtype or memory layout is not as described.
    """
    _check_patches(left, left_scales, left_half_norms, "left")
    _check_patches(right, right_scales, right_half_norms, "right")
    _check_pairs(left, right, first, second)
    num_patches, num_parts, num_channels = left.shape[1:]
    row_blocks = triton.cdiv(num_patches, _BLOCK_M)
    x, y = left.view(-1, num_parts * num_channels), right.view(-1, num_parts * num_channels)
    is_described = reads_blocks(left.device)
    if is_described:
        x, y = (TensorDescriptor.from_tensor(part, [_BLOCK_M, _CHANNELS]) for part in (x, y))  # see _set_blocks
    # Slices begin at multiples of 16, so that their addresses are aligned like the first and need no new compilation.
    step = max(1, _PARTIAL_NUMBERS // (row_blocks * num_patches) // 16) * 16
    first, second = first.contiguous(), second.contiguous()
    sizes = num_patches, num_channels, num_parts, skips_same, is_described, _BLOCK_M
    rows = left_half_norms.new_empty(len(first), num_patches)
    columns = torch.empty_like(rows)
    partials = rows.new_empty(min(step, len(first)), row_blocks, num_patches)
    with torch.cuda.device_of(left):
        for start in range(0, len(first), step):
            pairs = slice(start, start + step)
            part = partials[: len(first[pairs])]
            images = (x, left_scales, left_half_norms, y, right_scales, right_half_norms)
            _TUNED[(len(part) * row_blocks,)](*images, first[pairs], second[pairs], rows[pairs], part, *sizes)
            torch.amax(part, dim=1, out=columns[pairs])
    return rows, columns


def _check_patches(patches: torch.Tensor, scales: torch.Tensor, half_norms: torch.Tensor, name: str) -> None:
    is_batch = patches.ndim == 4 and 0 not in patches.shape and patches.is_contiguous()
    if not is_batch or patches.dtype != torch.float16 or patches.shape[2] > 2 or patches.shape[3] % _CHANNELS:
        msg = (
            f"{name} must be float16, contiguous, of shape (N, L, parts, C), none of them 0, with 1 or 2 parts and C a "
            f"multiple of {_CHANNELS}; got {patches.dtype} of shape {tuple(patches.shape)}."
        )
        raise ValueError(msg)
    for values, what, shape in ((scales, "scales", patches.shape[:1]), (half_norms, "half_norms", patches.shape[:2])):
        if values.shape != shape or values.dtype != torch.float32 or not values.is_contiguous():
            msg = (
                f"{name}_{what} must be float32, contiguous, of shape {tuple(shape)} as the patches; got "
                f"{values.dtype} of shape {tuple(values.shape)}."
            )
            raise ValueError(msg)


def _check_pairs(left: torch.Tensor, right: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> None:
    if left.shape[1:] != right.shape[1:]:
        msg = f"left and right must be of one L, parts and C; got {tuple(left.shape)} and {tuple(right.shape)}."
        raise ValueError(msg)
    if first.ndim != 1 or first.shape != second.shape or not {first.dtype, second.dtype} <= _INDEX_DTYPES:
        got = (f"{index.dtype} of shape {tuple(index.shape)}" for index in (first, second))
        msg = "first and second must be int64 or int32, of one shape (P,); got {} and {}.".format(*got)
        raise ValueError(msg)
