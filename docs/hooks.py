"""mkdocs' hook: pages that are read off the code and the repository's own texts, made while the site is built."""

from __future__ import annotations

import posixpath
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
SHOWN = {
    **{re.escape(text): page for text, page in TEXTS.items()},
    r"docs/(.+)": r"\1",
    r"recipes/(.+)\.yaml": r"examples/\1.md",
    r"notebooks/(.+)\.ipynb": r"notebooks/\1.md",
}
"""Files of the repository -> where they are in the site."""
REPOSITORY = "https://github.com/optimize-workbench/optimize"


@cache
def generated() -> dict[str, str]:
    """Every page that is not written by hand: its path -> Markdown."""
    texts = {page: (ROOT / text).read_text(encoding="utf-8") for text, page in TEXTS.items()}
    texts["license.md"] = f"# Licence\n\n```text\n{texts['license.md'].strip()}\n```\n"
    notebooks = notebook_pages.notebooks(ROOT / "notebooks")
    return {
        **{page: at_home(texts[page], source, page) for source, page in TEXTS.items()},
        **{page: at_home(text, page.replace(".md", ".ipynb"), page) for page, text in notebooks.items()},
        **pages.stages(),
        **recipe_pages.examples(),
        "recipe-keys.md": recipe_pages.recipe_keys(),
        "commands.md": reference.commands(),
        "python.md": reference.python(),
    }


def at_home(text: str, source: str, page: str) -> str:
    """A text's links and pictures as `page` of the site has them; `source` is its file in the repository."""

    def moved(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, mark, anchor = target.partition("#")
        place = (ROOT / source).parent.joinpath(path).resolve().relative_to(ROOT).as_posix()
        return f"{before}{_address(place, page)}{mark}{anchor}{after}"

    return re.sub(r'(\]\(|(?:src|srcset|href)=")([^)"\s]+)(\)|")', moved, text)


def _address(place: str, page: str) -> str:
    """Where a file of the repository is for a page: elsewhere in the site, or on the host."""
    for pattern, shown in SHOWN.items():
        if match := re.fullmatch(pattern, place):
            return posixpath.relpath(match.expand(shown), posixpath.dirname(page) or ".")
    return f"{REPOSITORY}/blob/main/{place}"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put into the navigation what is made here, and every page of `docs/` that has no other place."""
    nav: dict[str, list[Any]] = {
        title: part for one in config.nav if isinstance(one, dict) for title, part in one.items()
    }
    named = {page for part in nav.values() for page in (part if isinstance(part, list) else [part])}
    written = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
    nav["Guides"] += [page for page in written if page not in named]
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
    file = page.file
    if file.generated_by is None:
        markdown = at_home(markdown, f"docs/{file.src_uri}", file.src_uri)
    return linked(markdown) if "/" not in file.src_uri else markdown
