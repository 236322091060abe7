"""Recipes that are broken on purpose: refused with a message, never a crash, a hang or a surprise."""

from __future__ import annotations

import random
import string
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from optimize.errors import RecipeError
from optimize.recipe import Recipe, load, reader
from optimize.recipe.diagnostics import FORMATS, render
from optimize.recipe.text import MAX_DEPTH, MAX_VALUES

QUICKSTART = (Path(__file__).parents[2] / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")


@pytest.fixture
def mapping() -> dict[str, Any]:
    """The quickstart as Python has it."""
    value = reader.parse(QUICKSTART.encode(), "").value
    assert isinstance(value, dict)
    return value


def refusal(folder: Path, raw: str | bytes) -> str:
    """All that `load` has to say, in a moment."""
    path = folder / "recipe.yaml"
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass"))
    start = time.perf_counter()
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert time.perf_counter() - start < 5
    return render(caught.value.diagnostics, "concise")


@pytest.mark.parametrize(
    "text",
    [
        "name: !!python/object/apply:os.system ['touch owned']",
        "name: !!str x",
        "name: !custom x",
        "! name: x",
        "!!map {name: x}",
        "stages: !!python/tuple [1]",
        "%TAG ! tag:example.com,2000:\n---\nname: !x y",
        "name: ! x",
    ],
)
def test_tags_are_refused(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = refusal(tmp_path, text)
    assert "YAML tags" in said or "a key must be a string" in said
    assert not (tmp_path / "owned").exists()


def test_an_alias_bomb_is_refused(tmp_path: Path) -> None:
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20)]
    assert "aliases expand to more than" in refusal(tmp_path, "a0: &a0 [x, x]\n" + "\n".join(levels))


def test_a_deep_alias_chain_is_refused(tmp_path: Path) -> None:
    levels = [f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 2000)]
    assert "aliases expand to" in refusal(tmp_path, "a0: &a0 [x]\n" + "\n".join(levels))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", "the alias `*a` holds itself"),
        ("a: &a {b: {c: *a}}", "the alias `*a` holds itself"),
        ("a: *b", "the alias `*b` has no anchor before it"),
    ],
)
def test_aliases_must_end(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path, text)


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
@pytest.mark.parametrize("depth", [MAX_DEPTH + 2, 5_000, 100_000])
def test_deep_nesting_is_refused(tmp_path: Path, opening: str, depth: int) -> None:
    said = refusal(tmp_path, opening * depth)
    assert "nested more than" in said or "not YAML" in said


def test_depth_of_lines_is_refused(tmp_path: Path) -> None:
    assert "nested more than" in refusal(tmp_path, "\n".join(" " * i + "a:" for i in range(200)))


@pytest.mark.parametrize(
    ("size", "message"),
    [(2 << 20, "too large"), ((1 << 20) + 1, "too large"), (1 << 20, "the key `version` is missing")],
)
def test_size_is_bounded(tmp_path: Path, size: int, message: str) -> None:
    start = "name: x\n#"
    assert message in refusal(tmp_path, start + "x" * (size - len(start)))


@pytest.mark.parametrize("text", ["a: [" + "1," * 500_000 + "]", "".join(f"k{i}:\n" for i in range(100_000))])
def test_the_number_of_values_is_bounded(tmp_path: Path, text: str) -> None:
    assert f"at most {MAX_VALUES:,} values" in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"k{i}:\n" for i in range(9_900)),
        "stages:\n" + "  - export: onnx\n" * 6_000,
        "stages:\n  - export: onnx\n" + "".join(f"    k{i}:\n" for i in range(9_900)),
        "gates:\n" + "  - {metric: x}\n" * 5_000,
        "model: {task: text-classification}\nevaluate: {metrics: [" + "x, " * 19_000 + "]}",
        "data: {filter: {" + "".join(f"k{i}: {{}}, " for i in range(9_000)) + "}}\nmodel: {task: text-classification}",
        "".join(f"k{i}: !!str\n" for i in range(9_900)),
        "k:\n" * 9_900,
    ],
)
def test_many_mistakes_take_no_long_time(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path, text)


def test_duplicate_keys_are_refused_where_the_second_stands(tmp_path: Path) -> None:
    said = refusal(tmp_path, QUICKSTART + "\nname: other\n")
    line = QUICKSTART.count("\n") + 2
    assert f"recipe.yaml:{line}:1: the key `name` is here twice [name] (the first is on line " in said
    for text in ("a: {b: 1, b: 1}", "a: {b: 1, 'b': 1}", 'a: {b: 1, "\\x62": 1}'):
        assert "the key `b` is here twice" in refusal(tmp_path, text)


