# SPDX-License-Identifier: Apache-2.0
"""The short scripts that people copy, as they stand."""

import json
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from forks import run_forked
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(script: str, *words: object, cwd: Path) -> str:
    done = run_forked(_script, EXAMPLES / script, *map(str, words), cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _script(path: Path, *words: str) -> None:
    sys.argv = [str(path), *words]
    runpy.run_path(str(path), run_name="__main__")


def test_a_folder_to_a_page(folder, tmp_path):
    printed = run("folder_to_page.py", folder, "lot", cwd=tmp_path)
    assert "12 images: " in printed
    assert printed.rstrip().endswith("predictions.csv")
    assert {"predictions.csv", "predictions.json", "review.html", "images"} <= {
        path.name for path in (tmp_path / "lot").iterdir()
    }


def test_pictures_of_the_method(mvtec_root, tmp_path):
    run("method_pictures.py", mvtec_root / "widget", tmp_path / "pictures", "--defect", "scratch", cwd=tmp_path)
    sizes = [Image.open(path).size for path in sorted((tmp_path / "pictures").glob("method_*.jpg"))]
    assert len(sizes) == 3
    assert all(width > 1000 and height > 200 for width, height in sizes)


def test_musc_beside_patchcore(mvtec_root, tmp_path):
    widget = mvtec_root / "widget"
    folders = widget / "train/good", widget / "test/good", widget / "test/scratch"
    printed = run("beside_patchcore.py", *folders, "--random", cwd=tmp_path)
    lines = [line for line in printed.splitlines() if ": image_AUROC " in line]
    assert [line.split(":")[0] for line in lines] == ["MuSc", "Patchcore"]


def test_a_bank_to_a_service(mvtec_root, tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    widget = mvtec_root / "widget"
    printed = run("onnx_service.py", "export", widget / "train/good", "exported", cwd=tmp_path)
    model = Path(printed.splitlines()[-1])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    service = subprocess.Popen([sys.executable, EXAMPLES / "onnx_service.py", "serve", tmp_path / model, str(port)])
    try:
        answers = [ask(port, (widget / "test" / name).read_bytes()) for name in ("good/000.png", "scratch/000.png")]
        assert answers[0]["score"] < answers[1]["score"]
        assert answers[1]["label"] == "anomalous"
        with pytest.raises(HTTPError, match="400"):
            ask(port, b"no image")
    finally:
        service.terminate()
        service.wait()


def ask(port: int, body: bytes) -> dict[str, object]:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urlopen(Request(f"http://localhost:{port}", data=body), timeout=60) as answer:
                return json.load(answer)
        except HTTPError:
            raise
        except OSError:  # not up yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
