"""Rooms for stages of every task, and trained pico teachers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rooms import BAD, GOOD, PLAIN, SPLITS, Room

from optimize import tasks
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.data import prepare
from optimize.distill import student
from optimize.progress import Progress
from optimize.work import Work


def _rows(task: str, folder: Path) -> dict[str, Any]:
    """What the `data` block says of generated rows."""
    rng = random.Random(0)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(rows) < 100:
        words = rng.choices(PLAIN, k=rng.randint(3, 9)) + rng.choices(GOOD + BAD, k=2)
        rng.shuffle(words)
        text = " ".join(words)
        if text in seen:
            continue
        seen.add(text)
        if task == "token-classification":
            tags = ["B-GOOD" if word in GOOD else "B-BAD" if word in BAD else "O" for word in words]
            rows.append({"tokens": words, "tags": tags})
        elif task == "question-answering":
            marked = next(word for word in words if word in GOOD + BAD)
            rows.append({"question": "good film", "context": text, "answers": [marked]})
        elif task == "text2text":
            rows.append({"text": text, "target": " ".join(words[:3])})
        else:
            rows.append({"text": text})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"source": str(folder / "rows.jsonl")}


@pytest.fixture(scope="session")
def room_of(tmp_path_factory: pytest.TempPathFactory, pico_csv: Path, pico_corpus: Path) -> Callable[[str], Room]:
    rooms: dict[str, Room] = {}

    def of(name: str) -> Room:
        if name in rooms:
            return rooms[name]
        task, folder = tasks.get(name), tmp_path_factory.mktemp(name)
        more: dict[str, Any] = {
            "text-classification": {"source": str(pico_csv), "max_length": 32},
            "causal-lm": {"source": str(pico_corpus), "context_length": 32},
        }.get(name) or _rows(name, folder)
        if name == "question-answering":
            more |= {"max_length": 40, "stride": 4, "max_question_length": 4}
        if name == "text2text":
            more |= {"max_new_tokens": 8}
        config = task.Data(**{"splits": SPLITS, **more})
        data = prepare(config, task, Work(folder / "work"), folder)
        spec = task.spec(config, data.info)

        def make(scratch: Path | None = None, progress: Progress | None = None, **artifacts: Artifact) -> Context:
            scratch = scratch or tmp_path_factory.mktemp("scratch")
            return Context(
                *(tmp_path_factory.mktemp("artifact"), scratch, task, data.for_stages(), scratch / "logs"),
                stage="stage",
                artifacts=artifacts,
                progress=progress or Progress(),
            )

        rooms[name] = Room(spec, make)
        return rooms[name]

    return of


@pytest.fixture(scope="session")
def teacher_of(room_of: Callable[[str], Room], pico_model: Path, pico_llama: Path) -> Callable[[str], Artifact]:
    """A pico model with a head, whose weights are large enough that rows and tokens make a difference."""
    teachers: dict[str, Artifact] = {}

    def of(name: str) -> Artifact:
        if name not in teachers:
            context, spec = room_of(name).make(), room_of(name).spec
            folder = pico_llama if name == "causal-lm" else pico_model
            context.task.preprocessor(folder).save_pretrained(context.directory)
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(0)
                model = context.task.load_model(folder, spec)
                for weight in model.parameters():
                    if weight.dim() > 1:
                        weight.mul_(2 if name == "causal-lm" else 6)
            model.config._name_or_path = ""
            model.save_pretrained(context.directory)
            teachers[name] = Artifact.from_directory(context.directory, format="transformers", task=spec)
        return teachers[name]

    return of


@pytest.fixture(scope="session")
def student_of(room_of: Callable[[str], Room], teacher_of: Callable[[str], Artifact]) -> Callable[..., Artifact]:
    """Of its teacher, one layer by default."""

    def of(name: str, **sizes: Any) -> Artifact:
        config = student.Config(**(sizes or {"num_hidden_layers": 1}))
        return student.run(teacher_of(name), config, room_of(name).make())

    return of
