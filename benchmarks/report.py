"""How large is the page of a large run, how long does drawing it take, and how long does a browser take to open it?

    python benchmarks/report.py [--artifacts 12] [--rows 2000] [--repeat 5]

The run is made up (`tests/report/html/made.py`): every row is answered otherwise by every candidate, which is the worst
there can be. "Open" is the time from asking for the file to the end of layout and the first frame after it, in headless
Chromium, each time in a fresh context. Exits with 1 where a page has 3 MB or more, or the median takes 2 s or more.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "report" / "html"))

from made import made_run

from optimize.report.html import write

MOST_BYTES, MOST_SECONDS = 3_000_000, 2.0


def opening_times(page: Path, chromium: str, repeat: int) -> list[float]:
    """Seconds of each opening."""
    from playwright.sync_api import sync_playwright

    seconds = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(repeat):
            context = browser.new_context(viewport={"width": 1200, "height": 900})
            tab = context.new_page()
            began = time.perf_counter()
            tab.goto(page.as_uri(), wait_until="load")
            tab.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            seconds.append(time.perf_counter() - began)
            context.close()
        browser.close()
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--artifacts", type=int, default=12)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--repeat", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made_run(folder, candidates=asked.artifacts - 1, rows=asked.rows)
        began = time.perf_counter()
        page = write(folder)
        drawn = time.perf_counter() - began
        size = page.stat().st_size
        print(f"{asked.artifacts} artifacts, {asked.rows} rows: {size / 1e6:.2f} MB, drawn in {drawn:.2f} s")
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        if chromium is None:
            print("no chromium in the PATH: not opened")
            return int(size >= MOST_BYTES)
        seconds = opening_times(page, chromium, asked.repeat)
        median = statistics.median(seconds)
        print(f"opened in {median:.2f} s (median; {', '.join(f'{one:.2f}' for one in seconds)})")
    return int(size >= MOST_BYTES or median >= MOST_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
