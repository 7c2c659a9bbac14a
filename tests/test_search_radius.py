# SPDX-License-Identifier: Apache-2.0
"""Same-place search in models: pools, banks, checkpoints, exports."""

import pytest
import torch
from anomalib.data.utils import read_image
from conftest import OwnBackbone
from runs import AnomalyMaps, datamodule
from seeded import randn

from anomalib_musc import MuSc, MuScModel
from anomalib_musc.functional import layer_scores, lnamd, reference_scores


@pytest.mark.parametrize("radius", [0, 1, 3])
@pytest.mark.parametrize("interval", [(0.0, 0.3), (0.2, 0.7)])
def test_a_pool_as_its_own_bank_is_mutual_scoring(radius, interval):
    maps = randn(1, 16, 4, 5) + 0.3 * randn(8, 16, 4, 5, seed=1)
    pool, own = lnamd(maps, 3), torch.arange(8)
    by_bank = reference_scores(pool, pool, interval, own_copies=own, grid=(4, 5), search_radius=radius)
    expected = layer_scores(maps, (3,), interval, search_radius=radius)
    torch.testing.assert_close(by_bank, expected, atol=1e-4, rtol=0)


def test_a_radius_needs_a_grid():
    pool = lnamd(randn(3, 16, 4, 5), 3)
    with pytest.raises(ValueError, match="search_radius=1 needs grid"):
        reference_scores(pool, pool, search_radius=1)


def test_a_defect_that_is_normal_elsewhere_is_found():
    """Two kinds of places, as left and right halves; in one image, a patch of the left half lies on the right."""
    kinds = randn(1, 16, 1, 2).repeat_interleave(3, dim=3)
    maps = kinds + 0.1 * randn(10, 16, 6, 6, seed=1)
    maps[4, :, 2, 4] = kinds[0, :, 0, 0]
    whole, near = (layer_scores(maps, (1,), search_radius=radius)[4].view(6, 6) for radius in (None, 1))
    assert near.argmax() == 2 * 6 + 4
    assert near[2, 4] > 3 * near.median()
    assert whole[2, 4] < 1.5 * whole.median()


def test_through_engine_and_checkpoint(mvtec_root, folder, make_engine):
    arguments = {"backbone": "test_vit", "pretrained": False, "image_size": 64, "search_radius": 1}
    engine = make_engine()
    engine.fit(MuSc(**arguments, mode="reference", k_shot=3), datamodule=datamodule(mvtec_root))
    loaded = MuSc.load_from_checkpoint(engine.best_model_path)
    assert loaded.model.search_radius == loaded.model.bank.search_radius == 1
    predictions = {batch.image_path[0]: batch for batch in engine.predict(loaded, data_path=folder)}
    whole = MuScModel("test_vit", pretrained=False, image_size=64).eval()
    whole.backbone.load_state_dict(loaded.model.backbone.state_dict())
    whole.bank.fill(loaded.model.bank.feature_maps, loaded.model.bank.class_tokens, loaded.model.bank.raw_scores)
    images = torch.cat([loaded.pre_processor.transform(read_image(path, as_tensor=True)[None]) for path in predictions])
    near_map, whole_map = (model(images).anomaly_map for model in (loaded.model.eval(), whole))
    assert (near_map >= whole_map - 1e-6).all()  # fewer places to find a like
    assert (near_map - whole_map).max() > 1e-3

    exported = torch.export.export(AnomalyMaps(loaded.model), (images[:1],)).module()
    for image, expected in zip(images, near_map, strict=True):
        torch.testing.assert_close(exported(image[None])[0], expected, atol=1e-5, rtol=0)


def test_a_pool_of_images(folder, make_engine):
    near, whole = MuSc(OwnBackbone(), search_radius=1, visualizer=False), MuSc(OwnBackbone(), visualizer=False)
    for model in (near, whole):
        make_engine().predict(model, data_path=folder)
    assert (near.pools[0].patch_scores >= whole.pools[0].patch_scores - 1e-6).all()
    assert (near.pools[0].patch_scores - whole.pools[0].patch_scores).max() > 1e-4


def test_a_wrong_radius_is_named():
    with pytest.raises(ValueError, match=r"search_radius must be a whole number of at least 0, .* got -1"):
        MuSc("musc-tiny", search_radius=-1)
