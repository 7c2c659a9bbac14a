# SPDX-License-Identifier: Apache-2.0
"""RsCIN as a post-processor."""

import pytest
import torch
from anomalib.engine import Engine
from conftest import OwnBackbone
from test_engine import datamodule

from anomalib_musc import MuSc, RsCINPostProcessor
from anomalib_musc.functional import rscin


def test_rescore_is_rscin():
    scores, tokens = torch.rand(20), torch.randn(20, 4)
    torch.testing.assert_close(
        RsCINPostProcessor(windows=(1, 8, 9)).rescore(scores, tokens), rscin(scores, tokens, (1, 8, 9))
    )


@pytest.mark.parametrize("windows", [(), (0, 1), (-3,)])
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


def test_scores_keep_their_order_where_windows_are_one():
    model = MuSc(OwnBackbone(), post_processor=RsCINPostProcessor(windows=(1,)))
    scores = torch.tensor([0.4, 0.1, 0.9])
    assert model.post_processor.rescore(scores, torch.eye(3)).argsort().tolist() == scores.argsort().tolist()
