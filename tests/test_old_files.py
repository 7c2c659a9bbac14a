# SPDX-License-Identifier: Apache-2.0
"""A checkpoint and a torch export that version 0.1 wrote still load, and give the same scores.

Both are of conftest's OwnBackbone with mode="reference", two references of ``product(100)`` to ``product(102)``.
"""

from pathlib import Path

import cv2
import pytest
import torch
from anomalib.data.utils import read_image
from anomalib.deploy import TorchInferencer
from conftest import OwnBackbone, product, write_products
from runs import by_path

from anomalib_musc import MuSc

DATA = Path(__file__).parent / "data"
SCORES = {  # image score and maximum of the anomaly map that 0.1 gave
    "000.png": (0.284683, 0.193120),
    "001.png": (0.182253, 0.093691),
    "002.png": (0.234519, 0.179217),
    "defect.png": (1.0, 1.0),
}


@pytest.fixture
def pile(tmp_path) -> Path:
    write_products(tmp_path / "pile", range(3))
    cv2.imwrite(str(tmp_path / "pile/defect.png"), product(31, defect=True)[0])
    return tmp_path / "pile"


def test_a_checkpoint_of_0_1(pile, make_engine):
    model = MuSc.load_from_checkpoint(DATA / "musc_0_1.ckpt", backbone=OwnBackbone(), weights_only=False)
    assert len(model.model.bank) == 2
    for path, (score, anomaly_map) in by_path(make_engine().predict(model, data_path=pile)).items():
        assert (score, anomaly_map.max().item()) == pytest.approx(SCORES[Path(path).name], abs=1e-4)


def test_a_torch_export_of_0_1(pile, monkeypatch):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")  # anomalib's word for a pickle
    inferencer = TorchInferencer(DATA / "musc_0_1.pt", device="cpu")
    for name, expected in SCORES.items():
        found = inferencer.predict(read_image(pile / name, as_tensor=True).as_subclass(torch.Tensor))
        assert (found.pred_score.item(), found.anomaly_map.max().item()) == pytest.approx(expected, abs=1e-4)
