# SPDX-License-Identifier: Apache-2.0
"""Ways to compare images: plain torch with several products, one Triton kernel on a GPU."""

from collections.abc import Callable
from typing import Literal, Protocol, get_args

import torch

from anomalib_musc.distances.kernels.int8 import EightBitProduct
from anomalib_musc.distances.kernels.plain import PlainKernel, Product
from anomalib_musc.distances.kernels.products import ConvolutionProduct, FloatProduct, SixteenBitProduct
from anomalib_musc.distances.rounding import Rounding
from anomalib_musc.distances.storage import CACHE_BYTES
from anomalib_musc.distances.tiles import Tile

try:
    from anomalib_musc.distances.kernels import triton_kernel
except ImportError:  # Triton comes with PyTorch for NVIDIA's GPUs
    HAS_TRITON = False
else:
    HAS_TRITON = True

_GPU_BLOCK = 2**29  # bytes of products that fill a GPU

Precision = Literal["exact", "fast"]


class Kernel(Protocol):
    """How the images of one tile are compared with those of another.

    Attributes:
        name: What multiplies, in words.
        rounding: How patches are rounded before.
        can_share: Whether it compares at several degrees with one product.
        mixes_pairs: Whether any pairs of images are compared at once, or one image with others.
        block: How many products are best computed at once.
    """

    name: str
    rounding: Rounding
    can_share: bool
    mixes_pairs: bool
    block: int

    def pair_bytes(self, num_patches: int, *, is_shared: bool) -> int:
        """Return the working memory of comparing an image with one other, with one product for all degrees or not."""

    def compare(
        self,
        left: Tile,
        right: Tile,
        at_once: int,
        targets: tuple[torch.Tensor, torch.Tensor],
        progress: Callable[[int], object] | None,
    ) -> None:
        """Write the squared distances of the patches of every image to those of every other; each pair once.

        Args:
            left: n images.
            right: m others, or the same.
            at_once: Pairs of images that are compared together.
            targets: Where the distances go, ``(D, n, m, L)`` to the right and ``(D, m, n, L)`` to the left; one and the
                same where the tiles are.
            progress: Called with the number of image pairs just compared, each counted once a degree.
        """


def check_precision(precision: str) -> None:
    """Raise a ValueError unless ``precision`` is ``"exact"`` or ``"fast"``."""
    if precision not in get_args(Precision):
        msg = f"precision must be one of {get_args(Precision)}, got {precision!r}."
        raise ValueError(msg)


def make_kernels(precision: Precision, like: torch.Tensor) -> list[Kernel]:
    """Return the kernels of this precision for the device and the type of a tensor; a trial tells the fastest."""
    is_fast = precision == "fast" and like.dtype == torch.float32
    if like.dtype == torch.float32 and HAS_TRITON and triton_kernel.is_usable(like.device):
        return [triton_kernel.TritonKernel(is_half=is_fast)]
    products: list[Product] = [FloatProduct()]
    if ConvolutionProduct.is_supported(like):
        products.append(ConvolutionProduct())
    if is_fast and EightBitProduct.is_supported(like.device):
        products.append(EightBitProduct())
    if is_fast:
        products += [SixteenBitProduct(dtype) for dtype in SixteenBitProduct.supported(like)]
    block = CACHE_BYTES if like.device.type == "cpu" else _GPU_BLOCK
    return [PlainKernel(product, block) for product in products]


def make_batched_kernels(precision: Precision, like: torch.Tensor) -> list[Kernel]:
    """Return the kernels whose operands same-place search multiplies place by place: those that have norms."""
    products: list[Product] = [FloatProduct()]
    if precision == "fast" and like.dtype == torch.float32:
        products += [SixteenBitProduct(dtype) for dtype in SixteenBitProduct.supported(like)]
    return [PlainKernel(product, CACHE_BYTES) for product in products]
