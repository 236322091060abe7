"""Files with a word a line, and tables that name no columns or close no quotes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimize import tasks
from optimize.data import Data, prepare
from optimize.errors import SourceError
from optimize.work import Work

SENTENCES = "-DOCSTART- -X- O O\n\nAda NNP B-NP B-PER\nleft VBD B-VP O\n\n \nLondon\tNNP B-NP B-LOC\n\n\n"
CONLLU = "# sent_id = 1\n1\tAda\tPROPN\n2\tleft\tVERB\n\n# sent_id = 2\n1\t#\tSYM\n"


@pytest.fixture
def rows(tmp_path: Path, work: Work) -> Callable[..., dict[str, list]]:
    def read(name: str, content: str, task: str = "token-classification", **config: Any) -> dict[str, list]:
        (tmp_path / name).write_text(content)
        chosen = tasks.get(task)
        data: Data = prepare(
            chosen.Data(source=f"./{name}", splits={"evaluation": 1}, shuffle=False, **config), chosen, work, tmp_path
        )
        return data.rows("evaluation").to_pydict()

    return read


@pytest.mark.parametrize("name", ["eng.conll", "eng.bio", "eng.iob"])
def test_words_of_a_run_of_lines_are_a_row(rows: Callable[..., dict[str, list]], name: str) -> None:
    found = rows(name, SENTENCES.replace("\t", " "))
    assert found == {"tokens": [["Ada", "left"], ["London"]], "label": [[1, 2], [0]]}  # B-LOC, B-PER, O


def test_other_columns_go_by_their_number(rows: Callable[..., dict[str, list]]) -> None:
    found = rows("eng.txt", SENTENCES.replace("\t", " "), format="conll", tags="1")
    assert found["label"] == [[0, 1], [0]]
    found = rows("eng.conll", CONLLU, tokens="1", tags="2")
    assert found == {"tokens": [["Ada", "left"], ["#"]], "label": [[0, 2], [1]]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Ada B-PER\nleft\n", "line 2 has 1 columns, not 2"),
        ("Ada\nleft\n", "line 1 has 1 columns"),
        ("\n\n", "no rows"),
    ],
)
def test_lines_that_differ_are_refused(rows: Callable[..., dict[str, list]], content: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        rows("eng.conll", content)


def test_columns_may_be_named_by_the_recipe_and_quotes_be_text(rows: Callable[..., dict[str, list]]) -> None:
    content = '5\t"What is a quote?\tA quote\n1\tdogs\tcats\tlicence\n'
    names = ["score", "text", "text_pair", "origin"]
    found = rows("sts.csv", content, "sentence-similarity", format="tsv", columns=names, quotes=False, score="score")
    assert found == {"text": ['"What is a quote?', "dogs"], "text_pair": ["A quote", "cats"], "label": [5.0, 1.0]}
