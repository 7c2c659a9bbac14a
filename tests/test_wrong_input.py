# SPDX-License-Identifier: Apache-2.0
"""What is wrong is said in one sentence, with the argument, its value and the way out."""

import threading
from pathlib import Path

import pytest
import torch
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from commands import TINY
from conftest import OwnBackbone, write_products
from lightning.pytorch.callbacks import RichProgressBar
from runs import datamodule
from torch.utils.data import DataLoader, TensorDataset

from anomalib_musc import MuSc


@pytest.mark.parametrize(
    ("loader", "kind"),
    [
        (DataLoader(torch.rand(6, 3, 64, 64), batch_size=2), "Tensor"),
        (DataLoader(TensorDataset(torch.rand(6, 3, 64, 64)), batch_size=2), "list of Tensor"),
        (DataLoader([{"image": torch.rand(3, 64, 64)} for _ in range(4)]), "dict"),
    ],
    ids=["tensors", "tuples", "dictionaries"],
)
def test_a_loader_of_other_things_than_batches(loader, kind, own_backbone, make_engine):
    with pytest.raises(TypeError, match=rf"dataloaders must give anomalib's ImageBatch, got {kind}\. .*ImageItem"):
        make_engine().predict(MuSc(own_backbone, visualizer=False), dataloaders=loader)


class SlowBackbone(OwnBackbone):
    """Waits, with the first images, until another thread has tried."""

    has_begun, may_end = threading.Event(), threading.Event()

    def forward(self, images):
        self.has_begun.set()
        assert self.may_end.wait(60)
        return super().forward(images)


def test_a_model_of_two_threads(tmp_path, folder, make_engine):
    backbone = SlowBackbone()
    model, found = MuSc(backbone, visualizer=False), []
    first = threading.Thread(target=lambda: found.append(make_engine().predict(model, data_path=folder)))
    first.start()
    assert backbone.has_begun.wait(60)
    other = Engine(default_root_dir=tmp_path / "other", enable_progress_bar=False)
    with pytest.raises(RuntimeError, match=r"This MuSc is running in another thread.*a model and an Engine of its own"):
        other.predict(model, data_path=folder)
    backbone.may_end.set()
    first.join()
    assert len(found[0]) == 12  # unharmed
    assert len(other.predict(model, data_path=folder)) == 12  # one after the other is no fault


def test_two_models_in_two_threads_beside_each_other(tmp_path, folder):
    """With Lightning's own progress bars, which draw on one console."""
    found, backbone = {}, SlowBackbone()

    def predict(name: str, model: MuSc) -> None:
        engine = Engine(default_root_dir=tmp_path / name, callbacks=[RichProgressBar(refresh_rate=1)], logger=False)
        found[name] = len(engine.predict(model, data_path=folder))

    first = threading.Thread(target=predict, args=("first", MuSc(backbone, visualizer=False)))
    first.start()
    assert backbone.has_begun.wait(60)
    predict("second", MuSc(OwnBackbone(), visualizer=False))  # begins and ends while the first one goes on
    backbone.may_end.set()
    first.join()
    assert found == {"first": 12, "second": 12}


def test_a_model_is_free_again_after_an_error(tmp_path, folder, make_engine):
    model = MuSc(OwnBackbone(), visualizer=False)
    write_products(tmp_path / "one", range(1))
    failed = []

    def predict_one_image() -> None:
        with pytest.raises(ValueError, match="at least 2 images") as error:
            make_engine().predict(model, data_path=tmp_path / "one")
        failed.append(error)

    thread = threading.Thread(target=predict_one_image)
    thread.start()
    thread.join()
    assert failed
    assert len(make_engine().predict(model, data_path=folder)) == 12


@pytest.mark.parametrize("content", [b"", b"hello world" * 99, b"PK\x03\x04" + bytes(999)])
@pytest.mark.parametrize("backbone", ["test_vit", "ViT-B-32", "musc-tiny"])
def test_weights_that_are_none(content, backbone, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"^pretrained='.*weights.pth' cannot be read as weights .*give a file"
    ) as error:
        MuSc(backbone, pretrained=path)
    assert len(str(error.value).splitlines()) == 1


@pytest.fixture(scope="module")
def checkpoint(mvtec_root, tmp_path_factory):
    """A sound checkpoint."""
    engine = Engine(default_root_dir=tmp_path_factory.mktemp("sound"), enable_progress_bar=False)
    engine.fit(MuSc(**TINY, mode="reference", k_shot=2), datamodule=datamodule(mvtec_root))
    return engine.best_model_path


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "another model's", "no file"])
def test_a_checkpoint_that_is_none(damage, checkpoint, tmp_path, folder, make_engine):
    path = tmp_path / "model.ckpt"
    if damage in ("empty", "cut", "text"):
        whole = Path(checkpoint).read_bytes()
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"hello world" * 99}[damage])
    elif damage == "another model's":
        torch.save({"state_dict": {"weight": torch.ones(1)}, "pytorch-lightning_version": "2.6.0"}, path)
    message = {"another model's": "is no checkpoint of MuSc", "no file": "is no file"}.get(damage, "cannot be read")
    error = (FileNotFoundError, ValueError)
    with pytest.raises(error, match=rf"^ckpt_path='.*model.ckpt' {message}.*Engine.fit has written"):
        MuSc.load_from_checkpoint(path)
    with pytest.raises(error, match=rf"^ckpt_path='.*model.ckpt' {message}"):
        make_engine().predict(MuSc(**TINY), data_path=folder, ckpt_path=path)
    with pytest.raises(error, match=rf"^ckpt_path='.*model.ckpt' {message}"):
        make_engine().export(MuSc(**TINY), ExportType.TORCH, ckpt_path=path)
