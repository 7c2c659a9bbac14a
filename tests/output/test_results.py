# SPDX-License-Identifier: Apache-2.0
"""What a prediction leaves behind: table, details, page, last lines; also where something goes wrong on the way."""

import csv
import json
import math
import os
import shutil
from pathlib import Path

import jsonschema
import pandas as pd
import pytest
import torch
from anomalib.data import ImageItem, PredictDataset
from anomalib.engine import Engine
from anomalib.models import Padim
from anomalib.visualization import ImageVisualizer
from commands import SMALL, anomalib, read_details, read_paths
from conftest import OwnBackbone, product, write_products
from lightning.pytorch import Callback
from runs import datamodule
from torch.utils.data import DataLoader, Dataset

from anomalib_musc import MuSc, PredictionWriter, RsCINPostProcessor
from anomalib_musc.output.files import MirroredFolder
from anomalib_musc.output.predictions import PoolReport, Prediction
from anomalib_musc.output.summary import summary
from anomalib_musc.output.table import COLUMNS, write_table

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "docs/predictions.schema.json").read_text())


@pytest.fixture
def pile(tmp_path: Path) -> Path:
    """Twelve good products and two broken ones."""
    write_products(tmp_path / "pile/good", range(12))
    write_products(tmp_path / "pile/bad", range(30, 32), masks=tmp_path / "masks")
    return tmp_path / "pile"


def test_least_pixel_sensitivity_has_its_page(pile, tmp_path, own_backbone, make_engine):
    post_processor = RsCINPostProcessor(pixel_sensitivity=0)
    make_engine().predict(MuSc(own_backbone, post_processor=post_processor), data_path=pile)
    assert list(tmp_path.rglob("review.html"))


# --- the table -----------------------------------------------------------------------------------------------------


def test_the_table_begins_with_the_most_anomalous_image(pile, tmp_path, own_backbone, make_engine, capfd):
    (pile / "empty.png").touch()
    make_engine().predict(MuSc(own_backbone), data_path=pile)
    (file,) = tmp_path.rglob("predictions.csv")
    table = pd.read_csv(file)
    assert tuple(table.columns) == COLUMNS
    assert len(table) == 15
    scored = table[table.label != "skipped"]
    assert scored["rank"].tolist() == list(range(1, 15))
    assert scored.score.is_monotonic_decreasing
    assert set(scored.path[:2]) == {str(pile / f"bad/00{number}.png") for number in range(2)}
    assert (scored.threshold == 0.5).all()
    assert ((scored.score > 0.5) == (scored.label == "anomalous")).all()
    assert ((scored.deviations > 3) == (scored.label == "anomalous")).all()
    assert ((scored.regions > 0) == (scored.label == "anomalous")).all()
    assert scored.raw_score.between(0, 2).all()
    assert all((file.parent / picture).is_file() for picture in scored.picture)
    assert table.iloc[-1].path == str(pile / "empty.png")
    assert table.iloc[-1].note == "empty file"
    lines = capfd.readouterr().out.splitlines()
    start = next(
        index for index, line in enumerate(lines) if line.startswith("15 images: 2 anomalous, 12 normal, 1 sk")
    )
    assert "3 times as far above the 45th percentile" in lines[start]
    assert [line.split()[-1] for line in lines[start + 1 : start + 6]] == scored.path[:5].tolist()
    assert "review.html" in lines[start + 6]
    assert str(file) in lines[start + 6]


def test_a_spreadsheet_sees_umlauts(pile, tmp_path, own_backbone, make_engine):
    (pile / "good/000.png").rename(pile / 'good/Größe "1", 部品;\n.png')
    make_engine().predict(MuSc(own_backbone), data_path=pile)
    (file,) = tmp_path.rglob("predictions.csv")
    assert file.read_bytes().startswith(b"\xef\xbb\xbf")
    assert str(pile / 'good/Größe "1", 部品;\n.png') in read_paths(tmp_path)


