"""Structured pruning: whole attention heads, feed-forward and hidden width, and channels of convolutions go, so that
what is left is a smaller dense model, fast everywhere.

What has to go together is found by the dependency graph of torch-pruning (DepGraph: Fang et al., 2023,
https://arxiv.org/abs/2301.12900); what matters least, by `importance.py`. Heads that share keys and values go together.

    stages:
      - prune: structured
        pruning_ratio: 0.3
        units: [heads, ffn]
        importance: taylor
        round_to: 32
        steps: 2
        recovery: {epochs: 1, learning_rate: 5e-5}

In place of a ratio there can be a target, `max_params`, `max_macs` or `max_latency_ms`: the smallest ratio that reaches
it is looked for. The result is a plain checkpoint wherever its config.json can say its widths; else `shapes.json` lies
beside it (`details.plain` is false), and it loads through `optimize.load`. Exports and quantisation take either.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from optimize import atomic
from optimize.artifact import Artifact
from optimize.calibration import Calibration, as_inputs
from optimize.config import Block
from optimize.context import Context
from optimize.errors import StageError
from optimize.prune.recovery import Recovery
from optimize.prune.units import Kind
from optimize.quiet import quiet

if TYPE_CHECKING:
    from optimize.prune.importance import Scores
    from optimize.prune.narrowing import Narrowing
    from optimize.prune.units import Dimension, Dropped

VERSION = 1

_LISTED = 64
"""Dimensions with more units than this have their importances as percentiles in the manifest."""


class TimedCall(Block):
    """What `max_latency_ms` is measured at, and what multiplications are counted of."""

    batch_size: int = Field(1, ge=1)
    """Rows of a call."""
    sequence_length: int = Field(128, ge=1)
    """Tokens of a row; of images it says nothing."""
    threads: int = Field(1, ge=1)
    """Of ONNX Runtime."""


class Config(Block):
    """`prune: structured`."""

    pruning_ratio: float | None = Field(None, gt=0, lt=1)
    """The share of the units of every layer that goes: of the heads, and of each width. 0.3 of both in a transformer
    leaves half of the multiplications."""
    max_params: int | None = Field(None, ge=1)
    """In place of a ratio: at most so many parameters."""
    max_macs: int | None = Field(None, ge=1)
    """In place of a ratio: at most so many multiplications in a call at `latency`."""
    max_latency_ms: float | None = Field(None, gt=0)
    """In place of a ratio: at most so many milliseconds a call at `latency`, the median on this machine, of the
    artifact exported to ONNX. What was measured is in the manifest."""
    latency: TimedCall = TimedCall()
    """What is timed and counted."""
    units: tuple[Kind, ...] | None = Field(None, min_length=1)
    """What goes: `heads` of attention, `ffn` (the inner width of feed-forward layers), `hidden` (the width of what runs
    from block to block), `channels` of convolutions. The default is heads and ffn, or channels of a module of one's
    own."""
    importance: Literal["taylor", "hessian", "l1", "l2", "random"] = "taylor"
    """How what matters least is found: by the loss's first or second order on calibration rows, or by the norm of the
    weights."""
    global_pruning: bool = False
    """Rank units of a kind over all layers, so that some lose more than others; config.json can't say such widths."""
    max_pruning_ratio: float = Field(0.9, gt=0, lt=1)
    """Where `global_pruning`: no layer loses more than this share."""
    round_to: int = Field(8, ge=1)
    """Widths stay multiples of this, which kernels are fast at. Heads are counted one by one."""
    steps: int = Field(1, ge=1, le=100)
    """Prune in so many equal steps, with importances found anew, and `recovery` after each."""
    recovery: Recovery | None = None
    """Fine-tune after each step: the fields of `distill: finetune`."""
    targets: tuple[str, ...] = ()
    """Globs of layers: only units that one of these makes or reads go. Empty: all."""
    ignore: tuple[str, ...] = ()
    """Globs of layers whose units stay."""
    calibration: Calibration = Calibration(num_samples=256, max_length=128)
    """The rows that `taylor` and `hessian` look at; as many as there are."""
    seed: int = Field(0, ge=0)
    """Of `importance: random`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where importances are computed; `recovery` says for itself."""

    @model_validator(mode="after")
    def _one_aim(self) -> Config:
        aims = ("pruning_ratio", "max_params", "max_macs", "max_latency_ms")
        given = [name for name in aims if getattr(self, name) is not None]
        if len(given) != 1:
            told = f"{' and '.join(given)} are given" if given else "none is given"
            raise ValueError(f"exactly one of {', '.join(aims)} says how much to prune; {told}")
        if self.pruning_ratio and self.global_pruning and self.pruning_ratio > self.max_pruning_ratio:
            raise ValueError(f"pruning_ratio {self.pruning_ratio} is more than max_pruning_ratio")
        return self


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Prune, step by step. Raises `StageError` where the model can't be followed, where a layer would be left empty,
    and where the target can't be reached.
    """
    from optimize.prune import recovery, saving
    from optimize.prune.forward import parameters
    from optimize.prune.narrowing import Narrowing

    recovery.check_trainable(config.recovery, context)
    with quiet():
        narrowing = Narrowing(artifact, config, context)
        step = recovery.last_step(artifact, context)
        model = narrowing.load(step.artifact)
        if not step.number:
            step.report = _beginning(model, narrowing)
        report = step.report
        for number in range(step.number + 1, config.steps + 1):
            told = _cut(model, narrowing, report, number)
            if config.recovery is not None:
                model, told["recovery"] = recovery.recover(model, config.recovery, artifact, context, number)
            report["steps"].append(told)
            if number < config.steps:
                recovery.keep(recovery.Step(number, artifact, report), model, context)
        report["params"]["after"], report["macs"]["after"] = parameters(model), narrowing.macs(model)
        _check_aim(config, report)
        saving.copy_preprocessor(artifact, context, context.directory)
        report["plain"] = saving.save(model, artifact, context.directory, _changed(report["units"]))
    return replace(recovery.described(artifact, context.directory), details=report)


def apply_to(model: Any, config: Config, batches: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Prune a model of transformers, or a module of one's own, in place, where it lies.

    `batches` are model inputs, [batch, ...] each, as arrays or tensors; `taylor` and `hessian` want `labels` among
    them. Returns what the stage leaves in the manifest. A config that can't say the new widths still has the old ones.
    Raises `StageError` as `run` does, and for `recovery` and `max_latency_ms`, which need a recipe's rows.
    """
    from optimize.prune.forward import evaluating, parameters
    from optimize.prune.narrowing import InMemory

    if config.recovery is not None or config.max_latency_ms is not None:
        knob = "recovery" if config.recovery is not None else "max_latency_ms"
        raise StageError(f"{knob} needs a recipe's rows", hint="leave it out, and do that with the pruned model")
    narrowing = InMemory(model, config, as_inputs(batches))
    with quiet(), evaluating(model):
        report = _beginning(model, narrowing)
        for number in range(1, config.steps + 1):
            report["steps"].append(_cut(model, narrowing, report, number))
    report["params"]["after"], report["macs"]["after"] = parameters(model), narrowing.macs(model)
    _check_aim(config, report)
    return report


