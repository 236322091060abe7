"""Pages about the command line and the Python API, as Markdown: from the Typer app, and for mkdocstrings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, get_args, get_type_hints

import typer
from pages import code, prose, table

TENSORS = {
    "optimize.quantize.gptq_solver": "GPTQ's mathematics, on one layer's weight and the Hessian of its inputs.",
    "optimize.quantize.gptq_grid": "The grids that weights are rounded to.",
    "optimize.quantize.rounding": "8-bit codes of weights, biases and activations.",
    "optimize.prune.unstructured_scores": "Which weights matter least, and the masks that follow.",
    "optimize.prune.unstructured_solver": "Wanda and SparseGPT on one layer.",
    "optimize.distill.losses": "What a student is held to.",
    "optimize.evaluate.statistics": "The intervals that decide, in closed form.",
    "optimize.evaluate.bootstrap": "The intervals that decide, by resampling.",
}
"""Modules of pure functions on tensors and counts, which a notebook may call."""


@dataclass(frozen=True)
class Parameter:
    """An argument or an option of a verb."""

    names: tuple[str, ...]
    """What an argument is shown as, or how an option is written: `--promote`, `--no-promote`."""
    option: bool
    value: str
    """What an option wants behind it; empty for a switch."""
    help: str
    default: str
    """Empty where leaving it out says nothing."""


def verbs(app: typer.Typer, before: str = "") -> dict[str, Callable[..., Any]]:
    """Every verb -> its function; those of a group with its name before them, such as `store list`."""
    found = {f"{before}{one.name or one.callback.__name__}": one.callback for one in app.registered_commands}
    for group in app.registered_groups:
        found |= verbs(group.typer_instance, f"{before}{group.name} ")
    return found


def parameters(function: Callable[..., Any]) -> list[Parameter]:
    hints = get_type_hints(function, include_extras=True)
    return [_parameter(name, hints[name], one.default) for name, one in inspect.signature(function).parameters.items()]


def _parameter(name: str, hint: Any, default: Any) -> Parameter:
    kind, info = get_args(hint)
    option = isinstance(info, typer.models.OptionInfo)
    # In an Annotated hint, what stands first is kept as the default.
    declared = [one for one in (info.default, *(info.param_decls or ())) if isinstance(one, str)]
    names = declared if option else [info.metavar or name.upper()]
    value = "" if kind is bool or not option else info.metavar or _type(kind)
    if default is inspect.Parameter.empty:
        told = "required"
    else:
        given = info.show_default if isinstance(info.show_default, str) else default
        told = "" if given is None or given is False else str(getattr(given, "value", given)).lower()
    if info.envvar:
        told = "; ".join(filter(None, (told, f"the variable {info.envvar}")))
    # `--promote/--no-promote` is written in one.
    return Parameter(tuple("/".join(names).split("/")), option, value, info.help or "", told)


def _type(kind: Any) -> str:
    """`INT`, `PATH`, or the choices of an enumeration."""
    (plain,) = [one for one in get_args(kind) or (kind,) if one is not type(None)]
    if issubclass(plain, Enum):
        return "|".join(str(one.value) for one in plain)
    return {"str": "TEXT"}.get(plain.__name__, plain.__name__.upper())


def commands() -> str:
    """Every verb with its arguments and options."""
    from optimize.cli import app

    parts = [
        "# The command line",
        "With `--json` a verb prints one JSON document on standard output and nothing else there, also when it fails; "
        "progress goes to standard error. [What a run leaves behind](run-json.md) has a run's document and the exit "
        "codes.",
        "## For all verbs",
        "These stand before the verb: `optimize --debug apply RECIPE`.",
        _table(parameters(app.registered_callback.callback)),
    ]
    for name, function in verbs(app).items():
        known = parameters(function)
        usage = " ".join(["optimize", name, "[OPTIONS]", *(one.names[0] for one in known if not one.option)])
        help = prose(inspect.getdoc(function) or "")
        parts += [f"## optimize {name}", f"```text\n{usage}\n```", help, _table(known)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(known: list[Parameter]) -> str:
    rows = [
        (", ".join(code(f"{name} {one.value}".strip()) for name in one.names), prose(one.help), prose(one.default))
        for one in known
    ]
    return table(("", "says", "default"), rows) if rows else ""


def python() -> str:
    """What mkdocstrings makes the API's page of: everything in `optimize.__all__`, and the tensor functions."""
    import optimize

    parts = [
        "# Python",
        inspect.cleandoc(optimize.__doc__ or "").replace("\n    ", "\n    "),
    ]
    kinds: dict[str, list[str]] = {"Functions": [], "Classes": [], "Errors": [], "Modules": []}
    for name in optimize.__all__:
        one = getattr(optimize, name)
        if inspect.isclass(one):
            kinds["Errors" if issubclass(one, Exception) else "Classes"].append(name)
        else:
            kinds["Modules" if inspect.ismodule(one) else "Functions"].append(name)
    for kind, names in kinds.items():
        if names:
            parts += [f"## {kind}", *(f"::: optimize.{name}" for name in names)]
    parts += [
        "## On tensors and counts",
        "Pure functions below the stages, for notebooks and methods of your own.",
    ]
    for module, said in TENSORS.items():
        parts += [f"### {module}", said, f"::: {module}\n    options:\n      {_BARE}"]
    return "\n\n".join(parts) + "\n"


_BARE = "\n      ".join(
    ("heading_level: 4", "show_root_heading: false", "show_root_toc_entry: false", "show_docstring_description: true")
)
