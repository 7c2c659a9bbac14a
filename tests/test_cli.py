# SPDX-License-Identifier: Apache-2.0
"""anomalib's own command line, in processes of its own, as a user types it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from anomalib.cli import AnomalibCLI

from anomalib_musc.backbones import ALIASES

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--model.backbone", "test_vit", "--model.pretrained", "false"]
CONFIGS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent.name != "benchmark"  # which anomalib-musc reads
)


def anomalib(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``anomalib ...`` with the installed entry point."""
    command = [str(Path(sys.executable).with_name("anomalib")), *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200", **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)


def metric(output: str, name: str) -> float:
    """Read a metric off the table that Lightning prints."""
    found = re.search(rf"{name}\W+([0-9.]+)", output)
    assert found, output
    return float(found.group(1))


def test_the_literal_command(tmp_path, mvtec_root):
    done = anomalib(
        *["test", "--model", "MuSc", "--data", "MVTec", "--data.root", mvtec_root, "--data.category", "widget"],
        *[*SMALL, "--data.num_workers", "2"],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert metric(done.stdout, "image_AUROC") > 0.9
    assert metric(done.stdout, "pixel_AUPRO") > 0.5
    assert "MuSc: extracting features" in done.stdout
    assert len(list((tmp_path / "results/MuSc/MVTec/widget").rglob("images/**/*.png"))) == 12


def test_predict_a_folder(tmp_path, folder):
    done = anomalib("predict", "--model", "MuSc", "--data", folder, *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("images/**/*.png"))) == 12


@pytest.mark.parametrize("subcommand", ["validate", "train", "fit"])
def test_other_subcommands(subcommand, tmp_path, mvtec_root):
    done = anomalib(
        *[subcommand, "--model", "MuSc", "--data", "MVTec", "--data.root", mvtec_root, "--data.category", "widget"],
        *SMALL,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert ("image_AUROC" in done.stdout) == (subcommand == "train")


def test_every_argument_from_the_command_line(tmp_path, mvtec_root):
    done = anomalib(
        *["test", "--config", ROOT / "configs/offline.yaml", "--data.root", mvtec_root, "--data.category", "widget"],
        *["--model.image_size", "[96, 64]", "--model.layers", "[1, 3, 5]", "--model.aggregation_degrees", "[1]"],
        *["--model.precision", "fast", "--model.num_subsets", "2", "--model.memory_budget", "0.5"],
        *["--model.interval", "[0, 5]", "--model.post_processor", "anomalib_musc.RsCINPostProcessor"],
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
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.backbone", "ViT-L-14-37"], r"'ViT-L-14-37' is not known; close matches: \['ViT-L-14"),
        ([*SMALL, "--model.image_size", "100"], r"image_size must be divisible by .* patch size \(16, 16\), got 100"),
        (["--model.backbone", "dinov2_vitb14"], r"Hugging Face repository timm/vit_base_patch14_dinov2.* pretrained="),
        ([], r"'openai' of the backbone 'ViT-L-14-336' could not be fetched. Download .* pass the file: pretrained="),
    ],
    ids=["unknown backbone", "size and patch", "weights out of reach", "default weights out of reach"],
)
def test_bad_input_ends_in_one_clear_error(arguments, message, tmp_path, mvtec_root):
    done = anomalib(
        *["test", "--model", "MuSc", "--data", "MVTec", "--data.root", mvtec_root, "--data.category", "widget"],
        *arguments,
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert re.search(message, re.sub(r"[│\s]+", " ", done.stderr)), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_users_own_module_in_a_configuration(tmp_path, mvtec_root):
    config = tmp_path / "own.yaml"
    config.write_text(
        "model:\n  class_path: MuSc\n  init_args:\n    backbone:\n      class_path: conftest.OwnBackbone\n"
        f"data:\n  class_path: MVTec\n  init_args:\n    root: {mvtec_root}\n    category: widget\n"
    )
    done = anomalib("test", "--config", config, cwd=tmp_path, PYTHONPATH=str(ROOT / "tests"))
    assert done.returncode == 0, done.stderr
    assert metric(done.stdout, "image_AUROC") == 1


@pytest.mark.parametrize("config", CONFIGS)
def test_a_configuration_loads(config, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    data = ["--data", "MVTec"] if "/model/" in config else []
    common = ["test", "--config", str(ROOT / config), *data]
    with pytest.raises(SystemExit) as stop:
        AnomalibCLI(args=[*common, "--print_config"])
    assert stop.value.code == 0
    assert "class_path: anomalib_musc.MuSc" in capsys.readouterr().out

    cli = AnomalibCLI(args=[*common, "--model.pretrained", "false"], run=False)
    alias = ALIASES.get(cli.config["test"]["model"]["init_args"]["backbone"])
    assert alias is None or cli.model.model.image_size == (alias.image_size,) * 2
    assert len(cli.model.model.backbone.layers) == 4
    assert cli.model.post_processor.windows == ((1, 8, 9) if "visa" in config else (1, 2, 3))
