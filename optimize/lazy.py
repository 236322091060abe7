"""Modules that are imported when they are first asked for: `optimize.quantize.gptq` is found by its name alone."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def submodules(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package."""

    def get(name: str) -> Any:
        if name.startswith("_") or find_spec(f"{package}.{name}") is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return import_module(f"{package}.{name}")

    def names() -> list[str]:
        from pkgutil import iter_modules

        return sorted(module.name for module in iter_modules(import_module(package).__path__))

    return get, names
