"""Pages of the notebooks, as Markdown: cells and the outputs that are stored with them."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def notebooks(folder: Path) -> dict[str, str]:
    """A page for each notebook, in their order."""
    found = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.ipynb"))}
    return {f"notebooks/{path.stem}.md": "\n\n".join(_cells(notebook)) + "\n" for path, notebook in found.items()}


def _cells(notebook: Mapping[str, Any]) -> Iterator[str]:
    for cell in notebook["cells"]:
        source = _text(cell["source"])
        if cell["cell_type"] == "markdown":
            yield source
        elif cell["cell_type"] == "code" and source.strip():
            yield fenced(source, "python")
            yield from filter(None, map(_output, cell["outputs"]))


def _output(output: Mapping[str, Any]) -> str:
    """The richest form that needs no script."""
    if output["output_type"] == "stream":
        return fenced(_text(output["text"]), "text")
    data = output.get("data", {})
    for kind in ("image/png", "image/svg+xml"):
        if kind in data:
            coded = _text(data[kind]).replace("\n", "")
            if kind == "image/svg+xml":
                coded = base64.b64encode(_text(data[kind]).encode()).decode()
            return f'<img alt="{_alternative(data)}" src="data:{kind};base64,{coded}">'
    if "text/html" in data and "<script" not in _text(data["text/html"]):
        # A blank line would end the block of HTML.
        html = re.sub(r"\n\s*\n", "\n", _text(data["text/html"]).strip())
        return f'<div class="output">{html}</div>'
    return fenced(_text(data["text/plain"]), "text") if "text/plain" in data else ""


def _alternative(data: Mapping[str, Any]) -> str:
    return re.sub(r'[<>"&\n]', " ", _text(data.get("text/plain", "A picture")))


def fenced(text: str, language: str) -> str:
    """A fenced block, with a fence that does not stand in the text."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{fence}{language}\n{text.strip(chr(10))}\n{fence}"


def _text(lines: str | list[str]) -> str:
    return lines if isinstance(lines, str) else "".join(lines)
