# SPDX-License-Identifier: Apache-2.0
"""Products in the precision of the patches, or in 16 bits, by the libraries that torch has for them."""

import math

import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_musc.distances.kernels.plain import reuse_buffer
from anomalib_musc.distances.rounding import Encoded, NoRounding, rounded_numbers


class FloatProduct(NoRounding):
    """Products in the precision of the patches, by the BLAS of this torch.

    Patches may have two more channels, half their squared norm and 1, so that a product gives |x - y|² / 2 at once.
    """

    name = "float32 (BLAS)"
    can_share = True
    item_bytes = 4
    result_bytes = 8
    norm_channels = 2

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def write_norms(self, encoded: Encoded, half_norms: torch.Tensor) -> None:
        """See :class:`~anomalib_musc.distances.rounding.Rounding`."""
        encoded[0][..., -2], encoded[0][..., -1] = half_norms, 1

    def __call__(self, x: Encoded, y: Encoded) -> torch.Tensor:
        """See :class:`~anomalib_musc.distances.kernels.plain.Product`."""
        (left,), (right,) = x, y
        return self._multiply(left, right.reshape(-1, right.shape[-1])).view(*right.shape[:2], len(left))

    def _multiply(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return ``y @ x.T``."""
        size = len(y) * len(x)
        self._buffer = reuse_buffer(self._buffer, size, x)
        return torch.mm(y, x.T, out=self._buffer[:size].view(len(y), len(x)))


class ConvolutionProduct(FloatProduct):
    """The same as 1 x 1 convolutions, for oneDNN, which is faster than some BLAS."""

    name = "float32 (oneDNN)"

    @staticmethod
    def is_supported(like: torch.Tensor) -> bool:
        """Whether torch gives such convolutions to oneDNN, as it does on several threads."""
        is_float = like.device.type == "cpu" and like.dtype == torch.float32
        return is_float and torch.get_num_threads() > 1 and has_onednn()

    def _multiply(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        pixels = y.view(1, -1, 1, y.shape[-1]).permute(0, 3, 1, 2)  # (1, C, rows of y, 1), channels last
        return F.conv2d(pixels, x[:, :, None, None])[0, :, :, 0].T


class SixteenBitProduct(NoRounding):
    """Products of 16-bit numbers, which are added in float32 and rounded to 16 bits again.

    Norms are multiplied with the patches, in two numbers each, so that what is rounded in the end is the distance: the
    product is larger, the more so the closer two patches are. It is left in 16 bits, see
    :func:`~anomalib_musc.distances.rounding.smallest`.

    Args:
        dtype: bfloat16, or float16.
    """

    can_share = False
    item_bytes = result_bytes = number_bytes = 2
    norm_channels = 4

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.name = str(dtype).removeprefix("torch.")
        self._buffer = torch.empty(0, dtype=dtype)

    @staticmethod
    def supported(like: torch.Tensor) -> list[torch.dtype]:
        """Return the types that the processor multiplies by instructions of its own."""
        if like.device.type != "cpu" or not has_onednn():
            return []
        if torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"}:
            has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001
            return [torch.bfloat16] if has_bfloat16 else []
        return [torch.float16, torch.bfloat16]  # Arm, where a trial tells

    def allocate(self, patches: torch.Tensor, memory: torch.Tensor | None = None) -> Encoded:
        """See :class:`~anomalib_musc.distances.rounding.Rounding`."""
        return (rounded_numbers(patches, self._dtype, memory),)

    def encode(self, patches: torch.Tensor, out: Encoded) -> None:
        """See :class:`~anomalib_musc.distances.rounding.Rounding`."""
        self._check(out[0].copy_(patches)[..., : -self.norm_channels])

    def decode(self, encoded: Encoded, out: torch.Tensor) -> torch.Tensor:
        """See :class:`~anomalib_musc.distances.rounding.Rounding`."""
        return out.copy_(encoded[0][..., : out.shape[-1]])

    def write_norms(self, encoded: Encoded, half_norms: torch.Tensor) -> None:
        """Write the norms in two numbers each: rounded, and what that left."""
        norms = encoded[0][..., -self.norm_channels :]
        norms[..., 0] = half_norms
        norms[..., 1] = half_norms - norms[..., 0]
        norms[..., 2:] = 1
        self._check(norms)

    def __call__(self, x: Encoded, y: Encoded) -> torch.Tensor:
        """See :class:`~anomalib_musc.distances.kernels.plain.Product`."""
        (left,), (right,) = x, y
        shape = len(right), right.shape[1], len(left)
        size = math.prod(shape)
        self._buffer = reuse_buffer(self._buffer, size, self._buffer)
        products = self._buffer[:size].view(shape)
        torch.mm(right.flatten(0, 1), left.T, out=products.flatten(0, 1))
        return products

    def _check(self, numbers: torch.Tensor) -> None:
        """Raise a ValueError if a number was too large for float16; bfloat16 has the range of float32."""
        if self._dtype == torch.float16 and not numbers.isfinite().all():
            msg = (
                "features must be finite, and small enough for 16-bit numbers; scale them to unit length, or use "
                "precision='exact'."
            )
            raise ValueError(msg)


def has_onednn() -> bool:
    """Whether this torch has oneDNN, and may use it."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
