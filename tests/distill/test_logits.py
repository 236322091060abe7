"""Distillation of answers: for every kind of them, with and without a cache, killed and resumed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rooms import QUICK, Killed, KilledAt, Room
from safetensors.torch import load_file, save_file

from optimize.artifact import Artifact
from optimize.distill.answers import Answers
from optimize.distill.distilling import Pupil, TaughtRows
from optimize.distill.finetune import with_loss
from optimize.distill.logits import Config, run
from optimize.distill.teacher import Teacher
from optimize.errors import StageError
from optimize.progress import Progress
from optimize.runtimes import pytorch

TASKS = ("text-classification", "token-classification", "question-answering", "fill-mask", "causal-lm", "text2text")
Of = Callable[[str], Any]


def config(**more: Any) -> Config:
    return Config(**{**QUICK, "teacher": "teacher", "temperature": 2.0, "alpha": 0.5, "epochs": 1, **more})


def pupil_of(artifact: Artifact, teacher: Artifact, room: Room, settings: Config) -> tuple[Pupil, TaughtRows]:
    """As the stage makes them."""
    context = room.make(teacher=teacher)
    task = context.task
    model = task.load_model(artifact.path, room.spec)
    taught = Teacher("teacher", teacher, room.spec, task)
    signal = Answers(task, settings.alpha, settings.temperature, settings.top_k)
    pupil = Pupil(model, taught, {"answers": signal}, settings.alpha).eval()
    return pupil, TaughtRows(pupil, task.preprocessor(artifact.path), room.spec, settings, context)


@pytest.mark.parametrize("task", TASKS)
def test_the_student_comes_nearer_to_its_teacher(
    task: str, teacher_of: Of, room_of: Of, student_of: Callable[..., Artifact]
) -> None:
    room, teacher = room_of(task), teacher_of(task)
    pupil = teacher if task == "text2text" else student_of(task)
    if task == "text2text":  # its kind has no smaller copy: let it forget something
        pupil = disturbed(teacher, room)
    far, near = (
        run(pupil, config(alpha=1, learning_rate=rate, epochs=2), room.make(teacher=teacher)).details["validation"][
            "loss"
        ]
        for rate in (1e-9, 3e-3)
    )
    assert near < 0.9 * far


def disturbed(artifact: Artifact, room: Room) -> Artifact:
    """The same model with noise on its weights."""
    context = room.make()
    model = context.task.load_model(artifact.path, room.spec)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    shutil.copytree(artifact.path, context.directory, dirs_exist_ok=True, copy_function=shutil.copyfile)
    model.save_pretrained(context.directory)
    return Artifact.from_directory(context.directory, format="transformers", task=room.spec)


@pytest.mark.parametrize("task", TASKS[:5])
@pytest.mark.parametrize("cached", [False, True])
def test_padding_and_ignored_labels_count_nothing(
    task: str, cached: bool, teacher_of: Of, room_of: Of, student_of: Callable[..., Artifact]
) -> None:
    """Rows together are the mean of rows alone, weighted with how much of each counts."""
    settings = config(alpha=1, cache_teacher=cached, batch_size=3)
    pupil, rows = pupil_of(student_of(task), teacher_of(task), room_of(task), settings)
    examples = rows.examples("train")[:7]
    (signal,) = pupil.signals.values()

    def loss(some: list[Any]) -> tuple[float, int]:
        batch = rows.collate(some)
        with torch.no_grad():
            found = pupil(**batch)["loss"].item()
        counts = signal.counts(batch)  # type: ignore[operator]
        # The choice of a span is one choice, however long the row is.
        return found, len(some) if counts is None or task == "question-answering" else sum(counts)

    together, total = loss(examples)
    apart = [loss([row]) for row in examples]
    assert sum(count for _, count in apart) == total
    assert together == pytest.approx(sum(found * count for found, count in apart) / total, rel=1e-4)


def test_the_loss_is_that_of_the_formula(teacher_of: Of, room_of: Of, student_of: Callable[..., Artifact]) -> None:
    settings = config(alpha=0.3, temperature=4)
    pupil, rows = pupil_of(
        student_of("text-classification"), teacher_of("text-classification"), room_of("text-classification"), settings
    )
    batch = rows.collate(rows.examples("train")[:8])
    with torch.no_grad():
        found = pupil(**batch)["loss"]
        ours, theirs = pupil.student(**batch), pupil.teacher(batch)
        kl = torch.nn.functional.kl_div(
            (ours.logits / 4).log_softmax(-1), (theirs["logits"] / 4).softmax(-1), reduction="batchmean"
        )
    torch.testing.assert_close(
        found, 0.3 * 16 * kl + 0.7 * torch.nn.functional.cross_entropy(ours.logits, batch["labels"])
    )


def test_what_the_teacher_said_before_is_as_good_as_now(
    teacher_of: Of, room_of: Of, student_of: Callable[..., Artifact]
) -> None:
    room, teacher, pupil = (
        room_of("text-classification"),
        teacher_of("text-classification"),
        student_of("text-classification"),
    )
    now, before = (
        run(pupil, config(cache_teacher=cached, epochs=2), room.make(teacher=teacher)) for cached in (False, True)
    )
    weights = [load_file(result.path / "model.safetensors") for result in (now, before)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=1e-4, rtol=1e-3)
    assert set(before.files) == set(pupil.files)


def test_a_kill_costs_neither_answers_nor_steps(
    teacher_of: Of, room_of: Of, student_of: Callable[..., Artifact], tmp_path: Path
) -> None:
    room, teacher, pupil = (
        room_of("token-classification"),
        teacher_of("token-classification"),
        student_of("token-classification"),
    )
    settings = config(cache_teacher=True, epochs=2, save_steps=2)
    whole = run(pupil, settings, room.make(teacher=teacher))
    with pytest.raises(Killed):
        run(pupil, settings, room.make(scratch=tmp_path, progress=KilledAt(2, "asking"), teacher=teacher))
    asked = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert asked
    with pytest.raises(Killed):
        run(pupil, settings, room.make(scratch=tmp_path, progress=KilledAt(5), teacher=teacher))
    assert asked.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}.items()
    seen: list[tuple[float, str]] = []

    class Watch(Progress):
        def update(self, name: str, done: float, total: float, text: str = "") -> None:
            seen.append((done, text))

    again = run(pupil, settings, room.make(scratch=tmp_path, progress=Watch(), teacher=teacher))
    assert seen[0][0] == 5
    assert "asking the teacher" not in [text for _, text in seen]
    assert again.digest == whole.digest


def test_the_likeliest_tokens_are_enough_to_learn_from(
    teacher_of: Of, room_of: Of, student_of: Callable[..., Artifact]
) -> None:
    task = "causal-lm"
    room, teacher, pupil = room_of(task), teacher_of(task), student_of(task)
    losses = []
    for top_k in (None, 320, 8):
        settings = config(alpha=1, top_k=top_k, cache_teacher=True)
        result = run(pupil, settings, context := room.make(teacher=teacher))
        kept = load_file(next((context.scratch / "teacher" / "train").iterdir()))
        assert {name.rpartition("/")[2] for name in kept} == (
            {"log_probabilities", "indices"} if top_k == 8 else {"logits"}
        )
        losses.append(result.details["validation"]["loss"])
    assert losses[0] == pytest.approx(losses[1])
    assert losses[2] <= losses[0] * 1.05


def test_a_teacher_of_another_family_reads_rows_in_its_own_way(
    teacher_of: Of, room_of: Of, student_of: Callable[..., Artifact]
) -> None:
    """Another vocabulary: what the student calls 7, the teacher calls something else."""
    room, teacher = room_of("text-classification"), teacher_of("text-classification")
    context = room.make()
    shutil.copytree(teacher.path, context.directory, dirs_exist_ok=True, copy_function=shutil.copyfile)
    path = context.directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = [word for word in tokenizer["model"]["vocab"] if not word.startswith("[")]
    first = len(tokenizer["model"]["vocab"]) - len(words)
    order = dict(zip(words, reversed(range(first, first + len(words))), strict=True))
    old = dict(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"] |= order
    path.write_text(json.dumps(tokenizer))
    weights = load_file(context.directory / "model.safetensors")
    table = weights["bert.embeddings.word_embeddings.weight"]
    moved = table.clone()
    for word, place in order.items():
        moved[place] = table[old[word]]

    save_file(
        {**weights, "bert.embeddings.word_embeddings.weight": moved},
        context.directory / "model.safetensors",
        {"format": "pt"},
    )
    foreign = Artifact.from_directory(context.directory, format="transformers", task=room.spec)
    results = []
    for one, cached in ((teacher, False), (foreign, False), (foreign, True)):
        result = run(student_of("text-classification"), config(alpha=1, cache_teacher=cached), room.make(teacher=one))
        results.append(load_file(result.path / "model.safetensors"))
    # It is the same model in other words, so the student learns the same.
    for other in results[1:]:
        for name, weight in results[0].items():
            torch.testing.assert_close(other[name], weight, atol=1e-4, rtol=1e-3)
    spec = room_of("token-classification").spec
    tagger = teacher_of("token-classification")
    other = room_of("token-classification").make()
    shutil.copytree(tagger.path, other.directory, dirs_exist_ok=True, copy_function=shutil.copyfile)
    (other.directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(StageError, match="answer for every token"):
        run(
            student_of("token-classification"),
            config(),
            room_of("token-classification").make(
                teacher=Artifact.from_directory(other.directory, format="transformers", task=spec)
            ),
        )


def test_a_teacher_that_can_t_teach_is_said(
    teacher_of: Of, room_of: Of, student_of: Callable[..., Artifact], pico_model: Path
) -> None:
    room, teacher = room_of("text-classification"), teacher_of("text-classification")
    pupil = student_of("text-classification")
    others = dataclasses.replace(teacher, task={**teacher.task, "labels": ["sad", "glad"]})
    with pytest.raises(StageError, match="has the labels"):
        run(pupil, config(), room.make(teacher=others))
    fresh = Artifact.from_directory(pico_model, format="transformers", task=room_of("token-classification").spec)
    with pytest.raises(StageError, match="no trained head"):
        run(student_of("token-classification"), config(), room_of("token-classification").make(teacher=fresh))
    wild = config(optim="sgd", learning_rate=1e30, max_grad_norm=1e30, warmup_ratio=0, epochs=4)
    with pytest.raises(StageError, match=r"the loss is (nan|inf)"):
        run(pupil, wild, room.make(teacher=teacher))


def test_a_module_of_the_user_s_own_learns_from_a_transformer(
    pico_module: Artifact, pico_vit: Artifact, image_context: Callable[[], Any]
) -> None:
    context = dataclasses.replace(image_context(), artifacts={"teacher": pico_vit})
    result = run(pico_module, config(epochs=2, learning_rate=1e-2, cache_teacher=True), context)
    assert result.format == "pytorch"
    trained = pytorch.load(result.path, trusted=True)
    before = with_loss(pytorch.load(pico_module.path, trusted=True)).module.state_dict()
    assert any(not torch.equal(before[name], weight) for name, weight in trained.state_dict().items())
