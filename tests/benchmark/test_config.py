# SPDX-License-Identifier: Apache-2.0
"""Configurations of benchmarks: read, checked as a whole, split into cells, beside published figures."""

import shutil
import sys
from pathlib import Path

import pytest
import yaml
from bench_runs import widget, write_config

from anomalib_musc.benchmark.config import read_config
from anomalib_musc.benchmark.published import published_dataset, published_rows
from anomalib_musc.cli import main

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs/benchmark").glob("*.yaml"))
PUBLISHED = "MuSc (CLIP ViT-L/14-336 518)"


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
    assert len(config.cells) == {"ablations": 360, "btad": 15, "mvtec_ad": 105, "offline": 6, "visa": 60}[path.stem]
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
        ({"image_size": [518, 518], "layers": [5, 11, 17, 23], "pretrained": "openai"}, PUBLISHED),
        ({"image_size": [518, 336]}, None),
        ({"layers": [5, 11, 17, 22]}, None),
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
