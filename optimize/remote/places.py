"""Where a remote's bytes lie: a plain folder, or whatever fsspec has a file system for (`s3://`, `gs://`, ...).

Both kinds know one thing that safety rests on: `create` makes a whole new file, or says that there is one.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from optimize import atomic
from optimize.errors import RemoteError

CHUNK = 8 << 20
"""Bytes asked for at once while a file streams in."""
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Protocol -> the extra of ours that installs its library."""
_ONE_STEP = ("s3", "s3a", "gs", "gcs", "abfs", "az", "memory")
"""Protocols on which an upload shows when it is whole, and not before."""
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY")


class Place(Protocol):
    """Names are relative POSIX paths made of letters, digits, `.`, `-`, `_` and `/`. All raise `RemoteError`."""

    url: str
    """As messages show it: without credentials."""

    def exists(self) -> bool:
        """Whether anything at all can be there: an existing folder, or a bucket."""
        ...

    def size(self, name: str) -> int | None:
        """In bytes; None where there is no such file."""
        ...

    def read(self, name: str, limit: int) -> bytes | None:
        """A whole file of at most `limit` bytes; None where there is none."""
        ...

    def stream(self, name: str, offset: int) -> Iterator[bytes]:
        """A file's bytes from `offset` on, in pieces."""
        ...

    def list(self, folder: str) -> list[str]:
        """The names of the files in a folder, without it; none where there is no such folder."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Make a whole file; False where there is one with other bytes."""
        ...

    def upload(self, path: Path, name: str) -> None:
        """Copy a local file there; it appears when it is whole."""
        ...


def open_place(url: str) -> Place:
    """The place that a URL names: a path, `file://`, or anything that fsspec knows."""
    protocol, separator, rest = url.partition("://")
    if not separator:
        return Folder(Path(url).expanduser())
    if protocol in ("file", "local"):
        return Folder(Path(rest))
    return Bucket(url)


def shown(url: str) -> str:
    """A URL without what only its owner should see: user, password and query."""
    return re.sub(r"//[^/@]*@", "//", url).partition("?")[0].rstrip("/")


