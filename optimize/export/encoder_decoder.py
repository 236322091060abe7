"""Export of models with an encoder and a decoder to two ONNX graphs, as `optimize.runtimes.onnx_seq2seq` serves them.

The encoder's graph also computes the keys and values of every cross-attention, once a text; the decoder's graph goes on
from them and from its own cache, one token or many at a time. Both are held against the parent on real validation rows:
the logits behind each token of the reference, through the cache, and the texts that are written greedily.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from optimize import runtimes
from optimize.artifact import Artifact
from optimize.beam import Search, write
from optimize.context import Context
from optimize.errors import StageError
from optimize.export import onnx_graph
from optimize.export.failures import failed
from optimize.export.parity import Check
from optimize.quiet import quiet
from optimize.runtimes.onnx_seq2seq import DECODER, ENCODER
from optimize.runtimes.transformers import TorchRunner

if TYPE_CHECKING:
    import onnx_ir
    from torch import Tensor

    from optimize.export.onnx import Config
    from optimize.runtimes import Runner
    from optimize.tasks import Features, Inputs

_TOKENS = 32
"""Of a reference that are read, and of a text that is written, to compare."""
_HINT = "serve it with transformers; raise `tolerance` only if such a difference is harmless"


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Export and compare. Raises `StageError` where the model can't be exported or answers differently."""
    task, spec, trust = context.task, artifact.task, artifact.trust_remote_code
    with quiet():
        tokenizer = task.preprocessor(artifact.path, trust_remote_code=trust)
        tokenizer.save_pretrained(context.directory)  # before use, which leaves its truncation in what is saved
        check = Check(artifact, context, tokenizer)
        model = task.load_model(artifact.path, spec, trust_remote_code=trust)
        model.config._name_or_path = ""
        model.config.save_pretrained(context.directory)
        model.generation_config.save_pretrained(context.directory)
        model.set_attn_implementation("eager")
        context.update(0, 3, "tracing the encoder")
        onnx_graph.save(_encoder(model, config.opset), context.directory / ENCODER)
        context.update(1, 3, "tracing the decoder")
        graph = _decoder(model, config.opset)
        onnx_graph.save(graph, context.directory / DECODER)
    context.update(2, 3, "comparing with the parent")
    examples = task.examples(tokenizer, context.data.rows("validation"), spec)
    details = _compare(check, examples, TorchRunner(model, threads=1), context, config.allowed)
    return Artifact.from_directory(
        context.directory,
        format="onnx",
        task=spec,
        details={"opset": graph.opset_imports[""], **details},
        trust_remote_code=trust,
    )


def _encoder(model: Any, opset: int | None) -> onnx_ir.Model:
    import torch
    from transformers import DynamicCache, EncoderDecoderCache

    answer = model.forward

    def forward(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        # One step of the decoder fills the cache; what else it computes is no output, and falls away.
        cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
        answer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=input_ids[:, :1],
            past_key_values=cache,
            use_cache=True,
        )
        return tuple(tensor for layer in cache.cross_attention_cache.layers for tensor in (layer.keys, layer.values))

    sample = torch.ones(2, 7, dtype=torch.long)
    free = torch.export.Dim.AUTO
    outputs = [f"cross.{layer}.{part}" for layer in range(_layers(model)) for part in ("key", "value")]
    graph = _export(
        model,
        forward,
        (sample, sample.clone()),
        ({0: free, 1: free}, {0: free, 1: free}),
        ["input_ids", "attention_mask"],
        outputs,
        opset,
    )
    for value in graph.graph.inputs:
        onnx_graph.name_axes(value, "batch", "source")
    for value in graph.graph.outputs:
        onnx_graph.name_axes(value, "batch", "", "source")
    return graph


def _decoder(model: Any, opset: int | None) -> onnx_ir.Model:
    import torch
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    answer, width, layers = model.forward, _width(model), _layers(model)
    Pairs = list[tuple[torch.Tensor, torch.Tensor]]

    def forward(
        input_ids: Tensor, encoder_attention_mask: Tensor, past_key_values: Pairs, cross: Pairs
    ) -> tuple[Tensor, ...]:
        cache: Any = EncoderDecoderCache(_filled(past_key_values), _filled(cross))
        cache.is_updated = dict.fromkeys(range(len(cross)), True)
        # Only its shape is looked at: all that the decoder takes of the encoder is in the cache.
        states = cross[0][0].new_zeros(*encoder_attention_mask.shape, width)
        logits = answer(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
        ).logits
        own = cache.self_attention_cache.layers
        return (logits, *(tensor for layer in own for tensor in (layer.keys, layer.values)))

    def _filled(pairs: Any) -> Any:
        cache: Any = DynamicCache()
        for layer, (key, value) in enumerate(pairs):
            cache.update(key, value, layer)
        return cache

    heads, size = _heads(model)
    free = torch.export.Dim.AUTO
    past = [(torch.zeros(2, heads, 5, size), torch.zeros(2, heads, 5, size)) for _ in range(layers)]
    cross = [(torch.zeros(2, heads, 7, size), torch.zeros(2, heads, 7, size)) for _ in range(layers)]
    axes = {0: free, 2: free}
    parts = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    graph = _export(
        model,
        forward,
        (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 7, dtype=torch.long), past, cross),
        ({0: free, 1: free}, {0: free, 1: free}, [(axes, axes)] * layers, [(axes, axes)] * layers),
        [
            "input_ids",
            "encoder_attention_mask",
            *(f"past_key_values.{part}" for part in parts),
            *(f"cross.{part}" for part in parts),
        ],
        ["logits", *(f"present.{part}" for part in parts)],
        opset,
    )
    third = {"past_key_values": "past", "cross": "source", "present": "total"}
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        kind = str(value.name).partition(".")[0]
        if kind in third:
            onnx_graph.name_axes(value, "batch", "", third[kind])
        else:
            onnx_graph.name_axes(value, "batch", "source" if kind == "encoder_attention_mask" else "length")
    return graph


