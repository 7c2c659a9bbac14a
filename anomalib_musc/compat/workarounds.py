# SPDX-License-Identifier: Apache-2.0
"""anomalib's WinCLIP."""

import inspect

from open_clip.transformer import Transformer


def winclip_fault() -> str | None:
    """Return why ``WinClip`` cannot be measured here, ``None`` if it can.

    anomalib 2.7.0 hands WinCLIP's windows to open_clip's transformer patches first, as that took them before 2.26.1.
    Now it takes images first: patches attend to those of other windows, and the scores are wrong without a word.
    """
    if "batch_first" not in inspect.signature(Transformer).parameters:
        return None
    return (
        "anomalib's WinClip is wrong with the installed open_clip, whose transformer takes images first. Install "
        "'open_clip_torch<2.26.1', or take WinClip out of the configuration."
    )
