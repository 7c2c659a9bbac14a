# SPDX-License-Identifier: Apache-2.0
"""The review page in a browser: what a person sees, drags and zooms, on screens of all kinds."""

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import choose, click, one, press, select, settle
from PIL import Image
from review_pool import (
    ARGUMENT,
    GRID,
    NUM_IMAGES,
    RANKED,
    RULE,
    SCORES,
    STEPS,
    THRESHOLD,
    anomaly_map,
    counts,
    drag_to,
    make_review,
    marks_of,
    name_of,
    open_page,
    shown,
    size_of,
    threshold_of,
)

from anomalib_musc.output.review import Card, Review, write_review

FIRST = ".card[data-rank='0']"


class TestCards:
    def test_most_anomalous_first_with_score_rank_and_path(self, page):
        assert shown(page, ".name") == [name_of(rank) for rank in range(NUM_IMAGES)]
        assert one(page, f"{FIRST} b").text == "1"
        assert one(page, f"{FIRST} .score").text == "3.90"
        assert one(page, f"{FIRST} .folder").text == ("north" if RANKED[0] % 2 else "south")
        assert one(page, f"{FIRST} .flag").text == "flagged"
        assert one(page, "h1").text == "bolts"
        assert RULE in one(page, ".about").text

    def test_images_and_outlines_have_true_proportions(self, page):
        for index in (5, 7):
            card = one(page, f'.card[data-rank="{RANKED.index(index)}"]')
            page.execute_script("arguments[0].scrollIntoView()", card)
            settle(page)
            time.sleep(0.2)
            width, height = size_of(index)
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
        distances = [abs(float(score) - THRESHOLD) for score in shown(page, ".score")]
        assert len(distances) == NUM_IMAGES
        assert distances == sorted(distances)
        choose(page, "#order", "folder")
        titles = [title.text for title in select(page, "main h2")]
        for title, odd in zip(titles, (True, False), strict=True):
            flagged = sum(SCORES[index] > THRESHOLD for index in range(NUM_IMAGES) if index % 2 == odd)
            assert title == f"{'north' if odd else 'south'} 15 images, {flagged} flagged"
        choose(page, "#order", "score")
        assert shown(page, ".name") == [name_of(rank) for rank in range(NUM_IMAGES)]

    def test_filters(self, page):
        press(page, "g", "d", "d")
        for value, number in [("good", 1), ("defect", 2), ("unsure", 0), ("unmarked", NUM_IMAGES - 3)]:
            choose(page, "#filter", value)
            assert len(shown(page, ".name")) == number, value
        choose(page, "#filter", "flagged")
        assert all(float(score) > THRESHOLD for score in shown(page, ".score"))
        assert len(shown(page, ".name")) == counts(page)[0]

    def test_marking_what_a_filter_shows_goes_on_with_the_next(self, page):
        choose(page, "#filter", "unmarked")
        click(page, f"{FIRST} .open")
        press(page, "g", "d")
        assert marks_of(page) == {name_of(0): "good", name_of(1): "defect"}
        assert name_of(2) in one(page, "#detail-title").text
        one(page, "#detail-marks button[data-mark=unsure]").click()
        assert name_of(3) in one(page, "#detail-title").text
        assert one(page, "#detail-position").text == f"1 of {NUM_IMAGES - 3}"


class TestGroups:
    def test_a_group_is_shown_side_by_side(self, browser, tmp_path):
        members = [3, 8, 20]
        groups = [("3 images share at the same place what most others lack.", members), ("Two groups.", [1])]
        page = open_page(browser, tmp_path, make_review(tmp_path, groups=groups))
        assert [item.text.split(".")[0] for item in select(page, "[aria-label=Groups] li")] == [
            "3 images share at the same place what most others lack",
            "Two groups",
        ]
        click(page, "button.group[value=group-0]")
        assert sorted(shown(page, ".name")) == [f"{index:02d}.png" for index in members]
        assert one(page, "#filter").get_attribute("value") == "group-0"
        choose(page, "#filter", "group-1")
        assert shown(page, ".name") == ["01.png"]
        choose(page, "#filter", "all")
        assert len(shown(page, ".name")) == NUM_IMAGES

    def test_a_group_of_no_card_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"The group 'a pair' must hold indices of the 30 cards, got \[0, 30\]"):
            make_review(tmp_path, groups=[("a pair", [0, 30])])


