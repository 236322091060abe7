"""One model on its way to fewer units: what it has, what that matters, and the cut, checked against masking."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from optimize.device import check_device
from optimize.errors import StageError
from optimize.planning import resolve_config
from optimize.prune import dependency, importance, selection
from optimize.prune.forward import LABELS, answers, labelled, loss_of, macs, plain_attention, tensors, timed_inputs
from optimize.prune.units import Dimension, Dropped, Kind, drop, mask

if TYPE_CHECKING:
    from torch import Tensor

    from optimize.artifact import Artifact
    from optimize.context import Context
    from optimize.prune.structured import Config
    from optimize.tasks import Inputs

_TOLERANCE = 1e-3
"""How far answers may be from those of the same model with its units masked, over the largest of them."""


class Narrowing:
    """The tools of `prune: structured` for one model."""

    def __init__(self, source: Artifact, config: Config, context: Context) -> None:
        """Raises `StageError` for a model with code of its own, and where there are no rows to run it on."""

        self.source, self.config, self.context = source, resolve_config(config), context
        check_device(self.config.device)
        if source.format == "transformers" and source.trust_remote_code:
            raise StageError("a model with code of its own can't be pruned: what its config means is not known")
        if not context.data.num_rows.get("calibration"):
            raise StageError("no calibration rows", hint="give `data.splits.calibration` a share")
        default: tuple[Kind, ...] = ("channels", "ffn") if source.format == "pytorch" else ("heads", "ffn")
        self.kinds = config.units or default
        self.length = min(config.latency.sequence_length, source.task.get("max_length", 1 << 30))
        self.timed = timed_inputs(source, context, config.latency.batch_size, self.length)

    def load(self, artifact: Artifact) -> Any:
        trust = artifact.trust_remote_code
        return self.context.task.load_model(artifact.path, artifact.task, trust_remote_code=trust)

    def labelled(self, model: Any) -> list[dict[str, Tensor]]:
        """What importances are the gradients on."""
        return labelled(self.source, self.config.calibration, self.context, model, self.config.device)

    def told(self, done: int, total: int) -> None:
        self.context.update(done, total, "importance")

    def macs(self, model: Any) -> int:
        return macs(model, tensors(self.timed, model))

    def dimensions(self, model: Any) -> list[Dimension]:
        """What shall be pruned. Raises `StageError` where there is nothing of a kind, or a glob matches nothing."""
        with plain_attention(model):
            found = dependency.find(model, tensors(self.timed, model))
        kind = type(model).__name__
        if missing := [name for name in self.config.units or () if not any(one.kind == name for one in found)]:
            raise StageError(f"{kind} has no {missing[0]} to prune", hint="leave it out of `units`")
        found = [one for one in found if one.kind in self.kinds]
        for knob in ("targets", "ignore"):
            for glob in getattr(self.config, knob):
                if not any(_matches(one, (glob,)) for one in found):
                    example = found[0].name if found else "(none)"
                    raise StageError(
                        f"`{knob}` {glob!r} matches no layer of {', '.join(self.kinds)}",
                        hint=f"names look like {example!r}",
                    )
        chosen = [one for one in found if not self.config.targets or _matches(one, self.config.targets)]
        chosen = [one for one in chosen if not _matches(one, self.config.ignore)]
        if not chosen:
            raise StageError(f"nothing to prune: {kind} has none of {', '.join(self.kinds)} that may go")
        return chosen

    def scores(self, model: Any, dimensions: Sequence[Dimension]) -> importance.Scores:
        """Each unit's importance."""
        kind = self.config.importance
        if kind == "random":
            return importance.at_random(dimensions, self.config.seed)
        if kind in ("l1", "l2"):
            return importance.magnitudes(model, dimensions, int(kind[1]))
        device = self.config.device
        batches = self.labelled(model)
        with plain_attention(model):
            found = importance.gradients(
                model.to(device),
                dimensions,
                batches,
                loss_of,
                squared=kind == "hessian",
                on_batch=self.told,
            )
        model.cpu()
        return found

    def choose(
        self, dimensions: Sequence[Dimension], scores: importance.Scores, initial: Mapping[str, int], ratio: float
    ) -> dict[str, list[int]]:
        """Units to drop, kind by kind. Raises `StageError` where a layer would be left empty."""
        chosen: dict[str, list[int]] = {}
        for kind in dict.fromkeys(one.kind for one in dimensions):
            names = [one.name for one in dimensions if one.kind == kind]
            chosen |= selection.choose(
                {name: scores[name] for name in names},
                {name: initial[name] for name in names},
                ratio,
                global_pruning=self.config.global_pruning,
                round_to=1 if kind == "heads" else self.config.round_to,
                max_pruning_ratio=self.config.max_pruning_ratio,
            )
        return chosen

    def cut(self, model: Any, dimensions: Sequence[Dimension], dropped: Dropped) -> None:
        """Remove the units, in place, and see that the model answers as it does with those masked.

        Raises `StageError` where it does not. The hidden width can't be masked: norms are over what is left of it.
        """
        import torch

        inputs = tensors(self.timed, model)
        same = not any(one.kind == "hidden" and dropped[one.name] for one in dimensions)
        masked = copy.deepcopy(model)
        mask(masked, dimensions, dropped)
        drop(model, dimensions, dropped)
        try:
            with torch.no_grad():
                expected, got = answers(masked, inputs), answers(model, inputs)
        except RuntimeError as error:
            raise _misread(model, f"does not run: {error}") from error
        for name, value in expected.items():
            if got[name].shape != value.shape:
                raise StageError(
                    f"pruning changes the shape of `{name}`, the answer", hint="leave hidden out of `units`"
                )
            distance = float((got[name] - value).abs().max() / value.abs().max().clamp(min=1e-6))
            if same and not distance <= _TOLERANCE:
                raise _misread(model, f"answers otherwise than with them masked: by {distance:.2g} of `{name}`")


class InMemory(Narrowing):
    """The same for a model in memory: no artifact, and batches in place of rows."""

    def __init__(self, model: Any, config: Config, batches: Sequence[Inputs]) -> None:
        """Raises `StageError` without batches, and for a model on an accelerator."""
        if not batches:
            raise StageError("no batches to run the model on")
        if next(model.parameters()).device.type != "cpu":
            raise StageError("a model in memory is pruned on the CPU", hint="model.cpu()")
        self.config = config.model_copy(update={"device": "cpu"})
        self.kinds = config.units or (("heads", "ffn") if hasattr(model, "config") else ("channels", "ffn"))
        self.batches = batches
        self.timed = {name: values[:1] for name, values in batches[0].items() if name != LABELS}
        self.length = next(iter(self.timed.values())).shape[-1]

    def labelled(self, model: Any) -> list[dict[str, Tensor]]:
        if any(LABELS not in batch for batch in self.batches):
            kind = self.config.importance
            raise StageError(f"importance: {kind} needs `{LABELS}` in every batch", hint="or importance: l2")
        return [tensors(batch, model, self.config.device) for batch in self.batches]

    def told(self, done: int, total: int) -> None:
        """Nobody listens."""


def _misread(model: Any, what: str) -> StageError:
    return StageError(
        f"{type(model).__name__} without these units {what}",
        hint="torch-pruning misreads how its layers hang together; leave some kinds out of `units`",
    )


def _matches(dimension: Dimension, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(layer, glob) for layer in dimension.layers for glob in globs)
