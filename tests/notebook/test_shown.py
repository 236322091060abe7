"""Plans, artifacts, models and runs as a notebook shows them: text and HTML, escaped."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from results import NASTY

import optimize
from optimize.artifact import Artifact
from optimize.model import Model
from optimize.notebook.layer_table import LayerTable
from optimize.planning import Plan, Step
from optimize.run import Run
from optimize.work import Work


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)


def check(shown: Any, *words: str) -> None:
    bundle = shown._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"}
    for text in bundle.values():
        assert all(word in text for word in words)
        assert "\x1b" not in text
    assert Tags(bundle["text/html"]).seen <= {"table", "thead", "tbody", "tr", "th", "td", "p", "small", "br", "div"}
    assert Tags(bundle["text/html"]).seen


def test_a_plan() -> None:
    steps = (
        Step("source", "source", "CACHED", "reused"),
        Step(NASTY, "quantize.int8", "RUN", f"mode: {NASTY}", expected_seconds=75.0, expected_bytes=23_000_000),
    )
    check(Plan(None, steps), "quantize.int8", "RUN", "CACHED", "1:15", "23.0 MB")  # type: ignore[arg-type]


def test_an_artifact_and_a_model(pico_source: Artifact) -> None:
    check(pico_source, "text-classification", "model.safetensors", "transformers", pico_source.digest[:19])
    scores = {"accuracy": {"value": 0.75, "ci": [0.7, None]}, "latency": []}
    check(Model(pico_source, name=NASTY, scores=scores), "0.7500 [0.7000, ?]")


def test_a_run_and_its_table(document: dict[str, Any], tmp_path: Path) -> None:
    run = Run(document, tmp_path, Work(tmp_path))
    check(run, "teacher", "0.800", "inconclusive")
    check(run.table(), "teacher", "90.0 MB")


def test_a_table_of_layers_shows_the_beginning_and_the_end() -> None:
    table = LayerTable([{"name": f"{NASTY}{i}", "error": 0.12345678} for i in range(40)], "GPTQ")
    check(table, "GPTQ: 40 layers", "0.1235", "...")
    assert len(table._repr_mimebundle_()["text/plain"].splitlines()) == 1 + 1 + 17
    assert table == [{"name": f"{NASTY}{i}", "error": 0.12345678} for i in range(40)]


def test_a_mistake_is_a_message_and_no_traceback() -> None:
    error = optimize.StageError(f"no {NASTY}", stage="int8", hint="try this")
    (shown,) = error._render_traceback_()
    assert shown.startswith("StageError: int8: no int8<script>")
    assert shown.endswith("try: try this")
    assert "\x1b" not in shown


@pytest.mark.parametrize("name", ["artifacts", "comparisons", "gates"])
def test_frames_of_a_run(name: str, document: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    assert len(getattr(Run(document, tmp_path, Work(tmp_path)), name)) == len(document[name])


def test_plots_of_a_run(document: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = Run(document, tmp_path, Work(tmp_path))
    assert "5 ms" in repr(run.plot())
    saved = run.plot("waterfall", artifact="onnx").save(tmp_path / "picture.svg")
    assert "<svg" in saved.read_text()
    with pytest.raises(optimize.OptimizeError, match="no picture 'pie'"):
        run.plot("pie")
