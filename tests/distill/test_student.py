"""Students are parts of their teachers: the very weights, and, where what is cut had no effect, the very answers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rooms import Room
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from optimize.artifact import Artifact
from optimize.distill import narrowing
from optimize.distill.student import Config, run
from optimize.errors import SourceError, StageError
from optimize.source import Local, SourceModel

IDS = torch.tensor([[2, 7, 19, 33, 3]])


def bert(artifact: Artifact) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(artifact.path).eval()


def test_all_of_its_layers_are_the_teacher(
    teacher_of: Callable[[str], Artifact], room_of: Callable[[str], Room]
) -> None:
    teacher = teacher_of("text-classification")
    result = run(teacher, Config(layers=(0, 1)), room_of("text-classification").make())
    with torch.no_grad():
        torch.testing.assert_close(bert(result)(IDS).logits, bert(teacher)(IDS).logits, rtol=0, atol=0)
    assert result.task == teacher.task
    again = run(teacher, Config(layers=(0, 1)), room_of("text-classification").make())
    assert again.digest == result.digest


def test_the_chosen_layer_stays(teacher_of: Callable[[str], Artifact], room_of: Callable[[str], Room]) -> None:
    teacher, room = teacher_of("text-classification"), room_of("text-classification")
    for layers, kept in (("first", 0), ("last", 1), ("uniform", 1), ((1,), 1)):
        sizes: dict[str, Any] = {} if isinstance(layers, tuple) else {"num_hidden_layers": 1}
        result = run(teacher, Config(**sizes, layers=layers), room.make())
        ours, theirs = bert(result), bert(teacher)
        assert ours.config.num_hidden_layers == len(ours.bert.encoder.layer) == 1
        for name, weight in ours.bert.encoder.layer[0].state_dict().items():
            assert torch.equal(weight, theirs.bert.encoder.layer[kept].state_dict()[name])
        assert result.details["layers"] == [kept]
        assert result.details["parameters"] == ours.num_parameters()


def test_uniform_is_what_distilbert_chose() -> None:
    assert narrowing.chosen_layers("uniform", 6, 12) == [0, 2, 4, 7, 9, 11]
    assert narrowing.chosen_layers("uniform", 3, 6) == [0, 2, 5]
    assert narrowing.chosen_layers("last", 2, 6) == [4, 5]


def test_a_narrower_student_loads_and_holds_the_first_places_of_each_head(
    teacher_of: Callable[[str], Artifact], room_of: Callable[[str], Room]
) -> None:
    teacher, room = teacher_of("text-classification"), room_of("text-classification")
    result = run(teacher, Config(hidden_size=16, intermediate_size=24), room.make())
    ours, theirs = bert(result), bert(teacher)
    assert (ours.config.hidden_size, ours.config.intermediate_size, ours.config.num_attention_heads) == (16, 24, 2)
    # Two heads of 16 become two of 8: every other place of each half.
    places = [head + half + 2 * place for head in (0, 16) for half in (0, 8) for place in range(4)]
    query, whole = (model.bert.encoder.layer[0].attention.self.query.weight for model in (ours, theirs))
    assert torch.equal(query, whole[places][:, places])
    wider, narrower = (model.bert.encoder.layer[1].intermediate.dense.weight for model in (theirs, ours))
    assert torch.equal(narrower, wider[:24][:, places])
    assert torch.isfinite(ours(IDS).logits).all()


def test_heads_and_inner_width_that_had_no_effect_are_not_missed(
    pico_llama: Path, tmp_path: Path, room_of: Callable[[str], Room]
) -> None:
    """Heads go by groups: of four that share two heads of keys and values, one of each two."""
    model = AutoModelForCausalLM.from_pretrained(pico_llama)
    with torch.no_grad():
        for layer in model.model.layers:
            for head in (1, 3):
                layer.self_attn.o_proj.weight[:, 16 * head : 16 * head + 16] = 0
            layer.mlp.down_proj.weight[:, 40:] = 0
    shutil.copytree(pico_llama, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    room = room_of("causal-lm")
    teacher = Artifact.from_directory(tmp_path / "model", format="transformers", task=room.spec)
    result = run(teacher, Config(num_attention_heads=2, intermediate_size=40), room.make())
    student = AutoModelForCausalLM.from_pretrained(result.path)
    assert (student.config.num_attention_heads, student.config.num_key_value_heads, student.config.head_dim) == (
        2,
        2,
        16,
    )
    with torch.no_grad():
        torch.testing.assert_close(student(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-4)
    assert (result.path / "generation_config.json").read_bytes() == (
        tmp_path / "model" / "generation_config.json"
    ).read_bytes()
    with pytest.raises(StageError, match="3 heads can't share 2 heads of keys and values"):
        run(teacher, Config(num_attention_heads=3), room.make())


def test_queries_keys_and_values_side_by_side_are_cut_each() -> None:
    """GPT-2's are one matrix."""
    torch.manual_seed(0)
    teacher = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=4))
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": None}
    plan = narrowing.Plan(teacher.config, sizes, "first")
    weights = narrowing.cut(teacher, plan)
    heads = torch.arange(16)  # the first two heads of 8
    whole = teacher.transformer.h[0].attn.c_attn.weight
    expected = torch.cat([whole[heads][:, part * 32 + heads] for part in range(3)], dim=1)
    assert torch.equal(weights["transformer.h.0.attn.c_attn.weight"], expected)
    student = GPT2LMHeadModel(plan.config)
    student.load_state_dict(weights)
    assert torch.isfinite(student(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"num_hidden_layers": 3}, "has 2 blocks, and 3"),
        ({"layers": (0, 2)}, "blocks 0 to 1, and no 2"),
        ({"hidden_size": 48}, "48 is more than the model has"),
        ({"hidden_size": 31}, "31 can't be cut into 2 heads"),
    ],
)
def test_sizes_that_make_no_model_are_said(
    sizes: dict[str, Any], words: str, teacher_of: Callable[[str], Artifact], room_of: Callable[[str], Room]
) -> None:
    context = room_of("text-classification").make()
    with pytest.raises(StageError, match=words):
        run(teacher_of("text-classification"), Config(**sizes), context)


@pytest.mark.parametrize(
    "block",
    [
        {},
        {"source": "x", "hidden_size": 3},
        {"layers": (0, 0)},
        {"layers": (0,), "num_hidden_layers": 2},
        {"layers": ()},
    ],
)
def test_blocks_that_contradict_themselves_are_refused(block: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Config(**block)


def test_another_model_may_be_the_student(
    teacher_of: Callable[[str], Artifact], room_of: Callable[[str], Room], pico_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(pico_model, tmp_path / "other")

    def take(task: str) -> Artifact:
        context = room_of(task).make()
        sources = {"source": SourceModel(Local(tmp_path / "other"))}
        return run(teacher_of(task), Config(source="./other"), dataclasses.replace(context, sources=sources))

    assert torch.equal(bert(take("text-classification")).classifier.weight, load(pico_model).classifier.weight)
    # A new head is the seed's, not chance's.
    assert take("token-classification").digest == take("token-classification").digest
    # Another tokenizer matters where outputs are of tokens.
    path = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["film"], vocabulary["story"] = vocabulary["story"], vocabulary["film"]
    path.write_text(json.dumps(tokenizer))
    take("text-classification")
    with pytest.raises(StageError, match="answer for every token"):
        take("token-classification")
    # So do other labels.
    path = tmp_path / "other" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {"0": "sad", "1": "glad"}}))
    with pytest.raises(SourceError, match="labels that don't match"):
        take("text-classification")


def load(path: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(path)
