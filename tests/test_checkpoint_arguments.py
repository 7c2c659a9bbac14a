# SPDX-License-Identifier: Apache-2.0
"""On the command line a checkpoint brings the arguments and weights of its model; what is given wins where it may."""

import pytest
import torch
from anomalib.engine import Engine
from commands import TINY
from runs import datamodule

from anomalib_musc import MuSc
from anomalib_musc.command_line import CheckpointCLI


@pytest.fixture(scope="module")
def checkpoint(mvtec_root, tmp_path_factory):
    """A checkpoint with arguments that are no defaults."""
    engine = Engine(default_root_dir=tmp_path_factory.mktemp("arguments"), enable_progress_bar=False, logger=False)
    model = MuSc(**TINY, mode="reference", k_shot=2, aggregation_degrees=(1, 3), batch_size=3)
    engine.fit(model, datamodule=datamodule(mvtec_root))
    return engine.best_model_path


def parsed(command: str, checkpoint: str, *options: str) -> CheckpointCLI:
    data = ["--data", "somewhere"] if command == "predict" else ["--export_type", "torch"]
    return CheckpointCLI([command, "--model", "MuSc", "--ckpt_path", checkpoint, *data, *options], run=False)


@pytest.mark.parametrize("command", ["predict", "export"])
def test_nothing_has_to_be_given_again(command, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = parsed(command, checkpoint).model  # whose default, CLIP, is out of reach here
    assert model.hparams["backbone"] == "test_vit"
    assert (model.model.image_size, model.model.aggregation_degrees) == ((64, 64), (1, 3))
    assert (model.mode, model.batch_size, model.bank_arguments.k_shot) == ("reference", 3, 2)


def test_what_is_given_wins(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rule = ["--model.post_processor", "anomalib_musc.RsCINPostProcessor"]
    rule += ["--model.post_processor.image_threshold", "0.7", "--model.batch_size", "5"]
    cli = parsed("export", checkpoint, *rule)
    path = cli.engine.export(**cli._prepare_subcommand_kwargs("export"))
    exported = torch.load(path, weights_only=False)["model"]
    assert exported.post_processor.image_threshold == pytest.approx(0.7)
    assert (exported.batch_size, len(exported.model.bank)) == (5, 2)
    other = parsed("predict", checkpoint, "--model.references", "a/folder").model
    assert (str(other.bank_arguments.references), other.bank_arguments.k_shot) == ("a/folder", None)


def test_what_cannot_win_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli = parsed("export", checkpoint, "--model.image_size", "32")
    with pytest.raises(ValueError, match=r"is of another model: .*image_size \[64, 64\], here \[32, 32\]"):
        cli._prepare_subcommand_kwargs("export")
    with pytest.raises(FileNotFoundError, match=r"^ckpt_path='none.ckpt' is no file; give the file"):
        parsed("predict", "none.ckpt")
