"""Models as pruning runs them: what they answer, what they lose on labelled rows, and what that costs."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from optimize.errors import StageError
from optimize.runtimes import pytorch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from optimize.artifact import Artifact
    from optimize.calibration import Calibration
    from optimize.context import Context
    from optimize.tasks import Inputs

LABELS = "labels"


def answers(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name, and no cache. A module of the user's own takes its inputs by position."""
    import torch

    if not hasattr(model, "config"):
        return pytorch.named(model(*inputs.values()))
    cache = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    outputs = model(**inputs, **cache)
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Attention in single operations, which can be traced and counted; afterwards the model's own."""
    if not hasattr(model, "set_attn_implementation"):
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout; afterwards as it was."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def loss_of(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean loss of a batch of `labelled`. Raises `StageError` where it is no number."""
    import torch

    if hasattr(model, "config"):
        loss: Tensor = answers(model, batch)["loss"]
    else:
        inputs = {name: value for name, value in batch.items() if name != LABELS}
        loss = torch.nn.functional.cross_entropy(answers(model, inputs)[pytorch.OUTPUT], batch[LABELS])
    if not torch.isfinite(loss):
        raise StageError(f"the loss of the calibration rows is {loss.item()}", hint="is the model trained, in float32?")
    return loss


def labelled(
    artifact: Artifact, calibration: Calibration, context: Context, model: Any, device: str = "cpu"
) -> list[dict[str, Tensor]]:
    """Batches of rows of the calibration split, with what the model's own loss wants beside the inputs."""
    task, spec = context.task, artifact.task
    if task.generates and not task.encodes:
        windows = unlabelled(artifact, calibration, context, model, device)
        return [{**batch, LABELS: batch["input_ids"]} for batch in windows]
    preprocessor = task.preprocessor(artifact.path, trust_remote_code=artifact.trust_remote_code)
    rows = context.data.rows("calibration")
    if not rows.num_rows:
        raise StageError("no calibration rows", hint="give `data.splits.calibration` a share")
    count = min(calibration.num_samples, rows.num_rows)
    chosen = random.Random(calibration.seed).sample(range(rows.num_rows), count)
    shorter = {**spec, "max_length": min(spec.get("max_length", calibration.max_length), calibration.max_length)}
    examples = task.examples(preprocessor, rows.take(chosen), shorter)
    size = calibration.batch_size
    return [
        tensors(task.collate_examples(preprocessor, examples[start : start + size]), model, device)
        for start in range(0, len(examples), size)
    ]


def unlabelled(
    artifact: Artifact, calibration: Calibration, context: Context, model: Any, device: str = "cpu"
) -> list[dict[str, Tensor]]:
    """Batches of rows of the calibration split, as many as are asked for or as there are."""
    task = context.task
    preprocessor = task.preprocessor(artifact.path, trust_remote_code=artifact.trust_remote_code)
    rows = context.data.rows("calibration")
    features = task.calibration(preprocessor, rows, artifact.path, artifact.task, calibration)
    if not features:
        raise StageError("too few calibration rows", hint="give `data.splits.calibration` a larger share")
    size = calibration.batch_size
    return [
        tensors(task.collate(preprocessor, features[start : start + size]), model, device)
        for start in range(0, len(features), size)
    ]


def tensors(inputs: Inputs, model: Any, device: str = "cpu") -> dict[str, Tensor]:
    """Arrays as tensors: of a model of transformers, those that it takes."""
    import torch

    takes = inspect.signature(model.forward).parameters if hasattr(model, "config") else inputs
    return {name: torch.from_numpy(array).to(device) for name, array in inputs.items() if name in takes}


def timed_inputs(artifact: Artifact, context: Context, batch_size: int, sequence_length: int) -> Inputs:
    """A batch of calibration rows, all of one length, as latency is measured on."""
    preprocessor = context.task.preprocessor(artifact.path, trust_remote_code=artifact.trust_remote_code)
    length = min(sequence_length, artifact.task.get("max_length", sequence_length))
    return context.task.latency_inputs(
        preprocessor,
        context.data.rows("calibration"),
        artifact.task,
        batch_size=batch_size,
        sequence_length=length,
    )


def parameters(model: torch.nn.Module) -> int:
    """Tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: Any, inputs: Mapping[str, Tensor]) -> int:
    """Multiplications that are added up, of all matrix products and convolutions of one call."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), plain_attention(model), FlopCounterMode(display=False) as counter:
        answers(model, inputs)
    return int(counter.get_total_flops() // 2)
