"""Passwords and tokens of addresses, kept out of messages, logs and files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import unquote

HIDDEN = "***"
_USER = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>[^\s/?#]*)@")
_UP_TO_AT = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^\s'\"]*@")
"""A password that was not quoted as it should be may hold a slash."""
_QUERY = re.compile(
    r"(?P<key>[?&;](?:[\w.-]*(?:password|passwd|pwd|token|secret|key|sig|signature)))=[^&;\s'\"]*", re.I
)


def masked(text: object, *addresses: str | None, secrets: Iterable[str] = ()) -> str:
    """The text with what stands before the `@` of a URL, and secrets in its query, hidden.

    `secrets` and those of `addresses` are hidden wherever they stand, also where a library took the URL apart.
    """
    said = str(text)
    found = {*secrets, *(secret for address in addresses if address for secret in _secrets(address))}
    for secret in sorted(found, key=len, reverse=True):
        if len(secret) > 2:  # fewer letters stand in many a word
            said = said.replace(secret, HIDDEN)
    said = _UP_TO_AT.sub(rf"\g<scheme>{HIDDEN}@", said)
    return _QUERY.sub(rf"\g<key>={HIDDEN}", said)


def holds_secret(address: str) -> bool:
    """Whether a password or a token stands in it. A user's name alone is no secret."""
    return bool(_secrets(address))


def _secrets(address: str) -> set[str]:
    found: set[str] = set()
    for user in _USER.finditer(address):
        name, colon, password = user["user"].partition(":")
        # `https://TOKEN@host` is how tokens are given where there is no user.
        found |= {password, unquote(password)} if colon else ({name} if len(name) >= 20 else set())
    for query in _QUERY.finditer(address):
        value = query[0].partition("=")[2]
        found |= {value, unquote(value)}
    return {secret for secret in found if secret and secret != HIDDEN}
