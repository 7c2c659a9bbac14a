# SPDX-License-Identifier: Apache-2.0
"""Ways to multiply the patches of images, against float64."""

import numpy as np
import pytest
import torch
from seeded import assert_close, randn, unit

from anomalib_musc.distances.kernels import make_kernels
from anomalib_musc.distances.kernels.int8 import EightBitProduct
from anomalib_musc.distances.kernels.products import ConvolutionProduct, FloatProduct, SixteenBitProduct
from anomalib_musc.distances.rounding import exchange_norms, smallest
from anomalib_musc.distances.tiles import tile_of_maps, tile_of_vectors
from anomalib_musc.distances.trial import fastest
from anomalib_musc.distances.windows import write_unit_vectors

CPU = torch.device("cpu")


def of(encoded, images):
    return tuple(part[images] for part in encoded)


needs_integers = pytest.mark.skipif(not EightBitProduct.is_supported(CPU), reason="this processor has no AVX-512 VNNI")


@needs_integers
@pytest.mark.parametrize("channels", [1, 7, 24, 256, 1000])
def test_eight_bit_products(channels):
    product, images = EightBitProduct(), randn(5, 9, channels)
    prepared = images.clone()
    product.change_basis(prepared)
    assert_close(prepared @ prepared.mT, images @ images.mT, 1e-3)  # the basis changes no product
    encoded = product.allocate(prepared)
    product.encode(prepared, encoded)
    rounded = product.decode(encoded, torch.empty_like(images))
    largest = prepared.abs().amax(dim=-1, keepdim=True)
    assert ((rounded - prepared).abs() <= largest / 254 * 1.001).all()
    expected = torch.stack([image @ rounded[0].T for image in rounded[1:4]])
    np.testing.assert_allclose(product(of(encoded, 0), of(encoded, slice(1, 4))), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("product", [FloatProduct(), ConvolutionProduct()], ids=lambda product: product.name)
def test_both_ways_to_multiply_are_exact(product):
    features = randn(4, 50, 64)
    expected = features[1:4].double() @ features[1].double().T
    assert_close(product((features[1],), (features[1:4],)), expected, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_products(dtype):
    product, images = SixteenBitProduct(dtype), unit(4, 50, 64)
    storage = torch.cat([images, torch.zeros(4, 50, product.norm_channels)], dim=2)
    (operands,) = encoded = product.allocate(storage)
    product.encode(storage, encoded)
    product.write_norms(encoded, torch.full((4, 50), 0.5))
    assert operands.dtype == dtype
    found = product((exchange_norms(operands[1], product.norm_channels),), (operands[1:4],))
    assert found.dtype == dtype
    expected = torch.cdist(images[1:4].double(), images[1].double()).square()
    assert_close(2 * found.float(), expected, 2e-2 if dtype == torch.bfloat16 else 2e-3)
    for dim in (1, 2):
        assert_close(2 * smallest(found, dim).float().clamp_min(0), expected.amin(dim), 2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_smallest_of_numbers_of_any_size(dtype):
    values = (randn(7, 33, 20).abs() * 10.0 ** torch.randint(-4, 4, (7, 33, 20))).to(dtype)
    values[0, :, 3], values[2, 5] = 0, torch.inf
    for dim in (0, 1, 2):
        assert_close(smallest(values, dim), values.amin(dim), 0)
    values[3, 4, 5] = -1e-3  # as rounding makes of a distance of 0
    assert smallest(values, 2)[3, 4] < 0


def test_float16_refuses_what_it_cannot_hold_and_nothing_else():
    product = SixteenBitProduct(torch.float16)
    storage = torch.full((2, 5, 12), 1e30)  # whose channels for norms are not written yet
    storage[..., :8] = unit(2, 5, 8)
    tile_of_vectors(storage, 8, product)
    for size in (1e5, 300):  # too large themselves, or their norms
        storage[..., :8] = size * randn(2, 5, 8)
        with pytest.raises(ValueError, match="small enough for 16-bit numbers"):
            tile_of_vectors(storage, 8, product)


def test_convolutions_are_for_float32_on_several_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert not ConvolutionProduct.is_supported(torch.empty(0))
        torch.set_num_threads(2)
        assert not ConvolutionProduct.is_supported(torch.empty(0, dtype=torch.float64))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("channels", [1, 24, 192, 768])
def test_a_trial_chooses_once_a_process(precision, channels):
    kernel, is_shared = fastest(precision, 49, channels, (1, 3), torch.empty(0))
    again, is_again = fastest(precision, 49, channels, (1, 3), torch.empty(0))
    assert (kernel.name, is_shared) == (again.name, is_again)
    assert kernel.name in {kernel.name for kernel in make_kernels(precision, torch.empty(0))}
    only, _ = fastest("fast", 49, channels, (1,), torch.empty(0, dtype=torch.float64))
    assert only.name == "float32 (BLAS)"  # 64 bits are never rounded


def in_basis(kernel, vectors):
    turned = vectors.clone()
    kernel.rounding.change_basis(turned)
    return turned


def squared_distances(kernel, tile):
    """Those of a tile's images to each other, of one degree: (N, N, L)."""
    (num_images, num_patches), progress = tile.patches.shape[:2], []
    found = torch.full((1, num_images, num_images, num_patches), float("inf"))
    kernel.compare(tile, tile, 2, (found, found), progress.append)
    assert sum(progress) == num_images * (num_images - 1) // 2
    return found[0]


@pytest.mark.parametrize("spread", [1, 0.3, 0.1])
def test_every_kernel_finds_the_same_distances(spread):
    """Whatever a trial chooses, with vectors and with windows that are still to be summed, far apart or close."""
    maps = randn(1, 6, 5, 96) + spread * randn(4, 6, 5, 96)
    vectors = torch.empty(4, 30, 96)
    write_unit_vectors(maps, 3, None, vectors)
    expected = torch.cdist(vectors[1:4].double(), vectors[0].double())
    for kernel in make_kernels("fast", torch.empty(0)):
        storage = torch.cat([in_basis(kernel, vectors), vectors[..., : kernel.rounding.norm_channels]], dim=-1)
        tiles = [tile_of_vectors(storage, 96, kernel.rounding)]
        if kernel.can_share:
            prepared = in_basis(kernel, maps.flatten(1, 2)).view_as(maps)
            tiles.append(tile_of_maps(prepared, (3,), kernel.rounding))
        for tile in tiles:
            before = tile.operands[0].clone()
            distances = squared_distances(kernel, tile).sqrt()
            tolerance = 1e-5 if kernel.name.startswith("float32") else 0.005
            assert_close(distances[0, 1:], expected.amin(dim=1), tolerance)
            assert_close(distances[1:, 0], expected.amin(dim=2), tolerance)
            assert_close(tile.operands[0], before, 0)


def test_large_images_are_compared_some_rows_at_a_time():
    vectors = unit(2, 2100, 16)  # whose products are more than a block
    expected = torch.cdist(vectors[1].double(), vectors[0].double())
    for kernel in make_kernels("fast", torch.empty(0)):
        assert kernel.block < 2100**2
        storage = torch.cat([in_basis(kernel, vectors), vectors[..., : kernel.rounding.norm_channels]], dim=-1)
        tile = tile_of_vectors(storage, 16, kernel.rounding)
        distances = squared_distances(kernel, tile).sqrt()
        tolerance = 1e-4 if kernel.name.startswith("float32") else 0.02
        assert_close(distances[0, 1], expected.amin(dim=0), tolerance)
        assert_close(distances[1, 0], expected.amin(dim=1), tolerance)
