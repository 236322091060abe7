"""The page in headless Chromium: what only a browser can tell."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made import made_run

from optimize.report.html import Result, write
from optimize.report.html.several import render as render_several

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium in the PATH")
TIMEOUT_MS = 120_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"], timeout=TIMEOUT_MS
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    made_run(folder, candidates=4, rows=40, say=lambda text: f"{text}<i>&")
    return write(folder)


@pytest.fixture(scope="module")
def several_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    results = [Result(made_run(folder / name, run=name), folder / name) for name in ("a", "b")]
    path = folder / "several.html"
    path.write_text(render_several(results, history="made"), encoding="utf-8")
    return path


class Tab:
    """A page with what its console said."""

    def __init__(self, browser: Any, path: Path, **how: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **how})
        self.context.set_default_timeout(TIMEOUT_MS)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


def test_it_opens_without_a_word_on_the_console_and_asks_for_nothing(browser: Any, page_file: Path) -> None:
    with Tab(browser, page_file) as tab:
        assert tab.said == []
        assert [url for url in tab.requests if url != page_file.as_uri() and not url.startswith("data:")] == []
        pictures = tab.page.locator("svg[role=img]")
        boxes = [pictures.nth(i).bounding_box() for i in range(pictures.count())]
        assert len(boxes) >= 12
        assert all(box and box["width"] > 200 and box["height"] > 20 for box in boxes)
        assert tab.page.locator("i").count() == 0  # what the data said is text
        # The patterns that tell marks apart without colour are found.
        fills = tab.page.eval_on_selector_all(
            ".step.better, .ridge.control", "all => all.map(e => getComputedStyle(e).fill)"
        )
        assert any("stripes" in fill for fill in fills)


def test_an_injected_script_would_not_run(browser: Any, page_file: Path, tmp_path: Path) -> None:
    attacked = tmp_path / "attacked.html"
    page = page_file.read_text(encoding="utf-8")
    attack = "<img src=x onerror='document.title=1'><script>document.title=2</script>"
    attacked.write_text(page.replace("<main", attack + "<main", 1), encoding="utf-8")
    with Tab(browser, attacked) as tab:
        assert tab.page.title() not in ("1", "2")
        assert any("Content Security Policy" in line for line in tab.said)


def test_rows_filter_and_sort(browser: Any, page_file: Path) -> None:
    with Tab(browser, page_file) as tab:
        page = tab.page
        rows = page.locator("#changed tbody tr")
        assert rows.count() == 40
        assert page.locator("#count").inner_text() == "40 of 40 rows"
        page.locator("[name=text]").fill("NO SUCH TEXT")
        assert page.locator("#count").inner_text() == "0 of 40 rows"
        first = rows.nth(7).locator("td").nth(1).text_content().strip()
        page.locator("[name=text]").fill(first.upper())
        shown = page.locator("#changed tbody tr:not([hidden])")
        assert 1 <= shown.count() < 40
        assert all(first in text for text in shown.all_text_contents())
        page.locator("[name=text]").fill("")
        page.locator("[name=kind]").select_option("lost")
        assert page.locator("#changed tbody tr:not([hidden])").count() == rows.count()
        page.locator("[name=of]").select_option("3")
        assert page.locator("#count").inner_text() == "40 of 40 rows"
        page.locator("[name=order]").select_option("row")
        numbers = [int(text) for text in page.locator("#changed tbody tr td:first-child").all_text_contents()]
        assert numbers == sorted(numbers)


def test_without_javascript_everything_can_be_read(browser: Any, page_file: Path) -> None:
    with Tab(browser, page_file, java_script_enabled=False) as tab:
        assert tab.page.locator("#changed tbody tr").count() == 40
        assert tab.page.locator("#changed tbody tr").last.is_visible()
        assert not tab.page.locator("#filters").is_visible()


@pytest.mark.parametrize("width", [320, 390, 800])
def test_a_phone_never_scrolls_sideways(browser: Any, page_file: Path, several_file: Path, width: int) -> None:
    for path in (page_file, several_file):
        with Tab(browser, path, viewport={"width": width, "height": 800}) as tab:
            assert tab.page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Any, page_file: Path, several_file: Path, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    for path in (page_file, several_file):
        with Tab(browser, path, color_scheme=scheme) as tab:
            tab.page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
            found = Axe().run(tab.page)
            assert found.violations_count == 0, found.generate_report()


def test_it_prints(browser: Any, page_file: Path) -> None:
    with Tab(browser, page_file) as tab:
        tab.page.emulate_media(media="print")
        assert not tab.page.locator("#filters").is_visible()
        assert tab.page.pdf().startswith(b"%PDF")
