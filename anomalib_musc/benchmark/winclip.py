# SPDX-License-Identifier: Apache-2.0
"""WinCLIP that is right with any open_clip, by one method of its torch model, in a subclass of our own."""

from typing import Any

import torch
from anomalib.models import WinClip
from anomalib.models.image.winclip.torch_model import WinClipModel


class BatchFirstWinClipModel(WinClipModel):
    """WinCLIP's torch model for an open_clip whose transformer takes ``(N, L, C)``: 2.26.1 and newer.

    anomalib 2.7.0 hands windows to the transformer as ``(L, N, C)``, which is what it took before. A patch then
    attends to the same place of all other windows and images instead of to its own window, without any error.

    Args:
        model: The model that anomalib built. Weights and buffers are shared with it.
    """

    def __init__(self, model: WinClipModel) -> None:
        torch.nn.Module.__init__(self)  # WinClipModel's own would load the weights once more
        self.__dict__.update(model.__dict__)

    def _get_window_embeddings(self, feature_map: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Return the embedding of every window.

        Args:
            feature_map: Tokens before the transformer, the class token first, ``(N, 1 + L, C)``.
            masks: The patches of each window as indices into the L, ``(K, W)``.

        Returns:
            ``(N, W, D)``.
        """
        visual: Any = self.clip.visual
        indices = torch.cat([torch.zeros_like(masks[:1]), masks + 1])  # (1 + K, W), the class token before the patches
        windows = feature_map[:, indices.T].flatten(0, 1)  # (N * W, 1 + K, C)
        tokens = visual.ln_post(visual.transformer(visual.ln_pre(visual.patch_dropout(windows))))
        pooled, _ = visual._global_pool(tokens)  # noqa: SLF001  # of open_clip, as anomalib takes it
        if visual.proj is not None:
            pooled = pooled @ visual.proj
        return pooled.unflatten(0, (feature_map.shape[0], -1))


def correct_windows(model: WinClip) -> None:
    """Give a WinCLIP model the torch model that is right with the installed open_clip.

    Nothing changes where anomalib's own is right: with an open_clip before 2.26.1.
    """
    # The argument came with the change. Whatever its value, (N, L, C) is what such a transformer is given.
    torch_model: Any = model.model
    if hasattr(torch_model.clip.visual.transformer, "batch_first"):
        model.model = BatchFirstWinClipModel(torch_model)
