"""What is promoted here is promoted there: once, whole, and in nobody's way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from promoting import NAME, SHARED, promote, put

from optimize.errors import PromotionRefused, RegistryError, RemoteError
from optimize.remote import pull, push
from optimize.remote.places import Folder, open_place
from optimize.work import Work

NewWork = Callable[[str], Work]


def objects(url: str) -> int:
    place = open_place(url)
    return sum(len(place.list(f"objects/{folder}")) for folder in place.list("objects"))


def test_what_is_promoted_travels_once(remote: str, new_work: NewWork) -> None:
    here, there = new_work("here"), new_work("there")
    first, second = promote(here, 1), promote(here, 2)
    assert here.registry.resolve(f"{NAME}@production~1").digest == first
    pushed = push(remote=remote, work=here)
    assert (pushed.digests, pushed.entries, pushed.behind) == ([first, second], 2, 0)
    assert pushed.files == objects(remote) == 4  # the weights and config.json are shared
    assert push(remote=remote, work=here).files == 0

    pulled = pull(remote=remote, work=there)
    assert (pulled.digests, pulled.entries) == ([second], 2)
    assert there.registry.log.files() == here.registry.log.files()
    assert there.registry.resolve(f"{NAME}@production").digest == second
    artifact = there.store.open(second)
    there.store.verify(artifact)
    assert (artifact.path / "own.txt").read_text() == "2"
    assert not there.store.has(first)
    assert (there.registry.root / "runs" / "run-1" / "run.json").is_file()

    older = pull(f"{NAME}@production~1", remote=remote, work=there)
    assert (older.digests, older.files) == ([first], 1)  # the rest lies in the store already
    assert pull(remote=remote, work=there).files == 0
    assert not there.store.verify_all()


def test_an_artifact_by_its_digest(remote: str, new_work: NewWork) -> None:
    here, there = new_work("here"), new_work("there")
    digest = put(here, "unpromoted").digest
    push(digest[:19], remote=remote, work=here)
    pull(digest[7:19], remote=remote, work=there)
    assert there.store.holds(digest)
    with pytest.raises(RemoteError, match="no artifacts start with"):
        pull("0123456789", remote=remote, work=there)
    with pytest.raises(RegistryError, match="nobody@production"):
        pull("nobody@production", remote=remote, work=there)


def test_promotions_go_back_and_forth(remote: str, new_work: NewWork) -> None:
    here, there = new_work("here"), new_work("there")
    promote(here, 1)
    push(remote=remote, work=here)
    pull(remote=remote, work=there)
    promote(there, 2)
    push(remote=remote, work=there)
    assert push(remote=remote, work=here).behind == 1
    pull(remote=remote, work=here)
    assert here.registry.resolve(NAME).version == 2
    assert here.registry.log.files() == there.registry.log.files()


def test_of_two_pushes_the_second_is_told(remote: str, new_work: NewWork) -> None:
    here, there = new_work("here"), new_work("there")
    promote(here, 1)
    push(remote=remote, work=here)
    pull(remote=remote, work=there)
    ours, theirs = promote(here, "ours"), promote(there, "theirs")
    push(remote=remote, work=there)
    for refused in (lambda: push(remote=remote, work=here), lambda: pull(remote=remote, work=here)):
        with pytest.raises(PromotionRefused, match=r"entry 2 on: .* did promote m@production to version 2") as caught:
            refused()
        assert caught.value.exit_code == 1
        assert "--take-theirs" in str(caught.value.hint)
    pulled = pull(remote=remote, work=here, take_theirs=True)
    assert pulled.set_aside is not None
    assert (Path(pulled.set_aside) / "00000002.json").is_file()
    assert here.registry.resolve(f"{NAME}@production").digest == theirs
    assert here.store.holds(ours)
    promote(here, "ours")
    push(remote=remote, work=here)
    assert pull(remote=remote, work=there).entries == 1


def test_a_race_to_the_same_entry_is_told(remote: str, new_work: NewWork, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both look, both send their artifacts, and only then does one of them write the entry."""
    here, there = new_work("here"), new_work("there")
    promote(here, "ours")
    theirs = promote(there, "theirs")
    kind: Any = type(open_place(remote))
    create = kind.create

    def late(place: Any, name: str, data: bytes) -> bool:
        if name.startswith("registry/"):
            monkeypatch.setattr(kind, "create", create)
            push(remote=remote, work=there)
        return bool(create(place, name, data))

    monkeypatch.setattr(kind, "create", late)
    with pytest.raises(PromotionRefused, match="somebody else was faster"):
        push(remote=remote, work=here)
    fresh = new_work("fresh")
    pull(remote=remote, work=fresh)
    assert fresh.registry.resolve(f"{NAME}@production").digest == theirs


