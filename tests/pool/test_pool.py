# SPDX-License-Identifier: Apache-2.0
"""When a pool is scored anew and when it is taken over: a stale score must never be handed out."""

import cv2
import pytest
import torch
from anomalib.data import ImageBatch, PredictDataset
from anomalib.pre_processing import PreProcessor
from conftest import OwnBackbone, product, write_products
from runs import PathlessDataset, assert_same, by_path, predict_loader
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_musc import MuSc
from anomalib_musc.pool.pool import fingerprint


@pytest.fixture
def predict(make_engine):
    """Predict with one engine, again and again."""
    engine = make_engine()
    return lambda model, loader: by_path(engine.predict(model, dataloaders=loader))


def fresh(predict, loader, **arguments):
    return predict(MuSc(OwnBackbone(), **arguments), loader)


def test_changed_weights_are_noticed(folder, predict):
    model, loader = MuSc(OwnBackbone()), predict_loader(folder)
    before = predict(model, loader)
    other = MuSc(OwnBackbone())
    nn.init.normal_(other.model.backbone.fine.weight)
    model.load_state_dict(other.state_dict())
    after = predict(model, loader)
    assert_same(after, predict(other, loader))
    assert max(abs(after[path][0] - before[path][0]) for path in before) > 1e-3


def test_another_pre_processor_is_noticed(folder, predict):
    class Shift(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.by = by

        def forward(self, image, *mask):
            return (image.clamp_min(self.by), *mask) if mask else image.clamp_min(self.by)

    model, loader = MuSc(OwnBackbone()), predict_loader(folder)
    model.pre_processor = PreProcessor(Compose([Normalize([0.5] * 3, [0.25] * 3), Shift(-1.0)]))
    predict(model, loader)
    model.pre_processor = PreProcessor(Compose([Normalize([0.5] * 3, [0.25] * 3), Shift(0.5)]))
    other = PreProcessor(Compose([Normalize([0.5] * 3, [0.25] * 3), Shift(0.5)]))
    assert_same(predict(model, loader), fresh(predict, loader, pre_processor=other))


def test_a_sampler_makes_a_pool_of_its_own(folder, predict):
    dataset = PredictDataset(folder)
    model = MuSc(OwnBackbone())
    for indices in (range(12), range(4), range(4, 8)):
        loader = DataLoader(dataset, sampler=list(indices), batch_size=3, collate_fn=dataset.collate_fn)
        assert_same(predict(model, loader), fresh(predict, loader))


@pytest.mark.parametrize(
    "wrap", [lambda d: Subset(d, range(6)), lambda d: ConcatDataset([d, d])], ids=["subset", "concat"]
)
def test_files_are_known_inside_wrapped_datasets(wrap, tmp_path, predict):
    paths = write_products(tmp_path / "pile", range(6))
    dataset = PredictDataset(tmp_path / "pile")
    loader = DataLoader(wrap(dataset), batch_size=3, collate_fn=dataset.collate_fn)
    backbone = OwnBackbone()
    model = MuSc(backbone)
    predict(model, loader)
    predict(model, loader)
    assert backbone.num_images == len(loader.dataset)
    cv2.imwrite(str(paths[1]), product(31, defect=True)[0])
    assert_same(predict(model, loader), fresh(predict, loader))


def test_images_without_files_are_taken_over_from_validation_only(folder, make_engine):
    dataset = PathlessDataset(sorted(folder.rglob("*.png")))
    loader = DataLoader(dataset, batch_size=4, collate_fn=ImageBatch.collate)
    backbone = OwnBackbone()
    components = {"post_processor": False, "visualizer": False}
    engine, model = make_engine(), MuSc(backbone, evaluator=False, **components)
    engine.test(model, dataloaders=loader)
    assert backbone.num_images == 12
    dataset.paths = dataset.paths[::-1][:6]
    (first, *_) = engine.predict(model, dataloaders=loader)
    (expected, *_) = make_engine().predict(MuSc(OwnBackbone(), **components), dataloaders=loader)
    torch.testing.assert_close(first.anomaly_map, expected.anomaly_map)


def test_one_loader_given_twice_is_scored_once(folder, make_engine):
    backbone = OwnBackbone()
    loader = predict_loader(folder)
    first, second = make_engine().predict(MuSc(backbone), dataloaders=[loader, loader])
    assert_same(by_path(first), by_path(second))
    assert backbone.num_images == 12


def test_an_iterable_dataset(folder, make_engine):
    class Stream(IterableDataset):
        def __iter__(self):
            dataset = PredictDataset(folder)
            return (dataset[index] for index in range(len(dataset)))

    loader = DataLoader(Stream(), batch_size=5, collate_fn=ImageBatch.collate)
    streamed = make_engine(enable_progress_bar=True).predict(MuSc(OwnBackbone()), dataloaders=loader)
    listed = make_engine().predict(MuSc(OwnBackbone()), dataloaders=predict_loader(folder))
    assert_same(by_path(streamed), by_path(listed))


def test_an_interrupted_run_leaves_a_usable_model(folder, predict):
    class Interrupted(OwnBackbone):
        def forward(self, images):
            if self.num_images == 6:
                self.num_images += 1
                raise RuntimeError("interrupted")
            return super().forward(images)

    model, loader = MuSc(Interrupted(), batch_size=3), predict_loader(folder)
    with pytest.raises(RuntimeError, match="interrupted"):
        predict(model, loader)
    assert_same(predict(model, loader), fresh(predict, loader))


def test_a_fingerprint_is_that_of_the_weights():
    backbone = OwnBackbone()
    before = fingerprint(backbone)
    assert fingerprint(OwnBackbone().train()) == before
    backbone.coarse.bias.data += 1
    assert fingerprint(backbone) != before


def test_checks_look_only_at_the_files_that_are_read(tmp_path, make_engine):
    paths = write_products(tmp_path / "pile", range(8))
    paths[-1].write_bytes(b"broken")
    loader = predict_loader(tmp_path / "pile", num_workers=1)  # whose files cannot be skipped
    assert len(make_engine(limit_predict_batches=4).predict(MuSc(OwnBackbone()), dataloaders=loader)) == 4


def test_a_pre_processor_of_another_size_is_named(folder, make_engine):
    backbone = OwnBackbone()
    model = MuSc(backbone, pre_processor=PreProcessor(Resize((96, 96))))
    with pytest.raises(
        ValueError, match=r"pre_processor gives images of size \(96, 96\), but image_size is \(64, 64\)"
    ):
        make_engine().predict(model, data_path=folder)
    assert backbone.num_images == 0


def test_pictures_of_images_without_paths_are_refused_at_once(folder, make_engine):
    backbone = OwnBackbone()
    loader = DataLoader(PathlessDataset(sorted(folder.rglob("*.png"))), collate_fn=ImageBatch.collate)
    with pytest.raises(ValueError, match="visualizer=False"):
        make_engine().predict(MuSc(backbone), dataloaders=loader)
    assert backbone.num_images == 0


def test_loaders_in_a_dictionary(tmp_path, folder, make_engine):
    write_products(tmp_path / "others", range(40, 46))
    backbone = OwnBackbone()
    loaders = {"one": predict_loader(folder, batch_size=4), "other": predict_loader(tmp_path / "others", batch_size=4)}
    make_engine().validate(MuSc(backbone), dataloaders=loaders)
    assert backbone.num_images == 18
