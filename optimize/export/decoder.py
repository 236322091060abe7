"""Export of causal language models: what `export: onnx` does where the task generates text.

The graph takes `input_ids` [batch, length], `attention_mask` [batch, past + length] (rows padded on the right), and of
every layer `past_key_values.N.key` and `.value` [batch, heads, past, size] (float32; past may be 0). It gives `logits`
and `present.N.key` and `.value`. `logits_to_keep` [1] may be left out: only the last so many positions' logits are
computed then (0: all). Where past and present of a layer are the same memory, attention appends to it in place.

A checkpoint of GPTQ or bitsandbytes keeps its very codes; one in float stays in float. The graph is held against the
checkpoint's weights as float32 on real windows: at once, in a padded batch, and token by token through the cache.
"""

from __future__ import annotations

import shutil
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from optimize.artifact import Artifact
from optimize.context import Context
from optimize.errors import StageError
from optimize.export import decoder_trace, decoder_weights, nbits, onnx_graph
from optimize.quiet import quiet
from optimize.runtimes import onnx as runtime

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import onnx_ir
    from numpy.typing import NDArray

    from optimize.export.onnx import Config
    from optimize.tasks import Inputs

_LONGEST = 256
"""Tokens of a checked window."""
_HEAD_BITS = {"int8": 8, "int4": 4}
_ACCURACY = {"float32": 1, "int8": 4}


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Export and compare. Raises `StageError` where the model can't be exported or answers differently."""
    windows, split = _windows(artifact, context)
    context.update(0, 3, "loading")
    model, codes = decoder_weights.load(artifact, context, config.block_size)
    levels = _levels(codes, config)
    _save_configs(artifact, model, context)
    parent = [_answer(model, window) for window in windows]
    head = _quantize_head(model, config)
    exact = parent if head is None else [_answer(model, window) for window in windows]
    context.update(1, 3, "tracing")
    graph = decoder_trace.trace(model, codes, head, levels, config.opset)
    del model
    context.update(2, 3, "comparing with the parent")
    onnx_graph.save(graph, context.directory / runtime.MODEL)
    _warn({**codes, "": head} if head else codes, levels, context)
    difference = _compare_exactly(graph, windows, exact, config.allowed, context)
    divergence = _divergence(context.directory, windows, parent)
    if not divergence <= config.max_divergence:
        raise StageError(
            f"the ONNX file's next tokens differ from its parent's by {divergence:.2g} nats (max_divergence "
            f"{config.max_divergence:g}), by rounding activations or the head",
            hint="try activations: float32, or lm_head: none",
        )
    return Artifact.from_directory(
        context.directory,
        format="onnx",
        task=artifact.task,
        details={
            "opset": graph.opset_imports[""],
            "operators": onnx_graph.counts(graph),
            "tolerance": config.allowed,
            # One digit: the rest says more about the processor than about the file.
            "max_difference": float(f"{difference:.0e}"),
            "divergence": float(f"{divergence:.0e}"),
            "checked": {"split": split, "windows": [len(window) for window in windows]},
            **_described(codes),
        },
        trust_remote_code=artifact.trust_remote_code,
    )


