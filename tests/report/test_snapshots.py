"""What CI shows of each way a run can end, held by files. `REWRITE=1 pytest tests/report` writes them anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ci_examples import EXAMPLES

from optimize.report.github import annotate, outputs, step_summary
from optimize.report.gitlab import code_quality, note
from optimize.report.junit import junit
from optimize.report.markdown import comment

SNAPSHOTS = Path(__file__).parent / "snapshots"
DRAWN = {
    "comment.md": comment,
    "junit.xml": junit,
    "annotations.txt": annotate,
    "codequality.json": code_quality,
    "output.txt": lambda document: outputs(document, Path("runs/1") if "run" in document else None),
}


@pytest.mark.parametrize("file", DRAWN)
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_result_is_drawn_as_it_was(name: str, file: str) -> None:
    drawn = DRAWN[file]({"error": None, **EXAMPLES[name]()})
    snapshot = SNAPSHOTS / f"{name}.{file}"
    if os.environ.get("REWRITE"):
        snapshot.parent.mkdir(exist_ok=True)
        snapshot.write_text(drawn, encoding="utf-8")
    assert drawn == snapshot.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", EXAMPLES)
def test_summary_and_note_are_the_comment_where_there_is_room(name: str) -> None:
    document = EXAMPLES[name]()
    assert step_summary(document) == note(document) == comment(document)


def test_every_snapshot_is_one_of_these() -> None:
    assert {path.name for path in SNAPSHOTS.iterdir()} == {f"{name}.{file}" for name in EXAMPLES for file in DRAWN}
