# SPDX-License-Identifier: Apache-2.0
"""Which backbone was meant by a name that is not known."""

import difflib
import re
from collections.abc import Collection

import open_clip
import timm

_SHOWN = 5
_SIZE = re.compile("(?:vit)?(small|base|large|giant|huge)")
# What names on hubs have besides an architecture's: what the weights were trained for, and on what.
_BESIDES = re.compile(r"pretrain.*|laion\d.*|lvd\d+m|finetuned.*|pth$|^clip|patch(?=\d)")


def unknown_name(name: str, ours: Collection[str]) -> str:
    """Return an error's text that says which known names are like this one, or the end of this path.

    Names are compared without case and separators, and without what hubs add to them. Names that begin like this one or
    hold it whole come before those that merely resemble it.

    Args:
        name: The name that is not known.
        ours: Names of this package, which come before those of timm and open_clip.
    """
    by_letters: dict[str, list[str]] = {}
    for other in sorted(
        {*ours, *timm.list_models(), *open_clip.list_models()}, key=lambda other: (other not in ours, other)
    ):
        for letters in dict.fromkeys((_letters(other), _BESIDES.sub("", _letters(other)))):
            by_letters.setdefault(letters, []).append(other)
    asked = list(dict.fromkeys([_letters(name), end := _letters(name.rpartition("/")[2]), _BESIDES.sub("", end)]))
    of_ours = [letters for letters, others in by_letters.items() if others[0] in ours]
    found = [letters for letters in asked if letters in by_letters]
    found += [letters for each in reversed(asked) if len(each) > 3 for letters in of_ours if each in letters]
    for each in reversed(asked):
        found += difflib.get_close_matches(each, by_letters, n=4)
    same = {letters: sorted(by_letters[letters], key=lambda other: _unlikeness(name, other, ours)) for letters in found}
    names = list(dict.fromkeys(other for letters in found for other in same[letters]))[:_SHOWN]
    meant = f"did you mean {names[0]!r}? Close matches: {names}" if names else "no name is like it"
    return (
        f"backbone {name!r} is not known; {meant}. All names: musc-tiny, efficientnet-lite2, "
        "anomalib_musc.backbones.ALIASES, timm.list_models() and open_clip.list_models(). "
        "Your own module is passed as an object, in a configuration as class_path and init_args"
    )


def _unlikeness(name: str, other: str, ours: Collection[str]) -> tuple[bool, float]:
    return other not in ours, -difflib.SequenceMatcher(None, name, other).ratio()


def _letters(name: str) -> str:
    """Letters and figures in lower case, with one spelling of sizes, of "plus" and of registers."""
    letters = "".join(character for character in name.lower().replace("+", "plus") if character.isalnum())
    letters = _SIZE.sub(lambda size: f"vit{size[1][0]}", letters.replace("withregisters", "reg"))
    letters = re.sub(r"reg(vit[sblg])$", r"\g<1>14reg", letters)  # "dinov2-with-registers-base"
    return letters.replace("dinov2reg4", "reg4dinov2")
