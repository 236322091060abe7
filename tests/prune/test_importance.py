"""Importances against their definitions: a gate that closes, and norms by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optimize.prune import importance
from optimize.prune.dependency import find
from optimize.prune.forward import loss_of
from optimize.prune.units import Dimension


class Net(nn.Module):
    """Two linear layers, with a gate at each hidden unit."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 6), nn.Linear(6, 3)
        self.gates = torch.ones(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(x)) * self.gates)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = (4, 4, 3)
    return [
        {
            "pixel_values": torch.randn(n, 5, generator=generator),
            "labels": torch.randint(0, 3, (n,), generator=generator),
        }
        for n in sizes
    ]


def dimension(net: Net, batches: list[dict[str, torch.Tensor]]) -> list[Dimension]:
    (one,) = find(net, {"pixel_values": batches[0]["pixel_values"]})
    assert (one.kind, one.units, one.name) == ("ffn", 6, "outer")
    return [one]


@pytest.mark.parametrize("squared", [False, True])
def test_gradients_are_those_of_a_gate(net: Net, batches: list[dict[str, torch.Tensor]], squared: bool) -> None:
    dimensions = dimension(net, batches)
    got = importance.gradients(net, dimensions, batches, loss_of, squared=squared)["outer"]
    slopes = []
    for batch in batches:
        for row in range(len(batch["labels"])):
            net.gates = torch.ones(6, requires_grad=True)
            loss_of(net, {name: value[row : row + 1] for name, value in batch.items()}).backward()
            slopes.append(net.gates.grad)
    each = torch.stack(slopes)
    expected = each.square().mean(0) / 2 if squared else each.abs().mean(0)
    torch.testing.assert_close(got, expected.double(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("p", [1, 2])
def test_norms_are_over_all_weights_of_a_unit(net: Net, batches: list[dict[str, torch.Tensor]], p: int) -> None:
    got = importance.magnitudes(net, dimension(net, batches), p)["outer"]
    rows = torch.cat([net.inner.weight.detach().T, net.outer.weight.detach()]).T  # one for each unit
    expected = rows.double().norm(p=p, dim=1)
    torch.testing.assert_close(got, expected / expected.mean())


def test_random_scores_follow_the_seed(net: Net, batches: list[dict[str, torch.Tensor]]) -> None:
    dimensions = dimension(net, batches)
    first, again, other = (importance.at_random(dimensions, seed)["outer"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_first_order_tells_a_dead_unit(net: Net, batches: list[dict[str, torch.Tensor]]) -> None:
    with torch.no_grad():
        net.outer.weight[:, 2] = 0
    scores = importance.gradients(net, dimension(net, batches), batches, loss_of, squared=False)["outer"]
    assert scores.argmin() == 2
    assert scores[2] == 0
