# SPDX-License-Identifier: Apache-2.0
"""The report of a benchmark, as one reads it."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from anomalib_musc.benchmark.charts import curves, histogram
from anomalib_musc.benchmark.gallery import MOST_IMAGES
from anomalib_musc.benchmark.published import published_rows
from anomalib_musc.benchmark.records import METRICS, Predictions, Record, Store
from anomalib_musc.benchmark.report import _ALL_CATEGORIES, write_report
from anomalib_musc.benchmark.summary import rows_of
from anomalib_musc.benchmark.tables import write_markdown

PAPER = "MuSc (CLIP ViT-L/14-336 518)"
DASH = "\N{EN DASH}"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A report's table rows: class, text and bold text of each cell; tags that do not match are an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.open, self.rows, self.text = html, [], [], ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append((dict(attrs).get("class"), [], []))
        if tag in {"td", "th"}:
            self.rows[-1][1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"style", "title"} & set(self.open):
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][1][-1] += data
        if "strong" in self.open:
            self.rows[-1][2].append(data)

    def row(self, name: str) -> tuple[str | None, list[str], list[str]]:
        """Return the first row that begins with a name."""
        return next(row for row in self.rows if row[1][0].startswith(name))


class Bench:
    """A benchmark of small pictures in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store, self.records = folder, Store(folder / "results"), []

    def images(self, category: str, count: int) -> list[str]:
        paths = [self.folder / category / "test" / f"{index:03d}.png" for index in range(count)]
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        for index, path in enumerate(paths):
            cv2.imwrite(str(path), np.random.default_rng(index).integers(0, 255, (60, 90, 3), np.uint8))
        return list(map(str, paths))

    def add(self, model, category="bottle", scores=(1, 2, 3, 4), *, dataset="bolts", labels=None, **changes):
        """Add a cell; ``changes`` are those of its record or of its predictions."""
        rng, count = np.random.default_rng(0), len(scores)
        given = {
            "paths": self.images(category, count),
            "labels": np.arange(count) >= count // 2 if labels is None else np.array(labels),
            "scores": np.array(scores, dtype=np.float32),
            "maps": rng.integers(0, 255, (count, 16, 16), np.uint8),
            "masks": rng.integers(0, 2, (count, 16, 16), np.uint8),
            "pro_curve": np.array([[0, 0.1, 0.3], [0, 0.6, 0.9]]),
        }
        given |= {name: changes.pop(name) for name in vars(Predictions([], *2 * [np.zeros(0)])) if name in changes}
        record = Record(f"cell{len(self.records)}", model, dataset, category, changes.pop("seed", 0), num_test=count)
        record.metrics, record.seconds = dict.fromkeys(METRICS, 0.9), {"setup": 1.0, "fit": 2.0, "test": 4.0}
        vars(record).update(changes)
        self.store.save(record, None if record.error else Predictions(**given))
        self.records.append(record)

    def report(self, title="Bolts") -> Page:
        path = self.folder / "report.html"
        write_report(path, title, rows_of(self.records), self.records, self.store)
        return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def metrics(value: float, **changes: float) -> dict[str, float]:
    return dict.fromkeys(METRICS, value) | changes


def gallery_order(page: Page) -> list[str]:
    return re.findall(r'alt="image test/(\d+)\.png"', page.html)


def test_best_measured_is_bold_and_nothing_published(bench):
    bench.add("A", dataset="MVTec AD", metrics=metrics(0.5, aupro=0.71))
    bench.add("B", dataset="MVTec AD", metrics=metrics(0.6, aupro=0.7))
    page = bench.report()
    assert page.row("A")[2] == ["71.0"]
    assert page.row("B")[2] == ["60.0"] * 7
    published = [row for row in page.rows if row[0] == "published"]
    assert len(published) == len(published_rows("MVTec AD"))
    assert all("published" in cells[0] and not bold for _, cells, bold in published)


