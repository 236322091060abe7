"""`optimize sensitivity`: what it says of a layer is what that layer does, and its choice is better than none."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import kl_div, log_softmax

from optimize import cli, planning, sensitivity
from optimize.data import Data
from optimize.engine import build
from optimize.errors import RecipeError
from optimize.progress import Progress
from optimize.quantize.gptq_format import TENSORS
from optimize.recipe import load
from optimize.sensitivity import measuring
from optimize.work import Work

QUICK: dict[str, Any] = {"samples": 24, "length": 32}


@pytest.fixture(autouse=True)
def no_evaluation_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be prepared, and never read."""
    original = Data.rows

    def rows(self: Data, split: str) -> Any:
        assert split != "evaluation"
        return original(self, split)

    monkeypatch.setattr(Data, "rows", rows)


def test_a_figure_is_the_divergence_of_that_layer_alone(classes: Path, work: Work, pico_model: Path) -> None:
    found = sensitivity.measure(classes, work=work, settings=[0.3, 0.8], **QUICK)
    assert found["distance"] == "kl"
    assert [row["name"] for row in found["layers"]][:3] == [
        f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value")
    ]
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    dense = AutoModelForSequenceClassification.from_pretrained(pico_model).eval()
    rows = _data(classes, work).rows("calibration")
    drawn = rows.take(random.Random(0).sample(range(rows.num_rows), 24))
    told = AutoTokenizer.from_pretrained(pico_model)(drawn["text"].to_pylist(), padding=True, return_tensors="pt")
    labels = torch.tensor(drawn["label"].to_pylist())
    for row in found["layers"][::5]:
        for one in row["settings"]:
            changed = copy.deepcopy(dense)
            weight = changed.get_submodule(row["name"]).weight
            with torch.no_grad():
                order = weight.abs().flatten().argsort(stable=True)
                weight.view(-1)[order[: round(one["setting"] * weight.numel())]] = 0
                ours, theirs = changed(**told, labels=labels), dense(**told, labels=labels)
            apart = kl_div(
                log_softmax(ours.logits, -1), log_softmax(theirs.logits, -1), log_target=True, reduction="none"
            )
            assert one["distance"] == pytest.approx(apart.sum(-1).mean().item(), rel=0.02, abs=2e-7)
            assert one["loss"] == pytest.approx((ours.loss - theirs.loss).item(), rel=0.02, abs=1e-5)
            flips = (ours.logits.argmax(-1) != theirs.logits.argmax(-1)).float().mean().item()
            assert one["flip_rate"] == pytest.approx(flips, abs=1e-3)


def _data(recipe: Path, work: Work) -> Data:
    from optimize import tasks
    from optimize.data import prepare

    loaded = load(recipe)
    return prepare(loaded.data, tasks.get(loaded.model.task), work, loaded.base)


class Watch(Progress):
    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at = kill_at
        self.seen: list[str] = []

    def update(self, name: str, done: float, total: float, text: str = "") -> None:
        if name == measuring.STEP:
            self.seen.append(text.partition(",")[0])
            if len(self.seen) == self.kill_at:
                raise Killed


class Killed(BaseException):
    """Stands for a signal."""


