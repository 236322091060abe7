"""What a student learns of a teacher's inside: the signals of `distill: features`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimize.distill import losses
from optimize.distill.answers import Batch, Signal, counts_of, seen
from optimize.errors import StageError

if TYPE_CHECKING:
    from optimize.distill.features import Attention, Hidden

Layers = str | Mapping[int, int]
VALUES = ("value", "v_proj", "v_lin")
"""What the layers are called that make attention's values."""


class _OfTokens(Signal):
    """n is the number of tokens that are no padding; images have none."""

    def counts(self, batch: Batch) -> list[int] | None:
        return counts_of(seen(batch)) if "attention_mask" in batch else None


class HiddenStates(_OfTokens):
    """Of pairs of layers, behind a projection where the widths differ."""

    asks: Mapping[str, bool] = {"output_hidden_states": True}

    def __init__(self, how: Hidden, pairs: list[tuple[int, int]], ours: int, theirs: int) -> None:
        super().__init__(how.weight)
        self.kind, self.pairs = how.loss, pairs
        self.projections = nn.ModuleList(nn.Linear(ours, theirs) for _ in pairs if ours != theirs)

    def of_teacher(self, outputs: Mapping[str, Any], batch: Batch) -> dict[str, Tensor]:
        return {str(i): _tokens(_state(outputs, layer), batch) for i, (_, layer) in enumerate(self.pairs)}

    def loss(self, wanted: Mapping[str, Tensor], outputs: Mapping[str, Any], batch: Batch) -> Tensor:
        parts = []
        for i, (layer, _) in enumerate(self.pairs):
            found = _tokens(_state(outputs, layer), batch)
            if self.projections:
                found = self.projections[i](found)
            parts.append(losses.hidden_distance(wanted[str(i)], found, self.kind))
        return torch.stack(parts).mean()


class Maps(_OfTokens):
    """Attention of pairs of layers, [n, heads, keys]; keys that are padding stand last."""

    asks: Mapping[str, bool] = {"output_attentions": True}

    def __init__(self, how: Attention, pairs: list[tuple[int, int]]) -> None:
        super().__init__(how.weight)
        self.pairs = pairs

    def of_teacher(self, outputs: Mapping[str, Any], batch: Batch) -> dict[str, Tensor]:
        return {str(i): self._map(outputs, layer, batch) for i, (_, layer) in enumerate(self.pairs)}

    def loss(self, wanted: Mapping[str, Tensor], outputs: Mapping[str, Any], batch: Batch) -> Tensor:
        parts = []
        for i, (layer, _) in enumerate(self.pairs):
            found = self._map(outputs, layer, batch)
            keys = found.shape[-1]
            kept = wanted[str(i)][..., :keys]  # in another batch there was more padding, or less
            kept = nn.functional.pad(kept, (0, keys - kept.shape[-1]))
            parts.append(losses.map_distance(kept, found))
        return torch.stack(parts).mean()

    def _map(self, outputs: Mapping[str, Any], layer: int, batch: Batch) -> Tensor:
        found: Tensor = outputs["attentions"][layer].transpose(1, 2)
        if "attention_mask" in batch:
            order = (~seen(batch)).to(torch.int8).argsort(dim=1, stable=True)
            found = found.gather(-1, order[:, None, None, :].expand_as(found))
        return _tokens(found, batch)


class ValueRelations(_OfTokens):
    """How alike the values of a row's tokens are, in the last layers of both."""

    def __init__(self, how: Attention, heads: int, ours: nn.Module, theirs: nn.Module) -> None:
        super().__init__(how.weight)
        self.asked = how.relation_heads
        self.heads = heads
        self._values: dict[str, Tensor] = {}
        for whose, module in (("student", ours), ("teacher", theirs)):
            module.register_forward_hook(self._catch(whose))

    def of_teacher(self, outputs: Mapping[str, Any], batch: Batch) -> dict[str, Tensor]:
        return {"values": _tokens(self._values.pop("teacher"), batch)}

    def loss(self, wanted: Mapping[str, Tensor], outputs: Mapping[str, Any], batch: Batch) -> Tensor:
        found = self._values.pop("student")
        places = seen(batch) if "attention_mask" in batch else torch.ones_like(found[..., 0], dtype=torch.bool)
        kept = wanted["values"]
        widths = (found.shape[-1], kept.shape[-1])
        # A pruned model has fewer heads than its config says.
        heads = self.asked or math.gcd(self.heads, *widths)
        for width in widths:
            if width % heads:
                raise StageError(
                    f"values of width {width} can't be cut into {heads} relation heads",
                    hint=f"set attention.relation_heads to {math.gcd(*widths)}, or a divisor",
                )
        spread = kept.new_zeros((*places.shape, kept.shape[-1]))
        spread[places] = kept
        return losses.relation_distance(spread, found, places, heads)

    def _catch(self, whose: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self._values[whose] = output

        return hook


def hidden_states(student: Any, teacher: Any, how: Hidden, layer_map: Layers) -> HiddenStates:
    return HiddenStates(
        how, _pairs(student, teacher, layer_map), student.config.hidden_size, teacher.config.hidden_size
    )


def maps(student: Any, teacher: Any, how: Attention, layer_map: Layers) -> Maps:
    """Has both models compute attention in the way that makes maps."""
    for model in (student, teacher):
        _plain(model).set_attn_implementation("eager")
    return Maps(how, _pairs(student, teacher, layer_map))


def value_relations(student: Any, teacher: Any, how: Attention) -> ValueRelations:
    """Raises `StageError` where the layers that make values can't be told."""
    heads = [_value_heads(model.config) for model in (student, teacher)]
    return ValueRelations(how, math.gcd(*heads), _values(student), _values(teacher))


def _pairs(student: Any, teacher: Any, layer_map: Layers) -> list[tuple[int, int]]:
    try:
        return losses.layer_pairs(layer_map, student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    except ValueError as error:
        raise StageError(str(error), hint="look at layer_map: {student's layer: teacher's layer}") from error
    except AttributeError as error:
        raise StageError(
            f"its layers can't be told: {error}", hint="`distill: logits` looks at outputs alone"
        ) from error


def _plain(model: Any) -> Any:
    """Without adapters around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _state(outputs: Mapping[str, Any], layer: int) -> Tensor:
    """What a layer puts out; the first of all hidden states is the embedding."""
    state: Tensor = outputs["hidden_states"][layer + 1]
    if state.dim() != 3:
        raise StageError("its hidden states are not of tokens", hint="`distill: logits` looks at outputs alone")
    return state


def _tokens(values: Tensor, batch: Batch) -> Tensor:
    """[batch, length, ...] -> [n, ...], without padding."""
    return values[seen(batch)] if "attention_mask" in batch else values.flatten(0, 1)


def _value_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _values(model: Any) -> nn.Module:
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] in VALUES]
    if not found:
        raise StageError(
            f"{type(_plain(model)).__name__} has no layers called {', '.join(VALUES)}",
            hint="set attention.kind: maps",
        )
    return found[-1]  # type: ignore[no-any-return]
