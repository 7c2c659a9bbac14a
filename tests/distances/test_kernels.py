# SPDX-License-Identifier: Apache-2.0
"""Ways to multiply the patches of images, against float64."""

import numpy as np
import pytest
import torch
from seeded import assert_close, randn

from anomalib_musc.distances.kernels.int8 import EightBitProduct
from anomalib_musc.distances.kernels.plain import FloatProduct, _convolve, is_convolution_faster

CPU = torch.device("cpu")
needs_integers = pytest.mark.skipif(not EightBitProduct.is_supported(CPU), reason="this processor has no AVX-512 VNNI")


@needs_integers
@pytest.mark.parametrize("channels", [7, 24, 256, 1000])
def test_eight_bit_products(channels):
    product, images = EightBitProduct(), randn(5, 9, channels)
    prepared = product.prepare(images)
    assert_close(prepared @ prepared.mT, images @ images.mT, 1e-3)  # the basis changes no product
    encoded = product.encode(prepared)
    rounded = torch.stack([product.decode(encoded, image) for image in range(5)])
    largest = prepared.abs().amax(dim=-1, keepdim=True)
    assert ((rounded - prepared).abs() <= largest / 254 * 1.001).all()
    expected = torch.stack([image @ rounded[0].T for image in rounded[1:4]])
    np.testing.assert_allclose(product(encoded, 0, encoded, slice(1, 4)), expected, rtol=1e-4, atol=1e-3)


def test_both_ways_to_multiply_are_exact():
    features = randn(4, 50, 64)
    expected = features[1:4].double() @ features[1].double().T
    assert_close(FloatProduct()((features,), 1, (features,), slice(1, 4)), expected, 1e-4)
    assert_close(_convolve(features[1], features[1:4].flatten(0, 1)).view(3, 50, 50), expected, 1e-4)


def test_convolutions_are_for_float32_on_several_threads():
    assert not is_convolution_faster(CPU, torch.float32, 1)
    assert not is_convolution_faster(CPU, torch.float64, 2)
