# SPDX-License-Identifier: Apache-2.0
"""SIGTERM ends a run within seconds, with the usual status, and leaves no half file."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import SMALL
from conftest import write_products
from PIL import Image

SECONDS = 10  # how long a busy machine may take to end


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """So many images that they take longer to be compared, and their pictures to be drawn, than a test waits."""
    folder = tmp_path_factory.mktemp("many")
    write_products(folder, range(160))
    return folder


@contextmanager
def running(folder: Path, cwd: Path, *more: str) -> Iterator[subprocess.Popen]:
    command = [Path(sys.executable).with_name("anomalib"), "predict", "--model", "MuSc", "--data", folder]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with (cwd / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [*map(str, command), *more], cwd=cwd, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        process.kill()


def wait_for(found, process: subprocess.Popen) -> None:
    end = time.monotonic() + 200
    while not found():
        assert process.poll() is None, "ended before it was told to"
        assert time.monotonic() < end
        time.sleep(0.05)


def assert_ends(process: subprocess.Popen, results: Path) -> None:
    os.killpg(process.pid, signal.SIGTERM)  # as systemd does, worker processes included
    assert process.wait(timeout=SECONDS) == 128 + signal.SIGTERM, (results.parent / "log.txt").read_text()
    assert not [path for path in results.rglob(".*") if path.name != ".anomalib_run"]
    for path in results.rglob("*.png"):
        with Image.open(path) as picture:
            picture.load()  # whole


def test_while_a_pool_is_scored(many, tmp_path):
    bar = ["--trainer.callbacks", "TQDMProgressBar"]  # which writes to a file, too
    with running(many, tmp_path, "--model.backbone", "musc-tiny", *bar) as process:
        wait_for(lambda: "MuSc: mutual scoring" in (tmp_path / "log.txt").read_text(), process)
        assert_ends(process, tmp_path / "results")
    assert not list(tmp_path.rglob("*.csv")) + list(tmp_path.rglob("*.png"))


def test_while_pictures_are_written(many, tmp_path):
    with running(many, tmp_path, *SMALL, "--model.image_size", "64") as process:
        wait_for(lambda: list(tmp_path.rglob("images/**/*.png")), process)
        assert_ends(process, tmp_path / "results")
    assert 0 < len(list(tmp_path.rglob("images/**/*.png"))) < 160
