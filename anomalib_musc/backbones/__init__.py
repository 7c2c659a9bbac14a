# SPDX-License-Identifier: Apache-2.0
"""Frozen networks that turn images into patch features and one image feature."""

from anomalib_musc.backbones.base import Backbone
from anomalib_musc.backbones.factory import ALIASES, create_backbone
from anomalib_musc.backbones.weights import WeightsMismatchError, WeightsUnavailableError

__all__ = ["ALIASES", "Backbone", "WeightsMismatchError", "WeightsUnavailableError", "create_backbone"]