class Folder:
    """A folder of this machine, or one that is mounted."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.url = str(self.root)

    def exists(self) -> bool:
        return self.root.is_dir()

    def size(self, name: str) -> int | None:
        with self._telling(f"looking at {name}"):
            path = self._inside(name)
            return path.stat().st_size if path.is_file() else None

    def read(self, name: str, limit: int) -> bytes | None:
        with self._telling(f"reading {name}"):
            path = self._inside(name)
            if not path.is_file():
                return None
            with path.open("rb") as file:
                return _bounded(file.read(limit + 1), limit, name, self.url)

    def stream(self, name: str, offset: int) -> Iterator[bytes]:
        with self._telling(f"reading {name}"), self._inside(name).open("rb") as file:
            file.seek(offset)
            while piece := file.read(CHUNK):
                yield piece

    def list(self, folder: str) -> list[str]:
        with self._telling(f"listing {folder}"):
            path = self._inside(folder)
            found = path.iterdir() if path.is_dir() else ()
            return sorted(one.name for one in found if not one.name.startswith("."))

    def create(self, name: str, data: bytes) -> bool:
        with self._telling(f"writing {name}"):
            path = self._inside(name)
            try:
                atomic.create(path, data)
            except FileExistsError:
                return self.read(name, len(data)) == data if self.size(name) == len(data) else False
            return True

    def upload(self, path: Path, name: str) -> None:
        with self._telling(f"writing {name}"):
            target = self._inside(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = atomic.sibling(target)
            try:
                shutil.copyfile(path, temporary)
                atomic.sync(temporary)
                temporary.replace(target)
                atomic.sync(target.parent)
            finally:
                temporary.unlink(missing_ok=True)

    def _inside(self, name: str) -> Path:
        """The path, unless a link leads elsewhere: nothing outside of the folder is read or written."""
        path = self.root / name
        if Path(os.path.realpath(path)) != Path(os.path.realpath(self.root)) / name:
            raise RemoteError(f"a link leads out of the remote: {name}", location=self.url, hint="remove that link")
        return path

    @contextmanager
    def _telling(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message, hint = atomic.explain(error, doing, self.root.parent)
            raise RemoteError(message, location=self.url, hint=hint) from error


class Bucket:
    """Anything of fsspec's. Credentials come from where its library looks for them, never from us."""

    def __init__(self, url: str) -> None:
        self.url = shown(url)
        self._protocol = url.partition("://")[0]
        if self._protocol in EXTRAS and "@" in url.partition("://")[2].partition("/")[0]:
            hint = "leave them out: they are looked for in the environment and the usual files"
            raise RemoteError("credentials have no place in the URL of a bucket", location=self.url, hint=hint)
        import fsspec

        # Nothing is believed that was listed earlier; a server that is not there is told of in seconds.
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if self._protocol in ("s3", "s3a"):
            options["config_kwargs"] = {"connect_timeout": 10, "read_timeout": 60}
        try:
            self._fs, base = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            extra = EXTRAS.get(self._protocol)
            hint = f'pip install "optimize-workbench[{extra}]"' if extra else "install it"
            raise RemoteError(
                f"`{self._protocol}://` needs a library that is not installed: {self._clean(error)}", hint=hint
            ) from None
        except ValueError as error:
            hint = "a folder, s3://BUCKET/PATH, gs://BUCKET/PATH, or another URL that fsspec knows"
            raise RemoteError(f"not a remote: {self._clean(error)}", location=self.url, hint=hint) from None
        self._base = str(base).rstrip("/")

    def exists(self) -> bool:
        with self._telling("looking for the bucket"):
            return bool(self._fs.exists(self._base.partition("/")[0] or "/"))

    def size(self, name: str) -> int | None:
        with self._telling(f"looking at {name}"):
            try:
                return int(self._fs.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def read(self, name: str, limit: int) -> bytes | None:
        with self._telling(f"reading {name}"):
            try:
                size = int(self._fs.info(self._path(name))["size"])
                if size > limit:
                    return _bounded(b"", -1, name, self.url)
                data: bytes = self._fs.cat_file(self._path(name), start=0, end=size) if size else b""
            except FileNotFoundError:
                return None
            return data

    def stream(self, name: str, offset: int) -> Iterator[bytes]:
        size = self.size(name) or 0
        while offset < size:
            with self._telling(f"reading {name}"):
                piece: bytes = self._fs.cat_file(self._path(name), start=offset, end=min(offset + CHUNK, size))
            if not piece:
                return
            offset += len(piece)
            yield piece

    def list(self, folder: str) -> list[str]:
        with self._telling(f"listing {folder}"):
            try:
                found = self._fs.ls(self._path(folder), detail=False)
            except FileNotFoundError:
                if not self.exists():  # a bucket misspelt is not an empty one
                    raise
                return []
            names = (str(one).rstrip("/").rpartition("/")[2] for one in found)
            return sorted(name for name in names if name and not name.startswith("."))

    def create(self, name: str, data: bytes) -> bool:
        refused: Exception | None = None
        if self.size(name) is not None:  # not every server knows the condition
            return self.read(name, limit=1 << 30) == data
        try:
            self._fs.pipe_file(self._path(name), data, mode="create")
        except Exception as error:
            refused = error
        # A refusal means that somebody was first, which may have been a try of ours whose answer got lost. And where
        # a file system can only look before it writes, what lies there in the end says who was last.
        there = self.read(name, limit=1 << 30)
        if there is None and refused is not None:
            with self._telling(f"writing {name}"):
                raise refused
        return there == data

    def upload(self, path: Path, name: str) -> None:
        with self._telling(f"writing {name}"):
            if self._protocol in _ONE_STEP:
                self._fs.put_file(str(path), self._path(name))
                return
            temporary = self._path(f"incoming/{secrets.token_hex(8)}")
            self._fs.makedirs(temporary.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(path), temporary)
            self._fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
            self._fs.mv(temporary, self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"

    @contextmanager
    def _telling(self, doing: str) -> Iterator[None]:
        """Whatever the library and the network throw becomes one error, which names the URL and no secret."""
        try:
            yield
        except RemoteError:
            raise
        except Exception as error:
            told = self._clean(error) or "no further word"
            if isinstance(error, FileNotFoundError):
                hint: str | None = "does the bucket exist?"
            elif isinstance(error, PermissionError) or "credential" in told.lower():
                hint = "are the credentials those of this bucket, and may they do this?"
            else:
                hint = "is the server reachable? The same command goes on from there"
            message = f"{doing} failed: {type(error).__name__}: {told}"
            raise RemoteError(message, location=self.url, hint=hint) from None

    def _clean(self, error: BaseException) -> str:
        """What an error says, on one line and without credentials."""
        text = " ".join(str(error).split())[:400]
        text = re.sub(r"//[^/@\s]*@", "//", text)
        text = re.sub(
            r"(?i)((?:signature|credential|token|key|secret|password)[\w-]*\s*[=:]\s*)[^\s&'\"]+", r"\1...", text
        )
        for value in filter(None, (os.environ.get(name) for name in _SECRETS)):
            text = text.replace(value, "...")
        return text


def _bounded(data: bytes, limit: int, name: str, url: str) -> bytes:
    if len(data) > limit:
        raise RemoteError(f"{name} is too large to be what it should be", location=url)
    return data