def test_published_rows_say_where_they_are_from(bench):
    bench.add("A", dataset="MVTec AD")
    page = bench.report()
    _, cells, _ = page.row("DiAD")
    assert cells[1] == "97.2"
    assert cells[2] == cells[8] == DASH
    assert "multi-class one-class, 2023" in cells[0]
    assert cells[9] == "paper abstract"
    assert "Only 1 of the 15 categories of MVTec AD were run" in page.text


def test_every_published_aupro_says_how_it_was_computed(bench):
    bench.add("A", dataset="MVTec AD", metrics=metrics(0.5, aupro=0.9, aupro_official=0.8))
    page = bench.report()
    assert page.row("A")[1][7:9] == ["90.0", "80.0"]
    assert page.row(PAPER)[1][7:9] == [DASH, "93.8"]
    assert page.row("AnomalyCLIP")[1][7:9] == [DASH, "81.4"]
    assert page.row("WinCLIP")[1][7:9] == ["64.6 ?", DASH]
    write_markdown(bench.folder / "results.md", "Bolts", rows_of(bench.records), bench.records)
    text = (bench.folder / "results.md").read_text(encoding="utf-8")
    assert re.search(r"WinCLIP \(zero-shot.* \| 64.6 \? \| - \| \| \|\n", text)
    assert re.search(r"AnomalyCLIP.* \| - \| 81.4 \| \| \|\n", text)
    assert all("200 thresholds" in each for each in (page.text, text))


def test_published_rows_of_the_same_setting_stand_beneath(bench):
    bench.add("Ours", dataset="BTAD", setting=PAPER)
    bench.add("Other", dataset="BTAD")
    page = bench.report()
    names = [row[1][0] for row in page.rows if row[1][0].startswith(("Ours", "Other", "MuSc"))]
    assert names[0] == "Ours the setting is the paper's"
    assert names[1].startswith(f"{PAPER} published batch zero-shot, ICLR 2024")
    assert names[2] == "Other"
    assert names[3].startswith("MuSc (DINOv2")


def test_every_published_dataset_has_its_number_of_categories():
    assert all(published_rows(dataset) for dataset in _ALL_CATEGORIES)
    lines = (Path(__file__).parents[2] / "anomalib_musc/benchmark/published.csv").read_text().splitlines()[1:]
    assert {line.split(",")[3] for line in lines} == set(_ALL_CATEGORIES)


def test_a_dataset_without_published_rows_has_none(bench):
    bench.add("A")
    page = bench.report()
    assert "published" not in page.text.lower()
    assert "categories of" not in page.text


def test_whatever_users_named_is_escaped(bench):
    evil = '<script>alert("1")</script>&'
    bench.add(evil, category="a<b", dataset='c"><d', device="<i>", versions={"torch": "<2>"})
    bench.add("B", category="a<b", dataset='c"><d', error="<b>no</b>")
    page = bench.report(title=evil)
    assert "<script" not in page.html
    assert "<b>no" not in page.html
    for text in (evil, "a<b", 'c"><d', "<i>", "<2>", "<b>no</b>"):
        assert text in page.text


def test_gallery_begins_with_what_models_disagree_on(bench):
    bench.add("A", scores=[1, 2, 3, 4, 5])
    bench.add("B", scores=[20, 50, 30, 10, 55])  # percentiles differ by 1/3, 2/3; 1/2, 1 and 0
    page = bench.report()
    assert gallery_order(page) == ["003", "001", "002", "000", "004"]
    assert "in the order of disagreement" in page.text
    _, cells, _ = page.row("test/001")
    assert cells[2:] == ["rank 4 of 5", "rank 2 of 5"]


def test_gallery_of_one_model_begins_with_the_most_anomalous(bench):
    bench.add("A", scores=[3, float("nan"), 5, 4])
    page = bench.report()
    assert gallery_order(page) == ["002", "003", "000", "001"]
    assert "there is only one model" in page.text
    assert page.row("test/001")[1][2] == f"rank {DASH}"