@pytest.mark.parametrize("key", ["1", "null", "true", "1.5", "[a]", "{a: b}", "? [a]\n", "~"])
def test_keys_are_strings(tmp_path: Path, key: str) -> None:
    assert "a key must be a string" in refusal(tmp_path, f"{key}: x")


def test_keys_of_other_yamls_are_strings_here(tmp_path: Path) -> None:
    for key in ("on", "off", "yes", "no", "y", "<<", "2020-01-01", "1e", "0b1", "1_000", "="):
        assert f"unknown key `{key}`" in refusal(tmp_path, f"{key}: x")


@pytest.mark.parametrize(
    "number", [".inf", "-.INF", ".nan", "1e999", "-1e999", "1" + "0" * 30, "9" * 5000, "0x" + "f" * 5000, "9" * 4400]
)
def test_numbers_are_finite(tmp_path: Path, number: str) -> None:
    said = refusal(tmp_path, QUICKSTART.replace("epochs: 1\n", f"epochs: {number}\n"))
    assert said.count("\n") == 0
    assert "number must" in said
    assert "[stages[0].epochs]" in said


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"name: \xff\xfe", "not UTF-8"),
        (QUICKSTART.encode("utf-16"), "not UTF-8"),
        (b"name: \xed\xa0\x80", "not UTF-8"),
        (b"version: 1\nname: a\x00b", "U+0000"),
        (b"name: '\x1b[2J'", "U+001B"),
        ("name: \x9b31m".encode(), "U+009B"),
        (b'name: "\\ud800"', ""),
        (b'name: "\\U00110000"', ""),
        (b"a: 1\n---\nb: 1", "second YAML document"),
        (b"a: 1\n...\n---\n", "second YAML document"),
        (b"", "a recipe is a mapping"),
        (b"# nothing", "a recipe is a mapping"),
        (b"- a", "a recipe is a mapping"),
        (b"just words", "a recipe is a mapping"),
        (b"a: [", "not YAML"),
        (b"a: b: c", "not YAML"),
        (b"\tname: x", "not YAML"),
        (b"name: 'x", "not YAML"),
        (b"@name: x", "not YAML"),
    ],
)
def test_broken_text_is_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    said = refusal(tmp_path, raw)
    assert message in said
    assert said.startswith(str(tmp_path / "recipe.yaml") + ":")


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + QUICKSTART.replace("\n", "\r\n").encode())
    assert load(path).name == "minilm-sentiment"
    path.write_bytes(QUICKSTART.replace("epochs: 1\n", "epoch: 1\n").replace("\n", "\r\n").encode())
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert caught.value.diagnostics[0].source_line == "    epoch: 1"


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../x",
            "a/b",
            "a\\b",
            "..",
            ".",
            ".hidden",
            "a..b",
            "-x",
            "_x",
            "",
            " ",
            "x y",
            "x" * 65,
            "ä",
            "a\x1b",
            "a\n",
        ),
        *("\u202ea", "x:y", "~", "a%2fb"),
    ],
)
@pytest.mark.parametrize("place", ["recipe", "stage", "alias"])
def test_names_are_safe_in_a_path(tmp_path: Path, name: str, place: str, mapping: dict[str, Any]) -> None:
    if place == "recipe":
        mapping["name"] = name
    elif place == "stage":
        mapping["stages"][2]["name"] = name
    else:
        mapping["promote"] = {"alias": name}
    with pytest.raises(RecipeError) as caught:
        load(mapping)
    for format in FORMATS:
        assert "\x1b" not in render(caught.value.diagnostics, format)


@pytest.mark.parametrize("key", ["../../x", "\x1b[31m", "a" * 100_000, "%0A::warning::x", "\ud800"])
def test_what_is_quoted_is_harmless(key: str, mapping: dict[str, Any]) -> None:
    mapping[key] = mapping["stages"][0][key] = mapping["model"]["task"] = key
    with pytest.raises(RecipeError) as caught:
        load(mapping)
    for format in FORMATS:
        shown = render(caught.value.diagnostics, format)
        shown.encode("utf-8")
        assert "\x1b" not in shown
        assert len(shown) < 20_000
    github = render(caught.value.diagnostics, "github").splitlines()
    assert all(line.startswith("::error") and "%0A::" not in line.replace("%250A", "") for line in github)


def test_a_mapping_that_holds_itself(mapping: dict[str, Any]) -> None:
    mapping["data"]["filter"] = mapping
    with pytest.raises(RecipeError, match="nested at most"):
        load(mapping)


# 2,000 mangled recipes

WORDS = [
    *("null", "true", "-1", "0", "1e-4", "1e400", ".nan", "''", "[]", "{}", "[[]]", "{a: b}", "source", "../x", "on"),
    *(
        "accuracy",
        "latency",
        "size",
        "onnx",
        "int8",
        "teacher",
        "wheel://",
        "wheel://x==1/../y",
        "!!str x",
        "&a x",
        "*a",
    ),
    *(
        "\u202e",
        "名前",
        "\U0001f600",
        "'\ud7ff'",
        "e\u0301",
        "\x85",
        "\u2028",
        "a\tb",
        "x" * 3000,
        "9" * 400,
        "0x10",
        "~",
    ),
]


