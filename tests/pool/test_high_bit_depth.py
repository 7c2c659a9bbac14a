# SPDX-License-Identifier: Apache-2.0
"""Grey images of more than 8 bits: one scale for a pool, and a bank's for all that is compared with it."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import ImageItem
from anomalib.data.utils import read_image
from anomalib.post_processing import PostProcessor
from conftest import SIDE, OwnBackbone, grey, product
from PIL import Image
from runs import assert_same, by_path, predict_loader, relative_scores

from anomalib_musc import MuSc, rescore
from anomalib_musc.pool.high_bit_depth import corrected_image, grey_range_of_files, read_image_file


@pytest.mark.parametrize(("bits", "name"), [(16, "{}.png"), (12, "{}.png"), (10, "{}.tif")])
def test_deep_images_score_as_their_8_bit_twins(bits, name, tmp_path, make_engine):
    flat, deep = tmp_path / "flat/x", tmp_path / "deep/x"
    for folder in (flat, deep):
        folder.mkdir(parents=True)
    for seed in range(6):
        values = grey(30 + seed, defect=seed == 0)
        values[0, 0] = 255  # both scales reach their white
        Image.fromarray(values).save(flat / f"{seed}.png")
        white = 2**bits - 1
        Image.fromarray(np.round(values / 255 * white).astype(np.uint16)).save(deep / name.format(seed))
    engine = make_engine()
    ours, twins = (
        {Path(path).stem: item for path, item in by_path(engine.predict(MuSc(OwnBackbone()), data_path=data)).items()}
        for data in (deep, flat)
    )
    assert_same(ours, twins, tolerance=0.02)
    assert max(score for score, _ in ours.values()) > 0.5


def test_fractions_and_colour_are_read_as_they_are(tmp_path):
    fractions = tmp_path / "fraction.tif"
    Image.fromarray((grey(0) / 255).astype(np.float32)).save(fractions)
    colour = tmp_path / "colour.png"
    cv2.imwrite(str(colour), product(0)[0].astype(np.uint16) * 257)
    found, _ = grey_range_of_files([fractions, colour])
    assert found == (0, 1)
    expected = torch.from_numpy(grey(0) / 255).float()
    torch.testing.assert_close(read_image_file(fractions).scaled(found)[0], expected)
    blank = ImageItem(image=torch.zeros(3, SIDE, SIDE), image_path=str(fractions))
    torch.testing.assert_close(corrected_image(blank, found, is_as_stored=True)[0][0], expected)
    file = read_image_file(colour)
    assert not file.has_high_bit_depth
    torch.testing.assert_close(file.scaled(found), read_image(colour, as_tensor=True).as_subclass(torch.Tensor))
    item = ImageItem(image=blank.image, image_path=str(colour))
    assert corrected_image(item, found, is_as_stored=True)[0].max() == 0


def write_deep(folder: Path, seeds: range, brightest: int, *, darker: float = 1.0) -> None:
    """Grey images of 16 bits whose brightest value is that."""
    folder.mkdir(parents=True)
    for seed in seeds:
        values = grey(seed).astype(float)
        Image.fromarray(np.round(values / values.max() * brightest * darker).astype(np.uint16)).save(
            folder / f"{seed}.png"
        )


def test_a_bank_decides_what_is_white(tmp_path, make_engine):
    write_deep(tmp_path / "good/x", range(5), 2100)
    write_deep(tmp_path / "line/x", range(10, 13), 2100, darker=0.97)  # of one bit less, if they were asked
    arguments = {"mode": "reference", "visualizer": False, "prediction_writer": False}
    model = MuSc(OwnBackbone(), references=tmp_path / "good", **arguments)
    engine = make_engine()
    together = by_path(engine.predict(model, data_path=tmp_path / "line"))
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    restored = MuSc.load_from_checkpoint(tmp_path / "model.ckpt", backbone=OwnBackbone())
    for scorer in (model, restored):
        alone = by_path(make_engine().predict(scorer, data_path=tmp_path / "line/x/11.png"))
        (path,) = alone
        assert_same(alone, {path: together[path]})
        assert alone[path][0] < 1


def test_deep_images_need_references_that_say_what_is_white(tmp_path, folder, make_engine):
    write_deep(tmp_path / "line/x", range(10, 13), 2100)
    arguments = {"mode": "reference", "references": folder, "visualizer": False}
    model = MuSc(OwnBackbone(), **arguments)
    with pytest.raises(ValueError, match=r"10\.png has more than 8 bits and the ref.*MuSc\(grey_range="):
        make_engine().predict(model, data_path=tmp_path / "line")
    model = MuSc(OwnBackbone(), **arguments)
    model.model.bank.white.fill_(4095)
    scores = []
    for data in (tmp_path / "line", tmp_path / "line/x/11.png"):
        scores.append(by_path(make_engine().predict(model, data_path=data))[str(tmp_path / "line/x/11.png")][0])
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_deep_images_are_found_whatever_the_sampler(tmp_path, make_engine):
    write_deep(tmp_path / "deep", range(6), 2**16 - 1)
    model = MuSc(OwnBackbone(), visualizer=False)
    plain = by_path(make_engine().predict(model, dataloaders=predict_loader(tmp_path / "deep")))
    sampled = predict_loader(tmp_path / "deep", sampler=list(range(6)))
    found = by_path(make_engine().predict(MuSc(OwnBackbone(), visualizer=False), dataloaders=sampled))
    assert_same(found, plain)


def test_rescoring_sees_them_as_musc_does(tmp_path, make_engine):
    write_deep(tmp_path / "deep", range(8), 2**16 - 1)
    options = {"post_processor": PostProcessor(enable_normalization=False), "visualizer": False}
    predictions = make_engine().predict(MuSc(OwnBackbone(), **options), data_path=tmp_path / "deep")
    musc = MuSc(OwnBackbone(), visualizer=False)
    make_engine().predict(musc, data_path=tmp_path / "deep")
    found = rescore(predictions, OwnBackbone())
    assert found.std() > 0.01
    assert found.tolist() == pytest.approx(relative_scores(musc.pools[0]), abs=1e-6)
