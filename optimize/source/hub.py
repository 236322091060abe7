"""Files of a model or a data set on the hub, through `huggingface_hub`: resumable, and kept in its own cache, so that
what a user has downloaded before (`HF_HOME`) is there already. Its cache is checked while files are copied out of it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from optimize.errors import SourceError

TIMEOUT = 20.0
"""Seconds that the hub may take to say which commit a revision is."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9](?:[\w.-]{0,94}\w)?(?:/[A-Za-z0-9](?:[\w.-]{0,94}\w)?)?", re.ASCII)


def is_revision(revision: str) -> bool:
    """Whether `revision` is shaped like a branch, a tag or a commit, and stays below a folder when used as a path."""
    return all(re.fullmatch(r"\w[\w.+-]*", part, re.ASCII) and ".." not in part for part in revision.split("/"))


def is_id(source: str) -> bool:
    """Whether `source` is shaped like a hub id: `name` or `organisation/name`."""
    return bool(_ID.fullmatch(source)) and not source.endswith(".git")


@dataclass(frozen=True)
class Hub:
    """A repository at a revision."""

    repo: str
    revision: str | None = None
    type: Literal["model", "dataset"] = "model"

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "hub", "type": self.type, "repo": self.repo, "commit": self.commit}

    @cached_property
    def commit(self) -> str:
        """The commit that the revision is now. A whole commit hash needs no network; offline, the cache answers."""
        revision = self.revision or "main"
        if _COMMIT.fullmatch(revision):
            return revision
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        with _explained(self):
            try:
                info = HfApi().repo_info(self.repo, repo_type=self.type, revision=revision, timeout=TIMEOUT)
            except HfHubHTTPError as error:
                if error.response is not None and error.response.status_code < 500:
                    raise
                return self._cached_commit(revision) or _raise(error)
            except Exception as error:  # connection errors of whichever HTTP library the hub's client uses
                return self._cached_commit(revision) or _raise(error)
        ref = self._ref(revision)  # where the hub's client keeps it too, when asked for a name and not for a commit
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(str(info.sha), "ascii")
        return str(info.sha)

    def names(self) -> list[str]:
        """Files of this commit that are in the cache."""
        folder = self._repo_folder / "snapshots" / self.commit
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def copy(self, patterns: Sequence[str], directory: Path) -> None:
        """Download the files that match one of `patterns` and copy them, verified, into `directory`."""
        snapshot = self._download(patterns)
        for path in sorted(snapshot.rglob("*")):
            name = path.relative_to(snapshot).as_posix()
            if path.is_dir() or not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                continue
            if self._repo_folder.resolve() not in path.resolve().parents:
                raise SourceError(f"{name} of {self} is a link that leads out of the hub's cache", location=str(path))
            if not _intact(path):
                path.resolve().unlink()
                self._download([name])
                if not _intact(path):
                    raise SourceError(f"{name} of {self} differs from what the hub says that it is")
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)

    def _download(self, patterns: Sequence[str]) -> Path:
        from huggingface_hub import snapshot_download

        with _explained(self):
            return Path(
                snapshot_download(
                    self.repo, repo_type=self.type, revision=self.commit, allow_patterns=list(patterns), max_workers=4
                )
            )

    @property
    def _repo_folder(self) -> Path:
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(HF_HUB_CACHE) / f"{self.type}s--{self.repo.replace('/', '--')}"

    def _ref(self, revision: str) -> Path:
        return self._repo_folder / "refs" / revision

    def _cached_commit(self, revision: str) -> str | None:
        try:
            text = self._ref(revision).read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return text if _COMMIT.fullmatch(text) else None


def _intact(path: Path) -> bool:
    """The hub's cache names a blob by its SHA-256 (large files) or by git's SHA-1; without links it names none."""
    name = path.resolve().name
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name):
        return True
    hasher = hashlib.sha256()
    if len(name) == 40:
        hasher = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest() == name


def _raise(error: Exception) -> str:
    raise error


@contextmanager
def _explained(hub: Hub) -> Iterator[None]:
    """Turn what the hub's client raises (its own errors and its HTTP library's) into `SourceError`."""
    from huggingface_hub import errors

    what = "data set" if hub.type == "dataset" else "model"
    try:
        yield
    except (SourceError, MemoryError):
        raise
    except errors.GatedRepoError as error:
        hint = f"ask for access on the hub's page of {hub.repo}, then `hf auth login` or set HF_TOKEN"
        raise SourceError(f"the {what} {hub} is gated: its owner has to let you in", hint=hint) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(f"{hub.repo} on the hub has no revision {hub.revision!r}", hint="check `revision`") from error
    except errors.RepositoryNotFoundError as error:
        hint = "check the spelling; a private one needs `hf auth login` or HF_TOKEN; a local path starts with ./"
        raise SourceError(f"the hub has no {what} {hub.repo}, or it is private", hint=hint) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        hint = "connect and unset HF_HUB_OFFLINE, or give a local path or a wheel:// source"
        raise SourceError(f"the {what} {hub} is not in the cache and the hub can't be reached", hint=hint) from error
    except OSError as error:
        if error.errno is not None:  # the disk's, not the network's
            raise
        raise SourceError(f"the hub did not give the {what} {hub}: {_one_line(error)}", hint="run it again") from error
    except Exception as error:
        hint = "check the network and HF_ENDPOINT, then run it again: what was fetched is kept"
        raise SourceError(f"the hub did not give the {what} {hub}: {_one_line(error)}", hint=hint) from error


def _one_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
