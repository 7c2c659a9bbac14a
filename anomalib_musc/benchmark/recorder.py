# SPDX-License-Identifier: Apache-2.0
"""Measures a model's test by itself, in the same way for all models."""

from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn import functional as F  # noqa: N812

from anomalib_musc.benchmark.records import Predictions
from anomalib_musc.metrics.curves import Ranking
from anomalib_musc.metrics.ranking import aupro, auroc, average_precision, f1_max, official_aupro, pro_curve

_SIDE = 160  # of the small maps


class Recorder(Callback):
    """Collect raw scores and maps of a test: given to a Trainer, it sees a batch before the model's post-processor.

    Maps are measured at the size of the model's input, as its true masks have it; without an image score, the
    largest value of the map is one.
    """

    def __init__(self) -> None:
        self._paths: list[str] = []
        self._labels: list[torch.Tensor] = []
        self._scores: list[torch.Tensor] = []
        self._maps: list[torch.Tensor] = []
        self._masks: list[torch.Tensor] = []
        self._pixels = Ranking(regions=True)
        self.map_size: list[int] | None = None

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take over a batch."""
        del trainer, pl_module, batch, batch_idx, dataloader_idx
        self._paths += outputs.image_path
        self._labels.append(outputs.gt_label.reshape(-1).cpu().int())
        maps = None if outputs.anomaly_map is None else outputs.anomaly_map.detach().float()
        scores = outputs.pred_score
        if scores is None and maps is not None:
            scores = maps.flatten(1).amax(dim=1)
        self._scores.append(scores.detach().reshape(-1).cpu().float())
        if maps is None:
            return
        maps = maps.reshape(len(maps), 1, *maps.shape[-2:])
        self._maps.append(F.interpolate(maps, (_SIDE, _SIDE), mode="area").squeeze(1).cpu())
        if outputs.gt_mask is not None:
            masks = outputs.gt_mask.reshape(len(maps), 1, *outputs.gt_mask.shape[-2:]).to(maps.device)
            if maps.shape[-2:] != masks.shape[-2:]:
                maps = F.interpolate(maps, masks.shape[-2:], mode="bilinear", align_corners=True)
            self.map_size = list(maps.shape[-2:])
            self._pixels.update(maps, masks)
            self._masks.append(F.adaptive_max_pool2d(masks.float(), (_SIDE, _SIDE)).squeeze(1).cpu())

    def predictions(self) -> Predictions:
        """Return what was seen.

        Raises:
            ValueError: If a score is not finite, or nothing was tested.
        """
        if not self._paths:
            msg = "The test set is empty."
            raise ValueError(msg)
        scores = torch.cat(self._scores)
        if not bool(scores.isfinite().all()):
            msg = f"{int((~scores.isfinite()).sum())} of {len(scores)} image scores are NaN or infinite."
            raise ValueError(msg)
        has_curve = self._masks and bool(torch.cat(self._masks).any())
        return Predictions(
            paths=self._paths,
            labels=torch.cat(self._labels).numpy().astype("int8"),
            scores=scores.numpy(),
            maps=_to_bytes(torch.cat(self._maps)).numpy() if self._maps else None,
            masks=torch.cat(self._masks).bool().numpy() if self._masks else None,
            pro_curve=pro_curve(self._pixels.compute()).cpu().numpy() if has_curve else None,
        )

    def metrics(self) -> dict[str, float]:
        """Return the metrics of images and pixels, fractions; none that lacks anomalous or normal ones."""
        measured = image_metrics(torch.cat(self._scores), torch.cat(self._labels))
        if self._masks and bool(torch.cat(self._masks).any()):
            ranks = self._pixels.compute()
            measured |= {
                "pixel_auroc": float(auroc(ranks)),
                "pixel_f1max": float(f1_max(ranks)[0]),
                "pixel_ap": float(average_precision(ranks)),
                "aupro": float(aupro(ranks)),
                "aupro_official": float(official_aupro(ranks)),
            }
        return measured


def image_metrics(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return the image metrics of scores ``(N,)`` and labels ``(N,)``; none if there is one class only."""
    if len(labels.unique()) < 2:
        return {}
    images = Ranking()
    images.update(scores, labels)
    ranks = images.compute()
    return {
        "image_auroc": float(auroc(ranks)),
        "image_f1max": float(f1_max(ranks)[0]),
        "image_ap": float(average_precision(ranks)),
    }


def _to_bytes(maps: torch.Tensor) -> torch.Tensor:
    low, high = np.percentile(maps.numpy(), (0.5, 99.5))
    return ((maps - low) / max(high - low, 1e-12) * 255).round().clamp(0, 255).to(torch.uint8)
