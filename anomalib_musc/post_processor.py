# SPDX-License-Identifier: Apache-2.0
"""RsCIN as anomalib's post-processor."""

from collections.abc import Sequence
from typing import Any

import torch
from anomalib.data import InferenceBatch
from anomalib.post_processing import PostProcessor

from anomalib_musc.functional import rscin
from anomalib_musc.functional.rscin import check_windows
from anomalib_musc.pool import Pool
from anomalib_musc.torch_model import PoolPrediction


class RsCINPostProcessor(PostProcessor):
    """Re-score the pool's images with their neighbours, then normalise and threshold as anomalib does.

    This is step 3 of MuSc (arXiv 2401.16753, section 3.3) and :class:`~anomalib_musc.MuSc`'s default. anomalib's
    plain ``PostProcessor`` or ``MEBinPostProcessor`` in its place leaves the image scores as they are.

    Args:
        windows: Neighbourhood sizes k, the image itself included: ``(1, 2, 3)`` for MVTec AD and BTAD,
            ``(1, 8, 9)`` for VisA.
        **kwargs: Arguments of anomalib's ``PostProcessor``: normalisation, thresholding and sensitivities.

    Raises:
        ValueError: If ``windows`` is empty or holds a number below 1.

    Example:
        >>> import torch
        >>> post_processor = RsCINPostProcessor(windows=(1, 8, 9), image_sensitivity=0.4)
        >>> post_processor.rescore(torch.tensor([0.3, 0.3, 0.5]), torch.eye(3))
        tensor([0., 0., 1.])
    """

    def __init__(self, windows: Sequence[int] = (1, 2, 3), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_windows(windows)
        self.windows = tuple(windows)

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "windows")

    def rescore(self, scores: torch.Tensor, class_tokens: torch.Tensor) -> torch.Tensor:
        """Return the pool's scores, in [0, 1], shape ``(N,)``; see :func:`~anomalib_musc.functional.rscin`."""
        return rscin(scores, class_tokens, self.windows)

    def forward(self, predictions: InferenceBatch | PoolPrediction) -> InferenceBatch:
        """Post-process a batch of predictions; the scores of a whole pool are re-scored first."""
        if isinstance(predictions, PoolPrediction):
            scores = self.rescore(predictions.pred_score, predictions.class_tokens)
            predictions = InferenceBatch(pred_score=scores, anomaly_map=predictions.anomaly_map)
        return super().forward(predictions)


def calibrate_on_pool(post_processor: PostProcessor, pools: Sequence[Pool]) -> None:
    """Give a post-processor that saw no validation set the range of the pools, so that all share one scale.

    Args:
        post_processor: anomalib's or ours; its thresholds stay unknown, which anomalib reads as mid-range.
        pools: The scored pools.
    """
    scores = torch.cat([pool.scores for pool in pools])
    post_processor.image_min.copy_(scores.min())
    post_processor.image_max.copy_(scores.max())
    post_processor.pixel_min.copy_(min(pool.patch_scores.min() for pool in pools))
    post_processor.pixel_max.copy_(max(pool.raw_scores.max() for pool in pools))
