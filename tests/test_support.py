"""Every cell of the support table runs: the stage makes an artifact, whose answers are held against its parent's."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from optimize import runtimes, support, tasks
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.data import prepare
from optimize.errors import RecipeError
from optimize.recipe import load
from optimize.stages import Entry, entries
from optimize.support import Cell
from optimize.work import Work

README = Path(__file__).parents[1] / "README.md"
CELLS = [cell for task in tasks.TASKS for cell in support.cells(task)]
SLOW = [cell for cell in CELLS if cell.task == "text2text" or (cell.mode == "qat" and cell.task != CELLS[0].task)]
"""What does the same work once more: another name of a task, training and export for another head."""
REFUSED = [(key, entry) for entry in entries() for key in entry.refuses]
ALLOWED = {"export": 1e-4, "cast": 0.05, "int8": 0.1, "gptq": 0.4, "nf4": 0.4, "int4": 0.4}
"""How far answers may be from the parent's: the root of the mean square, over that of the parent's own spread."""

DATA: dict[str, dict[str, Any]] = {
    "sentence-similarity": {"score": "score", "pooling": "mean"},
    "question-answering": {"max_length": 48, "stride": 8, "max_question_length": 8},
    "causal-lm": {"context_length": 32},
    "summarization": {"max_length": 32, "max_new_tokens": 4},
    "text2text": {"max_length": 32, "max_new_tokens": 4},
}
"""What a task's `data` block says besides the source; other columns have the names that are its defaults."""
CALIBRATION = {"num_samples": 8, "max_length": 16}
SETTINGS: dict[str, dict[str, Any]] = {
    "quantize.gptq": {"calibration": CALIBRATION, "group_size": 32},
}
"""What a stage is told; `calibration` is added where a stage takes it."""
REQUIRED: dict[str, dict[str, Any]] = {
    "distill.student": {"num_hidden_layers": 1},
    "distill.logits": {"teacher": "source"},
    "distill.features": {"teacher": "source"},
    "prune.structured": {"pruning_ratio": 0.5},
    "prune.layers": {"num_hidden_layers": 1},
}
"""What a stage has to be told before it says what it refuses."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 rows whose columns serve every task of text."""
    chance = random.Random(0)
    lines = []
    for number in range(48):
        words = [f"word{chance.randrange(150)}" for _ in range(chance.randint(3, 12))]
        lines.append(
            {
                "text": " ".join(words),
                "text_pair": " ".join(reversed(words)),
                "score": chance.random(),
                "label": ("negative", "positive")[number % 2],
                "tokens": words,
                "tags": [("O", "B-FILM")[int(word[4:]) % 2] for word in words],
                "question": "which film",
                "context": " ".join(words),
                "answers": words[1:2],
                "target": words[0],
                "summary": words[0],
            }
        )
    path = tmp_path_factory.mktemp("support") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pico_encoder(pico_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer of a BERT, with weights large enough to make a difference."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForPreTraining

    folder = tmp_path_factory.mktemp("pico") / "encoder"
    config = BertConfig.from_pretrained(pico_model, num_hidden_layers=1, initializer_range=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForPreTraining(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(pico_model).save_pretrained(folder)
    return folder


class Room:
    """The pico models of one task, and what stages made of them."""

    def __init__(self, task: str, source: Path, folder: Path, models: dict[str, Path | Artifact]) -> None:
        self.task = tasks.get(task)
        self.folder = folder
        config = self.task.Data(
            source=str(source),
            splits={"train": 0.2, "validation": 0.3, "calibration": 0.3, "evaluation": 0.2},
            **DATA.get(task, {}),
        )
        data = prepare(config, self.task, Work(folder / "work"), source.parent)
        self.data = data.for_stages()
        spec = self.task.spec(config, data.info)
        self.sources = {format: self._source(format, model, spec) for format, model in models.items()}
        self._made: dict[str, Artifact] = {}

    def _source(self, format: str, model: Path | Artifact, spec: dict[str, Any]) -> Artifact:
        """The model, with a head for the task."""
        import torch

        if isinstance(model, Artifact):
            return replace(model, task=spec)
        folder = self.folder / format
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.task.load_model(model, spec).save_pretrained(folder)
        self.task.preprocessor(model).save_pretrained(folder)
        return Artifact.from_directory(folder, format=format, task=spec)

    def run(self, cell: Cell) -> Artifact:
        """What the cell's stage makes of what it takes, once."""
        if str(cell) not in self._made:
            self._made[str(cell)] = self._run(cell)
        return self._made[str(cell)]

    def _given(self, format: str) -> Artifact:
        """A model in a format, exported where it does not come in it."""
        if format in self.sources:
            return self.sources[format]
        exports = (cell for cell in CELLS if cell.task == self.task.name and cell.entry.verb == "export")
        return self.run(next(cell for cell in exports if cell.entry.gives == format))

    def _run(self, cell: Cell) -> Artifact:
        method = cell.entry.load()
        fields = method.Config.model_fields
        settings = dict(SETTINGS.get(cell.entry.id, {}))
        if cell.mode:
            settings["mode"] = cell.mode
        if "calibration" in fields and cell.mode != "dynamic":
            settings["calibration"] = CALIBRATION
        folder = self.folder / str(cell).replace(" ", "-")
        (folder / "artifact").mkdir(parents=True)
        (folder / "scratch").mkdir()
        context = Context(folder / "artifact", folder / "scratch", self.task, self.data, folder / "logs", stage="stage")
        return method.run(self._given(cell.format), method.Config(**settings), context)

    def answers(self, artifact: Artifact) -> Any:
        rows = self.data.rows("validation")
        preprocessor = self.task.preprocessor(artifact.path)
        runner = runtimes.open_artifact(artifact, 1)
        return self.task.respond(runner, preprocessor, rows, artifact.task, batch_size=4)


@pytest.fixture(scope="module")
def rooms(
    request: pytest.FixtureRequest, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Room]:
    def source(name: str) -> tuple[Path, dict[str, Any]]:
        get = request.getfixturevalue
        if name == "causal-lm":
            return get("pico_corpus"), {"transformers": get("pico_llama")}
        if name == "image-classification":
            return get("pico_images"), {"transformers": get("pico_vit"), "pytorch": get("pico_module")}
        return rows, {"transformers": get("pico_encoder")}

    @cache
    def room(name: str) -> Room:
        data, models = source(name)
        return Room(name, data, tmp_path_factory.mktemp(name), models)

    return room


def numbers(outputs: np.ndarray) -> np.ndarray:
    """All floats in answers, whatever they are made of."""
    if outputs.dtype == object:
        return np.concatenate([numbers(np.asarray(one)) for one in outputs])
    if outputs.dtype.names:
        return np.concatenate([numbers(outputs[name]) for name in outputs.dtype.names])
    return outputs.ravel().astype(np.float64) if outputs.dtype.kind == "f" else np.empty(0)


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, marks=pytest.mark.slow if cell in SLOW else ()) for cell in CELLS], ids=str
)
def test_cell(cell: Cell, rooms: Callable[[str], Room]) -> None:
    room = rooms(cell.task)
    artifact = room.run(cell)
    assert artifact.format == cell.entry.gives
    ours = room.answers(artifact)
    theirs = room.answers(room.sources["pytorch" if cell.format == "pytorch" else "transformers"])
    assert room.task.incomparable(ours, theirs) is None
    ours, theirs = numbers(ours), numbers(theirs)
    # Texts that are written may part at one word, and only their scores, in nats, are left to compare.
    spread = 1 if room.task.encodes else theirs.std()
    error = np.sqrt(np.mean((ours - theirs) ** 2)) / spread
    assert error < ALLOWED["export" if cell.entry.verb == "export" else cell.entry.method]


