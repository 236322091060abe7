"""Pages about stages, as Markdown: read off the registry, each `Config` and docstring, and recipes/."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from optimize import support, tasks
from optimize.commands.stages import type_words, value_words
from optimize.config import Block
from optimize.recipe.reader import read
from optimize.stages import VERBS, Entry, entries

RECIPES = Path(__file__).parents[1] / "recipes"
OURS = tuple(entry for entry in entries() if entry.module.startswith("optimize."))
VERB_WORDS = {
    "distill": "trains: on labels, or on what a teacher says",
    "prune": "takes away what matters least",
    "quantize": "stores and computes in fewer bits",
    "export": "writes the model for another runtime",
}


# --- Markdown ---------------------------------------------------------------------------------------------------------


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = tuple(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def prose(text: str) -> str:
    """Text of the code for a line of Markdown: what is not code says nothing to HTML."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    said = {"<": "&lt;", "*": r"\*", "|": r"\|"}
    return "".join(part if part.startswith("`") else part.translate(str.maketrans(said)) for part in parts)


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def documentation(text: str) -> str:
    """A docstring: indented blocks become fenced ones, YAML where they are parts of a recipe."""
    blocks = []
    for block in re.split(r"\n\n(?!\s)|\n\n(?=\s)", inspect.cleandoc(text)):
        if block.startswith(" "):
            inside = textwrap.dedent(block).strip("\n")
            language = "yaml" if re.match(r"(stages:|- \w+:)", inside) else "text"
            blocks.append(f"```{language}\n{inside}\n```")
        else:
            blocks.append(block)
    return "\n\n".join(blocks)


# --- the fields of a block --------------------------------------------------------------------------------------------


def fields(config: type[Block], but: Iterable[str] = ()) -> str:
    """A table of everything that a block may say, nested blocks with dotted names.

    Raises `ValueError` for a field without a description.
    """
    schema = config.model_json_schema()
    rows = _fields(schema, schema.get("$defs", {}), config.__module__, "")
    listed = [row for row in rows if row[0].strip("`").split(".")[0] not in set(but)]
    return table(("key", "type", "default", "what it says"), listed) if listed else "It has no settings."


def _fields(schema: Mapping[str, Any], known: Mapping[str, Any], owner: str, before: str) -> Iterator[tuple[str, ...]]:
    for name, field in schema.get("properties", {}).items():
        if not field.get("description", "").strip():
            raise ValueError(f"{owner}: the field `{before}{name}` has no description: write a string below it")
        block = _block(field, known)
        if name in schema.get("required", ()):
            default = "required"
        else:
            default = "" if block and field.get("default") is not None else code(value_words(field.get("default")))
        kind = prose(type_words(_plain(field, known)))
        yield code(f"{before}{name}"), kind, default, prose(field["description"])
        if block:
            yield from _fields(block, known, owner, f"{before}{name}.")