def _cut(model: Any, narrowing: Narrowing, report: dict[str, Any], number: int) -> dict[str, Any]:
    """One of the steps, in place. What is told of it; `report` has the units that are left."""
    from optimize.prune.forward import parameters

    initial = report["units"]
    dimensions = narrowing.dimensions(model)
    scores = narrowing.scores(model, dimensions)
    ratio = report["pruning_ratio"] * number / narrowing.config.steps
    dropped = narrowing.choose(dimensions, scores, {name: told["before"] for name, told in initial.items()}, ratio)
    narrowing.cut(model, dimensions, dropped)
    for one in dimensions:
        initial[one.name]["after"] = one.units - len(dropped[one.name])
    return {
        "pruning_ratio": ratio,
        "params": parameters(model),
        "macs": narrowing.macs(model),
        "importance": _importance(dimensions, scores, dropped),
    }


def _beginning(model: Any, narrowing: Narrowing) -> dict[str, Any]:
    """What is known before the first step, and the ratio to aim at."""
    from optimize.prune.forward import parameters

    dimensions = narrowing.dimensions(model)
    size = narrowing.config.latency
    return {
        "params": {"before": parameters(model)},
        "macs": {"before": narrowing.macs(model), "batch_size": size.batch_size, "sequence_length": narrowing.length},
        "units": {one.name: {"kind": one.kind, "before": one.units} for one in dimensions},
        "steps": [],
        **_aim(model, narrowing, dimensions),
    }


