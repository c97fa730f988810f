"""The page of an evaluation: what it shows, and that a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval.report.charts import line_chart, map_chart
from eval.report.figures import short_name
from eval.report.page import choose_queries
from eval.report.predictions import RETRIEVED
from eval.report.stored import read_evaluation
from eval.report.training_curves import training_curves
from launch.report_command import main
from tests.photos import jpeg
from tests.stored_evaluation import write_evaluation

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
BEFORE = [True, True, False, False, None, True]
AFTER = [True, False, True, False, None, True]
OUTCOMES = ["right", "harmed", "rescued", "wrong", "unlabelled", "right"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, names in (("queries", [f"q&{n}" for n in range(6)]), ("database", [str(n) for n in range(5)])):
        (folder / part).mkdir()
        for name in names:
            (folder / part / f"{name}.jpg").write_bytes(jpeg(rng))
    (folder / "database" / "4.jpg").write_bytes(b"damaged")
    return folder


def test_outcomes_and_choice(photos: Path, tmp_path: Path) -> None:
    found = read_evaluation(write_evaluation(tmp_path / "a", photos, BEFORE, AFTER)).found["town"]
    assert list(found.outcome.values()) == OUTCOMES
    assert found.hits(RETRIEVED).tolist() == [0, 0, 1, 1, 0]  # without the one that has no ground truth
    names = found.queries
    assert choose_queries(found, {}, 3) == [names[2], names[1], names[3]]
    other = read_evaluation(write_evaluation(tmp_path / "b", photos, BEFORE, [False, *AFTER[1:]])).found["town"]
    assert choose_queries(found, {"b": other}, 1) == [names[0]]
    assert choose_queries(found, {}, 0) == []


def test_the_page_says_what_was_found(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_evaluation(tmp_path / "a", photos, BEFORE, AFTER)
    assert main([str(folder)]) == 0
    assert f"written: {folder / 'page.html'}" in capsys.readouterr().out
    page = (folder / "page.html").read_text()
    assert "2 right, " not in page  # ORDER: rescued first
    assert "6 queries: 1 rescued, 1 harmed, 1 wrong, 1 unlabelled, 2 right." in page
    assert page.count("<article") == 6
    assert "25 m &lt;of&gt; &amp; each" in page
    assert "images/test/{database,queries}" in page
    assert "3 files were left out" in page
    assert "1 pictures could not be read, such as" in page
    assert "50 images/s" in page
    assert "rerankvpr eval &lt;x&gt;" in page
    assert '<a href="http://host/?a&amp;b"><code>' in page  # to be followed, not loaded
    assert not re.search(r'(?:src|<link [^>]*href)="(?!data:|#)', page)  # nothing is loaded


def test_two_evaluations_are_set_against_each_other(photos: Path, tmp_path: Path) -> None:
    one = write_evaluation(tmp_path / "a", photos, BEFORE, AFTER)
    other = write_evaluation(tmp_path / "b", photos, BEFORE, [True, True, True, False, None, False])
    assert main([str(one), str(other), "--out", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text()
    assert "1 won, 1 lost" in page
    assert "of 5 queries" in page
    assert len(re.findall('data-outcome="[a-z]+ differs"', page)) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no results", "holds no results.json; `rerankvpr eval"),
        ("no json", "results.json: not results of rerankvpr eval"),
        ("no number", "results.json: not results of rerankvpr eval .*recall_interval"),
        ("no name", "predictions.parquet: not predictions of rerankvpr eval .*rows without"),
        ("no parquet", "predictions.parquet"),
        ("other parquet", "predictions.parquet: not predictions of rerankvpr eval"),
    ],
)
def test_what_is_no_evaluation_is_one_line(damage: str, message: str, photos: Path, tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "a", photos, BEFORE, AFTER)
    match damage:
        case "no results":
            (folder / "results.json").unlink()
        case "no number":
            content = json.loads((folder / "results.json").read_text())
            content["results"][0]["recall_interval"] = {"1": ["low", "high"]}
            (folder / "results.json").write_text(json.dumps(content))
        case "no name":
            table = pq.read_table(folder / "predictions.parquet")
            unnamed = pa.nulls(len(table), pa.string())
            pq.write_table(table.set_column(2, "query", unnamed), folder / "predictions.parquet")
        case "no json":
            (folder / "results.json").write_text("[]")
        case "no parquet":
            (folder / "predictions.parquet").write_bytes(b"PAR1")
        case _:
            pq.write_table(pa.table({"x": [1]}), folder / "predictions.parquet")
    with pytest.raises(ValueError, match=message):
        main([str(folder)])


def test_recalls_of_one_benchmark_are_drawn_once_and_of_several_by_the_smallest_k(tmp_path: Path) -> None:
    def drawn(names: list[str]) -> list[str]:
        lines = [
            {
                "step": step,
                **{f"eval/{name}{kind}recall_{k}": 10 * k for name in names for kind in kinds for k in (1, 5)},
            }
            for step, kinds in ((0, ("", "reranked_")), (5, ("",)), (9, ("", "reranked_")))
        ]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (chart,) = training_curves(tmp_path / "metrics.jsonl")
        assert chart.count("<circle") == 5 * len(re.findall("retrieved<", chart))  # a mark for each validation
        return re.findall(r">([^<]*R@[^<]*)<", chart)

    assert drawn(["town/", ""]) == [f"R@{k} {stage}" for stage in ("retrieved", "re-ranked") for k in (1, 5)]
    several = [f"{name}, R@1 {stage}" for name in ("town", "port", "mean") for stage in ("retrieved", "re-ranked")]
    assert drawn(["town/", "port/", ""]) == several


def test_charts_of_little() -> None:
    assert line_chart({"a": ([1], [2])}, title="t", x="x", y="y") == ""
    flat = line_chart({"a": ([1, 2, 3], [5, float("nan"), 5])}, title="t", x="x", y="y")
    assert flat.count("<polyline") == 2
    assert "nan" not in flat
    assert map_chart({"database": np.zeros((1, 2))}, np.zeros((0, 4)), title="t") == ""
    points = {"database": np.array([[0.0, 0.0], [9.0, np.nan], [100.0, 50.0]])}
    drawn = map_chart(points, np.array([[0.0, 0.0, 100.0, 50.0]]), title="a <map>")
    assert "database: 2" in drawn
    assert "100 m across" in drawn
    assert "a &lt;map&gt;" in drawn


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_a_browser_shows_the_page(photos: Path, tmp_path: Path) -> None:
    """Pictures decode, nothing is logged to the console, the filter works by keyboard, 360 px are wide enough."""
    from playwright.sync_api import sync_playwright

    folder = write_evaluation(tmp_path / "a", photos, BEFORE, AFTER)
    assert main([str(folder)]) == 0
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 360, "height": 700}, offline=True)
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto((folder / "page.html").as_uri())
        pictures = page.locator("img")
        assert pictures.count() > 20
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt)")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.locator("input[value=all]").focus()
        page.keyboard.press("ArrowRight")
        assert page.locator("article:visible").count() == 1
        assert page.locator("article:visible h3").inner_text().startswith("rescued")
        assert page.locator("output").inner_text() == "1 of 6 shown"
        page.emulate_media(color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        browser.close()
    assert said == []


@pytest.mark.parametrize(("path", "short"), [("", ""), ("a.jpg", "a.jpg"), ("x/y/a.jpg", "y/a.jpg")])
def test_a_name_of_any_length_is_short(path: str, short: str) -> None:
    assert short_name(Path(path)) == short
