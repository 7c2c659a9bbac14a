# SPDX-License-Identifier: Apache-2.0
"""RsCIN as anomalib's post-processor."""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from anomalib.data import InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from anomalib_musc.bank import ReferenceBank
from anomalib_musc.functional import rscin
from anomalib_musc.functional.rscin import check_windows
from anomalib_musc.pool import Pool
from anomalib_musc.thresholds import count_anomalous, image_threshold, pixel_threshold
from anomalib_musc.torch_model import MuScModel, PoolPrediction, ReferencePrediction


class RsCINPostProcessor(PostProcessor):
    """Re-score the pool's images with their neighbours, then normalise and threshold as anomalib does.

    This is step 3 of MuSc (arXiv 2401.16753, section 3.3) and :class:`~anomalib_musc.MuSc`'s default. anomalib's
    plain ``PostProcessor`` or ``MEBinPostProcessor`` in its place leaves the image scores as they are.

    Args:
        windows: Neighbourhood sizes k, the image itself included: ``(1, 2, 3)`` for MVTec AD and BTAD,
            ``(1, 8, 9)`` for VisA.
        image_threshold: Image score above which an image is anomalous, before normalisation. ``None``: found on
            validation labels by anomalib, or without labels by :mod:`anomalib_musc.thresholds`.
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


def uncalibrated(post_processor: PostProcessor) -> set[str]:
    """Return for which of "image" and "pixel" no validation labels or masks have said what is anomalous."""
    state = post_processor.state_dict()
    name = "_{}_threshold" if post_processor.enable_thresholding else "{}_min"
    return {level for level in ("image", "pixel") if bool(state[name.format(level)].isnan())}


def forget_calibration(post_processor: PostProcessor, levels: Iterable[str]) -> None:
    """Make "image" or "pixel" uncalibrated."""
    unknown = torch.tensor(float("nan"))
    names = [name for level in levels for name in (f"{level}_min", f"{level}_max", f"_{level}_threshold")]
    post_processor.load_state_dict(dict.fromkeys(names, unknown), strict=False)


def calibrate_on_pool(post_processor: PostProcessor, pools: Sequence[Pool], levels: Collection[str]) -> None:
    """Normalise and threshold without labels: by the range of the pools, which share one scale, and by their scores.

    Args:
        post_processor: anomalib's or ours.
        pools: The scored pools.
        levels: Which of "image" and "pixel" to calibrate.
    """
    scores = torch.cat([pool.scores for pool in pools]).double().cpu()
    patch_scores = [pool.patch_scores.flatten(1).double().cpu().numpy() for pool in pools]
    if "image" in levels:
        threshold = image_threshold(scores.numpy(), sum(map(count_anomalous, patch_scores)))
        _load(post_processor, "image", scores.min(), scores.max(), threshold)
    if "pixel" in levels:
        is_anomalous = scores > post_processor.image_threshold.cpu()
        every_patch = np.concatenate(patch_scores)
        highest = max(pool.raw_scores.max().item() for pool in pools)  # of the maps, whose rounding is another
        threshold = pixel_threshold(every_patch, is_anomalous.numpy()) if is_anomalous.any() else highest
        _load(post_processor, "pixel", every_patch.min(), highest, threshold)


def calibrate_on_bank(post_processor: PostProcessor, model: MuScModel, levels: Collection[str]) -> None:
    """Normalise and threshold without labels, by what the images of a bank score against each other.

    The highest of them is the threshold, which of M images about one normal image in M + 1 exceeds. A score of 1 is
    reached as far above it as twice their range.

    Args:
        post_processor: anomalib's or ours.
        model: A model with a bank.
        levels: Which of "image" and "pixel" to calibrate.
    """
    if not levels:
        return
    peaks = model.bank.raw_scores
    lowest, highest = peaks.min().item(), peaks.max().item()
    if len(peaks) < 2:
        rank_zero_warn("A bank of one image has no scale: thresholds without labels are not to be relied on.")
    if "pixel" in levels:
        _load(post_processor, "pixel", lowest, lowest + 4 * (highest - lowest), highest)
    if "image" in levels:
        is_scaled = isinstance(post_processor, RsCINPostProcessor) and highest > lowest
        lowest, highest = (0.0, 1.0) if is_scaled else (lowest, highest)
        _load(post_processor, "image", lowest, lowest + 4 * (highest - lowest), highest)


def _load(post_processor: PostProcessor, level: str, lowest: Any, highest: Any, threshold: float) -> None:
    found = {f"{level}_min": torch.as_tensor(lowest), f"{level}_max": torch.as_tensor(highest)}
    if post_processor.enable_thresholding:
        found[f"_{level}_threshold"] = torch.tensor(threshold)
        rank_zero_info(f"No labels for the {level} threshold: {threshold:.3f} by the images' own scores.")
    post_processor.load_state_dict(found, strict=False)
