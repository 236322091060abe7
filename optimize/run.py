"""A finished run: `run.json` and what people do with it."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import RecipeError, StoreError

if TYPE_CHECKING:
    from pandas import DataFrame

    from optimize.model import Model
    from optimize.progress import Progress
    from optimize.recipe import Recipe
    from optimize.report.table import Table
    from optimize.work import Work


INTERRUPTED = 130


@dataclass(frozen=True)
class Run:
    """What `apply` and `compare` return."""

    document: Mapping[str, Any]
    """The contents of `run.json`."""
    directory: Path
    """The folder of `run.json` and its sidecars."""
    work: Work

    @property
    def verdict(self) -> str | None:
        """`pass`, `fail`, `inconclusive`, or None where no gate was asked."""
        verdict: str | None = self.document["verdict"]
        return verdict

    @property
    def exit_code(self) -> int:
        """What the command line exits with."""
        return int(self.document["exit_code"])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(artifact["name"] for artifact in self.document["artifacts"])

    def __getitem__(self, name: str) -> Model:
        """The artifact of the stage so named, ready to answer. Raises `KeyError`."""
        from optimize.model import Model

        for described in self.document["artifacts"]:
            if described["name"] == name:
                return Model(self.work.store.open(described["digest"]), name=name, scores=described["scores"])
        raise KeyError(f"{name!r}; this run has {', '.join(self.names)}")

    @property
    def artifacts(self) -> DataFrame:
        """A pandas frame: one row an artifact, with scores, intervals, times and size (`notebook/frames.py`)."""
        from optimize.notebook import frames

        return frames.artifacts(self.document)

    @property
    def comparisons(self) -> DataFrame:
        """A pandas frame: one row a comparison, with the ends of its interval."""
        from optimize.notebook import frames

        return frames.comparisons(self.document)

    @property
    def gates(self) -> DataFrame:
        """A pandas frame: one row a gate and artifact, with limit, margin and verdict."""
        from optimize.notebook import frames

        return frames.gates(self.document)

    def plot(self, kind: str = "pareto", *, backend: str = "matplotlib", **options: Any) -> Any:
        """A picture that shows itself in a notebook, as PNG; with `backend="plotly"`, plotly's own figure.

        kind: `pareto` (quality over time; `metric`, `setting`), `intervals` (every comparison; `metric`), `waterfall`
        (what each stage cost; `artifact`) or `layers` (what a stage found of each layer; `artifact`).

        Raises `OptimizeError` where the run holds nothing to draw, and where the library is not installed.
        """
        from optimize.notebook.plotting import plot

        return plot(self, kind, backend, **options)

    def table(self) -> Table:
        """The table that a terminal shows; in a notebook it shows itself."""
        from optimize.report.table import Table

        return Table(self.document)

    @property
    def summary(self) -> str:
        """One line: what was decided and why."""
        from optimize.report.table import summary

        return summary(self.document)

    def __str__(self) -> str:
        return f"{self.table()}\n{self.summary}"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from optimize.commands.reporting import plain

        return {"text/plain": plain(self), "text/html": self._repr_html_()}


@dataclass
class Clock:
    """Where the wall time of a run went."""

    began: float = field(default_factory=time.perf_counter)
    spent: dict[str, float] = field(default_factory=lambda: {"sources": 0.0, "stages": 0.0, "scoring": 0.0})

    @contextlib.contextmanager
    def on(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent[part] += time.perf_counter() - start

    def write(self, document: dict[str, Any]) -> None:
        seconds = time.perf_counter() - self.began
        parts = {**self.spent, "engine": seconds - sum(self.spent.values())}
        document["seconds"] = round(seconds, 3)
        document["seconds_by"] = {name: round(spent, 3) for name, spent in parts.items()}


def new_document(recipe: Recipe) -> dict[str, Any]:
    """A run.json before anything has happened."""
    from optimize.evaluate.host import fingerprint

    return {
        "schema": 1,
        # In the order of time, to the microsecond: `latest` is the last by name.
        "run": f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S-%f}-{secrets.token_hex(2)}",
        "recipe": recipe.name,
        "recipe_digest": recipe.digest,
        "recipe_file": str(recipe.file) if recipe.file else None,
        "verdict": None,
        "exit_code": 0,
        "error": None,
        "baseline": None,
        "data": {},
        "host": fingerprint(),
        "seconds": 0.0,
        "seconds_by": {},
        "artifacts": [],
        "comparisons": [],
        "gates": [],
        "measurement": {},
        "sidecars": {},
        "selected": None,
        "against": None,
        "promoted": None,
    }


@contextlib.contextmanager
def recording(
    work: Work,
    recipe: Recipe,
    document: dict[str, Any],
    sidecars: Mapping[str, Path],
    clock: Clock,
    progress: Progress | None = None,
) -> Iterator[None]:
    """While this lasts, `document` and `sidecars` fill up. At its end, whatever happened, they are on disk, with
    `report.html` drawn from them, and in the history, and on their way to where the recipe sends them.

    Raises `StoreError` where they can't be written to disk. That anything else of this fails is only told.
    """
    from optimize.atomic import explain
    from optimize.progress import Progress

    try:
        yield
    except BaseException as error:
        document["error"] = describe_error(error)
        document["exit_code"] = getattr(error, "exit_code", INTERRUPTED if isinstance(error, KeyboardInterrupt) else 4)
        clock.write(document)
        error.document = document  # type: ignore[attr-defined]  # `--json` prints what was reached
        with contextlib.suppress(OSError):  # a full disk: the error itself matters more
            write_run(work, recipe, document, sidecars)
            _pass_on(work, recipe, document, progress or Progress())
        raise
    clock.write(document)
    try:
        write_run(work, recipe, document, sidecars)
    except OSError as error:
        message, hint = explain(error, "writing run.json", work.runs)
        raise StoreError(message, hint=hint) from error
    _pass_on(work, recipe, document, progress or Progress())


def _pass_on(work: Work, recipe: Recipe, document: Mapping[str, Any], progress: Progress) -> None:
    """Nothing here changes what was found: whatever goes wrong is told, and no more."""
    from optimize import history, track

    _draw(work.runs / document["run"], progress)
    history.record(work, document, lambda message: progress.warn("history", message))
    if document["exit_code"] != INTERRUPTED:
        track.send_all(recipe.track, work.runs / document["run"], progress)


def _draw(directory: Path, progress: Progress) -> None:
    """The page of a run."""
    try:
        from optimize.report.html import write

        write(directory)
    except Exception as error:
        progress.warn("", f"report.html could not be drawn ({type(error).__name__}: {error})")


def describe_error(error: BaseException) -> dict[str, Any]:
    """`error` of run.json."""
    return {
        "type": type(error).__name__,
        "message": getattr(error, "message", None) or str(error) or type(error).__name__,
        "stage": getattr(error, "stage", None),
        "location": getattr(error, "location", None),
        "hint": getattr(error, "hint", None),
    }


def write_run(work: Work, recipe: Recipe, document: dict[str, Any], sidecars: Mapping[str, Path]) -> None:
    """Write a run's folder: sidecars and the recipe first, `run.json` last, so that a run that has one is whole."""
    from optimize.artifact import sha256_file
    from optimize.atomic import write_json

    directory = work.runs / document["run"]
    directory.mkdir(parents=True, exist_ok=True)
    for name, path in sidecars.items():
        target = directory / f"{name}{path.suffix}"
        shutil.copyfile(path, target)
        document["sidecars"][name] = {"path": target.name, "digest": f"sha256:{sha256_file(target)}"}
    write_json(directory / "recipe.json", {"base": str(recipe.base), "recipe": recipe.document()})
    write_json(directory / "run.json", document)


