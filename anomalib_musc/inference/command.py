# SPDX-License-Identifier: Apache-2.0
"""``anomalib-musc predict``: what a wrong call can be told before torch is imported, then anomalib's Engine."""

import argparse
import gc
import glob
import os
import signal
import sys
import threading
import warnings
import webbrowser
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  anomalib-musc predict photos/                         good and bad ones of one product
  anomalib-musc predict photos/ --backbone musc-tiny    nothing to download
  anomalib-musc predict new/*.png --references good/    beside images of your own
  anomalib-musc predict 1.png --checkpoint model.ckpt   one image, with a trained bank
  find lot7 -name '*.bmp' | anomalib-musc predict -     names from standard input

exit status: 0 done, 1 failed, 2 wrong call, 3 anomalies found (with --fail-on-anomaly)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command; its help fits a screen."""
    add: Any = parser.add_argument
    add("images", nargs="+", metavar="IMAGES", help="folders, files, patterns, lists (.txt), or -")
    add("--output", type=_folder, default=Path("results"), metavar="FOLDER", help="where results go (%(default)s)")
    add("--backbone", help="ViT-L-14-336 (fetches CLIP), musc-tiny, ...")
    add("--image-size", type=_size, metavar="N", help="one side, or HEIGHTxWIDTH; the backbone's own")
    add("--tile-size", type=_size, metavar="N", help="cut large images into tiles, compared at their own size")
    add("--search-radius", type=_radius, metavar="R", help="seek patches near their own place, within R patches")
    add("--references", type=Path, metavar="FOLDER", help="compare with these, not with each other")
    add("--checkpoint", type=Path, metavar="FILE", help="of anomalib train, with its settings")
    decide: Any = parser.add_mutually_exclusive_group().add_argument
    decide("--sensitivity", type=_share, metavar="S", help="0 to 1, more flags more (0.5)")
    decide(
        "--contamination",
        type=_contamination,
        metavar="SHARE",
        help="the expected share of anomalous images, up to 0.5",
    )
    decide("--threshold", type=_distance, metavar="T", help="on raw scores, as an earlier run has printed it")
    add("--heatmaps", nargs="+", choices=("png", "npy"), default=(), metavar="KIND", help="png, npy: at full size")
    add("--no-review", action="store_true", help="no review.html")
    add("--fast", action="store_true", help="fast precision")
    add(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        metavar="D",
        help="cpu, cuda, mps (%(default)s)",
    )
    add("--fail-on-anomaly", action="store_true", help="exit status 3 where an image is anomalous")
    add("--open", action="store_true", help="show the page in a browser")
    add("--quiet", action="store_true", help="print the path of the table alone")
    add("--verbose", action="store_true", help="all messages, and tracebacks")


def predict(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status.

    Raises:
        ValueError: If an argument is wrong; before torch is imported as far as that can be known.
        OSError: If a file or folder is not there, or cannot be written.
    """
    paths = list(dict.fromkeys(_expanded(arguments.images, sys.stdin)))
    _check_paths(paths, arguments)
    if not arguments.verbose:
        warnings.simplefilter("ignore", FutureWarning)  # of packages about each other, while they are imported
    with _ends_at_once(), _nothing_collected():
        from anomalib_musc.inference.engine import predict_files

    writer = predict_files(paths, arguments)
    if arguments.quiet:
        sys.stdout.write(f"{writer.files[-1]}\n")
    if arguments.open and writer.files[0].suffix == ".html":
        webbrowser.open(writer.files[0].resolve().as_uri())
    found = any(prediction.is_anomalous for prediction in writer.predictions)
    return 3 if arguments.fail_on_anomaly and found else 0


@contextmanager
def _ends_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process during long imports, where packages catch whatever comes; nothing is written yet."""

    def end(*_: object) -> None:
        sys.stderr.write("error: interrupted\n")
        sys.stderr.flush()
        os._exit(128 + signal.SIGINT)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Import without a search for garbage, which takes a sixth of the time; nor is any sought in what was imported."""
    if "anomalib" in sys.modules:  # this is some other program, and has little to import
        yield
        return
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()
    gc.freeze()


def _expanded(names: Iterable[str], stdin: Iterable[str]) -> Iterator[Path]:
    """Return files and folders that are named, by patterns, lists and standard input too."""
    for name in names:
        if name == "-":
            yield from (Path(line.strip("\ufeff\r\n")) for line in stdin if line.strip())
        elif Path(name).suffix == ".txt" and Path(name).is_file():
            lines = _lines_of(Path(name))
            yield from (_beside(Path(name), line.strip()) for line in lines if line.strip())
        elif not name:
            msg = "an image has an empty name; give a folder, or files."
            raise ValueError(msg)
        elif not Path(name).exists() and glob.has_magic(name):
            found = sorted(glob.glob(name, recursive=True))  # noqa: PTH207  # which takes absolute patterns, too
            if not found:
                msg = f"no file matches {name!r}."
                raise ValueError(msg)
            yield from map(Path, found)
        else:
            yield Path(name)


def _lines_of(names: Path) -> list[str]:
    try:
        lines = names.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        msg = f"{names} is not in UTF-8 ({error.reason} at byte {error.start})."
        raise ValueError(msg) from None
    if not any(line.strip() for line in lines):
        msg = f"{names} names no image."
        raise ValueError(msg)
    return lines


def _beside(names: Path, line: str) -> Path:
    """Return a file that a list names, from here or from where the list is."""
    return Path(line) if Path(line).exists() else names.parent / line


def _check_paths(paths: list[Path], arguments: argparse.Namespace) -> None:
    if not paths:
        msg = "no names came from standard input; give a folder, or files."
        raise ValueError(msg)
    for option, path in [*(("", path) for path in paths), *_named(arguments)]:
        if not path.exists() and not path.is_symlink():
            msg = f"{option}there is no file or folder {str(path)!r}."
            raise FileNotFoundError(msg)
    if not any(path.is_file() or path.is_symlink() or any(path.iterdir()) for path in paths):
        msg = f"{', '.join(map(str, paths))}: no image there."
        raise ValueError(msg)


def _named(arguments: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    for name in ("references", "checkpoint"):
        if (path := getattr(arguments, name)) is not None:
            yield f"--{name}: ", path


def _folder(text: str) -> Path:
    if not text:
        msg = "an empty name"
        raise argparse.ArgumentTypeError(msg)
    return Path(text)


def _number(text: str, low: float, high: float) -> float:
    value = float(text)
    if not low <= value <= high:
        msg = f"{text} is not from {low:g} to {high:g}"
        raise argparse.ArgumentTypeError(msg)
    return value


def _share(text: str) -> float:
    return _number(text, 0, 1)


def _contamination(text: str) -> float:
    return _number(text, sys.float_info.min, 0.5)


def _distance(text: str) -> float:
    return _number(text, 0, 2)


def _radius(text: str) -> int:
    if not text.isdecimal():
        msg = f"{text!r} is no whole number"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def _size(text: str) -> Any:
    sides = [int(side) if side.isdecimal() else 0 for side in text.lower().split("x")]
    if len(sides) > 2 or min(sides) < 1:
        msg = f"{text!r} is neither one side nor HEIGHTxWIDTH"
        raise argparse.ArgumentTypeError(msg)
    return sides[0] if len(sides) == 1 else tuple(sides)
