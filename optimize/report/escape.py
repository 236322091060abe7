"""Text from recipes, models and data, made harmless for the place where it is shown.

What a terminal shows passes through `optimize.commands.reporting.plain`, HTML through `html.escape`; here is the rest.
"""

from __future__ import annotations

import re
import unicodedata

LONGEST = 400
"""Characters of one piece of text; a label may be as long as a book."""

_SPLIT = "\N{ZERO WIDTH SPACE}"
_ILLEGAL_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MARKUP = re.compile(r"[\\`*\[\]<>#|~@&$!^{}\"]|(?<![^\W_])_|_(?![^\W_])")
_REFERENCES = re.compile(
    r"""(?<=[@\#!$~%&^]) (?=\S)      # @name, #12, !12, $12, ~label, %milestone, &epic
      | (?<=:) (?=//)                # https://...
      | (?<=:) (?=[\w+-]+:)          # :emoji:
      | (?<=www) (?=\.)
      | (?<=\bGH) (?=-\d)""",
    re.VERBOSE | re.IGNORECASE,
)


def one_line(text: object, longest: int = LONGEST) -> str:
    """One line without anything that commands a terminal or turns the direction of writing, and no longer than that."""
    line = str(text)[: 4 * longest]
    if not line.isprintable():
        line = "".join(map(_shown, line))
    return line if len(line) <= longest else line[: longest - 4] + " ..."


def _shown(character: str) -> str:
    category = unicodedata.category(character)
    if category in ("Zs", "Zl", "Zp") or character in "\t\n\r\v\f":
        return " "
    return "\N{REPLACEMENT CHARACTER}" if category[0] == "C" else character


def markdown(text: object, longest: int = LONGEST) -> str:
    """Prose for Markdown and for HTML inside of it, of which nothing is markup, a link, a mention or a reference.

    Characters with a meaning become character references, which stand for themselves wherever they are: in a table, in
    an HTML block, in a heading. Hosts look for `@name` and `#12` after that, in the text as it is shown, so a space
    without width parts them. Never the first thing of a line.
    """
    parted = _REFERENCES.sub(_SPLIT, one_line(text, longest))
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", parted)


def code(text: object, longest: int = LONGEST) -> str:
    """A name, digest or command as code, in which hosts look for nothing. Also in a table."""
    line = one_line(text, longest).strip()
    if not line or any(character in line for character in "`|<>"):
        return f"<code>{markdown(line, longest)}</code>"
    return f"`{line}`"


def xml(text: object) -> str:
    """Without the characters that no XML document can hold, in whatever way they are written."""
    return _ILLEGAL_XML.sub("", str(text))


def command(level: str, message: str, **properties: object) -> str:
    """One of GitHub's workflow commands: `::error file=recipe.yaml,line=3::not met`. None leaves a property out.

    https://docs.github.com/actions/reference/workflow-commands-for-github-actions
    """
    named = ",".join(
        f"{name}={one_line(value).replace('%', '%25').replace(':', '%3A').replace(',', '%2C')}"
        for name, value in properties.items()
        if value is not None
    )
    return f"::{level}{' ' if named else ''}{named}::{one_line(message, 2_000).replace('%', '%25')}"
