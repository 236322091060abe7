"""Fine-tuning: it learns, it is reproducible, it resumes, and it leaves no trace of where it ran."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from optimize.artifact import Artifact
from optimize.context import Context
from optimize.data import Data
from optimize.distill.finetune import Config, run
from optimize.distill.trainer import length_grouped
from optimize.errors import StageError
from optimize.progress import Progress

QUICK: dict[str, Any] = {"learning_rate": 2e-3, "batch_size": 16, "device": "cpu", "threads": 1}


class Killed(BaseException):
    """Stands for a signal: nothing in the training catches it."""


class KilledAt(Progress):
    def __init__(self, step: int) -> None:
        self.step = step

    def update(self, name: str, done: float, total: float, text: str = "") -> None:
        if done == self.step:
            raise Killed


def test_it_learns_and_saves_what_transformers_loads(
    pico_source: Artifact, new_context: Callable[..., Context], capfd: pytest.CaptureFixture[str]
) -> None:
    result = run(pico_source, Config(**QUICK, epochs=8), new_context())
    assert capfd.readouterr().out == ""
    assert result.details["steps"] == 8 * 8
    assert result.details["validation"]["accuracy"] > 0.9
    assert set(result.files) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert result.task == pico_source.task
    model = AutoModelForSequenceClassification.from_pretrained(result.path)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    tokenizer = AutoTokenizer.from_pretrained(result.path)
    with torch.no_grad():
        answers = model(**tokenizer(["a superb film"], return_tensors="pt")).logits.argmax(1).tolist()
    assert answers == [1]


def test_two_folders_give_the_same_bytes_and_the_caller_keeps_its_randomness(
    pico_source: Artifact, new_context: Callable[..., Context]
) -> None:
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    threads = torch.get_num_threads()
    first = run(pico_source, Config(**QUICK), new_context())
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert torch.get_num_threads() == threads
    random.random(), torch.rand(3)
    second = run(pico_source, Config(**QUICK), new_context())
    assert first.digest == second.digest
    assert run(pico_source, Config(**QUICK, seed=1), new_context()).digest != first.digest
    for file in first.files:
        assert str(first.path.parent).encode() not in (first.path / file).read_bytes()


@pytest.mark.parametrize("killed_at", [5, 13])
def test_a_killed_training_goes_on_to_the_same_bytes(
    pico_source: Artifact, new_context: Callable[..., Context], tmp_path: Path, killed_at: int
) -> None:
    config = Config(**QUICK, epochs=2, save_steps=3)
    whole = run(pico_source, config, new_context())
    scratch = tmp_path
    with pytest.raises(Killed):
        run(pico_source, config, new_context(scratch=scratch, progress=KilledAt(killed_at)))
    # A checkpoint that a kill cut short is not gone on from.
    (scratch / "checkpoint-99").mkdir()
    seen: list[float] = []

    class Watch(Progress):
        def update(self, name: str, done: float, total: float, text: str = "") -> None:
            seen.append(done)

    resumed = run(pico_source, config, new_context(scratch=scratch, progress=Watch()))
    assert seen[0] == killed_at // 3 * 3 + 1
    assert resumed.digest == whole.digest


def test_early_stopping_keeps_the_best_epoch(pico_source: Artifact, new_context: Callable[..., Context]) -> None:
    wild = {**QUICK, "learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_ratio": 0}
    result = run(pico_source, Config(**wild, epochs=20, early_stopping_patience=1), new_context())
    assert result.details["steps"] < 20 * 8


def test_a_loss_that_is_no_number_is_an_error(pico_source: Artifact, new_context: Callable[..., Context]) -> None:
    # Logged every ten steps.
    settings = {**QUICK, "optim": "sgd", "learning_rate": 1e30, "max_grad_norm": 1e30, "warmup_ratio": 0}
    with pytest.raises(StageError, match=r"the loss is (nan|inf) at step 10"):
        run(pico_source, Config(**settings, epochs=2), new_context())
    with pytest.raises(StageError, match=r"the loss is (nan|inf) (in training|on the validation rows)"):
        run(pico_source, Config(**settings, epochs=0.5), new_context())


def test_early_stopping_without_validation_rows_is_an_error(
    pico_source: Artifact, new_context: Callable[..., Context], tmp_path: Path
) -> None:
    data = Data(tmp_path, {}, {"train": 8})
    with pytest.raises(StageError, match="needs validation rows"):
        run(pico_source, Config(**QUICK, early_stopping_patience=1), new_context(data=data))


def test_an_unknown_tracker_is_an_error(pico_source: Artifact, new_context: Callable[..., Context]) -> None:
    with pytest.raises(StageError, match=r"can't be set up.*no_such_tracker"):
        run(pico_source, Config(**QUICK, report_to=("no_such_tracker",)), new_context())


def test_batches_hold_rows_of_similar_length_in_an_order_of_the_seed() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(3, 60) for _ in range(1000)]
    order = length_grouped(lengths, 32, "0/0")
    assert sorted(order) == list(range(1000))
    assert order == length_grouped(lengths, 32, "0/0")
    assert order != length_grouped(lengths, 32, "0/1")
    padded = sum(max(lengths[row] for row in order[i : i + 32]) * len(order[i : i + 32]) for i in range(0, 1000, 32))
    assert padded < 1.1 * sum(lengths)
    first = [lengths[batch] for batch in order[::32]]
    assert first != sorted(first, reverse=True)


def test_the_saved_config_names_no_place(pico_source: Artifact, new_context: Callable[..., Context]) -> None:
    result = run(pico_source, Config(**QUICK, epochs=0.2), new_context())
    config = json.loads((result.path / "config.json").read_text())
    assert not config.get("_name_or_path")
    assert config["label2id"] == {"negative": 0, "positive": 1}


def test_parts_of_a_batch_add_up_to_it(pico_source: Artifact, new_context: Callable[..., Context]) -> None:
    """All 120 rows at one step, at once and in parts: the same gradient, unclipped."""
    plain = {**QUICK, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "warmup_ratio": 0}
    model = AutoModelForSequenceClassification.from_pretrained(pico_source.path)
    folder = new_context().directory
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(pico_source.path).save_pretrained(folder)
    calm = Artifact.from_directory(folder, format="transformers", task=pico_source.task)
    weights = []
    for size, parts in ((120, 1), (20, 6)):
        config = Config(**{**plain, "batch_size": size, "gradient_accumulation_steps": parts})
        result = run(calm, config, new_context())
        assert result.details["steps"] == 1
        weights.append(load_file(result.path / "model.safetensors"))
    before = load_file(calm.path / "model.safetensors")
    assert max((weights[0][name] - before[name]).abs().max() for name in before) > 1e-4
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-5, rtol=1e-4)
