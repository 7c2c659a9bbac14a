# SPDX-License-Identifier: Apache-2.0
"""anomalib's WinCLIP, right with any open_clip.

anomalib 2.7.0 hands WinCLIP's windows to open_clip's transformer with patches first, as that took them before 2.26.1.
Since then it takes images first: patches attend to those of other windows, and the scores are wrong without a word.
"""

from typing import Any

import torch
from anomalib.models import WinClip
from anomalib.models.image.winclip.torch_model import WinClipModel
from torch import nn


class _ImagesFirst(WinClipModel):
    """Hands windows to the transformer with images first."""

    def _get_window_embeddings(self, feature_map: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        transformer: Any = self.clip.visual.transformer
        hooks = (
            transformer.register_forward_pre_hook(lambda _module, inputs: (inputs[0].transpose(0, 1), *inputs[1:])),
            transformer.register_forward_hook(lambda _module, _inputs, output: output.transpose(0, 1)),
        )
        try:
            return super()._get_window_embeddings(feature_map, masks)
        finally:
            for hook in hooks:
                hook.remove()


def correct_winclip(model: nn.Module) -> None:
    """Make a WinCLIP model compute windows as they are meant where open_clip takes images first; leave others alone."""
    network: Any = model.model if isinstance(model, WinClip) else None
    if type(network) is WinClipModel and getattr(network.clip.visual.transformer, "batch_first", False):
        network.__class__ = _ImagesFirst  # this one network's alone; a subclass of WinClip would load CLIP twice
