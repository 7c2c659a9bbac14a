# SPDX-License-Identifier: Apache-2.0
"""RsCIN as anomalib's post-processor."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from anomalib.data import InferenceBatch
from anomalib.post_processing import PostProcessor

from anomalib_musc.functional import rscin
from anomalib_musc.functional.rscin import check_windows
from anomalib_musc.memory_bank.bank import ReferenceBank
from anomalib_musc.torch_model import PoolPrediction, ReferencePrediction


class RsCINPostProcessor(PostProcessor):
    """Re-score the pool's images with their neighbours, then normalise and threshold as anomalib does.

    This is step 3 of MuSc (arXiv 2401.16753, section 3.3) and :class:`~anomalib_musc.MuSc`'s default. anomalib's
    plain ``PostProcessor`` or ``MEBinPostProcessor`` in its place leaves the image scores as they are.

    Args:
        windows: Neighbourhood sizes k, the image itself included: ``(1, 2, 3)`` for MVTec AD and BTAD,
            ``(1, 8, 9)`` for VisA.
        image_threshold: Image score above which an image is anomalous, before normalisation. ``None``: found on
            validation labels by anomalib, or without labels by :mod:`anomalib_musc.decision.thresholds`.
        pixel_threshold: Likewise for the values of anomaly maps, from 0 to 2.
        **kwargs: Arguments of anomalib's ``PostProcessor``: normalisation, thresholding and sensitivities.

    Raises:
        ValueError: If ``windows`` is empty or holds a number below 1, or a threshold is not a finite number.

    Example:
        >>> import torch
        >>> post_processor = RsCINPostProcessor(windows=(1, 8, 9), image_sensitivity=0.4)
        >>> post_processor.rescore(torch.tensor([0.3, 0.3, 0.5]), torch.eye(3))
        tensor([0., 0., 1.])
    """

    def __init__(
        self,
        windows: Sequence[int] = (1, 2, 3),
        image_threshold: float | None = None,
        pixel_threshold: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_windows(windows)
        for name, threshold in (("image_threshold", image_threshold), ("pixel_threshold", pixel_threshold)):
            if threshold is not None and not (isinstance(threshold, (int, float)) and math.isfinite(threshold)):
                msg = f"{name} must be a finite number or None, got {threshold!r}."
                raise ValueError(msg)
        self.windows = tuple(windows)
        self.fixed_image_threshold = image_threshold
        self.fixed_pixel_threshold = pixel_threshold

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        own = ("windows", "fixed_image_threshold", "fixed_pixel_threshold")
        return (*super()._checkpoint_config_keys, *own)

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Take over a checkpoint's settings, but for thresholds and sensitivities that were given here."""
        default: dict[str, float | None] = dict.fromkeys(("fixed_image_threshold", "fixed_pixel_threshold"))
        default |= dict.fromkeys(("image_sensitivity", "pixel_sensitivity"), 0.5)
        given = {name for name, value in default.items() if getattr(self, name) != value}
        super().load_checkpoint_config({name: value for name, value in config.items() if name not in given})

    @property
    def image_threshold(self) -> torch.Tensor:
        """The threshold of image scores before normalisation."""
        return _fixed_or(self.fixed_image_threshold, super().image_threshold)

    @property
    def pixel_threshold(self) -> torch.Tensor:
        """The threshold of anomaly maps before normalisation."""
        return _fixed_or(self.fixed_pixel_threshold, super().pixel_threshold)

    def rescore(
        self, scores: torch.Tensor, class_tokens: torch.Tensor, bank: ReferenceBank | None = None
    ) -> torch.Tensor:
        """Re-score the images of a pool with each other, or each on its own with a bank's images.

        Args:
            scores: Raw scores, shape ``(N,)``.
            class_tokens: Image features, shape ``(N, D)``.
            bank: The bank that judged them.

        Returns:
            Scores ``(N,)``: of a pool in [0, 1], see :func:`~anomalib_musc.functional.rscin`; by a bank above 1 where
            an image is more anomalous than its, see :func:`~anomalib_musc.functional.rscin_by_references`.
        """
        return (
            rscin(scores, class_tokens, self.windows)
            if bank is None
            else bank.rescore(scores, class_tokens, self.windows)
        )

    def forward(self, predictions: InferenceBatch | PoolPrediction | ReferencePrediction) -> InferenceBatch:
        """Post-process a batch of predictions; those of a pool or by a bank are re-scored first."""
        if isinstance(predictions, (PoolPrediction, ReferencePrediction)):
            bank = predictions.bank if isinstance(predictions, ReferencePrediction) else None
            scores = self.rescore(predictions.pred_score, predictions.class_tokens, bank)
            predictions = InferenceBatch(pred_score=scores, anomaly_map=predictions.anomaly_map)
        return super().forward(predictions)


def _fixed_or(fixed: float | None, found: torch.Tensor) -> torch.Tensor:
    return found if fixed is None else torch.full_like(found, fixed)
