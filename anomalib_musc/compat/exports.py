# SPDX-License-Identifier: Apache-2.0
"""Exports of a model with a bank: torch, ONNX, OpenVINO."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from anomalib.data import InferenceBatch
from anomalib.deploy.export import CompressionType
from anomalib.models.components.base.export_mixin import ExportMixin
from lightning.pytorch import LightningModule

from anomalib_musc.torch_model import MuScModel, PoolPrediction, ReferencePrediction

_OPSET = 18  # of torch's exporter; anomalib 2.7.0 asks for 14, to which not all of it can be converted back


class BankExport(ExportMixin, LightningModule):
    """What an export needs: a bank that judges alone, thresholds of its scale, and float32."""

    model: MuScModel
    mode: str

    def forward(self, batch: torch.Tensor, *args: Any, **kwargs: Any) -> InferenceBatch:
        """Judge images ``(B, 3, H, W)`` in [0, 1]; see anomalib's method."""
        found: InferenceBatch | PoolPrediction | ReferencePrediction = super().forward(batch, *args, **kwargs)
        if isinstance(found, (PoolPrediction, ReferencePrediction)):  # there is no post-processor
            return InferenceBatch(pred_score=found.pred_score, anomaly_map=found.anomaly_map)
        return found

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export with torch; see anomalib's method."""
        self._make_exportable()
        return super().to_torch(export_root, model_file_name)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:  # type: ignore[override]
        """Export to ONNX, which to_openvino does first; see anomalib's method."""
        self._make_exportable()
        path: Path = super().to_onnx(*args, **{"opset_version": _OPSET, **kwargs})
        return path

    def to_openvino(  # type: ignore[override]
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to OpenVINO; see anomalib's method."""
        needs_nncf = compression_type is not None and compression_type != CompressionType.FP16
        if needs_nncf and find_spec("nncf") is None:  # anomalib 2.7.0 fails after all the work
            msg = f"Compression to {compression_type} needs NNCF: pip install nncf."
            raise ImportError(msg)
        return super().to_openvino(export_root, model_file_name, input_size, compression_type, **kwargs)

    def calibrate(self) -> None:
        """Find the thresholds that are not known yet."""
        raise NotImplementedError

    def _make_exportable(self) -> None:
        if not len(self.model.bank):
            msg = (
                "An exported MuSc judges one image at a time, by a bank of reference images, and there is none. Make "
                "one with mode='reference' and Engine.fit, from training images or references=FOLDER; or call "
                "keep_bank() after a pool was scored; or load a checkpoint with a bank."
            )
            raise ValueError(msg)
        if self.mode != "reference":
            msg = (
                f"mode={self.mode!r} judges by a pool, and so its thresholds are of another scale than the scores of "
                "an export, which judges by the bank alone. Fit and export with mode='reference'."
            )
            raise ValueError(msg)
        self.float()  # Engine(precision="bf16-true") has cast it; images for an export are float32
        self.calibrate()
