# SPDX-License-Identifier: Apache-2.0
"""Ranking metrics as the paper reports them."""

from anomalib_musc.metrics.curves import AUPRO, AUROC, AveragePrecision, F1Max, Ranking
from anomalib_musc.metrics.evaluator import PaperEvaluator

__all__ = ["AUPRO", "AUROC", "AveragePrecision", "F1Max", "PaperEvaluator", "Ranking"]
