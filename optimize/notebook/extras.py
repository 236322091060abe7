"""Libraries of the extra `notebook`: imported where they are used, with a clear word where they are missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from optimize.errors import OptimizeError


def need(module: str, what: str) -> Any:
    """The module. Raises `OptimizeError` that names the extra where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise OptimizeError(
            f"{what} needs {module.partition('.')[0]}, which can't be imported ({error})",
            hint='pip install "optimize-workbench[notebook]"',
        ) from error
