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
      data:
        grid:
          - {class_path: MVTecAD, init_args: {root: datasets/MVTecAD, category: {grid: [bottle, cable]}}}
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from anomalib.data import AnomalibDataModule
from anomalib.models import AnomalibModule
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict
from anomalib.utils.config import flatten_dict
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from torch import nn

import anomalib_musc.zoo  # noqa: F401  # so that models are found by their bare names
from anomalib_musc.benchmark.published import published_dataset
from anomalib_musc.functional.rscin import check_windows

_KEYS = {"title", "output", "accelerator", "benchmark"}
_CELL_KEYS = {"seed", "model", "data"}
_MODEL_KEYS = {"name", "class_path", "init_args", "rscin"}
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
    content = _checked(content, _KEYS, {"benchmark"}, str(path))
    grid = _checked(content["benchmark"], _CELL_KEYS, {"model", "data"}, f"{path}: benchmark")
    accelerator = content.get("accelerator", "auto")
    cells = [_cell(combination, accelerator, path) for combination in _combinations(grid)]
    _check_names(cells, path)
    folder = output or Path(content.get("output", Path("results") / "benchmark" / path.stem))
    return BenchmarkConfig(content.get("title", path.stem), folder, accelerator, cells)


def instantiate(cell: Cell) -> tuple[AnomalibModule, AnomalibDataModule]:
    """Build the model and the datamodule of a cell."""
    parser = _parser()
    built: Any = parser.instantiate_classes(parser.parse_object({"model": cell.model, "data": cell.data}))
    return built.model, built.data


def instantiate_backbone(value: str | dict[str, Any]) -> str | nn.Module:
    """Build a backbone that is given by ``class_path``; a name stays one."""
    parser = _backbone_parser()
    built: Any = parser.instantiate_classes(parser.parse_object({"backbone": value}))
    backbone: str | nn.Module = built.backbone
    return backbone


def _combinations(grid: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what a grid expands to, grids within its values included."""
    for combination in get_iterator_from_grid_dict(grid):
        if any(key.endswith(".grid") for key in flatten_dict(combination)):
            yield from _combinations(combination)
        else:
            yield combination


def _cell(combination: dict[str, Any], accelerator: str, path: Path) -> Cell:
    model = dict(_checked(combination["model"], _MODEL_KEYS, {"class_path"}, f"{path}: benchmark.model"))
    data, seed = combination["data"], combination.get("seed", 0)
    if not isinstance(seed, int):
        msg = f"{path}: benchmark.seed must be a whole number, got {seed!r}."
        raise ValueError(msg)
    template = model.pop("name", None) or model["class_path"].split(".")[-1]
    name = re.sub(r"{(\w+)}", lambda match: str(model.get("init_args", {}).get(match[1], match[0])), template)
    rscin = model.pop("rscin", None)
    rscin = rscin and _rscin(rscin, f"{path}: rscin of {name}")
    # The recorder measures, and nobody looks at a thousand pictures.
    model["init_args"] = {**model.get("init_args", {}), "evaluator": False, "visualizer": False}
    parser = _parser()
    try:
        parsed = parser.parse_object({"model": model, "data": data})
    except ArgumentError as error:
        msg = f"{path}: {name} on {data.get('class_path')}: {error}"
        raise ValueError(msg) from error
    full = json.loads(parser.dump(parsed, format="json", skip_none=False))
    dataset, category = _names(full["data"])
    identity = {"name": name, "seed": seed, "rscin": rscin, **full}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    slug = re.sub(r"[^\w.]+", "-", f"{dataset}-{category}-{name}-{seed}").strip("-")
    return Cell(f"{slug}-{digest}", name, dataset, category, seed, accelerator, full["model"], full["data"], rscin)


def _rscin(given: dict[str, Any], where: str) -> dict[str, Any]:
    """Fill in the defaults of a second row and check it."""
    rscin = _checked(given, _RSCIN_KEYS, {"backbone"}, where)
    rscin = {"pretrained": True, "image_size": None, "windows": [1, 2, 3], **rscin}
    try:
        check_windows(rscin["windows"])
        _backbone_parser().parse_object({"backbone": rscin["backbone"]})
    except (ArgumentError, ValueError) as error:
        msg = f"{where}: {error}"
        raise ValueError(msg) from error
    return rscin


def _names(data: dict[str, Any]) -> tuple[str, str]:
    """Return what a dataset and its category are called: a folder that is only laid out like MVTec AD is not that."""
    datamodule, arguments = data["class_path"].split(".")[-1], data["init_args"]
    category = str(arguments.get("category") or arguments.get("name") or datamodule)
    root = Path(str(arguments.get("root") or datamodule))
    return published_dataset(datamodule, category, root) or root.name, category


def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(AnomalibModule, "model", required=True)
    parser.add_subclass_arguments(AnomalibDataModule, "data", required=True)
    return parser


def _backbone_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--backbone", type=str | nn.Module, required=True)
    return parser


def _checked(value: Any, known: set[str], needed: set[str], where: str) -> dict[str, Any]:
    if isinstance(value, Namespace):
        value = value.as_dict()
    if not isinstance(value, dict) or not needed <= value.keys() or not value.keys() <= known:
        keys = sorted(map(str, value)) if isinstance(value, dict) else repr(value)
        msg = f"{where} must have the keys {sorted(needed)}, and may have {sorted(known - needed)}; got {keys}."
        raise ValueError(msg)
    return value


def _check_names(cells: list[Cell], path: Path) -> None:
    seen = set()
    for cell in cells:
        place = (cell.dataset, cell.category, cell.name, cell.seed)
        if place in seen:
            msg = (
                f"{path}: two models, or one twice, are called {cell.name!r} on {cell.dataset} {cell.category}, seed "
                f"{cell.seed}; give each a name of its own, such as name: {cell.name} {{backbone}}."
            )
            raise ValueError(msg)
        seen.add(place)
    if not cells:
        msg = f"{path}: an empty grid leaves nothing to run."
        raise ValueError(msg)
