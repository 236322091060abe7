from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np

from optimize.evaluate.scores import Scores


def forbidden() -> None:
    raise AssertionError("computed again")


def test_a_value_is_computed_once(tmp_path: Path) -> None:
    scores = Scores(tmp_path)
    assert scores.value("values", {"of": 1}, lambda: {"ci": [0.5, math.inf]}) == {"ci": [0.5, math.inf]}
    again = Scores(tmp_path)
    assert again.value("values", {"of": 1}, forbidden) == {"ci": [0.5, math.inf]}
    assert (scores.computed, again.computed) == (["values"], [])
    assert again.value("values", {"of": 2}, lambda: 2) == 2


def test_an_array_is_computed_once(tmp_path: Path) -> None:
    outputs = np.arange(6, dtype=np.float32).reshape(3, 2)
    Scores(tmp_path).array("outputs", {"of": 1}, lambda: outputs)
    again = Scores(tmp_path).array("outputs", {"of": 1}, forbidden)  # type: ignore[arg-type, return-value]
    assert again.dtype == np.float32
    np.testing.assert_array_equal(again, outputs)


def test_damaged_files_are_measured_again(tmp_path: Path) -> None:
    scores = Scores(tmp_path)
    scores.value("values", {"of": 1}, lambda: 1)
    scores.path("values", {"of": 1}).write_text('{"val')
    assert scores.value("values", {"of": 1}, lambda: 2) == 2
    scores.array("outputs", {"of": 1}, lambda: np.zeros(3, dtype=np.float32))
    path = scores.path("outputs", {"of": 1}, ".npz")
    whole = path.read_bytes()
    for damage in (b"", whole[:40], b"no archive"):
        path.write_bytes(damage)
        assert scores.array("outputs", {"of": 1}, lambda: np.ones(3, dtype=np.float32)).tolist() == [1, 1, 1]
    # Whichever byte it is: the archive is right, or it is measured again.
    for place in range(len(whole)):
        path.write_bytes(bytes([*whole[:place], whole[place] ^ 0xFF, *whole[place + 1 :]]))
        found = scores.array("outputs", {"of": 1}, lambda: np.ones(3, dtype=np.float32)).tolist()
        assert found in ([0, 0, 0], [1, 1, 1])


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    scores = Scores(tmp_path)
    path = scores.path("outputs", {"of": 1}, ".npz")
    path.parent.mkdir(parents=True)
    np.savez(path, value=np.array([Bomb()], dtype=object))
    assert scores.array("outputs", {"of": 1}, lambda: np.ones(1, dtype=np.float32)).tolist() == [1]
    assert not (tmp_path / "exploded").exists()
