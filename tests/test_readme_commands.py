# SPDX-License-Identifier: Apache-2.0
"""Every command and every example of the README and the docs, as it stands and in its order, in one folder.

Weights of a hub are not at hand: where a command names none that the package holds, musc-tiny takes their place.
"""

import re
import shlex
import shutil
from pathlib import Path

import cv2
import pytest
import torch
from commands import read_table, run_command
from conftest import OwnBackbone, write_products
from forks import run_forked

ROOT = Path(__file__).resolve().parents[1]
TEXT = "\n".join(path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
ELSEWHERE = {
    "anomalib-musc benchmark --config configs/benchmark/mvtec_ad.yaml": "needs CLIP and MVTec AD; its arguments are "
    "tested in tests/benchmark/test_config.py",
    "anomalib test --model MuSc --trainer.devices 2 --trainer.strategy ddp --data MVTec --data.category bottle": (
        "starts its line again for each process, which is no line here; tests/test_processes.py does it"
    ),
}


def commands() -> list[str]:
    """Return all commands of ours, with shell variables filled in."""
    lines, variables = [], {}
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL):
        for line in block.splitlines():
            if found := re.fullmatch(r"(\w+)=(\S+)", line):
                variables[f"${found[1]}"] = found[2]
            for name, value in variables.items():
                line = line.replace(name, value)  # noqa: PLW2901
            if line.startswith(("anomalib ", "anomalib-musc ")):
                lines.append(line)
    return list(dict.fromkeys(lines))


def without_a_hub(command: str) -> list[str]:
    """Return a command's words, with a network that needs no hub, and no worker processes, for time."""
    words = shlex.split(command)
    option = "--backbone" if words[0] == "anomalib-musc" else "--model.backbone"
    if option not in words and "--ckpt_path" not in words:
        words += [option, "musc-tiny"]
        words += ["--model.layers", "null", "--model.image_size", "null"] if "--config" in words else []
    return [*words, "--data.num_workers", "0"] if {"--data.category", "--config"} & set(words) else words


@pytest.fixture(scope="module")
def place(tmp_path_factory, mvtec_root):
    """A folder that has what the README speaks of."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(mvtec_root / "widget", folder / "datasets/MVTecAD/bottle")
    for name, theirs in (("train/good", "train/good"), ("test/good", "test/good"), ("test/bad", "test/scratch")):
        shutil.copytree(mvtec_root / "widget" / theirs, folder / "datasets/visa/visa_pytorch/candle" / name)
    shutil.copytree(
        mvtec_root / "widget/ground_truth/scratch", folder / "datasets/visa/visa_pytorch/candle/ground_truth/bad"
    )
    for mask in (folder / "datasets/visa/visa_pytorch/candle/ground_truth/bad").iterdir():
        mask.rename(mask.with_name(mask.name.replace("_mask", "")))
    shutil.copytree(ROOT / "configs", folder / "configs")
    write_products(folder / "path/to", range(30, 31))[0].rename(folder / "path/to/1.png")
    for name in ("references", "your/folder", "a/folder"):
        write_products(folder / "path/to" / name, range(6))
    for category in ("gear", "fabric"):
        shutil.copytree(mvtec_root / "widget", folder / "datasets/large" / category)
    for path in write_products(folder / "path/to/photographs", range(4)):
        cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), (480, 320)))
    return folder


@pytest.fixture(scope="module")
def done(place):
    """What the commands printed."""
    runs = {}
    for number, command in enumerate(commands()):
        if command not in ELSEWHERE:
            name, *arguments = without_a_hub(command)
            run = run_command(name, *arguments, cwd=place)
            assert run.returncode == 0, (command, run.stderr)
            runs[number, command] = run
    return runs


def test_all_run_in_their_order(done, place):
    assert len(done) >= 8
    assert set(ELSEWHERE) <= set(commands())
    tables = list((place / "results/MuSc").glob("v*/predictions.csv"))
    assert len(tables) == sum(" predict " in command for _, command in done)
    assert any(read_table(table.parent).keys() == {"1.png"} for table in tables)
    assert list((place / "results/MuSc").glob("v*/weights/onnx/model.onnx"))


def test_an_export_is_quiet(done):
    (run,) = (run for (_, command), run in done.items() if " export " in command)
    assert len((run.stdout + run.stderr).splitlines()) < 100


EXAMPLES = list(dict.fromkeys(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)))


def _run(code: str) -> None:
    from anomalib.data import MVTecAD  # what examples after the first have at hand
    from anomalib.engine import Engine

    from anomalib_musc import MuSc

    known = {"Engine": Engine, "MuSc": MuSc, "torch": torch, "images": torch.rand(3, 3, 320, 320)}
    known |= {"model": MuSc("musc-tiny", visualizer=False), "datamodule": MVTecAD(category="bottle", num_workers=0)}
    known |= dict(zip(("stage2", "stage3", "image_feature"), _features(), strict=True))
    exec(code, known)


def _features() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (fine, coarse), feature = OwnBackbone()(torch.rand(2, 3, 64, 64))
    return fine, coarse, feature


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples(number, place, tmp_path):
    for name in ("path", "datasets"):
        shutil.copytree(place / name, tmp_path / name)
    code = re.sub(r"dinov2_vitb14|ViT-L-14-336", "musc-tiny", EXAMPLES[number]).replace(
        'MVTecAD(category="bottle")', 'MVTecAD(category="bottle", num_workers=0)'
    )
    run = run_forked(_run, code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
