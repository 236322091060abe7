from __future__ import annotations

import numpy as np
import pytest

from optimize.evaluate.fidelity import fidelity


def test_equal_outputs_are_no_distance_apart() -> None:
    outputs = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    found = fidelity(outputs, outputs)
    assert found["n"] == 50
    assert found["flips"] == 0
    assert found["kl"]["max"] == pytest.approx(0, abs=1e-12)
    assert found["cosine_distance"]["max"] == pytest.approx(0, abs=1e-12)


def test_against_numbers_worked_out_by_hand() -> None:
    reference = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], dtype=np.float32))
    candidate = np.log(np.array([[0.5, 0.5], [0.25, 0.75]], dtype=np.float32))
    found = fidelity(candidate, reference)
    expected = 0.9 * np.log(0.9 / 0.25) + 0.1 * np.log(0.1 / 0.75)
    assert found["kl"]["max"] == pytest.approx(expected, rel=1e-5)
    assert found["kl"]["mean"] == pytest.approx(expected / 2, rel=1e-5)
    assert found["kl"]["median"] == pytest.approx(expected / 2, rel=1e-5)
    assert found["kl"]["p99"] == pytest.approx(0.99 * expected, rel=1e-5)
    assert (found["flips"], found["flip_rate"]) == (1, 0.5)


def test_direction_and_scale() -> None:
    reference = np.array([[1.0, 0.0], [0.0, 2.0]], dtype=np.float32)
    assert fidelity(3 * reference, reference)["cosine_distance"]["max"] == pytest.approx(0)
    assert fidelity(-reference, reference)["cosine_distance"]["mean"] == pytest.approx(2)
    assert fidelity(0 * reference, reference)["cosine_distance"]["max"] == 0


def test_large_logits_do_not_overflow() -> None:
    outputs = np.array([[1e4, -1e4]], dtype=np.float32)
    assert fidelity(outputs, -outputs)["kl"]["max"] == pytest.approx(2e4)


def test_one_number_a_row_has_a_difference_only() -> None:
    found = fidelity(np.array([1.0, 2.0], dtype=np.float32), np.array([1.5, 2.0], dtype=np.float32))
    assert set(found) == {"n", "difference"}
    assert found["difference"]["max"] == 0.5
