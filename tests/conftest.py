# SPDX-License-Identifier: Apache-2.0
"""A small product with a visible defect, in the layouts of anomalib's datasets, and a backbone of a user's own."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from review_fixtures import browser, downloads, page, review  # noqa: F401  # fixtures of the review page's tests
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need a network, nor wait for one
torch.backends.cudnn.allow_tf32 = False  # a GPU's numbers are compared with those of float64, too

SIDE = 64
LONGEST = ("test_benchmark", "test_readme_commands", "test_real_data", "test_zoo", "test_musc_tiny")  # a minute each
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


class OwnBackbone(nn.Module):
    """A user's own network: two layers of different grids, a unit-norm image feature, and a count of its work."""

    image_size = SIDE
    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.fine = nn.Conv2d(3, 16, kernel_size=8, stride=8)
        self.coarse = nn.Conv2d(16, 24, kernel_size=2, stride=2)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
        self.num_images = 0

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        self.num_images += len(images)
        fine = self.fine(images).tanh()
        coarse = self.coarse(fine)
        return [fine, coarse], nn.functional.normalize(coarse.float().mean(dim=(2, 3)), dim=-1)


def product(seed: int, *, defect: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Draw one photograph (SIDE, SIDE, 3) and its mask (SIDE, SIDE), both uint8."""
    rng = np.random.default_rng(seed)
    stripes = 100 + 60 * np.sin(np.arange(SIDE) / 3)
    image = np.repeat((stripes[None, :] + rng.normal(0, 4, (SIDE, SIDE)))[..., None], 3, axis=2)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    if defect:
        y, x = rng.integers(8, SIDE - 24, 2)
        mask[y : y + 14, x : x + 14] = 255
        image[mask > 0] = np.array([200, 60, 40]) + rng.normal(0, 4, 3)
    return image.clip(0, 255).astype(np.uint8), mask


def grey(seed: int, *, defect: bool = False) -> np.ndarray:
    return cv2.cvtColor(product(seed, defect=defect)[0], cv2.COLOR_RGB2GRAY)


def write_products(folder: Path, seeds: range, *, masks: Path | None = None, mask_name: str = "{}.png") -> list[Path]:
    """Write one picture a seed; broken ones if ``masks`` says where their masks go."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, seed in enumerate(seeds):
        image, mask = product(seed, defect=masks is not None)
        paths.append(folder / f"{number:03d}.png")
        cv2.imwrite(str(paths[-1]), image)
        if masks is not None:
            masks.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(masks / mask_name.format(f"{number:03d}")), mask)
    return paths


@pytest.fixture(scope="session")
def mvtec_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MVTec AD layout, category ``widget``: 4 images for training, 8 good and 4 broken ones for testing."""
    root = tmp_path_factory.mktemp("mvtec")
    widget = root / "widget"
    write_products(widget / "train/good", range(4))
    write_products(widget / "test/good", range(10, 18))
    write_products(
        widget / "test/scratch", range(30, 34), masks=widget / "ground_truth/scratch", mask_name="{}_mask.png"
    )
    return root


@pytest.fixture(scope="session")
def folder(mvtec_root: Path) -> Path:
    """A plain folder with the twelve test images."""
    return mvtec_root / "widget/test"


@pytest.fixture
def own_backbone() -> OwnBackbone:
    """A fresh backbone of a user's own."""
    return OwnBackbone()


@pytest.fixture
def make_engine(tmp_path: Path):
    """Make engines that write below a temporary folder."""
    return lambda **kwargs: Engine(default_root_dir=tmp_path / "results", **{"enable_progress_bar": False, **kwargs})
