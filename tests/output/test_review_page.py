# SPDX-License-Identifier: Apache-2.0
"""The review page in a browser: what a person sees, drags, marks and takes away."""

import csv
import io
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import Tabular
from anomalib.engine import Engine
from anomalib.models import Patchcore
from browser import chromium
from PIL import Image
from sklearn.metrics import f1_score, precision_score, recall_score

from anomalib_musc.output.prediction_writer import Region
from anomalib_musc.output.review import Card, Review, write_review

NUM_IMAGES = 30
THRESHOLD = 2.05
RULE = "Anomalous is what scores above 2.05."
ARGUMENT = "--model.post_processor.image_threshold"
# Their order is not that of their scores, and two are equal.
SCORES = [round(1 + 0.1 * ((7 * index) % NUM_IMAGES), 3) for index in range(NUM_IMAGES)]
SCORES[3] = SCORES[4]
WIDE, TALL = (96, 64), (48, 96)


def anomaly_map(index: int) -> np.ndarray:
    """A grid (6, 9) with one hill, as high as the image's score, each at another place."""
    rows, columns = np.mgrid[:6, :9]
    y, x = index % 6, (5 * index) % 9
    return SCORES[index] * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 5)


def draw(folder: Path, index: int, name: str | None = None) -> Path:
    width, height = TALL if index % 5 == 0 else WIDE
    path = folder / ("north" if index % 2 else "south") / (name or f"{index:02d}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(index).integers(90, 110, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_review(folder: Path, names: dict[int, str] | None = None, **changes) -> Review:
    cards = [
        Card(
            draw(folder, index, (names or {}).get(index)),
            SCORES[index],
            anomaly_map(index),
            similar=[(index + step) % NUM_IMAGES for step in (3, 1, 2)],
            regions=[Region(5, 6, 7, 8, 50)] if SCORES[index] > THRESHOLD else [],
            note=f"note {index}",
        )
        for index in range(NUM_IMAGES)
    ]
    return Review(cards, **{"threshold": THRESHOLD, "rule": RULE, "name": "bolts", **changes})


RANKED = sorted(range(NUM_IMAGES), key=lambda index: -SCORES[index])


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(tmp_path_factory, downloads):
    with chromium(tmp_path_factory.mktemp("profile"), downloads) as browser:
        yield browser


@pytest.fixture
def review(tmp_path):
    return make_review(tmp_path / "images")


@pytest.fixture
def page(browser, tmp_path, review):
    """The page of the pool, opened."""
    yield open_page(browser, tmp_path, review)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def open_page(browser, folder: Path, review: Review):
    (path,) = write_review(folder / "review.html", review)
    browser.get(path.as_uri())
    return browser


def select(page, css: str) -> list:
    return page.find_elements("css selector", css)


def one(page, css: str):
    (found,) = select(page, css)
    return found


def press(page, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    for key in keys:
        ActionChains(page).send_keys(key).perform()
    settle(page)


def settle(page) -> None:
    """Wait until the page has drawn what was last done."""
    page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def drag_to(page, share: float) -> float:
    """Drag the handle to a share of the histogram's width; returns the threshold that it shows."""
    from selenium.webdriver import ActionChains

    box, handle = one(page, "#histogram"), one(page, "#threshold")
    left = box.rect["x"] + share * box.rect["width"]
    start = handle.rect["x"] + handle.rect["width"] / 2
    ActionChains(page).click_and_hold(handle).move_by_offset(int(left - start), 3).release().perform()
    settle(page)
    return threshold_of(page)


def threshold_of(page) -> float:
    return float(one(page, "#threshold").get_attribute("aria-valuenow"))


def counts(page) -> tuple[int, int]:
    return int(one(page, "#flagged").text), int(one(page, "#unflagged").text)


def shown_scores(page) -> list[str]:
    return [item.text for item in select(page, ".card .score") if item.is_displayed()]


def names_shown(page) -> list[str]:
    script = "return [...document.querySelectorAll('.card:not([hidden]) .name')].map((name) => name.textContent)"
    return page.execute_script(script)


def marks_of(page) -> dict[str, str]:
    script = """return Object.fromEntries([...document.querySelectorAll(".card")].filter((card) => card.dataset.mark)
        .map((card) => [card.querySelector(".name").textContent, card.dataset.mark]))"""
    return page.execute_script(script)


def choose(page, menu: str, value: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(one(page, menu)).select_by_value(value)
    settle(page)


def name_of(rank: int) -> str:
    return f"{RANKED[rank]:02d}.png"


def download(page, downloads: Path, button: str) -> bytes:
    before = set(downloads.iterdir())
    one(page, button).click()
    for _ in range(100):
        new = [path for path in set(downloads.iterdir()) - before if path.suffix == ".csv"]
        if new:
            time.sleep(0.05)
            return new[0].read_bytes()
        time.sleep(0.05)
    raise AssertionError("nothing was downloaded")


def flagged_outlines(page) -> dict[str, bool]:
    """Of the cards near the screen, whether they have an outline."""
    script = """return Object.fromEntries([...document.querySelectorAll(".card")]
        .filter((card) => card.querySelector("img").getAttribute("src"))
        .map((card) => [card.querySelector(".score").textContent, Boolean(card.querySelector(".line").getAttribute("d"))]))"""
    return page.execute_script(script)


class TestCards:
    def test_most_anomalous_first_with_score_rank_and_path(self, page):
        assert names_shown(page) == [name_of(rank) for rank in range(NUM_IMAGES)]
        first = one(page, '.card[data-rank="0"]')
        assert first.find_element("css selector", "b").text == "1"
        assert first.find_element("css selector", ".score").text == "3.90"
        assert first.find_element("css selector", ".folder").text == ("north" if RANKED[0] % 2 else "south")
        assert "flagged" in first.text
        assert one(page, "h1").text == "bolts"
        assert RULE in one(page, ".about").text

    def test_images_and_outlines_have_true_proportions(self, page):
        for index in (5, 7):
            card = one(page, f'.card[data-rank="{RANKED.index(index)}"]')
            page.execute_script("arguments[0].scrollIntoView()", card)
            settle(page)
            time.sleep(0.2)
            width, height = TALL if index == 5 else WIDE
            for part in ("img", "svg"):
                box = card.find_element("css selector", part).rect
                assert box["width"] / box["height"] == pytest.approx(width / height, rel=0.02), part
            frame = card.find_element("css selector", ".frame").rect
            assert box["width"] <= frame["width"] + 1
            assert box["height"] <= frame["height"] + 1
            script = "const i = arguments[0].querySelector('img'); return [i.naturalWidth, i.naturalHeight]"
            assert page.execute_script(script, card) == [width, height]

    def test_orders(self, page):
        choose(page, "#order", "threshold")
        distances = [abs(float(score) - THRESHOLD) for score in shown_scores(page)]
        assert len(distances) == NUM_IMAGES
        assert distances == sorted(distances)
        choose(page, "#order", "folder")
        titles = [title.text for title in select(page, "main h2")]
        for title, odd in zip(titles, (True, False), strict=True):
            flagged = sum(SCORES[index] > THRESHOLD for index in range(NUM_IMAGES) if index % 2 == odd)
            assert title == f"{'north' if odd else 'south'} 15 images, {flagged} flagged"
        choose(page, "#order", "score")
        assert names_shown(page) == [name_of(rank) for rank in range(NUM_IMAGES)]

    def test_filters(self, page):
        press(page, "g", "d", "d")
        for value, number in [("good", 1), ("defect", 2), ("unsure", 0), ("unmarked", NUM_IMAGES - 3)]:
            choose(page, "#filter", value)
            assert len(names_shown(page)) == number, value
        choose(page, "#filter", "flagged")
        assert all(float(score) > THRESHOLD for score in shown_scores(page))
        assert len(names_shown(page)) == counts(page)[0]


class TestThreshold:
    @pytest.mark.parametrize("share", [0.25, 0.7, 0.93])
    def test_counts_and_outlines_follow_the_drag(self, page, share):
        threshold = drag_to(page, share)
        assert threshold == pytest.approx(0.97 + share * 3, abs=0.15)  # from 1 to 3.9, with some room at both ends
        flagged = sum(score > threshold for score in SCORES)
        assert counts(page) == (flagged, NUM_IMAGES - flagged)
        outlines = flagged_outlines(page)
        assert len(outlines) > 8
        assert outlines == {score: float(score) > threshold for score in outlines}

    def test_arrow_keys_flag_one_image_more_or_less(self, page):
        from selenium.webdriver.common.keys import Keys

        handle = one(page, "#threshold")
        start, _ = counts(page)
        handle.send_keys(Keys.ARROW_LEFT)
        settle(page)
        assert counts(page)[0] == start + 1
        handle.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
        settle(page)
        assert counts(page)[0] == start - 1
        handle.send_keys(Keys.END)
        settle(page)
        assert counts(page) == (0, NUM_IMAGES)
        handle.send_keys(Keys.HOME)
        settle(page)
        assert counts(page) == (NUM_IMAGES, 0)
        assert f"{NUM_IMAGES} of {NUM_IMAGES} flagged" in handle.get_attribute("aria-valuetext")

    def test_equal_scores_change_sides_together(self, page):
        from selenium.webdriver.common.keys import Keys

        handle = one(page, "#threshold")
        handle.send_keys(Keys.END)
        seen = []
        for _ in range(NUM_IMAGES):
            settle(page)
            seen.append(counts(page)[0])
            handle.send_keys(Keys.ARROW_LEFT)
        above = sum(score > SCORES[3] for score in SCORES)
        assert above in seen
        assert above + 1 not in seen
        assert above + 2 in seen

    def test_typed_and_reset(self, page):
        field = one(page, "#threshold-value")
        assert float(field.get_attribute("value")) == THRESHOLD
        field.clear()
        field.send_keys("3.33\n")
        settle(page)
        assert threshold_of(page) == 3.33
        assert counts(page)[0] == sum(score > 3.33 for score in SCORES)
        assert one(page, "#paste-present code").text == f"{ARGUMENT}=3.33"
        one(page, "#reset").click()
        settle(page)
        assert threshold_of(page) == THRESHOLD

    def test_outline_encloses_what_lies_above_the_fraction(self, browser, tmp_path):
        review = make_review(tmp_path / "images", region_fraction=0.6)
        page = open_page(browser, tmp_path, review)
        script = "return document.querySelector(`.card[data-rank='${arguments[0]}'] .line`).getAttribute('d')"
        for rank in range(4):
            index = RANKED[rank]
            width, height = TALL if index % 5 == 0 else WIDE
            numbers = page.execute_script(script, rank).replace("M", " ").replace("L", " ").replace(",", " ").split()
            points = np.array(numbers, float).reshape(-1, 2)
            grid = torch.from_numpy(anomaly_map(index))[None, None]
            big = torch.nn.functional.interpolate(grid, (20 * height, 20 * width), mode="bilinear", align_corners=True)
            ys, xs = np.nonzero((big > 0.6 * grid.max())[0, 0].numpy())
            expected = [xs.min(), ys.min(), xs.max(), ys.max()]
            found = [*points.min(axis=0), *points.max(axis=0)]
            assert found == pytest.approx([edge / 20 for edge in expected], abs=0.5), index
            # closed: each point is the end of two segments
            _, ends = np.unique(points.round(1), axis=0, return_counts=True)
            assert (ends % 2 == 0).mean() > 0.9


class TestMarks:
    def test_keys(self, page):
        press(page, "g", "d", "u")
        assert marks_of(page) == {name_of(0): "good", name_of(1): "defect", name_of(2): "unsure"}
        press(page, "b", "b", "d")  # the second again: no mark
        assert marks_of(page) == {name_of(0): "good", name_of(2): "unsure"}
        press(page, "z")
        assert marks_of(page) == {name_of(0): "good", name_of(1): "defect", name_of(2): "unsure"}
        press(page, "n", "n", "g", "z", "z", "z", "z", "z", "z")
        assert marks_of(page) == {}

    def test_buttons(self, page):
        one(page, '.card[data-rank="4"] button[data-mark="defect"]').click()
        assert marks_of(page) == {name_of(4): "defect"}
        one(page, '.card[data-rank="4"] button[data-mark="good"]').click()
        assert marks_of(page) == {name_of(4): "good"}
        one(page, "#undo").click()
        assert marks_of(page) == {name_of(4): "defect"}

    def test_survive_a_reload_with_threshold_and_undo(self, page):
        press(page, "g", "d", "u")
        before = drag_to(page, 0.8)
        page.refresh()
        assert marks_of(page) == {name_of(0): "good", name_of(1): "defect", name_of(2): "unsure"}
        assert threshold_of(page) == before
        press(page, "z")
        assert marks_of(page) == {name_of(0): "good", name_of(1): "defect"}

    def test_another_run_does_not_get_them(self, page, tmp_path, review):
        press(page, "g", "d", "u")
        open_page(page, tmp_path, review)  # the same place, the same pool
        assert marks_of(page) == {}

    def test_export_is_what_was_marked(self, page, downloads, review):
        press(page, *"gdudgg", "b", "b", "g")
        marks = {name_of(0): "good", name_of(1): "defect", name_of(2): "unsure", name_of(3): "defect", name_of(5): "good"}
        assert marks_of(page) == marks
        content = download(page, downloads, "#export-marks")
        assert content.startswith(b"\xef\xbb\xbf")  # spreadsheets take it for UTF-8
        rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"))))
        assert [row["mark"] for row in rows] == list(marks.values())
        for row in rows:
            rank = int(row["rank"]) - 1
            card = review.cards[RANKED[rank]]
            assert row["path"] == str(card.path)
            assert float(row["score"]) == card.score
            assert row["label"] == ("anomalous" if card.score > THRESHOLD else "normal")

    def test_anomalib_trains_patchcore_on_the_list(self, page, downloads, tmp_path, review):
        press(page, *"ddddu")
        for rank in range(NUM_IMAGES - 8, NUM_IMAGES):
            button = one(page, f'.card[data-rank="{rank}"] button[data-mark="good"]')
            page.execute_script("arguments[0].click()", button)
        file = tmp_path / "list.csv"
        file.write_bytes(download(page, downloads, "#export-list"))
        datamodule = Tabular.from_file("bolts", file, num_workers=0, normal_split_ratio=0.25, seed=0)
        datamodule.setup()
        path_of = lambda rank: str(review.cards[RANKED[rank]].path)  # noqa: E731
        good = {path_of(rank) for rank in range(NUM_IMAGES - 8, NUM_IMAGES)}
        listed = pd.read_csv(file)
        assert set(listed.image_path[listed.label_index == 0]) == good
        assert set(listed.image_path[listed.label_index == 1]) == {path_of(rank) for rank in range(4)}
        train = set(datamodule.train_data.samples.image_path)
        assert train
        assert train <= good
        model = Patchcore(backbone="resnet18", layers=["layer1"], pre_trained=False, coreset_sampling_ratio=0.01)
        engine = Engine(default_root_dir=tmp_path / "results", accelerator="cpu", enable_progress_bar=False)
        engine.fit(model, datamodule=datamodule)
        assert len(model.model.memory_bank)

    def test_precision_recall_and_best_threshold(self, browser, tmp_path):
        page = open_page(browser, tmp_path, make_review(tmp_path / "images", argument_scale=(0.25, -1.0)))
        kinds = "dddgddgddgggdggggggg"  # by rank
        press(page, *kinds[:-1])
        assert "Mark 1 more" in one(page, "#fit").text
        press(page, kinds[-1])
        scores = np.array([SCORES[index] for index in RANKED])
        marked, truth = scores[: len(kinds)], np.array([kind == "d" for kind in kinds])
        rows = {row.text.split(" ")[0]: row.text.split(" ", 1)[1] for row in select(page, "#fit tbody tr")}
        best = float(rows["Threshold"].split()[1])
        f1 = {cut: f1_score(truth, marked > cut) for cut in (marked[1:] + marked[:-1]) / 2}
        assert f1_score(truth, marked > best) == max(f1.values())
        for name, metric in [("Precision", precision_score), ("Recall", recall_score)]:
            shares = [f"{100 * metric(truth, marked > cut):.0f} %" for cut in (THRESHOLD, best)]
            assert rows[name] == " ".join(shares)
        assert rows["Flagged"].split()[-2:] == [str((scores > cut).sum()) for cut in (THRESHOLD, best)]
        argument, value = one(page, "#paste-best code").text.split("=")
        assert argument == ARGUMENT
        assert ((0.25 * scores - 1 > float(value)) == (scores > best)).all()
        one(page, "#use-best").click()
        settle(page)
        assert counts(page)[0] == (scores > best).sum()

    def test_widest_gap_of_equally_good_thresholds(self, browser, tmp_path):
        page = open_page(browser, tmp_path, make_review(tmp_path / "images"))
        press(page, *"ddddddddd", *"nnnn", *"ggggggggggg")
        last, first = SCORES[RANKED[8]], SCORES[RANKED[13]]
        best = one(page, "#fit tbody tr").text.split()[-1]
        assert float(best) == pytest.approx((last + first) / 2, abs=0.06)
        assert first < float(best) < last


class TestDetail:
    def test_opens_compares_and_closes_by_keyboard(self, page):
        from selenium.webdriver.common.keys import Keys

        press(page, "n", Keys.ENTER)
        assert one(page, "#detail").is_displayed()
        index = RANKED[1]
        assert name_of(1) in one(page, "#detail-title").text
        facts = one(page, "#detail-facts").text
        assert f"2 of {NUM_IMAGES}" in facts
        assert f"note {index}" in facts
        assert "7 × 8 at (5, 6), 50 pixels" in facts
        similar = [item.get_attribute("title") for item in select(page, "#similar button")]
        assert [Path(path).name for path in similar] == [f"{(index + step) % NUM_IMAGES:02d}.png" for step in (3, 1, 2)]
        assert all(image.get_attribute("src").startswith("data:image/jpeg") for image in select(page, "#similar img"))
        press(page, "d")
        assert marks_of(page) == {name_of(1): "defect"}
        assert name_of(2) in one(page, "#detail-title").text
        press(page, "b", "z")
        assert marks_of(page) == {}
        press(page, Keys.ESCAPE)
        assert not one(page, "#detail").is_displayed()
        assert page.switch_to.active_element.text.startswith("2")

    def test_zoom_opacity_and_outline(self, page):
        one(page, ".card .open").click()
        width = one(page, "#layers").rect["width"]
        press(page, "+", "+")
        assert one(page, "#layers").rect["width"] == pytest.approx(4 * width, rel=0.01)
        stage, layers = one(page, "#stage").rect, one(page, "#layers").rect
        rows, columns = np.unravel_index(anomaly_map(RANKED[0]).argmax(), (6, 9))
        x = layers["x"] + columns / 8 * layers["width"]
        assert stage["x"] <= x <= stage["x"] + stage["width"]  # the most anomalous place is still seen
        y = layers["y"] + rows / 5 * layers["height"]
        assert stage["y"] <= y <= stage["y"] + stage["height"]
        press(page, "0")
        assert one(page, "#layers").rect["width"] == pytest.approx(width, rel=0.01)
        opacity = "return getComputedStyle(document.querySelector('#layers canvas')).opacity"
        assert float(page.execute_script(opacity)) > 0
        page.execute_script("""const slider = document.getElementById("opacity"); slider.value = 85;
            slider.dispatchEvent(new Event("input"))""")
        assert float(page.execute_script(opacity)) == 0.85
        press(page, "h")
        assert float(page.execute_script(opacity)) == 0
        outline = "return document.querySelector('#layers .line').getAttribute('d')"
        assert page.execute_script(outline)
        press(page, "o")
        assert not page.execute_script(outline)

    def test_one_colour_scale_for_the_pool(self, page):
        """The hill of a low image is paler than that of the highest, by its value alone."""
        pixel = """const canvas = document.querySelector("#layers canvas"), data = canvas.getContext("2d")
            .getImageData(0, 0, canvas.width, canvas.height).data;
            let most = 0; for (let i = 3; i < data.length; i += 4) most = Math.max(most, data[i]); return most"""
        one(page, ".card .open").click()
        assert page.execute_script(pixel) == 255
        one(page, "#detail-close").click()
        page.execute_script("document.querySelector(`.card[data-rank='29'] .open`).click()")
        settle(page)
        maps = np.stack([anomaly_map(index) for index in range(NUM_IMAGES)])
        level = (SCORES[RANKED[29]] - np.median(maps)) / (maps.max() - np.median(maps))
        assert page.execute_script(pixel) == pytest.approx(255 * 1.6 * level, abs=4)

    def test_similar_image_is_a_click_away(self, page):
        one(page, ".card .open").click()
        select(page, "#similar button")[1].click()
        settle(page)
        assert f"{(RANKED[0] + 1) % NUM_IMAGES:02d}.png" in one(page, "#detail-title").text


HOSTILE = {
    0: '"quoted" \'name\'.png',
    1: "<script>window.harmed = 1<script>.png",
    2: "<img src=x onerror=window.harmed=1>.png",
    3: "Schraube größer ß 螺丝.png",
    4: "100%25 %s {{ 7*7 }} &amp;.png",
    5: "comma, new\nline.png",
    6: "=1+1.png",
    7: "bytes_\udce4.png",
}


class TestHostileNames:
    def test_are_harmless_and_come_out_as_they_went_in(self, browser, tmp_path, downloads):
        folder = tmp_path / "it's <b>\"100 %\" größe"
        review = make_review(folder, HOSTILE, name="</script><script>window.harmed=1</script>", rule="<b>bold</b>")
        page = open_page(browser, tmp_path, review)
        assert page.execute_script("return window.harmed") is None
        shown = names_shown(page)
        escaped = {**HOSTILE, 7: "bytes_\\udce4.png"}
        for index, name in escaped.items():
            assert shown[RANKED.index(index)] == name
        assert "</script>" in one(page, "h1").text
        for index in HOSTILE:
            button = one(page, f'.card[data-rank="{RANKED.index(index)}"] button[data-mark="good"]')
            page.execute_script("arguments[0].click()", button)
        rows = csv.DictReader(io.StringIO(download(page, downloads, "#export-marks").decode("utf-8-sig"), newline=""))
        assert {row["path"] for row in rows} == {
            str(review.cards[index].path).replace("\udce4", "\\udce4") for index in HOSTILE
        }
        file = tmp_path / "list.csv"
        file.write_bytes(download(page, downloads, "#export-list"))
        assert "1 left out" in one(page, "#toast").text
        datamodule = Tabular.from_file("bolts", file, num_workers=0)
        datamodule.setup()
        listed = {*datamodule.train_data.samples.image_path, *datamodule.test_data.samples.image_path}
        assert listed == {str(review.cards[index].path) for index in HOSTILE if index != 7}
        press(page, "n")
        one(page, ".card .open").click()
        assert page.execute_script("return window.harmed") is None


class TestForEveryone:
    def test_everything_is_reached_and_named_for_the_keyboard(self, page):
        from selenium.webdriver.common.keys import Keys

        reached = []
        for _ in range(25):
            press(page, Keys.TAB)
            element = page.switch_to.active_element
            reached.append(element.get_attribute("id") or element.get_attribute("class"))
            if "open" in reached:
                break
        assert {"threshold", "threshold-value", "order", "filter", "open"} <= set(reached)
        press(page, "d", Keys.ARROW_RIGHT, "g", Keys.ENTER)
        assert marks_of(page) == {name_of(0): "defect", name_of(2): "good"}
        assert one(page, "#detail").is_displayed()
        unnamed = """return [...document.querySelectorAll("button, input, select, [role=slider], a, main, dialog")]
            .filter((part) => !(part.getAttribute("aria-label") || part.getAttribute("aria-labelledby") ||
                part.textContent.trim() || part.labels?.length)).map((part) => part.outerHTML)"""
        assert page.execute_script(unnamed) == []
        assert one(page, ".card .open").accessible_name.startswith("Rank 1, score 3.90")

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_text_can_be_read_in(self, page, scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        press(page, "g", "d", "u")
        script = """const colour = (part, kind) => getComputedStyle(part)[kind].match(/[\\d.]+/g).map(Number);
            const ground = (part) => { while (part) { const c = colour(part, "backgroundColor");
                if (c.length < 4 || c[3] > 0) return c; part = part.parentElement; } return [255, 255, 255]; };
            return [...document.querySelectorAll("h1, p, b, .dim, .status span, .marks button, label, .tally span")]
                .filter((part) => part.textContent.trim() && part.checkVisibility())
                .map((part) => [colour(part, "color"), ground(part), part.textContent])"""
        found = page.execute_script(script)
        assert len(found) > 100
        for ink, ground, text in found:
            one_, other = sorted((luminance(ink), luminance(ground)))
            assert (other + 0.05) / (one_ + 0.05) >= 4.5, text
        assert (luminance(found[0][1]) < 0.1) == (scheme == "dark")
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    def test_fits_a_phone(self, page):
        metrics = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        try:
            page.refresh()
            assert page.execute_script("return document.documentElement.scrollWidth") == 360
            first = one(page, ".card .open")
            assert first.rect["y"] < 740  # images are seen without scrolling
            first.click()
            assert page.execute_script("return document.documentElement.scrollWidth") == 360
            for button in select(page, "#detail-marks button"):
                assert button.rect["height"] >= 44
                assert 0 <= button.rect["y"] <= 740 - 44
        finally:
            page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def test_needs_no_network(self, page):
        from selenium.webdriver.common.keys import Keys

        press(page, Keys.ENTER, "+", "+")
        script = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
        assert [name for name in page.execute_script(script) if not name.startswith(("data:", "file:", "blob:"))] == []
        policy = one(page, "meta[http-equiv]").get_attribute("content")
        assert policy.startswith("default-src 'none'; img-src data: file:;")


def luminance(colour: list[float]) -> float:
    """Relative luminance of sRGB, as WCAG 2 defines it."""
    parts = [value / 255 for value in colour[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


class TestSeveralPages:
    def test_large_pools_are_split_and_share_marks(self, browser, tmp_path):
        number = 2003
        jpeg = io.BytesIO()
        Image.new("RGB", (16, 12), "grey").save(jpeg, "JPEG")
        grid = np.array([[0.0, 1.0], [0.5, 0.2]])
        cards = [Card(f"/data/{i}.png", number - i, grid, image=jpeg.getvalue(), similar=[i - 1]) for i in range(1, number)]
        cards.insert(0, Card("/data/0.png", number, grid, image=jpeg.getvalue(), similar=[number - 1]))
        stale = tmp_path / "review_3.html"
        stale.write_text("of an earlier run")
        paths = write_review(tmp_path / "review.html", Review(cards, 1000.5, RULE, "large"))
        assert [path.name for path in paths] == ["review.html", "review_2.html"]
        assert not stale.exists()
        browser.get(paths[0].as_uri())
        assert len(names_shown(browser)) == 2000
        assert counts(browser) == (1003, 1000)  # of the pool, not of the page
        press(browser, "d")
        one(browser, ".card .open").click()
        similar = one(browser, "#similar button")
        assert similar.find_element("css selector", "img").get_attribute("src").startswith("data:image/jpeg")
        one(browser, "#detail-close").click()
        select(browser, "nav a")[1].click()
        assert names_shown(browser) == ["2000.png", "2001.png", "2002.png"]
        assert "1 defect" in one(browser, "#tally").text
        pool = json.loads(one(browser, "#pool").get_attribute("textContent"))
        assert (pool["first"], pool["last"]) == (2000, 2002)