class TestThreshold:
    @pytest.mark.parametrize("share", [0.25, 0.7, 0.93])
    def test_counts_and_outlines_follow_the_drag(self, page, share):
        threshold = drag_to(page, share)
        assert threshold == pytest.approx(0.97 + share * 3, abs=0.15)  # from 1 to 3.9, with some room at both ends
        flagged = sum(score > threshold for score in SCORES)
        assert counts(page) == (flagged, NUM_IMAGES - flagged)
        script = """return [...document.querySelectorAll(".card")].filter((card) => card.querySelector("img[src]"))
            .map((card) => [card.querySelector(".score").textContent, card.querySelector(".line").getAttribute("d")])"""
        outlines = {float(score): bool(path) for score, path in page.execute_script(script)}
        assert len(outlines) > 8
        assert outlines == {score: score > threshold for score in outlines}

    def test_arrow_keys_flag_one_image_more_or_less(self, page):
        from selenium.webdriver.common.keys import Keys

        handle = one(page, "#threshold")
        start, _ = counts(page)
        for keys, number in [
            ([Keys.ARROW_LEFT], start + 1),
            ([Keys.ARROW_RIGHT, Keys.ARROW_RIGHT], start - 1),
            ([Keys.PAGE_UP], start - 11),
            ([Keys.END], 0),
            ([Keys.HOME], NUM_IMAGES),
        ]:
            handle.send_keys(*keys)
            settle(page)
            assert counts(page) == (number, NUM_IMAGES - number), keys
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
        from selenium.webdriver.common.keys import Keys

        field = one(page, "#threshold-value")
        assert float(field.get_attribute("value")) == THRESHOLD
        field.send_keys(Keys.CONTROL, "a", Keys.NULL, "3.33\n")
        settle(page)
        assert threshold_of(page) == 3.33
        assert counts(page)[0] == sum(score > 3.33 for score in SCORES)
        assert one(page, "#paste-present code").text == f"{ARGUMENT}=3.33"
        one(page, "#reset").click()
        settle(page)
        assert threshold_of(page) == THRESHOLD

    def test_outline_encloses_what_lies_above_the_fraction(self, browser, tmp_path):
        page = open_page(browser, tmp_path, make_review(tmp_path / "images", region_fraction=0.6))
        script = "return document.querySelector(`.card[data-rank='${arguments[0]}'] .line`).getAttribute('d')"
        for rank in range(4):
            index = RANKED[rank]
            width, height = size_of(index)
            numbers = page.execute_script(script, rank).replace("M", " ").replace("L", " ").replace(",", " ").split()
            points = np.array(numbers, float).reshape(-1, 2)
            grid = torch.from_numpy(anomaly_map(index))[None, None]
            big = torch.nn.functional.interpolate(grid, (20 * height, 20 * width), mode="bilinear", align_corners=True)
            ys, xs = np.nonzero((big > 0.6 * grid.max())[0, 0].numpy())
            expected = [edge / 20 for edge in (xs.min(), ys.min(), xs.max(), ys.max())]
            assert [*points.min(axis=0), *points.max(axis=0)] == pytest.approx(expected, abs=0.5), index
            _, ends = np.unique(points.round(1), axis=0, return_counts=True)
            assert (ends % 2 == 0).mean() > 0.9  # closed: a segment's end is another one's beginning


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
        assert "at (5, 6), 50 pixels" in facts
        similar = [item.get_attribute("title") for item in select(page, "#similar button")]
        assert [Path(path).name for path in similar] == [f"{(index + step) % NUM_IMAGES:02d}.png" for step in STEPS]
        assert all(image.get_attribute("src").startswith("data:image/jpeg") for image in select(page, "#similar img"))
        press(page, "d")
        assert marks_of(page) == {name_of(1): "defect"}
        assert name_of(2) in one(page, "#detail-title").text
        press(page, "b", "z")
        assert marks_of(page) == {}
        press(page, Keys.ESCAPE)
        assert not one(page, "#detail").is_displayed()
        assert page.switch_to.active_element.accessible_name.startswith("Rank 2, score")

    def test_buttons(self, page):
        click(page, f"{FIRST} .open")
        for button, rank in [("next", 1), ("next", 2), ("back", 1)]:
            click(page, f"#detail-{button}")
            assert name_of(rank) in one(page, "#detail-title").text
        click(page, "#detail-marks button[data-mark=defect]")
        click(page, "#detail-undo")
        assert marks_of(page) == {}
        assert name_of(1) in one(page, "#detail-title").text

    def test_zoom_opacity_and_outline(self, page):
        click(page, f"{FIRST} .open")
        width = one(page, "#layers").rect["width"]
        press(page, "+", "+")
        stage, layers = one(page, "#stage").rect, one(page, "#layers").rect
        assert layers["width"] == pytest.approx(4 * width, rel=0.01)
        row, column = np.unravel_index(anomaly_map(RANKED[0]).argmax(), GRID)
        x = layers["x"] + column / (GRID[1] - 1) * layers["width"]
        assert stage["x"] <= x <= stage["x"] + stage["width"]  # the most anomalous place is still seen
        y = layers["y"] + row / (GRID[0] - 1) * layers["height"]
        assert stage["y"] <= y <= stage["y"] + stage["height"]
        press(page, "0")
        assert one(page, "#layers").rect["width"] == pytest.approx(width, rel=0.01)
        opacity = "return Number(getComputedStyle(document.querySelector('#layers canvas')).opacity)"
        assert page.execute_script(opacity) > 0
        page.execute_script("""const slider = document.getElementById("opacity"); slider.value = 85;
            slider.dispatchEvent(new Event("input"))""")
        assert page.execute_script(opacity) == 0.85
        press(page, "h")
        assert page.execute_script(opacity) == 0
        outline = "return document.querySelector('#layers .line').getAttribute('d')"
        assert page.execute_script(outline)
        press(page, "o")
        assert not page.execute_script(outline)

    def test_zoom_shows_the_original_of_a_large_image(self, browser, tmp_path):
        path = tmp_path / "it's 100 % ß.png"
        Image.new("RGB", (1200, 900), "olive").save(path)
        review = Review([Card(path, 1.0, anomaly_map(4))], THRESHOLD, RULE, "large")
        page = open_page(browser, tmp_path, review)
        click(page, f"{FIRST} .open")
        width = "return document.querySelector('#layers img').naturalWidth"
        assert page.execute_script(width) == 512
        press(page, "+")
        for _ in range(50):
            if page.execute_script(width) == 1200:
                break
            time.sleep(0.05)
        assert page.execute_script(width) == 1200

    def test_one_colour_scale_for_the_pool(self, page):
        """The hill of a low image is paler than that of the highest, by its value alone."""
        strongest = """const canvas = document.querySelector("#layers canvas"), data = canvas.getContext("2d")
            .getImageData(0, 0, canvas.width, canvas.height).data;
            let most = 0; for (let i = 3; i < data.length; i += 4) most = Math.max(most, data[i]); return most"""
        click(page, f"{FIRST} .open")
        assert page.execute_script(strongest) == 255
        one(page, "#detail-close").click()
        click(page, ".card[data-rank='29'] .open")
        maps = np.stack([anomaly_map(index) for index in range(NUM_IMAGES)])
        level = (SCORES[RANKED[29]] - np.median(maps)) / (maps.max() - np.median(maps))
        assert page.execute_script(strongest) == pytest.approx(255 * 1.6 * level, abs=4)

    def test_similar_image_is_a_click_or_a_held_key_away(self, page):
        from selenium.webdriver import ActionChains

        click(page, f"{FIRST} .open")
        picture = "return document.querySelector('#layers img').getAttribute('src')"
        own = page.execute_script(picture)
        sources = [image.get_attribute("src") for image in select(page, "#similar img")]
        ActionChains(page).key_down("2").perform()
        assert page.execute_script(picture) == sources[1] != own
        ActionChains(page).key_up("2").perform()
        assert page.execute_script(picture) == own
        select(page, "#similar button")[1].click()
        settle(page)
        assert f"{(RANKED[0] + STEPS[1]) % NUM_IMAGES:02d}.png" in one(page, "#detail-title").text


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
        assert page.switch_to.active_element.accessible_name.startswith("Rank 1, score 3.90")
        press(page, "d", Keys.ARROW_RIGHT, "g", Keys.ENTER)
        assert marks_of(page) == {name_of(0): "defect", name_of(2): "good"}
        assert one(page, "#detail").is_displayed()
        unnamed = """return [...document.querySelectorAll("button, input, select, [role=slider], a, main, dialog")]
            .filter((part) => !(part.getAttribute("aria-label") || part.getAttribute("aria-labelledby") ||
                part.textContent.trim() || part.labels?.length)).map((part) => part.outerHTML)"""
        assert page.execute_script(unnamed) == []

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
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        assert len(found) > 100
        for ink, ground, text in found:
            darker, lighter = sorted((luminance(ink), luminance(ground)))
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, text
        assert (luminance(found[0][1]) < 0.1) == (scheme == "dark")

    def test_fits_a_phone(self, page):
        metrics = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        try:
            page.refresh()
            assert page.execute_script("return document.documentElement.scrollWidth") == 360
            first = one(page, f"{FIRST} .open")
            assert first.rect["y"] < 740  # images are seen without scrolling
            first.click()
            assert page.execute_script("return document.documentElement.scrollWidth") == 360
            for button in select(page, "#detail-marks button"):
                assert button.rect["height"] >= 44
                assert 0 <= button.rect["y"] <= 740 - 44
        finally:
            page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def test_needs_no_network(self, page):
        click(page, f"{FIRST} .open")
        press(page, "+", "+")
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
        cards = [
            Card(f"/data/{index}.png", number - index, grid, image=jpeg.getvalue(), similar=[(index - 1) % number])
            for index in range(number)
        ]
        stale = tmp_path / "review_3.html"
        stale.write_text("of an earlier run")
        paths = write_review(tmp_path / "review.html", Review(cards, 1000.5, RULE, "large"))
        assert [path.name for path in paths] == ["review.html", "review_2.html"]
        assert not stale.exists()
        browser.get(paths[0].as_uri())
        assert len(shown(browser, ".name")) == 2000
        assert counts(browser) == (1003, 1000)  # of the pool, not of the page
        press(browser, "d")
        click(browser, f"{FIRST} .open")  # the image most like it is on the other page
        assert one(browser, "#similar img").get_attribute("src").startswith("data:image/jpeg")
        one(browser, "#detail-close").click()
        select(browser, "nav a")[1].click()
        assert shown(browser, ".name") == ["2000.png", "2001.png", "2002.png"]
        assert "1 defect" in one(browser, "#tally").text
        pool = json.loads(one(browser, "#pool").get_attribute("textContent"))
        assert (pool["first"], pool["last"]) == (2000, 2002)
