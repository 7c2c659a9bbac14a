# SPDX-License-Identifier: Apache-2.0
"""Products of 8-bit integers, on processors that multiply those fast."""

import torch

from anomalib_musc.distances.kernels.plain import reuse_buffer
from anomalib_musc.distances.kernels.products import has_onednn
from anomalib_musc.distances.rounding import Encoded, NoRounding, rounded_numbers

_LARGEST = 127
_SPREAD = 64


class EightBitProduct(NoRounding):
    """Products of 8-bit integers; the largest number of a patch is 127.

    Before, the channels are mixed by an orthogonal matrix, which changes no distance but spreads single large numbers,
    as transformers have them, over 64 channels: the largest number decides the error of all others.
    """

    name = "8-bit integers"
    can_share = True
    number_bytes = 1
    item_bytes = 4
    result_bytes = 8

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.int32)

    @staticmethod
    def is_supported(device: torch.device) -> bool:
        """Whether the processor multiplies 8-bit integers fast and without saturation."""
        return device.type == "cpu" and has_onednn() and torch.cpu._is_vnni_supported()  # noqa: SLF001

    def change_basis(self, patches: torch.Tensor) -> None:
        """Multiply the channels, as far as a power of two divides C, with signs and a Hadamard matrix."""
        channels = patches.shape[-1]
        size = min(channels & -channels, _SPREAD)
        hadamard = patches.new_ones(1, 1)
        while len(hadamard) < size:
            hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
        signs = torch.randint(0, 2, (channels,), generator=torch.Generator().manual_seed(0)) * 2 - 1
        groups = (patches * signs).reshape(-1, size, channels // size).transpose(1, 2)
        patches.copy_((groups @ hadamard / size**0.5).reshape(patches.shape))

    def allocate(self, patches: torch.Tensor, memory: torch.Tensor | None = None) -> Encoded:
        """Return the integers ``(b, L, C)`` and what they are multiplied by, ``(b, L)``."""
        return rounded_numbers(patches, torch.int8, memory), patches.new_empty(patches.shape[:2])

    def encode(self, patches: torch.Tensor, out: Encoded) -> None:
        """See :class:`~anomalib_musc.distances.rounding.Rounding`."""
        integers, scales = out
        largest = patches.abs().amax(dim=-1).clamp_min_(torch.finfo(patches.dtype).tiny * _LARGEST)
        torch.div(largest, _LARGEST, out=scales)
        integers.copy_((patches / scales[..., None]).round_())

    def decode(self, encoded: Encoded, out: torch.Tensor) -> torch.Tensor:
        """See :class:`~anomalib_musc.distances.rounding.Rounding`."""
        integers, scales = encoded
        return torch.mul(integers, scales[..., None], out=out)

    def __call__(self, x: Encoded, y: Encoded) -> torch.Tensor:
        """See :class:`~anomalib_musc.distances.kernels.plain.Product`."""
        (numbers_x, scales_x), (numbers_y, scales_y) = x, y
        count, num_patches, _ = numbers_y.shape
        size = count * num_patches * len(numbers_x)
        self._buffer = reuse_buffer(self._buffer, 2 * size, self._buffer)
        integers, products = self._buffer[: 2 * size].view(2, count, num_patches, len(numbers_x))
        if numbers_x.shape[1] == 1:  # of which torch 2.14 makes something else
            torch.mul(numbers_y.int(), numbers_x[:, 0], out=integers)
        else:
            torch._int_mm(numbers_y.flatten(0, 1), numbers_x.T, out=integers.flatten(0, 1))  # noqa: SLF001
        torch.mul(integers, scales_x, out=products.view(torch.float32))
        return products.view(torch.float32).mul_(scales_y[..., None])
