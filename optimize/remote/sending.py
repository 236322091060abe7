"""`optimize push`: artifacts, then what is known of their runs, then the registry."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize import atomic
from optimize.errors import RemoteError, StoreError
from optimize.progress import Progress
from optimize.remote import layout
from optimize.remote.log import compare_logs, lost_race, remember
from optimize.remote.settings import need_remote

if TYPE_CHECKING:
    from optimize.artifact import Artifact
    from optimize.remote.places import Place
    from optimize.work import Work


@dataclass
class Pushed:
    """What a push did."""

    remote: str
    digests: list[str] = field(default_factory=list)
    """Artifacts that are there now, each whole."""
    files: int = 0
    """Files that were sent; those that were there already don't count."""
    bytes: int = 0
    entries: int = 0
    """New entries of the registry's log."""
    behind: int = 0
    """Entries of the remote's log that lack here: `pull` brings them."""

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def push(
    *references: str, remote: str | None = None, work: Work | str | Path | None = None, progress: Progress | None = None
) -> Pushed:
    """Send everything promoted here that the remote lacks, and the artifacts of `references` (names or digests).

    Raises `RecipeError` where no remote is named, `RemoteError` where it can't be reached or written, `StoreError` for
    an artifact that is damaged or not here, and `PromotionRefused` where somebody else promoted there in between: then
    the registry there is theirs, unharmed.
    """
    from optimize.planning import as_work

    work = as_work(work)
    place = need_remote(work, remote)
    progress = progress or Progress()
    pushed = Pushed(place.url)
    with work.store.in_use():
        # First, since it may end everything; and once more at the end, entry by entry.
        difference = compare_logs(place, work.registry)
        entries = [json.loads(data) for data in difference.here]
        pushed.behind = len(difference.there)
        asked = [_digest(work, reference) for reference in references]
        for digest in dict.fromkeys([*asked, *(entry["digest"] for entry in entries)]):
            _push_artifact(place, work, digest, pushed, progress, needed=digest in asked)
        for run in dict.fromkeys(entry["run"] for entry in entries if "run" in entry):
            _push_run(place, work, run)
        for number, data in enumerate(difference.here, difference.common + 1):
            if not place.create(layout.entry_name(number), data):
                raise lost_race(place, number)
            pushed.entries += 1
        remember(place, work.registry, difference.common + len(difference.there) + pushed.entries)
    return pushed


def _digest(work: Work, reference: str) -> str:
    return work.registry.resolve(reference).digest if "@" in reference else work.store.open(reference).digest


def _push_artifact(place: Place, work: Work, digest: str, pushed: Pushed, progress: Progress, *, needed: bool) -> None:
    try:
        artifact = work.store.open(digest)
    except StoreError:
        # Of a version that was pulled only its entry may be here; then its artifact has to be there.
        if not needed and _is_there(place, layout.read_manifest(place, digest)):
            return
        raise
    progress.start(digest[:19], "push")
    try:
        work.store.verify(artifact)
        _send(place, artifact, pushed, progress)
        manifest = atomic.json_bytes(artifact.manifest)
        if not place.create(layout.manifest_name(digest), manifest) and layout.read_manifest(place, digest) is None:
            raise RemoteError(f"the manifest of {digest[:19]} can't be written", location=place.url)
    except BaseException:
        progress.fail(digest[:19])
        raise
    progress.finish(digest[:19], seconds=0.0, cached=False, text="")
    pushed.digests.append(digest)


def _send(place: Place, artifact: Artifact, pushed: Pushed, progress: Progress) -> None:
    """Every file that is not there yet; a file that is there with another size was never whole."""
    done = 0
    for name, entry in sorted(artifact.files.items(), key=lambda item: item[1]["size"]):
        target = layout.object_name(entry["sha256"])
        if place.size(target) != entry["size"]:
            place.upload(artifact.path / name, target)
            pushed.files += 1
            pushed.bytes += entry["size"]
        done += entry["size"]
        progress.update(artifact.digest[:19], done, artifact.size_bytes, name)


def _is_there(place: Place, artifact: Artifact | None) -> bool:
    return artifact is not None and all(
        place.size(layout.object_name(entry["sha256"])) == entry["size"] for entry in artifact.files.values()
    )


def _push_run(place: Place, work: Work, run: str) -> None:
    """What `gate` says of the promoted version's run; rows, answers and samples stay here."""
    pulled = layout.pulled_run(work.registry.root, run)
    if pulled is None:
        return
    for file in reversed(layout.RUN_FILES):  # run.json last, as everywhere
        found = [folder / file for folder in (work.runs / run, pulled) if (folder / file).is_file()]
        name = layout.run_name(run, file)
        if name and found:
            place.create(name, found[0].read_bytes())
