"""What the verbs share: the options that several have, and how each of them ends."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from optimize.commands.reporting import OutputFormat, failure, note, report, say
from optimize.report.outputs import KINDS, check_kind

UsageError: Any = typer.BadParameter.__base__
"""A wrong command line. Some releases of typer carry their own copy of click: this is the right one's, in public."""


class Verb(TyperCommand):
    """A command that ends with an exit code, whatever happens. What goes wrong is said by `report`."""

    def invoke(self, ctx: Any) -> int:
        try:
            return super().invoke(ctx) or 0
        except (typer.Exit, UsageError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if kinds := ctx.params.get("reports"):
                from optimize.report.outputs import of_recipe, write_reports

                write_reports({**of_recipe(ctx.params.get("recipe")), **failure(error)}, None, kinds)
            style = ctx.params.get("output_format", OutputFormat.full)
            return report(
                error,
                as_json=ctx.params.get("as_json", False) or style is OutputFormat.json,
                style=style,
                debug=ctx.find_root().params["debug"],
                mistakes=say if ctx.info_name == "validate" else note,  # they are what `validate` is asked for
            )


def group(help: str) -> typer.Typer:
    # Without rich's markup and tracebacks, `--help` answers in a third of the time.
    return typer.Typer(help=help, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)


def _use_work(folder: Path | None) -> Path | None:
    """`--work` becomes the variable that `Work()` reads, so that child processes and the error log follow it too."""
    if folder is not None:
        os.environ["OPTIMIZE_WORK"] = str(folder.absolute())
    return folder


class By(str, Enum):
    """What `sensitivity` changes at a time."""

    layer = "layer"
    block = "block"


def _check_reports(kinds: list[str] | None) -> list[str] | None:
    """A wrong one is said before hours of work, not after."""
    for kind in kinds or ():
        if message := check_kind(kind):
            raise typer.BadParameter(message)
    return kinds


RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override one value, such as stages.0.epochs=2. Repeatable."),
]
Style = Annotated[OutputFormat, typer.Option("--output-format", help="How mistakes in the recipe are shown.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on standard output.")]
Reports = Annotated[
    list[str] | None,
    typer.Option(
        "--report",
        metavar="KIND[=PATH]",
        callback=_check_reports,
        help="Also write the result as " + ", ".join(KINDS) + ". Repeatable.",
    ),
]
Remeasure = Annotated[bool, typer.Option("--remeasure", help="Add latency rounds to those on record.")]
Remote = Annotated[
    str | None,
    typer.Option(
        "--remote",
        metavar="URL",
        envvar="OPTIMIZE_REMOTE",
        help="A folder, s3://..., gs://...; by default that of settings.yaml in the work folder.",
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Take models from the remote that hold code or are programs.")
]
WorkFolder = Annotated[
    Path | None,
    typer.Option(
        "--work",
        metavar="DIR",
        envvar="OPTIMIZE_WORK",
        show_default=".optimize",
        callback=_use_work,
        help="The folder that keeps artifacts, scores, runs and the registry.",
    ),
]
