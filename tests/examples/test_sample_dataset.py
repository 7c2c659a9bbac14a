# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from scene import CATEGORIES, Sample, Spec, draw, samples

from examples.sample_dataset.__main__ import MANIFEST, main, write_dataset

ROOT = Path(__file__).resolve().parents[2]
SMALL = Spec(size=64, train_good=1, test_good=2, per_defect=1)
SMALL_FLAGS = ["--size", "64", "--train-good", "1", "--test-good", "2", "--per-defect", "1"]
DEFECTS = [(name, defect) for name, category in CATEGORIES.items() for defect in category.defects]


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "sample"
    assert write_dataset(root, SMALL)
    return root


def test_layout_is_that_of_mvtec_ad(dataset: Path) -> None:
    expected = {MANIFEST}
    for name, category in CATEGORIES.items():
        expected |= {f"{name}/train/good/000.png", f"{name}/test/good/000.png", f"{name}/test/good/001.png"}
        for defect in category.defects:
            expected |= {f"{name}/test/{defect}/000.png", f"{name}/ground_truth/{defect}/000_mask.png"}
    assert {Path(path).as_posix() for path in contents(dataset)} == expected


def test_files_hold_what_was_drawn(dataset: Path) -> None:
    for sample in samples(SMALL):
        image, mask = draw(sample, SMALL.seed, SMALL.size)
        stored = cv2.imread(str(dataset / sample.image_path), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(stored[..., ::-1], image)
        if sample.mask_path is not None:
            stored_mask = cv2.imread(str(dataset / sample.mask_path), cv2.IMREAD_UNCHANGED)
            assert stored_mask.shape == (64, 64)
            np.testing.assert_array_equal(stored_mask, mask)


@pytest.mark.parametrize("category", CATEGORIES)
def test_seed_decides_every_pixel(category: str) -> None:
    sample = Sample(category, "test", "good", 0)
    image, mask = draw(sample, 3, 64)
    np.testing.assert_array_equal(image, draw(sample, 3, 64)[0])
    assert not mask.any()
    assert (image != draw(sample, 4, 64)[0]).mean() > 0.5
    assert (image != draw(Sample(category, "train", "good", 0), 3, 64)[0]).mean() > 0.5


@pytest.mark.parametrize(("category", "defect"), DEFECTS)
def test_mask_is_where_the_defect_changed_the_picture(category: str, defect: str) -> None:
    for index in range(2):
        sample = Sample(category, "test", defect, index)
        image, mask = draw(sample, 0, 128)
        sound, nothing = draw(sample, 0, 128, with_defect=False)
        change = np.abs(image.astype(int) - sound).max(axis=2)
        assert set(np.unique(mask)) == {0, 255}
        assert not nothing.any()
        assert not change[mask == 0].any()
        assert np.median(change[mask == 255]) > 10
        assert 0.002 < (mask == 255).mean() < 0.08


@pytest.mark.parametrize("category", CATEGORIES)
def test_size_scales_the_picture_and_not_the_scene(category: str) -> None:
    image, _ = draw(Sample(category, "test", "good", 0), 0, 96)
    assert image.shape == (96, 96, 3)
    assert image.dtype == np.uint8
    assert 40 < image.mean() < 200
    assert image.std() > 8


def test_run_as_a_command_writes_the_same(dataset: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/sample_dataset"), str(tmp_path / "sample"), *SMALL_FLAGS]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout.startswith("Wrote 14 images")
    assert contents(tmp_path / "sample") == contents(dataset)


def test_second_run_changes_nothing(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(dataset)
    assert main([str(dataset), *SMALL_FLAGS]) == 0
    assert "Already there" in capsys.readouterr().out
    assert contents(dataset) == before


@pytest.mark.parametrize("kind", ["foreign folder", "file", "other dataset", "lost file"])
def test_refuses_to_touch_anything_else(
    kind: str, tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "sample"
    if kind == "file":
        root.write_text("mine")
    else:
        root.mkdir()
        (root / "notes.txt").write_text("mine")
    if kind in {"other dataset", "lost file"}:
        manifest = json.loads((dataset / MANIFEST).read_text())
        manifest["seed"] += kind == "other dataset"
        (root / MANIFEST).write_text(json.dumps(manifest))
    before = contents(tmp_path)
    assert main([str(root), *SMALL_FLAGS]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(root) in message
    assert "name another folder" in message
    assert contents(tmp_path) == before


def test_empty_folder_is_filled(tmp_path: Path, dataset: Path) -> None:
    (tmp_path / "sample").mkdir()
    assert write_dataset(tmp_path / "sample", SMALL)
    assert contents(tmp_path / "sample") == contents(dataset)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sample"]


def test_failure_halfway_leaves_nothing(tmp_path: Path, dataset: Path) -> None:
    resource = pytest.importorskip("resource", reason="there are no limits of a process on this system")
    room = max(path.stat().st_size for path in dataset.rglob("*.png")) - 1  # for every file but the largest
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/sample_dataset"), str(tmp_path / "sample"), *SMALL_FLAGS],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == f"error: cannot write {tmp_path / 'sample'}: File too large\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["sample", "deeper/sample"])
def test_file_where_a_folder_should_be(below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    assert main([str(file / below), *SMALL_FLAGS]) == 1
    assert capsys.readouterr().err == f"error: cannot write {file / below}: {file} is not a folder\n"
    assert contents(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_parent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert main([str(tmp_path / "sample"), *SMALL_FLAGS]) == 1
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--size", "32"], ["--seed", "-1"], ["--per-defect", "0"]])
def test_impossible_options(flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "sample"), *flags])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("category", CATEGORIES)
def test_anomalib_reads_it(category: str, dataset: Path) -> None:
    data = pytest.importorskip("anomalib.data")
    datamodule = data.MVTecAD(root=dataset, category=category, num_workers=0)
    datamodule.setup()
    kinds = len(CATEGORIES[category].defects)
    assert len(datamodule.train_data) == 1
    assert len(datamodule.test_data) == 2 + kinds
    items = [datamodule.test_data[k] for k in range(2 + kinds)]
    assert sum(bool(item.gt_label) for item in items) == kinds
    assert all(bool(item.gt_mask.any()) == bool(item.gt_label) for item in items)


@pytest.mark.parametrize("category", list(CATEGORIES))
def test_specks_have_the_size_asked_for(category: str) -> None:
    spec = Spec(size=256, train_good=1, test_good=1, per_defect=2, speck=16)
    drawn = [sample for sample in samples(spec) if sample.category == category and sample.defect != "good"]
    assert {sample.defect for sample in drawn} == {"speck"}
    for sample in drawn:
        _, mask = draw(sample, spec.seed, spec.size, speck=spec.speck)
        rows, columns = np.nonzero(mask)
        assert 4 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 20  # the lens softens its edge
    with pytest.raises(ValueError, match="specks must have 4 to 32 pixels"):
        Spec(size=256, speck=33)
