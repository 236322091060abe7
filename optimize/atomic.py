"""Files that appear whole or not at all, also when the machine stops in the middle."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


def sibling(path: Path) -> Path:
    """A fresh hidden name beside `path`, on the same file system; whoever reads the folder ignores such names."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def json_bytes(value: Any) -> bytes:
    """JSON for people and diffs: sorted, indented, one form for one value."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sync(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # folders can't be opened there
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """A new file with its bytes on the disk; not atomic by itself. Nothing is left where it fails."""
    try:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Create or replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = sibling(path)
    write_synced(temporary, data)
    try:
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Create or replace a JSON file in one step."""
    write_bytes(path, json_bytes(value))


def create(path: Path, data: bytes) -> None:
    """Create a whole file, or raise `FileExistsError`: of several processes that try, one succeeds.

    A hard link appears with all its bytes. Where the file system has none, the name is taken first and the bytes
    follow, so that a kill in between can leave a file cut short.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = sibling(path)
    write_synced(temporary, data)
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        write_synced(path, data)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder with all below it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def explain(error: OSError, doing: str, folder: Path, needed: int | None = None) -> tuple[str, str | None]:
    """What a failed write means to a person: (message, hint)."""
    if error.errno not in _NO_ROOM:
        return f"{doing} failed: {error.strerror or error}: {error.filename or folder}", None
    amount = f" ({needed / 1e6:,.1f} MB needed)" if needed is not None else ""
    try:
        free = f", {shutil.disk_usage(folder).free / 1e6:,.1f} MB free"
    except OSError:
        free = ""
    cause = "a file size limit was reached" if error.errno == errno.EFBIG else "the disk is full"
    return f"{doing} failed: {cause}{amount}: {folder}{free}", "free some space; `optimize store gc` may help"
