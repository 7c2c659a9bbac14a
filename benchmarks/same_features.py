# SPDX-License-Identifier: Apache-2.0
"""A small ImageNet network for MuSc and for PatchCore, so that both see the same features.

``PYTHONPATH=benchmarks anomalib-musc benchmark --config benchmarks/same_features.yaml``
"""

import importlib
from pathlib import Path

import timm
import torch
from anomalib.models import Patchcore
from anomalib.pre_processing import PreProcessor
from safetensors.torch import load_file
from torch import nn

from anomalib_musc import MuSc


class MobileNet(nn.Module):
    """MobileNetV2 at 224, stages 2 and 3.

    Args:
        weights: A safetensors file in timm's names.
    """

    image_size, mean, std, interpolation = 224, (0.5,) * 3, (0.5,) * 3, "bicubic"

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        self.network = timm.create_model("mobilenetv2_100", pretrained=False, num_classes=0, pad_type="same")
        state = {name: values.float() for name, values in load_file(weights).items()}
        self.network.load_state_dict(state, strict=False)  # the counts of batches are missing

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return two maps ``(B, C, h, w)`` and image features ``(B, 1280)`` of unit length."""
        final, stages = self.network.forward_intermediates(images)
        pooled = self.network.forward_head(final, pre_logits=True)
        return stages[2:4], nn.functional.normalize(pooled, dim=-1)


def choose_backbone(name: str, weights: str | None) -> str | nn.Module:
    """Return a backbone's name, or a network of ``module:class``, which takes a file of weights if one is given."""
    module, _, class_name = name.partition(":")
    if not class_name:
        return name
    network: nn.Module = getattr(importlib.import_module(module), class_name)(*filter(None, [weights]))
    return network


class _Extractor(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone.eval()

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        feature_maps, _ = self.backbone(images)
        return {f"map{index}": feature_map for index, feature_map in enumerate(feature_maps)}


class PatchcoreOn(Patchcore):
    """anomalib's PatchCore on a backbone of two maps, with its images prepared as MuSc prepares them.

    Args:
        network: A backbone, as MuSc takes it.
        evaluator: As PatchCore's.
        visualizer: As PatchCore's.
    """

    def __init__(self, network: nn.Module, evaluator: bool = True, visualizer: bool = True) -> None:
        super().__init__(
            backbone="resnet18",
            layers=["layer2", "layer3"],
            pre_trained=False,
            pre_processor=self.pre_processor_of(network),
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.model.feature_extractor = _Extractor(network)
        self.model.layers = ["map0", "map1"]

    @staticmethod
    def pre_processor_of(network: nn.Module) -> PreProcessor:
        """Return MuSc's pre-processor for a backbone."""
        return MuSc(network).pre_processor
