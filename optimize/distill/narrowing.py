"""A transformer cut down: which of its blocks stay, and which part of each width.

What is cut has to be cut alike wherever it is used: an output that one layer no longer gives, the next may not want.
Widths tell that by themselves. Every dimension that is to go from `a` to `b` loses the same places, in all tensors, so
that whatever was multiplied still is; where the width is that of heads, whole heads go, and of those that stay the same
places each, so that a head stays a head.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Plan:
    """A student's config and where its weights come from. Raises `ValueError` where the sizes make no model."""

    def __init__(self, given: Any, sizes: Mapping[str, int | None], layers: str | Sequence[int]) -> None:
        self.given = given
        old, new = _Shape(given), _Shape(given)
        if isinstance(layers, str):
            self.layers = chosen_layers(layers, sizes["num_hidden_layers"] or old.layers, old.layers)
        else:
            self.layers = list(layers)
        if max(self.layers) >= old.layers:
            raise ValueError(f"the model has blocks 0 to {old.layers - 1}, and no {max(self.layers)}")
        new.layers = len(self.layers)
        new.hidden = _at_most(sizes["hidden_size"], old.hidden, "hidden_size")
        new.inner = _at_most(sizes["intermediate_size"], old.inner, "intermediate_size")
        new.heads = _at_most(sizes["num_attention_heads"], old.heads, "num_attention_heads") or old.heads
        new.groups = new.heads if old.groups == old.heads else old.groups
        if new.heads % new.groups:
            raise ValueError(
                f"{new.heads} heads can't share {new.groups} heads of keys and values evenly: take a multiple of "
                f"{new.groups}"
            )
        # The width of a head follows from the others, unless the config says it and the hidden width stays.
        if not (old.says_head_width and new.hidden == old.hidden) and old.heads * old.head == old.hidden:
            if new.hidden % new.heads:
                raise ValueError(f"a hidden_size of {new.hidden} can't be cut into {new.heads} heads")
            new.head = new.hidden // new.heads
        self.old, self.new = old, new
        self.config = self._config()
        self.places = _places(old, new)

    def _config(self) -> Any:
        """The given config with the new sizes; what it lists for each block it lists for those that stay."""
        new, said = self.new, copy.deepcopy(self.given.to_dict())
        for name, value in said.items():
            if isinstance(value, list) and len(value) == self.old.layers and "layer" in name:
                said[name] = [value[layer] for layer in self.layers]
        known = self.given.attribute_map
        sizes = {
            "num_hidden_layers": new.layers,
            "hidden_size": new.hidden,
            "num_attention_heads": new.heads,
            "intermediate_size": new.inner,
            "num_key_value_heads": new.groups,
            "head_dim": new.head,
        }
        for name, value in sizes.items():
            if said.get(known.get(name, name)) is not None:
                said[known.get(name, name)] = value
        return type(self.given).from_dict(said)


class _Shape:
    """The sizes that a config says."""

    def __init__(self, config: Any) -> None:
        try:
            self.layers: int = config.num_hidden_layers
            self.hidden: int = config.hidden_size
            self.heads: int = config.num_attention_heads
        except AttributeError as error:
            raise ValueError(
                f"a {type(config).__name__} has no layers and heads that could be fewer: {error}"
            ) from error
        self.inner: int | None = getattr(config, "intermediate_size", None)
        self.groups: int = getattr(config, "num_key_value_heads", None) or self.heads
        self.says_head_width = getattr(config, "head_dim", None) is not None
        self.head: int = getattr(config, "head_dim", None) or self.hidden // self.heads


def chosen_layers(which: str, count: int, of: int) -> list[int]:
    """`count` of `of` blocks: the first, the last, or spread evenly from the first to the last, as in DistilBERT."""
    if count > of:
        raise ValueError(f"the model has {of} blocks, and {count} are asked for")
    if which == "first":
        return list(range(count))
    if which == "last":
        return list(range(of - count, of))
    if count == 1:
        return [of - 1]
    return [round(i * (of - 1) / (count - 1)) for i in range(count)]


def cut(model: Any, plan: Plan) -> dict[str, Tensor]:
    """The student's weights, of a model of `plan.given`. Raises `ValueError` for a tensor that can't be cut so."""
    prefixes = _stacks(model, plan.old.layers)
    kept: dict[str, Tensor] = {}
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in type(model)(plan.config).state_dict().items()}
    weights = model.state_dict()
    for name, shape in wanted.items():
        tensor = weights[_origin(name, prefixes, plan.layers)]
        for axis, size in enumerate(shape):
            if tensor.shape[axis] != size:
                tensor = tensor.index_select(axis, _found(tensor.shape[axis], size, plan.places, name))
        kept[name] = tensor.clone()
    return kept


def _stacks(model: Any, layers: int) -> list[str]:
    """Where the blocks are: names of lists of so many modules."""
    from torch import nn

    found = [n for n, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == layers]
    if not found:
        raise ValueError(f"a {type(model).__name__} has no list of {layers} blocks")
    return found


def _origin(name: str, stacks: Sequence[str], layers: Sequence[int]) -> str:
    """Which of the given model's tensors one of the student's is made of."""
    for stack in stacks:
        if name.startswith(f"{stack}."):
            number, _, rest = name.removeprefix(f"{stack}.").partition(".")
            return f"{stack}.{layers[int(number)]}.{rest}"
    return name


def _places(old: _Shape, new: _Shape) -> dict[tuple[int, int], Tensor]:
    """(a width, what it is to be) -> the places that stay."""
    share, kept = old.heads // old.groups, new.heads // new.groups
    if new.groups == old.groups:
        heads = [group * share + head for group in range(new.groups) for head in range(kept)]
    else:
        heads = list(range(new.heads))
    inside = within_head(old.head, new.head)

    def of_heads(chosen: Sequence[int]) -> Tensor:
        return torch.tensor([head * old.head + place for head in chosen for place in inside])

    found = {
        (old.heads * old.head, new.heads * new.head): of_heads(heads),
        (old.head, new.head): torch.tensor(inside),
    }
    found.setdefault((old.groups * old.head, new.groups * new.head), of_heads(range(new.groups)))
    found.setdefault((old.hidden, new.hidden), torch.arange(new.hidden))
    if old.inner and new.inner:
        found.setdefault((old.inner, new.inner), torch.arange(new.inner))
    return found


def within_head(old: int, new: int) -> list[int]:
    """The places of a head's width that stay: spread evenly over each half, since rotary positions turn a place of the
    first half together with one of the second, and faster the nearer it is to the beginning.
    """
    if new >= old or old % 2 or new % 2:
        return list(range(new))
    half = [place * old // new for place in range(new // 2)]
    return half + [old // 2 + place for place in half]


def _found(old: int, new: int, places: Mapping[tuple[int, int], Tensor], name: str) -> Tensor:
    """Also where several widths lie side by side, as queries, keys and values do in GPT-2; its feed-forward layers are
    four widths wide unless the config says otherwise.
    """
    for times in (1, 2, 3, 4):
        chosen = places.get((old // times, new // times)) if old % times == new % times == 0 else None
        if chosen is not None:
            return torch.cat([chosen + part * (old // times) for part in range(times)])
    raise ValueError(f"{name} can't be cut from {old} to {new}")


def _at_most(asked: int | None, given: int | None, name: str) -> Any:
    if asked is not None and (given is None or asked > given):
        raise ValueError(f"{name}: {asked} is more than the model has" if given else f"the model has no {name}")
    return asked or given