def test_details_follow_the_schema(pile, tmp_path, make_engine):
    (pile / "empty.png").touch()
    for model in (MuSc(OwnBackbone()), MuSc(OwnBackbone(), post_processor=False)):
        make_engine().predict(model, data_path=pile)
        file = max(tmp_path.rglob("predictions.json"), key=lambda path: path.stat().st_mtime_ns)
        jsonschema.validate(content := json.loads(file.read_text()), SCHEMA)
        rows = [row for row in read_paths(tmp_path).values() if row["label"] != "skipped"]
        assert [image["path"] for image in content["images"]] == [row["path"] for row in rows]
        assert [len(image["regions"]) for image in content["images"]] == [int(row["regions"]) for row in rows]
        assert content["skipped"] == [{"path": str(pile / "empty.png"), "reason": "empty file"}]
        assert all(image["path"] not in image["similar"] for image in content["images"])
        assert content["settings"]["mode"] == "mutual"
    assert content["threshold"]["score"] is None  # nothing decides without a post-processor


def test_the_threshold_of_the_details_decides_likewise_for_the_next_lot(pile, tmp_path, make_engine):
    make_engine().predict(MuSc(OwnBackbone()), data_path=pile)
    file = next(tmp_path.rglob("predictions.json"))
    threshold = json.loads(file.read_text())["threshold"]
    labels = {path: row["label"] for path, row in read_paths(tmp_path).items()}
    (tmp_path / "cli").mkdir()
    arguments = [*threshold["argument"].split(), str(threshold["before_normalisation"])]
    done = anomalib("predict", "--model", "MuSc", "--data", pile, *SMALL, *arguments, cwd=tmp_path / "cli")
    assert done.returncode == 0, done.stderr
    assert "given by hand" in done.stdout
    assert len(labels) == len(read_paths(tmp_path / "cli"))


def test_scores_that_were_clipped_are_still_ordered():
    close, far = Prediction("close", 1.0, True, deviations=3.0), Prediction("far", 1.0, True, deviations=9.0)
    assert sorted([close, far], key=lambda prediction: prediction.order) == [far, close]


def test_scores_that_are_no_numbers_leave_their_columns_empty(tmp_path):
    write_table(tmp_path / "t.csv", [Prediction("a", math.nan, None, raw_score=math.inf)], PoolReport())
    with (tmp_path / "t.csv").open(encoding="utf-8-sig") as file:
        (row,) = csv.DictReader(file)
    assert row["score"] == row["raw_score"] == row["label"] == ""


def test_another_model_has_table_and_page(tmp_path, mvtec_root, folder):
    writer = PredictionWriter()
    engine = Engine(default_root_dir=tmp_path, callbacks=[writer], enable_progress_bar=False, max_epochs=1)
    model = Padim(backbone="resnet18", layers=["layer1"], pre_trained=False, n_features=16)
    engine.fit(model, datamodule=datamodule(mvtec_root))
    engine.predict(model, data_path=folder)
    details = read_details(tmp_path)
    assert len(details) == 12
    assert all(image["raw_score"] is None and image["label"] for image in details)
    assert list(tmp_path.rglob("review.html"))


@pytest.mark.parametrize(
    "arguments", [{"prediction_writer": PredictionWriter(review=False)}, {"prediction_writer": False}]
)
def test_the_page_can_be_left_out(arguments, folder, tmp_path, own_backbone, make_engine):
    make_engine().predict(MuSc(own_backbone, **arguments), data_path=folder)
    assert not list(tmp_path.rglob("review.html"))


