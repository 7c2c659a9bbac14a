# SPDX-License-Identifier: Apache-2.0
"""Wheel and source archive: what they hold, and that the wheel works where the source is not."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from test_zoo import PTH, ROOT, check, make_venv

MOST_BYTES = 6 * 10**6


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel and the source archive."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=ROOT, check=True, capture_output=True
    )
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


def test_the_wheel_holds_the_package_and_nothing_else(archives):
    wheel, _ = archives
    assert wheel.stat().st_size < MOST_BYTES
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        version = wheel.name.split("-")[1]
        metadata = file.read(f"anomalib_musc-{version}.dist-info/METADATA").decode()
    tops = {PurePosixPath(name).parts[0] for name in names}
    assert tops == {"anomalib_musc", "anomalib_musc.pth", f"anomalib_musc-{version}.dist-info"}
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "anomalib_musc").rglob("*") if path.is_file()}
    here = {name for name in here if "__pycache__" not in name and not name.endswith(".pth")}
    assert {name for name in names if name.startswith("anomalib_musc/")} == here
    assert "anomalib_musc/py.typed" in names
    assert f"Version: {version}" in metadata
    assert all(
        text in metadata for text in ("License-Expression: Apache-2.0", "Requires-Python: >=3.10", "# anomalib-musc")
    )


def test_the_source_archive_holds_what_the_repository_does(archives):
    _, source = archives
    assert source.stat().st_size < MOST_BYTES
    with tarfile.open(source) as file:
        names = {PurePosixPath(*PurePosixPath(name).parts[1:]).as_posix() for name in file.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("this is no repository")
    missing = set(tracked.stdout.split("\n")) - names - {""}
    assert missing <= {".gitignore"}
    assert not {name for name in names if name.split("/")[0] in {"build", "results", "datasets", ".venv"}}


PREDICT = """
import numpy as np
import anomalib_musc
from anomalib.models import MuSc
images = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
images[2, 10:50, 10:50] = 0
print(int(anomalib_musc.predict(images, "musc-tiny", image_size=64).scores.argmax()), anomalib_musc.__file__)
"""


def test_the_wheel_works_without_the_source(archives, tmp_path):
    python, site_packages = make_venv(tmp_path / "venv")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(archives[0])]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True, capture_output=True)
    assert (site_packages / "anomalib_musc.pth").read_text() == PTH
    assert not list((site_packages / "anomalib_musc").rglob("*.pth"))
    found, where = check(PREDICT, python).split()[-2:]
    assert found == "2"
    assert Path(where).is_relative_to(site_packages)
