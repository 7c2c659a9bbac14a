# SPDX-License-Identifier: Apache-2.0
"""The metrics that need no threshold, as anomalib metrics; those of a level share one ranking."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from anomalib.metrics import AnomalibMetric
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn
from torchmetrics.utilities.data import dim_zero_cat

from anomalib_musc.metrics.ranking import (
    Ranks,
    aupro,
    auroc,
    average_precision,
    f1_max,
    official_aupro,
    rank,
    region_sizes,
)


class Ranking(Metric):
    """The values of a level, each held once, and where the anomalous ones stand among them.

    Values stay on the GPU that they come from while it has the memory to sort them; elsewhere they go to the host.

    Args:
        regions: Whether the truth is masks ``(..., H, W)`` whose regions are wanted too, for AUPRO.
    """

    full_state_update = False
    normal: list[torch.Tensor]
    anomalous: list[torch.Tensor]
    region_sizes: list[torch.Tensor]

    def __init__(self, regions: bool = False) -> None:
        super().__init__()
        for state in ("normal", "anomalous", *(("region_sizes",) if regions else ())):
            self.add_state(state, default=[], dist_reduce_fx="cat")
        self.regions = regions
        self.num_values = 0

    def update(self, scores: torch.Tensor, truth: torch.Tensor) -> None:
        """Add scores and their truth, as many values of 0 or 1."""
        if scores.numel() != truth.numel():
            msg = f"As many scores as labels are needed, got shapes {tuple(scores.shape)} and {tuple(truth.shape)}."
            raise ValueError(msg)
        is_anomalous = truth == 1
        if not bool((is_anomalous | (truth == 0)).all()):
            msg = "Labels and masks must be 0 or 1."
            raise ValueError(msg)
        scores = scores.flatten().to(torch.promote_types(scores.dtype, torch.float32))
        self.normal.append(scores[~is_anomalous.flatten()])
        self.anomalous.append(scores[is_anomalous.flatten()])
        if self.regions:
            self.region_sizes.append(region_sizes(is_anomalous).to(scores.device))
        self.num_values += scores.numel()
        # Once on the host, always there: torchmetrics moves what has come when this returns.
        self.compute_on_cpu |= sorting_bytes(self.num_values, scores.dtype) > free_bytes(scores.device)

    def compute(self) -> Ranks:
        """Rank all values."""
        sizes = dim_zero_cat(self.region_sizes) if self.regions else None
        ranks = rank(dim_zero_cat(self.normal), dim_zero_cat(self.anomalous), sizes)
        if ranks.scores.numel() * ranks.num_normal == 0:
            missing = "normal" if ranks.num_normal == 0 else "anomalous"
            rank_zero_warn(f"There are no {missing} values: metrics that need both are reported as 0.", UserWarning)
        return ranks

    def reset(self) -> None:
        """Forget all values."""
        super().reset()
        self.num_values = 0
        self.compute_on_cpu = False


def sorting_bytes(num_values: int, dtype: torch.dtype) -> int:
    """Return what ranking takes on a GPU: two copies of the values, their indices, and the radix sort's own buffers."""
    return 8 * dtype.itemsize * num_values


def free_bytes(device: torch.device) -> int:
    """Return the memory that a GPU has left, what torch has set aside included; 0 for the host and other devices."""
    if device.type != "cuda":
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


