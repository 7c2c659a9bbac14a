# SPDX-License-Identifier: Apache-2.0
"""Groups of images: found where there are some, silent where there are none, shown to the person who judges."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import SHARED, OwnBackbone, write_products
from seeded import randn, unit
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_samples
from together import results
from torch import distributed

from anomalib_musc import MuSc
from anomalib_musc.distances import Processes
from anomalib_musc.functional import layer_scores, lnamd
from anomalib_musc.functional.peaks import find_peaks
from anomalib_musc.pool.groups import (
    find_groups,
    find_likes,
    groups_alike,
    groups_all_over,
    silhouettes_of,
    split_rows,
)
from anomalib_musc.pool.warnings import median_features, warn_of_references

SECOND = (0.4, 0.7)


# --- the equations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_values", [3, 4, 9, 40])
def test_splits_and_their_silhouettes_are_those_of_scikit_learn(num_values):
    rows = torch.cat([randn(3, num_values), randn(3, num_values, seed=1).exp()])
    rows[1, : num_values // 3] += 9
    is_high, silhouettes = split_rows(rows)
    for row, ours, found in zip(rows.double(), is_high, silhouettes, strict=True):
        fitted = KMeans(2, n_init=50, random_state=0).fit(row[:, None].numpy())
        parts = [row[ours], row[~ours]]
        inertia = sum(((part - part.mean()) ** 2).sum().item() for part in parts)
        assert inertia <= fitted.inertia_ + 1e-9
        expected = silhouette_samples(row[:, None].numpy(), ours.numpy())
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_silhouettes_are_those_of_scikit_learn():
    features = randn(30, 8)
    is_second = torch.arange(30) > 17
    expected = silhouette_samples(torch.nn.functional.normalize(features.double(), dim=-1).numpy(), is_second.numpy())
    torch.testing.assert_close(silhouettes_of(features, is_second), torch.from_numpy(expected))


@pytest.mark.parametrize("num_layers", [1, 2])
def test_peaks_are_those_of_the_distances(num_layers):
    layers, scores = [randn(5, 6, 4, 3, seed=seed) for seed in range(num_layers)], randn(5, 4, 3, seed=9)
    peaks = find_peaks(layers, scores)
    vectors = [lnamd(maps, 3).double() for maps in layers]
    for image in range(5):
        place = int(scores[image].argmax())
        assert peaks.places[image].tolist() == [place // 3, place % 3]
        for other in range(5):
            squares = torch.stack([(maps[other] - maps[image, place]).square().sum(dim=1) for maps in vectors])
            distances = squares.mean(dim=0).sqrt()
            assert peaks.distances[image, other].item() == pytest.approx(distances.min().item(), abs=1e-5)
            there = int(distances.argmin())
            step = max(abs(there // 3 - place // 3), abs(there % 3 - place % 3))
            assert peaks.steps[image, other] == step


def three_images() -> tuple[list[torch.Tensor], torch.Tensor]:
    return [randn(3, 6, 4, 3)], randn(3, 4, 3, seed=9)


def peaks_of_a_share():
    distributed.init_process_group("gloo")
    processes = Processes()
    layers, scores = three_images()  # made here: tensors that are handed to a process travel as open files
    share = slice(processes.rank, None, processes.size)
    return find_peaks([maps[share] for maps in layers], scores[share], processes=processes)


@pytest.mark.parametrize("number", [2, 4])
def test_peaks_in_several_processes(number, tmp_path):
    layers, scores = three_images()  # the last of four has no image
    expected = find_peaks(layers, scores)
    by_rank = [image for rank in range(number) for image in range(rank, 3, number)]
    for found in results(peaks_of_a_share, number=number, cwd=tmp_path):
        for ours, theirs in zip(found.ordered([by_rank.index(image) for image in range(3)]), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


# --- what is found -------------------------------------------------------------------------------------------------


def with_defect(number: int, *, is_moved: bool) -> torch.Tensor:
    """Maps of 24 images of one pattern, the first of which have the same defect."""
    maps = randn(1, 32, 8, 8) + 0.5 * randn(24, 32, 8, 8, seed=1)
    for image in range(number):
        row = (0, 5, 2)[image % 3] if is_moved else 3
        maps[image, :, row : row + 3, 2:5] = 3 * randn(32, 3, 3, seed=2) + 0.3 * randn(32, 3, 3, seed=3 + image)
    return maps


def groups_of(maps: torch.Tensor):
    scores = layer_scores(maps, (3,), second_interval=SECOND).view(len(maps), *maps.shape[2:])
    names = [f"{index:02d}.png" for index in range(len(maps))]
    return groups_alike(names, find_peaks([maps], scores), reach=1)


@pytest.mark.parametrize("is_moved", [False, True])
@pytest.mark.parametrize("number", [3, 5, 8, 11])
def test_images_that_share_a_defect_are_named(number, is_moved):
    (group,) = groups_of(with_defect(number, is_moved=is_moved))
    assert group.names == tuple(f"{index:02d}.png" for index in range(number))
    place = "at various places" if is_moved else "at the same place"
    assert group.text.startswith(f"{number} images share {place} what most others lack: 00.png, 01.png, 02.png")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_fewer_than_three_are_no_group(number):
    assert groups_of(with_defect(number, is_moved=False)) == []


def test_of_what_most_have_those_without_are_the_group():
    (group,) = groups_of(with_defect(16, is_moved=False))
    assert group.names == tuple(f"{index:02d}.png" for index in range(16, 24))


@pytest.mark.parametrize("num_images", [1, 2, 3, 6, 9, 16, 40])
def test_images_without_structure_have_no_groups(num_images):
    names = [str(index) for index in range(num_images)]
    for seed in range(5):
        maps = randn(num_images, 16, 5, 5, seed=seed)
        peaks = find_peaks([maps], randn(num_images, 5, 5))
        assert find_groups(names, unit(num_images, 64, seed=seed), peaks) == []
    equal = torch.ones(num_images, 16, 5, 5)
    assert find_groups(names, torch.ones(num_images, 4), find_peaks([equal], randn(num_images, 5, 5))) == []
    copies = randn(1, 16, 5, 5).expand(num_images, -1, -1, -1)
    assert find_groups(names, torch.ones(num_images, 4), find_peaks([copies], randn(num_images, 5, 5))) == []


@pytest.mark.parametrize("at_once", [1, 20, 2**20])
def test_likes_are_the_nearer_ones_of_a_clear_split(at_once, monkeypatch):
    monkeypatch.setattr("anomalib_musc.pool.groups._VALUES", at_once)
    distances = torch.full((8, 8), 1.0) + 0.01 * randn(8, 8)
    distances[:3, :3] = 0.2
    distances.fill_diagonal_(0)
    likes = find_likes(distances)
    assert likes[:3, :3].sum() == 6
    assert likes.sum() == 6


@pytest.mark.parametrize("smaller", [3, 10])
def test_two_groups_all_over(smaller):
    features = 0.05 * randn(30, 40)
    features[:, 0] += 1
    features[-smaller:, 1] += 3
    names = [str(index) for index in range(30)]
    (group,) = groups_all_over(names, features)
    assert group.names == tuple(names[-smaller:])
    assert group.text.startswith(f"Two groups of images that differ all over ({30 - smaller} and {smaller})")


# --- what is said --------------------------------------------------------------------------------------------------


def test_a_defect_of_many_images_through_engine(tmp_path, make_engine):
    paths = write_products(tmp_path / "pile", range(24))
    for path in paths[:7]:
        picture = cv2.imread(str(path))
        cv2.rectangle(picture, (10, 40), (21, 51), (0, 0, 255), -1)
        cv2.imwrite(str(path), picture)
    model = MuSc(OwnBackbone(), second_interval=SECOND, visualizer=False)
    engine = make_engine()
    with pytest.warns(UserWarning, match=r"7 images share at the same place what most others lack: .*000\.png"):
        engine.predict(model, data_path=tmp_path / "pile")
    (group,) = model.pools[0].groups
    assert group.names == tuple(map(str, paths[:7]))
    assert group.text in model.pool_warnings
    page = next(Path(engine.trainer.default_root_dir).rglob("review.html")).read_text(encoding="utf-8")
    assert "group 1: 7 images" in page
    assert page.count("7 images share at the same place") == 2  # for the eye and for the scripts, but no warning beside
    plain = MuSc(OwnBackbone(), visualizer=False)
    make_engine().predict(plain, data_path=tmp_path / "pile")
    assert not any("share" in warning for warning in plain.pool_warnings)


def test_a_good_pool_is_silent(folder, make_engine):
    model = MuSc(OwnBackbone(), second_interval=SECOND, visualizer=False)
    make_engine().predict(model, data_path=folder.parent / "train/good")
    assert model.pools[0].groups == ()


# --- real data -----------------------------------------------------------------------------------------------------

SETS = {
    "cookies": SHARED / "data/cookies/cookie/test",
    "tiles": SHARED / "data/magnetic_tile/tile/test",
    "textile": SHARED / "data/textile/textile/test",
}


@pytest.mark.skipif(not SETS["textile"].is_dir(), reason="real images are not here")
def test_real_pools_are_silent_and_their_mixes_are_not():
    from anomalib_musc.compat.pre_processor import resize_and_normalise
    from anomalib_musc.pool.high_bit_depth import read_image_file
    from anomalib_musc.torch_model import MuScModel

    model = MuScModel("musc-tiny", image_size=160)
    transform = resize_and_normalise(model.image_size, model.mean, model.std, model.interpolation)

    def features(folder: Path) -> torch.Tensor:
        paths = sorted(path for path in folder.rglob("*.*") if path.is_file())
        paths = paths[:: 1 + (len(paths) > 120)]  # of the tiles every other one
        images = torch.stack([transform(read_image_file(path).values) for path in paths])
        return median_features(model.extract(images)[0])

    found = {name: features(folder) for name, folder in SETS.items()}
    (group,) = groups_all_over(list(map(str, range(120))), found["textile"])  # 80 good images, 40 of another texture
    assert len(set(map(str, range(40))) & set(group.names)) >= 38
    assert len(group.names) < 45
    found["textile"] = found["textile"][40:]
    assert [len(these) for these in found.values()] == [63, 65, 80]
    for name, these in found.items():
        assert groups_all_over([name] * len(these), these) == []
        for other, those in found.items():
            mixed = torch.cat([these[-31:], those[:19]])
            assert bool(groups_all_over([name] * len(mixed), mixed)) == (name != other), (name, other)
            assert bool(warn_of_references(these[::2], those[1::2])) == (name != other), (name, other)
