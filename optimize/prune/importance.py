"""How much each unit matters: from its weights, or from what the loss does when a gate at the unit closes a little.

A gate g multiplies what the unit gives to those that read it. With x what they read and dL/dx its gradient, dL/dg is
the sum of x dL/dx over the unit's channels and positions, for each row by itself:

- `taylor`: the mean of |dL/dg|, the first-order change of the loss when the unit goes (Molchanov et al., 2017,
  https://arxiv.org/abs/1611.06440; for heads Michel et al., 2019, https://arxiv.org/abs/1905.10650);
- `hessian`: the mean of (dL/dg)^2 / 2, the second-order change with Fisher's information in the Hessian's place (LeCun
  et al., 1989; Theis et al., 2018, https://arxiv.org/abs/1801.05787).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from optimize.prune.units import Dimension, Slice

Scores = dict[str, "Tensor"]
"""Name of a dimension -> its units' importances [units], float64."""


def magnitudes(model: nn.Module, dimensions: Iterable[Dimension], p: int) -> Scores:
    """The p-norm of all weights of linear and convolutional layers that go with a unit, over the mean of its dimension,
    so that layers of different scale can be compared.
    """
    import torch
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    scores = {}
    for dimension in dimensions:
        total = torch.zeros(dimension.units, dtype=torch.float64)
        for part in dimension.slices:
            module = model.get_submodule(part.name) if part.side != "parameter" else None
            if isinstance(module, nn.Linear | _ConvNd):
                weight = module.weight.detach().double()
                channels = weight.movedim(1 if part.side == "in" else 0, 0).flatten(1)
                total += _per_unit(channels.abs().pow(p).sum(1).cpu()[None], part)[0]
        norms = total.pow(1 / p)
        scores[dimension.name] = norms / norms.mean()
    return scores


def at_random(dimensions: Iterable[Dimension], seed: int) -> Scores:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {one.name: torch.rand(one.units, generator=generator, dtype=torch.float64) for one in dimensions}


def gradients(
    model: nn.Module,
    dimensions: Sequence[Dimension],
    batches: Sequence[Mapping[str, Tensor]],
    loss_of: Callable[[Any, Mapping[str, Tensor]], Tensor],
    *,
    squared: bool,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """`taylor`, or `hessian` where `squared`. `loss_of` gives the mean over a batch's rows."""
    import torch

    totals = {one.name: torch.zeros(one.units, dtype=torch.float64) for one in dimensions}
    rows = 0
    for number, batch in enumerate(batches):
        size = len(next(iter(batch.values())))
        slopes = {one.name: torch.zeros(size, one.units, dtype=torch.float64) for one in dimensions}
        with torch.enable_grad(), _gates(model, dimensions, slopes, size):
            (loss_of(model, batch) * size).backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)
        for name, slope in slopes.items():
            totals[name] += (slope.square() / 2 if squared else slope.abs()).sum(0)
        rows += size
        on_batch(number + 1, len(batches))
    return {name: total / rows for name, total in totals.items()}


@contextmanager
def _gates(model: nn.Module, dimensions: Sequence[Dimension], slopes: Scores, size: int) -> Iterator[None]:
    """Add every unit's dL/dg to `slopes` as gradients come back to those that read it."""

    def watch(name: str, part: Slice) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            # A view: another reader of the same tensor has a gradient of its own.
            read = args[0].view_as(args[0])

            def note(gradient: Tensor) -> None:
                product = read.detach() * gradient
                if product.ndim > 2 and hasattr(module, "kernel_size"):
                    product = product.movedim(1, -1)
                product = product.reshape(size, -1, product.shape[-1]).sum(1)
                slopes[name].add_(_per_unit(product.double().cpu(), part))

            if read.requires_grad:
                read.register_hook(note)
            return (read, *args[1:])

        return hook

    with ExitStack() as stack:
        for dimension in dimensions:
            for part in dimension.readers:
                handle = model.get_submodule(part.name).register_forward_pre_hook(watch(dimension.name, part))
                stack.callback(handle.remove)
        yield


def _per_unit(values: Tensor, part: Slice) -> Tensor:
    """Numbers of channels [n, channels] added up for each unit [n, units]."""
    import torch

    owners = torch.tensor([unit for unit, channels in enumerate(part.channels) for _ in channels])
    order = torch.tensor([channel for channels in part.channels for channel in channels])
    sums = values.new_zeros(len(values), len(part.channels))
    return sums.index_add_(1, owners, values[:, order])
