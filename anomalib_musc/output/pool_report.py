# SPDX-License-Identifier: Apache-2.0
"""What the pools of a model, or another model's post-processor, tell of the images beyond their batches."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.post_processing import PostProcessor

from anomalib_musc.decision.thresholds import deviations
from anomalib_musc.memory_bank.bank import ReferenceBank
from anomalib_musc.output.predictions import Decision, PoolReport, Prediction
from anomalib_musc.pool.module import PoolModule
from anomalib_musc.pool.pool import Pool
from anomalib_musc.post_processor import RsCINPostProcessor

_NUM_SIMILAR = 3
_ROWS = 1024  # of the matrix of similarities at once
_ARGUMENT = "--model.post_processor anomalib_musc.RsCINPostProcessor --model.post_processor.image_threshold"


def report_of_pools(
    model: PoolModule,
    rule: str,
    bank: ReferenceBank | None = None,
    settings: Mapping[str, Any] | None = None,
) -> PoolReport:
    """Return what the pools of a model tell of their images.

    Args:
        model: The model, after calibration.
        rule: How the image threshold was found, in words.
        bank: The memory bank where images are compared with it alone.
        settings: The model's.
    """
    post_processor = model.post_processor
    images: dict[str, Prediction] = {}
    for pool in model.pools:
        images |= _images_of(pool, post_processor, bank)
    decision = decision_of(post_processor)
    if isinstance(post_processor, RsCINPostProcessor) and decision.threshold is not None:
        low, high = (getattr(post_processor, name).item() for name in ("image_min", "image_max"))
        scale = (high - low, post_processor.image_threshold.item() - (high - low) / 2)
        is_normalised = post_processor.enable_normalization and scale[0] > 0
        decision = replace(
            decision,
            rule=rule,
            argument=_ARGUMENT,
            argument_scale=scale if is_normalised else (1.0, 0.0),
            region_fraction=post_processor.region_fraction,
            pixel_threshold=_pixel_threshold(post_processor),
        )
    skipped = {str(path): reason for path, reason in model.skipped_images.items()}
    groups = [(group.text, group.names) for pool in model.pools for group in pool.groups]
    return PoolReport(images, decision, skipped, model.pool_warnings, settings or {}, groups)


def decision_of(post_processor: Any) -> Decision:
    """Return what any post-processor of anomalib's tells of its threshold."""
    if not isinstance(post_processor, PostProcessor) or not post_processor.enable_thresholding:
        return Decision()
    image, pixel = (getattr(post_processor, f"normalized_{level}_threshold").item() for level in ("image", "pixel"))
    if not math.isfinite(image):
        return Decision()
    return Decision(image, "of the model's post-processor", pixel_threshold=pixel if math.isfinite(pixel) else None)


def _images_of(pool: Pool, post_processor: Any, bank: ReferenceBank | None) -> dict[str, Prediction]:
    scores, labels = _as_users_see(pool.scores, post_processor)
    population = pool if bank is None else bank
    above = deviations(pool.scores - pool.offset, population.raw_scores, population.class_tokens).tolist()
    similar = _most_similar(pool.class_tokens)
    grids = pool.patch_scores.float().cpu().numpy()
    return {
        name: Prediction(
            path=name,
            score=scores[index],
            is_anomalous=None if labels is None else labels[index],
            raw_score=pool.raw_scores[index].item(),
            deviations=above[index],
            size=pool.sizes.get(name),
            anomaly_map=grids[index],
            thumbnail=pool.thumbnails.get(name),
            notes=[pool.notes[name]] if name in pool.notes else [],
            similar=[pool.names[other] for other in similar[index]],
        )
        for index, name in enumerate(pool.names)
    }


def _as_users_see(scores: torch.Tensor, post_processor: Any) -> tuple[list[float], list[bool] | None]:
    """Return scores ``(N,)`` as a post-processor leaves them, and their labels."""
    batch: Any = ImageBatch(image=torch.zeros(len(scores), 3, 1, 1), pred_score=scores.detach().cpu().float())
    if isinstance(post_processor, PostProcessor):
        device = post_processor.image_min.device
        batch.pred_score = batch.pred_score.to(device)
        post_processor.post_process_batch(batch)
    labels = batch.pred_label
    is_known = labels is not None and labels.dtype == torch.bool
    return batch.pred_score.tolist(), labels.tolist() if is_known else None


def _most_similar(class_tokens: torch.Tensor) -> list[list[int]]:
    """Return the images most similar to each by their features ``(N, D)``, without itself."""
    tokens = torch.nn.functional.normalize(class_tokens.float().cpu(), dim=-1)
    number = min(_NUM_SIMILAR, len(tokens) - 1)
    similar: list[list[int]] = []
    for start in range(0, len(tokens), _ROWS):
        similarities = tokens[start : start + _ROWS] @ tokens.T
        rows = torch.arange(len(similarities))
        similarities[rows, start + rows] = -math.inf
        similar += similarities.topk(number).indices.tolist()
    return similar


def _pixel_threshold(post_processor: RsCINPostProcessor) -> float | None:
    """Return the threshold of anomaly maps before normalisation, ``None`` where none decides."""
    if post_processor.finds_regions_by_maximum:
        return None
    threshold = post_processor.normalized_pixel_threshold.item()
    if post_processor.enable_normalization:
        value_range = post_processor.pixel_max.item() - post_processor.pixel_min.item()
        threshold = post_processor.pixel_threshold.item() + (threshold - 0.5) * value_range
    return threshold if math.isfinite(threshold) else None
