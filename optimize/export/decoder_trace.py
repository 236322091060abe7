"""A causal language model as a graph of ONNX Runtime's own operators, whatever its architecture is called.

The model is traced once, by `torch.export`, with parts of it replaced by single operators: attention with its key/value
cache and rotary embedding (`GroupQueryAttention`), RMS norms, layers on packed codes (`MatMulNBits`), and a quantised
head that shares its codes with the embedding. No architecture is named anywhere: what a part computes is found by
trying it, and a part that is not understood is traced as it is.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from optimize.errors import StageError
from optimize.export import nbits, onnx_graph
from optimize.quiet import quiet

if TYPE_CHECKING:
    import onnx_ir
    from torch import Tensor, nn

    from optimize.export.decoder_weights import Codes
    from optimize.export.onnx_operators import Trace

_NAME = "optimize"
"""Of our attention among those of transformers, while a model is traced."""
Tables = dict["str | None", "tuple[Tensor, Tensor]"]


def trace(
    model: nn.Module, codes: Codes, head: nbits.Packed | None, levels: Mapping[str, int], opset: int | None
) -> onnx_ir.Model:
    """The graph of a model whose layers in `codes` compute on codes, and its head and embedding on those of `head`.

    `levels` is the operator's `accuracy_level` by name; the head's is under the empty name.

    The model is changed: it can't answer any more. Raises `StageError` where it can't be had.
    """
    import torch

    with torch.no_grad(), quiet():
        plan = _watch(model, set(codes))
        _replace_norms(model)
        rotation = _replace_rotary(model, plan)
        _replace_layers(model, codes, plan, levels)
        _replace_head(model, head, levels[""])
        graph = _trace(model, rotation, opset)
    onnx_graph.fuse(graph)
    onnx_graph.make_reproducible(graph)
    _finish_inputs(graph)
    return graph


def text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _watch(model: Any, names: set[str]) -> dict[str, Any]:
    """Answer a few tokens and note which of the named layers get the same input, and the rotary embeddings' calls."""
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
    tokens = torch.arange(4)[None] % text_config(model).vocab_size
    model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return {"together": [names for _, names in seen], "rotary": rotary}


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _replace_norms(model: nn.Module) -> None:
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


def _replace_rotary(model: nn.Module, plan: dict[str, Any]) -> tuple[list[Any], bool] | None:
    """Put tables in place of rotary embeddings: the Python modules whose function turns by them, and how it does.

    None where the operator can't do what the model does; then it is traced as it is.
    """
    import torch

    from optimize.export.onnx_operators import Rotary

    places = {sys.modules[type(module).__module__] for module in model.modules()}
    places = {place for place in places if hasattr(place, "apply_rotary_pos_emb")}
    longest = getattr(text_config(model), "max_position_embeddings", None)
    if len(places) != 1 or not plan["rotary"] or not longest:
        return None
    apply = next(iter(places)).apply_rotary_pos_emb
    found: dict[str, Tables] = {}
    forms = set()
    for name, calls in plan["rotary"].items():
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
    return list(places), forms.pop()


def _replace_layers(model: nn.Module, codes: Codes, plan: dict[str, Any], levels: Mapping[str, int]) -> None:
    """Layers on codes; those that get the same input and lie on the same grid become one."""
    import torch

    from optimize.export.onnx_operators import Bnb4Linear, JoinedLinear, NBitsLinear

    for names in plan["together"]:
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


def _replace_head(model: Any, head: nbits.Packed | None, level: int) -> None:
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
    from torch import nn

    factor = getattr(embedding, "embed_scale", None)
    if factor is None:
        return plain

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = plain
            self.register_buffer("factor", factor)

        def forward(self, indices: Tensor) -> Tensor:
            return self.plain(indices) * self.factor  # type: ignore[no-any-return]

    return Scaled()


