"""The artifacts of a store: one folder each, named after the digest of the manifest that lies in it."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from optimize import atomic
from optimize.artifact import Artifact, sync_tree, walk
from optimize.errors import StoreError
from optimize.store.records import hex_of, is_hex


class Shelf:
    """`<digest>/manifest.json` and `<digest>/files/` below `folder`; what is damaged is set aside in another folder."""

    def __init__(self, folder: Path, damaged: Path) -> None:
        self.folder = folder
        self.damaged = damaged

    def path(self, digest: str) -> Path:
        return self.folder / hex_of(digest)

    def digests(self) -> Sequence[str]:
        return [f"sha256:{path.name}" for path in entries(self.folder) if is_hex(path.name)]

    def complete(self, digest: str) -> str:
        """The whole digest that starts so; whether a whole one is here is not looked at."""
        start = digest.removeprefix("sha256:")
        if re.fullmatch(r"[0-9a-f]{8,63}", start):
            matches = [folder.name for folder in entries(self.folder) if folder.name.startswith(start)]
            if len(matches) != 1:
                hint = "give more digits" if matches else "`optimize store list` shows what there is"
                raise StoreError(f"{len(matches) or 'no'} artifacts start with {digest}", hint=hint)
            return f"sha256:{matches[0]}"
        return f"sha256:{hex_of(digest)}"

    def open(self, digest: str) -> Artifact:
        """Raises `StoreError` where there is none or its manifest is damaged; does not read the files."""
        folder = self.path(digest)
        if not folder.exists():
            hint = "`optimize store list` shows what there is"
            raise StoreError(f"no artifact {digest}", location=str(self.folder), hint=hint)
        try:
            artifact = Artifact.from_manifest(folder / "files", json.loads((folder / "manifest.json").read_bytes()))
        except (OSError, ValueError, RecursionError) as error:
            raise _damaged(f"manifest.json can't be read ({error})", folder) from error
        if artifact.digest != digest:
            raise _damaged("manifest.json has changed: it is not what the folder is named after", folder)
        return artifact

    def problems(self) -> Iterator[tuple[Path, str]]:
        for folder in entries(self.folder):
            problems = self.problems_of(folder)
            if os.path.lexists(folder):  # else `gc` has just removed it
                yield from ((folder, message) for message in problems)

    def problems_of(self, folder: Path) -> Sequence[str]:
        if not is_hex(folder.name) or folder.is_symlink() or not folder.is_dir():
            return ["not an artifact's folder"]
        try:
            problems = self.open(f"sha256:{folder.name}").problems()
        except StoreError as error:
            problems = [error.message]
        problems += [f"symbolic link: {path.name!a}" for path in entries(folder) if path.is_symlink()]
        extra = {path.name for path in entries(folder)} - {"manifest.json", "files"}
        return problems + [f"extra file beside the manifest: {name!a}" for name in sorted(extra)]

    def settle(self, staged: Path, artifact: Artifact) -> None:
        """Make files read-only and wait until they are on the disk with their manifest."""
        found = {name: status.st_size for name, status in walk(artifact.path)}
        if found != {name: entry["size"] for name, entry in artifact.files.items()}:
            raise StoreError("the files have changed since they were described", location=str(artifact.path))
        atomic.write_synced(staged / "manifest.json", atomic.json_bytes(artifact.manifest))
        for path in (staged / "manifest.json", *(artifact.path / name for name in found)):
            path.chmod(0o444)
        sync_tree(staged)

    def place(self, staged: Path, digest: str) -> bool:
        """Give the folder its final name; False where the very same artifact has it already."""
        target = self.path(digest)
        while True:  # somebody else may place, or set aside, the same digest at this moment
            try:
                staged.rename(target)
                return True
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
            if not self.problems_of(target):
                return False
            self.damaged.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):
                target.rename(self.damaged / f"{target.name}-{secrets.token_hex(4)}")


def _damaged(what: str, folder: Path) -> StoreError:
    hint = "remove that folder and run the recipe again; what is missing is made anew"
    return StoreError(f"damaged artifact: {what}", location=str(folder), hint=hint)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
