# SPDX-License-Identifier: Apache-2.0
"""Whatever lies in a folder: a prediction ends well or with one clear error, loses no file and changes none.

``MUSC_FOLDERS=5000`` tries so many folders, other ones each time.
"""

import contextlib
import csv
import hashlib
import logging
import os
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine
from conftest import OwnBackbone
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from odd_folders import OddFile, make, odd_files
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_musc import MuSc

CLEAR = (
    "MuSc needs at least 2 images",  # ours
    "images cannot be read",
    "Found 0 images in",  # anomalib's
)


def state_of(root: Path) -> dict[str, object]:
    """Content, kind, mode and time of all that lies beneath a folder."""
    found: dict[str, object] = {}
    for name, folders, files in os.walk(root):
        for path in (Path(name, file) for file in (*folders, *files)):
            status = path.lstat()
            is_plain = path.is_file() and not path.is_symlink()
            digest = hashlib.blake2b(path.read_bytes()).hexdigest() if is_plain else None
            target = os.readlink(path) if path.is_symlink() else None  # noqa: PTH115
            time = None if path.is_dir() else status.st_mtime_ns
            found[str(path)] = (status.st_mode, status.st_size if is_plain else None, time, digest, target)
    return found


def files_beneath(root: Path) -> set[str]:
    """Return every file and every link that leads out, as the table writes its path."""
    found = [Path(name, file) for name, _, files in os.walk(root) for file in files]
    links = [Path(name, folder) for name, folders, _ in os.walk(root) for folder in folders]
    found += [link for link in links if link.is_symlink() and not link.resolve().is_relative_to(root)]
    found += [folder for folder in links if folder.suffix.lower() in IMG_EXTENSIONS]  # which anomalib lists, too
    return {written(str(path)) for path in found}


def written(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def check_table(results: Path, expected: set[str]) -> None:
    (table,) = results.rglob("predictions.csv")
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert {row["path"] for row in rows} ^ expected == set()
    assert len(rows) == len(expected)
    for row in rows:
        if row["label"] == "skipped":
            assert row["note"]
            assert not row["score"]
        else:
            assert row["label"] in {"normal", "anomalous"}
            assert 0 <= float(row["score"]) <= 1


@settings(
    max_examples=int(os.environ.get("MUSC_FOLDERS", "100")),
    derandomize="MUSC_FOLDERS" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),  # shrinking takes minutes; the folder is named as it is
    report_multiple_bugs=False,
)
@given(st.lists(odd_files(), min_size=1, max_size=14))
@pytest.mark.timeout(0)
def test_any_folder(odd: list[OddFile]) -> None:
    try_folder(odd)


def try_folder(odd: list[OddFile]) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place).resolve() / "pile"
        root.mkdir()
        (root.parent / "outside").mkdir()
        (root.parent / "outside/kept.txt").write_text("kept")
        for one in odd:
            make(one, root)
        before, expected = state_of(root.parent), files_beneath(root)
        results = root.parent / "results"
        engine = Engine(default_root_dir=results, enable_progress_bar=False, enable_model_summary=False, logger=False)
        error = None
        try:
            engine.predict(MuSc(OwnBackbone(), aggregation_degrees=(1,)), data_path=root)
        except ValueError as raised:
            error = str(raised)
        after = {path: state for path, state in state_of(root.parent).items() if not Path(path).is_relative_to(results)}
        assert after == before
        if error is None:
            check_table(results, expected)
        else:
            assert any(text in error for text in CLEAR), error
            assert not list(results.rglob("predictions.csv"))


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """Say nothing of hundreds of folders."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with warnings.catch_warnings(), contextlib.suppress(KeyboardInterrupt):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)
