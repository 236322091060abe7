"""`--report KIND[=PATH]`: everything that CI shows of a result, all drawn from its one document."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Draw = Callable[[Mapping[str, Any], "Path | None"], str]
"""From the document and the folder of its run (None where there is none) to text."""


@dataclass(frozen=True)
class Kind:
    """One sort of output: a text that is drawn and put somewhere, or a comment that is posted."""

    about: str
    draw: Draw | None = None
    post: Callable[[Mapping[str, Any], int | None], str] | None = None
    """Of a document to a pull request: its number, or None for that of this job."""
    file: str | None = None
    """Where it goes without a PATH, in the current folder; None: to standard error."""
    variable: str | None = None
    """The environment names the file, and the text is added at its end."""


def _junit(document: Mapping[str, Any], _: Path | None) -> str:
    from optimize.report.junit import junit

    return junit(document)


def _comment(document: Mapping[str, Any], _: Path | None) -> str:
    from optimize.report.markdown import comment

    return comment(document)


def _json(document: Mapping[str, Any], _: Path | None) -> str:
    import json

    return json.dumps(document, indent=2) + "\n"


def _annotations(document: Mapping[str, Any], _: Path | None) -> str:
    from optimize.report.github import annotate

    return annotate(document, _checkout("GITHUB_WORKSPACE"))


def _step_summary(document: Mapping[str, Any], _: Path | None) -> str:
    from optimize.report.github import step_summary

    file = Path(os.environ.get("GITHUB_STEP_SUMMARY") or os.devnull)
    return step_summary(document, used=file.stat().st_size if file.is_file() else 0)


def _outputs(document: Mapping[str, Any], folder: Path | None) -> str:
    from optimize.report.github import outputs

    return outputs(document, folder)


def _note(document: Mapping[str, Any], _: Path | None) -> str:
    from optimize.report.gitlab import note

    return note(document)


def _code_quality(document: Mapping[str, Any], _: Path | None) -> str:
    from optimize.report.gitlab import code_quality

    return code_quality(document, _checkout("CI_PROJECT_DIR"))


def _post_to_github(document: Mapping[str, Any], number: int | None) -> str:
    from optimize.report.posting import post_to_github

    return post_to_github(document, number=number)


def _post_to_gitlab(document: Mapping[str, Any], number: int | None) -> str:
    from optimize.report.posting import post_to_gitlab

    return post_to_gitlab(document, number=number)


KINDS: dict[str, Kind] = {
    "junit": Kind("JUnit XML, one case a gate and setting", _junit, file="optimize-junit.xml"),
    "markdown": Kind("the comment for a pull request", _comment, file="optimize.md"),
    "json": Kind("the result itself, also of a recipe with mistakes", _json, file="optimize.json"),
    "github": Kind("annotations at the recipe's lines", _annotations),
    "github-summary": Kind("the step's summary", _step_summary, variable="GITHUB_STEP_SUMMARY"),
    "github-output": Kind("the step's outputs: verdict, run", _outputs, variable="GITHUB_OUTPUT"),
    "github-comment": Kind("a comment on the pull request, updated in place", post=_post_to_github),
    "gitlab-note": Kind("the note for a merge request", _note, file="optimize.md"),
    "gitlab-codequality": Kind("Code Quality", _code_quality, file="gl-code-quality-report.json"),
    "gitlab-comment": Kind("a note on the merge request, updated in place", post=_post_to_gitlab),
}


def check_kind(asked: str) -> str | None:
    """What is wrong with a KIND[=PATH]; None where nothing is."""
    name, equals, path = asked.partition("=")
    if name not in KINDS:
        return f"{name[:40]!r} is no report; there are {', '.join(KINDS)}"
    if equals and not path:
        return f"{asked!r} names no file after the ="
    return f"{name} is posted and goes to no file" if path and KINDS[name].post else None


def find_result(reference: str) -> tuple[dict[str, Any], Path]:
    """A result and its folder: the path of a file or of a run's folder, a run's id, or `latest`.

    A file may come from anywhere, so its values are checked. Raises `RecipeError` where there is none.
    """
    from optimize.report.intake import read_result
    from optimize.run import find_run
    from optimize.work import Work

    path = Path(reference)
    file = path / "run.json" if path.is_dir() else path
    if file.is_file():
        return read_result(file), file.parent
    folder, document = find_run(Work(), reference)
    return document, folder


def of_recipe(file: Path | None) -> dict[str, Any]:
    """What a document says of its recipe, also of one with mistakes, so that its comment is updated in place too."""
    from optimize.recipe.reader import read

    if file is None:
        return {}
    value = read(file).value
    name = value.get("name") if isinstance(value, dict) else None
    return {"recipe": name if isinstance(name, str) else None, "recipe_file": str(file)}


def write_reports(
    document: Mapping[str, Any], folder: Path | None, kinds: Sequence[str], *, to_stdout: bool = False
) -> None:
    """Write or post every report that was asked for, each a KIND[=PATH].

    `document` is a run.json or the document of an error; `folder` is that of the run, if there is one. What can't be
    written or posted is said on standard error, and the others follow: a report never changes an exit code. With
    `to_stdout`, what has no PATH is printed.
    """
    from optimize.commands.reporting import put

    document = {"error": None, **document}
    interrupted = (document["error"] or {}).get("type") == "KeyboardInterrupt"
    for asked in dict.fromkeys(kinds):
        name, _, path = asked.partition("=")
        kind = KINDS[name]
        if kind.draw is None:
            if not interrupted:  # a cancelled job has seconds left
                post(document, name)
            continue
        with _told(f"the report {name} was not written"):
            text = kind.draw(document, folder)
            if to_stdout and not path:
                put(text)
            else:
                _put(text, path, kind)


def post(document: Mapping[str, Any], name: str, number: int | None = None) -> None:
    """Post one of the kinds that are posted. A failure is said on standard error."""
    from optimize.commands.reporting import note

    kind = KINDS[name]
    assert kind.post is not None
    with _told(f"{name} was not posted"):
        note(f"{name}: {kind.post({'error': None, **document}, number)}")


@contextmanager
def _told(failed: str) -> Iterator[None]:
    from optimize.commands.reporting import note
    from optimize.report.posting import PostingError

    try:
        yield
    except Exception as error:
        told = error if isinstance(error, OSError | PostingError) else f"{type(error).__name__}: {error}"
        note(f"warning: {failed}: {told}")


def _put(text: str, path: str, kind: Kind) -> None:
    from optimize.atomic import write_bytes

    encoded = text.encode("utf-8", "replace")
    if path or kind.file:
        write_bytes(Path(path or kind.file or ""), encoded)
    elif kind.variable:
        place = os.environ.get(kind.variable)
        if not place:
            raise OSError(None, f"{kind.variable} is not set: this is no step of GitHub Actions")
        with Path(place).open("ab") as file:
            file.write(encoded)
    else:
        print(text, end="", file=sys.stderr, flush=True)


def _checkout(variable: str) -> Path:
    """The root of the checkout, which hosts want paths from."""
    return Path(os.environ.get(variable) or Path.cwd())
