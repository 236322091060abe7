"""The audit log here and the one on the remote: which is ahead, and what came in between."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimize import atomic
from optimize.errors import PromotionRefused, RegistryError, RemoteError
from optimize.remote.layout import MAX_ENTRY, entry_name

if TYPE_CHECKING:
    from optimize.registry import Registry
    from optimize.remote.places import Place


REMEMBERED = "remote.json"
"""In the registry's folder, once it has met a remote."""


@dataclass(frozen=True)
class Difference:
    """Two logs that begin alike; at most one of the two goes on."""

    here: Sequence[bytes]
    """Entries of here that the remote lacks."""
    there: Sequence[bytes]
    """Entries of the remote that lack here."""
    common: int
    """How many both have."""


def compare_logs(place: Place, registry: Registry) -> Difference:
    """Raises `PromotionRefused` where both went on, and `RegistryError` where the remote's log is damaged."""
    ours = registry.log.files()
    theirs = _count(place)
    if theirs < (known := _remembered(place, registry)):
        raise RegistryError(
            f"the remote's log had {known} entries and has {theirs}: its end was cut off",
            location=place.url,
            hint=f"restore it; or, if the remote was begun anew on purpose, remove {registry.root / REMEMBERED}",
        )
    common = min(len(ours), theirs)
    if common and _entry(place, common) != ours[common - 1]:
        raise _parted(place, ours, theirs)
    there = [_entry(place, number) for number in range(common + 1, theirs + 1)]
    return Difference(ours[common:], there, common)


def remember(place: Place, registry: Registry, entries: int) -> None:
    """Note how long the log of a remote was: that its end is cut off is what a chain can't show by itself."""
    atomic.write_json(registry.root / REMEMBERED, {"url": place.url, "entries": entries})


def _remembered(place: Place, registry: Registry) -> int:
    try:
        known = json.loads((registry.root / REMEMBERED).read_bytes())
        return int(known["entries"]) if known["url"] == place.url else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def read_log(place: Place) -> list[bytes]:
    """Every entry of the remote."""
    return [_entry(place, number) for number in range(1, _count(place) + 1)]


def _count(place: Place) -> int:
    names = place.list("registry")
    numbers = sorted(int(name[:8]) for name in names if re.fullmatch(r"[0-9]{8}\.json", name))
    if numbers != list(range(1, len(numbers) + 1)):
        missing = next(number for number in range(1, len(numbers) + 2) if number not in numbers)
        raise RegistryError(f"entry {missing} of the remote's log is missing", location=place.url)
    return len(numbers)


def _entry(place: Place, number: int) -> bytes:
    data = place.read(entry_name(number), MAX_ENTRY)
    if data is None:
        raise RemoteError(f"entry {number} of the remote's log is gone", location=place.url)
    return data


def _parted(place: Place, ours: Sequence[bytes], theirs: int) -> PromotionRefused:
    """Somebody else pushed in between: say what, so that nobody's promotion is lost unseen."""
    first = next(
        number for number in range(1, theirs + 1) if number > len(ours) or _entry(place, number) != ours[number - 1]
    )
    told = "; ".join(_describe(_entry(place, number)) for number in range(first, min(theirs + 1, first + 3)))
    return PromotionRefused(
        f"the remote's registry went another way from entry {first} on: {told}",
        location=place.url,
        hint="`optimize pull --take-theirs` sets the log of here aside and takes the remote's; then promote again",
    )


def lost_race(place: Place, number: int) -> PromotionRefused:
    """Somebody else wrote the entry of that number at this moment."""
    return PromotionRefused(
        f"somebody else was faster: {_describe(_entry(place, number))}; nothing of theirs was overwritten",
        location=place.url,
        hint="`optimize pull --take-theirs`, then promote and push again",
    )


def _describe(data: bytes) -> str:
    try:
        entry = json.loads(data)
        target = f"{entry['name']}@{entry['alias']}"
        return f"{entry['who']} did {entry['action']} {target} to version {entry['version']} at {entry['when']}"[:300]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "an entry that can't be read"
