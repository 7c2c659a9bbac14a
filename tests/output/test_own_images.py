# SPDX-License-Identifier: Apache-2.0
"""A plain folder of a user's own: any format, broken files among them, and results that are whole or not there."""

import csv
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from commands import SMALL, anomalib, read_details, read_paths, read_table
from conftest import SIDE, OwnBackbone, grey, product, write_products
from forks import run_forked
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from PIL import Image
from runs import assert_same, by_path, predict_loader

from anomalib_musc import MuSc, PredictionWriter
from anomalib_musc.output.regions import find_regions


def write_every_format(folder: Path) -> dict[str, Path]:
    """Write one product in many formats, sizes, names and folders; the last has a defect."""
    rgb = Image.fromarray(product(1)[0])
    deep = grey(2).astype(np.uint16) * 257
    pictures = {
        "grey.png": Image.fromarray(grey(0)),
        "rgb.jpg": rgb,
        "nested/deeper/rgb.jpg": Image.fromarray(product(3)[0]),
        "other/deeper/rgb.jpg": Image.fromarray(product(4)[0]),
        "alpha.png": Image.fromarray(product(5)[0]).convert("RGBA"),
        "palette.png": Image.fromarray(product(6)[0]).quantize(64),
        "rgb.webp": Image.fromarray(product(11)[0]),
        "bitmap.bmp": Image.fromarray(product(7)[0]),
        "tagged.tiff": Image.fromarray(product(8)[0]).resize((90, 50)),
        "sixteen.png": Image.fromarray(deep),
        "sixteen.TIF": Image.fromarray(grey(9).astype(np.uint16) * 257),
        "mit Leerzeichen & Ümläut 部品.png": Image.fromarray(product(10)[0]),
        "nested/defect.png": Image.fromarray(product(30, defect=True)[0]).resize((128, 96)),
    }
    for name, picture in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name)
    return {name: folder / name for name in pictures}


def picture_name(name: str) -> str:
    """Pictures are PNG or JPEG files, whatever the image is."""
    return name if name.endswith((".png", ".jpg")) else f"{name}.png"


