# SPDX-License-Identifier: Apache-2.0
"""The metrics that the paper reports, as anomalib's evaluator."""

from functools import partial
from typing import Any, Literal

from anomalib.metrics import AnomalibMetric, Evaluator, F1Score
from lightning.pytorch import LightningModule, Trainer

from anomalib_musc.compat.monitoring import monitored
from anomalib_musc.compat.termination import stopped_at_once
from anomalib_musc.metrics.curves import AUPRO, AUROC, AveragePrecision, F1Max, RankingMetric


class PaperEvaluator(Evaluator):
    """The MuSc paper's metrics: AUROC, F1-max and AP of images and pixels, and AUPRO (FPR up to 0.3).

    Next to them stands anomalib's F1 at the threshold. A metric is left out where a dataset has no labels or no masks
    for it. anomalib normalises scores around the threshold and clips them at 0 and 1, which ties the most and the least
    anomalous ones; here a model with a method ``unclipped``, as MuSc has, is measured before any post-processing but
    RsCIN, as in the paper. Pass anomalib's ``Evaluator`` to measure what a post-processor of your own makes of scores.

    Args:
        aupro: How AUPRO is computed, see :class:`AUPRO`: "exact", or "official" to compare with MuSc's published
            figures; 0.1 to 0.3 points lower on the same maps, as far as measured.

    Example:
        >>> [metric.name for metric in PaperEvaluator().test_metrics][:4]
        ['image_AUROC', 'image_F1Max', 'image_AveragePrecision', 'image_F1Score']
    """

    def __init__(self, aupro: Literal["exact", "official"] = "exact") -> None:
        metrics: list[AnomalibMetric] = []
        regions = partial(AUPRO, method=aupro)
        for prefix, score, label, truth, followers, leader in (
            ("image_", "pred_score", "pred_label", "gt_label", (AUROC, F1Max), AveragePrecision),
            ("pixel_", "anomaly_map", "pred_mask", "gt_mask", (AUROC, F1Max, AveragePrecision), regions),
        ):
            arguments: dict[str, Any] = {"fields": [score, truth], "prefix": prefix, "strict": False}
            leading: RankingMetric = leader(**arguments)
            metrics += [follower(**arguments, ranking=leading.ranking) for follower in followers]
            metrics += [leading, F1Score(fields=[label, truth], prefix=prefix, strict=False)]
        super().__init__(test_metrics=metrics)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Measure in validation what a callback monitors: without it anomalib's ``ModelCheckpoint`` saves nothing."""
        measured: list[Any] = [*self.val_metrics, *self.test_metrics]
        for name in monitored(trainer) - {metric.name for metric in measured[: len(self.val_metrics)]}:
            self.val_metrics.extend(_alone(metric) for metric in measured if metric.name == name)
        super().setup(trainer, pl_module, stage)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update what is monitored with a batch."""
        if len(self.val_metrics):
            batch = _unclipped(pl_module, batch, dataloader_idx)
            super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

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
        batch = _unclipped(pl_module, batch, dataloader_idx)
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute and log the metrics; a SIGTERM ends it, as it may take minutes."""
        with stopped_at_once(trainer):
            metrics: Any = self.test_metrics
            for metric in metrics:
                metric.compute()  # which it keeps
        super().on_test_epoch_end(trainer, pl_module)


def _unclipped(module: LightningModule, batch: Any, dataloader_idx: int) -> Any:
    unclipped: Any = getattr(module, "unclipped", None)
    return batch if unclipped is None else unclipped(batch, dataloader_idx)


def _alone(metric: Any) -> Any:
    """Return a metric like this one, empty, that shares no ranking with others."""
    alone = metric.clone()
    if isinstance(alone, RankingMetric):
        alone.owns_ranking = True
    alone.reset()
    return alone