def _trace(model: Any, rotation: tuple[list[Any], bool] | None, opset: int | None) -> onnx_ir.Model:
    import torch

    from optimize.export import onnx_operators

    config = text_config(model)
    layers = config.num_hidden_layers

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, input_ids: Tensor, attention_mask: Tensor, past: list[tuple[Tensor, Tensor]], logits_to_keep: Tensor
        ) -> tuple[Tensor, ...]:
            length = input_ids.shape[1]
            earlier = (attention_mask.sum(1, keepdim=True) - length).clamp(min=0)
            positions = earlier + torch.arange(length)[None]
            now = onnx_operators.Trace(past, attention_mask, positions)
            self.model.get_output_embeddings().wanted = logits_to_keep
            with _inside(now, rotation):
                logits = self.model(input_ids=input_ids, position_ids=positions, use_cache=False).logits
            if len(now.presents) != 2 * layers:
                raise StageError(
                    f"{layers} layers call transformers' attention {len(now.presents) // 2} times: this architecture "
                    "attends in a way of its own"
                )
            return logits, *now.presents

    config._attn_implementation = _NAME
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    free = torch.export.Dim.AUTO
    past = [(torch.zeros(2, heads, 5, size), torch.zeros(2, heads, 5, size)) for _ in range(layers)]
    axes = {0: free, 2: free}
    cache = [f"past_key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    try:
        program = torch.onnx.export(
            Decoder(),
            (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 8, dtype=torch.long), past, torch.zeros(1).long()),
            dynamic_shapes=({0: free, 1: free}, {0: free, 1: free}, [(axes, axes)] * layers, None),
            input_names=["input_ids", "attention_mask", *cache, "logits_to_keep"],
            output_names=["logits", *(name.replace("past_key_values", "present") for name in cache)],
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    except Exception as error:
        raise _cause(error) from error
    assert program is not None
    graph: onnx_ir.Model = program.model
    return graph


def _cause(error: BaseException) -> StageError:
    """Our own error where the exporter wrapped it in its own, else one with the first reason there was."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
        if isinstance(error, StageError):
            return error
    reason = str(error).strip().partition("\n")[0]
    return StageError(f"the model can't be exported: {type(error).__name__}: {reason}", hint="try another opset")


@contextlib.contextmanager
def _inside(now: Trace, rotation: tuple[list[Any], bool] | None) -> Iterator[None]:
    """While a model runs in here, its attention and rotary embedding are ours."""
    from transformers import AttentionInterface, AttentionMaskInterface

    places, interleaved = rotation or ([], False)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **named: Any) -> tuple[Tensor, None]:
        scale, window, cap = named.get("scaling"), named.get("sliding_window"), named.get("softcap")
        return now.attend(query, key, value, scale, window, cap, interleaved), None

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return now.rotate(q, cos, sin, interleaved), now.rotate(k, cos, sin, interleaved)

    originals = [place.apply_rotary_pos_emb for place in places]
    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, lambda *_, **__: None)
    for place in places:
        place.apply_rotary_pos_emb = rotate
    try:
        yield
    finally:
        for place, original in zip(places, originals, strict=True):
            place.apply_rotary_pos_emb = original
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(_NAME)


def _finish_inputs(model: onnx_ir.Model) -> None:
    """Names for axes, and a default for `logits_to_keep`: an initialiser that is an input, too, may be left out."""
    import numpy as np
    import onnx_ir

    for value in (*model.graph.inputs, *model.graph.outputs):
        name = str(value.name)
        if name == "attention_mask":
            onnx_graph.name_axes(value, "batch", "total")
        elif name == "logits":
            onnx_graph.name_axes(value, "batch", "kept")
        elif name == "logits_to_keep":
            value.const_value = onnx_ir.tensor(np.zeros(1, dtype=np.int64), name=name)
            model.graph.register_initializer(value)
        elif name != "input_ids":
            onnx_graph.name_axes(value, "batch", "", "past" if name.startswith("past") else "total")