def test_the_page_shows_the_pool_of_the_table(pile, tmp_path, own_backbone, make_engine):
    make_engine().predict(MuSc(own_backbone), data_path=pile)
    (page,) = tmp_path.rglob("review.html")
    text = page.read_text()
    start = text.index(">", text.index('id="pool"')) + 1
    pool = json.loads(text[start : text.index("</script>", start)])
    rows = list(read_paths(tmp_path).values())
    assert [pool["absoluteRoot"] + name for name in pool["names"]] == [row["path"] for row in rows]
    assert pool["scores"] == pytest.approx([float(row["score"]) for row in rows], abs=1e-6)
    assert pool["threshold"] == 0.5
    slope, offset = pool["argumentScale"]
    threshold = json.loads(page.with_name("predictions.json").read_text())["threshold"]
    assert slope * 0.5 + offset == pytest.approx(threshold["before_normalisation"])


# --- what goes wrong -----------------------------------------------------------------------------------------------


class Vanish(Callback):
    """Delete a file once the pool is scored."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_predict_epoch_start(self, *args):  # noqa: ARG002
        self.path.unlink()


def test_an_image_that_vanishes_keeps_its_score(pile, tmp_path, own_backbone, make_engine, capfd):
    make_engine(callbacks=[Vanish(pile / "bad/001.png")]).predict(MuSc(own_backbone), data_path=pile)
    row = read_paths(tmp_path)[str(pile / "bad/001.png")]
    assert row["label"] == "anomalous"
    assert float(row["score"]) > 0.5
    assert "no picture" in row["note"]
    assert "1 image has a note in the table" in capfd.readouterr().out


def test_names_as_long_as_a_file_system_takes(pile, tmp_path, own_backbone, make_engine):
    for number, ending in enumerate(("a.png", "b.png")):
        (pile / f"good/00{number}.png").rename(pile / "good" / ("ä" * 124 + ending))
    writer = PredictionWriter(heatmaps=["npy", "png"])
    make_engine().predict(MuSc(own_backbone, prediction_writer=writer), data_path=pile)
    rows = read_paths(tmp_path)
    assert len(rows) == 14
    assert not any(row["note"] for row in rows.values())
    assert len(list(tmp_path.rglob("*.npy"))) == 14
    assert len({row["picture"] for row in rows.values()}) == 14


class Frames(Dataset):
    """Frames of a camera under made-up names."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> ImageItem:
        image = torch.from_numpy(product(index, defect=index == 5)[0]).permute(2, 0, 1) / 255
        return ImageItem(image=image, image_path=self.names[index])


def predict_frames(engine: Engine, model: MuSc, names: list[str]) -> None:
    collate = PredictDataset(ROOT / "docs/pictures").collate_fn
    engine.predict(model, dataloaders=DataLoader(Frames(names), collate_fn=collate))


def test_frames_with_names_that_are_no_files(tmp_path, own_backbone, make_engine):
    predict_frames(make_engine(), MuSc(own_backbone), [f"camera/frame {number}" for number in range(8)])
    rows = read_paths(tmp_path)
    assert len(rows) == 8
    assert all(row["score"] and row["label"] for row in rows.values())
    assert all(row["note"].count("No such file") == 1 for row in rows.values())
    flagged = [row for row in rows.values() if row["label"] == "anomalous"]
    assert flagged
    assert all(row["region_width"] for row in flagged)


def test_what_another_callback_does_costs_no_score(pile, tmp_path, own_backbone, make_engine):
    class Failing(ImageVisualizer):
        def on_predict_batch_end(self, *args, **kwargs):  # noqa: ARG002
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        make_engine().predict(MuSc(own_backbone, visualizer=Failing()), data_path=pile)
    rows = read_paths(tmp_path)
    assert len(rows) == 14
    assert all(row["score"] and row["label"] for row in rows.values())


# --- where things go -----------------------------------------------------------------------------------------------


