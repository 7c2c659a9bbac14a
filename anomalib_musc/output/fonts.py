# SPDX-License-Identifier: Apache-2.0
"""A font in which a text can be read, whatever its script, as far as this machine has one."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_UNKNOWN = "?"
_NO_LETTER = "\U000f8ff0"  # of a private plane, for which a font draws what it draws for letters that it has not


def legible(text: str, size: int) -> tuple[str, Font]:
    """Return a text and the font to draw it in; letters that no font has are question marks.

    Args:
        text: A caption.
        size: Of the font, in pixels.

    Example:
        >>> legible("bolt.png", 14)[0]
        'bolt.png'
    """
    if all(_is_drawn(letter, size) for letter in set(text)):
        return text, _default_font(size)
    path = _font_file("".join(sorted(set(text))))
    known = _letters(path)
    return "".join(letter if ord(letter) in known else _UNKNOWN for letter in text), ImageFont.truetype(path, size)


@lru_cache
def _default_font(size: int) -> Font:
    return ImageFont.load_default(size)


@lru_cache(maxsize=4096)
def _is_drawn(letter: str, size: int) -> bool:
    """Whether the default font has a letter."""
    font = _default_font(size)
    return letter.isascii() or bytes(font.getmask(letter)) != bytes(font.getmask(_NO_LETTER))


@lru_cache(maxsize=1024)
def _font_file(letters: str) -> str:
    """Return the first font that has all letters, or else the one that has most of them."""
    best, most = "", -1
    for path in _font_files():
        found = sum(ord(letter) in _letters(path) for letter in letters)
        if found > most:
            best, most = path, found
        if most == len(letters):
            break
    return best


def _font_files() -> Iterator[str]:
    """Return DejaVu Sans, which comes with matplotlib, then the fonts of the system."""
    import matplotlib  # which takes a second, for names that few have
    from matplotlib.font_manager import findSystemFonts

    yield str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
    yield from sorted(findSystemFonts())


@lru_cache(maxsize=4096)
def _letters(path: str) -> frozenset[int]:
    """Return the code points that a font has; none of a file that is no font."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
