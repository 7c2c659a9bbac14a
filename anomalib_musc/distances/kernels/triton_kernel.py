# SPDX-License-Identifier: Apache-2.0
"""The nearest patches of many pairs of images in one GPU kernel; imports only where Triton is installed."""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional as F  # noqa: N812
from triton.tools.tensor_descriptor import TensorDescriptor

from anomalib_musc.distances.rounding import NoRounding, Rounding, SixteenBitRounding
from anomalib_musc.distances.tiles import Query, Tile

_INTERPRETED = triton.knobs.runtime.interpret  # on the CPU, to test: TRITON_INTERPRET=1 before Triton is imported
_BLOCK_M = 32 if _INTERPRETED else 128
# Numbers that a slice of pairs writes as the column maxima of its row blocks before they are reduced: 64 MB.
_PARTIAL_NUMBERS = 2**24
_DTYPES = {torch.float16, torch.bfloat16, torch.float32}
_INDEX_DTYPES = {torch.int32, torch.int64}
_CHANNELS = 16  # that are read at once


@triton.jit(do_not_specialize=["num_patches"])  # so that it is compiled once for every size
def _kernel(
    left: tl.tensor_descriptor | tl.tensor,  # (N * L, C)
    left_half_norms: tl.tensor,  # (N, L)
    right: tl.tensor_descriptor | tl.tensor,  # (M * L, C)
    right_half_norms: tl.tensor,  # (M, L)
    first: tl.tensor,  # (P,)
    second: tl.tensor,  # (P,)
    rows: tl.tensor,  # (P, L)
    partials: tl.tensor,  # (P, row blocks, L)
    num_patches: int,
    num_channels: int,
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
    if is_described:
        x, y = (i * num_patches).to(tl.int32) + block_start, (j * num_patches).to(tl.int32)
    else:
        x = left + i * num_patches * num_channels + tl.minimum(p, num_patches - 1)[:, None] * num_channels + k[None, :]
        y = right + j * num_patches * num_channels + k[:, None]
    for start in tl.range(0, num_patches, block_n, flatten=flatten):
        q = start + tl.arange(0, block_n)
        near = tl.minimum(q, num_patches - 1)[None, :] * num_channels
        product = tl.zeros((block_m, block_n), tl.float32)
        for c in range(0, num_channels, block_k):
            if is_described:
                part_i, part_j = left.load([x, c]), right.load([y + start, c]).T
            else:
                part_i = tl.load(x + c, mask=c + k[None, :] < num_channels, other=0.0)
                part_j = tl.load(y + near + c, mask=c + k[:, None] < num_channels, other=0.0)
            product = tl.dot(part_i, part_j, product, input_precision="tf32x3")  # exact as float32, on tensor cores
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
    """Let the kernel try the given (block_n, block_k, flatten, warps, stages) for each (L, C, dtype) that it meets."""
    configurations = [
        triton.Config(
            {"block_n": n, "block_k": k, "flatten": flatten}, num_warps=warps, num_stages=stages, pre_hook=_set_blocks
        )
        for n, k, flatten, warps, stages in (((32, 32, False, 1, 1),) if _INTERPRETED else shapes)
    ]
    bench = partial(triton.testing.do_bench, warmup=5, rep=20)  # milliseconds
    return triton.autotune(configurations, key=["num_patches", "num_channels"], do_bench=bench)(_kernel)


# Small blocks leave room for two programs per multiprocessor: one multiplies while the other reduces. Large ones read
# the least per product, and a flattened loop loads the next patches while it reduces these. Every GPU has its own best
# one, and passes over those that need more shared memory than it has.
_HALF = _tuned((128, 64, False, 4, 3), (128, 64, True, 4, 4), (256, 64, True, 8, 4), (128, 32, False, 8, 4))
_SINGLE = _tuned((64, 32, False, 4, 3), (128, 32, False, 8, 3), (64, 16, False, 4, 3))


class TritonKernel:
    """Compares images in one GPU kernel, which never writes the products to memory.

    Args:
        is_half: Whether 16-bit numbers are multiplied; their products are added in float32.
    """

    can_share = False
    block = 2**31

    def __init__(self, is_half: bool) -> None:
        self.name = "Triton, 16 bits" if is_half else "Triton"
        self.rounding: Rounding = SixteenBitRounding() if is_half else NoRounding()

    def pair_bytes(self, num_patches: int, *, is_shared: bool) -> int:
        """See :class:`~anomalib_musc.distances.kernels.Kernel`."""
        del is_shared  # it never is
        num_partials = triton.cdiv(num_patches, _BLOCK_M) * num_patches
        return 4 * (num_partials + 4 * num_patches)

    def query(self, left: Tile, image: int) -> Query:
        """See :class:`~anomalib_musc.distances.kernels.Kernel`."""
        return partial(self._compare, left, image)

    def _compare(self, left: Tile, image: int, right: Tile, images: slice) -> tuple[torch.Tensor, torch.Tensor]:
        (x,), (y,) = left.operands, right.operands
        (left_half_norms,), (right_half_norms,) = left.half_norms, right.half_norms
        second = torch.arange(images.start, images.stop, device=x.device)
        first = torch.full_like(second, image)
        rows, columns = nearest_pairs(x, left_half_norms, y, right_half_norms, first, second)
        to_right, to_left = left_half_norms[image] - rows, right_half_norms[images] - columns
        return to_right.mul_(2).clamp_min_(0)[None], to_left.mul_(2).clamp_min_(0)[None]


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
    left_half_norms: torch.Tensor,
    right: torch.Tensor,
    right_half_norms: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Find the nearest patches of pairs of images, in both directions (arXiv 2401.16753, section 3.2).

    Of the pair :math:`(i, j)` = ``(first[k], second[k])``, with half norms :math:`h = \lVert x \rVert^2 / 2`:

    .. math:: rows_{kp} = \max_q \; x_{ip} \cdot y_{jq} - h_{jq}, \qquad
              columns_{kq} = \max_p \; x_{ip} \cdot y_{jq} - h_{ip}

    The squared distance of patch p of image i to its nearest patch of image j is
    ``2 * (left_half_norms[i, p] - rows[k, p])``, and ``2 * (right_half_norms[j, q] - columns[k, q])`` is the other
    direction's. Products are accumulated in float32 and never reach the memory of the GPU.

    Args:
        left: Patches x, shape ``(N, L, C)``, contiguous, finite, on a GPU; float16, bfloat16 or float32.
        left_half_norms: Half the squared norm of every patch, shape ``(N, L)``, contiguous, float32.
        right: Patches y, shape ``(M, L, C)``, of the same type.
        right_half_norms: Likewise, shape ``(M, L)``.
        first: Image i of every pair, shape ``(P,)``, int64 or int32, within ``[0, N)``, which is not checked. Pairs
            run in this order: those next to each other should share images, which then stay in the cache.
        second: Image j of every pair, within ``[0, M)``.

    Returns:
        ``rows`` and ``columns``, each of shape ``(P, L)``, float32. The first call with an (L, C, dtype) times the
        configurations on its pairs; it should hold enough of them to fill the GPU.

    Raises:
        ValueError: If a shape, dtype or memory layout is not as described.
    """
    _check_patches(left, left_half_norms, "left")
    _check_patches(right, right_half_norms, "right")
    _check_pairs(left, right, first, second)
    num_patches = left.shape[1]
    row_blocks = triton.cdiv(num_patches, _BLOCK_M)
    if _INTERPRETED and left.dtype == torch.bfloat16:
        left, right = left.float(), right.float()  # the interpreter would multiply bit patterns
    num_channels = left.shape[2] + -left.shape[2] % _CHANNELS
    is_described = reads_blocks(left.device)
    x, y = (_rows(patches, num_channels, is_described) for patches in (left, right))
    # Slices begin at multiples of 16, so that their addresses are aligned like the first and need no new compilation.
    step = max(1, _PARTIAL_NUMBERS // (row_blocks * num_patches) // 16) * 16
    first, second = first.contiguous(), second.contiguous()
    kernel = _SINGLE if left.dtype == torch.float32 else _HALF

    sizes = num_patches, num_channels, is_described, _BLOCK_M
    rows = left_half_norms.new_empty(len(first), num_patches)
    columns = torch.empty_like(rows)
    partials = rows.new_empty(min(step, len(first)), row_blocks, num_patches)
    with torch.cuda.device_of(left):
        for start in range(0, len(first), step):
            pairs = slice(start, start + step)
            part = partials[: len(first[pairs])]
            operands = (x, left_half_norms, y, right_half_norms, first[pairs], second[pairs])
            kernel[(len(part) * row_blocks,)](*operands, rows[pairs], part, *sizes)
            torch.amax(part, dim=1, out=columns[pairs])
    return rows, columns


def _rows(patches: torch.Tensor, num_channels: int, is_described: bool) -> TensorDescriptor | torch.Tensor:
    """Return patches ``(N, L, C)`` as the kernel reads them; copied where rows would begin at uneven addresses."""
    rows = patches.flatten(0, 1)
    if num_channels > rows.shape[1]:
        rows = F.pad(rows, (0, num_channels - rows.shape[1]))
    return TensorDescriptor.from_tensor(rows, [_BLOCK_M, _CHANNELS]) if is_described else rows


def _check_patches(patches: torch.Tensor, half_norms: torch.Tensor, name: str) -> None:
    is_batch = patches.ndim == 3 and 0 not in patches.shape and patches.is_contiguous()
    is_norms = half_norms.shape == patches.shape[:2] and half_norms.is_contiguous()
    got = f"got {patches.dtype} of shape {tuple(patches.shape)}"
    if not is_batch or patches.dtype not in _DTYPES:
        msg = f"{name} must be float16, bfloat16 or float32, contiguous, of shape (N, L, C), none of them 0; {got}."
        raise ValueError(msg)
    if not is_norms or half_norms.dtype != torch.float32:
        got += f", half norms {half_norms.dtype} of shape {tuple(half_norms.shape)}"
        msg = f"{name}_half_norms must be float32, contiguous, of shape (N, L) as the patches; {got}."
        raise ValueError(msg)


def _check_pairs(left: torch.Tensor, right: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> None:
    if left.dtype != right.dtype or left.shape[1:] != right.shape[1:]:
        got = (f"{patches.dtype} of shape {tuple(patches.shape)}" for patches in (left, right))
        msg = "left and right must be of one dtype, L and C; got {} and {}.".format(*got)
        raise ValueError(msg)
    if first.ndim != 1 or first.shape != second.shape or not {first.dtype, second.dtype} <= _INDEX_DTYPES:
        got = (f"{index.dtype} of shape {tuple(index.shape)}" for index in (first, second))
        msg = "first and second must be int64 or int32, of one shape (P,); got {} and {}.".format(*got)
        raise ValueError(msg)
