# SPDX-License-Identifier: Apache-2.0
"""anomalib's exports to torch, ONNX and OpenVINO.

anomalib 2.7.0: its default operator set of ONNX, 14, is one to which not all of what torch's exporter writes can be
converted back; and a compression that needs NNCF fails for want of it after all the work.
"""

from abc import abstractmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from anomalib.deploy.export import CompressionType
from anomalib.models.components.base.export_mixin import ExportMixin

_OPSET = 18  # of torch's exporter


class ExportableModule(ExportMixin):
    """anomalib's exports, but for the faults above."""

    @abstractmethod
    def make_exportable(self) -> None:
        """Raise a ValueError where the model cannot be exported, and finish what an export needs."""

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export with torch; see anomalib's method."""
        self.make_exportable()
        return super().to_torch(export_root, model_file_name)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:
        """Export to ONNX, which to_openvino does first; see anomalib's method."""
        self.make_exportable()
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
        if needs_nncf and find_spec("nncf") is None:
            msg = f"Compression to {compression_type} needs NNCF: pip install nncf."
            raise ImportError(msg)
        return super().to_openvino(export_root, model_file_name, input_size, compression_type, **kwargs)