class _OfRanking(Metric):
    full_state_update = False
    needs_regions = False

    def __init__(self, ranking: Ranking | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.owns_ranking = ranking is None
        self.ranking = Ranking(self.needs_regions) if ranking is None else ranking

    def update(self, scores: torch.Tensor, truth: torch.Tensor) -> None:
        if self.owns_ranking:
            self.ranking.update(scores, truth)

    def compute(self) -> torch.Tensor:
        return self.value(self.ranking.compute())

    def value(self, ranks: Ranks) -> torch.Tensor:
        raise NotImplementedError

    def reset(self) -> None:
        super().reset()
        if self.owns_ranking:
            self.ranking.reset()


class RankingMetric(AnomalibMetric, _OfRanking):  # type: ignore[misc]
    """A metric that depends on the order of scores alone.

    Args:
        fields: Names of a batch's scores and of their truth.
        prefix: Of the metric's name.
        strict: Whether a batch without these fields is an error; it is passed over otherwise.
        ranking: That of another metric of the same fields, which fills it. Defaults to one of its own.
        **kwargs: torchmetrics' own.
    """

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Update with a batch and return the metric of the batch alone."""
        self.update(*args, **kwargs)
        alone = self.clone()
        alone.owns_ranking = True
        alone.reset()
        alone.update(*args, **kwargs)
        return alone.compute()


class AUROC(RankingMetric):
    """Area under the ROC curve, as scikit-learn's ``roc_auc_score``, and anomalib's where scores are in [0, 1].

    anomalib's takes the sigmoid of each batch that has others.

    Example:
        >>> from anomalib.data import ImageBatch
        >>> scores, labels = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1])
        >>> metric = AUROC(fields=["pred_score", "gt_label"])
        >>> metric(ImageBatch(image=torch.rand(4, 3, 8, 8), pred_score=scores, gt_label=labels))
        tensor(0.7500)
    """

    def value(self, ranks: Ranks) -> torch.Tensor:
        """Compute the metric from a ranking."""
        return auroc(ranks)


class F1Max(RankingMetric):
    """Largest F1 of all thresholds, as anomalib's; ``threshold`` is the lowest that has it, once computed.

    Example:
        >>> from anomalib.data import ImageBatch
        >>> scores, labels = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1])
        >>> metric = F1Max(fields=["pred_score", "gt_label"])
        >>> metric.update(ImageBatch(image=torch.rand(4, 3, 8, 8), pred_score=scores, gt_label=labels))
        >>> metric.compute(), metric.threshold
        (tensor(0.8000), tensor(0.3500))
    """

    threshold: torch.Tensor

    def value(self, ranks: Ranks) -> torch.Tensor:
        """Compute the metric from a ranking."""
        value, self.threshold = f1_max(ranks)
        return value


class AveragePrecision(RankingMetric):
    r"""Average precision, :math:`\sum_n (R_n - R_{n-1}) P_n`, as scikit-learn's ``average_precision_score``.

    anomalib's ``AUPR`` is the trapezoid under the same curve, which is not what papers report.

    Example:
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

    def value(self, ranks: Ranks) -> torch.Tensor:
        """Compute the metric from a ranking."""
        return average_precision(ranks)


class AUPRO(RankingMetric):
    """Area under the mean overlap of regions against the false positive rate; by default exact, as anomalib's.

    Args:
        fields: Names of a batch's anomaly maps and masks.
        prefix: Of the metric's name.
        strict: Whether a batch without these fields is an error; it is passed over otherwise.
        fpr_limit: False positive rate at which the area ends.
        method: "exact", the area itself; or "official", as MuSc's official release computed what it published, see
            :func:`~anomalib_musc.metrics.ranking.official_aupro`. The metric is then called ``AUPRO_official``.
        **kwargs: Those of the other metrics.

    Raises:
        ValueError: If there is no such method.

    Example:
        >>> from anomalib.data import ImageBatch
        >>> maps, masks = torch.tensor([[[0.1, 0.4], [0.35, 0.8]]]), torch.tensor([[[0, 0], [1, 1]]]).bool()
        >>> batch = ImageBatch(image=torch.rand(1, 3, 2, 2), anomaly_map=maps, gt_mask=masks)
        >>> AUPRO(fields=["anomaly_map", "gt_mask"], fpr_limit=0.75)(batch)
        tensor(0.6667)
    """

    needs_regions = True

    def __init__(
        self,
        fields: Sequence[str] | None = None,
        prefix: str = "",
        strict: bool = True,
        fpr_limit: float = 0.3,
        method: Literal["exact", "official"] = "exact",
        **kwargs: Any,
    ) -> None:
        if method not in ("exact", "official"):
            msg = f"method must be 'exact' or 'official', got {method!r}."
            raise ValueError(msg)
        super().__init__(fields=fields, prefix=prefix, strict=strict, **kwargs)
        self.fpr_limit = fpr_limit  # no buffer as anomalib's, with which a checkpoint loads with no other evaluator
        self.method = method
        if method == "official":
            self.name += "_official"

    def value(self, ranks: Ranks) -> torch.Tensor:
        """Compute the metric from a ranking."""
        area = aupro if self.method == "exact" else official_aupro
        return area(ranks, self.fpr_limit)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Pass over the limit that older versions wrote into checkpoints."""
        state_dict.pop(f"{prefix}fpr_limit", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
