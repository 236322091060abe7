"""Running texts: what their lines are, how they are shared out, and which repeats count."""

from __future__ import annotations

import bz2
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimize import tasks
from optimize.data import Data, prepare
from optimize.errors import SourceError
from optimize.work import Work

TASK = tasks.get("causal-lm")
Prepare = Callable[..., Data]


@pytest.fixture
def run(work: Work, tmp_path: Path) -> Prepare:
    def run(**config: Any) -> Data:
        return prepare(TASK.Data.model_validate(config), TASK, work, tmp_path)

    return run


def article(seed: int, lines: int = 6) -> str:
    """A heading, empty lines and lines of about 110 characters, as in WikiText."""
    rng = random.Random(seed)
    words = [" ".join("".join(rng.choices("abcdefgh", k=5)) for _ in range(18)) for _ in range(lines)]
    return "\n".join(["", " = Heading = ", "", *words])


def corpus(*seeds: int) -> str:
    return "\n".join(map(article, seeds)) + "\n"


def text(data: Data, split: str) -> str:
    return "\n".join(data.rows(split)["text"].to_pylist())


@pytest.mark.parametrize("ending", [".txt", ".raw", ".text", ".raw.gz", ".txt.bz2"])
def test_a_text_comes_back_as_it_was(run: Prepare, tmp_path: Path, ending: str) -> None:
    content = " = One = \n\n a line \n\tanother\n\n\nlast"
    pack = {".gz": gzip.compress, ".bz2": bz2.compress}.get(Path(ending).suffix, bytes)
    for name, said in (("a", content + "\n"), ("b", content), ("c", content.replace("\n", "\r\n") + "\r\n")):
        (tmp_path / f"{name}{ending}").write_bytes(pack(said.encode()))
    data = run(splits={"train": f"a{ending}", "validation": f"b{ending}", "evaluation": f"c{ending}"})
    assert text(data, "train") == text(data, "evaluation") == content + "\n"
    assert text(data, "validation") == content


def test_other_endings_are_text_when_the_recipe_says_so(run: Prepare, tmp_path: Path) -> None:
    (tmp_path / "corpus.log").write_text(corpus(1))
    assert text(run(source="./corpus.log", format="text", splits={"evaluation": 1}), "evaluation") == corpus(1)


def test_notes_beside_other_data_are_no_data(run: Prepare, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": f"document {i}"}) for i in range(10)))
    (folder / "README.txt").write_text("about the data")
    assert run(source="rows", splits={"evaluation": 1}).num_rows == {"evaluation": 10}
    (folder / "a.jsonl").unlink()
    assert text(run(source="rows", splits={"evaluation": 1}), "evaluation") == "about the data"


def test_shares_of_a_text_are_consecutive_and_in_order(run: Prepare, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(corpus(*range(20)))
    shares = {"evaluation": 0.25, "calibration": 0.25, "train": 0.5}
    data = run(source="corpus.txt", splits=shares)
    assert "\n".join(text(data, split) for split in ("train", "calibration", "evaluation")) == corpus(*range(20))
    first = run(source="corpus.txt", splits={"evaluation": 1}, max_rows=7)
    assert corpus(0).startswith(text(first, "evaluation"))
    shuffled = run(source="corpus.txt", splits=shares, shuffle=True)
    assert text(shuffled, "train") not in corpus(*range(20))


def test_shares_of_documents_are_drawn(run: Prepare, tmp_path: Path) -> None:
    (tmp_path / "pages.jsonl").write_text("\n".join(json.dumps({"page": f"document {i}"}) for i in range(100)))
    config: dict[str, Any] = {"source": "pages.jsonl", "text": "page", "splits": {"train": 0.5, "evaluation": 0.5}}
    drawn = run(**config).rows("train")["text"].to_pylist()
    assert drawn != sorted(drawn, key=lambda page: int(page.split()[1]))
    in_order = run(**config, shuffle=False).rows("train")["text"].to_pylist()
    assert in_order == [f"document {i}" for i in range(50)]


def test_lines_may_be_repeated_and_passages_may_not(run: Prepare, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(corpus(1, 2, 3))
    (tmp_path / "test.txt").write_text(corpus(4, 5))
    splits = {"train": "train.txt", "evaluation": "test.txt"}
    assert run(splits=splits).num_rows.keys() == {"train", "evaluation"}
    # The same heading, empty lines and one line of 107 characters: no passage yet.
    shared = article(2).split("\n")
    (tmp_path / "test.txt").write_text(corpus(4) + "\n".join(shared[:4]) + corpus(5))
    assert run(splits=splits).num_rows.keys() == {"train", "evaluation"}
    (tmp_path / "test.txt").write_text(corpus(4) + "\n".join(shared[:6]) + corpus(5))
    with pytest.raises(SourceError, match="more than one split") as told:
        run(splits=splits)
    assert "of train.txt (train) is row" in told.value.message


def test_repeated_passages_can_be_dropped(run: Prepare, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(corpus(1, 2, 3))
    (tmp_path / "test.txt").write_text(corpus(4, 2))
    splits = {"train": "train.txt", "evaluation": "test.txt"}
    data = run(splits=splits, deduplicate=True)
    assert text(data, "evaluation") == corpus(4, 2)
    assert text(data, "train").count(" = Heading = ") >= 2
    assert article(1) in text(data, "train")
    assert 3 < data.info["duplicates_dropped"] < 9
