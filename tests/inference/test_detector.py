# SPDX-License-Identifier: Apache-2.0
"""One image after another, in a service: as in a prediction, in any thread, without growth."""

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import SIDE, OwnBackbone, grey, product, write_products
from runs import datamodule

from anomalib_musc import Detector, MuSc, predict


@pytest.fixture(scope="module")
def references():
    return [product(seed)[0] for seed in range(8)]


@pytest.fixture(scope="module")
def detector(references):
    return Detector(OwnBackbone()).fit(references)


def test_it_is_what_a_prediction_gives(detector, references):
    images = [product(20)[0], product(30, defect=True)[0]]
    expected = predict(images, OwnBackbone(), references=references)
    for image, of_pool in zip(images, expected, strict=True):
        found = detector.predict(image)
        assert found.score == pytest.approx(of_pool.score, abs=1e-5)
        assert found.label == of_pool.label
        assert found.raw_score == pytest.approx(of_pool.raw_score, abs=1e-5)
        np.testing.assert_allclose(found.anomaly_map, of_pool.anomaly_map, atol=1e-5)
        np.testing.assert_array_equal(found.mask, of_pool.mask)
        np.testing.assert_array_equal(found.image, image)
    assert found.label == "anomalous"
    assert found.regions


def test_threads_take_turns(detector):
    images = [product(seed, defect=seed % 3 == 0)[0] for seed in range(40, 52)]
    expected = [detector.predict(image).score for image in images]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert [found.score for found in pool.map(detector.predict, images)] == pytest.approx(expected, abs=1e-6)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_memory_does_not_grow(detector):
    image = product(20)[0]
    for _ in range(50):
        detector.predict(image)
    gc.collect()
    before = resident()
    for _ in range(300):
        detector.predict(image)
    gc.collect()
    assert resident() - before < 300 * image.nbytes


def test_files_names_and_sizes(detector, tmp_path):
    (file,) = write_products(tmp_path, range(1))
    assert detector.predict(file).path == str(file)
    assert detector.predict(str(file)).score == pytest.approx(detector.predict(product(0)[0], "x").score, abs=1e-6)
    wide = detector.predict(np.zeros((40, 90, 3), np.uint8), name="wide")
    assert wide.path == "wide"
    assert wide.anomaly_map.shape == wide.mask.shape == (40, 90)


def test_other_references_take_the_place_of_the_first(references):
    detector = Detector(OwnBackbone()).fit([255 - image for image in references])
    assert detector.predict(product(20)[0]).label == "anomalous"
    assert detector.fit(references).predict(product(20)[0]).label == "normal"


def test_a_failed_fit_leaves_the_bank_as_it_was(references, tmp_path):
    detector = Detector(OwnBackbone()).fit(references)
    expected = detector.predict(product(20)[0]).score
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=f"{tmp_path}/bad.png"):
        detector.fit([tmp_path / "bad.png", *references])
    assert detector.predict(product(20)[0]).score == expected


def test_predictions_go_on_while_another_thread_fits(references):
    detector = Detector(OwnBackbone()).fit(references)
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(detector.predict, product(20)[0]) for _ in range(20)]
        fitted = pool.submit(detector.fit, references[:6])
        running += [pool.submit(detector.predict, product(20)[0]) for _ in range(20)]
        assert fitted.result() is detector
        assert all(found.result().score is not None for found in running)


def test_grey_images_of_16_bits():
    images = [grey(seed).astype(np.uint16) * 40 for seed in range(6)]
    detector = Detector(OwnBackbone()).fit(images)
    found = detector.predict(grey(30, defect=True).astype(np.uint16) * 40)
    expected = predict([grey(30, defect=True).astype(np.uint16) * 40], OwnBackbone(), references=images)
    assert found.score == pytest.approx(expected[0].score, abs=1e-5)
    assert found.image.max() > 200


def test_a_checkpoint_needs_no_fit(mvtec_root, make_engine):
    engine, model = make_engine(), MuSc("musc-tiny", image_size=SIDE, mode="reference", visualizer=False)
    engine.fit(model, datamodule=datamodule(mvtec_root))
    detector = Detector(checkpoint=engine.best_model_path)
    image = mvtec_root / "widget/test/scratch/001.png"
    (expected,) = predict(image, checkpoint=engine.best_model_path)
    assert detector.predict(image).score == pytest.approx(expected.score, abs=1e-5)


def test_without_a_bank(mvtec_root, make_engine):
    with pytest.raises(RuntimeError, match=r"Call fit\(images\) first"):
        Detector(OwnBackbone()).predict(product(0)[0])
    engine = make_engine()
    engine.fit(MuSc("musc-tiny", image_size=SIDE, visualizer=False), datamodule=datamodule(mvtec_root))
    with pytest.raises(ValueError, match="holds no bank of references"):
        Detector(checkpoint=engine.best_model_path)
    with pytest.raises(TypeError, match="must be a path, an array, a tensor or Pillow's, got list"):
        Detector(OwnBackbone()).fit([product(0)[0]] * 2).predict([1])
    with pytest.raises(ValueError, match=r"images: .*model\.ckpt is not among the image formats"):
        Detector(OwnBackbone()).fit([product(0)[0], engine.best_model_path])
    with pytest.raises(ValueError, match="device must be one of"):
        Detector(OwnBackbone(), device="abacus")