def test_a_budget_goes_where_it_hurts_least(language: Path, work: Work, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        sensitivity.measure(language, work=work, settings=[2, 4, 8], progress=Watch(kill_at=30), **QUICK)
    watch, written = Watch(), tmp_path / "mixed.yaml"
    found = sensitivity.measure(
        language, work=work, settings=[2, 4, 8], budget=4, write=written, progress=watch, **QUICK
    )
    # It went on behind the first block.
    assert len(watch.seen) == 14 * 3
    assert not [name for name in watch.seen if ".layers.0." in name]
    damage = {row["name"]: {one["setting"]: one["distance"] for one in row["settings"]} for row in found["layers"]}
    assert len(damage) == 21
    assert all(one[2] > one[4] > one[8] for name, one in damage.items() if ".layers.1." not in name)
    assert all(max(one.values()) < 1e-5 for name, one in damage.items() if ".layers.1." in name)
    spent = found["budget"]
    # With so little to lose, of what is left over the middle block gets no more than what divides badly.
    bare = [spent["chosen"][name] for name in damage if ".layers.1." in name]
    assert bare.count(2) >= 5
    assert max(bare) == 4
    weights = {row["name"]: row["weights"] for row in found["layers"]}
    mean = sum(spent["chosen"][name] * count for name, count in weights.items()) / sum(weights.values())
    assert spent["bits"] == pytest.approx(mean, rel=1e-3)
    assert mean <= 4
    assert spent["gap"] == 0
    assert spent["predicted"] == pytest.approx(
        sum(damage[name][bits] for name, bits in spent["chosen"].items()), rel=0.01
    )
    # The stage itself, with that choice, is better than with 4 bits everywhere, and damages do nearly add up.
    check = spent["check"]
    assert check["better"] == "mix"
    assert check["mix"]["distance"] < 0.6 * check["uniform"]["distance"]
    assert check["uniform"]["setting"] == 4
    assert 0.3 < check["mix"]["distance"] / spent["predicted"] < 2
    # The recipe says it briefly, keeps all else, and what it asks for is there already.
    text = written.read_text()
    original = language.read_text()
    added = [line for line in text.splitlines() if line not in original.splitlines()]
    assert [line for line in text.splitlines() if line not in added] == original.splitlines()
    assert added[0] == "    layers:  # by `optimize sensitivity`"
    assert all(
        line.startswith('      "model.layers.') and line.endswith(("{bits: 2}", "{bits: 8}")) for line in added[1:]
    )
    assert spent["recipe"] == {"path": str(written), "comments_kept": True}
    assert {step.status for step in planning.plan(written, work=work).steps} == {"CACHED"}
    # The document is kept, and another budget needs no measurement.
    assert json.loads(Path(found["file"]).read_text())["budget"] == spent
    watch = Watch()
    less = sensitivity.measure(
        language, work=work, settings=[2, 4, 8], budget="40%", check=False, progress=watch, **QUICK
    )
    assert not watch.seen
    assert less["layers"] == found["layers"]
    assert less["budget"]["check"] is None


def test_a_share_of_the_size_is_that_of_the_files(language: Path, work: Work, tmp_path: Path) -> None:
    written = tmp_path / "mixed.yaml"
    common: dict[str, Any] = {"work": work, "by": "block", "settings": [2, 8], "check": False, **QUICK}
    by_bits = sensitivity.measure(language, budget=4, write=written, **common)
    chosen = by_bits["budget"]["chosen"]
    assert sorted(chosen) == [f"model.layers.{number}" for number in range(3)]
    assert sorted(chosen.values()) == [2, 2, 8]
    artifact, _ = build(load(written), "gptq", work, Progress())
    share = artifact.size_bytes / by_bits["size_bytes"]
    by_size = sensitivity.measure(language, budget=f"{100 * share:.3f}%", **common)
    assert by_size["budget"]["chosen"] == chosen
    with safe_open(artifact.path / "model.safetensors", "pt") as file:
        packed = [file.get_tensor(name) for name in file.keys() if name.endswith(TENSORS)]  # noqa: SIM118
    assert by_size["budget"]["size_bytes"] == sum(tensor.nbytes for tensor in packed)
    with pytest.raises(RecipeError, match="budget can't be met: 2 in every layer costs more"):
        sensitivity.measure(language, budget="10%", **common)


def test_an_encoder_is_pruned_where_it_bears_it(classes: Path, work: Work, tmp_path: Path) -> None:
    classes.write_text(classes.read_text().replace("magnitude", "wanda"))
    written = tmp_path / "sparse.yaml"
    found = sensitivity.measure(
        classes, work=work, by="block", settings=[0.2, 0.5, 0.8], budget=0.5, write=written, **QUICK
    )
    assert [row["block"] for row in found["layers"]] == [0, 1]
    assert found["budget"]["sparsity"] >= 0.5
    # Braces leave no room for comments, and the recipe is valid all the same.
    assert found["budget"]["recipe"]["comments_kept"] is False
    assert load(written).document()["stages"][0]["sparsity"] == 0.5
    assert {step.status for step in planning.plan(written, work=work).steps} == {"CACHED"}


def test_passes_that_begin_at_a_block_give_the_answers_of_whole_ones(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    from optimize.sensitivity.answers import Blockwise

    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    model.eval()
    batches = [{"input_ids": torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(n))} for n in (0, 1)]
    passes = Blockwise(model, list(model.model.layers), batches)
    whole = [passes.run(n)["logits"] for n in range(2)]
    seen: list[tuple[str, int]] = []
    for number in range(3):
        inside = {"down": model.model.layers[number].mlp.down_proj}
        passes.advance(inside, lambda name, batch, x: seen.append((name, batch)))
        assert all(torch.equal(passes.run(n)["logits"], whole[n]) for n in range(2))
    assert seen == [("down", 0), ("down", 1)] * 3
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()  # runs no more
    assert torch.equal(passes.run(0)["logits"], whole[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "other"}, "no stage named 'other' has a setting"),
        ({"settings": [5]}, "5 is no width in bits"),
        ({"budget": "much"}, "'much' is no budget of bits"),
        ({"budget": "0"}, "'0' is no budget of bits"),
        ({"write": "here.yaml"}, "a recipe is written for a budget"),
        ({"budget": 4, "write": "RECIPE"}, "exists already"),
        ({"budget": 4, "write": "/nowhere/x.yaml"}, "there is no folder /nowhere"),
        ({"budget": 4, "overrides": ["stages.0.backend=gptqmodel"]}, None),
        ({"overrides": ["data.splits={evaluation: 1.0}"]}, "no calibration rows"),
    ],
)
def test_mistakes_are_said_before_any_work(
    options: dict[str, Any], message: str | None, language: Path, work: Work
) -> None:
    given: dict[str, Any] = {name: str(language) if value == "RECIPE" else value for name, value in options.items()}
    with pytest.raises(RecipeError, match=message):
        sensitivity.measure(language, work=work, **given)
    assert not work.root.exists()


def test_the_command_prints_one_document_or_a_table(
    classes: Path, work: Work, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = [
        "sensitivity",
        str(classes),
        "--work",
        str(work.root),
        "--settings",
        "0.5",
        "--samples",
        "24",
        "--length",
        "32",
    ]
    for more, code in (["--json"], 0), ([], 0), (["--budget", "2"], 2), (["--settings", "x"], 2):
        monkeypatch.setenv("OPTIMIZE_WORK", str(work.root))
        with pytest.raises(SystemExit) as ended:
            cli.main([*call, *more])
        assert ended.value.code == code
        out = capsys.readouterr().out
        if more == ["--json"]:
            document = json.loads(out)
            assert document["schema"] == 1
            assert np.isfinite([one["distance"] for row in document["layers"] for one in row["settings"]]).all()
        elif not more:
            assert "0.5 sparsity" in out
            assert "bert.encoder.layer.1.output.dense" in out
