# SPDX-License-Identifier: Apache-2.0
"""What the scripts share that look at one product: their arguments, and a file of numbers of several."""

import argparse
import json
from pathlib import Path
from typing import Any


def add_product_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where a product lies, and a backbone."""
    parser.add_argument("root")
    parser.add_argument("category")
    add_backbone_arguments(parser)


def add_backbone_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a backbone, see :func:`same_features.choose_backbone`."""
    parser.add_argument("--backbone", default="musc-tiny", help="a name, or module:class of a network of one's own")
    parser.add_argument("--weights", help="file that this class takes")


def add_size_argument(parser: argparse.ArgumentParser) -> None:
    """Add the size of images."""
    parser.add_argument("--image_size", type=int, help="in place of the network's own")


def case_name(arguments: argparse.Namespace) -> str:
    """Name a product, a backbone and a size."""
    return f"{arguments.category}, {arguments.backbone.split(':')[-1]}, {arguments.image_size or 'own size'}"


def add_to_json(path: Path | None, numbers: dict[str, Any], indent: int = 2) -> None:
    """Add numbers to those of a file, which need not exist; nothing without a file."""
    if path is not None:
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, **numbers}, indent=indent) + "\n")
