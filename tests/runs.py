# SPDX-License-Identifier: Apache-2.0
"""Runs through anomalib's Engine: data, what to record, what to compare."""

from pathlib import Path

import cv2
import pytest
import torch
from anomalib.data import ImageBatch, ImageItem, MVTecAD, PredictDataset
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, Dataset

from anomalib_musc import MuScModel
from anomalib_musc.pool.pool import Pool

Predictions = dict[str, tuple[float, torch.Tensor]]


class Recorder(Callback):
    """Keep every batch that leaves a step, as it is when all callbacks have seen it."""

    def __init__(self) -> None:
        self.batches = []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):  # noqa: ARG002
        self.batches.append(outputs)


class AnomalyMaps(torch.nn.Module):
    """A model's maps alone, for ``torch.export``."""

    def __init__(self, model: MuScModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images).anomaly_map


def datamodule(root: Path, **kwargs) -> MVTecAD:
    return MVTecAD(root=root, category="widget", **{"num_workers": 0, **kwargs})


def by_path(batches: list[ImageBatch]) -> Predictions:
    """Image score and anomaly map of every image."""
    return {
        path: (score.item(), anomaly_map.cpu())
        for batch in batches
        for path, score, anomaly_map in zip(batch.image_path, batch.pred_score, batch.anomaly_map, strict=True)
    }


def assert_same(ours: Predictions, theirs: Predictions, tolerance: float = 5e-5) -> None:
    assert ours.keys() == theirs.keys()
    for path, (score, anomaly_map) in ours.items():
        assert score == pytest.approx(theirs[path][0], abs=tolerance), path
        torch.testing.assert_close(anomaly_map, theirs[path][1], atol=tolerance, rtol=0)


def predict_loader(folder: Path, **kwargs) -> DataLoader:
    dataset = PredictDataset(folder)
    return DataLoader(dataset, collate_fn=dataset.collate_fn, **kwargs)


class PathlessDataset(Dataset):
    """A user's own dataset, whose items have no path."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> ImageItem:
        image = cv2.imread(str(self.paths[index]))[..., ::-1].copy()
        return ImageItem(image=torch.from_numpy(image).permute(2, 0, 1) / 255)


def relative_scores(pool: Pool) -> list[float]:
    """Return a pool's re-scored image scores as RsCIN has them, between the extremes of the raw ones."""
    lowest, highest = pool.raw_scores.aminmax()
    return ((pool.scores - lowest) / (highest - lowest)).tolist()
