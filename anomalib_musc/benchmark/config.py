# SPDX-License-Identifier: Apache-2.0
"""The configuration of a benchmark: read, checked as a whole before anything runs, and split into cells.

It is anomalib's own format, in which ``grid`` lists alternatives, with a name for each model and what RsCIN needs:

.. code-block:: yaml

    title: Bottles            # of the report; defaults to the file's name
    output: results/bottles   # defaults to results/benchmark/NAME
    accelerator: auto         # cpu, cuda, ...
    benchmark:
      seed: {grid: [0, 1]}
      model:
        grid:
          - {class_path: MuSc, init_args: {backbone: dinov2_vitb14}}
          - name: PatchCore, {backbone}                # filled in from init_args
            class_path: Patchcore
            init_args: {backbone: {grid: [resnet18, wide_resnet50_2]}}
            rscin: {backbone: dinov2_vitb14, windows: [1, 2, 3]}  # a second row, re-scored
          - {class_path: EfficientAd, engine: {max_epochs: 20}}  # Engine's arguments
      data:
        grid:
          - {class_path: MVTecAD, init_args: {root: datasets/MVTecAD, category: {grid: [bottle, cable]}}}
          - name: our bolts                              # defaults to that of the root folder
            class_path: Folder
            init_args: {name: m6, root: bolts, normal_dir: good, abnormal_dir: bad}
"""

import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from anomalib.data import AnomalibDataModule
from anomalib.models import AnomalibModule, WinClip
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict
from anomalib.utils.config import flatten_dict
from jsonargparse import ArgumentError
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry

import anomalib_musc.zoo  # noqa: F401  # so that models are found by their bare names
from anomalib_musc.benchmark.arguments import (
    backbone_parser,
    built,
    checked_arguments,
    checked_keys,
    checked_text,
    filled_in,
)
from anomalib_musc.benchmark.published import check_category, published_dataset, published_setting
from anomalib_musc.benchmark.summary import MEAN, with_rscin
from anomalib_musc.benchmark.winclip import correct_windows
from anomalib_musc.functional.rscin import check_windows

_KEYS = {"title", "output", "accelerator", "benchmark"}
_CELL_KEYS = {"seed", "model", "data"}
_MODEL_KEYS = {"name", "class_path", "init_args", "rscin", "engine"}
_DATA_KEYS = {"name", "class_path", "init_args"}
_SET_BY_CELL = {"accelerator", "devices", "default_root_dir", "callbacks"}
_RSCIN_KEYS = {"backbone", "pretrained", "image_size", "windows"}


@dataclass(frozen=True)
class Cell:
    """One run: a model on a category with a seed.

    Attributes:
        dataset: The published name where the category is one of its, else that of the root folder.
        key: Names the cell in files: readable, and different wherever anything differs.
        model: ``class_path`` and ``init_args``, all defaults filled in.
        data: Likewise, of the datamodule.
        rscin: Backbone, its weights and size, and windows of the second row, or ``None``.
        engine: Arguments for anomalib's Engine.
    """

    key: str
    name: str
    dataset: str
    category: str
    seed: int
    accelerator: str
    model: dict[str, Any]
    data: dict[str, Any]
    rscin: dict[str, Any] | None
    engine: dict[str, Any]

    @property
    def setting(self) -> str | None:
        """Name of the published row whose setting this is."""
        return published_setting(self.dataset, self.model, self.data)


@dataclass(frozen=True)
class BenchmarkConfig:
    """A whole benchmark."""

    title: str
    output: Path
    accelerator: str
    cells: list[Cell]


def read_config(path: Path, output: Path | None = None) -> BenchmarkConfig:
    """Read a configuration and check every model and dataset in it, without building any.

    Args:
        path: A YAML file.
        output: Folder for the results, in place of the file's.

    Raises:
        ValueError: If the file cannot be read or something in it is wrong; it names the place.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        msg = f"--config {path} cannot be read: {error}"
        raise ValueError(msg) from error
    content = checked_keys(content, _KEYS, {"benchmark"}, str(path))
    grid = checked_keys(content["benchmark"], _CELL_KEYS, {"model", "data"}, f"{path}: benchmark")
    title = checked_text(content.get("title", path.stem), f"{path}: title")
    folder = output or Path(checked_text(content.get("output", f"results/benchmark/{path.stem}"), f"{path}: output"))
    accelerator = _accelerator(content.get("accelerator", "auto"), f"{path}: accelerator")
    cells = [_cell(combination, accelerator, f"{path}: benchmark") for combination in _combinations(grid)]
    _check_names(cells, path)
    return BenchmarkConfig(title, folder, accelerator, cells)


def instantiate(cell: Cell) -> tuple[AnomalibModule, AnomalibDataModule]:
    """Build the model and the datamodule of a cell."""
    model: AnomalibModule = built(AnomalibModule, cell.model)
    if isinstance(model, WinClip):
        correct_windows(model)
    return model, built(AnomalibDataModule, cell.data)


def _combinations(grid: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what a grid expands to, grids within its values included."""
    for combination in get_iterator_from_grid_dict(grid):
        if any(key.endswith(".grid") for key in flatten_dict(combination)):
            yield from _combinations(combination)
        else:
            yield combination


