# SPDX-License-Identifier: Apache-2.0
"""Image files are opened and decoded as few times as anomalib allows, and no image depends on those beside it."""

import sys
import threading
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from conftest import OwnBackbone, product, write_products
from PIL import ImageFile
from runs import by_path, predict_loader
from torch.utils.data import DataLoader

from anomalib_musc import MuSc
from anomalib_musc.pool.reader import PoolReader, ahead
from anomalib_musc.pool.source import PoolSource

_watched: list[Counter[str]] = []


def _count_open(event: str, arguments: tuple) -> None:
    if event == "open" and _watched and isinstance(arguments[0], (str, Path)):
        _watched[-1][Path(arguments[0]).name] += 1


sys.addaudithook(_count_open)  # which cannot be taken back


@pytest.fixture
def opened():
    _watched.append(Counter())
    yield _watched[-1]
    _watched.clear()


@pytest.fixture
def decoded(monkeypatch):
    count: Counter[str] = Counter()
    load = ImageFile.ImageFile.load

    def counted(image):
        if image.tile:  # else its pixels are there already
            count[Path(image.filename).name] += 1
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    return count


@pytest.fixture
def mixed(tmp_path) -> Path:
    """A folder of images of four sizes."""
    paths = write_products(tmp_path / "mixed", range(7))
    for path, size in zip(paths, ((90, 50), (64, 64), (40, 120), (200, 31)), strict=False):
        cv2.imwrite(str(path), cv2.resize(product(int(path.stem))[0], size))
    cv2.imwrite(str(paths[6]), product(6, defect=True)[0])
    return tmp_path / "mixed"


def test_predict_opens_a_file_three_times(mixed, own_backbone, make_engine, opened, decoded):
    names = {path.name for path in mixed.iterdir()}
    assert len(by_path(make_engine().predict(MuSc(own_backbone), data_path=mixed))) == 7
    assert {opened[name] for name in names} == {3}  # for scoring, by anomalib's loop, and for the picture
    assert {decoded[name] for name in names} == {3}


def test_scoring_reads_a_file_once(mixed, opened, decoded):
    names = {path.name for path in mixed.iterdir()}
    dataset = PredictDataset(mixed)
    source = PoolSource(DataLoader(dataset, collate_fn=dataset.collate_fn))
    reader = PoolReader(source, torch.nn.AdaptiveAvgPool2d((8, 8)), lambda images: images, batch_size=3)
    batches = list(reader.batches())
    assert [len(batch.names) for batch in batches] == [3, 3, 1]
    assert {opened[name] for name in names} == {decoded[name] for name in names} == {1}
    sizes = {Path(name).name: size for name, size in reader.findings.sizes.items()}
    assert sizes == {name: cv2.imread(str(mixed / name)).shape[1::-1] for name in names}


@pytest.mark.parametrize(("batch_size", "loader_batch"), [(1, 1), (3, 5), (8, 2), (2, 7)])
def test_no_image_depends_on_those_beside_it(batch_size, loader_batch, mixed, make_engine):
    alone = MuSc(OwnBackbone(), batch_size=1)
    make_engine().predict(alone, data_path=mixed)
    model = MuSc(OwnBackbone(), batch_size=batch_size)
    make_engine().predict(model, dataloaders=predict_loader(mixed, batch_size=loader_batch))
    assert model.pools[0].names == alone.pools[0].names
    torch.testing.assert_close(model.pools[0].patch_scores, alone.pools[0].patch_scores, atol=1e-5, rtol=0)


def test_items_that_are_no_plain_files_do_not_depend_on_each_other_either(mixed, make_engine):
    plain = MuSc(OwnBackbone())
    make_engine().predict(plain, data_path=mixed)
    loader = predict_loader(mixed, batch_size=4)
    loader.dataset.transform = torch.nn.Identity()  # so that the images are no longer those of the files
    model = MuSc(OwnBackbone())
    make_engine().predict(model, dataloaders=loader)
    torch.testing.assert_close(model.pools[0].patch_scores, plain.pools[0].patch_scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True, None])
def test_an_impossible_batch_size_is_named(batch_size, own_backbone):
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1"):
        MuSc(own_backbone, batch_size=batch_size)


def test_ahead_keeps_the_order_and_reads_no_further_than_it_must():
    seen: list[int] = []
    lock = threading.Lock()

    def square(number: int) -> int:
        with lock:
            seen.append(number)
        return number**2

    squares = ahead(square, range(1000))
    assert [next(squares) for _ in range(5)] == [0, 1, 4, 9, 16]
    squares.close()
    assert max(seen) < 50
    assert list(ahead(square, range(30))) == [number**2 for number in range(30)]


def test_what_a_thread_raises_is_raised():
    def fail(number: int) -> int:
        if number == 3:
            msg = "three"
            raise RuntimeError(msg)
        return number

    numbers = ahead(fail, range(10))
    assert [next(numbers) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="three"):
        next(numbers)
    assert not np.any([thread.name.startswith("read images") and thread.is_alive() for thread in threading.enumerate()])
