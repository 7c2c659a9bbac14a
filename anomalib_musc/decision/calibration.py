# SPDX-License-Identifier: Apache-2.0
"""Normalisation and thresholds of a post-processor where no labels have given them: from a pool, or from a bank."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from anomalib.post_processing import PostProcessor
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from anomalib_musc.decision.thresholds import (
    CENTER,
    FACTOR,
    RULE,
    contamination_threshold,
    factor_of,
    image_threshold,
    threshold_above_all,
)
from anomalib_musc.functional import reference_scale
from anomalib_musc.memory_bank.bank import ReferenceBank
from anomalib_musc.pool.pool import Pool
from anomalib_musc.post_processor import RsCINPostProcessor

LEVELS = frozenset({"image", "pixel"})
_RULE_OF_LABELS = "of the best F1 on the validation labels"


class Calibration:
    """What a post-processor knows without labels, and on what it was found.

    Components other than anomalib's ``PostProcessor`` have nothing to calibrate.

    Attributes:
        without_labels: Which of "image" and "pixel" no labels or masks have given.
        rule: How the image threshold was found, in words.
    """

    rule: str = _RULE_OF_LABELS

    def __init__(self) -> None:
        self.without_labels: frozenset[str] = frozenset()
        self._bank_scores: list[float] = []

    def forget(self, post_processor: Any, levels: Collection[str] = LEVELS) -> None:
        """Make levels uncalibrated."""
        self.without_labels -= frozenset(levels)
        if isinstance(post_processor, PostProcessor):
            unknown = torch.tensor(float("nan"))
            names = [name for level in levels for name in (f"{level}_min", f"{level}_max", f"_{level}_threshold")]
            post_processor.load_state_dict(dict.fromkeys(names, unknown), strict=False)
            self._tell(post_processor)

    def is_by_labels(self, post_processor: Any) -> bool:
        """Whether labels or masks of a validation have given a threshold that holds for other pools."""
        is_known = isinstance(post_processor, PostProcessor)
        return is_known and bool(LEVELS - self.without_labels - _uncalibrated(post_processor))

    def find_on_pools(self, post_processor: Any, pools: Sequence[Pool]) -> tuple[Pool, ...]:
        """Find what labels have not given, each time anew, as the pools may be others than before.

        Returns:
            The pools, with image scores to which one threshold applies.
        """
        if not isinstance(post_processor, PostProcessor):
            return tuple(pools)
        self.without_labels |= _uncalibrated(post_processor)
        self._tell(post_processor)
        if "image" in self.without_labels:
            self.rule = _rule_of(post_processor)
        return _calibrate_on_pools(post_processor, pools, self.without_labels)

    def find_on_bank(self, post_processor: Any, bank: ReferenceBank, *, may_hold_defects: bool) -> None:
        """Find what labels have not given, and anew what was found on another bank.

        Args:
            post_processor: anomalib's or ours.
            bank: The bank.
            may_hold_defects: Whether the references are unlabelled.
        """
        if isinstance(post_processor, PostProcessor):
            scores, levels = bank.raw_scores.tolist(), _uncalibrated(post_processor)
            if scores != self._bank_scores:
                levels |= self.without_labels
            self._bank_scores = scores
            self.without_labels |= levels
            self._tell(post_processor)
            rule = _calibrate_on_bank(post_processor, bank, levels, may_hold_defects=may_hold_defects)
            self.rule = rule or self.rule

    def to_checkpoint(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return {
            "calibrated_on_pool": sorted(self.without_labels),
            "calibrated_for": self._bank_scores,
            "rule": self.rule,
        }

    def load_checkpoint(self, checkpoint: Mapping[str, Any], post_processor: Any) -> None:
        """Take over what :meth:`to_checkpoint` gave."""
        self.without_labels = frozenset(checkpoint.get("calibrated_on_pool", ()))
        self._bank_scores = checkpoint.get("calibrated_for", [])
        self.rule = checkpoint.get("rule", self.rule)
        self._tell(post_processor)

    def _tell(self, post_processor: Any) -> None:
        if isinstance(post_processor, RsCINPostProcessor):
            post_processor.set_without_labels(self.without_labels)


def _uncalibrated(post_processor: PostProcessor) -> frozenset[str]:
    """Return for which levels no validation labels or masks have given a threshold."""
    state = post_processor.state_dict()
    name = "_{}_threshold" if post_processor.enable_thresholding else "{}_min"
    return frozenset(level for level in LEVELS if bool(state[name.format(level)].isnan()))


def _calibrate_on_pools(
    post_processor: PostProcessor, pools: Sequence[Pool], levels: Collection[str]
) -> tuple[Pool, ...]:
    """Normalise and threshold by the pools' own scores.

    The colours of a map have the image threshold in their middle, as an image's raw score is the maximum of its map.
    No image score is clipped. Where there are several pools, the image scores of each are moved so that its own
    threshold is that of all: they may be of different products, and the oddest image of a good pool is no defect.
    """
    if "image" in levels:
        thresholds = [_threshold_of(post_processor, pool, pool.scores) for pool in pools]
        highest = max(thresholds)
        pairs = zip(pools, thresholds, strict=True)
        pools = [pool.moved(highest - threshold) for pool, threshold in pairs]
        scores = torch.cat([pool.scores for pool in pools])
        reach = (scores - highest).abs().max().item()
        _load(post_processor, "image", highest - reach, highest + reach, highest)
        _report(post_processor, scores, _rule_of(post_processor))
    if "pixel" in levels:
        threshold = max(_threshold_of(post_processor, pool, pool.raw_scores) for pool in pools)
        lowest = min(pool.patch_scores.min().item() for pool in pools)
        _load(post_processor, "pixel", lowest, max(pool.raw_scores.max().item() for pool in pools), threshold)
    return tuple(pools)


def _threshold_of(post_processor: PostProcessor, images: Pool | ReferenceBank, scores: torch.Tensor) -> float:
    """Return the threshold by hand, that which the expected share of ``scores (N,)`` exceeds, or the rule's."""
    if isinstance(post_processor, RsCINPostProcessor) and post_processor.fixed_image_threshold is not None:
        return post_processor.fixed_image_threshold
    if isinstance(images, Pool) and images.shows_nothing:
        return threshold_above_all(scores)
    if not isinstance(post_processor, RsCINPostProcessor):
        return image_threshold(images.raw_scores, images.class_tokens)
    if post_processor.contamination != "auto":
        return contamination_threshold(scores, float(post_processor.contamination))
    return image_threshold(images.raw_scores, images.class_tokens, factor_of(post_processor.image_sensitivity))


