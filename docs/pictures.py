"""The pictures of the README, made from a finished run: what the terminal shows, and the report beside it.

    python docs/pictures.py .optimize/runs/RUN

writes `docs/pictures/terminal-light.svg` and `terminal-dark.svg` from the folder's run.json, and `report-light.png` and
`report-dark.png` from its report.html, which a Chromium opens (`--chromium`, by default the one that is found).
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, SVG_EXPORT_THEME
from rich.text import Text

from optimize.report.table import summary
from optimize.terminal import result_table, safe

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
THEMES = {"light": DEFAULT_TERMINAL_THEME, "dark": SVG_EXPORT_THEME}
COLUMNS = 104
WIDTH = 1200
SHOWN = "trade"
"""The one section of the report that is shown below its head; the whole page would be as long as this README."""
COLOURS = 128


def terminal(document: Mapping[str, Any], theme: str) -> str:
    """An SVG of what `optimize apply` prints at its end. Its letters are the reader's own: nothing is fetched."""
    screen = Console(file=io.StringIO(), record=True, width=COLUMNS, force_terminal=True, color_system="truecolor")
    screen.print(Text(f"$ optimize apply {_recipe(document)}", "bold"))
    screen.print()
    screen.print(result_table(document))
    screen.print()
    screen.print(safe(summary(document)))
    drawn = screen.export_svg(title=str(document["recipe"]), theme=THEMES[theme], unique_id=f"terminal-{theme}")
    drawn = re.sub(r"\s*@font-face \{.*?\}", "", drawn, flags=re.DOTALL)
    drawn = drawn.replace("Fira Code", "ui-monospace, SFMono-Regular, Menlo, Consolas")
    drawn = drawn.replace("rgba(255,255,255,0.35)", "rgba(128,128,128,0.5)")  # a frame that is seen on white
    return "\n".join(line.rstrip() for line in drawn.splitlines() if line.strip()) + "\n"


def _recipe(document: Mapping[str, Any]) -> str:
    """The file of recipes/ that a run was made from."""
    from optimize.recipe.reader import read

    paths = sorted((ROOT / "recipes").glob("*.yaml"))
    named = [path for path in paths if read(path).value["name"] == document["recipe"]]
    return f"recipes/{named[0].name}" if named else "recipe.yaml"


def report(page: Path, theme: str, chromium: str) -> bytes:
    """A PNG of a report's head and of the section `SHOWN`, in few colours so that it is small."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = {"width": WIDTH, "height": 400}
        opened = browser.new_page(viewport=view, color_scheme=theme, reduced_motion="reduce")  # type: ignore[arg-type]
        opened.goto(page.absolute().as_uri())
        others = opened.locator(f"section:not([aria-labelledby={SHOWN}])")
        if opened.locator(f"section[aria-labelledby={SHOWN}]").count():
            others.evaluate_all("sections => sections.forEach(section => section.remove())")
        taken = opened.screenshot(full_page=True)
        browser.close()
    small = io.BytesIO()
    Image.open(io.BytesIO(taken)).convert("RGB").quantize(COLOURS).save(small, "PNG", optimize=True)
    return small.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    parser.add_argument("--to", type=Path, default=PICTURES, help="where the pictures go")
    asked = parser.parse_args()
    document = json.loads((asked.run / "run.json").read_text(encoding="utf-8"))
    asked.to.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        (asked.to / f"terminal-{theme}.svg").write_text(terminal(document, theme), encoding="utf-8")
    page = asked.run / "report.html"
    if not page.exists():
        parser.exit(0, f"{page} is not there: only the terminal was drawn\n")
    if not asked.chromium:
        parser.exit(2, "no Chromium was found: name one with --chromium\n")
    for theme in THEMES:
        (asked.to / f"report-{theme}.png").write_bytes(report(page, theme, asked.chromium))


if __name__ == "__main__":
    main()
