# SPDX-License-Identifier: Apache-2.0
"""MuSc, zero-shot anomaly detection by mutual scoring of unlabelled images, for anomalib.

The names are imported on first use, so that ``anomalib_musc.functional`` needs nothing but torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from anomalib_musc.compat import old_names

if TYPE_CHECKING:
    from anomalib_musc.inference.detector import Detector
    from anomalib_musc.inference.predictions import Predictions
    from anomalib_musc.inference.run import predict
    from anomalib_musc.lightning_model import MuSc
    from anomalib_musc.output.prediction_writer import PredictionWriter
    from anomalib_musc.pool.rescoring import rescore
    from anomalib_musc.post_processor import RsCINPostProcessor
    from anomalib_musc.torch_model import MuScModel

__all__ = [
    "Detector",
    "MuSc",
    "MuScModel",
    "PredictionWriter",
    "Predictions",
    "RsCINPostProcessor",
    "predict",
    "rescore",
]

_HOMES = {
    "Detector": "inference.detector",
    "MuSc": "lightning_model",
    "MuScModel": "torch_model",
    "PredictionWriter": "output.prediction_writer",
    "Predictions": "inference.predictions",
    "predict": "inference.run",
    "RsCINPostProcessor": "post_processor",
    "rescore": "pool.rescoring",
}

old_names.install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
