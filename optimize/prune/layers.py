"""Layer pruning: the transformer blocks that matter least go, and config.json says the new depth.

A block whose output points where its input does adds little: the angular distance of the two, as in Gromov et al., "The
Unreasonable Ineffectiveness of the Deeper Layers" (2024, https://arxiv.org/abs/2403.17887). Or each block is left out
once, and the loss on calibration rows says what that costs.

    stages:
      - prune: layers
        num_hidden_layers: 4
        importance: angular
        recovery: {epochs: 1}

The result is a plain checkpoint. Unlike narrower layers, fewer of them are faster by their share on any machine.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from optimize.artifact import Artifact
from optimize.calibration import Calibration, as_inputs
from optimize.config import Block
from optimize.context import Context
from optimize.device import check_device
from optimize.errors import StageError
from optimize.planning import resolve_config
from optimize.prune.recovery import Recovery
from optimize.quiet import quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

VERSION = 1


class Config(Block):
    """`prune: layers`."""

    num_hidden_layers: int = Field(ge=1)
    """How many blocks stay."""
    importance: Literal["angular", "loss"] = "angular"
    """`angular`: the angle between a block's input and its output, over pi: of a language model at each window's last
    token, else the mean over all tokens. `loss`: the loss on labelled rows without the block."""
    consecutive: bool = True
    """The blocks that go stand side by side, and are looked at together; otherwise those go that matter least each by
    itself."""
    recovery: Recovery | None = None
    """Fine-tune afterwards: the fields of `distill: finetune`."""
    calibration: Calibration = Calibration(num_samples=128, max_length=128)
    """The rows that it looks at; as many as there are."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where blocks are looked at; `recovery` says for itself."""


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Drop blocks. Raises `StageError` where the model has no list of blocks, or no more than shall stay."""

    from optimize.prune import recovery, saving
    from optimize.prune.forward import labelled, macs, parameters, tensors, timed_inputs, unlabelled

    config = resolve_config(config)
    recovery.check_trainable(config.recovery, context)
    check_device(config.device)
    if not context.data.num_rows.get("calibration"):
        raise StageError("no calibration rows", hint="give `data.splits.calibration` a share")
    if artifact.trust_remote_code:
        raise StageError("a model with code of its own can't be pruned: what its config means is not known")
    length = min(config.calibration.max_length, artifact.task.get("max_length", 1 << 30))
    with quiet():
        model = context.task.load_model(artifact.path, artifact.task)
        _check_depth(model, config)
        rows = unlabelled if config.importance == "angular" else labelled
        batches = rows(artifact, config.calibration, context, model, config.device)
        timed = tensors(timed_inputs(artifact, context, 1, length), model)
        report: dict[str, Any] = {
            "params": {"before": parameters(model)},
            "macs": {"before": macs(model, timed), "batch_size": 1, "sequence_length": length},
        }
        model.to(config.device)
        report |= _drop(model, config, batches, lambda done, total: context.update(done, total, "importance"))
        model.cpu()
        report["params"]["after"], report["macs"]["after"] = parameters(model), macs(model, timed)
        if config.recovery is not None:
            model, report["recovery"] = recovery.recover(model, config.recovery, artifact, context, 1)
        saving.copy_preprocessor(artifact, context, context.directory)
        report["plain"] = saving.save(model, artifact, context.directory, {})
    return replace(recovery.described(artifact, context.directory), details=report)


def apply_to(model: Any, config: Config, batches: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Drop blocks of a model of transformers in place, where it lies.

    `batches` are model inputs, [batch, length] each, as arrays or tensors; with `importance: loss`, and `labels` among
    them. Returns what the stage leaves in the manifest: {"importance": {"span", "from_layer"}, "layers": {"before",
    "after", "dropped"}}. Raises `StageError` as `run` does, and for `recovery`.
    """
    from optimize.prune.forward import LABELS, evaluating, tensors

    if config.recovery is not None:
        raise StageError("recovery needs a recipe's rows", hint="leave it out, and train the model afterwards")
    arrays = as_inputs(batches)
    if not arrays:
        raise StageError("no batches to look at")
    if config.importance == "loss" and any(LABELS not in batch for batch in arrays):
        raise StageError(f"importance: loss needs `{LABELS}` in every batch", hint="or importance: angular")
    _check_depth(model, config)
    device = next(model.parameters()).device
    with quiet(), evaluating(model):
        return _drop(model, config, [tensors(batch, model, str(device)) for batch in arrays], lambda *_: None)


def _check_depth(model: Any, config: Config) -> None:
    from optimize.prune import blocks

    depth = len(blocks.of(model))
    if config.num_hidden_layers >= depth:
        raise StageError(
            f"the model has {depth} layers, and num_hidden_layers {config.num_hidden_layers} shall stay",
            hint=f"set num_hidden_layers to at most {depth - 1}",
        )


def _drop(model: Any, config: Config, batches: Sequence[Any], told: Callable[[int, int], None]) -> dict[str, Any]:
    """Look at the blocks on the model's device, and leave out those that matter least. What is told of it."""
    from optimize.prune import blocks

    depth = len(blocks.of(model))
    gone = depth - config.num_hidden_layers
    look = blocks.angular_distances if config.importance == "angular" else blocks.losses_without
    span = gone if config.consecutive else 1
    found = look(model, batches, span, told)
    dropped = _least(found, gone, span)
    blocks.keep(model, [i for i in range(depth) if i not in dropped])
    return {
        # Of `span` blocks from each one on.
        "importance": {"span": span, "from_layer": [float(f"{value:.4g}") for value in found]},
        "layers": {"before": depth, "after": depth - gone, "dropped": dropped},
    }


def _least(values: Sequence[float], gone: int, span: int) -> list[int]:
    """The blocks to drop: a run of `span` where that is all of them, else the least ones; of equals the first."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    if span == gone:
        return list(range(order[0], order[0] + span))
    return sorted(order[:gone])
