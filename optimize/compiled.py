"""Inner loops, compiled for the CPU once and kept in the cache folder for every process that follows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

from optimize.work import cache_folder

SETTINGS: Any = numba.config


def compiled(signature: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: `numba.njit` for these types, without the interpreter's lock; what is divided by 0 is infinite.

    Compiling takes seconds, at the module's import. What comes of it depends on the processor and on the source file;
    Numba looks at both before it takes something from the cache.
    """
    return numba.njit(signature, nogil=True, error_model="numpy", cache=_kept_in_cache_folder(), **options)


def _kept_in_cache_folder() -> bool:
    """Have Numba keep its files there, and not among the package's own; False where nothing can be kept."""
    folder = Path(SETTINGS.CACHE_DIR or cache_folder() / "kernels")
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        return False
    SETTINGS.CACHE_DIR = str(folder)
    return True
