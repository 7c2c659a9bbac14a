# SPDX-License-Identifier: Apache-2.0
"""WinCLIP in the benchmark: the scores and maps of before open_clip changed, whatever version is installed."""

import json

import open_clip
import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.models import WinClip
from anomalib.models.image.winclip import torch_model

from anomalib_musc.benchmark.config import instantiate, read_config
from anomalib_musc.benchmark.winclip import correct_windows

SMALL = {
    "embed_dim": 4,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}

# Of anomalib 2.7.0's own model with open_clip 2.24.0, the newest before 2.26.1 that PyPI has: seed 7, class "cable".
# Scores (N,), and maps (N, 4, 4) at the patches' centres; then with two reference images.
ZERO_SHOT = (
    [0.587628, 0.634049],
    [
        [
            [0.575786, 0.570416, 0.570872, 0.579060],
            [0.577537, 0.562782, 0.562002, 0.558612],
            [0.579268, 0.565484, 0.555841, 0.542574],
            [0.567815, 0.545928, 0.529420, 0.502038],
        ],
        [
            [0.593080, 0.542558, 0.522716, 0.512634],
            [0.603494, 0.547171, 0.519622, 0.498516],
            [0.611057, 0.552423, 0.515918, 0.488082],
            [0.608181, 0.544033, 0.507045, 0.476330],
        ],
    ],
)
FEW_SHOT = (
    [0.311333, 0.335909],
    [
        [
            [0.304981, 0.292247, 0.292052, 0.295831],
            [0.302593, 0.288977, 0.286804, 0.285130],
            [0.301310, 0.289890, 0.284170, 0.276005],
            [0.293955, 0.277834, 0.269121, 0.255498],
        ],
        [
            [0.312181, 0.276976, 0.267148, 0.260597],
            [0.318394, 0.277931, 0.263776, 0.253410],
            [0.323949, 0.281020, 0.261604, 0.247164],
            [0.321709, 0.276271, 0.257254, 0.240185],
        ],
    ],
)


@pytest.fixture
def small_clip(tmp_path, monkeypatch):
    """Let WinCLIP build a small CLIP without weights in place of the one that it would download."""
    path = tmp_path / "small-winclip.json"
    path.write_text(json.dumps(SMALL))
    open_clip.add_model_config(path)
    monkeypatch.setattr(torch_model, "BACKBONE", "small-winclip")
    monkeypatch.setattr(torch_model, "PRETRAINED", None)


def draw(model: WinClip) -> torch.Tensor:
    """Draw a model's weights, the same in each version of open_clip, and return four images (4, 3, 64, 64)."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, weight in sorted(model.model.clip.named_parameters()):
            if weight.dim():  # not the temperature
                weight.copy_(2 * torch.rand(weight.shape, generator=generator) - 1)
    return torch.rand(4, 3, 64, 64, generator=generator) * 4 - 2


def row_of(tmp_path) -> WinClip:
    """Return the model of a benchmark's row ``WinClip``, with random weights."""
    config = tmp_path / "w.yaml"
    data = {"class_path": "MVTecAD", "init_args": {"root": str(tmp_path / "none"), "category": "cable"}}
    config.write_text(json.dumps({"benchmark": {"model": {"class_path": "WinClip"}, "data": data}}))
    (cell,) = read_config(config).cells
    model, _ = instantiate(cell)
    return model


def assert_equal(predictions: InferenceBatch, expected: tuple[list, list]) -> None:
    scores, maps = map(torch.tensor, expected)
    torch.testing.assert_close(predictions.pred_score, scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(predictions.anomaly_map[:, 8::16, 8::16], maps, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("small_clip")
def test_row_gives_what_open_clip_gave_before_it_changed(tmp_path):
    row = row_of(tmp_path)
    images = draw(row)
    row.model.setup("cable")
    assert_equal(row.model(images[:2]), ZERO_SHOT)
    row.model.setup(reference_images=images[2:])
    assert_equal(row.model(images[:2]), FEW_SHOT)


@pytest.mark.usefixtures("small_clip")
def test_images_do_not_change_each_others_maps(tmp_path):
    row = row_of(tmp_path)
    images = draw(row)
    row.model.setup("cable", images[3:])
    together = row.model(images[:3])
    for index in range(3):
        alone = row.model(images[index : index + 1])
        torch.testing.assert_close(alone.anomaly_map[0], together.anomaly_map[index], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("small_clip")
@pytest.mark.parametrize("scales", [(2,), (2, 3, 4)])
def test_a_window_is_seen_as_if_it_were_alone(scales):
    model = WinClip(scales=scales)
    images = draw(model)[:2]
    correct_windows(model)
    visual, masks = model.model.clip.visual, list(model.model.masks)
    with torch.no_grad():
        _, embeddings, _ = model.model.encode_image(images)
        tokens = visual.conv1(images).flatten(2).mT + visual.positional_embedding[1:]
        first = visual.class_embedding + visual.positional_embedding[0]
        for scale, mask, embedding in zip(scales, masks, embeddings, strict=True):
            side = 4 - scale + 1  # windows a row, of four patches
            corners = [4 * row + column for row in range(side) for column in range(side)]
            assert embedding.shape == (2, side**2, 4)
            for place, corner in enumerate(corners):
                patches = [corner + 4 * row + column for row in range(scale) for column in range(scale)]
                assert sorted(mask[:, place].tolist()) == patches
                for image in range(2):
                    window = torch.cat([first[None], tokens[image, patches]])
                    expected = embed(visual, window)
                    torch.testing.assert_close(embedding[image, place], expected, rtol=0, atol=1e-5)


def embed(visual: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the embedding of one window (L, C) by the transformer's weights, written out."""
    width, heads = tokens.shape[1], SMALL["vision_cfg"]["width"] // SMALL["vision_cfg"]["head_width"]
    x = visual.ln_pre(tokens)
    for block in visual.transformer.resblocks:
        query, key, value = (
            part.view(len(x), heads, -1).transpose(0, 1)
            for part in (block.ln_1(x) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).split(width, dim=1)
        )
        weights = (query @ key.mT / (width / heads) ** 0.5).softmax(dim=-1)
        x = x + block.attn.out_proj((weights @ value).transpose(0, 1).flatten(1))
        x = x + block.mlp(block.ln_2(x))
    return visual.ln_post(x)[0] @ visual.proj


@pytest.mark.usefixtures("small_clip")
def test_weights_are_loaded_once_and_anomalibs_class_is_left_alone():
    before = vars(torch_model.WinClipModel).copy()
    model = WinClip()
    theirs = model.model
    correct_windows(model)
    assert vars(torch_model.WinClipModel) == before
    assert model.model.clip is theirs.clip
    assert [name for name, _ in model.named_parameters()] == [f"model.{name}" for name, _ in theirs.named_parameters()]
