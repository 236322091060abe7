"""A transformer's blocks as a list from which some can be left out, and what that would cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from optimize.blockwise.blocks import find_blocks
from optimize.prune.forward import answers, loss_of

if TYPE_CHECKING:
    from torch import Tensor, nn

Batches = Sequence[Mapping[str, "Tensor"]]
Told = Callable[[int, int], None]


def of(model: Any) -> nn.ModuleList:
    """Raises `StageError` where the model has none."""
    found: nn.ModuleList = model.get_submodule(find_blocks(model))
    return found


def angular_distances(model: Any, batches: Batches, span: int, on_batch: Told) -> list[float]:
    """Of `span` blocks from each one on: the mean angle between what they get and what they give, over pi, in [0, 1].

    Of a language model at the last token, which alone is certain to have seen the text; else over all tokens.
    """
    import torch

    depth = len(of(model))
    sums = [0.0] * (depth - span + 1)
    count = 0
    for number, batch in enumerate(batches):
        with torch.no_grad(), _states(model) as states:
            answers(model, batch)
        shown = _looked_at(model, batch, states[0])
        for first in range(len(sums)):
            before, after = states[first][shown].double(), states[first + span][shown].double()
            cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1).clamp(-1, 1)
            sums[first] += float((cosine.arccos() / torch.pi).sum())
        count += int(shown.sum())
        on_batch(number + 1, len(batches))
    return [total / count for total in sums]


def losses_without(model: Any, batches: Batches, span: int, on_batch: Told) -> list[float]:
    """The mean loss without `span` blocks from each one on."""
    import torch

    depth = len(of(model))
    places = depth - span + 1
    found = []
    for first in range(places):
        total, rows = 0.0, 0
        with torch.no_grad(), _without(model, range(first, first + span)):
            for batch in batches:
                size = len(next(iter(batch.values())))
                total += float(loss_of(model, batch)) * size
                rows += size
        found.append(total / rows)
        on_batch(first + 1, places)
    return found


def keep(model: Any, kept: Sequence[int]) -> None:
    """Leave out all other blocks for good: in the model, in its config, and in what blocks know of their place."""
    from torch import nn

    name = find_blocks(model)
    owner, _, key = name.rpartition(".")
    old = model.get_submodule(name)
    setattr(model.get_submodule(owner), key, nn.ModuleList(old[i] for i in kept))
    for place, i in enumerate(kept):
        for module in old[i].modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = place  # which is where the cache keeps its keys
    config = model.config.get_text_config()
    config.num_hidden_layers = len(kept)
    for setting, value in config.to_dict().items():
        of_layers = "layer" in setting and isinstance(value, list) and len(value) == len(old)
        if of_layers:  # `layer_types`: one for each
            setattr(config, setting, [value[i] for i in kept])


@contextmanager
def _without(model: Any, gone: range) -> Iterator[None]:
    from torch import nn

    name = find_blocks(model)
    owner, _, key = name.rpartition(".")
    parent, old = model.get_submodule(owner), model.get_submodule(name)
    setattr(parent, key, nn.ModuleList(block for i, block in enumerate(old) if i not in gone))
    try:
        yield
    finally:
        setattr(parent, key, old)


@contextmanager
def _states(model: Any) -> Iterator[list[Tensor]]:
    """While the model runs in here: what each block gets, and what the last one gives, [batch, length, width]."""
    states: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        states.append(args[0] if args else named["hidden_states"])

    def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        states.append(result[0] if isinstance(result, tuple) else result)

    blocks = of(model)
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(blocks[-1].register_forward_hook(after).remove)
        yield states


def _looked_at(model: Any, batch: Mapping[str, Tensor], states: Tensor) -> Tensor:
    """Which tokens count, [batch, length] of truth values."""
    import torch

    real = batch.get("attention_mask")
    real = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if real is None else real.bool()
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return real
    places = torch.arange(real.shape[1], device=real.device)
    return real & (places == (places * real).amax(dim=1, keepdim=True))
