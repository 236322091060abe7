"""A causal language model as a graph of ONNX Runtime's own operators, whatever its architecture is called.

The model is traced once, by `torch.export`, with parts of it replaced by single operators (`decoder_parts.py`), and
attention with its key/value cache and rotary embedding by `GroupQueryAttention`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optimize.errors import StageError
from optimize.export import decoder_parts, onnx_graph
from optimize.quiet import quiet

if TYPE_CHECKING:
    import onnx_ir
    from torch import Tensor, nn

    from optimize.export.decoder_parts import Rotation, Seen
    from optimize.export.decoder_weights import Codes
    from optimize.export.nbits import Packed
    from optimize.export.onnx_operators import Trace

_NAME = "optimize"
"""Of our attention among those of transformers, while a model is watched or traced."""


def trace(
    model: nn.Module, codes: Codes, head: Packed | None, levels: Mapping[str, int], opset: int | None
) -> onnx_ir.Model:
    """The graph of a model whose layers in `codes` compute on codes, and its head and embedding on those of `head`.

    `levels` is the operator's `accuracy_level` by name; the head's is under the empty name.

    The model is changed: it can't answer any more. Raises `StageError` where it can't be had.
    """
    import torch

    with torch.no_grad(), quiet():
        config = _text_config(model)
        seen, caches = _watch(model, set(codes))
        decoder_parts.replace_norms(model)
        rotation = decoder_parts.replace_rotary(model, seen, getattr(config, "max_position_embeddings", None))
        decoder_parts.replace_layers(model, codes, seen, levels)
        decoder_parts.replace_head(model, head, levels[""])
        graph = _trace(model, rotation, opset, caches)
    onnx_graph.fuse(graph)
    onnx_graph.make_reproducible(graph)
    _finish_inputs(graph)
    return graph


def _text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _watch(model: Any, names: set[str]) -> tuple[Seen, list[tuple[int, int]]]:
    """What the model does with a few tokens, and each layer's (heads, size) of keys and values.

    Raises `StageError` where it attends in a way of its own.
    """
    from transformers.masking_utils import sdpa_mask

    caches: list[tuple[int, int]] = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        caches.append((key.shape[1], key.shape[3]))
        batch, heads, length, _size = query.shape
        return value.new_zeros(batch, length, heads, value.shape[-1]), None

    config = _text_config(model)
    layers = config.num_hidden_layers
    with _attention(model, attend, sdpa_mask):
        seen = decoder_parts.watch(model, names, config.vocab_size)
    if len(caches) != layers:
        raise StageError(
            f"a model of type {config.model_type} can't be exported: its {layers} layers call transformers' attention "
            f"{len(caches)} times, so that they attend in a way of their own",
            hint="serve it with transformers",
        )
    return seen, caches


def _trace(
    model: Any, rotation: Rotation | None, opset: int | None, caches: Sequence[tuple[int, int]]
) -> onnx_ir.Model:
    import torch

    from optimize.export import onnx_operators

    layers = len(caches)

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
            with _inside(self.model, now, rotation):
                logits = self.model(input_ids=input_ids, position_ids=positions, use_cache=False).logits
            return logits, *now.presents

    free = torch.export.Dim.AUTO
    past = [(torch.zeros(2, heads, 5, size), torch.zeros(2, heads, 5, size)) for heads, size in caches]
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
def _inside(model: Any, now: Trace, rotation: Rotation | None) -> Iterator[None]:
    """While a model runs in here, its attention and rotary embedding are those of `now`."""
    places, interleaved = (rotation.places, rotation.interleaved) if rotation else ([], False)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **named: Any) -> tuple[Tensor, None]:
        scale, window, cap = named.get("scaling"), named.get("sliding_window"), named.get("softcap")
        return now.attend(query, key, value, scale, window, cap, interleaved), None

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return now.rotate(q, cos, sin, interleaved), now.rotate(k, cos, sin, interleaved)

    with contextlib.ExitStack() as stack:
        for place in places:
            stack.callback(setattr, place, "apply_rotary_pos_emb", place.apply_rotary_pos_emb)
            place.apply_rotary_pos_emb = rotate  # type: ignore[attr-defined]
        stack.enter_context(_attention(model, attend, lambda *_, **__: None))
        yield


@contextlib.contextmanager
def _attention(model: Any, attend: Callable[..., Any], mask: Callable[..., Any]) -> Iterator[None]:
    """While a model runs in here, it attends so; `mask` makes what `attend` gets as its mask."""
    from transformers import AttentionInterface, AttentionMaskInterface

    config = _text_config(model)
    before = config._attn_implementation
    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, mask)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
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