@pytest.mark.parametrize("step", ["upload", "create"])
@pytest.mark.parametrize("after", range(3))
def test_a_killed_push_leaves_nothing_half_visible(
    step: str, after: int, tmp_path: Path, new_work: NewWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, here = str(tmp_path / "remote"), new_work("here")
    first = promote(here, 1)
    push(remote=remote, work=here)
    second = promote(here, 2)
    whole: Any = getattr(Folder, step)
    calls = 0

    def killed(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(Folder, step, killed)
    if step == "upload" and after >= 1:  # one new file is all there is
        push(remote=remote, work=here)
        return
    with pytest.raises(KeyboardInterrupt):
        push(remote=remote, work=here)
    monkeypatch.setattr(Folder, step, whole)
    during = new_work("during")
    pull(remote=remote, work=during)
    assert during.registry.resolve(f"{NAME}@production").digest == first
    assert not during.store.verify_all()
    push(remote=remote, work=here)
    pull(remote=remote, work=during)
    assert during.registry.resolve(f"{NAME}@production").digest == second


def test_a_pull_goes_on_where_it_was_cut_off(remote: str, new_work: NewWork, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = new_work("here"), new_work("there")
    digest = promote(here, 1)
    push(remote=remote, work=here)
    kind: Any = type(open_place(remote))
    stream = kind.stream
    offsets = []

    def cut(place: Any, name: str, offset: int) -> Any:
        for piece in stream(place, name, offset):
            if len(piece) == len(SHARED):
                yield piece[:1234]
                raise RemoteError("the line went dead")
            yield piece

    monkeypatch.setattr(kind, "stream", cut)
    with pytest.raises(RemoteError, match="went dead"):
        pull(remote=remote, work=there)
    assert not there.registry.list()  # what is promoted comes last

    def counted(place: Any, name: str, offset: int) -> Any:
        offsets.append(offset)
        return stream(place, name, offset)

    monkeypatch.setattr(kind, "stream", counted)
    pull(remote=remote, work=there)
    assert offsets == [1234]
    assert there.store.holds(digest)


def test_a_remote_cut_short_is_noticed(remote: str, new_work: NewWork) -> None:
    here = new_work("here")
    promote(here, 1)
    promote(here, 2)
    push(remote=remote, work=here)
    place: Any = open_place(remote)
    if isinstance(place, Folder):
        (place.root / "registry" / "00000002.json").unlink()
    else:
        place._fs.rm(place._path("registry/00000002.json"))
    with pytest.raises(RegistryError, match="had 2 entries and has 1"):
        pull(remote=remote, work=here)


def test_what_is_not_pushed_yet_is_no_quarrel(remote: str, new_work: NewWork) -> None:
    here = new_work("here")
    promote(here, 1)
    push(remote=remote, work=here)
    second = promote(here, 2)
    for take_theirs in (False, True, False):
        pulled = pull(remote=remote, work=here, take_theirs=take_theirs)
        assert (pulled.entries, pulled.set_aside) == (0, None)
        assert here.registry.resolve(f"{NAME}@production").digest == second
    assert push(remote=remote, work=here).entries == 1


def test_an_absent_remote(tmp_path: Path, new_work: NewWork) -> None:
    with pytest.raises(RemoteError, match="no such remote") as caught:
        pull(remote=str(tmp_path / "nowhere"), work=new_work("here"))
    assert caught.value.exit_code == 4
