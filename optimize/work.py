"""The work folder: everything a run leaves behind lies in one place (`.optimize`, or `--work`, or `OPTIMIZE_WORK`)."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optimize.registry import Registry
    from optimize.store import Store


class Work:
    """Paths below one folder."""

    def __init__(self, root: str | os.PathLike[str] | None = None, *, scores: Path | None = None) -> None:
        self.root = Path(root or os.environ.get("OPTIMIZE_WORK") or ".optimize").absolute()
        self.scores = scores or self.root / "scores"
        """Measurements by key. Elsewhere than in the work folder, nothing that was measured before is found."""

    @cached_property
    def store(self) -> Store:
        """Artifacts by content, and which key gave which."""
        from optimize.store import Store

        return Store(self.root / "store")

    @cached_property
    def registry(self) -> Registry:
        from optimize.registry import Registry

        return Registry(self.root / "registry")

    @property
    def data(self) -> Path:
        """Prepared splits by key."""
        return self.root / "data"

    @property
    def runs(self) -> Path:
        """One folder a run, with its `run.json`."""
        return self.root / "runs"

    @property
    def history(self) -> Path:
        """The database of all runs, drawn from their `run.json`."""
        return self.root / "history.db"


def cache_folder() -> Path:
    """Where fetched wheels and hub files are kept, shared between projects (`OPTIMIZE_CACHE` moves it)."""
    if chosen := os.environ.get("OPTIMIZE_CACHE"):
        return Path(chosen).absolute()
    from platformdirs import user_cache_path

    return user_cache_path("optimize-workbench")
