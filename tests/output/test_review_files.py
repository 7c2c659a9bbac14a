# SPDX-License-Identifier: Apache-2.0
"""What lies in the file of a review page, without a browser."""

import io
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from review_pool import NUM_IMAGES, RANKED, make_review

from anomalib_musc.output.review import Card, encode_thumbnail, write_review
from anomalib_musc.output.review.page import SCRIPTS
from anomalib_musc.output.review.pictures import SMALL_MAX_BYTES, picture_of, quantise

GREY = np.full((60, 80), 128, np.uint8)


class TestThumbnails:
    @pytest.mark.parametrize(("shape", "size"), [((400, 1000, 3), (512, 205)), ((90, 60, 3), (60, 90))])
    def test_keep_proportions_and_are_not_enlarged(self, shape, size):
        assert Image.open(io.BytesIO(encode_thumbnail(np.zeros(shape, np.uint8)))).size == size

    def test_stay_below_their_limit_whatever_the_image(self):
        noise = np.random.default_rng(0).integers(0, 256, (700, 900, 3), dtype=np.uint8)
        assert 10_000 < len(encode_thumbnail(noise)) <= 30_000
        assert len(encode_thumbnail(noise, side=128, max_bytes=3000)) <= 3000

    def test_grey_of_16_bits_is_not_white(self, tmp_path):
        ramp = np.tile(np.arange(0, 4096, 64, dtype=np.uint16), (64, 1))
        path = tmp_path / "deep.png"
        Image.fromarray(ramp).save(path)
        shown = np.asarray(Image.open(io.BytesIO(picture_of(Card(path, 1.0, np.ones((2, 2)))).jpeg)))
        np.testing.assert_allclose(shown[32], ramp[0] / 4095 * 255, atol=4)

    def test_size_is_that_of_the_original(self, tmp_path):
        path = tmp_path / "large.jpg"
        Image.new("RGB", (3000, 1200), "navy").save(path)
        assert picture_of(Card(path, 1.0, np.ones((2, 2)))).size == (3000, 1200)
        given = Card(path, 1.0, np.ones((2, 2)), image=GREY, size=(800, 600))
        assert picture_of(given).size == (800, 600)
        assert picture_of(replace(given, size=None)).size == (80, 60)
        assert picture_of(replace(given, image=encode_thumbnail(GREY), size=None)).size == (80, 60)

    def test_original_is_shown_as_a_browser_turns_it(self, tmp_path):
        exif = Image.Exif()
        for orientation in (1, 6):
            exif[0x0112] = orientation
            path = tmp_path / f"{orientation}.jpg"
            Image.new("RGB", (40, 30)).save(path, exif=exif)
            picture = picture_of(Card(path, 1.0, np.ones((2, 2))))
            assert picture.uri  # which a browser turns, too
            shown = Image.open(io.BytesIO(picture.jpeg)).size
            assert picture.size == shown == ((30, 40) if orientation == 6 else (40, 30))

    def test_a_file_that_is_gone_leaves_its_card(self, tmp_path):
        review = make_review(tmp_path / "images")
        Path(review.cards[3].path).unlink()
        (page,) = write_review(tmp_path / "review.html", review)
        assert re.search(rf'id="card-{RANKED.index(3)}"[^>]*></script>', page.read_text(encoding="utf-8"))


class TestMaps:
    @pytest.mark.parametrize("shape", [(5, 7), (64, 64), (1, 4)])
    def test_in_8_bits_are_within_half_a_step(self, shape):
        grid = np.random.default_rng(1).gamma(2, size=shape)
        levels, low, high = quantise(grid)
        assert levels.dtype == np.uint8
        assert np.abs(low + levels / 255 * (high - low) - grid).max() <= (high - low) / 255 / 2 + 1e-12

    def test_large_ones_keep_their_maximum(self):
        grid = np.random.default_rng(2).gamma(2, size=(518, 300))
        levels, _, high = quantise(grid)
        assert levels.shape == (64, 64)
        assert high == grid.max()

    def test_constant_one(self):
        levels, low, high = quantise(np.full((3, 3), 0.25))
        assert (levels.max(), low, high) == (0, 0.25, 0.25)


class TestFile:
    def test_holds_every_picture_and_names_no_other_place(self, tmp_path):
        (page,) = write_review(tmp_path / "deep" / "review.html", make_review(tmp_path / "images"))
        text = page.read_text(encoding="utf-8")
        assert len(re.findall(r'id="card-\d+"', text)) == NUM_IMAGES
        assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}  # SVG's namespace
        assert not re.search(r"<(link|iframe|img[^>]+src)", text)

    def test_of_2000_images_is_below_120_mb_at_worst(self, tmp_path):
        noise = np.random.default_rng(0).integers(0, 256, (700, 900, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "JPEG", quality=95)  # a user's own, far larger than a thumbnail
        grid = np.random.default_rng(1).gamma(2, size=(518, 518))
        cards = [Card(f"/data/{index}.png", index, grid, file.getvalue(), similar=range(4)) for index in range(8)]
        review = replace(make_review(tmp_path / "images"), cards=cards)
        (page,) = write_review(tmp_path / "review.html", review)
        (half,) = write_review(tmp_path / "half.html", replace(review, cards=cards[:4]))
        per_card = (page.stat().st_size - half.stat().st_size) / 4
        assert 2000 * (per_card + 3 * SMALL_MAX_BYTES * 4 / 3) < 120e6

    def test_scripts_and_template_are_in_the_wheel(self, tmp_path):
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
        subprocess.run(command, cwd=Path(__file__).resolve().parents[2], check=True, capture_output=True)
        (wheel,) = tmp_path.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        files = ["page.html.jinja", "style.css", *(f"{script}.js" for script in SCRIPTS)]
        assert {f"anomalib_musc/output/review/page/{name}" for name in files} <= names


class TestArguments:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"threshold": float("nan")}, "threshold must be a finite number, got nan"),
            ({"region_fraction": 1.1}, "region_fraction must be above 0 and at most 1, got 1.1"),
            ({"argument_scale": (0.0, 1.0)}, "argument_scale must be two finite numbers"),
        ],
    )
    def test_of_the_pool(self, tmp_path, changes, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            make_review(tmp_path, **changes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"score": float("inf")}, "score of 'a.png' must be a finite number, got inf"),
            ({"anomaly_map": np.ones(4)}, "anomaly_map of 'a.png' must be a grid"),
            ({"anomaly_map": np.array([[np.nan]])}, "anomaly_map of 'a.png' must be a grid"),
            ({"similar": [1]}, "similar of 'a.png' must hold indices of the 1 cards, got [1]"),
        ],
    )
    def test_of_a_card(self, tmp_path, changes, message):
        card = replace(Card("a.png", 0.5, np.ones((2, 2))), **changes)
        with pytest.raises(ValueError, match=re.escape(message)):
            replace(make_review(tmp_path), cards=[card])

    def test_no_card(self, tmp_path):
        with pytest.raises(ValueError, match="cards must hold at least one image"):
            write_review(tmp_path / "review.html", replace(make_review(tmp_path), cards=[]))
