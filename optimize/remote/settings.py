"""Which remote is meant: `--remote`, else `OPTIMIZE_REMOTE`, else `remote:` in the work folder's `settings.yaml`.

# .optimize/settings.yaml
remote: s3://our-models/sentiment
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from optimize.config import Block
from optimize.errors import RecipeError

if TYPE_CHECKING:
    from optimize.remote.places import Place
    from optimize.work import Work

FILE = "settings.yaml"


class Settings(Block):
    """`settings.yaml` of a work folder."""

    remote: str | None = None
    """Where `push` and `pull` keep what is promoted: a folder, or a URL such as `s3://bucket/path`."""


def settings_of(work: Work) -> Settings:
    """Raises `RecipeError` for mistakes in the file."""
    from optimize.recipe import reader
    from optimize.recipe.blocks import read_block

    path = work.root / FILE
    if not path.is_file():
        return Settings()
    text = reader.read(path)
    settings = read_block(text, Settings, text.value, ()) if text.value is not None else None
    text.raise_mistakes()
    return settings or Settings()


def find_remote(work: Work, url: str | None = None) -> Place | None:
    """The remote's place, or None where none is named."""
    from optimize.remote.places import open_place

    named = url or os.environ.get("OPTIMIZE_REMOTE") or settings_of(work).remote
    return open_place(named) if named else None


def need_remote(work: Work, url: str | None = None) -> Place:
    """As `find_remote`. Raises `RecipeError` where none is named."""
    place = find_remote(work, url)
    if place is None:
        raise RecipeError(
            "no remote is named",
            hint=f"--remote s3://BUCKET/PATH (or a folder), OPTIMIZE_REMOTE, or `remote:` in {work.root / FILE}",
        )
    return place