def _windows(artifact: Artifact, context: Context) -> tuple[list[NDArray[np.int64]], str]:
    """The tokens of a long, a short and a middling window, and the split that they are of."""
    import numpy as np

    split = next((name for name in ("validation", "calibration") if context.data.num_rows.get(name)), None)
    if split is None:
        raise StageError(
            "nothing to check the export with",
            hint="give `data.splits.validation` or `calibration` a share of the rows",
        )
    with quiet():
        tokenizer = context.task.preprocessor(artifact.path, trust_remote_code=artifact.trust_remote_code)
        tokenizer.save_pretrained(context.directory)  # before use, which leaves its truncation in what is saved
        features = context.task.encode(tokenizer, context.data.rows(split), artifact.task)
    longest = max(features, key=lambda row: len(row["input_ids"]))["input_ids"][:_LONGEST]
    if len(longest) < 16:
        raise StageError(f"the {split} split has too little text to check the export with", hint="give it more rows")
    others = features[0]["input_ids"], features[len(features) // 2]["input_ids"]
    return [np.array(ids, dtype=np.int64) for ids in (longest, others[0][:5], others[1][: len(longest) // 3])], split


def _save_configs(artifact: Artifact, model: Any, context: Context) -> None:
    model.config._name_or_path = ""
    model.config.save_pretrained(context.directory)
    if "generation_config.json" in artifact.files:
        shutil.copyfile(artifact.path / "generation_config.json", context.directory / "generation_config.json")


def _answer(model: Any, window: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [length, vocabulary]."""
    import torch

    with torch.inference_mode(), quiet():
        logits = model(input_ids=torch.from_numpy(window)[None], use_cache=False).logits[0]
    return logits.float().numpy()  # type: ignore[no-any-return]


def _quantize_head(model: Any, config: Config) -> nbits.Packed | None:
    """The head's codes; the model (and an embedding that is the same matrix) computes with what they stand for."""
    import torch

    if config.lm_head == "none":
        return None
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is None or weight.dim() != 2 or weight.shape[1] % config.block_size:
        raise StageError(
            f"the head can't be quantised: its width is no multiple of block_size {config.block_size}",
            hint="set a smaller block_size, or leave lm_head: none",
        )
    head = nbits.round_to_nearest(weight, _HEAD_BITS[config.lm_head], config.block_size)
    with torch.no_grad():
        weight.copy_(head.dequantize())
    return head


def _compare_exactly(
    graph: onnx_ir.Model,
    windows: list[NDArray[np.int64]],
    expected: list[NDArray[np.float32]],
    tolerance: float,
    context: Context,
) -> float:
    """The largest difference of the logits over the largest logit, with activations in float32.

    Raises `StageError` where it is past the tolerance.
    """
    import numpy as np

    folder = context.scratch / "exact"
    folder.mkdir(exist_ok=True)
    with onnx_graph.accuracy_level(graph, _ACCURACY["float32"]):
        onnx_graph.save(graph, folder / runtime.MODEL)
    runner = _opened(folder)
    shutil.rmtree(folder)
    largest = 0.0
    for what, got, wanted in _answers(runner, windows, expected):
        difference = float(np.abs(got - wanted).max() / np.abs(wanted).max())
        if not difference <= tolerance:  # a comparison that NaN fails, too
            raise StageError(
                f"the ONNX graph answers differently from its parent {what}: by {difference:.2g} of the largest logit "
                f"(tolerance {tolerance:g})",
                hint="the architecture may compute something that ONNX Runtime's operators don't: serve it with "
                "transformers; raise `tolerance` only if such a difference is harmless",
            )
        largest = max(largest, difference)
    return largest


def _opened(folder: Path) -> runtime.OnnxRunner:
    runner = runtime.open(folder, threads=1)
    assert isinstance(runner, runtime.OnnxRunner)
    return runner


def _answers(runner: runtime.OnnxRunner, windows: list[NDArray[np.int64]], expected: list[NDArray[np.float32]]) -> Any:
    """(how, logits, expected logits): a window alone, a padded batch, and a prompt that goes on in steps."""
    import numpy as np

    yield "for a window alone", _alone(runner, windows[0]), expected[0]
    longest = max(len(window) for window in windows[1:])
    batch: Inputs = {
        "input_ids": np.stack([np.pad(window, (0, longest - len(window))) for window in windows[1:]]),
        "attention_mask": np.array([[int(i < len(window)) for i in range(longest)] for window in windows[1:]]),
    }
    for row, logits in enumerate(runner.run(batch)["logits"]):
        wanted = expected[1 + row]
        yield "in a padded batch", logits[: len(wanted)], wanted
    decoder = runner.decoder(len(windows[0]))
    ends = [8, 9, 10, len(windows[0]) - 1, len(windows[0])]
    for start, end in zip([0, *ends], ends, strict=False):
        yield f"after {start} cached tokens", decoder.forward(windows[0][start:end]), expected[0][end - 1]


def _alone(runner: runtime.OnnxRunner, window: NDArray[np.int64]) -> NDArray[np.float32]:
    import numpy as np

    mask = np.ones((1, len(window)), dtype=np.int64)
    logits: NDArray[np.float32] = runner.run({"input_ids": window[None], "attention_mask": mask})["logits"]
    return np.asarray(logits[0])


def _divergence(directory: Path, windows: list[NDArray[np.int64]], expected: list[NDArray[np.float32]]) -> float:
    """Kullback-Leibler divergence of the file that ships from its parent, in nats, over a window's positions."""
    import numpy as np
    from scipy.special import log_softmax

    runner = _opened(directory)
    ours, theirs = log_softmax(_alone(runner, windows[0]), axis=-1), log_softmax(expected[0], axis=-1)
    return max(0.0, float((np.exp(theirs) * (theirs - ours)).sum(axis=-1).mean()))


def _levels(codes: decoder_weights.Codes, config: Config) -> dict[str, int]:
    """`accuracy_level` of each layer on codes; that of the head is under the empty name."""
    levels = dict.fromkeys(["", *codes], _ACCURACY[config.activations])
    for glob in config.float_activations:
        matched = [name for name in codes if fnmatchcase(name, glob)]
        if not matched:
            raise StageError(
                f"`float_activations` {glob!r} matches no layer on codes",
                hint=f"names look like {next(iter(codes), '(none)')!r}",
            )
        levels |= dict.fromkeys(matched, _ACCURACY["float32"])
    return levels


def _warn(codes: decoder_weights.Codes, levels: dict[str, int], context: Context) -> None:
    """Say what is larger or slower than one would think; the head is under the empty name."""
    if any(isinstance(weight, nbits.Bnb4) for weight in codes.values()):
        context.warn(
            "ONNX Runtime multiplies with 4-bit codes of bitsandbytes slowly: a token takes longer than in float32"
        )
    packed = {name: weight for name, weight in codes.items() if isinstance(weight, nbits.Packed)}
    if any(weight.bits == 8 and levels[name] == _ACCURACY["float32"] for name, weight in packed.items()):
        context.warn(
            "ONNX Runtime multiplies activations in float32 with 8-bit codes slowly; `float_activations: ['*']` in "
            "place of `activations: float32` leaves out the head"
        )
    if any(weight.stored_bits != weight.bits for weight in packed.values()):
        context.warn("ONNX Runtime has no 3-bit operator: 3-bit codes take 4 bits each in this file")


def _described(codes: decoder_weights.Codes) -> dict[str, Any]:
    """How the layers' codes lie in the graph."""
    packed = [weight for weight in codes.values() if isinstance(weight, nbits.Packed)]
    if not packed:
        return {}
    return {
        "bits": sorted({weight.bits for weight in packed}),
        "stored_bits": sorted({weight.stored_bits for weight in packed}),
        "block_size": sorted({weight.block for weight in packed}),
        "permuted": sum(weight.order is not None for weight in packed),
    }
