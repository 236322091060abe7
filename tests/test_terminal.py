"""What people see: the table of a result at several widths, the plan, progress with and without a terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from optimize.planning import Plan, Step
from optimize.progress_view import SECONDS_BETWEEN_LINES, Lines, View
from optimize.report.table import Table, summary
from optimize.terminal import duration, megabytes, plan_table, result_table

NASTY = "int8[red]\x1b[31m"


def drawn(renderable: RenderableType, width: int = 120, *, terminal: bool = False) -> str:
    text = io.StringIO()
    console = Console(
        file=text, width=width, force_terminal=terminal, color_system="standard" if terminal else None, markup=False
    )
    console.print(renderable)
    return text.getvalue()


def artifact(name: str, accuracy: float, latency: dict[int, float], size: int) -> dict[str, Any]:
    timed = [{"batch_size": b, "sequence_length": 128, "threads": 1, "p50_ms": p50} for b, p50 in latency.items()]
    scores = {"accuracy": {"value": accuracy, "ci": [0.8, 0.9], "n": 2559}, "latency": timed, "peak_memory_bytes": 1}
    return {"name": name, "digest": f"sha256:{name}", "size_bytes": size, "scores": scores}


def comparison(
    name: str, metric: str, estimate: float, ci: list[float | None], batch: int | None = None
) -> dict[str, Any]:
    setting = batch and f"batch_size={batch},sequence_length=128,threads=1"
    return {"artifact": name, "over": "teacher", "metric": metric, "estimate": estimate, "ci": ci, "setting": setting}


@pytest.fixture
def document() -> dict[str, Any]:
    return {
        "error": None,
        "verdict": "fail",
        "baseline": "sha256:teacher",
        "artifacts": [
            artifact("teacher", 0.832, {1: 12.13, 8: 88.4}, 90_900_000),
            artifact(NASTY, 0.8293, {1: 4.42, 8: 30.1}, 23_100_000),
        ],
        "comparisons": [
            comparison(NASTY, "accuracy", -0.0027, [-0.0101, 0.0039]),
            comparison(NASTY, "latency", 2.744, [2.66, 2.83], 1),
            comparison(NASTY, "latency", 2.94, [None, 3.02], 8),
            comparison(NASTY, "size", 0.254, [0.254, 0.254]),
        ],
        "gates": [{"artifact": NASTY, "verdict": verdict} for verdict in ("pass", "inconclusive")],
    }


@pytest.mark.parametrize(("width", "lines_an_artifact"), [(80, 3), (100, 2), (160, 1)])
def test_the_result_fits_the_width(document: dict[str, Any], width: int, lines_an_artifact: int) -> None:
    lines = drawn(result_table(document), width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) == 2 + 1 + lines_an_artifact
    text = " ".join(" ".join(lines).split())
    for shown in ("0.832", "-0.003", "4.42 ms", "2.74x", "[2.66, 2.83]", "[?, 3.02]", "90.9 MB", "0.25x", "baseline"):
        assert shown in text
    assert "p50, batch 1" in lines[0]
    assert "inconclusive" in text


def test_nothing_in_a_document_commands_the_terminal(document: dict[str, Any]) -> None:
    shown = drawn(result_table(document), terminal=True)
    assert "int8[red]" in shown
    assert "\x1b[31mm" not in shown
    assert "\N{REPLACEMENT CHARACTER}[31m" in shown


def test_a_run_that_ended_early_has_a_table_too(document: dict[str, Any]) -> None:
    for one in document["artifacts"]:
        one["scores"] = {}
    shown = drawn(result_table({**document, "baseline": None, "comparisons": [], "gates": []}))
    assert "teacher" in shown
    assert "90.9 MB" in shown
    assert drawn(result_table({**document, "artifacts": [], "comparisons": [], "gates": []}))


def test_settings_that_differ_in_length_are_told_apart(document: dict[str, Any]) -> None:
    for one in document["artifacts"]:
        first = one["scores"]["latency"][0]
        one["scores"]["latency"] = [first, {**first, "sequence_length": 64}]
    head = drawn(result_table(document), 160).splitlines()[0]
    assert "p50, batch 1, sequence 128" in head
    assert "p50, batch 1, sequence 64" in head


def test_a_language_model_shows_what_its_user_waits_for(document: dict[str, Any]) -> None:
    def timed(first: float, longer: float, rate: float) -> list[dict[str, Any]]:
        prompts = [
            {"phase": "prefill", "prompt_length": length, "threads": 1, "p50_ms": milliseconds}
            for length, milliseconds in ((128, first), (512, longer))
        ]
        at = {"phase": "decode", "prompt_length": 128, "new_tokens": 64, "threads": 1}
        return [*prompts, {**at, "p50_ms": 1e3 / rate, "tokens_per_second": rate}]

    slow, fast = document["artifacts"]
    slow["scores"]["latency"], fast["scores"]["latency"] = timed(412, 1700, 18.24), timed(206, 1500, 1824)
    settings = (
        "prompt_length=128,threads=1",
        "prompt_length=512,threads=1",
        "prompt_length=128,new_tokens=64,threads=1",
    )
    compared = zip(("prefill", "prefill", "decode"), settings, (2, 1.13, 100), strict=True)
    document["comparisons"] = [
        {**comparison(NASTY, metric, times, [times, times]), "setting": setting} for metric, setting, times in compared
    ]
    table = Table(document)
    assert table.headers[2:-2] == ["first token, prompt 128", "first token, prompt 512", "decode"]
    (_, before, _), (_, after, _) = table.rows()
    assert [cell.value for cell in before[1:-1]] == ["412.00 ms", "1700.00 ms", "18.2 tokens/s"]
    assert [cell.value for cell in after[1:-1]] == ["206.00 ms", "1500.00 ms", "1,824 tokens/s"]
    assert [cell.change for cell in after[1:-1]] == ["2.00x", "1.13x", "100.00x"]
    assert "18.2 tokens/s" in drawn(result_table(document))


def test_plan() -> None:
    steps = (
        Step("teacher", "distill.finetune", "CACHED", "reused", expected_seconds=0.0),
        Step(
            "int8", "quantize.int8", "RUN", "mode: static -> dynamic", expected_seconds=75.0, expected_bytes=23_100_000
        ),
    )
    shown = drawn(plan_table(Plan(None, steps)))  # type: ignore[arg-type]
    for text in ("CACHED", "RUN", "mode: static -> dynamic", "1:15", "23.1 MB", "quantize.int8"):
        assert text in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.041, "0.04 s"), (9.96, "10.0 s"), (59.94, "59.9 s"), (75.2, "1:15"), (3725, "1:02:05")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes() -> None:
    assert [megabytes(size) for size in (12_300, 90_900_000, 1_250_000_000)] == ["12.3 kB", "90.9 MB", "1.25 GB"]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_where_there_is_no_terminal() -> None:
    lines: list[str] = []
    clock = Clock()
    progress = Lines(lines.append, clock)
    progress.start("teacher", "distill.finetune")
    for step in range(100):
        progress.update("teacher", step, 100, f"step {step}")
        clock.now += 1.0
    progress.finish("teacher", seconds=98.2)
    progress.finish("onnx", seconds=0.01, cached=True)
    progress.warn("int8", "saturates")
    progress.fail("int8", "out of memory")
    assert lines[0] == "teacher: distill.finetune"
    assert lines[-4:] == [
        "teacher: done in 1:38",
        "onnx: reused",
        "int8: warning: saturates",
        "int8: failed: out of memory",
    ]
    between = lines[1:-4]
    assert len(between) == int(100 / SECONDS_BETWEEN_LINES)
    assert between[0] == "teacher: 15%, step 15, about 1:25 left"


@pytest.mark.parametrize("width", [80, 120])
def test_view_of_a_terminal(width: int) -> None:
    clock = Clock()
    view = View(clock)
    said: list[str] = []
    view.say = lambda text: said.append(text.plain)
    view.start("source")
    view.finish("source", seconds=0.1, cached=True)
    view.start("teacher", "distill.finetune")
    clock.now += 30
    view.update("teacher", 30, 100, f"loss {NASTY}")
    shown = drawn(view, width)
    assert "reused" in shown
    assert "30.0 s" in shown
    assert "about 1:10 left" in shown
    assert "\x1b" not in shown
    view.warn("teacher", NASTY)
    view.finish("teacher", seconds=98.2, text="epochs: 1 -> 2")
    view.start("scores")
    view.stop()
    lines = drawn(view, width).splitlines()
    assert [line.split()[1] for line in lines] == ["source", "teacher", "scores"]
    assert "done" in lines[1]
    assert "1:38" in lines[1]
    assert "stopped" in lines[2]
    assert max(map(len, lines)) <= width
    assert said == ["warning: teacher: int8[red]\N{REPLACEMENT CHARACTER}[31m"]


# --- in a notebook, and in one line -----------------------------------------------------------------------------------


def gate(name: str, verdict: str, reason: str, margin: float | None = 0.1) -> dict[str, Any]:
    return {"artifact": name, "verdict": verdict, "reason": reason, "margin": margin, "limit": {"max_ratio": 0.5}}


def test_html_has_no_markup_of_a_document(document: dict[str, Any]) -> None:
    document["artifacts"][1]["name"] = "<script>"
    document["artifacts"][1]["scores"]["accuracy"]["value"] = None
    document["comparisons"] = [
        comparison("<script>", "accuracy", -0.0027, [-0.0101, None]),
        comparison("<script>", "latency", 2.94, [None, 3.02], 8),
    ]
    document["gates"] = [gate("<script>", "fail", "<b>too big</b>")]
    shown = Table(document)._repr_html_()
    assert "<script>" not in shown
    assert "<b>" not in shown
    assert "?<br><small>-0.003 [-0.010, ?]</small>" in shown
    assert "2.94x [?, 3.02]" in shown
    assert "accuracy" in drawn(result_table(document))


def test_an_artifact_held_against_itself(document: dict[str, Any]) -> None:
    document["artifacts"][0]["name"], document["artifacts"][1]["name"] = "candidate", "baseline"
    for one in document["artifacts"]:
        one["digest"] = document["baseline"]
    document["comparisons"] = [{**comparison("candidate", "size", 1.0, [1.0, 1.0]), "over": "baseline"}]
    document["gates"] = []
    assert "1.00x" in drawn(result_table(document))


def test_a_confirmation_decides(document: dict[str, Any]) -> None:
    document["selected"] = f"sha256:{NASTY}"
    document["gates"] = [gate("other", "fail", "too big"), gate(NASTY, "pass", "small")]
    again = {"artifact": NASTY, "among": ["other", NASTY], "gates": [gate(NASTY, "inconclusive", "can't tell")]}
    document |= {"verdict": "inconclusive", "confirmation": again, "promoted": None}
    assert summary(document) == f"INCONCLUSIVE: {NASTY}: can't tell; nothing was promoted."
    assert [verdict for name, _, verdict in Table(document).rows() if name == NASTY] == ["inconclusive"]
    again["gates"] = [gate(NASTY, "pass", "small", None)]
    document["verdict"] = "pass"
    assert summary(document) == f"PASS: 1 gate check held; closest: {NASTY}: small."
