# SPDX-License-Identifier: Apache-2.0
"""What a person takes away from the review page: marks, files, and the threshold that fits them."""

import csv
import io

import numpy as np
import pandas as pd
import pytest
from anomalib.data import Tabular
from anomalib.engine import Engine
from anomalib.models import Patchcore
from browser import click, download, one, press, select, settle
from review_pool import (
    ARGUMENT,
    NUM_IMAGES,
    RANKED,
    SCORES,
    THRESHOLD,
    counts,
    drag_to,
    make_review,
    mark,
    marks_of,
    name_of,
    open_page,
    shown,
    threshold_of,
)
from sklearn.metrics import f1_score, precision_score, recall_score


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


class TestExports:
    def test_hold_what_was_marked(self, page, downloads, review):
        press(page, *"gdudgg", "b", "b", "g")
        mark(page, NUM_IMAGES - 1, "unsure")
        kinds = {0: "good", 1: "defect", 2: "unsure", 3: "defect", 5: "good", NUM_IMAGES - 1: "unsure"}
        marks = {name_of(rank): kind for rank, kind in kinds.items()}
        assert marks_of(page) == marks
        content = download(page, downloads, "#export-marks")
        assert content.startswith(b"\xef\xbb\xbf")  # spreadsheets take it for UTF-8
        rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"))))
        assert [row["mark"] for row in rows] == list(marks.values())
        for row in rows:
            card = review.cards[RANKED[int(row["rank"]) - 1]]
            assert row["path"] == str(card.path)
            assert float(row["score"]) == card.score
            assert row["label"] == ("anomalous" if card.score > THRESHOLD else "normal")

    def test_anomalib_trains_patchcore_on_the_list(self, page, downloads, tmp_path, review):
        press(page, *"ddddu")
        lowest = range(NUM_IMAGES - 8, NUM_IMAGES)
        for rank in lowest:
            mark(page, rank, "good")
        file = tmp_path / "list.csv"
        file.write_bytes(download(page, downloads, "#export-list"))
        good = {str(review.cards[RANKED[rank]].path) for rank in lowest}
        listed = pd.read_csv(file)
        assert set(listed.image_path[listed.label_index == 0]) == good
        assert set(listed.image_path[listed.label_index == 1]) == {str(review.cards[i].path) for i in RANKED[:4]}
        datamodule = Tabular.from_file("bolts", file, num_workers=0, normal_split_ratio=0.25, seed=0)
        model = Patchcore(backbone="resnet18", layers=["layer1"], pre_trained=False, coreset_sampling_ratio=0.01)
        engine = Engine(default_root_dir=tmp_path / "results", accelerator="cpu", enable_progress_bar=False)
        engine.fit(model, datamodule=datamodule)
        assert len(model.model.memory_bank)
        train = set(datamodule.train_data.samples.image_path)
        assert train
        assert train <= good

    @pytest.mark.parametrize("kind", ["good", "defect"])
    def test_list_of_one_kind_is_read(self, page, downloads, tmp_path, review, kind):
        for rank in (2, 5, 9, 11, 20):
            mark(page, rank, kind)
        file = tmp_path / "list.csv"
        file.write_bytes(download(page, downloads, "#export-list"))
        listed = pd.read_csv(file)
        assert set(listed.image_path) == {str(review.cards[RANKED[rank]].path) for rank in (2, 5, 9, 11, 20)}
        assert set(listed.split) == {"train" if kind == "good" else "test"}


class TestFit:
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
        f1 = [f1_score(truth, marked > cut) for cut in (marked[1:] + marked[:-1]) / 2]
        assert f1_score(truth, marked > best) == max(f1)
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
        # F1 is 1/2 where only the first defect is flagged, and where the first two are; less everywhere else
        press(page, *"dgggd", *"nnnn", *"gggggd", *"ggggggggg")
        last, first = SCORES[RANKED[4]], SCORES[RANKED[9]]
        best = float(select(page, "#fit tbody tr")[0].text.split()[-1])
        assert best == pytest.approx((last + first) / 2, abs=0.06)
        assert first < best < last


HOSTILE = {
    0: "\"quoted\" 'name'.png",
    1: "<script>window.harmed = 1<script>.png",
    2: "<img src=x onerror=window.harmed=1>.png",
    3: "Schraube größer ß 螺丝.png",
    4: "100%25 %s {{ 7*7 }} &amp;.png",
    5: "comma, new\nline.png",
    6: "=1+1.png",
    7: "bytes_\udce4.png",  # no UTF-8
}


class TestHostileNames:
    def test_are_harmless_and_come_out_as_they_went_in(self, browser, tmp_path, downloads):
        folder = tmp_path / 'it\'s <b>"100 %" größe'
        review = make_review(folder, HOSTILE, name="</script><script>window.harmed=1</script>", rule="<b>bold</b>")
        page = open_page(browser, tmp_path, review)
        names = shown(page, ".name")
        for index, name in {**HOSTILE, 7: "bytes_\\udce4.png"}.items():
            assert names[RANKED.index(index)] == name
            mark(page, RANKED.index(index), "good")
        assert "</script>" in one(page, "h1").text
        rows = csv.DictReader(io.StringIO(download(page, downloads, "#export-marks").decode("utf-8-sig"), newline=""))
        paths = {index: str(review.cards[index].path) for index in HOSTILE}
        assert {row["path"] for row in rows} == {path.replace("\udce4", "\\udce4") for path in paths.values()}
        file = tmp_path / "list.csv"
        file.write_bytes(download(page, downloads, "#export-list"))
        assert "1 left out" in one(page, "#toast").text
        datamodule = Tabular.from_file("bolts", file, num_workers=0)
        datamodule.setup()
        listed = {*datamodule.train_data.samples.image_path, *datamodule.test_data.samples.image_path}
        assert listed == {path for index, path in paths.items() if index != 7}
        click(page, ".card[data-rank='0'] .open")
        press(page, *"nnnn")
        assert page.execute_script("return window.harmed") is None
