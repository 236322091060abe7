"""The history: every run, its scores and verdicts in one database, SQLite in the work folder or one of your own.

`run.json` stays the file of record: the database is drawn from it, can be made again at any time, and is never in the
way of a run. SQLAlchemy is imported only where the database is opened, which the end of a run mostly does without.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimize.history.database import History
    from optimize.work import Work

VARIABLE = "OPTIMIZE_HISTORY"
"""The address of a database to use instead, such as `postgresql://user@host/database`."""
Tell = Callable[[str], object]


def address_of(work: Work, given: str | None = None) -> str | Path:
    """The database that was asked for: by an option, by the variable, or the work folder's own."""
    return given or os.environ.get(VARIABLE) or work.history


def record(work: Work, document: Mapping[str, Any], tell: Tell) -> None:
    """Note a run that is on the disk. Nothing is raised: what goes wrong is told, and a later `optimize history` makes
    up for it."""
    from optimize.history import quick
    from optimize.history.rows import rows_of

    try:
        if not os.environ.get(VARIABLE) and quick.add(work.history, rows_of(document)):
            return
        from optimize.history.database import opened

        with opened(address_of(work), tell) as history:
            history.add([document])
            if history.fresh:
                catch_up(history, work)
    except Exception as error:
        from optimize.masking import masked

        said = " ".join(masked(error, os.environ.get(VARIABLE)).split())
        tell(f"the run is not in the history yet: {said}; `optimize history` catches up on it from run.json")


def catch_up(history: History, work: Work, *, everything: bool = False) -> int:
    """Add the runs of the work folder that the database lacks (or all of them); how many."""
    from optimize.run import run_documents

    known = set() if everything else history.known()
    folders = {path.parent.name for path in work.runs.glob("*/run.json")}
    if folders <= known:
        return 0
    return history.add(document for _, document in run_documents(work) if document["run"] not in known)


@contextlib.contextmanager
def open_history(work: Work, address: str | None = None, *, tell: Tell) -> Iterator[History]:
    """The database with every run of the work folder in it.

    Where the work folder's own can't be made or written, what can be read is; at worst one in memory stands in for it.
    Raises `HistoryError` where a database elsewhere can't be reached.
    """
    from optimize.errors import HistoryError
    from optimize.history.database import opened

    ours = not (address or os.environ.get(VARIABLE))
    place = "sqlite://" if ours and not work.root.is_dir() else address_of(work, address)
    with contextlib.ExitStack() as stack:
        try:
            history = stack.enter_context(opened(place, tell))
            history.check()
            catch_up(history, work)
        except HistoryError as error:
            if not ours:
                raise
            tell(f"{error.message}; this is read from the runs alone")
            history = stack.enter_context(opened("sqlite://", tell))
            catch_up(history, work)
        yield history


def import_runs(history: History, folder: Path) -> int:
    """Add runs that came from elsewhere: a run's folder, a folder of them, or a work folder; how many.

    Raises `RecipeError` where there is none.
    """
    from optimize.errors import RecipeError
    from optimize.run import read_document

    paths = [path for shape in ("run.json", "*/run.json", "runs/*/run.json") for path in sorted(folder.glob(shape))]
    found = [document for path in paths if (document := read_document(path))]
    if not found:
        raise RecipeError(f"there is no run.json in {folder}", hint="name a work folder, or the folder of a run")
    return history.add(found)
