# SPDX-License-Identifier: Apache-2.0
"""Write a small inspection dataset in the MVTec AD layout, drawn rather than photographed.

    python examples/sample_dataset datasets/sample

Two products are drawn: ``fabric``, a plain weave, and ``gear``, a turned steel gear on a conveyor belt. Every image
is a scene of its own (threads, pose, light, sensor noise); a defect changes that scene before it is lit, so that its
shading and its shadow follow. The mask is where the defect changed the picture visibly; outside it the pixels are those
of the same scene without the defect.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
from scene import CATEGORIES, Pixels, Spec, draw, samples

MANIFEST = "sample_dataset.json"


def _manifest(spec: Spec) -> dict[str, Any]:
    """What is written beside the images, to know the dataset again."""
    return {"dataset": "anomalib-musc sample", "version": 1, **asdict(spec)}


def is_complete(root: Path, spec: Spec) -> bool:
    """Whether ``root`` already holds exactly this dataset.

    Raises:
        FileExistsError: If it holds anything else.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    way_out = "name another folder, or remove this one first"
    try:
        found = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        msg = f"{root} exists and was not written by this script: {way_out}"
        raise FileExistsError(msg) from None
    if found != _manifest(spec):
        msg = f"{root} holds another sample dataset ({found}): {way_out}"
        raise FileExistsError(msg)
    paths = [p for s in samples(spec) for p in (s.image_path, s.mask_path) if p is not None]
    if missing := [p for p in paths if not (root / p).is_file()]:
        msg = f"{root} has lost {len(missing)} of its {len(paths)} files, {missing[0]} among them: {way_out}"
        raise FileExistsError(msg)
    return True


def _save(path: Path, pixels: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", pixels[..., ::-1] if pixels.ndim == 3 else pixels)[1].tobytes())


def write_dataset(root: Path, spec: Spec) -> bool:
    """Write the dataset, all of it or nothing.

    Args:
        root: A folder that does not exist yet, is empty, or holds this very dataset.
        spec: What to draw.

    Returns:
        Whether anything was written; False if the dataset was there already.

    Raises:
        FileExistsError: If ``root`` holds something else.
        NotADirectoryError: If a file stands where a folder above ``root`` should be.
    """
    root = root.resolve()
    if is_complete(root, spec):
        return False
    if files := [folder for folder in root.parents if folder.exists() and not folder.is_dir()]:
        msg = f"cannot write {root}: {files[0]} is not a folder"
        raise NotADirectoryError(msg)
    root.parent.mkdir(parents=True, exist_ok=True)
    # drawn beside the target and moved there in one step: an interrupted run leaves no half dataset behind
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        drawn = Path(scratch, "dataset")
        for sample in samples(spec):
            image, mask = draw(sample, spec.seed, spec.size, speck=spec.speck)
            _save(drawn / sample.image_path, image)
            if sample.mask_path is not None:
                _save(drawn / sample.mask_path, mask)
        (drawn / MANIFEST).write_text(json.dumps(_manifest(spec), indent=2) + "\n", encoding="utf-8")
        if root.exists():
            root.rmdir()  # empty, or `is_complete` had refused it
        drawn.rename(root)
    return True


def _summary(root: Path, spec: Spec) -> str:
    lines = [
        f"  {root / name}: train {spec.train_good} good; test {spec.test_good} good, {spec.per_defect} each of "
        + ", ".join(spec.defects(name))
        for name in CATEGORIES
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python examples/sample_dataset",  # the default is empty if the folder is given with a slash at its end
        description="Draw a small inspection dataset in the MVTec AD layout.",
    )
    parser.add_argument("root", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=Spec.seed)
    parser.add_argument("--size", type=int, default=Spec.size, help="side of the images in pixels")
    parser.add_argument("--train-good", type=int, default=Spec.train_good, help="sound images to train on")
    parser.add_argument("--test-good", type=int, default=Spec.test_good, help="sound images in the test set")
    parser.add_argument("--per-defect", type=int, default=Spec.per_defect, help="test images of each kind of defect")
    parser.add_argument("--speck", type=int, default=Spec.speck, help="draw specks of so many pixels, no other defects")
    options = vars(parser.parse_args(arguments))
    root = options.pop("root")
    try:
        spec = Spec(**options)
    except ValueError as error:
        parser.error(str(error))
    begin = time.perf_counter()
    try:
        written = write_dataset(root, spec)
    except OSError as error:
        print(f"error: {f'cannot write {root}: {error.strerror}' if error.strerror else error}", file=sys.stderr)
        return 1
    count = len(list(samples(spec)))
    took = f"Wrote {count} images in {time.perf_counter() - begin:.0f} s:" if written else "Already there:"
    print(f"{took}\n{_summary(root, spec)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