def gates_on(document: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """What the gates say of one artifact, also when it was measured once more."""
    gates = [*document["gates"], *document.get("confirmation", {}).get("gates", ())]
    return [gate for gate in gates if gate["artifact"] == name]


def verdict_on(document: Mapping[str, Any], name: str) -> str | None:
    """The worst verdict of the gates on one artifact; None where no gate judged it. Acknowledged ones don't count."""
    found = {"pass" if gate.get("acknowledged") else gate["verdict"] for gate in gates_on(document, name)}
    return next((verdict for verdict in ("fail", "inconclusive", "pass") if verdict in found), None)


def run_documents(work: Work) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every whole run of a work folder with its folder, the newest first."""
    for path in sorted(work.runs.glob("*/run.json"), reverse=True):
        if document := read_document(path):
            yield path.parent, document


def read_document(path: Path) -> dict[str, Any] | None:
    """A run.json; None where there is none, or something else."""
    with contextlib.suppress(OSError, ValueError):
        document = json.loads(path.read_bytes())
        if isinstance(document, dict) and document.get("schema") == 1 and "run" in document:
            return document
    return None


def newest_digests(work: Work) -> set[str]:
    """Every artifact that the newest whole run of each recipe made, reused or started from, or a later run of it.

    A run that failed early, and a comparison, hold few artifacts: what was there before them is still needed.
    """
    whole: set[str] = set()
    digests: set[str] = set()
    for _, document in run_documents(work):
        if document["recipe"] in whole:
            continue
        digests |= {one[name] for one in document["artifacts"] for name in ("digest", "parent") if one[name]}
        if document["error"] is None and "compared" not in document:
            whole.add(document["recipe"])
    return digests


def find_run(work: Work, reference: str) -> tuple[Path, dict[str, Any]]:
    """A run by its id, `latest`, or the path of a `run.json` or its folder. Raises `RecipeError` if there is none."""
    for folder, document in run_documents(work):
        if reference in ("latest", document["run"]):
            return folder, document
    path = Path(reference) / "run.json" if Path(reference).is_dir() else Path(reference)
    if found := read_document(path):
        return path.parent, found
    raise RecipeError(
        f"there is no run {reference!r}", location=str(work.runs), hint="`latest`, or the id that `apply` printed"
    )


def recipe_of(folder: Path) -> Recipe:
    """The recipe that a run was made from."""
    from optimize.recipe import load

    stored = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    stored["recipe"].pop("track", None)  # what is looked at once more need not be sent once more
    return load(stored["recipe"], env=False, base=Path(stored["base"]))
