"""`optimize init`: a first recipe, copied from those that come along or guessed from a model and a data file."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimize.errors import OptimizeError, RecipeError

ROWS_READ = 2000
"""Rows that the guesses rest on."""
TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("text", "text_pair"),
)
LABEL_NAMES = ("label", "labels", "class", "category", "sentiment", "target", "intent", "topic", "y")
TEXT_NAMES = ("text", "sentence", "review", "content", "body", "comment", "message", "title")


@dataclass(frozen=True)
class Written:
    """A recipe on disk and what was guessed for it."""

    file: Path
    guesses: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"file": str(self.file), "guesses": list(self.guesses)}


@dataclass(frozen=True)
class Columns:
    """What the rows seem to hold."""

    text: str
    text_pair: str | None
    label: str
    values: tuple[str, ...]
    """The label's values, sorted."""


def init(
    file: Path, *, copy_of: str | None = None, model: str | None = None, data: Path | None = None, force: bool = False
) -> Written:
    """Write `file`: a copy of a recipe that comes along, or one for a model and a data file.

    Raises `RecipeError` where the options don't fit together, the file is there already (without `force`), or the rows
    can't be understood; then nothing is written.
    """
    file = file.absolute()
    if model and model.startswith("~"):  # no shell expands it in `--model=~/mine`
        model = os.path.expanduser(model)  # noqa: PTH111 - leaves an unknown user's as it is
    guesses: tuple[str, ...] = ()
    if file.exists() and not force:
        raise RecipeError(f"{file} is there already", hint="name another file, or --force to overwrite it")
    if copy_of and not (model or data):
        text = _copied(copy_of, file)
    elif model and data and not copy_of:
        text, guesses = guessed(model, data, file)
    else:
        raise RecipeError(
            "say what the recipe is for", hint="--from quickstart, or --model FOLDER together with --data FILE"
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OptimizeError(f"{file} can't be written: {error.strerror}") from error
    return Written(file, guesses)


def recipes() -> dict[str, Path]:
    """The recipes that come along: beside the modules in a wheel, beside the package in a checkout."""
    package = Path(__file__).parent.parent
    folder = next((one for one in (package / "recipes", package.parent / "recipes") if one.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def _copied(name: str, file: Path) -> str:
    if name not in (known := recipes()):
        raise RecipeError(f"no recipe {name!r} comes along", hint=f"there is {', '.join(known) or 'none'}")
    lines = known[name].read_text(encoding="utf-8").replace(f"recipes/{name}.yaml", file.name).splitlines(keepends=True)
    # The schema that an editor would look for lies beside the original only.
    return "".join(line for line in lines if not line.startswith("# yaml-language-server:"))


# --- guessing ---------------------------------------------------------------------------------------------------------


def guessed(model: str, data: Path, file: Path) -> tuple[str, tuple[str, ...]]:
    """The text of a recipe, and the guesses in words."""
    rows = read_rows(data)
    columns = guess_columns(rows, data)
    config = _model_config(model)
    trained, head = _head(config)
    guesses = [
        f"model   {config.get('model_type', 'unknown')}" + (f" ({head})" if head else ""),
        f"task    text-classification: a text column and a label with {len(columns.values)} values",
        f"text    {columns.text}" + (f" and {columns.text_pair}" if columns.text_pair else ""),
        f"label   {columns.label}: {_few(columns.values)}",
        f"length  {_length(rows, columns)} tokens, enough for nearly every row",
        "head    " + ("already trained for this task" if trained else "none yet: the first stage trains one"),
    ]
    return _recipe(model, data, file, columns, _length(rows, columns), trained), tuple(guesses)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The first rows of a CSV, TSV, JSON lines, Parquet or Arrow file."""
    ending = path.suffix.lower()
    try:
        if ending in (".csv", ".tsv"):
            with path.open(newline="", encoding="utf-8-sig") as file:
                return list(
                    itertools.islice(csv.DictReader(file, delimiter="\t" if ending == ".tsv" else ","), ROWS_READ)
                )
        if ending in (".jsonl", ".ndjson"):
            with path.open(encoding="utf-8") as file:
                return [json.loads(line) for line in itertools.islice(filter(str.strip, file), ROWS_READ)]
        if ending in (".parquet", ".arrow"):
            return list(_arrow_rows(path))
    except OSError as error:
        raise RecipeError(f"{path} can't be read: {error.strerror or error}") from error
    except (ValueError, csv.Error) as error:
        raise RecipeError(f"{path} is no {ending[1:]} file: {error}") from error
    raise RecipeError(f"{path}: no idea how to read it", hint="give a .csv, .tsv, .jsonl, .parquet or .arrow file")


def _arrow_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet

    if path.suffix.lower() == ".parquet":
        batches = pa.parquet.ParquetFile(path).iter_batches(batch_size=ROWS_READ)
    else:
        batches = iter(pa.ipc.open_stream(path.open("rb")))
    return itertools.islice((row for batch in batches for row in batch.to_pylist()), ROWS_READ)


def guess_columns(rows: Sequence[Mapping[str, Any]], path: Path) -> Columns:
    """Which columns are the text (or the pair of them) and the label. Raises `RecipeError` where it can't be told."""
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise RecipeError(f"{path} holds no rows with named columns")
    names = [name for name in rows[0] if isinstance(name, str)]
    values = {name: [row.get(name) for row in rows] for name in names}
    distinct = {name: {str(value) for value in column} for name, column in values.items()}
    words = {name: _mean_words(column) for name, column in values.items()}
    few = [
        name
        for name in names
        if 2 <= len(distinct[name]) <= max(2, min(200, len(rows) // 4))
        and not any(isinstance(value, float) and not value.is_integer() for value in values[name])
    ]
    label = _preferred(few, LABEL_NAMES) or min(few, key=lambda name: len(distinct[name]), default=None)
    if label is None:
        raise RecipeError(
            f"no column of {path} looks like a label: few values, each many times",
            hint=f"the columns are {', '.join(names)}; start with `--from quickstart` and fill in `data.label`",
        )
    by_lower = {name.lower(): name for name in names if name != label}
    for first, second in TEXT_PAIRS:
        if first in by_lower and second in by_lower:
            return Columns(by_lower[first], by_lower[second], label, tuple(sorted(distinct[label])))
    texts = [name for name in names if name != label and words[name] > 0]
    text = _preferred(texts, TEXT_NAMES) or max(texts, key=lambda name: words[name], default=None)
    if text is None:
        raise RecipeError(
            f"no column of {path} looks like text",
            hint=f"the columns are {', '.join(names)}; start with `--from quickstart` and fill in `data.text`",
        )
    return Columns(text, None, label, tuple(sorted(distinct[label])))


def _preferred(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    lower = {name.lower(): name for name in names}
    return next((lower[name] for name in wanted if name in lower), None)


def _mean_words(values: Sequence[Any]) -> float:
    """0 where a value is no text, or all are numbers."""
    if not all(isinstance(value, str) for value in values) or all(_is_number(value) for value in values):
        return 0.0
    return sum(len(value.split()) for value in values) / len(values)


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _length(rows: Sequence[Mapping[str, Any]], columns: Columns) -> int:
    """A sequence length that holds 99 % of the rows: about 1.4 tokens a word and the special tokens, in steps of 32."""
    used = [name for name in (columns.text, columns.text_pair) if name]
    words = sorted(sum(len(str(row.get(name) or "").split()) for name in used) for row in rows)
    tokens = 1.4 * words[int(0.99 * (len(words) - 1))] + 4
    return int(min(512, max(32, -(-tokens // 32) * 32)))


def _model_config(model: str) -> dict[str, Any]:
    """The model's `config.json` where it lies on this machine; empty for a hub id or a wheel, which are not fetched."""
    folder = Path(model)
    if not folder.exists():
        if model.startswith((".", "/", "~")):
            raise RecipeError(f"there is no folder {model}")
        return {}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{model} is no model folder: its config.json can't be read ({error})",
            hint="a folder as `save_pretrained` writes it: config.json, model.safetensors, tokenizer.json",
        ) from error
    return config if isinstance(config, dict) else {}


def _head(config: Mapping[str, Any]) -> tuple[bool, str | None]:
    """Whether the model can classify already, and what it is."""
    architecture = next(iter(config.get("architectures") or ()), None)
    return bool(architecture and architecture.endswith("ForSequenceClassification")), architecture


def _few(values: Sequence[str]) -> str:
    return ", ".join(values[:5]) + (f" and {len(values) - 5} more" if len(values) > 5 else "")


def _path(path: str | Path, file: Path) -> str:
    """A local path as the recipe has to write it: from its own folder where it lies below, else whole."""
    whole = Path(path).resolve()
    try:
        return f"./{whole.relative_to(file.parent.resolve()).as_posix()}"
    except ValueError:
        return str(whole)


def _name(data: Path) -> str:
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in data.stem.lower()).strip("-")
    return "-".join(part for part in kept.split("-") if part)[:64] or "first"


def _recipe(model: str, data: Path, file: Path, columns: Columns, length: int, trained: bool) -> str:
    """The recipe's text. Everything that comes from outside is a JSON string, which is a YAML string too."""
    quoted = json.dumps
    source = _path(model, file) if Path(model).exists() else model
    pair = f"\n  text_pair: {quoted(columns.text_pair)}" if columns.text_pair else ""
    training = (
        "" if trained else "\n  - distill: finetune          # the model has no head for this task yet\n    epochs: 1"
    )
    baseline = "source" if trained else "finetune"
    return f"""\
# Written by `optimize init`. What was guessed is marked with (?): check it, then run
#
#   optimize validate {file.name}
#   optimize apply {file.name}
#
# `optimize stages` lists what can be put under `stages`, `optimize stages quantize.int8` explains one.
version: 1
name: {quoted(_name(data))}

model:
  source: {quoted(source, ensure_ascii=False)}
  task: text-classification    # (?)

data:
  source: {quoted(_path(data, file), ensure_ascii=False)}
  text: {quoted(columns.text, ensure_ascii=False)}    # (?){pair}
  label: {quoted(columns.label, ensure_ascii=False)}    # (?) {len(columns.values)} values in the first rows
  max_length: {length}    # (?) tokens; longer rows are cut
  # Shares of the rows. Stages never see the evaluation rows; scores come from them alone.
  splits: {{train: 0.6, validation: 0.05, calibration: 0.05, evaluation: 0.3}}
  seed: 0

# Each stage takes the artifact of the one before.
stages:{training}
  - export: onnx
  - quantize: int8
    mode: dynamic

# What the others are held against.
baseline: {baseline}

evaluate:
  latency: {{batch_sizes: [1, 8], sequence_length: {length}, threads: 1}}

# A gate passes where the whole 90 % interval is on the good side of its limit.
gates:
  - metric: accuracy
    max_drop: 0.02             # at most two points lost
  - metric: latency
    min_speedup: 1.2
    over: onnx                 # so that the runtime's own gain does not pass for quantisation's
  - metric: size
    max_ratio: 0.5

# Only an artifact that passed every gate gets the alias.
promote:
  alias: production
"""
