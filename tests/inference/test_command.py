# SPDX-License-Identifier: Apache-2.0
"""``anomalib-musc predict``, as a user types it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import read_details, read_paths, run_command
from conftest import write_products
from runs import datamodule

from anomalib_musc import MuSc

SMALL = ["--backbone", "musc-tiny", "--image-size", "64"]


@pytest.fixture(scope="module")
def pile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pile")
    write_products(folder / "a", range(8))
    write_products(folder / "b", range(30, 32), masks=folder.with_name("masks"))
    return folder


def predict(*arguments, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run_command("anomalib-musc", "predict", *map(str, arguments), cwd=cwd)


def from_the_shell(*arguments, cwd: Path, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("anomalib-musc")), *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "80", **environment}
    return subprocess.run(
        command, cwd=cwd, env=environment, input=text, capture_output=True, text=True, timeout=240, check=False
    )


def test_a_folder_from_the_shell_and_nothing_but_what_matters(pile, tmp_path):
    done = from_the_shell("predict", pile, *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("10 images: ")
    assert " on raw scores), 3 times as far above" in done.stdout
    assert len(done.stdout.splitlines()) == 7  # counts, the five most anomalous, where the results are
    assert "MuSc: mutual scoring" in done.stderr
    for chatter in ("pin_memory", "GPU", "Model weights", "Tip", "Warning:", "callbacks", "FutureWarning"):
        assert chatter not in done.stderr
    assert len(read_paths(tmp_path / "results/MuSc/v0")) == 10
    assert (tmp_path / "results/MuSc/v0/review.html").is_file()
    threshold = json.loads((tmp_path / "results/MuSc/v0/predictions.json").read_text())["threshold"]
    assert threshold["argument"] == "--threshold"  # to paste into the same command, where it decides likewise
    again = predict(pile, *SMALL, f"--threshold={threshold['before_normalisation']}", "--output", "again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    labels = [
        {name: row["label"] for name, row in read_paths(tmp_path / part).items()} for part in ("results", "again")
    ]
    assert labels[0] == labels[1]


def test_names_from_standard_input(pile, tmp_path):
    names = "".join(f"{path}\n" for path in sorted(pile.rglob("*.png")))
    done = from_the_shell("predict", "-", *SMALL, "--quiet", cwd=tmp_path, text=names)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'results/MuSc/v0/predictions.csv'}\n"
    assert done.stderr == ""
    assert len(read_paths(tmp_path)) == 10


def test_odd_lists_of_names(pile, tmp_path):
    names = "\ufeff" + "".join(f"{path}\r\n" for path in sorted(pile.rglob("*.png")))
    done = from_the_shell("predict", "-", *SMALL, "--quiet", "--no-review", cwd=tmp_path, text=names)
    assert done.returncode == 0, done.stderr
    (tmp_path / "latin.txt").write_bytes("ü.png\n".encode("latin-1"))
    (tmp_path / "none.txt").touch()
    for name, message in (("latin.txt", "latin.txt is not in UTF-8"), ("none.txt", "none.txt names no image")):
        done = predict(name, *SMALL, cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr


def test_a_reader_that_has_gone_is_no_failure(pile, tmp_path):
    command = Path(sys.executable).with_name("anomalib-musc")
    line = f"{command} predict {pile} {' '.join(SMALL)} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(read_paths(tmp_path)) == 10


def test_ctrl_c_is_one_line(pile, tmp_path):
    command = [str(Path(sys.executable).with_name("anomalib-musc")), "predict", str(pile), *SMALL]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(1.5)  # in the middle of the imports
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert stderr.strip() == "error: interrupted"


def test_patterns_lists_and_several_folders(pile, tmp_path):
    (tmp_path / "names.txt").write_text("".join(f"{path}\n" for path in sorted(pile.rglob("*.png"))))
    given = [[f"{pile}/*/*.png"], ["names.txt"], [pile / "a", pile / "b"], [f"{pile}/**/*.png", pile / "a/000.png"]]
    scores = []
    for images in given:
        done = predict(*images, *SMALL, "--quiet", "--no-review", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        scores.append({name: float(row["score"]) for name, row in read_paths(tmp_path).items()})
        assert not list(Path(done.stdout.strip()).parent.glob("*.html"))
    assert all(found == pytest.approx(scores[0], abs=1e-4) for found in scores)  # by products that a trial chooses


def test_options_reach_the_model(pile, tmp_path):
    done = predict(
        pile, *SMALL, "--threshold", "2", "--heatmaps", "png", "npy", "--fast", "--output", "o", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert {row["label"] for row in read_paths(tmp_path / "o").values()} == {"normal"}
    assert {path.suffix for path in (tmp_path / "o").rglob("heatmaps/**/*.*")} == {".png", ".npy"}
    done = predict(pile / "b/000.png", *SMALL, "--references", pile / "a", "--output", "p", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_paths(tmp_path / "p").keys() == {str(pile / "b/000.png")}
    done = predict(pile, *SMALL, "--contamination", "0.5", "--output", "q", cwd=tmp_path)
    assert [row["label"] for row in read_paths(tmp_path / "q").values()].count("anomalous") == 5


def test_a_checkpoint_brings_its_settings(pile, tmp_path, mvtec_root, make_engine):
    engine = make_engine()
    model = MuSc("musc-tiny", image_size=64, mode="reference", visualizer=False)
    engine.fit(model, datamodule=datamodule(mvtec_root))
    done = predict(pile / "b/000.png", "--checkpoint", engine.best_model_path, "--output", "r", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(read_details(tmp_path / "r")) == 1


def test_exit_statuses(pile, tmp_path):
    assert predict(pile, *SMALL, "--fail-on-anomaly", "--threshold", "0", cwd=tmp_path).returncode == 3
    assert predict(pile, *SMALL, "--fail-on-anomaly", "--threshold", "2", cwd=tmp_path).returncode == 0
    (tmp_path / "file").touch()
    done = predict(pile, *SMALL, "--output", "file", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no file or folder 'nowhere'"),
        (["*.gif"], "no file matches '*.gif'"),
        (["-"], "no names came from standard input"),
        ([".", "--sensitvity", "1"], "did you mean --sensitivity?"),
        ([".", "--sensitivity", "2"], "2 is not from 0 to 1"),
        ([".", "--image-size", "1x2x3"], "'1x2x3' is neither one side nor HEIGHTxWIDTH"),
        ([".", "--sensitivity", "0.4", "--threshold", "1"], "not allowed with argument"),
        ([".", "--checkpoint", "none.ckpt"], "--checkpoint: there is no file or folder 'none.ckpt'"),
        (["empty"], "no image there"),
        ([""], "empty name"),
        ([".", "--output", ""], "an empty name"),
        ([".", "--threshold", "5"], "5 is not from 0 to 2"),
        ([".", "--threshold", "nan"], "nan is not from 0 to 2"),
        ([".", "--contamination", "0"], "0 is not from"),
        ([".", "--contamination", "0.7"], "0.7 is not from"),
        ([".", "--image-size", ""], "'' is neither one side nor HEIGHTxWIDTH"),
    ],
)
def test_a_wrong_call_is_one_line_and_imports_nothing(arguments, message, tmp_path):
    (tmp_path / "empty").mkdir()
    code = (
        "import sys, anomalib_musc.cli\ntry: anomalib_musc.cli.main()\n"
        "finally: sys.stdout.write(str('torch' in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "predict", *arguments],
        cwd=tmp_path,
        input="",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == "False"
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image-size", "100"], "image_size must be divisible by"),
        (["--backbone", "musc_tny"], "did you mean 'musc-tiny'?"),
    ],
)
def test_what_the_model_refuses_is_one_line_too(arguments, message, pile, tmp_path):
    done = predict(pile, *SMALL, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
    traced = predict(pile, *SMALL, *arguments, "--verbose", cwd=tmp_path)
    assert "Traceback" in traced.stderr


def test_help_fits_a_screen(tmp_path):
    done = from_the_shell("predict", "--help", cwd=tmp_path)
    assert len(done.stdout.splitlines()) <= 45
    assert max(map(len, done.stdout.splitlines())) <= 90
    assert "examples:" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell, tmp_path):
    pytest.importorskip("shtab", reason="pip install 'anomalib-musc[completion]'")
    done = from_the_shell("completion", shell, cwd=tmp_path)
    assert done.returncode == 0
    assert "--sensitivity" in done.stdout