def _export(
    model: Any,
    forward: Callable[..., Any],
    sample: tuple[Any, ...],
    free: tuple[Any, ...],
    inputs: list[str],
    outputs: list[str],
    opset: int | None,
) -> onnx_ir.Model:
    """The graph of `forward` in place of the model's own, so that nodes have the names of the model's modules."""
    import torch

    try:
        with torch.no_grad(), _forward(model, forward):
            program = torch.onnx.export(
                model,
                sample,
                dynamic_shapes=free,
                input_names=inputs,
                output_names=outputs,
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever torch does
        raise failed(error, model, "try another opset") from error
    assert program is not None
    graph: onnx_ir.Model = program.model
    onnx_graph.make_reproducible(graph)
    return graph


@contextlib.contextmanager
def _forward(model: Any, forward: Callable[..., Any]) -> Iterator[None]:
    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def _layers(model: Any) -> int:
    return len(_cache(model).layers)


def _heads(model: Any) -> tuple[int, int]:
    """Of the decoder: heads of keys and values, and their size."""
    _, heads, _, size = _cache(model).layers[0].keys.shape
    return heads, size


def _cache(model: Any) -> Any:
    """The cross-attention's, after one token."""
    import torch

    with torch.inference_mode():
        one = torch.ones(1, 1, dtype=torch.long)
        return model(input_ids=one, decoder_input_ids=one, use_cache=True).past_key_values.cross_attention_cache


def _width(model: Any) -> int:
    """Of what the encoder gives."""
    import torch

    with torch.inference_mode():
        return int(model.get_encoder()(input_ids=torch.ones(1, 1, dtype=torch.long)).last_hidden_state.shape[-1])


def _compare(
    check: Check, examples: list[Features], parent: Runner, context: Context, tolerance: float
) -> dict[str, Any]:
    """What the manifest says of it. Raises `StageError` where logits are further from the parent's than `tolerance` (of
    the largest logit), or a text is another.
    """
    ours = runtimes.get("onnx").open(context.directory, threads=1)
    search = Search(_TOKENS)
    largest = 0.0
    for rows, inputs in check.batches:
        difference = _difference(ours, parent, inputs, [examples[row]["labels"][:_TOKENS] for row in rows])
        if not difference <= tolerance:  # a comparison that NaN fails, too
            raise StageError(
                f"the ONNX graphs answer differently from their parent: by {difference:.2g} of the largest logit "
                f"(tolerance {tolerance:g}) in a batch of {len(rows)} validation rows",
                hint=_HINT,
            )
        largest = max(largest, difference)
        got, expected = (write(runner.writer(inputs), search) for runner in (ours, parent))
        wrong = [row for row, a, b in zip(rows, got, expected, strict=True) if a.tokens != b.tokens]
        if wrong:
            raise StageError(
                f"the ONNX graphs write another text than their parent for validation row {wrong[0] + 1}, "
                f"in a batch of {len(rows)}",
                hint=_HINT,
            )
    return {
        "tolerance": tolerance,
        # One digit: the rest says more about the processor than about the files.
        "max_difference": float(f"{largest:.0e}"),
        "checked_batches": [len(rows) for rows, _ in check.batches],
    }


def _difference(ours: Runner, parent: Runner, inputs: Inputs, references: list[list[int]]) -> float:
    """The largest of the logits behind each token of the references, read through the cache, over the largest logit."""
    import numpy as np

    writers = [runner.writer(inputs) for runner in (ours, parent)]
    width = max(map(len, references))
    padded = np.array([[*ids, *[ids[-1]] * (width - len(ids))] for ids in references], dtype=np.int64)
    start = np.full((len(references), 1), writers[0].tokens.start)
    largest = scale = 0.0
    for ids in np.concatenate([start, padded], axis=1).T:
        got, expected = (writer.forward(np.ascontiguousarray(ids)) for writer in writers)
        largest = max(largest, float(np.abs(got - expected).max()))
        scale = max(scale, float(np.abs(expected).max()))
    return largest / scale
