"""Hidden states and attention: nearer than before, padding left out, projections thrown away."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rooms import QUICK, Killed, KilledAt, Room

from optimize.artifact import Artifact
from optimize.distill import features, inside
from optimize.distill.distilling import Pupil, TaughtRows
from optimize.distill.features import Attention, Config, Hidden, run
from optimize.distill.teacher import Teacher
from optimize.errors import StageError

Of = Callable[[str], Any]
KINDS: dict[str, dict[str, Any]] = {
    "mse": {"hidden": Hidden()},
    "cosine": {"hidden": Hidden(loss="cosine")},
    "maps": {"hidden": None, "attention": Attention(kind="maps")},
    "relations": {"hidden": None, "attention": Attention(kind="relations")},
}


def config(**more: Any) -> Config:
    return Config(**{**QUICK, "teacher": "teacher", "alpha": 0.5, **more})


def pupil_of(artifact: Artifact, teacher: Artifact, room: Room, settings: Config) -> tuple[Pupil, TaughtRows]:
    """One that learns features and nothing else."""
    context = room.make(teacher=teacher)
    task = context.task
    taught = Teacher("teacher", teacher, room.spec, task)
    model = task.load_model(artifact.path, room.spec)
    if settings.hidden:
        signal: Any = inside.hidden_states(model, taught.model, settings.hidden, settings.layer_map)
    elif settings.attention and settings.attention.kind == "maps":
        signal = inside.maps(model, taught.model, settings.attention, settings.layer_map)
    else:
        assert settings.attention
        signal = inside.value_relations(model, taught.model, settings.attention)
    pupil = Pupil(model, taught, {"inside": signal}, 1.0).eval()
    return pupil, TaughtRows(pupil, task.preprocessor(artifact.path), room.spec, settings, context)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["text-classification", "causal-lm"])
def test_the_student_comes_nearer_inside(
    kind: str, task: str, teacher_of: Of, room_of: Of, student_of: Callable[..., Artifact]
) -> None:
    room, teacher = room_of(task), teacher_of(task)
    sizes = {"num_hidden_layers": 1, "hidden_size": 16 if task == "text-classification" else 32}
    pupil = student_of(task, **sizes)
    wanted = {**KINDS[kind], "alpha": 0}
    part = "attention" if wanted["hidden"] is None else "hidden"
    # So heavy that the hard loss is nothing beside it.
    heavy = wanted[part].model_copy(update={"weight": 1e3})
    far, near = (
        run(pupil, config(**{**wanted, part: heavy}, learning_rate=rate, epochs=3), room.make(teacher=teacher))
        for rate in (1e-9, 3e-3)
    )
    assert near.details["validation"]["loss"] < 0.9 * far.details["validation"]["loss"]
    # A plain checkpoint, without projections.
    assert set(near.files) == set(pupil.files)
    after, before = (json.loads((artifact.path / "config.json").read_text()) for artifact in (near, pupil))
    after.pop("problem_type", None)  # which transformers notes when it computes a loss
    assert after == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cached", [False, True])
def test_padding_counts_nothing(
    kind: str, cached: bool, teacher_of: Of, room_of: Of, student_of: Callable[..., Artifact]
) -> None:
    """Rows together are the mean of rows alone, weighted with their tokens."""
    task = "text-classification"
    settings = config(**KINDS[kind], cache_teacher=cached, batch_size=3)
    pupil, rows = pupil_of(student_of(task), teacher_of(task), room_of(task), settings)
    examples = rows.examples("train")[:7]

    def loss(some: list[Any]) -> tuple[float, int]:
        batch = rows.collate(some)
        with torch.no_grad():
            return pupil(**batch)["loss"].item(), int(batch["attention_mask"].sum())

    together, total = loss(examples)
    apart = [loss([row]) for row in examples]
    assert together > 0
    assert together == pytest.approx(sum(found * count for found, count in apart) / total, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_its_own_teacher_at_no_distance(kind: str, teacher_of: Of, room_of: Of) -> None:
    teacher = teacher_of("text-classification")
    pupil, rows = pupil_of(teacher, teacher, room_of("text-classification"), config(**KINDS[kind]))
    with torch.no_grad():
        loss = pupil(**rows.collate(rows.examples("train")[:5]))["loss"].item()
    assert loss == pytest.approx(0, abs=1e-5)


def test_a_killed_training_goes_on_to_the_same_bytes(
    teacher_of: Of, room_of: Of, student_of: Callable[..., Artifact], tmp_path: Path
) -> None:
    """With a projection, which is part of the checkpoint."""
    task = "text-classification"
    room, teacher, pupil = room_of(task), teacher_of(task), student_of(task, hidden_size=16)
    settings = config(attention=Attention(), epochs=1, save_steps=3)
    whole = run(pupil, settings, room.make(teacher=teacher))
    with pytest.raises(Killed):
        run(pupil, settings, room.make(scratch=tmp_path, progress=KilledAt(5), teacher=teacher))
    assert run(pupil, settings, room.make(scratch=tmp_path, teacher=teacher)).digest == whole.digest


def test_images_have_hidden_states_too(pico_vit: Artifact, image_context: Callable[[], Any]) -> None:
    import dataclasses

    context = dataclasses.replace(image_context(), artifacts={"teacher": pico_vit})
    settings = config(layer_map={0: 1}, epochs=1, cache_teacher=True)
    assert run(pico_vit, settings, context).details["validation"]["loss"] > 0


def test_layers_and_heads_that_are_not_there_are_said(
    teacher_of: Of, room_of: Of, student_of: Callable[..., Artifact]
) -> None:
    task = "text-classification"
    room, teacher, pupil = room_of(task), teacher_of(task), student_of(task)
    with pytest.raises(StageError, match="the teacher has layers 0 to 1, and no 7"):
        run(pupil, config(layer_map={0: 7}), room.make(teacher=teacher))
    with pytest.raises(StageError, match="can't be cut into 3 relation heads"):
        run(pupil, config(attention=Attention(relation_heads=3)), room.make(teacher=teacher))
    with pytest.raises(ValidationError, match="distill: logits"):
        config(hidden=None)
    # From YAML a mapping's keys come as text.
    assert Config.model_validate_json('{"teacher": "t", "layer_map": {"0": 1}}', strict=True).layer_map == {0: 1}
    assert features.VERSION


def test_activations_that_are_computed_again_are_the_same(
    teacher_of: Of, room_of: Of, student_of: Callable[..., Artifact]
) -> None:
    """Dropout and values that are caught on the way included."""
    task = "text-classification"
    room, teacher, pupil = room_of(task), teacher_of(task), student_of(task)
    kept, again = (
        run(pupil, config(attention=Attention(), gradient_checkpointing=asked), room.make(teacher=teacher))
        for asked in (False, True)
    )
    assert again.digest == kept.digest
    rough = run(pupil, config(precision="bfloat16", cache_teacher=True), room.make(teacher=teacher))
    assert rough.details["validation"]["loss"] == pytest.approx(
        run(pupil, config(), room.make(teacher=teacher)).details["validation"]["loss"], rel=0.2
    )


def test_a_pruned_student_has_fewer_heads_than_its_config_says() -> None:
    """Values of 8 and 12, heads of 4 by both configs: cut into as many parts as fit all of it."""
    ours, theirs = torch.nn.Linear(6, 8), torch.nn.Linear(6, 12)
    signal = inside.ValueRelations(Attention(), 4, ours, theirs)
    tokens, batch = torch.randn(2, 5, 6), {"attention_mask": torch.ones(2, 5, dtype=torch.long)}
    theirs(tokens)
    wanted = signal.of_teacher({}, batch)
    ours(tokens)
    assert signal.loss(wanted, {}, batch) > 0
    theirs(tokens)
    wanted, other = signal.of_teacher({}, batch), inside.ValueRelations(Attention(), 3, ours, theirs)
    ours(tokens)
    assert other.loss(wanted, {}, batch) > 0, "in one part, since three don't fit"
