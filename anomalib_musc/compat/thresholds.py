# SPDX-License-Identifier: Apache-2.0
"""Thresholds from the labels of several processes.

anomalib 2.7.0: once its threshold metric has been synchronised over processes, it looks for an anomalous pixel in a
loop over single ones: half a minute for eight small masks, hours for a data set.
"""

from collections.abc import Callable
from typing import Any

import torch
from anomalib.post_processing import PostProcessor


def gather_labels(post_processor: PostProcessor, gather: Callable[[Any], list[Any]]) -> None:
    """Give the threshold metrics of each process the scores and labels of all, so that they need no others.

    Args:
        post_processor: Whose metrics have seen the batches of a validation.
        gather: Returns what each process gives.
    """
    for metric in (post_processor._image_threshold_metric, post_processor._pixel_threshold_metric):
        for state in ("preds", "target"):
            own = [part.flatten().cpu() for part in getattr(metric, state, [])]
            setattr(metric, state, [torch.cat(parts) for parts in gather(own) if parts])
        metric._to_sync = False
