# SPDX-License-Identifier: Apache-2.0
"""RsCIN as anomalib's post-processor."""

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer

from anomalib_musc.compat.thresholds import gather_labels
from anomalib_musc.distances import Processes
from anomalib_musc.functional import rscin
from anomalib_musc.functional.arguments import is_number
from anomalib_musc.functional.rscin import check_windows
from anomalib_musc.memory_bank.bank import ReferenceBank
from anomalib_musc.torch_model import PoolPrediction


class RsCINPostProcessor(PostProcessor):
    """Re-score the pool's images with their neighbours, then normalise and threshold as anomalib does.

    This is step 3 of MuSc (arXiv 2401.16753, section 3.3) and :class:`~anomalib_musc.MuSc`'s default. anomalib's
    plain ``PostProcessor`` or ``MEBinPostProcessor`` in its place leaves the image scores as they are.

    Scores keep the unit of the raw ones, a distance from 0 to 2, so that a threshold by hand means the same for the
    next pool. What users see is normalised to [0, 1], with 0.5 at the threshold.

    Without labels an image is anomalous that lies more than three times as far above the 45th percentile of the raw
    scores as the 20th lies below it; ``image_sensitivity`` s makes that 3 (1 - s) / s times. An image
    labelled normal has no mask; of an anomalous one it is what lies above four fifths of the image's own maximum,
    1 - 0.4 s with ``pixel_sensitivity`` s. With labels anomalib's F1-adaptive threshold decides, midway between two
    scores, and its sensitivities.

    Args:
        windows: Neighbourhood sizes k, the image itself included: ``(1, 2, 3)`` for MVTec AD and BTAD,
            ``(1, 8, 9)`` for VisA.
        contamination: Expected share of anomalous images, above 0 and at most 0.5, in place of the rule above, as in
            scikit-learn; "auto" for the rule.
        image_threshold: Image score above which an image is anomalous, before normalisation, from 0 to 2. ``None``:
            found on validation labels by anomalib, or without labels as above.
        pixel_threshold: Likewise for the values of anomaly maps, from 0 to 2.
        **kwargs: Arguments of anomalib's ``PostProcessor``: normalisation, thresholding and sensitivities from 0 to 1.

    Raises:
        ValueError: If ``windows`` is empty or holds a number below 1, or another argument is out of range.

    Example:
        >>> import torch
        >>> post_processor = RsCINPostProcessor(windows=(1, 8, 9), image_sensitivity=0.4)
        >>> post_processor.rescore(torch.tensor([0.3, 0.3, 0.5]), torch.eye(3))
        tensor([0.3000, 0.3000, 0.5000])
    """

    def __init__(
        self,
        windows: Sequence[int] = (1, 2, 3),
        contamination: float | Literal["auto"] = "auto",
        image_threshold: float | None = None,
        pixel_threshold: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_windows(windows)
        _check_thresholds(image_threshold=image_threshold, pixel_threshold=pixel_threshold)
        _check_sensitivities(image_sensitivity=self.image_sensitivity, pixel_sensitivity=self.pixel_sensitivity)
        if contamination != "auto" and not (is_number(contamination) and 0 < contamination <= 0.5):
            msg = f"contamination must be 'auto' or a share above 0 and at most 0.5, got {contamination!r}."
            raise ValueError(msg)
        self.windows = tuple(windows)
        self.contamination = contamination
        self.fixed_image_threshold = image_threshold
        self.fixed_pixel_threshold = pixel_threshold
        self._without_labels: frozenset[str] = frozenset()

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        own = ("windows", "contamination", "fixed_image_threshold", "fixed_pixel_threshold")
        return (*super()._checkpoint_config_keys, *own)

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Take over a checkpoint's settings, but for thresholds, shares and sensitivities that were given here."""
        default: dict[str, Any] = dict.fromkeys(("fixed_image_threshold", "fixed_pixel_threshold"))
        default |= dict.fromkeys(("image_sensitivity", "pixel_sensitivity"), 0.5) | {"contamination": "auto"}
        given = {name for name, value in default.items() if getattr(self, name) != value}
        super().load_checkpoint_config({name: value for name, value in config.items() if name not in given})

    def set_without_labels(self, levels: Collection[str]) -> None:
        """Say for which of "image" and "pixel" no labels or masks have given the threshold."""
        self._without_labels = frozenset(levels)

    @property
    def image_threshold(self) -> torch.Tensor:
        """The threshold of image scores before normalisation."""
        return _fixed_or(self.fixed_image_threshold, super().image_threshold)

    @property
    def pixel_threshold(self) -> torch.Tensor:
        """The threshold of anomaly maps before normalisation."""
        return _fixed_or(self.fixed_pixel_threshold, super().pixel_threshold)

    @property
    def normalized_image_threshold(self) -> torch.Tensor:
        """The threshold of image scores as they leave; without labels the sensitivity has moved the rule, not this."""
        if not self.enable_normalization:
            return self.image_threshold  # anomalib 2.7.0 would compare scores that are not normalised with 0.5
        return torch.tensor(0.5) if "image" in self._without_labels else super().normalized_image_threshold

    @property
    def normalized_pixel_threshold(self) -> torch.Tensor:
        """The threshold of anomaly maps as they leave."""
        return super().normalized_pixel_threshold if self.enable_normalization else self.pixel_threshold

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute thresholds from labels, that of images midway between two scores.

        anomalib 2.7.0 takes the lowest score that is to be flagged, and then flags what lies above it.
        """
        if (processes := Processes.of(trainer.world_size)) is not None:
            gather_labels(self, processes.gather)
        scores: list[torch.Tensor] = getattr(self._image_threshold_metric, "preds", [])
        labels: list[torch.Tensor] = getattr(self._image_threshold_metric, "target", [])
        known = [torch.cat([part.flatten().cpu() for part in parts]) for parts in (scores, labels) if len(parts)]
        super().on_validation_epoch_end(trainer, pl_module)
        if len(known) == 2 and known[1].unique().numel() == 2:
            threshold = self._image_threshold.cpu()
            below = known[0][known[0] < threshold]
            lower = below.max() if len(below) else threshold - (known[0].max() - threshold).clamp_min(1e-6)
            self._image_threshold.copy_((threshold + lower) / 2)

    def rescore(
        self, scores: torch.Tensor, class_tokens: torch.Tensor, bank: ReferenceBank | None = None
    ) -> torch.Tensor:
        """Re-score the images of a pool with each other, or each on its own with a bank's images.

        Args:
            scores: Raw scores, shape ``(N,)``.
            class_tokens: Image features, shape ``(N, D)``.
            bank: The bank that they were compared with.

        Returns:
            Scores ``(N,)`` in the unit of the raw ones: :func:`~anomalib_musc.functional.rscin` or
            :func:`~anomalib_musc.functional.rscin_by_references`, whose minimum and range are undone.
        """
        if bank is not None:
            return bank.rescore(scores, class_tokens, self.windows)
        lowest, highest = scores.min(), scores.max()
        return lowest + rscin(scores, class_tokens, self.windows) * (highest - lowest)

    def post_process_batch(self, batch: Batch) -> None:
        """Normalise and threshold a batch; without masks, regions are found in the map as it is."""
        mask = None if batch.pred_mask is not None else self._mask_without_masks(batch.anomaly_map)
        super().post_process_batch(batch)
        if mask is not None:
            batch.pred_mask = _within(mask, batch.pred_label)

    def forward(self, predictions: InferenceBatch | PoolPrediction) -> InferenceBatch:
        """Post-process a batch of predictions; those of a pool or by a bank are re-scored first."""
        if isinstance(predictions, PoolPrediction):
            scores = self.rescore(predictions.pred_score, predictions.class_tokens, predictions.bank)
            predictions = InferenceBatch(pred_score=scores, anomaly_map=predictions.anomaly_map)
        mask = self._mask_without_masks(predictions.anomaly_map)
        found = super().forward(predictions)
        return found if mask is None else found._replace(pred_mask=_within(mask, found.pred_label))

    @property
    def region_fraction(self) -> float:
        """Above which share of its own maximum a map is anomalous, where :attr:`finds_regions_by_maximum`."""
        return 1 - 0.4 * self.pixel_sensitivity

    @property
    def finds_regions_by_maximum(self) -> bool:
        """Whether regions are found in each map as it is, as no threshold of pixels decides."""
        has_no_threshold = "pixel" in self._without_labels and self.fixed_pixel_threshold is None
        return self.enable_thresholding and has_no_threshold

    def _mask_without_masks(self, anomaly_map: torch.Tensor | None) -> torch.Tensor | None:
        if anomaly_map is None or not self.finds_regions_by_maximum:
            return None
        return anomaly_map >= self.region_fraction * anomaly_map.amax(dim=(-2, -1), keepdim=True)


def _within(mask: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Return masks ``(B, ..., H, W)`` of the images that are labelled anomalous, ``(B,)``; empty ones of the others."""
    return mask if labels is None else mask & labels.view(-1, *[1] * (mask.ndim - 1)).bool()


def _fixed_or(fixed: float | None, found: torch.Tensor) -> torch.Tensor:
    return found if fixed is None else torch.full_like(found, fixed)


def _check_thresholds(**thresholds: object) -> None:
    """Raise a ValueError unless thresholds are distances of unit vectors, or ``None``."""
    for name, threshold in thresholds.items():
        if threshold is not None and not (is_number(threshold) and 0 <= float(str(threshold)) <= 2):
            msg = (
                f"{name} must be a number from 0 to 2, as scores before normalisation are distances of unit vectors, "
                f"or None, got {threshold!r}. The log prints the threshold that was found."
            )
            raise ValueError(msg)


def _check_sensitivities(**sensitivities: object) -> None:
    for name, sensitivity in sensitivities.items():
        if not (is_number(sensitivity) and 0 <= float(str(sensitivity)) <= 1):
            msg = f"{name} must be a number from 0 to 1, 0.5 being neutral, got {sensitivity!r}."
            raise ValueError(msg)
