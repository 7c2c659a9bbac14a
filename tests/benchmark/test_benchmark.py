# SPDX-License-Identifier: Apache-2.0
"""Models side by side: the command in processes of its own, killed half-way, and what it leaves."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from anomalib.data import ImageBatch, MVTecAD
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from runs import relative_scores
from sklearn.metrics import average_precision_score, roc_auc_score

from anomalib_musc import MuSc
from anomalib_musc.benchmark.config import read_config
from anomalib_musc.benchmark.published import published_dataset, published_rows
from anomalib_musc.benchmark.records import METRICS, Predictions, Record, Store
from anomalib_musc.benchmark.summary import MEAN, best_of, rows_of
from anomalib_musc.cli import main
from anomalib_musc.functional import rscin
from anomalib_musc.metrics import AUPRO, PaperEvaluator
from anomalib_musc.metrics.ranking import aupro, pro_curve, rank
from anomalib_musc.pool.rescoring import image_features, rescore

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs/benchmark").glob("*.yaml"))
TINY = {"backbone": "test_vit", "pretrained": False}
PUBLISHED = "MuSc (CLIP ViT-L/14-336 518)"


def command(name: str, *arguments: str | Path, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start an installed entry point."""
    line = [str(Path(sys.executable).with_name(name)), *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(line, cwd=cwd, env={**os.environ, **environment}, text=True, **streams)


def run(name: str, *arguments: str | Path, cwd: Path, **environment: str) -> tuple[int, str]:
    """Run an installed entry point; returns its exit status and what it printed."""
    process = command(name, *arguments, cwd=cwd, **environment)
    output, _ = process.communicate(timeout=280)
    return process.returncode, output


def write_config(path: Path, model: object, data: object, **content: object) -> Path:
    path.write_text(yaml.safe_dump({"accelerator": "cpu", **content, "benchmark": {"model": model, "data": data}}))
    return path


def widget(mvtec_root: Path, **arguments: object) -> dict[str, object]:
    return {
        "class_path": "MVTecAD",
        "init_args": {"root": str(mvtec_root), "category": "widget", "num_workers": 0, **arguments},
    }


@pytest.fixture(scope="module")
def offline(tmp_path_factory, mvtec_root) -> dict[str, object]:
    """``configs/benchmark/offline.yaml`` on small pictures, killed after its first cell and started again."""
    folder = tmp_path_factory.mktemp("offline")
    for category in ("fabric", "gear"):
        shutil.copytree(mvtec_root / "widget", folder / "datasets/sample" / category)
    arguments = ["benchmark", "--config", ROOT / "configs/benchmark/offline.yaml"]
    results = folder / "results/benchmark/offline"
    first = command("anomalib-musc", *arguments, cwd=folder)
    deadline = time.monotonic() + 120
    while not list(results.glob("cells/*/record.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()  # ends once its processes have
    kept = {path: path.stat().st_mtime_ns for path in results.glob("cells/*/record.json")}
    status, output = run("anomalib-musc", *arguments, cwd=folder)
    return {"folder": folder, "results": results, "kept": kept, "status": status, "output": output}


def lines_of(results: Path) -> list[dict[str, str]]:
    with (results / "results.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


class TestOffline:
    def test_it_ends_well_and_says_where_the_report_is(self, offline):
        assert offline["status"] == 0, offline["output"]
        assert "report.html" in offline["output"]
        assert "PatchCore on sample gear, seed 0" in offline["output"]

    def test_a_finished_cell_is_not_repeated(self, offline):
        assert 1 <= len(offline["kept"]) < 6
        assert all(path.stat().st_mtime_ns == time for path, time in offline["kept"].items())
        assert f"6 cells, {len(offline['kept'])} of them finished before" in offline["output"]

    def test_every_cell_has_the_same_images_and_all_metrics(self, offline):
        lines = lines_of(offline["results"])
        assert [line["model"] for line in lines[::2]] == ["MuSc", "MuSc without RsCIN", "PatchCore", "PatchCore"]
        assert [line["model"] for line in lines[5::2]] == ["PatchCore + RsCIN"] * 2
        for line in lines:
            assert {0 <= float(line[name]) <= 1 for name in METRICS} == {True}
            assert line["num_test"] == "12"
            assert line["num_train"] == "4"

    def test_every_cell_says_what_it_took_and_on_what(self, offline):
        for line in lines_of(offline["results"]):
            assert all(float(line[name]) >= 0 for name in ("setup_s", "fit_s"))
            assert float(line["images_per_second"]) == pytest.approx(12 / float(line["test_s"]), rel=0.01)
            assert int(line["peak_host_bytes"]) > 0
            assert line["seed"] == "0"
            assert "threads" in line["device"]
            assert json.loads(line["versions"])["torch"] == version("torch")
            assert json.loads(line["configuration"])["model"]["init_args"]["backbone"]

    def test_predictions_are_what_the_metrics_are_of(self, offline):
        store = Store(offline["results"])
        for path in offline["results"].glob("cells/*"):
            record, predictions = store.record(path.name), store.predictions(path.name)
            truth = predictions.labels
            assert truth.tolist() == [int("/good/" not in name) for name in predictions.paths]
            assert record.metrics["image_auroc"] == pytest.approx(roc_auc_score(truth, predictions.scores), abs=1e-6)
            precision = average_precision_score(truth, predictions.scores)
            assert record.metrics["image_ap"] == pytest.approx(precision, abs=1e-6)
            assert predictions.masks.any(axis=(1, 2)).tolist() == truth.astype(bool).tolist()
            assert predictions.maps.min() == 0
            assert predictions.maps.max() == 255

    def test_scores_are_those_before_normalisation(self, offline):
        for path in offline["results"].glob("cells/*PatchCore*"):
            scores = Store(offline["results"]).predictions(path.name).scores
            assert len(np.unique(scores)) == len(scores)  # none is clipped
            assert scores.max() > 1

    def test_rescored_is_what_python_gives(self, offline):
        for path in offline["results"].glob("cells/*PatchCore*"):
            predictions = Store(offline["results"]).predictions(path.name)
            features = image_features(predictions.paths, "musc-tiny")
            assert features.shape == (12, 160)
            expected = rscin(torch.from_numpy(predictions.scores), features, (1, 2, 3))
            assert predictions.rescored.tolist() == pytest.approx(expected.tolist(), abs=1e-4)

    def test_markdown_has_the_best_in_bold_and_nothing_published(self, offline):
        text = (offline["results"] / "results.md").read_text(encoding="utf-8")
        table = [line.split(" | ") for line in text.splitlines() if line.startswith("| mean |")]
        for column in range(2, 9):
            figures = [float(line[column].strip("*")) for line in table]
            bold = [line[column].startswith("**") for line in table]
            assert bold == [figure == max(figures) for figure in figures]
        assert "published" not in text

    def test_report_shows_every_model(self, offline):
        page = (offline["results"] / "report.html").read_text(encoding="utf-8")
        assert all(name in page for name in ("MuSc without RsCIN", "PatchCore + RsCIN", "fabric", "gear"))
        assert page.count("data:image") > 50


DEADLY = """
import os, signal
from anomalib_musc import MuSc

class Deadly(MuSc):
    def on_test_start(self):
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, mvtec_root) -> dict[str, object]:
    """A configuration of models that fail in every way beside some that do not."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "deadly.py").write_text(DEADLY)
    plain = {"class_path": "anomalib.post_processing.PostProcessor"}
    bank = {"mode": "reference", "k_shot": 3}
    models = [
        {"name": "MuSc", "class_path": "MuSc", "init_args": TINY, "rscin": TINY},
        {"name": "Deadly", "class_path": "deadly.Deadly", "init_args": TINY},
        {"name": "Plain | pipe", "class_path": "MuSc", "init_args": {**TINY, "post_processor": plain}, "rscin": TINY},
        {"name": "Bank", "class_path": "MuSc", "init_args": {**TINY, **bank}, "rscin": {"backbone": "nosuch"}},
        {"name": "Broken", "class_path": "MuSc", "init_args": {**TINY, "pretrained": "nowhere.safetensors"}},
    ]
    config = write_config(folder / "mixed.yaml", {"grid": models}, widget(mvtec_root))
    arguments = ["benchmark", "--config", config, "--output", folder / "out"]
    status, output = run("anomalib-musc", *arguments, cwd=folder, PYTHONPATH=str(folder))
    records = [json.loads(path.read_text()) for path in (folder / "out/cells").glob("*/record.json")]
    by_model = {record["model"]: record for record in records}
    return {"status": status, "output": output, "records": by_model, "out": folder / "out"}


class TestMixed:
    def test_a_failure_is_recorded_and_the_rest_goes_on(self, mixed):
        assert mixed["status"] == 1
        assert "failed: Broken on" in mixed["output"]
        assert "nowhere.safetensors" in mixed["records"]["Broken"]["error"]
        assert list(mixed["records"]).count("MuSc") == 1
        assert len(mixed["records"]) == 5
        for name in ("report.html", "results.md", "results.csv"):
            assert "nowhere.safetensors" in (mixed["out"] / name).read_text(encoding="utf-8")

    def test_a_model_that_takes_its_process_down_takes_no_other(self, mixed):
        assert "-9" in mixed["records"]["Deadly"]["error"]

    def test_a_second_row_that_fails_leaves_the_first(self, mixed):
        bank = mixed["records"]["Bank"]
        assert bank["error"] is None
        assert bank["metrics"]["image_auroc"] > 0.5
        assert "nosuch" in bank["rscin"]["error"]
        assert "failed: Bank on" in mixed["output"]

    def test_metrics_are_those_of_engine(self, mixed, mvtec_root, tmp_path):
        data = MVTecAD(root=mvtec_root, category="widget", num_workers=0)
        engine = Engine(default_root_dir=tmp_path, logger=False)
        evaluator = PaperEvaluator()
        evaluator.test_metrics.append(AUPRO(["anomaly_map", "gt_mask"], prefix="pixel_", method="official"))
        (expected,) = engine.test(MuSc(**TINY, visualizer=False, evaluator=evaluator), datamodule=data)
        found = mixed["records"]["MuSc"]["metrics"]
        names = {"image_auroc": "image_AUROC", "pixel_ap": "pixel_AveragePrecision", "aupro": "pixel_AUPRO"}
        names["aupro_official"] = "pixel_AUPRO_official"
        for ours, theirs in names.items():
            assert found[ours] == pytest.approx(expected[theirs], abs=1e-5)

    def test_a_second_row_with_rscin_is_what_musc_itself_gives(self, mixed):
        plain, musc = mixed["records"]["Plain | pipe"], mixed["records"]["MuSc"]
        own = {name: value for name, value in musc["metrics"].items() if name.startswith("image")}
        assert plain["rscin"]["metrics"] == pytest.approx(own, abs=1e-6)
        assert plain["metrics"]["pixel_ap"] == pytest.approx(musc["metrics"]["pixel_ap"], abs=1e-6)

    def test_image_features_are_extracted_once_for_a_category(self, mixed):
        assert len(list((mixed["out"] / "features").glob("*.npz"))) == 1
        seconds = {mixed["records"][name]["rscin"]["seconds"] for name in ("MuSc", "Plain | pipe")}
        assert len(seconds) == 1  # those of the one extraction

    def test_memory_is_that_of_a_cell_alone(self, mixed):
        peaks = [mixed["records"][name]["peak_host_bytes"] for name in ("MuSc", "Plain | pipe")]
        assert max(peaks) < 2 * min(peaks)

    def test_a_table_has_as_many_columns_in_every_row(self, mixed):
        text = (mixed["out"] / "results.md").read_text(encoding="utf-8")
        columns = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}
        assert len(columns) == 1


def test_models_see_the_same_images_where_a_datamodule_splits_them_by_chance(tmp_path, mvtec_root):
    arguments = {"normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/scratch"}
    data = {
        "class_path": "Folder",
        "init_args": {"name": "w", "root": str(mvtec_root / "widget"), "num_workers": 0, **arguments},
    }
    models = [
        {"name": "A", "class_path": "MuSc", "init_args": TINY},
        {"name": "B", "class_path": "Padim", "init_args": {"backbone": "resnet18", "pre_trained": False}},
    ]
    config = write_config(tmp_path / "f.yaml", {"grid": models}, data)
    status, output = run("anomalib-musc", "benchmark", "--config", config, cwd=tmp_path)
    assert status == 0, output
    store = Store(tmp_path / "results/benchmark/f")
    first, second = (store.predictions(path.name).paths for path in store.folder.glob("cells/*"))
    assert first == second
    assert 2 <= len(first) < 12


def test_sigterm_ends_it_with_a_status_that_says_so(tmp_path, mvtec_root):
    model = {"class_path": "MuSc", "init_args": TINY}
    config = write_config(tmp_path / "t.yaml", model, widget(mvtec_root))
    process = command("anomalib-musc", "benchmark", "--config", config, cwd=tmp_path)
    while line := process.stdout.readline():
        if "MuSc on" in line:
            break
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.rglob("record.json"))


MUSC = {"model": {"class_path": "MuSc"}, "data": "DATA"}
WRONG = {
    "unknown key": ({"benchmark": {"model": {}, "data": {}, "models": 1}}, "models"),
    "no data": ({"benchmark": {"model": {"class_path": "MuSc"}}}, "data"),
    "no class path": ({"benchmark": {"model": {"name": "A"}, "data": "DATA"}}, "class_path"),
    "unknown model": ({"benchmark": {"model": {"class_path": "Nothing"}, "data": "DATA"}}, "Nothing"),
    "misspelt argument": (
        {"benchmark": {"model": {"class_path": "MuSc", "init_args": {"backbon": "x"}}, "data": "DATA"}},
        "backbon",
    ),
    "unknown dataset": ({"benchmark": {"model": {"class_path": "MuSc"}, "data": {"class_path": "Nowhere"}}}, "Nowhere"),
    "engine": (
        {"benchmark": {"model": {"class_path": "MuSc", "engine": {"max_epoch": 3}}, "data": "DATA"}},
        "max_epoch",
    ),
    "engine's device": (
        {"benchmark": {"model": {"class_path": "MuSc", "engine": {"accelerator": "cpu"}}, "data": "DATA"}},
        "accelerator, which no benchmark takes",
    ),
    "no alternatives": ({"benchmark": {"model": {"grid": []}, "data": "DATA"}}, "empty grid"),
    "same names": (
        {
            "benchmark": {
                "model": {"class_path": "MuSc", "init_args": {"backbone": {"grid": ["test_vit", "resnet18"]}}},
                "data": "DATA",
            }
        },
        "'MuSc'",
    ),
    "windows": (
        {
            "benchmark": {
                "model": {"class_path": "MuSc", "rscin": {"backbone": "x", "windows": [0]}},
                "data": "DATA",
            }
        },
        "windows",
    ),
    "rscin without backbone": (
        {"benchmark": {"model": {"class_path": "MuSc", "rscin": {"windows": [1]}}, "data": "DATA"}},
        "backbone",
    ),
    "seed": ({"benchmark": {"seed": "one", "model": {"class_path": "MuSc"}, "data": "DATA"}}, "seed"),
    "not a mapping": ([1, 2], "benchmark"),
    "title": ({"title": 2024, "benchmark": MUSC}, "title"),
    "output": ({"output": 5, "benchmark": MUSC}, "output"),
    "accelerator": ({"accelerator": "gpuu", "benchmark": MUSC}, "gpuu"),
    "data is a list": ({"benchmark": {**MUSC, "data": [1]}}, "data"),
    "init_args is a list": (
        {"benchmark": {"model": {"class_path": "MuSc", "init_args": [1]}, "data": "DATA"}},
        "init_args",
    ),
    "name is no text": ({"benchmark": {"model": {"class_path": "MuSc", "name": {"a": None}}, "data": "DATA"}}, "name"),
    "rscin is no mapping": ({"benchmark": {"model": {"class_path": "MuSc", "rscin": False}, "data": "DATA"}}, "rscin"),
    "category": (
        {"benchmark": {**MUSC, "data": {"class_path": "MVTecAD", "init_args": {"root": ".", "category": "wigdet"}}}},
        "no category 'wigdet'",
    ),
    "category called mean": (
        {"benchmark": {**MUSC, "data": {"class_path": "Folder", "init_args": {"name": "mean", "normal_dir": "x"}}}},
        "'mean'",
    ),
    "a name that a second row has": (
        {
            "benchmark": {
                "model": {
                    "grid": [
                        {"name": "A", "class_path": "MuSc", "rscin": {"backbone": "x"}},
                        {"name": "A + RsCIN", "class_path": "MuSc"},
                    ]
                },
                "data": "DATA",
            }
        },
        "RsCIN",
    ),
}


@pytest.mark.parametrize(("content", "named"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_configuration_is_one_error_that_names_the_place(content, named, tmp_path, mvtec_root):
    if isinstance(content, dict) and content["benchmark"].get("data") == "DATA":
        content = {**content, "benchmark": {**content["benchmark"], "data": widget(mvtec_root)}}
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=named) as caught:
        read_config(path)
    assert "wrong.yaml" in str(caught.value)


def refusal(config: Path, capsys, monkeypatch) -> str:
    """Run the command in this process, as it ends before any cell; returns what it says."""
    monkeypatch.chdir(config.parent)
    monkeypatch.setattr(sys, "argv", ["anomalib-musc", "benchmark", "--config", config.name])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert [path.name for path in config.parent.iterdir()] == [config.name]
    return capsys.readouterr().err


def test_a_wrong_configuration_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    (tmp_path / "broken.yaml").write_text("benchmark: [")
    assert "broken.yaml cannot be read" in refusal(tmp_path / "broken.yaml", capsys, monkeypatch)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations(path, tmp_path, monkeypatch):
    (tmp_path / "datasets/sample/fabric").mkdir(parents=True)
    (tmp_path / "datasets/sample/gear").mkdir()
    monkeypatch.chdir(tmp_path)
    config = read_config(path)
    assert len(config.cells) == {"ablations": 285, "btad": 15, "mvtec_ad": 75, "offline": 6, "visa": 60}[path.stem]
    assert len({cell.key for cell in config.cells}) == len(config.cells)
    settings = {cell.name: cell.setting for cell in config.cells}
    expected = {"ablations": 1, "offline": 0}.get(path.stem, 2)
    assert sum(setting is not None for setting in settings.values()) == expected


def test_grids_within_alternatives_and_names_from_arguments(tmp_path, mvtec_root):
    degrees = {"aggregation_degrees": {"grid": [[1], [3]]}}
    model = {
        "grid": [
            {"name": "r {aggregation_degrees}", "class_path": "MuSc", "init_args": degrees},
            {"class_path": "Patchcore"},
        ]
    }
    shutil.copytree(mvtec_root / "widget", tmp_path / "own/a")
    shutil.copytree(mvtec_root / "widget", tmp_path / "own/b")
    own = widget(tmp_path / "own", category={"grid": ["a", "b"]})
    data = {"grid": [own, {**widget(mvtec_root), "name": "ours"}]}
    config = read_config(write_config(tmp_path / "some.yaml", model, data))
    found = {(cell.name, cell.dataset, cell.category) for cell in config.cells}
    places = [("own", "a"), ("own", "b"), ("ours", "widget")]
    assert found == {(name, *place) for name in ("r [1]", "r [3]", "Patchcore") for place in places}
    assert config.title == "some"
    assert config.output == Path("results/benchmark/some")


def test_a_configuration_means_the_same_data_from_everywhere(tmp_path, mvtec_root, monkeypatch):
    model, keys = {"class_path": "MuSc"}, []
    for place, root in ((mvtec_root, "."), (mvtec_root.parent, mvtec_root.name)):
        monkeypatch.chdir(place)
        (cell,) = read_config(write_config(tmp_path / "c.yaml", model, widget(Path(root)))).cells
        keys.append(cell.key)
        assert cell.dataset == mvtec_root.name
    assert keys[0] == keys[1]


def test_a_download_changes_no_key(tmp_path):
    data = {"class_path": "MVTecAD", "init_args": {"root": str(tmp_path / "root"), "category": "bottle"}}
    config = write_config(tmp_path / "c.yaml", {"class_path": "MuSc"}, data)
    cells = [read_config(config).cells[0]]
    (tmp_path / "root").mkdir()  # of a download that failed
    cells += read_config(config).cells
    for category in ("bottle", "cable"):
        (tmp_path / "root" / category).mkdir()
    cells += read_config(config).cells
    assert [(cell.dataset, cell.key) for cell in cells] == [("MVTec AD", cells[0].key)] * 3


@pytest.mark.parametrize("of", ["a named backbone", "an own backbone", "RsCIN"])
def test_a_cell_is_another_with_other_weights_in_the_same_file(of, tmp_path, mvtec_root):
    weights = tmp_path / "weights.safetensors"
    own = {"class_path": "benchmarks.same_features.MobileNet", "init_args": {"weights": str(weights)}}
    named = {"backbone": "test_vit", "pretrained": str(weights)}
    model = {
        "a named backbone": {"class_path": "MuSc", "init_args": named},
        "an own backbone": {"class_path": "MuSc", "init_args": {"backbone": own}},
        "RsCIN": {"class_path": "Padim", "rscin": named},
    }[of]
    keys = set()
    for content in ("some", "other", "other"):
        if not weights.is_file() or weights.read_text() != content:
            weights.write_text(content)
        keys.add(read_config(write_config(tmp_path / "c.yaml", model, widget(mvtec_root))).cells[0].key)
    assert len(keys) == 2


def test_a_cell_is_another_if_anything_differs(tmp_path, mvtec_root):
    def key(**arguments: object) -> str:
        model = {"name": "MuSc", "class_path": "MuSc", "init_args": arguments}
        return read_config(write_config(tmp_path / "c.yaml", model, widget(mvtec_root))).cells[0].key

    assert key() == key(backbone="ViT-L-14-336")  # which is the default
    assert key() != key(image_size=224)


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        ({}, PUBLISHED),
        ({"image_size": 518, "memory_budget": 2.0}, PUBLISHED),
        ({"activation": "official"}, PUBLISHED),
        ({"activation": "weights"}, None),
        ({"image_size": 336}, None),
        ({"aggregation_degrees": [1, 3]}, None),
        ({"interval": [0.0, 0.5]}, None),
        ({"num_subsets": 2}, None),
        ({"precision": "fast"}, None),
        ({"mode": "both"}, None),
        ({"backbone": "dino_vitbase8"}, None),
        ({"post_processor": {"class_path": "anomalib.post_processing.PostProcessor"}}, None),
    ],
)
def test_only_the_papers_setting_stands_beside_its_figures(arguments, setting, tmp_path):
    model = {"class_path": "MuSc", "init_args": arguments}
    data = {"class_path": "MVTecAD", "init_args": {"root": str(tmp_path / "MVTecAD"), "category": "bottle"}}
    (cell,) = read_config(write_config(tmp_path / "c.yaml", model, data)).cells
    assert cell.dataset == "MVTec AD"
    assert cell.setting == setting


def test_a_part_of_the_images_is_not_the_papers_setting(tmp_path):
    arguments = {"root": str(tmp_path / "MVTecAD"), "category": "bottle", "val_split_mode": "from_test"}
    data = {"class_path": "MVTecAD", "init_args": arguments}
    (cell,) = read_config(write_config(tmp_path / "c.yaml", {"class_path": "MuSc"}, data)).cells
    assert cell.setting is None


def test_a_folder_that_is_only_laid_out_alike_has_no_published_figures(mvtec_root, tmp_path):
    assert published_dataset("MVTecAD", "bottle", mvtec_root) is None  # there, and without the other categories
    assert published_dataset("MVTecAD", "bottle", tmp_path / "MVTecAD") == "MVTec AD"
    assert published_rows(mvtec_root.name) == []


def test_published_figures_have_sources():
    for dataset in ("MVTec AD", "VisA", "BTAD", "MVTec 3D-AD"):
        assert published_rows(dataset)
        assert all(row.source and row.setting and row.metrics for row in published_rows(dataset))
    methods = {row.method for row in published_rows("MVTec AD")}
    assert methods >= {"GPT-4V-AD", "UniADet (DINOv3 ViT-L/16)", "DiAD", "FADE", "APRIL-GAN", "WinCLIP"}
    batch = {row.method for row in published_rows("MVTec AD") if row.setting == "batch zero-shot"}
    assert batch >= {"CoDeGraph (DINOv2)", "SubspaceAD (batched)", "AnomalyDINO (batched)"}
    assert {row.setting for row in published_rows("MVTec AD") if row.method in {"WinCLIP", "AnomalyVFM"}} == {
        "zero-shot",
        "4-shot",
    }
    assert {row.method for row in published_rows("MVTec 3D-AD")} >= {"LSFA"}


def record(model: str, category: str, value: float, **changes: object) -> Record:
    made = Record(f"{model}-{category}", model, "d", category, 0, metrics=dict.fromkeys(METRICS, value), num_test=10)
    made.seconds = {"setup": 1.0, "fit": 2.0, "test": 5.0}
    vars(made).update(changes)
    return made


def test_means_are_over_categories_and_not_of_models_that_failed():
    rows = rows_of(
        [record("A", "x", 0.5), record("A", "y", 0.7), record("B", "x", 0.9), record("B", "y", 0, error="no")]
    )
    means = {row.model: row for row in rows if row.category == MEAN}
    assert set(means) == {"A"}
    assert means["A"].metrics["aupro"] == pytest.approx(0.6)
    assert means["A"].seconds == 16
    assert means["A"].images_per_second == pytest.approx(2)
    assert best_of(row for row in rows if row.category == "x")["image_ap"] == 0.9


def test_several_seeds_are_averaged():
    rows = rows_of([record("A", "x", 0.5), record("A", "x", 0.7, seed=1)])
    assert rows[0].metrics["aupro"] == pytest.approx(0.6)
    assert rows[0].spreads["aupro"] == pytest.approx(0.1414, abs=1e-4)
    assert rows[0].seconds == 8


def test_pro_curve_has_the_area_that_is_reported():
    generator = torch.Generator().manual_seed(0)
    anomalous = torch.randn(400, generator=generator) + 2
    sizes = torch.cat([torch.full((100,), 100), torch.full((300,), 300)])
    ranks = rank(torch.randn(20_000, generator=generator), anomalous, sizes)
    rates, overlaps = pro_curve(ranks, num_points=3001)
    assert float(torch.trapezoid(overlaps, rates) / 0.3) == pytest.approx(float(aupro(ranks)), abs=2e-3)
    above = (ranks.scores >= ranks.scores[-50]).double()
    assert overlaps[-1] <= 1
    assert float(above.sum()) == 50


def test_a_record_is_whole_or_absent(tmp_path):
    store = Store(tmp_path)
    predictions = Predictions(["a.png"], np.ones(1, np.int8), np.ones(1, np.float32))
    store.save(record("A", "x", 0.5), predictions)
    assert store.is_finished("A-x")
    assert store.predictions("A-x").paths == ["a.png"]
    store.save(record("B", "x", 0.5, error="ValueError: no"), None)
    assert not store.is_finished("B-x")
    assert not store.is_finished("C-x")
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("content", ["", "{", '{"bogus": 1}'])
@pytest.mark.parametrize("name", ["record.json", "predictions.npz"])
def test_a_damaged_cell_counts_as_not_run(name, content, tmp_path):
    store = Store(tmp_path)
    store.save(record("A", "x", 0.5), Predictions(["a.png"], np.ones(1, np.int8), np.ones(1, np.float32)))
    (tmp_path / "cells/A-x" / name).write_text(content)
    with pytest.warns(UserWarning, match=name):
        assert not store.is_finished("A-x")


class TestRescore:
    """RsCIN for the predictions of any model, from Python."""

    def test_it_is_rscin_with_a_backbones_features(self, folder, own_backbone):
        paths = sorted(map(str, folder.rglob("*.png")))
        scores = torch.rand(len(paths), generator=torch.Generator().manual_seed(0))
        batches = [
            ImageBatch(image=torch.zeros(len(part), 3, 8, 8), image_path=part, pred_score=values)
            for part, values in ((paths[:5], scores[:5]), (paths[5:], scores[5:]))
        ]
        features = image_features(paths, own_backbone)
        found = rescore(batches, own_backbone, windows=(1, 4))
        assert found.tolist() == rscin(scores, features, (1, 4)).tolist()

    def test_it_is_what_musc_does(self, folder, own_backbone, make_engine):
        options = {"post_processor": PostProcessor(enable_normalization=False), "visualizer": False}
        plain = make_engine().predict(MuSc(own_backbone, **options), data_path=folder)
        musc = MuSc(own_backbone, visualizer=False)
        make_engine().predict(musc, data_path=folder)
        found = rescore(plain, own_backbone)
        assert found.tolist() == pytest.approx(relative_scores(musc.pools[0]), abs=1e-6)

    def test_wrong_predictions_are_named(self, folder, own_backbone, tmp_path):
        path = next(folder.rglob("*.png"))
        batch = {"image": torch.zeros(1, 3, 8, 8)}
        with pytest.raises(ValueError, match="image_path"):
            rescore([ImageBatch(**batch, pred_score=torch.ones(1))], own_backbone)
        with pytest.raises(ValueError, match="pred_score"):
            rescore([ImageBatch(**batch, image_path=[str(path)])], own_backbone)
        with pytest.raises(ValueError, match="empty"):
            rescore([], own_backbone)
        whole = ImageBatch(**batch, image_path=[str(path)], pred_score=torch.tensor([float("nan")]))
        with pytest.raises(ValueError, match="1 scores that are not finite"):
            rescore([whole], own_backbone)
        with pytest.raises(ValueError, match="windows"):
            rescore([whole], own_backbone, windows=(0,))
        assert own_backbone.num_images == 0
        (tmp_path / "no.png").write_text("text")
        bad = ImageBatch(**batch, image_path=[str(tmp_path / "no.png")], pred_score=torch.ones(1))
        with pytest.raises(ValueError, match=r"no\.png"):
            rescore([bad], own_backbone)


PARALLEL = """
import sys
from pathlib import Path
from anomalib.pipelines.components.runners import ParallelRunner
from anomalib_musc.benchmark.config import read_config
from anomalib_musc.benchmark.pipeline import CellGenerator

if __name__ == "__main__":
    records = ParallelRunner(CellGenerator(read_config(Path(sys.argv[1]), Path("out"))), n_jobs=2).run({})
    print(sorted((record.model, record.error) for record in records))
"""


def test_cells_run_in_parallel_as_anomalibs_runner_does(tmp_path, mvtec_root):
    models = [{"name": name, "class_path": "MuSc", "init_args": TINY} for name in ("A", "B")]
    config = write_config(tmp_path / "two.yaml", {"grid": models}, widget(mvtec_root))
    (tmp_path / "parallel.py").write_text(PARALLEL)
    done = subprocess.run(
        [sys.executable, "parallel.py", config], cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "[('A', None), ('B', None)]" in done.stdout


def test_anomalibs_own_benchmark_takes_musc_beside_patchcore(tmp_path, mvtec_root):
    models = [
        {"class_path": "MuSc", "init_args": TINY},
        {"class_path": "Patchcore", "init_args": {"backbone": "resnet18", "pre_trained": False}},
    ]
    grid = {"seed": 0, "model": {"grid": models}, "data": widget(mvtec_root)}
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({"accelerator": ["cpu"], "benchmark": grid}))
    status, output = run("anomalib", "benchmark", "--config", "b.yaml", cwd=tmp_path)
    assert status == 0, output
    (table,) = (tmp_path / "runs/benchmark").rglob("results.csv")
    with table.open() as file:
        lines = {line["model.class_path"]: line for line in csv.DictReader(file)}
    assert float(lines["MuSc"]["pixel_AUPRO"]) > 0.5
    assert float(lines["Patchcore"]["image_AUROC"]) > 0.5
    assert lines["Patchcore"]["pixel_AUPRO"] == ""


SMALL_WINCLIP = """
from pathlib import Path
import open_clip
from anomalib.models import WinClip

open_clip.add_model_config(Path(__file__).with_name("ViT-B-16-plus-240.json"))

class Small(WinClip):
    pass
"""
SMALL_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 240, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
RANDOM_WEIGHTS = """
import sys
from pathlib import Path
import open_clip
import small_winclip
from safetensors.torch import save_file

name, repository = "ViT-B-16-plus-240", sys.argv[2].strip("/").replace("/", "--")
home = Path(sys.argv[1]) / "hub" / f"models--{repository}"
(home / "snapshots/0").mkdir(parents=True)
(home / "refs").mkdir()
(home / "refs/main").write_text("0")
state = open_clip.create_model(name, pretrained=None).state_dict()
save_file({key: value.contiguous() for key, value in state.items()}, home / "snapshots/0/open_clip_model.safetensors")
"""


def test_winclip_with_random_weights_from_the_hubs_own_cache(tmp_path, mvtec_root):
    """The real loading path, as anomalib's WinCLIP takes its weights from nowhere else; a small CLIP by its name."""
    repository = open_clip.get_pretrained_cfg("ViT-B-16-plus-240", "laion400m_e31").get("hf_hub")
    if not repository:
        pytest.skip("this open_clip takes the weights from elsewhere")
    (tmp_path / "small_winclip.py").write_text(SMALL_WINCLIP)
    (tmp_path / "ViT-B-16-plus-240.json").write_text(json.dumps(SMALL_CLIP))
    search = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": search}
    line = [sys.executable, "-c", RANDOM_WEIGHTS, tmp_path / "hf", repository]
    subprocess.run(line, check=True, capture_output=True, timeout=120, env={**os.environ, **offline})
    few_shot = {"name": "few", "class_path": "small_winclip.Small", "init_args": {"k_shot": 2}}
    models = [{"name": "zero", "class_path": "small_winclip.Small"}, few_shot]
    config = write_config(tmp_path / "w.yaml", {"grid": models}, widget(mvtec_root))
    status, output = run("anomalib-musc", "benchmark", "--config", config, cwd=tmp_path, **offline)
    assert status == 0, output
    lines = {line["model"]: line for line in lines_of(tmp_path / "results/benchmark/w")}
    assert set(lines) == {"zero", "few"}
    assert all(line[name] for line in lines.values() for name in METRICS)
    assert lines["zero"]["aupro"] != lines["few"]["aupro"]
