"""The parts of a decoder that ONNX Runtime has operators for, found by trying them and put in place of the model's own.

RMS norms, rotary embeddings, layers on packed codes, and a quantised head that shares its codes with the embedding. No
architecture is named anywhere: a part is replaced where it computes what the operator would, and else traced as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from optimize.errors import StageError
from optimize.export import nbits

if TYPE_CHECKING:
    from torch import Tensor, nn

    from optimize.export.decoder_weights import Codes

Tables = dict["str | None", "tuple[Tensor, Tensor]"]


@dataclass
class Seen:
    """What a model was seen to do with a few tokens."""

    together: list[list[str]]
    """The layers on codes, those side by side that get the same input."""
    rotary: dict[str, dict[str | None, dict[str, Any]]]
    """The arguments of a rotary embedding, by its name and the kind of layer (Gemma 3 has two, else None)."""


@dataclass
class Rotation:
    """How a model turns queries and keys by their positions."""

    places: list[ModuleType]
    """Where its function `apply_rotary_pos_emb` is looked up."""
    interleaved: bool
    """The pairs that turn are neighbours; else they lie half a head apart."""


def watch(model: Any, names: set[str], vocabulary: int) -> Seen:
    """Answer a few tokens, and note what parts get; `names` are those of layers on codes."""
    import torch

    seen: list[tuple[Tensor, list[str]]] = []
    rotary: dict[str, dict[Any, dict[str, Any]]] = {}
    handles = []
    for name, module in model.named_modules():
        if name in names:

            def layer(_: Any, inputs: tuple[Any, ...], name: str = name) -> None:
                if seen and seen[-1][0] is inputs[0]:
                    seen[-1][1].append(name)
                else:
                    seen.append((inputs[0], [name]))

            handles.append(module.register_forward_pre_hook(layer))
        elif type(module).__name__.endswith("RotaryEmbedding"):

            def turn(_: Any, inputs: tuple[Any, ...], named: dict[str, Any], name: str = name) -> None:
                bound = dict(zip(("x", "position_ids", "layer_type"), inputs, strict=False)) | named
                rotary.setdefault(name, {})[bound.get("layer_type")] = bound

            handles.append(module.register_forward_pre_hook(turn, with_kwargs=True))
    tokens = torch.arange(4)[None] % vocabulary
    model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return Seen([names for _, names in seen], rotary)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def replace_norms(model: nn.Module) -> None:
    """RMS norms, whatever they are called with: those that compute x / rms(x) * w or * (1 + w)."""
    import torch

    from optimize.export.onnx_operators import RMSNorm

    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if "RMSNorm" not in type(module).__name__ or weight is None or weight.dim() != 1 or epsilon is None:
            continue
        x = torch.linspace(-3, 2, 2 * len(weight)).reshape(1, 2, -1)
        normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
        for scale in (weight, 1 + weight):
            if torch.allclose(module(x), normal * scale, rtol=1e-5, atol=1e-6):
                _replace(model, name, RMSNorm(scale, epsilon))
                break


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """What the operator computes for x [..., length, size] with tables [length, size / 2]."""
    import torch

    if interleaved:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def replace_rotary(model: nn.Module, seen: Seen, longest: int | None) -> Rotation | None:
    """Put tables of the `longest` positions in place of rotary embeddings.

    None where the operator can't do what the model does; then it is traced as it is.
    """
    import torch

    from optimize.export.onnx_operators import Rotary

    places = {sys.modules[type(module).__module__] for module in model.modules()}
    places = {place for place in places if hasattr(place, "apply_rotary_pos_emb")}
    if len(places) != 1 or not seen.rotary or not longest:
        return None
    apply = next(iter(places)).apply_rotary_pos_emb
    found: dict[str, Tables] = {}
    forms = set()
    for name, calls in seen.rotary.items():
        module = model.get_submodule(name)
        for key, call in calls.items():
            cos, sin = module(**{**call, "position_ids": torch.arange(longest)[None]})
            near, _ = module(**{**call, "position_ids": torch.arange(4)[None]})
            if cos.dim() != 3 or not torch.equal(cos[:, :4], near):  # frequencies that depend on the length
                return None
            size = cos.shape[-1]
            x = torch.linspace(-1, 1, 4 * size).reshape(1, 1, 4, size)
            turned = apply(x, x, cos[:, :4], sin[:, :4])[0]
            for columns in (slice(size // 2), slice(0, None, 2)):
                for interleaved in (False, True):
                    tables = cos[0, :, columns].contiguous(), sin[0, :, columns].contiguous()
                    ours = _rotate(x, tables[0][:4], tables[1][:4], interleaved)
                    if key not in found.get(name, {}) and torch.allclose(ours, turned, atol=1e-6):
                        found.setdefault(name, {})[key] = tables
                        forms.add(interleaved)
            if key not in found.get(name, {}):
                return None
    if len(forms) != 1:
        return None
    for name, module_tables in found.items():
        _replace(model, name, Rotary(module_tables))
    return Rotation(list(places), forms.pop())


def replace_layers(model: nn.Module, codes: Codes, seen: Seen, levels: Mapping[str, int]) -> None:
    """Layers on codes; those that get the same input and lie on the same grid become one."""
    import torch

    from optimize.export.onnx_operators import Bnb4Linear, JoinedLinear, NBitsLinear

    for names in seen.together:
        parts = [codes[name] for name in names]
        biases = [_bias(model.get_submodule(name)) for name in names]
        packed = [part for part in parts if isinstance(part, nbits.Packed)]
        same = len({bias is None for bias in biases}) == len({levels[name] for name in names}) == 1
        alike = same and len(packed) == len(parts)
        whole = nbits.joined(packed) if alike else None
        if whole is None:
            for name, part, bias in zip(names, parts, biases, strict=True):
                new = Bnb4Linear(part, bias) if isinstance(part, nbits.Bnb4) else NBitsLinear(part, bias, levels[name])
                _replace(model, name, new)
            continue
        bias = None if biases[0] is None else torch.cat([bias for bias in biases if bias is not None])
        layer = NBitsLinear(whole, bias, levels[names[0]])
        shared: dict[str, Any] = {}
        for index, name in enumerate(names):
            _replace(model, name, JoinedLinear(layer, [len(part.codes) for part in packed], index, shared))


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach()


def replace_head(model: Any, head: nbits.Packed | None, level: int) -> None:
    from optimize.export.onnx_operators import Last, NBitsEmbedding, NBitsLinear, SharedLinear

    layer = model.get_output_embeddings()
    if layer is None:
        raise StageError("the model says nothing about its head (get_output_embeddings)")
    bias = _bias(layer)
    new: nn.Module
    if head is not None:
        new = NBitsLinear(head, bias, level)
        embedding = model.get_input_embeddings()
        if embedding.weight is layer.weight:
            model.set_input_embeddings(_scaled(embedding, NBitsEmbedding(head)))
    elif hasattr(layer, "weight"):
        new = SharedLinear(layer.weight, bias)
    else:
        new = layer
    model.set_output_embeddings(Last(new))


def _scaled(embedding: Any, plain: nn.Module) -> nn.Module:
    """Gemma's embedding multiplies what it looks up."""
    import torch
    from torch import nn

    factor = getattr(embedding, "embed_scale", None)
    if factor is None:
        return plain

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = plain
            self.register_buffer("factor", torch.as_tensor(factor))

        def forward(self, indices: Tensor) -> Tensor:
            return self.plain(indices) * self.factor  # type: ignore[no-any-return]

    return Scaled()
