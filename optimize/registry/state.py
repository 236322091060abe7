"""What the audit log says: versions, aliases, and where an alias would roll back to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, time, timezone
from typing import Any

from optimize.errors import RegistryError
from optimize.registry.audit import Entry


@dataclass(frozen=True)
class Waiver:
    """Why a model without a passing verdict may be promoted all the same, and until when."""

    reason: str
    expires: str
    """An ISO date (that day still counts, in UTC) or time."""

    @property
    def ends(self) -> datetime:
        """Raises `ValueError` where `expires` is no date."""
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", self.expires):
            return datetime.combine(datetime.fromisoformat(self.expires), time.max, timezone.utc)
        moment = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", self.expires))
        return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)

    @property
    def expired(self) -> bool:
        return self.ends <= datetime.now(timezone.utc)


@dataclass(frozen=True)
class Version:
    """A digest under a name, as its last promotion left it."""

    name: str
    version: int
    digest: str
    verdict: str | None
    waiver: Waiver | None
    """Where the verdict is not "pass"."""
    run: str
    recipe_digest: str
    gates: tuple[Mapping[str, Any], ...]
    who: str
    host: str
    when: str
    aliases: tuple[str, ...] = ()
    """That point at it now."""

    @property
    def waiver_expired(self) -> bool:
        """Whether it was promoted without a passing verdict and the time allowed for that is over."""
        return self.waiver is not None and self.waiver.expired


@dataclass
class Pointer:
    """What an alias points at."""

    trail: list[int] = field(default_factory=list)
    """The versions that it would roll back through; the last is where it points."""
    ever: set[int] = field(default_factory=set)
    """Every version that it ever pointed at."""

    @property
    def version(self) -> int:
        return self.trail[-1]

    @property
    def before(self) -> int | None:
        return self.trail[-2] if len(self.trail) > 1 else None

    def move(self, version: int) -> None:
        """Go on to a version, so that rolling back leads to the present one."""
        if not self.trail or self.version != version:
            self.trail.append(version)
        self.ever.add(version)

    def move_back(self, version: int) -> None:
        """Go back to the last time it pointed at that version; to one that it was rolled back from, it goes on."""
        if version in self.trail:
            while self.version != version:
                self.trail.pop()
        else:
            self.move(version)


@dataclass
class State:
    """The sum of the entries so far."""

    versions: dict[str, dict[int, Version]] = field(default_factory=dict)
    """Name -> number -> version."""
    aliases: dict[tuple[str, str], Pointer] = field(default_factory=dict)
    """(name, alias) -> where it points."""

    def version(self, name: str, number: int) -> Version:
        """With its aliases. Raises `KeyError` where there is none."""
        pointing = [alias for (of, alias), pointer in self.aliases.items() if (of, pointer.version) == (name, number)]
        return replace(self.versions[name][number], aliases=tuple(sorted(pointing)))

    def list(self, name: str | None = None) -> Sequence[Version]:
        """Versions of that name, or of all, by name and number."""
        return [
            self.version(of, number)
            for of in sorted(self.versions)
            if name in (None, of)
            for number in sorted(self.versions[of])
        ]


def fold(entries: Sequence[Entry]) -> State:
    """The state after these entries. Raises `RegistryError` at one that makes no sense."""
    state = State()
    for entry in entries:
        try:
            _apply(state, entry)
        except (KeyError, TypeError, ValueError) as error:
            raise RegistryError(f"entry {entry['number']} of the audit log makes no sense: {error!r}") from error
    return state


def _apply(state: State, entry: Entry) -> None:
    name, number = entry["name"], entry["version"]
    pointer = state.aliases.setdefault((name, entry["alias"]), Pointer())
    if entry["action"] == "promote":
        facts = {key: entry[key] for key in ("digest", "verdict", "run", "recipe_digest", "who", "host", "when")}
        waiver = Waiver(**entry["waiver"]) if entry["waiver"] else None
        version = Version(name=name, version=number, waiver=waiver, gates=tuple(entry["gates"]), **facts)
        state.versions.setdefault(name, {})[number] = version
        pointer.move(number)
    elif entry["action"] == "rollback":
        pointer.move_back(number)
    else:
        raise ValueError(f"unknown action {entry['action']!r}")
