# SPDX-License-Identifier: Apache-2.0
"""Exports: torch, ONNX and OpenVINO give what Lightning gives, for images of any size, or say why they cannot."""

from importlib.util import find_spec

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType, ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from runs import datamodule
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize

from anomalib_musc import MuSc
from anomalib_musc.compat.exportable_resize import resize_weights
from anomalib_musc.compat.pre_processor import MultiLoaderPreProcessor

TINY = {"backbone": "test_vit", "pretrained": False, "image_size": 64}
SIZES = [(64, 64), (256, 256), (300, 150), (97, 211), (32, 48)]  # (width, height); the input is 64 x 64


@pytest.fixture(scope="module")
def sized(mvtec_root, tmp_path_factory):
    """Good and broken images of several sizes."""
    folder = tmp_path_factory.mktemp("sized")
    for name in ("good/000", "good/003", "scratch/000", "scratch/002"):
        picture = cv2.imread(str(mvtec_root / f"widget/test/{name}.png"))
        for size in SIZES:
            path = folder / f"{name.replace('/', '')}_{size[0]}x{size[1]}.png"
            cv2.imwrite(str(path), cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST))
    return folder


@pytest.fixture(scope="module")
def fitted(sized, mvtec_root, tmp_path_factory):
    """A model from a checkpoint with a bank and thresholds, its engine, and what Lightning predicts."""
    folder = tmp_path_factory.mktemp("fitted")
    engine = Engine(default_root_dir=folder, enable_progress_bar=False)
    resize = Resize((64, 64), interpolation=InterpolationMode.BICUBIC, antialias=True)
    pre_processor = MultiLoaderPreProcessor(Compose([resize, Normalize([0.5] * 3, [0.5] * 3)]))
    engine.fit(MuSc(**TINY, mode="reference", k_shot=3, pre_processor=pre_processor), datamodule=datamodule(mvtec_root))
    model = MuSc.load_from_checkpoint(engine.best_model_path)
    predictions = engine.predict(model, data_path=sized)
    return model, engine, {batch.image_path[0]: batch for batch in predictions}


def assert_equal_to_lightning(score, label, anomaly_map, mask, expected, tolerance: float) -> None:
    assert float(np.asarray(score).squeeze()) == pytest.approx(expected.pred_score.item(), abs=tolerance)
    np.testing.assert_allclose(np.asarray(anomaly_map).squeeze(), expected.anomaly_map[0].numpy(), atol=tolerance)
    assert bool(np.asarray(label).squeeze()) == bool(expected.pred_label)
    differing = np.asarray(mask).squeeze() != expected.pred_mask[0].numpy()
    near = np.abs(expected.anomaly_map[0].numpy() - 0.5) < 2 * tolerance
    assert not (differing & ~near).any()


@pytest.mark.parametrize("size", [(64, 64), (300, 150), (97, 211), (32, 48), (1, 700)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_two_products_are_torchvisions_resize(mode, size):
    # neither clamps nor rounds what cubic weights let overshoot
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)).round()
    expected = Resize((64, 48), interpolation=InterpolationMode(mode), antialias=True)(image)
    rows, columns = (
        resize_weights(side, wanted, is_cubic=mode == "bicubic") for side, wanted in zip(size, (64, 48), strict=True)
    )
    torch.testing.assert_close(rows @ image @ columns.T, expected, atol=2e-6, rtol=0)


def test_the_pre_processor_is_the_same_everywhere(own_backbone):
    pre_processor = MuSc(own_backbone).pre_processor
    image = torch.rand(1, 3, 300, 150)
    assert torch.equal(pre_processor(image), pre_processor.transform(image))


def test_torch_export(fitted, tmp_path, monkeypatch):
    model, engine, predictions = fitted
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    path = engine.export(model, ExportType.TORCH, export_root=tmp_path)
    inferencer = TorchInferencer(path, device="cpu")
    for image, expected in predictions.items():
        found = inferencer.predict(image)
        assert_equal_to_lightning(
            found.pred_score, found.pred_label, found.anomaly_map, found.pred_mask, expected, tolerance=1e-5
        )


def test_onnx_export(fitted, tmp_path, capfd):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, engine, predictions = fitted
    path = engine.export(model, ExportType.ONNX, export_root=tmp_path)
    assert "Traceback" not in capfd.readouterr().err
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for image, expected in predictions.items():
        pixels = read_image(image, as_tensor=True)[None].numpy()
        found = dict(zip(names, session.run(None, {"input": pixels}), strict=True))
        assert_equal_to_lightning(
            found["pred_score"], found["pred_label"], found["anomaly_map"], found["pred_mask"], expected, tolerance=1e-4
        )


