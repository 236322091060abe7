"""Each layer (or block) changed alone, at every setting, by the stage's own method: how far do the answers move?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optimize import tasks
from optimize.artifact import digest_of
from optimize.blockwise.abreast import threads
from optimize.blockwise.sequence import Moment, oriented, rounded
from optimize.calibration import Calibration
from optimize.context import Context
from optimize.device import check_device
from optimize.errors import RecipeError, StageError
from optimize.planning import resolve_config
from optimize.quiet import quiet
from optimize.sensitivity.answers import Blockwise, Judge, Moved, replaced
from optimize.sensitivity.knobs import KNOBS, Setting

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from optimize.artifact import Artifact
    from optimize.data import Data
    from optimize.progress import Progress
    from optimize.recipe import Recipe, Stage
    from optimize.work import Work

VERSION = 1
STEP = "sensitivity"
"""What progress is told of."""
_CONFIDENCE = 0.9


@dataclass(frozen=True)
class Options:
    """How to measure."""

    settings: tuple[Setting, ...]
    by: Literal["layer", "block"] = "layer"
    samples: int = 32
    """Calibration rows that answers are compared on; of a language model windows of `length` tokens."""
    length: int = 128
    """Tokens of a row, at most; of a language model exactly."""
    batch_size: int = 8
    seed: int = 0
    """Of the draw."""


@dataclass
class Room:
    """One stage's input model, and the rows that it is looked at with. Change no weight of it for good."""

    recipe: Recipe
    stage: Stage
    artifact: Artifact
    """What the stage takes."""
    data: Data
    work: Work
    options: Options
    progress: Progress

    def __post_init__(self) -> None:
        self.knob = KNOBS[self.stage.id]
        self.config = resolve_config(self.stage.config)
        self.task = tasks.get(self.recipe.model.task)
        self.key = digest_of(
            {
                "version": VERSION,
                "artifact": self.artifact.digest,
                "stage": self.stage.id,
                "stage_version": self.stage.entry.load().VERSION,
                "config": self.config.model_dump(mode="json", exclude={*self.stage.entry.aside, self.knob.name}),
                "data": self.data.digests.get("calibration"),
                "options": asdict(self.options),
            }
        )

    @property
    def file(self) -> Path:
        """What is measured, as JSON."""
        name = f"{self.recipe.name}-{self.stage.name}-{self.key.removeprefix('sha256:')[:12]}.json"
        return self.work.root / "sensitivity" / name

    def open(self) -> Bench:
        """The model in memory, with its rows. Raises `StageError` where it can't be looked at in this way."""
        return Bench(self)