def test_images_are_matched_by_path(bench):
    bench.add("A", scores=[1, 2, 3, 4])
    paths = bench.images("bottle", 4)
    fewer = {name: np.zeros((3, 16, 16), np.uint8) for name in ("maps", "masks")}
    bench.add("B", scores=[9, 8, 7], paths=paths[:0:-1], labels=[1, 1, 0], **fewer)
    page = bench.report()
    assert page.row("test/003")[1][2:] == ["rank 1 of 4", "rank 1 of 3"]
    assert page.row("test/001")[1][2:] == ["rank 3 of 4", "rank 3 of 3"]
    assert page.row("test/000")[1][2:] == ["rank 4 of 4", DASH]


def test_rscin_is_a_second_row_and_shares_the_heatmap(bench):
    rscin = {"seconds": 1.0, "metrics": {"image_auroc": 0.95}}
    bench.add("A", scores=[1, 2, 3, 4], rescored=np.array([1.0, 3, 2, 4]), rscin=rscin)
    page = bench.report()
    assert page.row("A + RsCIN")[1][1] == "95.0"
    assert page.row("test/001")[1][2] == "rank 3 of 4+ RsCIN 2 of 4"
    assert page.html.count('alt="heatmap of') == 4
    roc, pro = re.findall(r'aria-label="(ROC|PRO) curves on bottle of ([^"]+)"', page.html)
    assert (roc[1], pro[1]) == ("A, A + RsCIN", "A")


def test_failed_cells_are_listed_and_left_out(bench):
    bench.add("A")
    bench.add("A", category="cable", error="RuntimeError: no\nmemory")
    bench.add("B")
    bench.add("B", category="cable")
    page = bench.report()
    assert "A on cable, seed 0: RuntimeError: no\nmemory" in page.text
    assert "3 finished, 1 failed" in page.text
    means = page.html[page.html.index("Means over") : page.html.index("Each category")]
    assert 'scope="row">B<' in means
    assert 'scope="row">A<' not in means
    assert "heatmap of A for test" in page.html.split("<h4>cable")[0]
    assert "heatmap of A for test" not in page.html.split("<h4>cable")[1]


def test_all_failed(bench):
    bench.add("A", error="no", dataset="MVTec AD")
    page = bench.report()
    assert "No model finished all of its cells" in page.text
    assert "0 finished, 1 failed" in page.text
    assert "<img" not in page.html


def test_no_records(bench):
    assert "0 finished, 0 failed" in bench.report().text


def test_means_over_fewer_categories_do_not_compete(bench):
    for model in ("A", "B"):
        bench.add(model, category="bottle", metrics=metrics(0.6 if model == "A" else 0.5))
        bench.add(model, category="cable", metrics=metrics(0.5))
    bench.add("C", category="bottle", metrics=metrics(0.99))
    page = bench.report()
    assert page.row("C 1 of 2 categories")[2] == []
    assert page.row("A")[2] == ["55.0"] * 8


def test_without_masks_and_maps(bench):
    image_only = {name: 0.9 for name in METRICS if name.startswith("image")}
    bench.add("A", maps=None, masks=None, pro_curve=None, metrics=image_only)
    page = bench.report()
    assert "There is no PRO curve without masks" in page.text
    assert "pixel AUROC in percent" not in page.html
    assert page.row("A")[1][4:9] == [DASH] * 5
    assert page.row("test/000")[1][1:] == [DASH, f"{DASH}rank 4 of 4"]


@pytest.mark.parametrize("scores", [[2, 2, 2, 2], [float("nan")] * 4, [0, 1, float("inf"), 2], [1e30] * 4])
@pytest.mark.parametrize("labels", [None, [0, 0, 0, 0], [1, 1, 1, 1]])
def test_unusual_scores(scores, labels, bench):
    bench.add("A", scores=scores, labels=labels, metrics=metrics(float("nan")))
    bench.add("B", labels=labels)
    page = bench.report()
    assert not re.search(r"\bnan\b", re.sub(r"base64,[^\"]+", "", page.html), re.IGNORECASE)
    assert ("no ROC curve" in page.text) == (labels is not None)


def test_lost_and_broken_images_leave_a_place(bench):
    bench.add("A")
    Path(bench.images("bottle", 4)[0]).unlink()
    Path(bench.images("bottle", 1)[0]).write_text("not an image")
    Path(bench.store.predictions("cell0").paths[3]).unlink()
    page = bench.report()
    assert page.text.count("the image is gone") == 2
    assert page.html.count('alt="heatmap of') == 4


