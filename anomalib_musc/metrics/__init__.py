# SPDX-License-Identifier: Apache-2.0
"""Ranking metrics as the paper reports them."""

from anomalib_musc.metrics.evaluator import AUPRO, AUROC, AveragePrecision, F1Max, PaperEvaluator, Ranking

__all__ = ["AUPRO", "AUROC", "AveragePrecision", "F1Max", "PaperEvaluator", "Ranking"]
