# SPDX-License-Identifier: Apache-2.0
"""README's commands of a checkpoint, as they stand and in their order, each in a process of its own."""

import shlex
import shutil
from pathlib import Path

import pytest
from commands import anomalib_from_the_shell, read_table
from conftest import write_products

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
WITHOUT_A_HUB = ["--model.backbone", "musc-tiny"]  # where no checkpoint says which backbone; CLIP is not at hand


def commands() -> list[list[str]]:
    block = README.split("### One image at a time")[1].split("```bash")[1].split("```")[0].strip()
    variable, path = next(line.split("=") for line in block.splitlines() if not line.startswith("anomalib "))
    lines = [line for line in block.splitlines() if line.startswith("anomalib ")]
    return [shlex.split(line.replace(f"${variable}", path))[1:] for line in lines]


@pytest.fixture(scope="module")
def done(tmp_path_factory, mvtec_root):
    """What README's commands printed and where they ran."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(mvtec_root / "widget", folder / "datasets/MVTecAD/bottle")
    write_products(folder / "path/to", range(30, 31))[0].rename(folder / "path/to/1.png")
    write_products(folder / "path/to/references", range(4))
    runs = []
    for arguments in commands():
        backbone = [] if "--ckpt_path" in arguments else WITHOUT_A_HUB
        workers = ["--data.num_workers", "0"] if "MVTec" in arguments else []  # not eight of them, for time
        run = anomalib_from_the_shell(*arguments, *backbone, *workers, cwd=folder)
        assert run.returncode == 0, run.stderr
        runs.append((arguments[0], run))
    return folder, runs


def test_all_run_in_their_order(done):
    folder, runs = done
    assert [name for name, _ in runs] == ["train", "predict", "export", "predict"]
    root = folder / "results/MuSc"
    assert read_table(root / "v0").keys() == read_table(root / "v2").keys() == {"1.png"}
    assert (root / "v1/weights/onnx/model.onnx").is_file()
    assert sorted(path.name for path in root.iterdir()) == ["MVTecAD", "latest", "v0", "v1", "v2"]
    assert [path.name for path in (root / "MVTecAD/bottle").glob("v*")] == ["v0"]


def test_an_export_is_quiet(done):
    _, runs = done
    printed = runs[2][1].stdout + runs[2][1].stderr
    assert len(printed.splitlines()) < 100
