"""mkdocs' hook: pages that are read off the code and the repository's own texts, made while the site is built."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import notebook_pages
import pages
import recipe_pages
import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
TEXTS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.md",
}
"""Files of the repository's root -> the pages that show them."""


@cache
def generated() -> dict[str, str]:
    """Every page that is not written by hand: its path -> Markdown."""
    made = {page: (ROOT / text).read_text(encoding="utf-8") for text, page in TEXTS.items()}
    made["license.md"] = f"# Licence\n\n```text\n{made['license.md'].strip()}\n```\n"
    return {
        **{page: at_home(text, "") for page, text in made.items()},
        **pages.stages(),
        **recipe_pages.examples(),
        **{page: at_home(text, "notebooks/") for page, text in notebook_pages.notebooks(ROOT / "notebooks").items()},
        "recipe-keys.md": recipe_pages.recipe_keys(),
        "commands.md": reference.commands(),
        "python.md": reference.python(),
    }


def at_home(text: str, folder: str) -> str:
    """Links and pictures of a text in `folder` of the repository (`""`: its root; `docs/`), as the site has them."""

    def moved(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, mark, anchor = target.partition("#")
        place = (ROOT / folder / path).resolve().relative_to(ROOT).as_posix()
        if recipe := re.fullmatch(r"recipes/(.+)\.yaml", place):
            place = f"docs/examples/{recipe[1]}.md"
        if notebook := re.fullmatch(r"notebooks/(.+)\.ipynb", place):
            place = f"docs/notebooks/{notebook[1]}.md"
        place = TEXTS.get(place, place).removeprefix("docs/")
        return f"{before}{place}{mark}{anchor}{after}"

    return re.sub(r'(\]\(|(?:src|srcset|href)=")([^)"\s]+)(\)|")', moved, text)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put into the navigation what is made here, and every page of `docs/` that has no other place."""
    nav: dict[str, list[Any]] = {
        title: part for one in config.nav if isinstance(one, dict) for title, part in one.items()
    }
    named = {page for part in nav.values() for page in (part if isinstance(part, list) else [part])}
    nav["Guides"] += sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in named)
    made = generated()
    for title, folder in {"Stages": "stages/", "Recipes": "examples/", "Guides": "notebooks/"}.items():
        nav[title] += [page for page in made if page.startswith(folder) and page not in nav[title]]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, text in generated().items():
        files.append(File.generated(config, page, content=text))
    return files


def linked(markdown: str) -> str:
    """A page at the top of the site, with every `verb: method` and `recipes/NAME.yaml` a link to its page."""
    known = {
        f"{entry.verb}: {entry.method}": f"stages/{pages.page_of(entry.verb, entry.method)}" for entry in pages.OURS
    }
    known |= {f"recipes/{path.name}": f"examples/{path.stem}.md" for path in pages.RECIPES.glob("*.yaml")}

    def link(match: re.Match[str]) -> str:
        target = known.get(match[1])
        return f"[{match[0]}]({target})" if target else match[0]

    fenced = re.split(r"(^```.*?^```$|^#.*?$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        part if part.startswith(("```", "#")) else re.sub(r"(?<!\[)`([^`\n]+)`(?!\])", link, part) for part in fenced
    )


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of hand-written pages that lead out of `docs/`, such as `../recipes/quickstart.yaml`, and to stages."""
    if page.file.generated_by is None:
        markdown = at_home(markdown, "docs/")
    return linked(markdown) if page.file.generated_by is None or page.file.src_uri in TEXTS.values() else markdown
