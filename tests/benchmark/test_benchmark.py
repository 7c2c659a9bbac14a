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
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.pipelines.components.runners import ParallelRunner
from bench_runs import TINY, command, run, widget, write_config
from forks import run_forked
from sklearn.metrics import average_precision_score, roc_auc_score

from anomalib_musc import MuSc
from anomalib_musc.benchmark.config import read_config
from anomalib_musc.benchmark.pipeline import CellGenerator
from anomalib_musc.benchmark.records import METRICS, Store
from anomalib_musc.functional import rscin
from anomalib_musc.metrics import AUPRO, PaperEvaluator
from anomalib_musc.pool.rescoring import image_features

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def offline(tmp_path_factory, mvtec_root) -> dict[str, object]:
    """``configs/benchmark/offline.yaml`` on one product's small pictures, killed after a cell and started again."""
    folder = tmp_path_factory.mktemp("offline")
    shutil.copytree(mvtec_root / "widget", folder / "datasets/sample/gear")
    config = (ROOT / "configs/benchmark/offline.yaml").read_text(encoding="utf-8")
    assert "[fabric, gear]" in config
    (folder / "offline.yaml").write_text(config.replace("[fabric, gear]", "[gear]"), encoding="utf-8")
    arguments = ["benchmark", "--config", "offline.yaml"]
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
        assert 1 <= len(offline["kept"]) < 3
        assert all(path.stat().st_mtime_ns == time for path, time in offline["kept"].items())
        assert f"3 cells, {len(offline['kept'])} of them finished before" in offline["output"]

    def test_every_cell_has_the_same_images_and_all_metrics(self, offline):
        lines = lines_of(offline["results"])
        assert [line["model"] for line in lines] == ["MuSc", "MuSc without RsCIN", "PatchCore", "PatchCore + RsCIN"]
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
        assert all(name in page for name in ("MuSc without RsCIN", "PatchCore + RsCIN", "gear"))
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


def run_in_parallel(config: Path) -> None:
    runner = ParallelRunner(CellGenerator(read_config(config, Path("out"))), n_jobs=2)
    sys.stdout.write(str(sorted((record.model, record.error) for record in runner.run({}))))


def test_cells_run_in_parallel_and_see_the_same_images(tmp_path, mvtec_root):
    """As anomalib's runner does it, where a datamodule splits images by chance."""
    folders = {"normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/scratch"}
    arguments = {"name": "w", "root": str(mvtec_root / "widget"), "num_workers": 0, **folders}
    models = [
        {"name": "A", "class_path": "MuSc", "init_args": TINY},
        {"name": "B", "class_path": "Padim", "init_args": {"backbone": "resnet18", "pre_trained": False}},
    ]
    config = write_config(tmp_path / "two.yaml", {"grid": models}, {"class_path": "Folder", "init_args": arguments})
    done = run_forked(run_in_parallel, config, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[('A', None), ('B', None)]" in done.stdout
    store = Store(tmp_path / "out")
    first, second = (store.predictions(path.name).paths for path in (tmp_path / "out/cells").glob("*"))
    assert first == second
    assert 2 <= len(first) < 12


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
import torch
from safetensors.torch import save_file

name, repository = "ViT-B-16-plus-240", sys.argv[2].strip("/").replace("/", "--")
open_clip.add_model_config(Path(sys.argv[3]))
home = Path(sys.argv[1]) / "hub" / f"models--{repository}"
(home / "snapshots/0").mkdir(parents=True)
(home / "refs").mkdir()
(home / "refs/main").write_text("0")
torch.manual_seed(0)
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
    line = [sys.executable, "-c", RANDOM_WEIGHTS, tmp_path / "hf", repository, tmp_path / "ViT-B-16-plus-240.json"]
    subprocess.run(line, check=True, capture_output=True, timeout=120, env={**os.environ, **offline})
    few_shot = {"name": "few", "class_path": "small_winclip.Small", "init_args": {"k_shot": 2}}
    models = [{"name": "zero", "class_path": "small_winclip.Small"}, few_shot]
    config = write_config(tmp_path / "w.yaml", {"grid": models}, widget(mvtec_root))
    status, output = run("anomalib-musc", "benchmark", "--config", config, cwd=tmp_path, **offline)
    assert status == 0, output
    lines = {line["model"]: line for line in lines_of(tmp_path / "results/benchmark/w")}
    assert set(lines) == {"zero", "few"}
    assert all(line[name] for line in lines.values() for name in METRICS)
    assert any(lines["zero"][name] != lines["few"][name] for name in METRICS)
