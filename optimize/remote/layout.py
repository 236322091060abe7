"""How a remote is laid out, and how what lies there is read: everything is checked, nothing is believed.

objects/ab/abcd...          a file's bytes, named after their SHA-256: weights that artifacts share travel once
artifacts/<digest>.json     a manifest; written when all its objects are there
runs/<run>/run.json         what was measured when a version was promoted, and its recipe.json
registry/00000001.json      the audit log, entry by entry; written last, each only if there is none of that number
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from optimize.artifact import Artifact
from optimize.errors import RemoteError, StoreError
from optimize.remote.places import Place
from optimize.store.records import hex_of, is_hex

MAX_MANIFEST = 64 << 20
MAX_ENTRY = 16 << 20
MAX_RUN = 64 << 20
MAX_FILES = 100_000
RUN_FILES = ("run.json", "recipe.json")
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


def object_name(sha256: str) -> str:
    return f"objects/{sha256[:2]}/{sha256}"


def manifest_name(digest: str) -> str:
    return f"artifacts/{hex_of(digest)}.json"


def entry_name(number: int) -> str:
    return f"registry/{number:08}.json"


def run_name(run: str, file: str) -> str | None:
    """None where the run's name is none that we would give: it serves as a path."""
    return f"runs/{run}/{file}" if _RUN.fullmatch(run) else None


def pulled_run(registry: Path, run: str) -> Path | None:
    """The folder for what a remote tells of a run; apart from the runs of this work folder."""
    return registry / "runs" / run if _RUN.fullmatch(run) else None


def complete(place: Place, digest: str) -> str:
    """The whole digest that starts so. Raises `RemoteError` where none or several do."""
    start = digest.removeprefix("sha256:")
    if is_hex(start):
        return f"sha256:{start}"
    if not re.fullmatch("[0-9a-f]{8,63}", start):
        raise RemoteError(f"not a digest: {digest!r}", hint="eight digits or more, or NAME@ALIAS")
    matches = [name for name in place.list("artifacts") if name.startswith(start) and name.endswith(".json")]
    if len(matches) != 1:
        raise RemoteError(f"{len(matches) or 'no'} artifacts start with {digest}", location=place.url)
    return f"sha256:{matches[0].removesuffix('.json')}"


def read_manifest(place: Place, digest: str) -> Artifact | None:
    """What a manifest on the remote describes; None where there is none. Raises `RemoteError` for a false one."""
    data = place.read(manifest_name(digest), MAX_MANIFEST)
    if data is None:
        return None
    try:
        manifest: Any = json.loads(data)
        artifact = Artifact.from_manifest(Path(), manifest)
        fault = _fault(artifact, digest)
    except StoreError as error:
        fault = error.message
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        fault = f"it can't be read ({type(error).__name__})"
    if fault:
        raise RemoteError(f"the manifest of {digest[:19]} is false: {fault}", location=place.url)
    return artifact


def _fault(artifact: Artifact, digest: str) -> str | None:
    if artifact.digest != digest:
        return "it describes something else"
    if not artifact.files:
        return "it has no files"
    if len(artifact.files) > MAX_FILES:
        return f"it has more than {MAX_FILES:,} files"
    folders = {parent for name in artifact.files for parent in _parents(name)}
    for name, entry in artifact.files.items():
        if not is_hex(entry["sha256"]) or entry["size"] < 0:
            return f"what it says of {name!a} makes no sense"
        if name in folders:
            return f"{name!a} is a file and a folder"
    return None


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts))]
