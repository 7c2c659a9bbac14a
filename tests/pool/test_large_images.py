# SPDX-License-Identifier: Apache-2.0
"""Large images in Engine, in Python and on the command line: the common size, what is said, what comes out."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from anomalib.callbacks import TilerConfigurationCallback
from commands import read_paths, run_command
from PIL import Image
from runs import datamodule

from anomalib_musc import MuSc, MuScModel, predict
from anomalib_musc.distances import estimate_seconds
from anomalib_musc.pool.large_images import common_size, slow_search

TILES = {"image_size": (192, 256), "tile_size": 96, "tile_overlap": 32}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Seven textures of 256 x 192, one of 200 x 200, one stored on its side; a spot of six pixels in 3.png."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for index in range(9):
        values = 128 + 12 * generator.standard_normal((192, 256))
        values += 25 * np.sin(np.arange(256) / 4)
        if index == 3:
            values[100:106, 180:186] = 0
        image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")
        if index == 7:
            image = image.resize((200, 200))
        if index == 8:
            exif = Image.Exif()
            exif[0x0112] = 6
            image.transpose(Image.Transpose.ROTATE_90).save(folder / "8.png", exif=exif)
        else:
            image.save(folder / f"{index}.png")
    return folder


def test_the_common_size_is_that_of_most_images_as_viewers_show_them(photographs, tmp_path):
    assert common_size(sorted(photographs.iterdir())) == (192, 256)
    (tmp_path / "none.png").write_bytes(b"no image")
    assert common_size([tmp_path / "none.png"]) is None


def test_a_small_defect_is_found_at_its_place(photographs):
    found = predict(photographs, "musc-tiny", tile_size=96, tile_overlap=32, search_radius=1)
    highest = max(found, key=lambda prediction: prediction.score)
    assert Path(highest.path).name == "3.png"
    row, column = np.unravel_index(highest.anomaly_map.argmax(), highest.anomaly_map.shape)
    assert highest.anomaly_map.shape == (192, 256)
    assert 84 <= row <= 122
    assert 164 <= column <= 202


def test_the_command(photographs, tmp_path):
    arguments = [str(photographs), "--backbone", "musc-tiny", "--tile-size", "96", "--search-radius", "1", "--verbose"]
    done = run_command("anomalib-musc", "predict", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "compared at 192 x 256 pixels, in 9 tiles of 96 x 96" in done.stderr + done.stdout
    assert "1 of 9 images are of another size than 192 x 256 pixels, and were resized to it" in done.stdout
    rows = read_paths(tmp_path / "results/MuSc/v0")
    assert max(rows.values(), key=lambda row: float(row["score"]))["path"].endswith("3.png")
    details = json.loads((tmp_path / "results/MuSc/v0/predictions.json").read_text())
    assert details["settings"]["tile_size"] == 96
    picture = cv2.imread(str(next((tmp_path / "results").rglob("images/**/3.png"))))
    assert picture.shape[1] >= 256


def test_a_long_whole_search_says_how_long_it_takes():
    model, maps = MuScModel("musc-tiny", image_size=2048, tile_size=320), [torch.empty(2, 160, 128, 128)] * 4
    assert "Each of 16384 patches is sought in all of every other image: about " in slow_search(model, maps, 1000)
    assert slow_search(model, [torch.empty(2, 160, 4, 4)], 1) is None
    near = MuScModel("musc-tiny", image_size=2048, tile_size=320, search_radius=2)
    assert slow_search(near, maps, 1000) is None
    seconds = estimate_seconds((16, 20, 20), (1, 3), "exact", torch.device("cpu"))
    larger = estimate_seconds((16, 160, 160), (1, 3), "exact", torch.device("cpu"))
    assert larger > 500 * seconds > 0


@pytest.mark.parametrize("mode", ["mutual", "reference", "both"])
def test_anomalibs_callback_is_the_same_as_the_arguments(mvtec_root, make_engine, mode):
    pools = []
    for arguments, callbacks in (
        (TILES, []),
        ({"image_size": TILES["image_size"]}, [TilerConfigurationCallback(enable=True, tile_size=96, stride=64)]),
    ):
        model = MuSc("musc-tiny", **arguments, mode=mode, search_radius=1, visualizer=False)
        make_engine(callbacks=callbacks).test(model, datamodule=datamodule(mvtec_root))
        assert model.model.tiles.tile_size == (96, 96)
        pools.append(model.pools[0])
    np.testing.assert_allclose(pools[0].patch_scores, pools[1].patch_scores, atol=1e-5)


def test_a_checkpoint_keeps_its_tiles(mvtec_root, make_engine):
    engine = make_engine()
    engine.fit(MuSc("musc-tiny", **TILES, mode="reference", k_shot=2), datamodule=datamodule(mvtec_root))
    loaded = MuSc.load_from_checkpoint(engine.best_model_path)
    assert loaded.model.tiles.stride == (64, 64)
    with pytest.raises(ValueError, match=r"The checkpoint is of another model: .*tile_overlap"):
        MuSc.load_from_checkpoint(engine.best_model_path, tile_overlap=0)
