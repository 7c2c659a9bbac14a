# SPDX-License-Identifier: Apache-2.0
"""RsCIN as a post-processor."""

import pytest
import torch
from anomalib.engine import Engine
from conftest import OwnBackbone, write_products
from runs import assert_same, by_path, datamodule

from anomalib_musc import MuSc, RsCINPostProcessor
from anomalib_musc.functional import rscin


def test_rescore_is_rscin():
    scores, tokens = torch.rand(20), torch.randn(20, 4)
    rescored = RsCINPostProcessor(windows=(1, 8, 9)).rescore(scores, tokens)
    relative = (rescored - scores.min()) / (scores.max() - scores.min())
    torch.testing.assert_close(relative, rscin(scores, tokens, (1, 8, 9)))


def test_scores_keep_the_unit_of_the_raw_ones():
    scores, tokens = torch.rand(20), torch.randn(20, 4)
    rescore = RsCINPostProcessor(windows=(1, 2, 3)).rescore
    torch.testing.assert_close(rescore(2 * scores + 1, tokens), 2 * rescore(scores, tokens) + 1)
    torch.testing.assert_close(rescore(scores.fill_(0.7), tokens), scores)


@pytest.mark.parametrize("windows", [(), (0, 1), (-3,), (1.5,), 3])
def test_bad_windows(windows):
    with pytest.raises(ValueError, match="windows"):
        RsCINPostProcessor(windows=windows)


def test_windows_and_thresholds_are_kept_in_a_checkpoint(tmp_path, mvtec_root):
    model = MuSc("test_vit", pretrained=False, image_size=64, post_processor=RsCINPostProcessor(windows=(1, 8, 9)))
    engine = Engine(default_root_dir=tmp_path, enable_progress_bar=False)
    engine.validate(model, datamodule=datamodule(mvtec_root))
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = MuSc.load_from_checkpoint(tmp_path / "model.ckpt")
    assert tuple(loaded.post_processor.windows) == (1, 8, 9)
    assert loaded.post_processor.image_threshold == model.post_processor.image_threshold
    assert not torch.isnan(loaded.post_processor.image_min)


def test_what_is_given_wins_over_a_checkpoint(tmp_path, mvtec_root):
    tiny = {"backbone": "test_vit", "pretrained": False, "image_size": 64}
    engine = Engine(default_root_dir=tmp_path, enable_progress_bar=False)
    saved = RsCINPostProcessor(image_threshold=0.25, pixel_sensitivity=0.3)
    engine.validate(MuSc(**tiny, post_processor=saved), datamodule=datamodule(mvtec_root))
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    given = RsCINPostProcessor(pixel_threshold=1.5, image_sensitivity=0.9)
    loaded = MuSc.load_from_checkpoint(tmp_path / "model.ckpt", post_processor=given).post_processor
    assert loaded.image_threshold == 0.25
    assert loaded.pixel_threshold == 1.5
    assert (loaded.image_sensitivity, loaded.pixel_sensitivity) == (0.9, 0.3)
    other = RsCINPostProcessor(image_threshold=0.75)
    model = MuSc(**tiny, post_processor=other)
    engine.test(model, datamodule=datamodule(mvtec_root), ckpt_path=tmp_path / "model.ckpt")
    assert other.image_threshold == 0.75


def test_a_users_own_backbone_is_passed_again_to_its_checkpoint(tmp_path, mvtec_root, make_engine):
    model, data = MuSc(OwnBackbone()), datamodule(mvtec_root)
    engine = make_engine()
    engine.validate(model, datamodule=data)
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = MuSc.load_from_checkpoint(tmp_path / "model.ckpt", backbone=OwnBackbone())
    assert loaded.post_processor.image_threshold == model.post_processor.image_threshold
    (metrics,) = make_engine().test(MuSc(OwnBackbone()), datamodule=data, ckpt_path=tmp_path / "model.ckpt")
    assert metrics["image_AUROC"] == 1


def test_a_pools_range_is_not_taken_for_a_validations(tmp_path, folder, make_engine):
    model, engine = MuSc(OwnBackbone()), make_engine()
    engine.predict(model, data_path=folder)
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    write_products(tmp_path / "others", range(40, 46))
    loaded = MuSc.load_from_checkpoint(tmp_path / "model.ckpt", backbone=OwnBackbone())
    ours = by_path(make_engine().predict(loaded, data_path=tmp_path / "others"))
    assert_same(ours, by_path(make_engine().predict(MuSc(OwnBackbone()), data_path=tmp_path / "others")))


def test_scores_keep_their_order_where_windows_are_one():
    model = MuSc(OwnBackbone(), post_processor=RsCINPostProcessor(windows=(1,)))
    scores = torch.tensor([0.4, 0.1, 0.9])
    assert model.post_processor.rescore(scores, torch.eye(3)).argsort().tolist() == scores.argsort().tolist()