@pytest.mark.parametrize(("refused", "entry"), REFUSED, ids=lambda part: getattr(part, "id", part))
def test_what_is_refused_is_said_beforehand(refused: str, entry: Entry, pico_model: Path, rows: Path) -> None:
    task, _, setting = refused.partition(" ")
    way = [] if "transformers" in entry.takes else [{"export": entry.takes[0]}]
    said = {"name": "refused", "backend": entry.backend, "mode": support.modes(entry)[0], **REQUIRED.get(entry.id, {})}
    fields = entry.load().Config.model_fields
    said |= {name: setting for name, field in fields.items() if setting in get_args(field.annotation)}
    stage = {entry.verb: entry.method, **{key: value for key, value in said.items() if value}}
    recipe = {
        "version": 1,
        "name": "refused",
        "model": {"source": str(pico_model), "task": task},
        "data": {"source": str(rows), **DATA.get(task, {})},
        "stages": [*way, stage],
    }
    with pytest.raises(RecipeError) as caught:
        load(recipe)
    assert any(entry.refuses[refused] in diagnostic.message for diagnostic in caught.value.diagnostics)


def test_the_tables_in_the_readme_are_these() -> None:
    text = README.read_text(encoding="utf-8")
    shown = text.partition(support.BEGIN)[2].partition(support.END)[0].strip()
    assert shown == support.table(), "run `make support`"
    methods = text.partition(support.METHODS_BEGIN)[2].partition(support.METHODS_END)[0].strip()
    assert methods == support.methods(), "run `make support`"
