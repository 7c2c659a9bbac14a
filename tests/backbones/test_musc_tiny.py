# SPDX-License-Identifier: Apache-2.0
"""``musc-tiny``: the network of the package and its weights."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.deploy import ExportType, TorchInferencer
from anomalib.engine import Engine
from conftest import SHARED
from PIL import Image
from pools import UNSEEN, draw_material, draw_pool
from runs import datamodule
from safetensors.torch import load_file, save_file
from validation import Labelled, dataset_products, evaluate, models

from anomalib_musc import MuSc
from anomalib_musc.backbones import WeightsMismatchError, create_backbone
from anomalib_musc.backbones.tiny import IMAGE_SIZE, WEIGHTS

ROOT = Path(__file__).resolve().parents[2]


class TestNetwork:
    def test_weights_are_small_and_half_precision(self):
        assert WEIGHTS.stat().st_size <= 8 * 2**20
        assert {tensor.dtype for tensor in load_file(WEIGHTS).values()} == {torch.float16}

    def test_weights_are_in_the_wheel(self, tmp_path):
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        (wheel,) = tmp_path.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            assert archive.read("anomalib_musc/backbones/musc_tiny.safetensors") == WEIGHTS.read_bytes()

    @pytest.mark.parametrize("size", [(16, 16), (32, 48), (224, 224), (448, 320)])
    def test_any_size_that_the_patch_divides(self, size):
        backbone = create_backbone("musc-tiny", image_size=size)
        maps, image_feature = backbone(torch.rand(2, 3, *size))
        assert [tuple(depth.shape) for depth in maps] == [(2, 160, size[0] // 16, size[1] // 16)] * 4
        assert image_feature.shape == (2, 160)
        assert all(values.isfinite().all() for values in (*maps, image_feature))

    def test_another_size_is_refused(self):
        with pytest.raises(ValueError, match=r"image_size must be divisible by .* \(16, 16\), got 100; .*\[96, 112\]"):
            create_backbone("musc-tiny", image_size=100)

    def test_an_image_alone_is_as_in_a_batch(self):
        backbone, images = create_backbone("musc-tiny", image_size=96), torch.rand(5, 3, 96, 96)
        (maps, image_feature), (alone, alone_feature) = backbone(images), backbone(images[3:4])
        for together, single in zip([*maps, image_feature], [*alone, alone_feature], strict=True):
            torch.testing.assert_close(together[3:4], single, atol=2e-5, rtol=1e-4)

    def test_depths_in_any_order(self):
        images = torch.rand(1, 3, 64, 64)
        every = create_backbone("musc-tiny", layers=range(6), image_size=64)(images)[0]
        chosen = create_backbone("musc-tiny", layers=[4, 0], image_size=64)(images)[0]
        assert torch.equal(chosen[0], every[4])
        assert torch.equal(chosen[1], every[0])
        with pytest.raises(ValueError, match="layers must be distinct integers from 0 to 5"):
            create_backbone("musc-tiny", layers=[6])

    def test_random_weights_are_the_same_each_time_and_others(self):
        images = torch.rand(1, 3, 64, 64)
        first, again = (create_backbone("musc-tiny", pretrained=False, image_size=64)(images)[1] for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.allclose(first, create_backbone("musc-tiny", image_size=64)(images)[1], atol=0.1)

    def test_weights_from_a_file(self, tmp_path):
        other = create_backbone("musc-tiny", pretrained=False, image_size=64)
        save_file(other.network.state_dict(), tmp_path / "own.safetensors")
        loaded = create_backbone("musc-tiny", pretrained=tmp_path / "own.safetensors", image_size=64)
        images = torch.rand(1, 3, 64, 64)
        assert torch.equal(loaded(images)[1], other(images)[1])

    def test_an_unknown_tag_and_a_file_that_does_not_fit_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"'imagenet' is no known weights tag of 'musc-tiny'"):
            create_backbone("musc-tiny", pretrained="imagenet")
        save_file({"stem.0.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
        with pytest.raises(WeightsMismatchError, match="does not fit the backbone 'musc-tiny'"):
            create_backbone("musc-tiny", pretrained=tmp_path / "other.safetensors")

    def test_a_misspelt_name_finds_it(self):
        with pytest.raises(ValueError, match="did you mean 'musc-tiny'"):
            create_backbone("musc_tiny")

    def test_export_and_checkpoint_give_what_lightning_gives(self, mvtec_root, tmp_path, monkeypatch):
        engine = Engine(default_root_dir=tmp_path, enable_progress_bar=False)
        engine.fit(
            MuSc("musc-tiny", image_size=64, mode="reference", k_shot=3, visualizer=False),
            datamodule=datamodule(mvtec_root),
        )
        model = MuSc.load_from_checkpoint(engine.best_model_path)
        image = tmp_path / "wide.png"
        with Image.open(mvtec_root / "widget/test/scratch/001.png") as picture:
            picture.resize((128, 96)).save(image)
        (expected,) = engine.predict(model, data_path=image)
        monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
        path = engine.export(model, ExportType.TORCH, export_root=tmp_path)
        exported = TorchInferencer(path, device="cpu").predict(image)
        assert exported.pred_score.item() == pytest.approx(expected.pred_score.item(), abs=1e-5)
        torch.testing.assert_close(exported.anomaly_map.squeeze(), expected.anomaly_map.squeeze(), atol=1e-5, rtol=0)


def test_learned_features_find_what_random_ones_miss():
    """On products that no training has drawn."""
    materials = np.stack([draw_material(UNSEEN, index, 8) for index in range(8)])
    pools = [draw_pool(np.random.default_rng([UNSEEN, 4, product]), materials, 128, 8, 3) for product in range(8)]
    images = [torch.from_numpy(pool.images).permute(0, 3, 1, 2).float() / 255 for pool in pools]
    masks = [torch.from_numpy(pool.masks) > 0 for pool in pools]
    labelled = [Labelled("", *pair) for pair in zip(images, masks, strict=True) if pair[1].any()]
    learned, *random = (
        np.mean([evaluate(model, pool) for pool in labelled], axis=0)
        for weights in ("package", "random")
        for model in models(weights, 128)
    )
    assert (learned > np.max(random, axis=0) + 0.05).all()


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared/data is not here")
def test_photographs():
    """Every third tile, for time; of cookies and all tiles the model card has the numbers."""
    (pool,) = dataset_products(SHARED / "data/magnetic_tile", IMAGE_SIZE[0])
    labelled = Labelled("magnetic_tile", pool.images[::3], pool.masks[::3])
    (learned,) = (evaluate(model, labelled) for model in models("package"))
    assert learned[1] > 0.78
    assert learned[2] > 0.66
