"""The accuracy budget: bad layers are found, no more than needed stays in float, and what can't be met is said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from optimize.errors import StageError
from optimize.evaluate.fidelity import fidelity
from optimize.evaluate.metrics import ACCURACY
from optimize.progress import Progress
from optimize.quantize.budget import Spent, spend

ROWS = 200
TARGETS = np.arange(ROWS) % 2
FLOAT = np.stack([1.0 - 2.0 * TARGETS, 2.0 * TARGETS - 1.0], axis=1)


class Told(Progress):
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.updates: list[tuple[float, float]] = []

    def warn(self, name: str, message: str) -> None:
        self.warnings.append(message)

    def update(self, name: str, done: float, total: float, text: str = "") -> None:
        self.updates.append((done, total))


class Stub:
    """A task whose "runner" is the set of layers in float; each layer in 8 bits turns its own share of the answers."""

    metrics = {"accuracy": ACCURACY}
    default_metrics = ("accuracy",)
    fidelity = staticmethod(fidelity)

    def __init__(self, wrong: dict[str, int], noise: dict[str, float]) -> None:
        self.wrong, self.noise = wrong, noise

    def preprocessor(self, path: Path, *, trust_remote_code: bool) -> None: ...

    def evaluation_spec(self, spec: Any, info: Any) -> Any:
        return spec

    def targets(self, rows: pa.Table) -> np.ndarray:
        return rows["label"].to_numpy()

    def respond(self, runner: frozenset[str], preprocessor: Any, rows: pa.Table, spec: Any, *, batch_size: int) -> Any:
        outputs = FLOAT.copy()
        for i, (layer, count) in enumerate(self.wrong.items()):
            if layer not in runner:
                outputs[i * 20 : i * 20 + count] *= -1
                outputs[:, 0] += self.noise[layer] / 10
        return outputs[: rows.num_rows]


def spent(
    wrong: dict[str, int], max_drop: float, *, noise: dict[str, float] | None = None, rows: int = ROWS
) -> tuple[Spent, Told]:
    """What `spend` decides for layers that each turn so many answers; `noise` is what makes them look sensitive."""
    told = Told()
    table = pa.table({"label": TARGETS}).slice(0, rows)
    context: Any = SimpleNamespace(
        task=Stub(wrong, noise or {layer: float(count) for layer, count in wrong.items()}),
        data=SimpleNamespace(rows=lambda split: table, info={}),
        update=lambda *update: told.update("stage", *update),
        warn=lambda message: told.warn("stage", message),
    )
    artifact: Any = SimpleNamespace(path=Path(), task={}, trust_remote_code=False)
    opened: Any = frozenset
    return spend(max_drop, list(wrong), opened, artifact, context), told


def test_the_planted_layers_are_kept_and_no_others() -> None:
    found, told = spent({"a": 0, "b": 6, "c": 0, "d": 2}, max_drop=0.005)
    assert found.kept == ("b", "d")
    assert found.details == {
        "metric": "accuracy",
        "rows": ROWS,
        "float": 1.0,
        "quantized": 0.96,
        "chosen": 1.0,
        "max_drop": 0.005,
        "distance": "kl",
        "distance_rows": 64,
        "layers": found.details["layers"],
    }
    assert list(found.details["layers"])[:2] == ["b", "d"]
    assert found.details["layers"]["b"] > 2 * found.details["layers"]["d"] > found.details["layers"]["a"] == 0
    assert all(0 <= done <= total for done, total in told.updates)
    assert told.warnings == []


def test_a_drop_of_exactly_the_budget_is_allowed() -> None:
    assert spent({"a": 0, "b": 6, "c": 0, "d": 2}, max_drop=0.01)[0].kept == ("b",)


def test_a_budget_that_is_met_keeps_nothing_and_still_tells_sensitivities() -> None:
    found, _ = spent({"a": 1, "b": 2}, max_drop=0.02)
    assert found.kept == ()
    assert found.details["quantized"] == found.details["chosen"] == 0.985
    assert list(found.details["layers"]) == ["b", "a"]


def test_layers_that_only_look_sensitive_are_put_back() -> None:
    """What the bad layer spoils lies beyond the rows that layers are ranked on."""
    noise = {"loud": 4.0, "louder": 5.0, "good": 0.0, "better": 0.0, "bad": 0.0}
    found, _ = spent(dict.fromkeys(noise, 0) | {"bad": 8}, max_drop=0.005, noise=noise)
    assert list(found.details["layers"])[:2] == ["louder", "loud"]
    assert found.kept == ("bad",)


def test_many_layers_take_few_trials() -> None:
    wrong = {f"layer{i}": 5 if i == 3 else 0 for i in range(9)}
    assert spent(wrong, max_drop=0)[0].kept == ("layer3",)


def test_a_budget_that_no_layer_meets_is_an_error() -> None:
    with pytest.raises(StageError, match=r"within max_drop 0\.001 of accuracy: each alone costs more, even 'a'"):
        spent({"a": 2, "b": 3}, max_drop=0.001)


def test_no_calibration_rows_are_an_error() -> None:
    with pytest.raises(StageError, match="needs calibration rows"):
        spent({"a": 2}, max_drop=0.1, rows=0)


def test_a_budget_below_one_row_is_warned_of() -> None:
    assert "one of 200 calibration rows is 0.005" in spent({"a": 0}, max_drop=0.004)[1].warnings[0]
