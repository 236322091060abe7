"""`optimize pull`: artifacts first, each checked as it arrives, then the registry."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize import atomic
from optimize.errors import RemoteError, SourceError
from optimize.progress import Progress
from optimize.remote import layout
from optimize.remote.log import compare_logs, read_log, remember
from optimize.remote.settings import find_remote, need_remote

if TYPE_CHECKING:
    from optimize.artifact import Artifact
    from optimize.registry import Registry
    from optimize.remote.places import Place
    from optimize.work import Work


@dataclass
class Pulled:
    """What a pull did."""

    remote: str
    digests: list[str] = field(default_factory=list)
    """Artifacts that were asked for and are here now, each whole."""
    files: int = 0
    """Files that came over; those that lay in the store already don't count."""
    bytes: int = 0
    entries: int = 0
    """New entries of the registry's log."""
    set_aside: str | None = None
    """Where the log of here was put."""

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def pull(
    *references: str,
    remote: str | None = None,
    work: Work | str | Path | None = None,
    take_theirs: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Pulled:
    """Bring the registry and the artifacts of `references` (names or digests; without any, all that aliases point at).

    `take_theirs` settles a registry that went two ways: the log of here is set aside. `trust_remote_code` takes models
    that hold code or are programs. Raises `RecipeError` where no remote is named, `RemoteError` where it can't be
    reached or holds something false, `PromotionRefused` where both registries went on, `RegistryError` for a name that
    is not there, `SourceError` for a model that could do more than answer, and `StoreError` where the disk is full.
    """
    from optimize.planning import as_work

    work = as_work(work)
    place = need_remote(work, remote)
    if not place.exists():
        raise RemoteError("there is no such remote", location=place.url, hint="`optimize push` makes it")
    pulled = Pulled(place.url)
    with work.store.in_use():
        log = _fetch_log(place, work, take_theirs=take_theirs)
        if references:
            digests = [
                log.registry.resolve(one).digest if "@" in one else layout.complete(place, one) for one in references
            ]
        else:
            digests = [version.digest for version in log.registry.list() if version.aliases]
        for digest in dict.fromkeys(digests):
            fetch(digest, place, work, pulled, trusted=trust_remote_code, progress=progress)
        _keep_log(place, work, log, pulled)
    return pulled


def bring(
    references: Sequence[str | Path],
    work: Work,
    url: str | None,
    *,
    trusted: bool = False,
    progress: Progress | None = None,
) -> None:
    """Have what the references name in the store, where a remote is named; folders and what is here stay as they are.

    A name means what is promoted on the remote now. Raises as `pull`.
    """
    from optimize.model import is_folder

    names = [str(reference) for reference in references if not is_folder(reference)]
    place = find_remote(work, url) if names else None
    if place is None:
        return
    if any("@" in name for name in names):
        refresh(work, place)
    for name in names:
        if "@" in name:
            digest = work.registry.resolve(name).digest
        elif work.store.has_one(name):
            continue
        else:
            digest = layout.complete(place, name)
        if not work.store.has(digest):
            fetch(digest, place, work, Pulled(place.url), trusted=trusted, progress=progress)


def refresh(work: Work, place: Place) -> None:
    """Bring the registry alone. Raises as `pull`."""
    _keep_log(place, work, _fetch_log(place, work, take_theirs=False), Pulled(place.url))


@dataclass(frozen=True)
class _Log:
    """The remote's log, before anything of it is written here."""

    files: Sequence[bytes]
    """Entries that lack here."""
    registry: Registry
    """As it will be with them."""
    length: int
    """Entries that the remote has."""
    instead: bool = False
    """Whether the log of here has to be set aside for them."""


def _fetch_log(place: Place, work: Work, *, take_theirs: bool) -> _Log:
    if take_theirs:
        ours, theirs = list(work.registry.log.files()), read_log(place)
        both = min(len(ours), len(theirs))
        if ours[:both] != theirs[:both]:
            registry = work.registry.foretell(theirs, instead=True)
            return _Log(theirs, registry, len(theirs), instead=True)
    found = compare_logs(place, work.registry)
    return _Log(found.there, work.registry.foretell(found.there), found.common + len(found.there))


def _keep_log(place: Place, work: Work, log: _Log, pulled: Pulled) -> None:
    entries = [json.loads(data) for data in log.files]
    for run in dict.fromkeys(entry["run"] for entry in entries if "run" in entry):
        _fetch_run(place, work, run)
    if log.instead:
        pulled.set_aside = str(work.registry.log.set_aside())
    work.registry.log.extend(log.files)
    pulled.entries = len(log.files)
    remember(place, work.registry, log.length)


def _fetch_run(place: Place, work: Work, run: str) -> None:
    folder = layout.pulled_run(work.registry.root, run)
    if folder is None or (folder / "run.json").exists() or (work.runs / run / "run.json").exists():
        return
    for file in reversed(layout.RUN_FILES):  # run.json last: a folder that has one is whole
        name = layout.run_name(run, file)
        if name and (data := place.read(name, layout.MAX_RUN)) is not None:
            atomic.write_bytes(folder / file, data)


def fetch(
    digest: str, place: Place, work: Work, pulled: Pulled, *, trusted: bool, progress: Progress | None = None
) -> Artifact:
    """The artifact of a digest, brought over unless it is here. Raises as `pull`."""
    from optimize.source.folder import vet

    store = work.store
    if store.holds(digest):
        pulled.digests.append(digest)
        return store.open(digest)
    artifact = layout.read_manifest(place, digest)
    if artifact is None:
        raise RemoteError(f"no artifact {digest}", location=place.url, hint="`optimize push` it from where it was made")
    if artifact.trust_remote_code and not trusted:
        raise SourceError(
            f"{digest[:19]} of {place.url} wants code of its own to run",
            hint="read that code; if you trust it, --trust-remote-code",
        )
    progress = progress or Progress()
    progress.start(digest[:19], "pull")
    staged = None
    try:
        scratch = store.scratch(digest)
        _check_room(artifact, scratch)
        _bring(artifact, place, scratch, _files_here(work), pulled, progress)
        staged = store.staging()
        _lay_out(artifact, scratch, staged)
        vet(f"{digest[:19]} of {place.url}", staged, artifact.format, tuple(artifact.files), trusted)
        taken = store.adopt(replace(artifact, path=staged))
    except OSError as error:
        progress.fail(digest[:19])
        message, hint = atomic.explain(error, f"storing {digest[:19]}", store.root, artifact.size_bytes)
        raise RemoteError(message, hint=hint) from error
    except BaseException:
        progress.fail(digest[:19])
        raise
    finally:
        if staged is not None:
            store.discard(staged)
    progress.finish(digest[:19], seconds=0.0, cached=False, text="")
    pulled.digests.append(digest)
    return taken


def _check_room(artifact: Artifact, scratch: Path) -> None:
    """A manifest may claim any size: it has to fit before anything is fetched."""
    free = shutil.disk_usage(scratch).free
    if artifact.size_bytes > free:
        raise RemoteError(
            f"{artifact.digest[:19]} says that it has {artifact.size_bytes / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are"
            " free",
            location=str(scratch),
            hint="free some space, if that size can be right",
        )


def _files_here(work: Work) -> Mapping[str, Path]:
    """SHA-256 -> a file of the store that has these bytes."""
    return {
        entry["sha256"]: stored.artifact.path / name
        for stored in work.store.list()
        for name, entry in stored.artifact.files.items()
    }


def _bring(
    artifact: Artifact, place: Place, scratch: Path, here: Mapping[str, Path], pulled: Pulled, progress: Progress
) -> None:
    """Every file of the artifact into `scratch`, named after its SHA-256; what is there from before is kept."""
    done = 0
    for name, entry in sorted(artifact.files.items(), key=lambda item: item[1]["size"]):
        target, size = scratch / entry["sha256"], entry["size"]
        if not target.exists():
            source = here.get(entry["sha256"])
            if source is None or not _write(scratch, entry, _pieces(source)):
                _download(place, scratch, entry, name)
                pulled.files += 1
                pulled.bytes += size
        done += size
        progress.update(artifact.digest[:19], done, artifact.size_bytes, name)


def _download(place: Place, scratch: Path, entry: Mapping[str, Any], name: str) -> None:
    target = layout.object_name(entry["sha256"])
    size = place.size(target)
    if size is None or size != entry["size"]:
        told = "is not there" if size is None else f"has {size:,} bytes, not {entry['size']:,}"
        raise RemoteError(f"the file of {name!a} {told}", location=place.url, hint="push it again")
    part = scratch / f"{entry['sha256']}.part"
    begun = part.stat().st_size if part.exists() else 0
    # What came before an interruption is kept, unless the whole turns out to be something else.
    if begun and begun <= size and _write(scratch, entry, place.stream(target, begun), resume=True):
        return
    part.unlink(missing_ok=True)
    if not _write(scratch, entry, place.stream(target, 0)):
        part.unlink(missing_ok=True)
        raise RemoteError(
            f"the bytes of {name!a} are not those of its digest", location=place.url, hint="push it again"
        )


def _write(scratch: Path, entry: Mapping[str, Any], pieces: Iterator[bytes], *, resume: bool = False) -> bool:
    """Whether the pieces are the file that the entry describes, which then lies in `scratch`. Never writes more."""
    part = scratch / f"{entry['sha256']}.part"
    hasher, size = hashlib.sha256(), 0
    if resume:
        for piece in _pieces(part):
            hasher.update(piece)
            size += len(piece)
    with part.open("ab" if resume else "wb") as file:
        for piece in pieces:
            size += len(piece)
            if size > entry["size"]:
                return False
            hasher.update(piece)
            file.write(piece)
    if (size, hasher.hexdigest()) != (entry["size"], entry["sha256"]):
        return False
    part.replace(scratch / entry["sha256"])
    return True


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                yield piece
    except FileNotFoundError:
        return


def _lay_out(artifact: Artifact, scratch: Path, folder: Path) -> None:
    """From names after bytes to the names that the manifest gives; several files may have the same bytes."""
    wanted = Counter(entry["sha256"] for entry in artifact.files.values())
    for name, entry in artifact.files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        wanted[entry["sha256"]] -= 1
        if wanted[entry["sha256"]]:
            shutil.copyfile(scratch / entry["sha256"], target)
        else:
            (scratch / entry["sha256"]).rename(target)


def run_document(work: Work, run: str, file: str = "run.json") -> Any:
    """What is known of a run, made here or told by a remote; None where nothing is."""
    pulled = layout.pulled_run(work.registry.root, run)
    for folder in (work.runs / run, pulled) if pulled else ():
        try:
            return json.loads((folder / file).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
    return None