def mangle_lines(rng: random.Random, text: str) -> str:
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(6)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, lines[rng.randrange(len(lines))])
    elif kind == 2:
        lines[at] = " " * rng.randrange(6) + lines[at].lstrip()
    elif kind == 3:
        lines[at] = lines[at].partition(":")[0] + ": " + rng.choice(WORDS)
    elif kind == 4:
        lines[at] = rng.choice(WORDS) + ":" + lines[at].partition(":")[2]
    else:
        other = rng.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    return "\n".join(lines)


def mangle_characters(rng: random.Random, text: str) -> str:
    characters = list(text)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(characters))
        characters[at] = rng.choice(
            ["", *string.printable, "\0", "\x1b", "\u202e", "\ufeff", "é", "[" * 50, "{a: " * 50]
        )
    return "".join(characters)


def mangle_values(rng: random.Random, text: str) -> str:
    """Delete, replace, rename or swap something in the tree."""
    tree = yaml.safe_load(text)
    holders: list[Any] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict | list) and node:
            holders.append(node)
            for child in node.values() if isinstance(node, dict) else node:
                walk(child)

    walk(tree)
    for _ in range(rng.randint(1, 2)):
        holder, other = rng.choice(holders), rng.choice(holders)
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        others = list(other) if isinstance(other, dict) else list(range(len(other)))
        if not keys or not others:
            continue
        key, kind = rng.choice(keys), rng.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            holder[key] = rng.choice(
                [None, True, -1, 0, 1.5, 10**25, "", "x", [], {}, [1], {"a": 1}, [[[]]], "1e-4", "on"]
            )
        elif kind == 2 and isinstance(holder, dict):
            holder[rng.choice(["", "x", "on", "form", key + "s", key[:-1], key.upper()])] = holder.pop(key)
        elif kind == 3:
            holder[key] = yaml.safe_load(yaml.safe_dump(other[rng.choice(others)]))
        elif isinstance(holder, list):
            holder.append(yaml.safe_load(yaml.safe_dump(holder[key])))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=rng.random() < 0.5)


def mangle_bytes(rng: random.Random, text: str) -> bytes:
    raw = bytearray(text.encode())
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(raw))
        if rng.random() < 0.5:
            raw[at] = rng.randrange(256)
        else:
            raw[at:at] = rng.randbytes(rng.randint(1, 8))
    return bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.2 else raw)


def check_mistakes(error: RecipeError, file: str, mangled: str | bytes) -> None:
    assert error.exit_code == 2
    assert error.diagnostics, mangled
    for item in error.diagnostics:
        assert item.message, mangled
        assert item.file == file
        assert min(item.line, item.column) >= 1, (mangled, item)
    for format in FORMATS:
        shown = render(error.diagnostics, format)
        assert all(character.isprintable() or character == "\n" for character in shown), mangled


def test_two_thousand_mangled_recipes(tmp_path: Path) -> None:
    """Each is a recipe, or mistakes with a message and a place; nothing else ever comes out."""
    rng = random.Random(20)
    bare = "\n".join(line.partition(" #")[0] for line in QUICKSTART.split("\n") if not line.lstrip().startswith("#"))
    path = tmp_path / "recipe.yaml"
    refused = 0
    for turn in range(2000):
        mangle = (mangle_lines, mangle_characters, mangle_values, mangle_bytes)[turn % 4]
        mangled = mangle(rng, bare)
        path.write_bytes(mangled if isinstance(mangled, bytes) else mangled.encode("utf-8", "surrogatepass"))
        try:
            recipe = load(path)
        except RecipeError as error:
            refused += 1
            check_mistakes(error, str(path), mangled)
        else:
            assert isinstance(recipe, Recipe)
            assert load(recipe.document(), base=recipe.base).digest == recipe.digest, mangled
    assert refused > 1200, f"only {refused} of 2,000 were refused: the mangling is too gentle"


def test_the_slow_parser_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyYAML comes without its C part."""
    fast = reader.parse(QUICKSTART.encode(), "f")
    monkeypatch.setattr(reader, "_LOADER", yaml.SafeLoader)
    slow = reader.parse(QUICKSTART.encode(), "f")
    assert (slow.value, slow.places, slow.key_places) == (fast.value, fast.places, fast.key_places)
    assert not fast.diagnostics
    for text in ("[" * 100_000, "name: !x y", 'a: "\\ud800"', 'a: "\\U00110000"', "a: [", "a: &a [*a]"):
        assert refusal(tmp_path, text)
