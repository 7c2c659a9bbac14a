# SPDX-License-Identifier: Apache-2.0
"""anomalib's exports to torch, ONNX and OpenVINO.

anomalib 2.7.0: its default operator set of ONNX, 14, is one to which not all of what torch's exporter writes can be
converted back; its command line lets the exporter log thousands of lines; and a compression that needs NNCF fails for
want of it after all the work.
"""

import logging
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from anomalib.deploy.export import CompressionType
from anomalib.models.components.base.export_mixin import ExportMixin

from anomalib_musc.compat.workspace import export_folder

# torch's exporter writes operator set 18. Its optimizer takes half of the time for what onnxruntime and OpenVINO do
# themselves when they load a graph.
_ONNX = {"opset_version": 18, "optimize": False}
_CHATTERING = ("onnxscript", "onnx_ir")  # loggers that tell of every node


class ExportableModule(ExportMixin):
    """anomalib's exports, but for the faults above."""

    @abstractmethod
    def make_exportable(self) -> None:
        """Raise a ValueError where the model cannot be exported, and finish what an export needs."""

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export with torch; see anomalib's method."""
        self.make_exportable()
        folder = export_folder(export_root, type(self).__name__, f"weights/torch/{model_file_name}.pt")
        return super().to_torch(folder, model_file_name)

    def to_onnx(self, export_root: Path | str, model_file_name: str = "model", *args: Any, **kwargs: Any) -> Path:
        """Export to ONNX, which to_openvino does first; see anomalib's method."""
        self.make_exportable()
        folder = export_folder(export_root, type(self).__name__, f"weights/onnx/{model_file_name}.onnx")
        with _quiet(*_CHATTERING):
            path: Path = super().to_onnx(folder, model_file_name, *args, **{**_ONNX, **kwargs})
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
        self.make_exportable()
        folder = export_folder(export_root, type(self).__name__, f"weights/openvino/{model_file_name}.xml")
        return super().to_openvino(folder, model_file_name, input_size, compression_type, **kwargs)


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Let loggers give warnings only."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
