"""Adapters: few weights are trained, they are merged, and what comes out is an ordinary checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rooms import QUICK, Killed, KilledAt
from safetensors.torch import load_file

from optimize.artifact import Artifact
from optimize.distill import features, finetune, logits
from optimize.distill.lora import Lora, adapted
from optimize.errors import StageError

pytest.importorskip("peft")
Of = Callable[[str], Any]
SETTINGS: dict[str, Any] = {**QUICK, "lora": {"r": 4, "alpha": 8}, "learning_rate": 1e-2}


def change(before: Artifact, after: Artifact) -> dict[str, torch.Tensor]:
    """By which each weight moved, where it did."""
    ours, theirs = (load_file(artifact.path / "model.safetensors") for artifact in (after, before))
    assert ours.keys() == theirs.keys()
    return {name: ours[name] - theirs[name] for name in ours if not torch.equal(ours[name], theirs[name])}


@pytest.mark.parametrize("task", ["text-classification", "causal-lm"])
@pytest.mark.parametrize("method", ["finetune", "logits", "features"])
def test_what_moved_has_the_rank_of_the_adapter(method: str, task: str, teacher_of: Of, room_of: Of) -> None:
    room, teacher = room_of(task), teacher_of(task)
    module: Any = {"finetune": finetune, "logits": logits, "features": features}[method]
    settings = {**SETTINGS, **({} if method == "finetune" else {"teacher": "teacher", "alpha": 0.1})}
    context = room.make(teacher=teacher)
    result = module.run(teacher, module.Config(**settings, gradient_checkpointing=True), context)
    assert set(result.files) == set(teacher.files)
    moved = change(teacher, result)
    heads = {name for name in moved if name.startswith("classifier")}
    layers = moved.keys() - heads
    assert layers
    for name in layers:
        assert torch.linalg.matrix_rank(moved[name], atol=1e-5).item() <= 4
        assert "embed" not in name
        assert name.endswith("weight")
    assert bool(heads) == (task == "text-classification")


def test_it_learns(pico_source: Artifact, new_context: Callable[..., Any]) -> None:
    result = finetune.run(pico_source, finetune.Config(**SETTINGS, epochs=8), new_context())
    assert result.details["validation"]["accuracy"] > 0.9


@pytest.mark.parametrize("method", ["finetune", "logits"])
def test_a_killed_training_goes_on_to_the_same_bytes(method: str, teacher_of: Of, room_of: Of, tmp_path: Path) -> None:
    """Its checkpoints hold the adapters and nothing of the frozen weights."""
    room, teacher = room_of("text-classification"), teacher_of("text-classification")
    module: Any = {"finetune": finetune, "logits": logits}[method]
    settings = module.Config(
        **{**SETTINGS, "lora": {"dropout": 0.1}},
        save_steps=3,
        **({} if method == "finetune" else {"teacher": "teacher"}),
    )
    whole = module.run(teacher, settings, room.make(teacher=teacher))
    with pytest.raises(Killed):
        module.run(teacher, settings, room.make(scratch=tmp_path, progress=KilledAt(5), teacher=teacher))
    saved = next(tmp_path.glob("checkpoint-3/*model.safetensors"))
    assert not any("embeddings" in name for name in load_file(saved))
    assert module.run(teacher, settings, room.make(scratch=tmp_path, teacher=teacher)).digest == whole.digest


def test_targets_choose_layers(teacher_of: Of, room_of: Of) -> None:
    room, teacher = room_of("text-classification"), teacher_of("text-classification")
    model = room.make().task.load_model(teacher.path, room.spec)
    with pytest.raises(StageError, match=r"no linear layer is named '\*.nothing'"):
        adapted(model, Lora(targets=("*.nothing",)))
    with_adapters = adapted(model, Lora(targets=("*.query", "*.value")))
    trained = {name for name, weight in with_adapters.named_parameters() if weight.requires_grad}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained if ".lora_" in name} == {"query", "value"}
    assert adapted(model, None) is model


def test_a_module_of_the_user_s_own_has_none(pico_module: Artifact, image_context: Callable[[], Any]) -> None:
    with pytest.raises(StageError, match="adapters are for models of transformers"):
        finetune.run(pico_module, finetune.Config(**SETTINGS), image_context())