def _aim(model: Any, narrowing: Narrowing, dimensions: Sequence[Dimension]) -> dict[str, Any]:
    """{"pruning_ratio"}, and what was seen on the way to it where it had to be looked for ("search")."""
    from optimize.prune import targets
    from optimize.prune.forward import parameters
    from optimize.prune.units import drop

    config = narrowing.config
    if config.pruning_ratio is not None:
        return {"pruning_ratio": config.pruning_ratio}
    if config.max_latency_ms and narrowing.context.task.generates:
        raise StageError(
            "max_latency_ms is for models that answer in one call", hint="give pruning_ratio, max_params or max_macs"
        )
    scores = narrowing.scores(model, dimensions)
    units = {one.name: one.units for one in dimensions}

    def pruned(ratio: float) -> Any:
        narrower = copy.deepcopy(model)
        drop(narrower, dimensions, narrowing.choose(dimensions, scores, units, ratio))
        return narrower

    measures: dict[str, Callable[[Any], float]] = {
        "max_params": parameters,
        "max_macs": narrowing.macs,
        "max_latency_ms": lambda narrower: _milliseconds(narrower, narrowing),
    }
    name = next(name for name in measures if getattr(config, name) is not None)
    ratio, probes = targets.smallest_ratio(getattr(config, name), lambda ratio: measures[name](pruned(ratio)))
    return {"pruning_ratio": ratio, "search": {name: getattr(config, name), "probes": probes}}


def _milliseconds(model: Any, narrowing: Narrowing) -> float:
    """A call of the model exported to ONNX."""
    from optimize.export import onnx
    from optimize.prune import recovery, targets

    context = narrowing.context
    folder = context.scratch / "probe"
    atomic.remove(folder)
    artifact = recovery.saved(model, narrowing.source, folder / "model", context)
    for part in ("onnx", "scratch"):
        (folder / part).mkdir()
    exported = onnx.run(
        artifact, onnx.Config(), replace(context, directory=folder / "onnx", scratch=folder / "scratch")
    )
    value = targets.milliseconds(exported, narrowing.timed, narrowing.config.latency.threads)
    atomic.remove(folder)
    return float(f"{value:.3g}")


def _check_aim(config: Config, report: Mapping[str, Any]) -> None:
    """Widths that are ranked anew may come out otherwise than in the search."""
    for name, found in (("max_params", report["params"]["after"]), ("max_macs", report["macs"]["after"])):
        wanted = getattr(config, name)
        if wanted is not None and found > wanted:
            raise StageError(f"{found:,} is more than {name} {wanted:,}", hint="set steps: 1, or global_pruning: false")


def _changed(units: Mapping[str, Mapping[str, Any]]) -> dict[str, set[tuple[int, int]]]:
    """Of each kind, (units before, units after) of its dimensions."""
    found: dict[str, set[tuple[int, int]]] = {}
    for told in units.values():
        found.setdefault(told["kind"], set()).add((told["before"], told["after"]))
    return found


def _importance(dimensions: Sequence[Dimension], scores: Scores, dropped: Dropped) -> dict[str, Any]:
    """For reports: each unit's importance, or where there are many their percentiles 0, 5, ..., 100; and those of the
    units that went, where they are listed.
    """
    import torch

    told: dict[str, Any] = {}
    for one in dimensions:
        values = scores[one.name]
        listed = one.units <= _LISTED
        if not listed:
            values = values.quantile(torch.linspace(0, 1, 21, dtype=values.dtype))
        told[one.name] = {"units" if listed else "percentiles": [float(f"{value:.3g}") for value in values.tolist()]}
        told[one.name]["dropped"] = list(dropped[one.name]) if listed else len(dropped[one.name])
    return told
