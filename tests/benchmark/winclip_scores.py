# SPDX-License-Identifier: Apache-2.0
"""Print the scores of WinCLIP with seeded weights, the same with every open_clip: ``winclip_scores.py [--correct]``."""

import json
import sys

import open_clip
import torch
from anomalib.models.image.winclip.lightning_model import WinClip


def seeded_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(state[key].shape, generator=generator) * 0.05 if state[key].ndim >= 2 else state[key]
        for key in sorted(state)
    }


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
