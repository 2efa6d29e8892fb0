"""The pages in a real browser: they sort, follow links and fit a phone, with and without JavaScript."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e88.report.page import write_page
from e88.report.study_page import report_study

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Any]:
    """Open a page at a width; whatever its console says, and any request but for itself, fails the test."""
    said: list[str] = []

    def go(path: Path, width: int = 1280, **options: Any) -> Any:
        page = chromium.new_context(viewport={"width": width, "height": 800}, **options).new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: request.url.startswith(path.as_uri()) or said.append(request.url))
        page.goto(path.as_uri())
        return page

    yield go
    for context in chromium.contexts:
        context.close()
    assert said == []


@pytest.fixture
def page_path(study_store: Any) -> Path:
    became = {("w16", 2): "failed", ("w24", 1): "diverged"}
    experiment, store = study_store(lambda model, budget, seed: became.get((model, seed), "done"))
    return Path(report_study(experiment, store)[1])


def column(page: Any, table: str, title: str) -> list[str]:
    heads = page.locator(f"{table} thead th").all_inner_texts()
    index = next(i for i, head in enumerate(heads) if head.startswith(title))
    return list(page.locator(f"{table} tbody tr > :nth-child({index + 1})").all_inner_texts())


def size(text: str) -> float:
    return float(text.rstrip("K")) * (1000 if text.endswith("K") else 1)


def test_a_click_on_a_header_sorts(visit: Any, page_path: Path) -> None:
    page = visit(page_path)
    table = "#comparison-1 .results"
    before = column(page, table, "Params")
    button = page.locator(f"{table} thead button", has_text="Params")
    button.click()
    sizes = list(map(size, column(page, table, "Params")))
    assert sizes == sorted(sizes) and column(page, table, "Params") != before
    assert page.locator(f"{table} th[aria-sort=ascending]").inner_text().startswith("Params")
    button.focus()
    page.keyboard.press("Enter")
    assert list(map(size, column(page, table, "Params"))) == sorted(sizes, reverse=True)
    # What is unknown stays last, whichever way.
    page.locator("#claims thead button", has_text="Difference").click()
    assert column(page, "#claims .results", "Difference")[-1] == "–"


def test_a_claim_leads_to_its_run(visit: Any, page_path: Path) -> None:
    page = visit(page_path)
    claim = page.locator("#claim-rival")
    claim.locator("summary").click()
    link = claim.locator("a.done").first
    target = link.get_attribute("href")
    link.click()
    entry = page.locator(target)
    assert entry.evaluate("node => node.open")
    assert entry.get_by_text("environment", exact=True).is_visible()
    assert entry.get_by_text("commit", exact=True).is_visible() and "0f92853aa01b" in entry.inner_text()
    box = entry.bounding_box()
    assert 0 <= box["y"] < 800
    # Opened by its address, it is open as well.
    again = visit(page_path)
    again.goto(page_path.as_uri() + target)
    assert again.locator(target).evaluate("node => node.open")


@pytest.mark.parametrize("width", [320, 360, 390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_sideways_scroll(visit: Any, page_path: Path, width: int, scheme: str) -> None:
    page = visit(page_path, width, color_scheme=scheme)
    page.evaluate("for (const item of document.querySelectorAll('details')) item.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # The wide table scrolls inside its own box.
    box = page.locator("#comparison-1 .scroll").first
    assert width > 1000 or box.evaluate("node => node.scrollWidth > node.clientWidth")
    paper = box.evaluate("node => getComputedStyle(node).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(15, 20, 27)")


def test_labels_keep_inside_their_figures_and_apart(visit: Any, page_path: Path) -> None:
    for width in (360, 1280):
        page = visit(page_path, width)
        outside = page.evaluate(
            """() => [...document.querySelectorAll("svg.fig")].flatMap(fig => {
                const box = fig.getBoundingClientRect();
                return [...fig.querySelectorAll("text")].filter(text => {
                    const own = text.getBoundingClientRect();
                    return own.left < box.left - 1 || own.right > box.right + 1 || own.bottom > box.bottom + 1;
                }).map(text => text.textContent);
            })"""
        )
        overlapping = page.evaluate(
            """() => [...document.querySelectorAll("svg.fig")].flatMap(fig => {
                const boxes = [...fig.querySelectorAll("text")].map(t => [t.getBoundingClientRect(), t.textContent]);
                return boxes.flatMap(([a, one], i) => boxes.slice(i + 1)
                    .filter(([b]) => a.left < b.right - 2 && b.left < a.right - 2
                                     && a.top < b.bottom - 3 && b.top < a.bottom - 3)
                    .map(([, other]) => one + " / " + other));
            })"""
        )
        assert outside == [] and overlapping == []


def test_without_javascript_the_page_says_the_same(visit: Any, page_path: Path) -> None:
    plain = visit(page_path, java_script_enabled=False)
    full = visit(page_path)
    assert plain.locator("main").inner_text() == full.locator("main").inner_text()
    entry = plain.locator("details.run").first
    entry.locator("summary").click()
    assert entry.get_by_text("environment", exact=True).is_visible()


def test_the_page_of_a_bench_is_as_good(visit: Any, study: list[dict[str, Any]], tmp_path: Path) -> None:
    path = write_page(study, tmp_path / "report.html")
    assert visit(path, 360).evaluate("document.documentElement.scrollWidth") <= 360
    page = visit(path)
    page.locator("thead button", has_text="Tok/s").first.click()
    failed = page.locator("a.failed").first
    failed.click()
    assert page.locator(failed.get_attribute("href")).get_by_text("out of memory").first.is_visible()