def test_one_command_for_any_folder(tmp_path):
    files = write_every_format(tmp_path / "meine Bilder")
    done = anomalib("predict", "--model", "MuSc", "--data", tmp_path / "meine Bilder", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (table,) = (tmp_path / "results").rglob("predictions.csv")
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {str(path) for path in files.values()}
    assert all(0 <= float(row["score"]) <= 1 for row in rows.values())
    for row in rows.values():
        assert row["label"] == ("anomalous" if float(row["score"]) > 0.5 else "normal")
    assert str(table) in done.stdout + done.stderr
    pictures = [path for path in (table.parent / "images/meine Bilder").rglob("*") if path.is_file()]
    names = [path.relative_to(table.parent / "images/meine Bilder").as_posix() for path in pictures]
    assert sorted(names) == sorted(picture_name(name) for name in files)
    for picture in pictures:
        assert np.asarray(Image.open(picture).convert("RGB")).std() > 5, picture


def test_the_defect_is_in_the_table(tmp_path, own_backbone, make_engine):
    files = write_every_format(tmp_path / "pile")
    predictions = make_engine().predict(MuSc(own_backbone), data_path=tmp_path / "pile")
    assert all(batch.pred_mask.dtype == torch.bool for batch in predictions)
    rows = read_table(tmp_path)
    assert rows["defect.png"]["label"] == "anomalous"
    region = {name: int(rows["defect.png"][f"region_{name}"]) for name in ("x", "y", "width", "height", "area")}
    _, mask = product(30, defect=True)
    y, x = np.argwhere(cv2.resize(mask, (128, 96), interpolation=cv2.INTER_NEAREST)).mean(axis=0)
    assert region["x"] <= x <= region["x"] + region["width"]
    assert region["y"] <= y <= region["y"] + region["height"]
    assert 0 < region["area"] <= region["width"] * region["height"]
    assert max(rows, key=lambda name: float(rows[name]["score"])) == "defect.png"
    assert len(files) > len(rows)  # three files share a name, and all are in the table
    (table,) = tmp_path.rglob("predictions.csv")
    assert len(table.read_text(encoding="utf-8").splitlines()) == 1 + len(files)


# --- small pools ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_images", [2, 3, 4, 5])
def test_small_pools_are_scored_with_a_warning(num_images, tmp_path, own_backbone, make_engine):
    write_products(tmp_path / "few", range(num_images))
    with pytest.warns(UserWarning, match=rf"pool of {num_images} images is small"):
        predictions = by_path(make_engine().predict(MuSc(own_backbone), data_path=tmp_path / "few"))
    assert len(predictions) == num_images
    for score, anomaly_map in predictions.values():
        assert 0 <= score <= 1
        assert torch.isfinite(anomaly_map).all()


def test_six_images_are_no_small_pool(folder, own_backbone, make_engine, recwarn):
    make_engine(limit_predict_batches=6).predict(MuSc(own_backbone), data_path=folder)
    assert not [warning for warning in recwarn if "is small" in str(warning.message)]


def test_few_images_are_compared_with_references_too(tmp_path, own_backbone, make_engine):
    write_products(tmp_path / "one", range(1))
    write_products(tmp_path / "references", range(60, 63))
    model = MuSc(own_backbone, mode="both", references=tmp_path / "references")
    with pytest.warns(UserWarning, match=r"A pool of 1 image is small: each is compared with 3 others"):
        make_engine().predict(model, data_path=tmp_path / "one")


def test_identical_images_are_all_normal(tmp_path, own_backbone, make_engine):
    (path,) = write_products(tmp_path / "same", range(1))
    for number in range(6):
        shutil.copy(path, path.with_name(f"copy{number}.png"))
    make_engine().predict(MuSc(own_backbone), data_path=tmp_path / "same")
    rows = read_table(tmp_path).values()
    assert {row["label"] for row in rows} == {"normal"}
    assert {row["regions"] for row in rows} == {"0"}


# --- the table and the heatmaps ------------------------------------------------------------------------------------


def test_the_table_can_be_switched_off(tmp_path, folder, own_backbone, make_engine):
    make_engine().predict(MuSc(own_backbone, prediction_writer=False), data_path=folder)
    assert not list(tmp_path.rglob("predictions.csv"))
    assert list(tmp_path.rglob("images/**/*.png"))


def test_heatmaps_at_the_size_of_the_images(tmp_path, own_backbone, make_engine):
    files = write_every_format(tmp_path / "pile")
    writer = PredictionWriter(output_dir=tmp_path / "out", heatmaps=["png", "npy"])
    predictions = make_engine().predict(MuSc(own_backbone, prediction_writer=writer), data_path=tmp_path / "pile")
    maps = {path: anomaly_map for path, (_, anomaly_map) in by_path(predictions).items()}
    assert (tmp_path / "out/predictions.csv").is_file()
    for name, path in files.items():
        values = np.load(tmp_path / f"out/heatmaps/pile/{name}.npy")
        with Image.open(path) as image, Image.open(tmp_path / f"out/heatmaps/pile/{name}.png") as heatmap:
            assert values.shape == image.size[::-1]
            assert heatmap.size == image.size
        assert values.dtype == np.float32
        assert values.min() >= 0
        assert values.max() <= 1
        assert values.max() == pytest.approx(maps[str(path)].max().item(), abs=0.05)


def test_a_writer_given_to_engine_is_kept(tmp_path, folder, own_backbone, make_engine):
    writer = PredictionWriter(output_dir=tmp_path / "mine", heatmaps=["npy"])
    make_engine(callbacks=[writer]).predict(MuSc(own_backbone), data_path=folder)
    assert {row["label"] for row in read_table(tmp_path).values()} <= {"normal", "anomalous"}
    assert len(list((tmp_path / "mine/heatmaps").rglob("*.npy"))) == 12


def test_every_run_has_its_pictures_beside_its_table(tmp_path, folder, own_backbone):
    model = MuSc(own_backbone)
    for name in ("first", "second"):
        Engine(default_root_dir=tmp_path / name, enable_progress_bar=False).predict(model, data_path=folder)
        (table,) = (tmp_path / name).rglob("predictions.csv")
        assert len(list((table.parent / "images").rglob("*.png"))) == 12


class NamedWriter(PredictionWriter):
    """A user's own kind of writer."""


def test_a_users_own_writer_takes_the_mirrored_path_the_default(folder, own_backbone, make_engine):
    engine = make_engine(callbacks=[NamedWriter()])
    engine.predict(MuSc(own_backbone), data_path=folder)
    (writer,) = (callback for callback in engine.trainer.callbacks if isinstance(callback, PredictionWriter))
    assert type(writer) is NamedWriter


def test_a_users_own_callbacks_are_kept(folder, own_backbone, make_engine):
    called = []
    callback = LambdaCallback(on_predict_start=lambda *_: called.append("start"))
    make_engine(callbacks=[callback]).predict(MuSc(own_backbone), data_path=folder)
    assert called == ["start"]


@pytest.mark.parametrize(("side", "size"), [(224, 225), (224, 253), (518, 1001), (64, 63)])
def test_regions_end_where_the_image_does(side, size):
    mask = np.zeros((side, side))
    mask[-24:, -24:] = 1
    (region,) = find_regions(mask, (size, size))
    assert region.x + region.width == region.y + region.height == size


class Opposite(OwnBackbone):
    """Defects point the other way: their distance is 2."""

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        colour = torch.nn.functional.avg_pool2d(images[:, :1] - images[:, 2:], 8)
        way = 1 - 2 * (colour.abs() > 1).float()
        return [torch.cat([way, -way], dim=1)], torch.nn.functional.normalize(way.flatten(1), dim=1)


def test_heatmaps_of_values_beyond_1_do_not_wrap(tmp_path, make_engine):
    write_products(tmp_path / "pile", range(5))
    cv2.imwrite(str(tmp_path / "pile/defect.png"), product(30, defect=True)[0])
    writer = PredictionWriter(output_dir=tmp_path / "out", heatmaps=["png", "npy"])
    model = MuSc(Opposite(), aggregation_degrees=(1,), post_processor=False, prediction_writer=writer)
    make_engine().predict(model, data_path=tmp_path / "pile")
    values = np.load(tmp_path / "out/heatmaps/pile/defect.png.npy")
    colours = np.asarray(Image.open(tmp_path / "out/heatmaps/pile/defect.png.png")).astype(int)
    assert values.max() > 1
    assert (colours[..., 0] - colours[..., 2])[values > 1].min() > 0  # red, not blue


@pytest.mark.parametrize("heatmaps", ["png", ["tiff"]])
def test_unknown_heatmaps(heatmaps):
    with pytest.raises(ValueError, match="heatmaps must be a list of"):
        PredictionWriter(heatmaps=heatmaps)


# --- faults --------------------------------------------------------------------------------------------------------


def spoil(folder: Path) -> dict[str, str]:
    """Put broken files among the good ones; return what is said of each."""
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("this is no picture")
    (folder / "header.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    reasons = {"empty.png": "empty file", "text.png": "not an image", "header.png": ""}
    for suffix in ("png", "jpg", "bmp", "tiff"):
        whole = folder / f"truncated.{suffix}"
        cv2.imwrite(str(whole), product(0)[0])
        whole.write_bytes(whole.read_bytes()[:-400])
        reasons[whole.name] = ""
    return reasons


def test_broken_files_are_skipped_and_named(tmp_path, folder, make_engine, recwarn):
    shutil.copytree(folder, tmp_path / "pile")
    reasons = spoil(tmp_path / "pile")
    backbone = OwnBackbone()
    ours = by_path(make_engine().predict(MuSc(backbone), data_path=tmp_path / "pile"))
    assert backbone.num_images == len(ours) == 12
    rows = read_table(tmp_path)
    for name, reason in reasons.items():
        assert rows[name]["label"] == "skipped"
        assert rows[name]["score"] == rows[name]["regions"] == ""
        assert reason in rows[name]["note"]
        assert rows[name]["note"]
        assert any(name in str(warning.message) for warning in recwarn)
    whole = by_path(make_engine().predict(MuSc(OwnBackbone()), data_path=folder))
    assert_same(ours, {path.replace(str(folder), str(tmp_path / "pile")): item for path, item in whole.items()})


def test_files_that_only_look_whole_are_skipped(tmp_path, folder, own_backbone, make_engine):
    shutil.copytree(folder, tmp_path / "pile")
    cv2.imwrite(str(tmp_path / "pile/no_scan.jpg"), product(0)[0])
    content = (tmp_path / "pile/no_scan.jpg").read_bytes()
    (tmp_path / "pile/no_scan.jpg").write_bytes(content[: content.index(b"\xff\xda")] + b"\xff\xd9")
    depth = grey(0).astype(np.float32) / 255
    depth[3:9, 3:9] = np.nan
    Image.fromarray(depth).save(tmp_path / "pile/holes.tif")
    predictions = make_engine().predict(MuSc(own_backbone), data_path=tmp_path / "pile")
    rows = read_table(tmp_path)
    assert rows["no_scan.jpg"]["label"] == "skipped"
    assert rows["holes.tif"]["label"] != "skipped"
    assert len(predictions) == 13


def test_pictures_of_an_earlier_run_are_no_input(folder, own_backbone, tmp_path):
    shutil.copytree(folder, tmp_path / "pile")
    for _ in range(2):
        engine = Engine(default_root_dir=tmp_path / "pile/results", enable_progress_bar=False)
        assert len(engine.predict(MuSc(own_backbone), data_path=tmp_path / "pile")) == 12
    notes = [row["note"] for row in read_table(tmp_path).values() if row["label"] == "skipped"]
    assert set(notes) == {"a result of an earlier run"}


def test_heatmaps_of_an_earlier_run_are_no_input(folder, own_backbone, tmp_path, make_engine):
    shutil.copytree(folder, tmp_path / "pile")
    for _ in range(2):
        writer = PredictionWriter(output_dir=tmp_path / "pile/out", heatmaps=["png"])
        model = MuSc(own_backbone, prediction_writer=writer)
        assert len(make_engine().predict(model, data_path=tmp_path / "pile")) == 12


def test_a_limit_counts_the_files_that_are_left(tmp_path, own_backbone, make_engine):
    paths = write_products(tmp_path / "pile", range(13))
    for path in paths[:3] + paths[5:6]:
        path.write_bytes(b"")
    engine = make_engine(limit_predict_batches=1)
    (batch,) = engine.predict(MuSc(own_backbone), dataloaders=predict_loader(tmp_path / "pile", batch_size=4))
    assert [Path(path).name for path in batch.image_path] == ["003.png", "004.png", "006.png", "007.png"]


def test_a_known_pool_is_no_excuse_for_broken_files(tmp_path, folder, own_backbone, make_engine):
    shutil.copytree(folder, tmp_path / "pile")
    (tmp_path / "pile/empty.png").touch()
    engine, model = make_engine(), MuSc(own_backbone)
    engine.predict(model, dataloaders=predict_loader(tmp_path / "pile"))
    with pytest.raises(ValueError, match=r"1 of 13 images cannot be read.*empty\.png"):
        engine.test(model, dataloaders=predict_loader(tmp_path / "pile"))


def test_an_interrupted_prediction_leaves_the_dataset_whole(tmp_path, folder, own_backbone, make_engine):
    class Interruption(Callback):
        def on_predict_batch_end(self, *args):  # noqa: ARG002
            raise RuntimeError("interrupted")

    shutil.copytree(folder, tmp_path / "pile")
    (tmp_path / "pile/empty.png").touch()
    loader = predict_loader(tmp_path / "pile")
    with pytest.raises(RuntimeError, match="interrupted"):
        make_engine(callbacks=[Interruption()]).predict(MuSc(own_backbone), dataloaders=loader)
    assert len(loader.dataset) == 13
    rows = read_paths(tmp_path)  # all that was known
    assert len(rows) == 13
    assert {row["label"] for row in rows.values()} <= {"normal", "anomalous", "skipped"}
    assert [row["note"] for row in rows.values()].count("the run ended before its regions were found") == 12


def test_black_images_have_no_regions(tmp_path, own_backbone, make_engine):
    (tmp_path / "pile").mkdir()
    for number in range(6):
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / f"pile/{number}.png")
    make_engine().predict(MuSc(own_backbone), data_path=tmp_path / "pile")
    assert {(row["label"], row["regions"]) for row in read_table(tmp_path).values()} == {("normal", "0")}


def test_skipped_files_are_named_each_time(tmp_path, folder, own_backbone, make_engine):
    shutil.copytree(folder, tmp_path / "pile")
    spoil(tmp_path / "pile")
    engine, model, loader = make_engine(), MuSc(own_backbone), predict_loader(tmp_path / "pile")
    for _ in range(2):
        engine.predict(model, dataloaders=loader)
        assert read_table(tmp_path)["empty.png"]["label"] == "skipped"
        assert len(loader.dataset) == 19
    engine.predict(model, dataset=PredictDataset(tmp_path / "pile"))
    assert read_table(tmp_path)["empty.png"]["label"] == "skipped"
    assert own_backbone.num_images == 12  # the pool was recognised


def test_files_are_skipped_where_worker_processes_read(tmp_path, folder, own_backbone, make_engine):
    shutil.copytree(folder, tmp_path / "pile")
    (tmp_path / "pile/empty.png").touch()
    loader = predict_loader(tmp_path / "pile", num_workers=1)
    files = list(loader.dataset.image_filenames)
    assert len(by_path(make_engine().predict(MuSc(own_backbone), dataloaders=loader))) == 12
    assert loader.dataset.image_filenames == files


def test_files_that_cannot_be_skipped_are_an_error(tmp_path, folder, own_backbone, make_engine):
    shutil.copytree(folder, tmp_path / "pile")
    (tmp_path / "pile/empty.png").touch()
    with pytest.raises(ValueError, match=r"1 of 13 images cannot be read.*empty\.png \(empty file\)"):
        make_engine().test(MuSc(own_backbone), dataloaders=predict_loader(tmp_path / "pile"))
    assert own_backbone.num_images == 0


def test_too_few_that_can_be_read(tmp_path, own_backbone, make_engine):
    write_products(tmp_path / "pile", range(1))
    (tmp_path / "pile/empty.png").touch()
    with pytest.raises(ValueError, match=r"1 of 2 images cannot be read.*empty\.png"):
        make_engine().predict(MuSc(own_backbone), data_path=tmp_path / "pile")
    assert not list(tmp_path.rglob("predictions.csv"))


@pytest.mark.parametrize("size", [(2, 40), (20_000, 30)], ids=["two pixels wide", "20,000 pixels wide"])
def test_odd_sizes_are_scored(size, tmp_path, own_backbone, make_engine):
    write_products(tmp_path / "pile", range(6))
    Image.new("RGB", size, "gray").save(tmp_path / "pile/odd.png")
    make_engine().predict(MuSc(own_backbone), data_path=tmp_path / "pile")
    row = read_table(tmp_path)["odd.png"]
    (details,) = (image for image in read_details(tmp_path) if image["path"] == str(tmp_path / "pile/odd.png"))
    assert len(details["regions"]) == int(row["regions"])
    for region in details["regions"]:
        assert region["x"] + region["width"] <= size[0]
        assert region["y"] + region["height"] <= size[1]
    assert 0 <= float(row["score"]) <= 1


def predict_under(limit: Callable[[], None], out: Path, data: Path, **arguments: str) -> CompletedProcess[str]:
    """Predict a folder in a process of its own that first gives something up."""
    return run_forked(_predict, limit, out, data, arguments, cwd=Path("/"))


def _predict(limit: Callable[[], None], out: Path, data: Path, arguments: dict[str, str]) -> None:
    limit()
    Engine(default_root_dir=out, enable_progress_bar=False).predict(MuSc(OwnBackbone(), **arguments), data_path=data)


def small_files_only() -> None:
    import resource  # POSIX's

    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))


