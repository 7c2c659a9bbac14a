# SPDX-License-Identifier: Apache-2.0
"""Print the scores of WinCLIP with seeded weights, the same with every open_clip: ``winclip_scores.py [--correct]``."""

import json
import sys
from zlib import crc32

import open_clip
import torch
from anomalib.models.image.winclip.lightning_model import WinClip


def seeded_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fill weights with numbers that depend on their names alone: versions have other names beside them."""

    def fill(name: str, shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(crc32(name.encode()))) * 0.05

    return {key: fill(key, value.shape) if value.ndim >= 2 else value for key, value in state.items()}


create = open_clip.create_model_and_transforms
open_clip.create_model_and_transforms = lambda name, pretrained: create(name)  # noqa: ARG005  # no download
model = WinClip(class_name="bolt", scales=(2, 3))
model.model.clip.load_state_dict(seeded_state(model.model.clip.state_dict()))
if "--correct" in sys.argv:
    from anomalib_musc.benchmark.winclip import correct_winclip

    correct_winclip(model)
images, references = torch.rand(2, 3, 240, 240, generator=torch.Generator().manual_seed(1)).split(1)
model.model.setup("bolt", references)
found = {}
for shots in (1, 0):
    model.model.k_shot = shots
    output = model.model(images)
    probes = output.anomaly_map[0, ::80, 20::80].flatten()
    found[shots] = [*output.pred_score.tolist(), *probes.tolist()]
sys.stdout.write(json.dumps(found))