@pytest.fixture(scope="module")
def openvino_export(fitted, tmp_path_factory):
    """The OpenVINO export in float32."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, engine, _ = fitted
    return engine.export(model, ExportType.OPENVINO, export_root=tmp_path_factory.mktemp("openvino"))


def test_openvino_export(openvino_export, fitted, tmp_path, monkeypatch):
    _, _, predictions = fitted
    monkeypatch.chdir(tmp_path)  # the inferencer leaves a cache in the working directory
    inferencer = OpenVINOInferencer(
        openvino_export, config={"INFERENCE_PRECISION_HINT": "f32"}
    )  # else bfloat16, if it can
    for image, expected in predictions.items():
        found = inferencer.predict(image)
        assert_equal_to_lightning(
            found.pred_score, found.pred_label, found.anomaly_map, found.pred_mask, expected, tolerance=1e-4
        )


@pytest.mark.parametrize("export_type", list(ExportType))
def test_no_bank_no_export(export_type, tmp_path, own_backbone, make_engine):
    with pytest.raises(ValueError, match=r"with a bank of reference images, and there is none"):
        make_engine().export(MuSc(own_backbone), export_type, export_root=tmp_path)
    assert not list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("*.onnx")) + list(tmp_path.rglob("*.xml"))


def test_modes_with_a_pool_are_not_exported(tmp_path, mvtec_root, own_backbone, make_engine):
    model, engine = MuSc(own_backbone, mode="both", k_shot=2), make_engine()
    engine.fit(model, datamodule=datamodule(mvtec_root))
    with pytest.raises(ValueError, match=r"mode='both' compares with a pool.* with mode='reference'"):
        engine.export(model, ExportType.TORCH, export_root=tmp_path)


def test_a_bank_by_hand_is_calibrated(tmp_path, mvtec_root, monkeypatch, make_engine):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    model = MuSc(**TINY, mode="reference")
    paths = sorted((mvtec_root / "widget/train/good").glob("*.png"))
    model.model.build_bank([model.pre_processor(read_image(path, as_tensor=True)[None]) for path in paths])
    path = make_engine().export(model, ExportType.TORCH, export_root=tmp_path)
    image = mvtec_root / "widget/test/scratch/000.png"
    found = TorchInferencer(path, device="cpu").predict(image)
    (expected,) = make_engine().predict(model, data_path=image)
    assert_equal_to_lightning(
        found.pred_score, found.pred_label, found.anomaly_map, found.pred_mask, expected, tolerance=1e-5
    )


def test_without_a_post_processor(tmp_path, mvtec_root, monkeypatch, make_engine):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    model, engine = MuSc(**TINY, mode="reference", k_shot=2, post_processor=False), make_engine()
    engine.fit(model, datamodule=datamodule(mvtec_root))
    image = mvtec_root / "widget/test/scratch/000.png"
    found = TorchInferencer(engine.export(model, ExportType.TORCH, export_root=tmp_path), device="cpu").predict(image)
    (expected,) = engine.predict(model, data_path=image)
    torch.testing.assert_close(found.pred_score, expected.pred_score, atol=1e-5, rtol=0)


def test_export_after_predicting_from_a_loader_that_cannot_be_pickled(tmp_path, fitted, sized):
    model, engine, _ = fitted
    dataset = PredictDataset(sized)
    loader = DataLoader(dataset, collate_fn=lambda items: dataset.collate_fn(list(items)))
    engine.predict(model, dataloaders=loader)
    assert engine.export(model, ExportType.TORCH, export_root=tmp_path).is_file()


def test_an_export_after_half_precision_takes_float32(tmp_path, mvtec_root, monkeypatch, make_engine):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    model, engine = MuSc(**TINY, mode="reference", k_shot=2), make_engine(precision="bf16-true")
    engine.fit(model, datamodule=datamodule(mvtec_root))
    path = engine.export(model, ExportType.TORCH, export_root=tmp_path)
    found = TorchInferencer(path, device="cpu").predict(mvtec_root / "widget/test/scratch/000.png")
    assert found.pred_score.dtype == torch.float32


def test_compression_without_nncf(tmp_path, fitted):
    if find_spec("nncf") is not None:
        pytest.skip("nncf is installed")
    model, engine, _ = fitted
    with pytest.raises(ImportError, match="pip install nncf"):
        engine.export(model, ExportType.OPENVINO, export_root=tmp_path, compression_type=CompressionType.INT8)