def files_beneath(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("relative", [False, True])
def test_paths_with_dots_stay_within_the_runs_folder(relative, pile, tmp_path, own_backbone, make_engine, monkeypatch):
    shutil.copytree(pile, tmp_path / "twin")
    before = files_beneath(pile) | files_beneath(tmp_path / "twin")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    start = Path("..") if relative else tmp_path / "work" / ".."
    names = [str(start / tree / f"good/00{number}.png") for tree in ("pile", "twin") for number in range(4)]
    writer = PredictionWriter(heatmaps=["png"])
    predict_frames(make_engine(), MuSc(own_backbone, prediction_writer=writer), names)
    run = next(tmp_path.rglob("predictions.csv")).parent
    assert len(list((run / "images").rglob("*.png"))) == len(list((run / "heatmaps").rglob("*.png"))) == 8
    after = {path: content for path, content in files_beneath(tmp_path).items() if run not in path.parents}
    assert {path: content for path, content in after.items() if path in before} == before
    assert not [path for path in after if path not in before and "masks" not in path.parts]


def test_no_input_is_overwritten(pile, tmp_path, make_engine):
    before = files_beneath(pile)
    writer = PredictionWriter(output_dir=pile, heatmaps=["npy"])
    model = MuSc(OwnBackbone(), prediction_writer=writer)
    model.visualizer.output_dir = tmp_path  # so that pictures would lie where the images are
    make_engine().predict(model, data_path=pile)
    after = files_beneath(pile)
    assert {path: after[path] for path in before} == before
    pictures = [row["picture"] for row in read_paths(pile).values()]
    assert len(set(pictures)) == 14
    assert all((pile / picture).is_file() for picture in pictures)


def test_a_second_run_into_the_same_folder_leaves_the_first_alone(pile, tmp_path, make_engine):
    for _ in range(3):
        writer = PredictionWriter(output_dir=tmp_path / "mine", heatmaps=["png"])
        before = files_beneath(tmp_path / "mine")
        make_engine().predict(MuSc(OwnBackbone(), prediction_writer=writer), data_path=pile)
        after = files_beneath(tmp_path / "mine")
        assert before.items() <= after.items()
    tables = sorted(path.relative_to(tmp_path / "mine").as_posix() for path in (tmp_path / "mine").rglob("*.csv"))
    assert tables == ["predictions.csv", "v1/predictions.csv", "v2/predictions.csv"]


def test_places_are_given_once(tmp_path):
    (tmp_path / "out/x").mkdir(parents=True)
    (tmp_path / "out/x/1.png").touch()
    folder = MirroredFolder(tmp_path / "out", [tmp_path / "x/1.png", tmp_path / "x/2.png"])
    places = [folder.place(tmp_path / name) for name in ("x/1.png", "x/2.png", "x/2.png", "elsewhere/x/../../x/2.png")]
    assert [place.relative_to(tmp_path / "out").as_posix() for place in places] == [
        "x/1_2.png",
        "x/2.png",
        "x/2_2.png",
        "x/2_3.png",
    ]


@pytest.mark.parametrize("name", ["a" * 255, "a" * 251 + ".png", "部" * 84 + ".png", "." + "b" * 254])
@pytest.mark.parametrize("suffix", ["", ".npy"])
def test_no_name_is_too_long(name, suffix, tmp_path):
    places = [MirroredFolder(tmp_path).place(f"/x/{each}", suffix) for each in (name, name[:-1])]
    assert places[0] != places[1]
    for place in places:
        assert len(os.fsencode(place.name)) <= 255
        assert place.name.endswith(suffix)
        place.parent.mkdir(exist_ok=True)
        place.touch()


# --- last lines ----------------------------------------------------------------------------------------------------


def test_the_last_lines_name_five_images_and_all_warnings():
    predictions = [Prediction(f"{number}.png", 1 - number / 10, number < 2) for number in range(8)]
    report = PoolReport(skipped={"x": "broken"}, warnings=["two groups of images"])
    lines = summary(predictions, report, [Path("review.html")]).splitlines()
    assert lines[0].startswith("9 images: 2 anomalous, 6 normal, 1 skipped.")
    assert [line.split()[-1] for line in lines[1:6]] == [f"{number}.png" for number in range(5)]
    assert lines[6:] == ["Warning: two groups of images", "Written: review.html"]
