"""The page in a real browser, at the width of a phone and of a desk, in light and in dark."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.reports.render import as_html, as_markdown
from app.reports.report import make_report
from tests.support.browser import chromium, show
from tests.support.run_folders import make_run, write_benchmark, write_evaluation, write_lens

pytestmark = pytest.mark.extras

_OVER = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    folders = [str(make_run(root / f"a_run_with_a_rather_long_name_{idx}", shift=0.1 * idx)) for idx in range(4)]
    for folder in map(Path, folders):
        write_benchmark(folder / "benchmark.json", model="/a/long/path/of/a/model/" + 20 * "deep/")
        write_evaluation(folder / "evaluation.json", model="m")
        write_lens(folder / "lens.json", model="m")
    report = make_report(folders)
    (root / "report.html").write_text(as_html(report))
    for name, text in as_markdown(report, stem="r").items():
        (root / name).write_text(text)
    return root / "report.html"


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_runs_over_the_edge_and_nothing_is_loaded(width: int, scheme: str, browser: Any, page: Path) -> None:
    show(browser, page, width=width, scheme=scheme)
    assert browser.execute_script(_OVER) == 0
    hidden = """return [...document.querySelectorAll(".chart text")].map(text => [text, text.closest("svg")]).filter(
        ([text, svg]) => text.getBoundingClientRect().right > svg.getBoundingClientRect().right + 1
    ).map(([text]) => text.textContent)"""
    assert browser.execute_script(hidden) == []
    # A text is drawn at 10 pixels at least.
    small = """return Math.min(...[...document.querySelectorAll(".chart")].map(
        svg => 12 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width))"""
    assert browser.execute_script(small) > 9.5
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 3 * 128) == (scheme == "dark")
    requested = {
        match
        for entry in browser.get_log("performance")
        for match in re.findall(r'"requestWillBeSent".*?"url":"([^"]+)"', entry["message"])
    }
    assert requested <= {page.as_uri()}
    assert browser.get_log("browser") == []


def test_nothing_runs_over_the_edge_of_paper(browser: Any, page: Path) -> None:
    show(browser, page, width=718, height=1000, media="print")  # A4 within its margins
    assert browser.execute_script(_OVER) == 0
    # Where no header is the name of a run, no word of a header is broken.
    broken = """return [...document.querySelectorAll(".figures thead")].filter(
        head => !head.textContent.includes("a_run")).flatMap(head => [...head.querySelectorAll("th")]).flatMap(
        ({ firstChild: text }) => [...text.textContent.matchAll(/[^\\s-]+/g)].filter(({ 0: word, index }) => {
            const range = document.createRange();
            range.setStart(text, index);
            range.setEnd(text, index + word.length);
            return new Set([...range.getClientRects()].map(({ top }) => top)).size > 1;
        }).map(([word]) => word))"""
    assert browser.execute_script(broken) == []


def test_pictures_of_the_markdown_load(browser: Any, page: Path) -> None:
    names = re.findall(r"\]\((\S+\.svg)\)", page.with_name("r.md").read_text())
    page.with_name("pictures.html").write_text("".join(f'<img src="{name}">' for name in names))
    browser.get(page.with_name("pictures.html").as_uri())
    script = "return [...document.images].map(image => image.complete && image.naturalWidth > 100)"
    assert browser.execute_script(script) == [True] * len(names)
    assert len(names) > 8