def _calibrate_on_bank(
    post_processor: PostProcessor, bank: ReferenceBank, levels: Collection[str], *, may_hold_defects: bool
) -> str | None:
    """Normalise and threshold by the scores of a bank's images against each other; return the image threshold's rule.

    The highest of them is the threshold, which of M images about one normal image in M + 1 exceeds, moved by up to
    twice their range by the sensitivity; where some may be defects, that of a pool if it is lower. A score of 1 is
    reached as far above it as twice their range. Where they have no range, scores are what the distances are, from 0
    to 2, halved.
    """
    if not levels:
        return None
    scale = reference_scale(bank.raw_scores).item()
    if scale == 0:
        rank_zero_warn(
            "A bank of one image, or of equal ones, has no scale: labels mean nothing without two references or more, "
            "labels in validation, or thresholds by hand (image_threshold and pixel_threshold of the post-processor)."
        )
        for level in levels:
            _load(post_processor, level, 0.0, 2.0, 1.0)
        return "the middle of all distances, as the references have no scale"
    threshold, rule = bank.raw_scores.max().item(), "the highest of the references against each other"
    if isinstance(post_processor, RsCINPostProcessor):
        threshold += 4 * (0.5 - post_processor.image_sensitivity) * scale
    if may_hold_defects and (of_rule := _threshold_of(post_processor, bank, bank.raw_scores)) < threshold:
        threshold, rule = of_rule, f"{_rule_of(post_processor)}, of the references"
    for level in levels:
        _load(post_processor, level, threshold - scale, threshold + 3 * scale, threshold)
    if "image" not in levels:
        return None
    _report(post_processor, bank.raw_scores, rule)
    return rule


def _load(post_processor: PostProcessor, level: str, lowest: float, highest: float, threshold: float) -> None:
    found = {f"{level}_min": torch.tensor(lowest), f"{level}_max": torch.tensor(highest)}
    if post_processor.enable_thresholding:
        found[f"_{level}_threshold"] = torch.tensor(threshold)
    post_processor.load_state_dict(found, strict=False)


def _report(post_processor: PostProcessor, scores: torch.Tensor, rule: str) -> None:
    """Log the image threshold, its rule, and the scores' range, without which no threshold by hand can be chosen."""
    if post_processor.enable_thresholding:
        rank_zero_info(
            f"No labels: anomalous above {post_processor.image_threshold.item():.4f}, {rule}. "
            f"Scores reach from {scores.min().item():.4f} to {scores.max().item():.4f} before normalisation."
        )


def _rule_of(post_processor: PostProcessor) -> str:
    """Say in words what :func:`_threshold_of` does."""
    if isinstance(post_processor, RsCINPostProcessor):
        if post_processor.fixed_image_threshold is not None:
            return "given by hand"
        if post_processor.contamination != "auto":
            return f"above which the expected share of {post_processor.contamination} lies"
        if (factor := factor_of(post_processor.image_sensitivity)) != FACTOR:
            if factor in (0.0, float("inf")):
                return "which no image exceeds, as the sensitivity is 0" if factor else CENTER
            return f"{factor:.3g} {RULE}"
    return f"{FACTOR:g} {RULE}"
