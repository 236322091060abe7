"""A remote for the store and the registry: `push` sends what is promoted, `pull` brings it, checked on arrival.

A remote is a folder or any URL that fsspec knows. Files go there once, named after their bytes; a manifest follows when
all its files are there, and the registry's entries come last, each made only where there is none. So a push that is
killed leaves nothing that anybody sees, the same command goes on from there, and of two pushes at once one is told.
"""

from __future__ import annotations

from optimize.remote.fetching import Pulled, pull
from optimize.remote.sending import Pushed, push

__all__ = ["Pulled", "Pushed", "pull", "push"]
