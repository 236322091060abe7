"""The documentation says what is so: the site builds without a warning, links lead somewhere, examples are valid."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from pydantic import Field

from optimize import recipe, stages
from optimize.config import Block

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
OURS = [entry for entry in stages.entries() if entry.module.startswith("optimize.")]
SEE = "(?:recipes|benchmarks|docs|optimize|tests|notebooks)/"


def blocks(language: str) -> list[Any]:
    """Every fenced block of that language in the pages, by page and number."""
    return [
        pytest.param(found[2], page, id=f"{page.name}-{number}")
        for page in PAGES
        for number, found in enumerate(fences(page.read_text(encoding="utf-8")))
        if found[1] == language
    ]


def fences(text: str) -> Iterator[re.Match[str]]:
    return re.finditer(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def generators() -> Iterator[tuple[ModuleType, ModuleType]]:
    """docs/pages.py and docs/reference.py, as mkdocs' hook imports them."""
    sys.path.insert(0, str(DOCS))
    try:
        yield importlib.import_module("pages"), importlib.import_module("reference")
    finally:
        sys.path.remove(str(DOCS))
        for name in ("pages", "reference", "pictures", "notebook_pages"):
            sys.modules.pop(name, None)


# --- the site ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page of the site refers to, and what can be referred to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attributes if value}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("img", "script", "iframe") and "src" in given:
            self.fetched.append(given["src"])
        elif tag == "source" and "srcset" in given:
            self.fetched.append(given["srcset"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.fetched.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("material") is None or find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs-material is not installed: pip install 'optimize-workbench[docs]'")
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "NO_MKDOCS_2_WARNING": "1"}
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder


def test_the_site_has_no_broken_link_and_fetches_nothing(site: Path) -> None:
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            scheme, _, target, _, anchor = urlsplit(link)
            if scheme in ("http", "https", "mailto"):
                continue
            found = (path.parent / unquote(target)).resolve() if target else path
            known = found.is_file() and (not anchor or found not in pages or unquote(anchor) in pages[found].anchors)
            if not known:
                broken.append(f"{path.relative_to(site)}: {link}")
        for link in page.fetched:
            if link.startswith("data:"):
                continue
            if urlsplit(link).netloc or not (path.parent / unquote(urlsplit(link).path)).is_file():
                broken.append(f"{path.relative_to(site)} fetches {link}")
    assert not broken
    assert len(pages) > 40


def test_every_stage_recipe_verb_and_name_has_its_place(site: Path) -> None:
    for method in {(entry.verb, entry.method) for entry in OURS}:
        assert (site / "stages" / f"{'-'.join(method)}.html").is_file()
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert (site / "examples" / f"{path.stem}.html").is_file()
    import optimize

    api = Page((site / "python.html").read_text(encoding="utf-8")).anchors
    for name in optimize.__all__:
        assert any(anchor == f"optimize.{name}" or anchor.endswith(f".{name}") for anchor in api), name


# --- pages made from the code -----------------------------------------------------------------------------------------


def test_a_stage_page_says_all_that_there_is(generators: tuple[ModuleType, ModuleType]) -> None:
    made = generators[0].stages()
    for entry in OURS:
        page = made[f"stages/{entry.verb}-{entry.method}.md"]
        for name, field in entry.load().Config.model_fields.items():
            assert f"| `{name}` |" in page
            assert generators[0].prose(field.description or "?") in page
        for reason in entry.refuses.values():
            assert generators[0].prose(reason) in page
        assert "```yaml\nstages:" in page
        assert "](../examples/" in page
        if entry.extra:
            assert f"optimize-workbench[{entry.extra}]" in page


def test_a_field_without_a_description_stops_the_build(generators: tuple[ModuleType, ModuleType]) -> None:
    class Inner(Block):
        """A nested block."""

        told: int = 1
        """Said."""
        untold: int = 2

    class Config(Block):
        """A method's."""

        inner: Inner = Inner()
        """Said."""

    with pytest.raises(ValueError, match=r"`inner\.untold` has no description"):
        generators[0].fields(Config)


def test_types_bounds_and_nested_blocks_are_told(generators: tuple[ModuleType, ModuleType]) -> None:
    class Inner(Block):
        """A nested block."""

        share: float = Field(0.5, gt=0, lt=1)
        """Less than `a | b`."""

    class Config(Block):
        """A method's."""

        inner: Inner | None = None
        """Perhaps <b>."""
        needed: int = Field(ge=1)
        """More."""

    rows = generators[0].fields(Config).splitlines()[2:]
    assert rows == [
        r"| `inner` | block \| null | `null` | Perhaps &lt;b>. |",
        "| `inner.share` | number > 0, &lt; 1 | `0.5` | Less than `a | b`. |",
        "| `needed` | integer >= 1 | required | More. |",
    ]


def test_the_page_of_commands_has_every_option(generators: tuple[ModuleType, ModuleType]) -> None:
    page = generators[1].commands()
    assert "## optimize store gc" in page
    assert "| `--set PATH=VALUE` |" in page
    assert "| `--promote`, `--no-promote` |" in page
    assert "the variable OPTIMIZE_WORK" in page


def test_the_page_about_run_json_names_every_key() -> None:
    from optimize.run import new_document

    page = (DOCS / "run-json.md").read_text(encoding="utf-8")
    missing = [key for key in new_document(recipe.load(QUICKSTART)) if f"`{key}`" not in page]
    assert not missing


def test_a_notebook_becomes_a_page(tmp_path: Path, generators: tuple[ModuleType, ModuleType]) -> None:
    def output(**data: str) -> dict[str, Any]:
        return {"output_type": "execute_result", "data": {key.replace("_", "/", 1): data[key] for key in data}}

    cells = [
        {"cell_type": "markdown", "source": ["# One\n", "\n", "Text."]},
        {
            "cell_type": "code",
            "source": "run",
            "outputs": [
                {"output_type": "stream", "name": "stdout", "text": "said ``` so\n"},
                output(text_html="<table>\n\n<tr></tr></table>", text_plain="a table"),
                output(text_html="<script>1</script>", text_plain="1"),
                output(image_png="iVBO\n", text_plain="<Figure>"),
            ],
        },
    ]
    (tmp_path / "01-one.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    (page,) = importlib.import_module("notebook_pages").notebooks(tmp_path).values()
    assert page == (
        "# One\n\nText.\n\n```python\nrun\n```\n\n````text\nsaid ``` so\n````\n\n"
        '<div class="output"><table>\n<tr></tr></table></div>\n\n```text\n1\n```\n\n'
        '<img alt=" Figure " src="data:image/png;base64,iVBO">\n'
    )


# --- pictures ---------------------------------------------------------------------------------------------------------

DOCUMENT: dict[str, Any] = {
    "recipe": "minilm-sentiment",
    "verdict": None,
    "error": None,
    "baseline": "sha256:1",
    "artifacts": [
        {
            "digest": "sha256:1",
            "name": "<script>\x1b[31m",
            "size_bytes": 91_000_000,
            "scores": {"accuracy": {"value": 0.8125, "ci": [0.8, 0.82], "n": 2560}},
        }
    ],
    "comparisons": [],
    "gates": [],
}


def test_the_picture_of_a_terminal_is_drawn_from_run_json(generators: tuple[ModuleType, ModuleType]) -> None:
    from xml.etree import ElementTree

    pictures = importlib.import_module("pictures")
    drawn = {theme: pictures.terminal(DOCUMENT, theme) for theme in ("light", "dark")}
    assert drawn["light"] != drawn["dark"]
    for theme, svg in drawn.items():
        told = "".join(ElementTree.fromstring(svg).itertext()).replace("\N{NO-BREAK SPACE}", " ")
        assert "$ optimize apply recipes/quickstart.yaml" in told
        assert "0.812" in told
        assert "91.0 MB" in told
        assert not re.search(r"https?://(?!www\.w3\.org|www\.textualize\.io)|@import|<script|url\(['\"]?http", svg)
        assert pictures.terminal(DOCUMENT, theme) == svg


def test_the_picture_of_a_report_is_small(tmp_path: Path, generators: tuple[ModuleType, ModuleType]) -> None:
    import io

    from PIL import Image

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium or find_spec("playwright") is None:
        pytest.skip("no Chromium, or no playwright")
    page = tmp_path / "report.html"
    page.write_text(
        "<style>body { background: white } @media (prefers-color-scheme: dark) { body { background: black } }"
        "section { height: 300px }</style><section aria-labelledby='gates'></section><section aria-labelledby='trade'>",
        encoding="utf-8",
    )
    pictures = importlib.import_module("pictures")
    for theme, colour in {"light": (255, 255, 255), "dark": (0, 0, 0)}.items():
        taken = Image.open(io.BytesIO(pictures.report(page, theme, chromium)))
        assert taken.size == (pictures.WIDTH, 400)  # as high as the window, not as both sections
        assert taken.convert("RGB").getpixel((5, 5)) == colour


# --- what the written pages say ---------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    broken = []
    for target in re.findall(r'(?:\]\(|(?:src|srcset|href)=")(?![a-z]+:)([^)"\s]+)', without_fences(text)):
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        if not found.exists():
            broken.append(target)
        elif anchor and found.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", without_fences(found.read_text(encoding="utf-8")), re.MULTILINE)
            broken += [target] * (anchor not in map(slug, headings))
    named = re.findall(rf"(?<![\w/.-]){SEE}[\w/.-]*\w", without_fences(text))
    commands = (name for found in fences(text) for name in re.findall(rf"python ({SEE}[\w/.-]*\w)", found[2]))
    broken += [name for name in (*named, *commands) if not (ROOT / name).exists()]
    recipes = re.findall(r"`(?:recipes/)?((?:minilm|smollm2|tatoeba|wikitext)-[\w-]+\.yaml)`", text)
    broken += [name for name in recipes if not (ROOT / "recipes" / name).exists()]
    assert not broken


def test_extras_that_are_named_exist() -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    known = set(re.findall(r"^(\w+) = \[", declared.partition("\n[project.")[0], re.MULTILINE))
    texts = [*PAGES, *(ROOT / "recipes").glob("*.yaml")]
    named = {
        extra
        for path in texts
        for group in re.findall(r'(?:optimize-workbench|-e "?\.)\[([\w,]+)\]', path.read_text(encoding="utf-8"))
        for extra in group.split(",")
    } | {entry.extra for entry in OURS if entry.extra}
    assert named
    assert named <= known


@pytest.mark.parametrize(("text", "page"), blocks("python"))
def test_python_in_the_pages_compiles_and_names_what_exists(text: str, page: Path) -> None:
    tree = ast.parse(text, filename=str(page))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optimize."):
            module = importlib.import_module(str(node.module))
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "optimize":
            import optimize

            assert hasattr(optimize, node.attr) or find_spec(f"optimize.{node.attr}"), node.attr


@pytest.mark.parametrize(("text", "page"), blocks("json"))
def test_json_in_the_pages_parses(text: str, page: Path) -> None:
    json.loads(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_name_verbs_and_options_that_exist(page: Path, generators: tuple[ModuleType, ModuleType]) -> None:
    from optimize.cli import app

    verbs = generators[1].verbs(app)
    text = page.read_text(encoding="utf-8")
    lines = [line for found in fences(text) if found[1] in ("sh", "bash", "console") for line in found[2].splitlines()]
    lines += re.findall(r"`([^`]+)`", without_fences(text))
    unknown = []
    for line in lines:
        for told in re.findall(r"(?:^|\bbin/|&& |\$ )optimize ([a-z<\[-][^|&#>]*)", line):
            verb, options = understood(told.replace("...", ""), verbs)
            if verb is None:
                unknown.append(line)
                continue
            functions = [verbs[verb]] if verb in verbs else []
            known = {
                name
                for function in (*functions, app.registered_callback.callback)
                for one in generators[1].parameters(function)
                for name in one.names
            } | {"--help"}
            unknown += [f"{line}: {option}" for option in options if option not in known]
    assert not unknown


def understood(told: str, verbs: dict[str, Any]) -> tuple[str | None, list[str]]:
    """(the verb, or the group of several; None where there is none such, the options) of what follows `optimize`."""
    words = [word.strip(",") for word in told.split()]
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    while words and words[0].startswith("--"):
        words.pop(0)
    if not words:
        return "", options
    inside = {name.partition(" ")[2] for name in verbs if name.startswith(f"{words[0]} ")}
    if inside:
        # `optimize store list, verify, gc` names several.
        named = [word for word in words[1:] if re.fullmatch(r"[a-z]+", word)]
        if len(named) == 1 and named[0] in inside:
            return f"{words[0]} {named[0]}", options
        return (words[0] if set(named) <= inside else None), options
    return (words[0] if words[0] in verbs else None), options


# --- recipes in the pages ---------------------------------------------------------------------------------------------


def parts() -> list[Any]:
    """Every YAML block of the pages and of the stages' docstrings. (`test_plugins.py` validates a plugin's.)"""
    found = [one for one in blocks("yaml") if not one.id.startswith("stages-plugin")]
    for module in dict.fromkeys(entry.module for entry in OURS):
        text = importlib.import_module(module).__doc__ or ""
        for number, block in enumerate(re.findall(r"(?:^    .*\n?|^\n)+", text, re.MULTILINE)):
            if re.match(r"\s*(stages:|- \w+:)", block):
                found.append(pytest.param(block, Path(f"{module}.py"), id=f"{module}-{number}"))
    return found


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return recipe.json_schema()


@pytest.mark.parametrize(("text", "page"), parts())
def test_yaml_in_the_pages_has_keys_and_values_of_the_schema(text: str, page: Path, schema: dict[str, Any]) -> None:
    """Whole recipes and parts of them; other YAML, such as a workflow of a CI host, parses."""
    from jsonschema import Draft202012Validator

    from optimize.recipe.reader import parse

    read = parse(text.encode(), page.name)
    assert not read.diagnostics
    value = read.value
    if isinstance(value, list):
        value = {"stages": value} if set(value[0]) & set(stages.VERBS) else {"steps": value}
    if not set(value) <= set(schema["properties"]):
        assert not set(value) & {"model", "evaluate", "gates"}
        return
    partly = {**schema, "required": schema["required"] if "version" in value else []}
    if "model" not in value:  # `data` is of some task
        partly["allOf"] = [{"anyOf": [one["then"] for one in schema["allOf"]]}] if "data" in value else []
    assert [error.message[:500] for error in Draft202012Validator(partly).iter_errors(value)] == []