def become_a_stranger() -> None:
    """As root sees everything."""
    import encodings.unicode_escape  # noqa: F401  # jinja2 needs that codec, which may be out of reach afterwards

    os.setgid(65534)
    os.setuid(65534)


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are POSIX's")
def test_nothing_is_half_written_where_the_disk_is_full(tmp_path, folder):
    done = predict_under(small_files_only, tmp_path / "out", folder)
    assert done.returncode != 0
    assert "cannot be written" in done.stderr
    assert "Make room, or choose another folder" in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".anomalib_run"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become a stranger")
class TestRights:
    """What a user without rights sees."""

    @pytest.fixture
    def pile(self):
        """A folder that strangers can reach, unlike pytest's own."""
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            root.chmod(0o755)
            write_products(root / "pile/open", range(5))
            (root / "out").mkdir()
            (root / "out").chmod(0o777)
            yield root

    def test_one_file_is_predicted_without_a_walk_through_its_folder(self, pile):
        (image,) = write_products(pile / "line", range(1))
        (pile / "line/private").mkdir(mode=0)
        references = {"mode": "reference", "references": str(pile / "pile")}
        done = predict_under(become_a_stranger, pile / "out", image, **references)
        assert done.returncode == 0, done.stderr
        assert read_table(pile / "out").keys() == {image.name}
        assert "private" not in done.stderr

    def test_files_and_folders_without_permission_are_skipped(self, pile):
        (shut,) = write_products(pile / "pile/shut", range(1))
        (unreadable,) = write_products(pile / "pile/more", range(1))
        unreadable.chmod(0)
        shut.parent.chmod(0)
        done = predict_under(become_a_stranger, pile / "out", pile / "pile")
        assert done.returncode == 0, done.stderr
        (table,) = (pile / "out").rglob("predictions.csv")
        lines = table.read_text().splitlines()
        assert sum(",normal," in line or ",anomalous," in line for line in lines) == 5
        skipped = [line for line in lines if ",skipped," in line]
        assert len(skipped) == 2
        assert all("Permission" in line and "Permission" in done.stderr for line in skipped)

    @pytest.mark.parametrize("shut", ["pile", "out"])
    def test_a_folder_without_permission_is_an_error(self, shut, pile):
        (pile / shut).chmod(0)
        done = predict_under(become_a_stranger, pile / "out", pile / "pile")
        (pile / shut).chmod(0o755)
        assert done.returncode != 0
        assert "ermission" in done.stderr
        assert str(pile / shut) in done.stderr
        assert not [path for path in (pile / "out").rglob("*") if path.is_file()]
