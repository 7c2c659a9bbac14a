# SPDX-License-Identifier: Apache-2.0
"""The three steps of MuSc as pure functions: tensors in, tensors out, torch the only dependency.

Li et al., "MuSc: Zero-Shot Industrial Anomaly Classification and Segmentation with Mutual Scoring of the
Unlabeled Images", ICLR 2024, https://arxiv.org/abs/2401.16753.

1. :func:`lnamd` aggregates each patch with its neighbourhood (section 3.1).
2. :func:`mutual_scores` scores each patch by its distances to all other images (section 3.2).
3. :func:`rscin` re-scores each image with the scores of the images most like it (section 3.3).

:func:`layer_scores` takes the first two steps together, at several degrees, with less work. :func:`reference_scores`
and :func:`rscin_by_references` are steps 2 and 3 against a memory bank, for one image at a time. :func:`larger_score`
goes beyond the paper.
"""

from anomalib_musc.distances import Precision, check_budget, check_degrees, check_precision, check_search_radius
from anomalib_musc.functional.layer_scoring import layer_scores
from anomalib_musc.functional.lnamd import lnamd
from anomalib_musc.functional.mutual_scoring import check_interval, mutual_scores
from anomalib_musc.functional.reference_scoring import reference_scores
from anomalib_musc.functional.rscin import reference_scale, rscin, rscin_by_references
from anomalib_musc.functional.second_interval import check_second_interval, larger_score
from anomalib_musc.functional.subsets import split_into_subsets

__all__ = [
    "Precision",
    "check_budget",
    "check_degrees",
    "check_interval",
    "check_precision",
    "check_search_radius",
    "check_second_interval",
    "larger_score",
    "layer_scores",
    "lnamd",
    "mutual_scores",
    "reference_scale",
    "reference_scores",
    "rscin",
    "rscin_by_references",
    "split_into_subsets",
]
