# SPDX-License-Identifier: Apache-2.0
"""The metrics that the paper reports, as anomalib metrics."""

from typing import Any

import torch
from anomalib.metrics import AUPRO, AUROC, AnomalibMetric, BinaryPrecisionRecallCurve, Evaluator, F1Max, F1Score
from lightning.pytorch import LightningModule, Trainer


class _AveragePrecision(BinaryPrecisionRecallCurve):
    def compute(self) -> torch.Tensor:  # type: ignore[override]
        precision, recall, _ = super().compute()  # by ascending threshold
        return ((recall[:-1] - recall[1:]) * precision[:-1]).sum()


class AveragePrecision(AnomalibMetric, _AveragePrecision):  # type: ignore[misc]
    r"""Average precision, :math:`\sum_n (R_n - R_{n-1}) P_n`, as scikit-learn's ``average_precision_score``.

    anomalib's ``AUPR`` is the trapezoid under the same curve, which is not what papers report.

    Example:
        >>> import torch
        >>> from anomalib.data import ImageBatch
        >>> metric = AveragePrecision(fields=["pred_score", "gt_label"])
        >>> metric.update(
        ...     ImageBatch(
        ...         image=torch.rand(4, 3, 8, 8),
        ...         pred_score=torch.tensor([0.1, 0.4, 0.35, 0.8]),
        ...         gt_label=torch.tensor([0, 0, 1, 1]),
        ...     )
        ... )
        >>> metric.compute()
        tensor(0.8333)
    """


class PaperEvaluator(Evaluator):
    """The MuSc paper's metrics: AUROC, F1-max and AP of images and pixels, and AUPRO (FPR up to 0.3).

    Next to them stands anomalib's F1 at the threshold. A metric is left out where a dataset has no labels or no masks
    for it. anomalib normalises scores around the threshold and clips them at 0 and 1, which ties the most and the least
    anomalous ones; here a model with a method ``unclipped``, as MuSc has, is measured before any post-processing but
    RsCIN, as in the paper. Pass anomalib's ``Evaluator`` to measure what a post-processor of your own makes of scores.

    Example:
        >>> [metric.name for metric in PaperEvaluator().test_metrics][:4]
        ['image_AUROC', 'image_F1Max', 'image_AveragePrecision', 'image_F1Score']
    """

    def __init__(self) -> None:
        metrics: list[AnomalibMetric] = []
        for prefix, score, label, truth in (
            ("image_", "pred_score", "pred_label", "gt_label"),
            ("pixel_", "anomaly_map", "pred_mask", "gt_mask"),
        ):
            ranking = (
                (AUROC, F1Max, AveragePrecision) if prefix == "image_" else (AUROC, F1Max, AveragePrecision, AUPRO)
            )
            metrics += [metric(fields=[score, truth], prefix=prefix, strict=False) for metric in ranking]
            metrics.append(F1Score(fields=[label, truth], prefix=prefix, strict=False))
        super().__init__(test_metrics=metrics)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the metrics with a batch."""
        unclipped: Any = getattr(pl_module, "unclipped", None)
        batch = batch if unclipped is None else unclipped(batch, dataloader_idx)
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
