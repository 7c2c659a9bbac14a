# SPDX-License-Identifier: Apache-2.0
"""Folders of odd files: formats, modes, sizes, depths, names, links, damage, permissions."""

import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image

MODES = {
    ".png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    ".PNG": ("RGB",),
    ".jpg": ("L", "RGB", "CMYK"),
    ".jpeg": ("RGB",),
    ".bmp": ("1", "L", "P", "RGB"),
    ".tif": ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LAB", "YCbCr"),
    ".TIFF": ("L", "F"),
    ".webp": ("RGB", "RGBA"),
    ".ppm": ("RGB",),
    ".pgm": ("L", "I;16"),
    ".gif": ("P",),
    ".jp2": ("RGB",),
}
STEMS = ("a", "b", "c", "Ümläut 部品", "two words", "percent %41", 'quote"s, comma', "new\nline", ".hidden", "n" * 200)
STEMS += (os.fsdecode(b"latin\xe9"), "-dash", "a.b.c", "$HOME", "'; rm x")
FOLDERS = ("", "deeper", "deeper/still", ".hidden", "x.png", "ground_truth", "test", "masks", "images", "latest", "v0")


@dataclass(frozen=True)
class OddFile:
    """How to make one file."""

    folder: str
    stem: str
    suffix: str
    kind: str
    mode: str
    size: tuple[int, int]
    seed: int
    orientation: int
    damage: float


@st.composite
def odd_files(draw: st.DrawFn) -> OddFile:
    suffix = draw(st.sampled_from(tuple(MODES)))
    kinds = ["image"] * 8 + ["constant", "pages", "cut", "flipped", "empty", "text", "noise", "huge", "wild"]
    kinds += ["link", "dead link", "loop", "folder link", "outward link", "pipe", "folder", "shut", "other"]
    return OddFile(
        draw(st.sampled_from(("", "", "", *FOLDERS))),
        draw(st.sampled_from(STEMS)),
        suffix,
        draw(st.sampled_from(kinds)),
        draw(st.sampled_from(MODES[suffix])),
        draw(st.tuples(st.integers(1, 90), st.integers(1, 90))),
        draw(st.integers(0, 999)),
        draw(st.sampled_from((1, 1, 1, 3, 6, 8, 0, 99))),
        draw(st.floats(0, 1)),
    )


def make(odd: OddFile, root: Path) -> None:
    """Make a file beneath a folder, unless its place is taken."""
    path = root / odd.folder / f"{odd.stem}{odd.suffix}"
    if os.path.lexists(path):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        return
    _MAKERS.get(odd.kind, _image)(odd, path)


def _pixels(odd: OddFile) -> Image.Image:
    rng = np.random.default_rng(odd.seed)
    width, height = odd.size
    if odd.kind == "constant":
        values = np.full((height, width), odd.seed % 256, np.float32)
    else:
        values = 100 + 60 * np.sin(np.arange(width) / 3)[None] + rng.normal(0, 9, (height, width))
    if odd.mode == "F":
        values = values / 255 if odd.seed % 2 else values - 120
        if odd.kind == "wild":
            values.flat[:: 1 + odd.seed % 7] = (np.nan, np.inf, -np.inf, 3.4e38, -9999)[odd.seed % 5]
        return Image.fromarray(values.astype(np.float32))
    if odd.mode in {"I;16", "I"}:
        deep = (values.clip(0, 255) * (257 if odd.seed % 2 else 16)).astype(
            np.uint16 if odd.mode == "I;16" else np.int32
        )
        return Image.fromarray(deep)
    grey = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if odd.mode in {"LAB", "YCbCr"}:
        return Image.merge(odd.mode, [grey] * 3)
    return grey if odd.mode == "L" else grey.convert("RGB").convert(odd.mode)


def _image(odd: OddFile, path: Path) -> None:
    picture = _pixels(odd)
    exif = Image.Exif()
    exif[0x0112] = odd.orientation
    arguments = {} if odd.suffix in {".pgm", ".ppm", ".gif", ".bmp", ".jp2"} else {"exif": exif}
    if odd.kind == "pages" and odd.suffix in {".tif", ".TIFF", ".webp", ".png", ".gif"}:
        arguments |= {"save_all": True, "append_images": [picture] * 2}
    file = io.BytesIO()  # Pillow cannot write JPEG 2000 to every name
    picture.save(file, Image.registered_extensions()[odd.suffix.lower()], **arguments)
    path.write_bytes(file.getvalue())


def _damaged(odd: OddFile, path: Path) -> None:
    _image(odd, path)
    content = bytearray(path.read_bytes())
    place = int(odd.damage * (len(content) - 1))
    if odd.kind == "cut":
        del content[place:]
    else:
        for index in range(place, min(place + 1 + odd.seed % 9, len(content))):
            content[index] ^= 0xFF
    path.write_bytes(content)


def _huge(odd: OddFile, path: Path) -> None:
    """A PNG whose header promises more pixels than Pillow reads."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000 + odd.seed, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(head)) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)


def _shut(odd: OddFile, path: Path) -> None:
    _image(odd, path)
    path.chmod(0)


def _link(odd: OddFile, path: Path) -> None:
    others = sorted(other for other in path.parent.iterdir() if other.is_file())
    if others:
        path.symlink_to(others[odd.seed % len(others)])


def _outward(odd: OddFile, path: Path) -> None:
    path.symlink_to(path.parents[len(odd.folder.split("/")) if odd.folder else 0].parent / "outside")


_MAKERS = {
    "cut": _damaged,
    "flipped": _damaged,
    "empty": lambda _, path: path.touch(),
    "text": lambda _, path: path.write_text("no picture"),
    "noise": lambda odd, path: path.write_bytes(np.random.default_rng(odd.seed).bytes(500)),
    "huge": _huge,
    "link": _link,
    "dead link": lambda _, path: path.symlink_to("nowhere.png"),
    "loop": lambda _, path: path.symlink_to(path),
    "folder link": lambda _, path: path.symlink_to(path.parent),
    "outward link": _outward,
    "pipe": lambda _, path: os.mkfifo(path),
    "folder": lambda _, path: path.mkdir(),
    "shut": _shut,
    "other": lambda _, path: path.with_suffix(".txt").write_text("no picture either"),
}
