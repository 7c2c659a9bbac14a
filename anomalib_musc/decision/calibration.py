# SPDX-License-Identifier: Apache-2.0
"""Normalisation and thresholds of a post-processor where no labels have given them: from a pool, or from a bank."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from anomalib.post_processing import PostProcessor
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from anomalib_musc.decision.thresholds import count_anomalous, image_threshold, pixel_threshold
from anomalib_musc.functional import reference_scale
from anomalib_musc.memory_bank.bank import ReferenceBank
from anomalib_musc.pool.pool import Pool
from anomalib_musc.post_processor import RsCINPostProcessor
from anomalib_musc.torch_model import MuScModel

LEVELS = frozenset({"image", "pixel"})


class Calibration:
    """What a post-processor knows without labels, and on what it was found.

    Components other than anomalib's ``PostProcessor`` have nothing to calibrate.

    Attributes:
        without_labels: Which of "image" and "pixel" no labels or masks have given.
    """

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

    def find_on_pools(self, post_processor: Any, pools: Sequence[Pool]) -> tuple[Pool, ...]:
        """Find what labels have not given, each time anew, as the pools may be others than before.

        Returns:
            The pools, with image scores to which one threshold applies.
        """
        if not isinstance(post_processor, PostProcessor):
            return tuple(pools)
        self.without_labels |= _uncalibrated(post_processor)
        return calibrate_on_pool(post_processor, pools, self.without_labels)

    def find_on_bank(self, post_processor: Any, model: MuScModel, *, may_hold_defects: bool) -> None:
        """Find what labels have not given, and anew what was found on another bank."""
        if isinstance(post_processor, PostProcessor):
            scores, levels = model.bank.raw_scores.tolist(), _uncalibrated(post_processor)
            if scores != self._bank_scores:
                levels |= self.without_labels
            self._bank_scores = scores
            self.without_labels |= levels
            calibrate_on_bank(post_processor, model, levels, may_hold_defects=may_hold_defects)

    def to_checkpoint(self) -> dict[str, list[Any]]:
        """Return plain data for a checkpoint."""
        return {"calibrated_on_pool": sorted(self.without_labels), "calibrated_for": self._bank_scores}

    def load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over what :meth:`to_checkpoint` gave."""
        self.without_labels = frozenset(checkpoint.get("calibrated_on_pool", ()))
        self._bank_scores = checkpoint.get("calibrated_for", [])


def _uncalibrated(post_processor: PostProcessor) -> frozenset[str]:
    """Return for which levels no validation labels or masks have said what is anomalous."""
    state = post_processor.state_dict()
    name = "_{}_threshold" if post_processor.enable_thresholding else "{}_min"
    return frozenset(level for level in LEVELS if bool(state[name.format(level)].isnan()))


def calibrate_on_pool(
    post_processor: PostProcessor, pools: Sequence[Pool], levels: Collection[str]
) -> tuple[Pool, ...]:
    """Normalise and threshold without labels, by the pools' own scores.

    Where there are several, the image scores of each are moved so that its own threshold is that of all: they may be of
    different products, and the oddest image of a good pool is no defect.

    Args:
        post_processor: anomalib's or ours.
        pools: The scored pools.
        levels: Which of "image" and "pixel" to calibrate.

    Returns:
        The pools with their image scores moved.
    """
    patch_scores = [pool.patch_scores.flatten(1).cpu().double().numpy() for pool in pools]
    if "image" in levels:
        counts = [count_anomalous(values) for values in patch_scores]
        pools, threshold = _with_one_threshold(pools, counts)
    scores = torch.cat([pool.scores for pool in pools]).cpu()
    if "image" in levels:
        _load(post_processor, "image", scores.min(), scores.max(), threshold)
    if "pixel" in levels:
        is_anomalous = scores > post_processor.image_threshold.cpu()
        every_patch = np.concatenate(patch_scores)
        highest = max(pool.raw_scores.max().item() for pool in pools)  # of the maps, whose rounding is another
        threshold = pixel_threshold(every_patch, is_anomalous.numpy()) if is_anomalous.any() else highest
        _load(post_processor, "pixel", every_patch.min(), highest, threshold)
    return tuple(pools)