def _cell(combination: dict[str, Any], accelerator: str, where: str) -> Cell:
    combination = checked_keys(combination, _CELL_KEYS, {"model", "data"}, where)
    model = dict(checked_keys(combination["model"], _MODEL_KEYS, {"class_path"}, f"{where}.model"))
    data = dict(checked_keys(combination["data"], _DATA_KEYS, {"class_path"}, f"{where}.data"))
    seed = combination.get("seed", 0)
    if type(seed) is not int or not 0 <= seed < 2**32:
        msg = f"{where}.seed must be a whole number from 0 to 2**32 - 1, got {seed!r}."
        raise ValueError(msg)
    name = _model_name(model, where)
    rscin, engine = model.pop("rscin", None), model.pop("engine", {})
    rscin = None if rscin is None else _rscin(rscin, f"{where}.model: rscin of {name}")
    engine = _engine(engine, f"{where}.model: engine of {name}")
    dataset = data.pop("name", None)
    # The recorder measures, and nobody looks at a thousand pictures.
    model["init_args"] = {**model["init_args"], "evaluator": False, "visualizer": False}
    full = {"model": filled_in(AnomalibModule, model, f"{where}.model: {name}")}
    full["data"] = filled_in(AnomalibDataModule, data, f"{where}.data")
    found, category = _names(full["data"], f"{where}.data")
    dataset = found if dataset is None else checked_text(dataset, f"{where}.data: name")
    given = {"accelerator": accelerator, "name": name, "seed": seed, "rscin": rscin, "engine": engine, **full}
    files = identify_files([full, rscin, engine])
    digest = hashlib.sha256(json.dumps([given, files], sort_keys=True).encode()).hexdigest()[:8]
    # Not the dataset's name, which a download may change.
    slug = re.sub(r"[^\w.]+", "-", f"{category}-{name}-{seed}").strip("-").encode()[:80].decode(errors="ignore")
    rest = (accelerator, full["model"], full["data"], rscin, engine)
    return Cell(f"{slug}-{digest}", name, dataset, category, seed, *rest)


def identify_files(value: Any) -> list[tuple[str, int, int]]:
    """Return path, size and time of every file that is named anywhere in a value, by which a changed one is noticed."""
    if isinstance(value, dict):
        return identify_files(list(value.values()))
    if isinstance(value, (list, tuple)):
        return [file for inner in value for file in identify_files(inner)]
    if not isinstance(value, str) or not os.path.isfile(value):  # noqa: PTH113  # Path's raises where a text is long
        return []
    status = Path(value).stat()
    return [(value, status.st_size, status.st_mtime_ns)]


def _model_name(model: dict[str, Any], where: str) -> str:
    """Take the name out of a model, its class where it has none, and fill in its arguments."""
    class_path = checked_text(model["class_path"], f"{where}.model: class_path")
    model["init_args"] = checked_arguments(model.get("init_args") or {}, f"{where}.model: init_args of {class_path}")
    template = checked_text(
        model.pop("name", class_path.split(".")[-1]), f"{where}.model: name (in quotes where it has braces)"
    )
    return re.sub(r"{(\w+)}", lambda match: str(model["init_args"].get(match[1], match[0])), template)


def _rscin(given: dict[str, Any], where: str) -> dict[str, Any]:
    """Fill in the defaults of a second row and check it."""
    rscin = checked_keys(given, _RSCIN_KEYS, {"backbone"}, where)
    rscin = {"pretrained": True, "image_size": None, "windows": [1, 2, 3], **rscin}
    try:
        check_windows(rscin["windows"])
        backbone_parser().parse_object({"backbone": rscin["backbone"]})
    except (ArgumentError, ValueError) as error:
        msg = f"{where}: {error}"
        raise ValueError(msg) from error
    return rscin


def _engine(given: Any, where: str) -> dict[str, Any]:
    """Check the names of Engine's arguments."""
    engine = checked_arguments(given, where)
    known = set(inspect.signature(Trainer).parameters) - _SET_BY_CELL
    if wrong := sorted(engine.keys() - known):
        msg = f"{where} has {', '.join(wrong)}, which no benchmark takes; it may have {', '.join(sorted(known))}."
        raise ValueError(msg)
    return engine


def _names(data: dict[str, Any], where: str) -> tuple[str, str]:
    """Return what a dataset and its category are called: a folder that is only laid out like MVTec AD is not that.

    Its root becomes absolute, as the same configuration may be run from elsewhere.
    """
    datamodule, arguments = data["class_path"].split(".")[-1], data["init_args"]
    category = str(arguments.get("category") or arguments.get("name") or datamodule)
    if not arguments.get("root"):
        return datamodule, category
    root = Path(str(arguments["root"])).resolve()
    arguments["root"] = str(root)
    try:
        check_category(datamodule, category, root)
    except ValueError as error:
        msg = f"{where}: {error}"
        raise ValueError(msg) from error
    return published_dataset(datamodule, category, root) or root.name, category


def _accelerator(value: Any, where: str) -> str:
    """Check an accelerator; anomalib's own configurations give a list."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    known = ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]
    if value not in known:
        msg = f"{where} must be one of {', '.join(known)}, got {value!r}."
        raise ValueError(msg)
    return str(value)


def _check_names(cells: list[Cell], path: Path) -> None:
    """Raise a ValueError where two rows of a table would have one name."""
    seen: set[tuple[str, str, str, int]] = set()
    for cell in cells:
        for name in (cell.name, with_rscin(cell.name)) if cell.rscin else (cell.name,):
            place = (cell.dataset, cell.category, name, cell.seed)
            if place in seen:
                msg = (
                    f"{path}: {name!r} comes twice on {cell.dataset} {cell.category}, seed {cell.seed}; give each "
                    f"model a name of its own, such as name: '{cell.name} {{backbone}}', or each dataset."
                )
                raise ValueError(msg)
            seen.add(place)
        if cell.category == MEAN:
            msg = f"{path}: a category cannot be called {MEAN!r}, as that is the row of means; give it another name."
            raise ValueError(msg)
    if not cells:
        msg = f"{path}: an empty grid leaves nothing to run."
        raise ValueError(msg)
