# SPDX-License-Identifier: Apache-2.0
"""anomalib's own command line, in processes of its own."""

import re
from pathlib import Path

import pytest
import yaml
from anomalib.cli import AnomalibCLI
from commands import SMALL, anomalib, anomalib_from_the_shell, metric

from anomalib_musc import MuSc
from anomalib_musc.backbones import ALIASES

ROOT = Path(__file__).resolve().parents[1]
RSCIN = ["--model.post_processor", "anomalib_musc.RsCINPostProcessor"]
CONFIGS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent.name != "benchmark"  # which anomalib-musc reads
)


def test_the_literal_command(tmp_path, mvtec_root):
    done = anomalib_from_the_shell(
        *["test", "--model", "MuSc", "--data", "MVTec", "--data.root", mvtec_root, "--data.category", "widget"],
        *[*SMALL, "--data.num_workers", "2"],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert metric(done.stdout, "image_AUROC") > 0.9
    assert metric(done.stdout, "pixel_AUPRO") > 0.5
    assert "MuSc: extracting features" in done.stdout
    assert len(list((tmp_path / "results/MuSc/MVTecAD/widget").rglob("images/**/*.png"))) == 12


@pytest.mark.parametrize("subcommand", ["validate", "train", "fit"])
def test_other_subcommands(subcommand, tmp_path, mvtec_root):
    done = anomalib(
        *[subcommand, "--model", "MuSc", "--data", "MVTec", "--data.root", mvtec_root, "--data.category", "widget"],
        *[*SMALL, "--data.num_workers", "0"],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert ("image_AUROC" in done.stdout) == (subcommand == "train")


def test_every_argument_from_the_command_line(tmp_path, mvtec_root):
    done = anomalib(
        *["test", "--config", ROOT / "configs/offline.yaml", "--data.root", mvtec_root, "--data.category", "widget"],
        *[
            "--data.num_workers",
            "0",
            "--model.image_size",
            "[96, 64]",
            "--model.layers",
            "[1, 3, 5]",
            "--model.aggregation_degrees",
            "[1]",
        ],
        *["--model.precision", "fast", "--model.num_subsets", "2", "--model.memory_budget", "0.5"],
        *["--model.interval", "[0, 5]", "--model.post_processor", "anomalib_musc.RsCINPostProcessor"],
        *["--model.evaluator", "anomalib_musc.metrics.PaperEvaluator", "--model.evaluator.aupro", "official"],
        *[
            "--model.post_processor.windows",
            "[1, 8, 9]",
            "--model.visualizer",
            "false",
            "--trainer.precision",
            "bf16-mixed",
        ],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert metric(done.stdout, "image_F1Max") > 0
    assert metric(done.stdout, "pixel_AUPRO_official") > 0
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SMALL, "--model.image_size", "100"], r"image_size must be divisible by .* patch size \(16, 16\), got 100"),
        ([], r"'openai' of the backbone 'ViT-L-14-336' could not be fetched. Download .* pass the file: pretrained="),
        (
            [*SMALL, *RSCIN, "--model.post_processor.image_threshold", "70"],
            "image_threshold must be a number from 0 to 2",
        ),
        ([*SMALL, "--data.eval_batch_size", "2", "--model.memory_budget", "1e-9"], "memory_budget"),
    ],
    ids=["size and patch", "weights out of reach", "a component's argument", "found while it runs"],
)
def test_bad_input_ends_in_one_clear_error(arguments, message, tmp_path, mvtec_root):
    command = ["test", "--model", "MuSc", "--data", "MVTec", "--data.root", mvtec_root, "--data.category", "widget"]
    done = anomalib(*command, *arguments, "--data.num_workers", "0", cwd=tmp_path)
    assert done.returncode == 1
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert re.search(message, error)
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {".anomalib_run", "config.yaml"}


def test_tracebacks_are_there_for_who_asks(tmp_path, mvtec_root):
    command = ["test", "--model", "MuSc", "--data", "MVTec", "--data.root", mvtec_root, "--data.category", "widget"]
    wrong = [*SMALL, "--model.image_size", "100"]
    done = anomalib(*command, *wrong, cwd=tmp_path, ANOMALIB_MUSC_TRACEBACK="1")
    assert "Traceback" in done.stderr
    assert "image_size must be divisible by" in done.stderr


def test_a_users_own_module_in_a_configuration(tmp_path, mvtec_root):
    config = tmp_path / "own.yaml"
    config.write_text(
        "model:\n  class_path: MuSc\n  init_args:\n    backbone:\n      class_path: conftest.OwnBackbone\n"
        f"data:\n  class_path: MVTec\n  init_args:\n    root: {mvtec_root}\n    category: widget\n    num_workers: 0\n"
    )
    done = anomalib("test", "--config", config, cwd=tmp_path, PYTHONPATH=str(ROOT / "tests"))
    assert done.returncode == 0, done.stderr
    assert metric(done.stdout, "image_AUROC") == 1


def test_what_a_prediction_says_last_is_its_summary(tmp_path, folder):
    done = anomalib("predict", "--model", "MuSc", "--data", folder, *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = done.stdout.splitlines().index(next(x for x in done.stdout.splitlines() if x.startswith("12 images: ")))
    assert "MuSc: extracting features" in done.stdout
    assert "extracting" not in "".join(done.stdout.splitlines()[summary:])
    assert done.stdout.rstrip().splitlines()[-1].startswith("Written: ")


def test_the_readmes_options(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def parsed(*options: str) -> MuSc:
        return AnomalibCLI(
            args=["predict", "--model", "MuSc", "--data", str(folder), *SMALL, *options], run=False
        ).model

    writer = ["--model.prediction_writer", "anomalib_musc.PredictionWriter"]
    assert parsed(*writer, "--model.prediction_writer.heatmaps", "[png, npy]").prediction_writer.heatmaps == (
        "png",
        "npy",
    )
    assert parsed("--model.prediction_writer", "false").prediction_writer is None
    post_processor = ["--model.post_processor", "anomalib_musc.RsCINPostProcessor"]
    by_hand = parsed(*post_processor, "--model.post_processor.image_threshold", "0.7").post_processor
    assert by_hand.image_threshold == pytest.approx(0.7)
    more = parsed(*post_processor, "--model.post_processor.image_sensitivity", "0.6").post_processor
    assert more.image_sensitivity == 0.6


@pytest.mark.parametrize("config", CONFIGS)
def test_a_configuration_loads(config, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    data = ["--data", "MVTec"] if "/model/" in config else []
    common = ["test", "--config", str(ROOT / config), *data]
    with pytest.raises(SystemExit) as stop:
        AnomalibCLI(args=[*common, "--print_config"])
    assert stop.value.code == 0
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert model["class_path"] == "anomalib_musc.MuSc"
    post_processor = model["init_args"]["post_processor"]
    windows = post_processor["init_args"]["windows"] if isinstance(post_processor, dict) else [1, 2, 3]
    assert windows == ([1, 8, 9] if "visa" in config else [1, 2, 3])

    alias = ALIASES.get(model["init_args"]["backbone"])
    if alias is not None and ("-L-" in alias.model or "large" in alias.model) and config != "configs/model/musc.yaml":
        return  # one of those that take five seconds to fill with random numbers is enough
    model = AnomalibCLI(args=[*common, "--model.pretrained", "false"], run=False).model.model
    assert alias is None or model.image_size == (alias.image_size,) * 2
    assert len(model.backbone.layers) == (2 if "efficientnet" in config else 4)