def _with_one_threshold(pools: Sequence[Pool], counts: Sequence[int]) -> tuple[list[Pool], float]:
    """Move the scores of pools, of which so many images each are anomalous, to one threshold; return it, too."""
    pairs = zip(pools, counts, strict=True)
    thresholds = [image_threshold(pool.scores.cpu().double().numpy(), count) for pool, count in pairs]
    highest = max(thresholds)
    moved = [
        pool if threshold == highest else pool.with_scores(pool.scores - threshold + highest)
        for pool, threshold in zip(pools, thresholds, strict=True)
    ]
    return moved, highest


def calibrate_on_bank(
    post_processor: PostProcessor, model: MuScModel, levels: Collection[str], *, may_hold_defects: bool = False
) -> None:
    """Normalise and threshold without labels, by what the images of a bank score against each other.

    The highest of them is the threshold, which of M images about one normal image in M + 1 exceeds; where some may be
    defects, it is found as for a pool. A score of 1 is reached as far above it as twice their range. Where they have no
    range, scores are what the distances are, from 0 to 2, halved.

    Args:
        post_processor: anomalib's or ours.
        model: A model with a bank.
        levels: Which of "image" and "pixel" to calibrate.
        may_hold_defects: Whether nobody has said that the images are normal.
    """
    if not levels:
        return
    bank = model.bank
    scale = reference_scale(bank.raw_scores).item()
    if scale == 0:
        rank_zero_warn(
            "A bank of one image, or of equal ones, has no scale: labels mean nothing without two references or more, "
            "labels in validation, or thresholds by hand (image_threshold and pixel_threshold of the post-processor)."
        )
        for level in levels:
            _load(post_processor, level, 0.0, 2.0, 1.0)
        return
    highest = bank.raw_scores.max().item()
    thresholds, steps = {"image": highest, "pixel": highest}, {"image": scale, "pixel": scale}
    if isinstance(post_processor, RsCINPostProcessor):  # whose scores are in units of the scale
        thresholds["image"], steps["image"] = (highest - bank.raw_scores.min().item()) / scale, 1.0
    if may_hold_defects:
        thresholds |= _thresholds_of_pool(post_processor, bank, scale)
    for level in levels:
        threshold, step = thresholds[level], steps[level]
        _load(post_processor, level, threshold - step, threshold + 3 * step, threshold)


def _thresholds_of_pool(post_processor: PostProcessor, bank: ReferenceBank, scale: float) -> dict[str, float]:
    """Return the thresholds of a bank's images where some of them are anomalous, as those of a pool; else none."""
    patch_scores = bank.own_patch_scores().flatten(1).cpu().double().numpy()
    num_anomalous = count_anomalous(patch_scores)
    if num_anomalous == 0:
        return {}
    scores = bank.raw_scores
    if isinstance(post_processor, RsCINPostProcessor):  # in [0, 1], while an image's will be in units of the scale
        spread = (scores.max() - scores.min()).item()
        scores = post_processor.rescore(scores, bank.class_tokens) * (spread / scale)
    values = scores.cpu().double().numpy()
    threshold = image_threshold(values, num_anomalous)
    return {"image": threshold, "pixel": pixel_threshold(patch_scores, values > threshold)}


def _load(post_processor: PostProcessor, level: str, lowest: Any, highest: Any, threshold: float) -> None:
    found = {f"{level}_min": torch.as_tensor(lowest), f"{level}_max": torch.as_tensor(highest)}
    if post_processor.enable_thresholding:
        found[f"_{level}_threshold"] = torch.tensor(threshold)
        rank_zero_info(
            f"No labels for the {level} threshold: {threshold:.3f} by the images' own scores, which reach from "
            f"{float(lowest):.3f} to {float(highest):.3f} before normalisation."
        )
    post_processor.load_state_dict(found, strict=False)