class Bench:
    """The dense model in memory: its layers, its blocks, and rows to compare answers on."""

    def __init__(self, room: Room) -> None:
        import torch

        self.room = room
        device = str(getattr(room.config, "device", "cpu"))
        check_device(device)
        artifact = room.artifact
        model = room.task.load_model(artifact.path, artifact.task, trust_remote_code=artifact.trust_remote_code)
        self.model = model.to(torch.device(device)).eval()
        if getattr(room.config, "lm_head", False):  # the embedding that it may be tied to stays as it is
            head = model.get_output_embeddings()
            head.weight = type(head.weight)(head.weight.detach().clone())
        self.layers = room.knob.layers(model, room.config)
        self.weights = {name: oriented(layer).numel() for name, layer in self.layers.items()}
        batches = self._draw(device)
        wanted = -(-room.options.samples // room.options.batch_size)
        count = min(wanted, (len(batches) + 1) // 2 if self._uses_rows else len(batches))
        if not count or (self._uses_rows and len(batches) < 2):
            raise StageError("too few calibration rows", hint="give `data.splits.calibration` a larger share")
        measured, self._seen = batches[:count], batches[count:] if self._uses_rows else []
        if count < wanted:
            room.progress.warn(STEP, f"the calibration split is enough for {count} of {wanted} batches of rows")
        self.prefix, self.blocks = _blocks_of(model)
        if self.blocks and not _begins_anywhere(model, self.blocks, measured[0]):
            room.progress.warn(STEP, "passes can't begin at a block of this model: each goes through all of it")
            self.blocks = []
        self.judge = Judge(Blockwise(model, self.blocks, measured), room.task)
        self.shown = Blockwise(model, self.blocks, self._seen)

    @property
    def _uses_rows(self) -> bool:
        return self.room.knob.uses_rows(self.room.config)

    def _draw(self, device: str) -> list[dict[str, Tensor]]:
        """Batches of the calibration split: those to compare answers on, then those that the method looks at."""
        from optimize.prune.forward import labelled, unlabelled

        room, options = self.room, self.room.options
        method = room.config.calibration.num_samples if self._uses_rows else 0  # type: ignore[attr-defined]
        calibration = Calibration(
            num_samples=options.samples + method,
            max_length=options.length,
            batch_size=options.batch_size,
            seed=options.seed,
        )
        nowhere = Path()
        context = Context(nowhere, nowhere, room.task, room.data.for_stages(), nowhere, STEP, progress=room.progress)
        draw = unlabelled if room.task.name == "sentence-similarity" else labelled
        return draw(room.artifact, calibration, context, self.model, device)

    def steps(self) -> list[dict[str, nn.Module]]:
        """The layers of every block, by name, then of what lies behind the blocks."""
        found: list[dict[str, nn.Module]] = [{} for _ in range(len(self.blocks) + 1)]
        for name, layer in self.layers.items():
            found[self.block_of(name)][name] = layer
        return found

    def block_of(self, name: str) -> int:
        """The number of blocks where the layer lies in none."""
        inside = name.startswith(f"{self.prefix}.") if self.blocks else False
        return int(name.removeprefix(f"{self.prefix}.").partition(".")[0]) if inside else len(self.blocks)

    def moments(self, inside: Mapping[str, nn.Module]) -> list[tuple[list[str], Moment]]:
        """What calibration rows show the layers of the block that is next, which is then gone through: layers with the
        same inputs, and these inputs' second moment.
        """
        import torch

        from optimize.blockwise.blocks import shared_inputs
        from optimize.blockwise.hessian import Hessian

        if not self._seen:
            return [([name], Moment(torch.empty(0), tokens=0, dropped=0)) for name in inside]
        groups = shared_inputs(inside, lambda: self.shown.run(0)) if inside else []
        sums = {names[0]: Hessian(oriented(inside[names[0]]).shape[1], self.model.device) for names in groups}

        def look(name: str, batch: int, x: Tensor) -> None:
            tokens = x.reshape(-1, x.shape[-1])
            mask = self._seen[batch].get("attention_mask")
            if mask is not None and mask.numel() == len(tokens):
                tokens = tokens[mask.reshape(-1) != 0]
            sums[name].add(tokens)

        self.shown.advance({name: inside[name] for name in sums}, look)
        found = [(names, sums[names[0]]) for names in groups]
        unseen = [([name], Moment(torch.empty(0), 0, 0)) for name in inside if not any(name in g for g in groups)]
        return [(names, Moment(one.matrix, one.tokens, one.dropped)) for names, one in found] + unseen

    def moved(self, weights: Mapping[str, Tensor]) -> Moved:
        """With these layers' weights [out, in] in place of their own."""
        own = {name: oriented(self.layers[name]) for name in weights}
        with replaced({name: (own[name], weight) for name, weight in weights.items()}):
            return self.judge.moved()


def measure(room: Room) -> dict[str, Any]:
    """The document of `room.file`: measured now, or what was measured before. A killed measurement goes on behind the
    last whole block.

    Raises `StageError` where the model or its rows can't be looked at in this way.
    """
    from optimize.atomic import write_json

    document, began = _read(room.file), time.perf_counter()
    room.progress.start(STEP, f"{room.stage.name}, {room.knob.name} of each {room.options.by}")
    if document and document["complete"]:
        room.progress.finish(STEP, seconds=0, cached=True)
        return document
    with quiet(), threads(getattr(room.config, "threads", None)):
        bench = room.open()
        if room.options.by == "block" and not bench.blocks:
            raise RecipeError("this model has no list of blocks that hidden states run through", hint="--by layer")
        document = document or _begin(room, bench)
        done = {row["name"] for row in document["layers"]}
        tick = _ticker(room, (document["units"] - len(done)) * len(room.options.settings))
        for number, inside in enumerate(bench.steps()):
            units = _units(bench, inside, number, room.options.by)
            left = {unit: names for unit, names in units.items() if unit not in done}
            groups = bench.moments(inside if left else {})
            for unit, found in _settings(bench, left, groups, tick).items():
                document["layers"].append(_row(bench, unit, units[unit], number, found))
            if number < len(bench.blocks):
                bench.judge.passes.advance({}, lambda *_: None)
            if left:
                write_json(room.file, document)
        order = {name: place for place, name in enumerate(bench.layers)}
        document["layers"].sort(key=lambda row: order[row["modules"][0]])
        document["complete"] = True
        write_json(room.file, document)
    room.progress.finish(STEP, seconds=time.perf_counter() - began)
    return document


def _ticker(room: Room, total: int) -> Callable[[str], None]:
    """Tells progress of one more measurement of so many."""
    began, done = time.perf_counter(), 0

    def tick(unit: str) -> None:
        nonlocal done
        done += 1
        left = (time.perf_counter() - began) / done * (total - done)
        room.progress.update(STEP, done, total, f"{unit}, about {left:.0f} s left")

    return tick


def interval(values: NDArray[np.float64]) -> list[float] | None:
    """Of the mean over rows (BCa); None where rows are too few to tell."""
    import numpy as np

    from optimize.evaluate.bootstrap import resample_means

    ends = resample_means(values[:, None]).interval("value", _CONFIDENCE)
    return [rounded(end) for end in ends] if np.isfinite(ends).all() else None


def described(moved: Moved, base_loss: float | None) -> dict[str, Any]:
    """Of answers that moved: their mean distance with its interval, and what else is known. JSON."""
    import numpy as np

    finite = bool(np.isfinite(moved.distances).all())
    loss = None if moved.loss is None or base_loss is None else moved.loss - base_loss
    return {
        "distance": rounded(float(moved.distances.mean())) if finite else None,
        "ci": interval(moved.distances) if finite else None,
        "flip_rate": None if moved.flip_rate is None else rounded(moved.flip_rate),
        "loss": rounded(loss) if loss is not None and np.isfinite(loss) else None,
    }


def _read(file: Path) -> dict[str, Any] | None:
    import json

    try:
        document: dict[str, Any] = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return document if document.get("schema") == 1 else None


def _begin(room: Room, bench: Bench) -> dict[str, Any]:
    units = sum(len(_units(bench, inside, n, room.options.by)) for n, inside in enumerate(bench.steps()))
    return {
        "schema": 1,
        "key": room.key,
        "recipe": room.recipe.name,
        "stage": room.stage.name,
        "id": room.stage.id,
        "knob": room.knob.name,
        "settings": list(room.options.settings),
        "by": room.options.by,
        "artifact": room.artifact.digest,
        "distance": bench.judge.distance,
        "confidence": _CONFIDENCE,
        "rows": {
            "split": "calibration",
            "digest": room.data.digests.get("calibration"),
            "compared": bench.judge.rows,
            "shown": sum(len(next(iter(batch.values()))) for batch in bench.shown.batches),
            "length": room.options.length,
            "positions": bench.judge.positions,
            "seed": room.options.seed,
        },
        "loss": None if bench.judge.loss is None else rounded(bench.judge.loss),
        "size_bytes": room.artifact.size_bytes,
        "units": units,
        "complete": False,
        "layers": [],
    }


def _units(bench: Bench, inside: Mapping[str, nn.Module], number: int, by: str) -> dict[str, list[str]]:
    """Name -> the layers that change together."""
    if by == "block" and number < len(bench.blocks):
        return {f"{bench.prefix}.{number}": list(inside)} if inside else {}
    return {name: [name] for name in inside}


def _settings(
    bench: Bench,
    units: Mapping[str, Sequence[str]],
    groups: Sequence[tuple[list[str], Moment]],
    tick: Callable[[str], None],
) -> dict[str, list[tuple[Setting, Moved]]]:
    """Of each unit what answers do at every setting."""
    room = bench.room
    found: dict[str, list[tuple[Setting, Moved]]] = {unit: [] for unit in units}
    for setting in room.options.settings if units else ():
        config = room.knob.told(room.config, dict.fromkeys(bench.layers, setting))
        change = room.knob.change(config, bench.layers, room.artifact)
        ready: dict[str, Tensor] = {}
        for names, moment in groups:
            weights = [oriented(bench.layers[name]).float().clone() for name in names]
            ready |= {
                name: made.weight.float() for name, made in zip(names, change(names, weights, moment), strict=True)
            }
            for unit, members in units.items():
                if ready.keys() >= set(members):
                    found[unit].append((setting, bench.moved({name: ready.pop(name) for name in members})))
                    tick(unit)
    return found


def _row(
    bench: Bench, unit: str, names: Sequence[str], number: int, found: Sequence[tuple[Setting, Moved]]
) -> dict[str, Any]:
    return {
        "name": unit,
        "block": number if number < len(bench.blocks) else None,
        "modules": list(names),
        "weights": sum(bench.weights[name] for name in names),
        "settings": [{"setting": setting, **described(moved, bench.judge.loss)} for setting, moved in found],
    }


def _blocks_of(model: Any) -> tuple[str, list[Any]]:
    from optimize.blockwise.blocks import find_blocks

    try:
        prefix = find_blocks(model)
    except StageError:
        return "", []
    return prefix, list(model.get_submodule(prefix))


def _begins_anywhere(model: Any, blocks: Sequence[Any], batch: Mapping[str, Tensor]) -> bool:
    """Whether a pass that begins at the second block gives the very answers of a whole one, and does so twice."""
    import torch

    passes = Blockwise(model, blocks, [batch])
    whole = passes.run(0)
    try:
        passes.advance({}, lambda *_: None)
        twice = [passes.run(0) for _ in range(2)]
    except Exception:  # whatever the model stumbles over when it is run in another way
        return False
    return all(
        part.keys() == whole.keys() and all(torch.equal(part[name], whole[name]) for name in whole) for part in twice
    )
