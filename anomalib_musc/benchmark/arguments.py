# SPDX-License-Identifier: Apache-2.0
"""What a configuration holds, checked: mappings, texts, and the arguments of classes, as jsonargparse sees them."""

import json
from functools import cache
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from torch import nn


def checked_keys(value: Any, known: set[str], needed: set[str], where: str) -> dict[str, Any]:
    """Return a mapping; a ValueError that names ``where`` unless it has all keys needed and known ones only."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if not isinstance(value, dict) or not needed <= value.keys() or not value.keys() <= known:
        keys = sorted(map(str, value)) if isinstance(value, dict) else repr(value)
        msg = f"{where} must have the keys {sorted(needed)}, and may have {sorted(known - needed)}; got {keys}."
        raise ValueError(msg)
    return value


def checked_text(value: Any, where: str) -> str:
    """Return a text; a ValueError that names ``where`` for anything else."""
    if not isinstance(value, str) or not value:
        msg = f"{where} must be a text, got {value!r}."
        raise ValueError(msg)
    return value


def checked_arguments(value: Any, where: str) -> dict[str, Any]:
    """Return a mapping; a ValueError that names ``where`` for anything else."""
    if not isinstance(value, dict):
        msg = f"{where} must be a mapping of arguments, got {value!r}."
        raise ValueError(msg)
    return value


def filled_in(kind: type, given: dict[str, Any], where: str) -> dict[str, Any]:
    """Check the arguments of a class and fill in its defaults; a ValueError names ``where``."""
    try:
        filled: dict[str, Any] = json.loads(_parsed(kind, json.dumps(given)))
    except (ArgumentError, TypeError) as error:
        msg = f"{where}: {error}"
        raise ValueError(msg) from error
    return filled


@cache
def _parsed(kind: type, given: str) -> str:
    parser = _parser(kind)
    parsed = parser.parse_object({"it": json.loads(given)})
    return json.dumps(json.loads(parser.dump(parsed, format="json", skip_none=False))["it"])


def built(kind: type, filled: dict[str, Any]) -> Any:
    """Build a class from arguments that were filled in."""
    parser = _parser(kind)
    built: Any = parser.instantiate_classes(parser.parse_object({"it": filled}))
    return built.it


@cache
def _parser(kind: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "it", required=True)
    return parser


@cache
def backbone_parser() -> ArgumentParser:
    """Return a parser of a backbone, a name or a class with arguments."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--backbone", type=str | nn.Module, required=True)
    return parser


def instantiate_backbone(value: str | dict[str, Any]) -> str | nn.Module:
    """Build a backbone that is given by ``class_path``; a name stays one."""
    parser = backbone_parser()
    built: Any = parser.instantiate_classes(parser.parse_object({"backbone": value}))
    backbone: str | nn.Module = built.backbone
    return backbone
