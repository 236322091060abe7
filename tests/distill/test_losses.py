"""The losses against PyTorch's own, closed forms, and what has to hold of any of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from optimize.distill import losses


def logits(seed: int, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_softened_is_pytorchs_divergence(temperature: float) -> None:
    teacher, student = logits(0, 7, 5), logits(1, 7, 5)
    expected = temperature**2 * functional.kl_div(
        functional.log_softmax(student / temperature, -1),
        functional.softmax(teacher / temperature, -1),
        reduction="batchmean",
    )
    torch.testing.assert_close(losses.softened(teacher, student, temperature), expected)
    assert losses.softened(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-6)


def test_what_is_no_choice_counts_nothing_and_has_a_gradient_of_zero() -> None:
    teacher, student = logits(0, 4, 6), logits(1, 4, 6)
    teacher[:, 4:] = student[:, 4:] = -torch.inf
    student.requires_grad_()
    found = losses.softened(teacher, student, 2.0)
    torch.testing.assert_close(found, losses.softened(teacher[:, :4], student[:, :4], 2.0))
    found.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert (student.grad[:, 4:] == 0).all()


@given(st.integers(0, 1000), st.integers(2, 30), st.floats(0.5, 8))
def test_fewer_outcomes_never_diverge_more(seed: int, vocabulary: int, temperature: float) -> None:
    teacher, student = logits(seed, 5, vocabulary), logits(seed + 1, 5, vocabulary)
    before = losses.softened(teacher, student, temperature).item()
    for k in sorted({1, vocabulary // 2, vocabulary - 1}, reverse=True):
        kept, indices = losses.most_likely(teacher, k, temperature)
        assert (kept[:, :k].diff(dim=-1) <= 0).all()
        torch.testing.assert_close(kept.exp().sum(dim=-1), torch.ones(5))
        found = losses.softened_top(kept, indices, student, temperature).item()
        assert -1e-4 <= found <= before * (1 + 1e-4) + 1e-4
        before = found


def test_one_outcome_left_over_is_that_outcome() -> None:
    """With all but one kept, value and gradient are those of all."""
    teacher, student = logits(0, 3, 8), logits(1, 3, 8)
    found = []
    for k in (None, 7):
        given = student.clone().requires_grad_()
        if k is None:
            loss = losses.softened(teacher, given, 2.0)
        else:
            loss = losses.softened_top(*losses.most_likely(teacher, k, 2.0), given, 2.0)
        loss.backward()
        assert given.grad is not None
        found.append(torch.cat([loss.detach()[None], given.grad.flatten()]))
    torch.testing.assert_close(*found)


def test_hidden_distances_are_zero_for_the_same_and_known_for_others() -> None:
    states = logits(0, 6, 4)
    for kind in ("mse", "cosine"):
        assert losses.hidden_distance(states, states, kind).item() == pytest.approx(0, abs=1e-6)
    assert losses.hidden_distance(states, -states, "cosine").item() == pytest.approx(2)
    assert losses.hidden_distance(states, states + 2, "mse").item() == pytest.approx(4)
    assert losses.hidden_distance(states, 3 * states, "cosine").item() == pytest.approx(0, abs=1e-6)


def test_relations_of_one_head_are_softmax_of_products() -> None:
    vectors = logits(0, 1, 5, 6)
    seen = torch.tensor([[True, True, True, True, False]])
    found = losses.relations(vectors, seen, 1)[0, 0]
    expected = (vectors[0] @ vectors[0, :4].T / 6**0.5).softmax(-1)
    torch.testing.assert_close(found.exp()[:, :4], expected)
    assert (found[:, 4] == -torch.inf).all()


def test_relations_of_other_widths_compare_and_padding_counts_nothing() -> None:
    wanted, found = logits(0, 2, 5, 8), logits(1, 2, 5, 4)
    seen = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    before = losses.relation_distance(wanted, found, seen, 2)
    spoilt = found.clone()
    spoilt[1, 3:] = 99
    torch.testing.assert_close(losses.relation_distance(wanted, spoilt, seen, 2), before)
    assert before > 0
    assert losses.relation_distance(found, found, seen, 2).item() == pytest.approx(0, abs=1e-6)


def test_maps_with_other_numbers_of_heads_are_compared_by_their_mean() -> None:
    wanted, found = logits(0, 6, 4, 5).softmax(-1), logits(1, 6, 2, 5).softmax(-1)
    mean = losses.map_distance(wanted.mean(1, keepdim=True), found.mean(1, keepdim=True))
    torch.testing.assert_close(losses.map_distance(wanted, found), mean)
    assert losses.map_distance(wanted, wanted).item() == pytest.approx(0, abs=1e-6)


@given(st.integers(1, 12), st.integers(0, 24))
def test_uniform_pairs_rise_to_the_last(students: int, more: int) -> None:
    teachers = students + more
    pairs = losses.layer_pairs("uniform", students, teachers)
    assert [ours for ours, _ in pairs] == list(range(students))
    theirs = [layer for _, layer in pairs]
    assert theirs == sorted(set(theirs))
    assert theirs[-1] == teachers - 1
    assert min(theirs) >= 0


def test_layers_that_are_not_there_are_named() -> None:
    assert losses.layer_pairs("last", 3, 6) == [(2, 5)]
    assert losses.layer_pairs("uniform", 3, 6) == [(0, 1), (1, 3), (2, 5)]
    assert losses.layer_pairs({2: 5, 0: 1}, 3, 6) == [(0, 1), (2, 5)]
    with pytest.raises(ValueError, match="the student has layers 0 to 2, and no 3"):
        losses.layer_pairs({3: 5}, 3, 6)
    with pytest.raises(ValueError, match="the teacher has layers 0 to 5, and no 6"):
        losses.layer_pairs({0: 6}, 3, 6)