def test_deep_grey_images_are_not_white(bench):
    bench.add("A", scores=[1])
    path = bench.images("bottle", 1)[0]
    cv2.imwrite(path, np.tile(np.arange(0, 4000, 50, dtype=np.uint16), (80, 1)))
    page = bench.report()
    data = re.search(r'jpeg;base64,([^"]+)" alt="image', page.html).group(1)
    image = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_GRAYSCALE)
    assert image.min() < 20
    assert 100 < image.mean() < 150
    assert image.max() > 235


def test_of_several_seeds_the_first_is_shown(bench):
    for seed, auroc in ((7, 0.8), (8, 0.9)):
        bench.add("A", seed=seed, metrics=metrics(auroc), scores=[seed, 2, 3, 4])
    page = bench.report()
    assert "Charts and images are those of seed 7" in page.text
    assert "Figures of a category are means over seeds" in page.text
    assert page.row("bottle")[1][2] == "85.0 ±7.1"
    assert page.html.count("Image scores of A") == 1
    assert "scores of A: 2 normal and 2 anomalous images from 2 to 7" in page.html


def test_predictions_that_were_deleted(bench):
    bench.add("A")
    next(bench.store.folder.rglob("predictions.npz")).unlink()
    assert "There are no predictions" in bench.report().text


def test_long_tables_are_folded(bench):
    for category in "abcdefghijk":
        bench.add("A", category=category, scores=[1, 2])
    assert "<details><summary><h3>Each category" not in bench.report().html
    for category in "abcdefghijk":
        bench.add("B", category=category, scores=[1, 2])
    assert "<details><summary><h3>Each category" in bench.report().html


def test_is_one_small_file_that_loads_nothing(bench):
    for category in "abc":
        for model in "AB":
            bench.add(model, category=category, scores=range(30), dataset="MVTec AD")
    page = bench.report()
    links = re.findall(r'\b(?:src|href|data|xlink:href)="([^"]*)"|url\(([^)]*)\)|(@import)', page.html)
    assert {"".join(link)[:5] for link in links} == {"data:", "#data"}
    assert "<script" not in page.html
    assert "<link" not in page.html
    assert page.html.count('alt="image test/') == 3 * MOST_IMAGES
    assert (bench.folder / "report.html").stat().st_size < 1e6
    assert [path.name for path in bench.folder.glob("*.html")] == ["report.html"]


def test_reads_without_eyes(bench):
    bench.add("A")
    page = bench.report(title="Nuts & bolts")
    assert '<html lang="en">' in page.html
    assert "<title>Nuts &amp; bolts</title>" in page.html
    assert all('alt="' in tag for tag in re.findall(r"<img[^>]*>", page.html))
    assert all("aria-label=" in tag or "aria-hidden=" in tag for tag in re.findall(r"<svg[^>]*>", page.html))


def test_a_model_has_one_colour_everywhere(bench):
    bench.add("A", category="a")
    bench.add("B", category="b")
    page = bench.report()
    sections = page.html.split("<h4>")
    assert set(re.findall(r"model-\d", sections[1])) == {"model-0"}
    assert set(re.findall(r"model-\d", sections[2])) == {"model-1"}


def test_histogram_has_every_image_once():
    scores, labels = np.array([0.0, 0.0, 1.0, 1.0, 1.0]), np.array([0, 0, 1, 1, 0])
    chart = histogram("A", scores, labels, 0)
    heights = {kind: re.findall(rf'class="{kind}[^>]*height="([\d.]+)"', chart) for kind in ("normal", "bar")}
    assert heights == {"normal": ["62.0", "31.0"], "bar": ["62.0"]}


def test_long_curves_are_thinned_out():
    many = np.linspace(0, 0.3, 100_000)
    chart = curves("PRO", ("x", "y"), {"A": np.stack([many, many])}, {"A": 0}, longest=0.3)
    assert len(chart) < 20_000
    assert 'L348 182"' in chart