def _block(field: Mapping[str, Any], known: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The nested block that a field is, or may be."""
    for choice in (field, *field.get("anyOf", ())):
        found = known.get(str(choice.get("$ref", "")).rpartition("/")[2], {})
        if "properties" in found:
            return found
    return None


def _plain(value: Any, known: Mapping[str, Any]) -> Any:
    """A JSON Schema without references: a nested block is a `block`."""
    if isinstance(value, list):
        return [_plain(one, known) for one in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        found = known[value["$ref"].rpartition("/")[2]]
        return {"type": "block"} if "properties" in found else _plain(found, known)
    return {key: _plain(one, known) for key, one in value.items()}


# --- stages -----------------------------------------------------------------------------------------------------------


def page_of(verb: str, method: str) -> str:
    return f"{verb}-{method}.md"


def stages() -> dict[str, str]:
    """A page for each method, and one that lists them."""
    made = {"stages/index.md": _stage_index()}
    for verb in VERBS:
        for method in dict.fromkeys(entry.method for entry in OURS if entry.verb == verb):
            found = [entry for entry in OURS if (entry.verb, entry.method) == (verb, method)]
            made[f"stages/{page_of(verb, method)}"] = _stage(verb, method, found)
    return made


def _stage_index() -> str:
    parts = [
        "# Stages",
        "Each stage of a recipe turns one artifact into the next. `optimize stages` lists those that are installed, "
        "also [your own](../stages-plugin.md).",
    ]
    for verb in VERBS:
        rows = [
            (
                f"[`{verb}: {entry.method}`]({page_of(verb, entry.method)})"
                + (f" ({entry.backend})" * bool(entry.backend)),
                ", ".join(entry.takes),
                entry.gives,
                prose(entry.summary),
            )
            for entry in OURS
            if entry.verb == verb
        ]
        parts += [
            f"## {verb}",
            f"`{verb}` {VERB_WORDS[verb]}.",
            table(("stage", "takes", "gives", "what it does"), rows),
        ]
    parts += [
        "## What works with what",
        "For each task and format, the ways to quantise that are tested; `optimize validate` says why a stage refuses "
        "a task.",
        support.table(),
    ]
    return "\n\n".join(parts) + "\n"


def _stage(verb: str, method: str, found: list[Entry]) -> str:
    modules = list(dict.fromkeys(entry.module for entry in found))
    parts = [f"# {verb}: {method}"]
    if len(modules) > 1:
        parts.append("Several back ends serve it: the input's format chooses, or `backend` where more than one could.")
        rows = [
            (code(entry.backend or ""), ", ".join(entry.takes), entry.gives, prose(entry.summary)) for entry in found
        ]
        parts.append(table(("`backend`", "takes", "gives", "what it does"), rows))
    for module in modules:
        served = [entry for entry in found if entry.module == module]
        parts += _method(served, level=3 if len(modules) > 1 else 2)
    parts += [f"{'#' * 2} Recipes that use it", _users(verb, method)]
    return "\n\n".join(parts) + "\n"


def _method(served: list[Entry], level: int) -> Iterator[str]:
    """What one module is: its documentation, facts, settings and refusals."""
    entry, mark = served[0], "#" * level
    module = entry.load()
    takes = list(dict.fromkeys(format for one in served for format in one.takes))
    if level == 3:
        yield f"## {f'backend: {entry.backend}' if entry.backend else 'Without backend'}, from {' or '.join(takes)}"
    yield documentation(module.__doc__ or "")
    extra = f'`pip install "optimize-workbench[{entry.extra}]"`' if entry.extra else "nothing more"
    options = [f"`{name}` needs `optimize-workbench[{one[1]}]`" for name, one in entry.options.items()]
    facts = {
        "takes": ", ".join(f"`{format}`" for format in takes),
        "gives": ", ".join(f"`{format}`" for format in dict.fromkeys(one.gives for one in served)),
        "tasks": ", ".join(task for task in tasks.TASKS if any(task in _tasks(one) for one in served)),
        "rows it reads": ", ".join(f"`{split}`" for split in entry.splits) or "none",
        "to install": "; ".join([extra, *options]),
        "code": f"`{entry.module.replace('.', '/')}.py`, version {module.VERSION}",
        "sources": ", ".join(_sources(module.__doc__ or "")),
    }
    yield f"{mark} At a glance"
    yield "\n".join(f"- **{name}**: {said}" for name, said in facts.items() if said)
    yield f"{mark} Settings"
    yield "Besides `name`, `from` and `backend`, which every stage has:"
    yield fields(module.Config)
    refused = list(_refusals(served, inspect.getdoc(module.run) or ""))
    if refused:
        yield f"{mark} What it refuses"
        yield "\n".join(f"- {one}" for one in refused)


def _tasks(entry: Entry) -> set[str]:
    """Tasks whose models it takes, in some setting."""
    if entry.verb in ("export", "quantize"):
        return {cell.task for task in tasks.TASKS for cell in support.cells(task) if cell.entry is entry}
    return {task for task in tasks.TASKS if task not in entry.refuses and set(support.sources(task)) & set(entry.takes)}


def _sources(text: str) -> Iterator[str]:
    for url in dict.fromkeys(re.findall(r"https://[^\s),;]+", text)):
        paper = re.fullmatch(r"https://arxiv\.org/abs/(.+)", url)
        yield f"[arXiv:{paper[1]}]({url})" if paper else f"<{url}>"


def _refusals(served: list[Entry], run: str) -> Iterator[str]:
    """By the registry, when a recipe is validated; and by `run`, as its docstring has it."""
    reasons: dict[str, list[str]] = {}
    for entry in served:
        for refused, reason in entry.refuses.items():
            task, _, setting = refused.partition(" ")
            reasons.setdefault(reason, []).append(f"`{task}`" + (f" with `{setting}`" if setting else ""))
        for setting, formats in entry.only.items():
            reasons.setdefault(f"only {' and '.join(formats)} has it", []).append(f"`{setting}`")
    for reason, what in reasons.items():
        yield f"{', '.join(dict.fromkeys(what))}: {prose(reason)}."
    for paragraph in re.split(r"\n\s*\n", run):
        if paragraph.startswith("Raises"):
            yield f"When it runs: {prose(paragraph)}"


def _users(verb: str, method: str) -> str:
    using = [path.stem for path in sorted(RECIPES.glob("*.yaml")) if (verb, method) in _used(path)]
    return ", ".join(f"[{name}](../examples/{name}.md)" for name in using) + "."


def stage_blocks(written: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(verb, method, the rest) of each stage."""
    for block in written["stages"]:
        (verb,) = (key for key in block if key in VERBS)
        yield verb, block[verb], {key: value for key, value in block.items() if key != verb}


def _used(path: Path) -> set[tuple[str, str]]:
    return {(verb, method) for verb, method, _ in stage_blocks(read(path).value)}
