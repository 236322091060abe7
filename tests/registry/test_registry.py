"""Versions, aliases, verdicts and waivers."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimize.artifact import digest_of
from optimize.errors import PromotionRefused, RegistryError
from optimize.registry import Registry, Version, Waiver

TOMORROW = (datetime.now(timezone.utc) + timedelta(days=1)).date().isoformat()
WAIVER = Waiver("customer can't wait", TOMORROW)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def promote(
    registry: Registry,
    what: object,
    alias: str = "production",
    *,
    name: str = "m",
    verdict: str | None = "pass",
    **more: Any,
) -> Version:
    return registry.promote(
        name, alias, digest_of(what), verdict=verdict, run="run-1", recipe_digest=digest_of("r"), **more
    )


def test_promote_and_resolve(registry: Registry) -> None:
    gate = {"metric": "size", "verdict": "pass"}
    first = promote(registry, 1, gates=[gate])
    second = promote(registry, 2)
    assert (first.version, second.version) == (1, 2)
    assert second == registry.resolve("m@production") == registry.resolve("m@2") == registry.resolve("m")
    assert second.aliases == ("production",)
    found = registry.resolve("m@1")
    assert (found.digest, found.verdict, found.run, found.aliases) == (digest_of(1), "pass", "run-1", ())
    assert found.gates == (gate,)
    assert registry.digests() == {digest_of(1), digest_of(2)}
    assert [version.version for version in registry.list()] == [1, 2]
    assert registry.verify() == []


def test_the_log_says_who_when_what_and_which_verdict(registry: Registry) -> None:
    promote(registry, 1)
    (entry,) = registry.log.entries()
    assert entry["action"] == "promote"
    assert (entry["name"], entry["alias"], entry["version"], entry["digest"]) == ("m", "production", 1, digest_of(1))
    assert (entry["verdict"], entry["waiver"], entry["run"]) == ("pass", None, "run-1")
    assert entry["who"]
    assert entry["host"]
    assert datetime.fromisoformat(entry["when"]).tzinfo is not None


def test_the_same_promotion_again_changes_and_logs_nothing(registry: Registry) -> None:
    assert promote(registry, 1) == promote(registry, 1)
    assert len(registry.log.entries()) == 1


def test_a_digest_keeps_its_version_when_an_alias_moves(registry: Registry) -> None:
    promote(registry, 1, "staging")
    promote(registry, 2)
    moved = promote(registry, 1)
    assert (moved.version, moved.aliases) == (1, ("production", "staging"))
    assert [version.version for version in registry.list()] == [1, 2]
    assert len(registry.log.entries()) == 3


def test_names_are_apart(registry: Registry) -> None:
    assert promote(registry, 1, name="a").version == promote(registry, 1, name="b").version == 1
    assert registry.resolve("a@production").aliases == ("production",)


@pytest.mark.parametrize("verdict", ["fail", "inconclusive", None, "PASS", ""])
def test_anything_but_a_pass_is_refused(registry: Registry, verdict: str | None) -> None:
    with pytest.raises(PromotionRefused, match="not pass") as caught:
        promote(registry, 1, verdict=verdict)
    assert caught.value.exit_code == 1
    assert registry.list() == []
    assert registry.log.entries() == []


def test_a_waiver_is_logged(registry: Registry) -> None:
    version = promote(registry, 1, verdict="fail", waiver=WAIVER)
    assert (version.verdict, version.waiver, version.waiver_expired) == ("fail", WAIVER, False)
    assert registry.log.entries()[0]["waiver"] == {"reason": "customer can't wait", "expires": TOMORROW}


def test_a_pass_needs_no_waiver_and_replaces_one(registry: Registry) -> None:
    promote(registry, 1, verdict="inconclusive", waiver=WAIVER)
    version = promote(registry, 1, waiver=WAIVER)
    assert (version.version, version.verdict, version.waiver) == (1, "pass", None)


@pytest.mark.parametrize(
    ("reason", "expires", "why"),
    [
        ("", TOMORROW, "no reason"),
        ("  ", TOMORROW, "no reason"),
        ("because", "2020-01-01", "ended"),
        ("because", "2020-01-01T10:00:00Z", "ended"),
        ("because", "", "no date"),
        ("because", "soon", "no date"),
        ("because", "2026-02-31", "no date"),
    ],
)
def test_a_waiver_without_reason_or_future_is_refused(registry: Registry, reason: str, expires: str, why: str) -> None:
    with pytest.raises(PromotionRefused, match=why):
        promote(registry, 1, verdict="fail", waiver=Waiver(reason, expires))
    assert registry.log.entries() == []


def test_a_waiver_counts_to_the_end_of_its_day(monkeypatch: pytest.MonkeyPatch) -> None:
    today = datetime.now(timezone.utc).date()
    assert not Waiver("r", today.isoformat()).expired
    assert Waiver("r", (today - timedelta(days=1)).isoformat()).expired
    in_an_hour = datetime.now(timezone.utc) + timedelta(hours=1)
    assert not Waiver("r", in_an_hour.isoformat()).expired
    assert not Waiver("r", in_an_hour.replace(tzinfo=None).isoformat() + "Z").expired
    assert Waiver("r", (in_an_hour - timedelta(hours=2)).replace(tzinfo=None).isoformat()).expired


def test_a_version_whose_waiver_ended_says_so_and_is_not_rolled_back_to(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(registry, 1, verdict="fail", waiver=WAIVER)
    promote(registry, 2)
    monkeypatch.setattr(Waiver, "expired", True)
    assert registry.resolve("m@1").waiver_expired
    assert not registry.resolve("m@2").waiver_expired
    with pytest.raises(PromotionRefused, match="waiver that ended"):
        registry.rollback("m", "production")
    assert registry.resolve("m@production").version == 2


def test_rollback_goes_back_step_by_step(registry: Registry) -> None:
    for what in (1, 2, 3):
        promote(registry, what)
    assert registry.rollback("m", "production").version == 2
    assert registry.rollback("m", "production").version == 1
    with pytest.raises(RegistryError, match="no version before 1"):
        registry.rollback("m", "production")
    assert registry.rollback("m", "production", to=3).version == 3
    assert registry.rollback("m", "production").version == 1
    assert [entry["action"] for entry in registry.log.entries()] == ["promote"] * 3 + ["rollback"] * 4
    assert registry.verify() == []


def test_rollback_only_to_where_the_alias_has_been(registry: Registry) -> None:
    promote(registry, 1)
    promote(registry, 2, "staging")
    with pytest.raises(RegistryError, match="never pointed at version 2"):
        registry.rollback("m", "production", to=2)
    with pytest.raises(RegistryError, match="there is m@production, m@staging"):
        registry.rollback("m", "nothing")


@pytest.mark.parametrize(
    "reference", ["m@nothing", "m@3", "m@0", "m@", "x", "", "@production", "m@-1", "m@01", "m@production@2"]
)
def test_a_reference_to_nothing(registry: Registry, reference: str) -> None:
    promote(registry, 1)
    with pytest.raises(RegistryError, match="there is m@production"):
        registry.resolve(reference)


@pytest.mark.parametrize("name", ["", "..", "a/b", "../x", "a..b", "a b", "-a", ".a", "a@b", "a\n", "é", "x" * 65])
def test_names_that_could_be_paths_are_refused(registry: Registry, name: str) -> None:
    with pytest.raises(RegistryError, match="not a model name"):
        promote(registry, 1, name=name)
    with pytest.raises(RegistryError, match="not a"):
        promote(registry, 1, name)
    assert not registry.root.exists()


def test_an_alias_is_no_number_and_a_digest_is_one(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="can't be a number"):
        promote(registry, 1, "3")
    with pytest.raises(RegistryError, match="not an artifact's digest"):
        registry.promote("m", "a", "sha256:12", verdict="pass", run="r", recipe_digest="d")


PROMOTER = """
import sys
from optimize.artifact import digest_of
from optimize.registry import Registry
registry = Registry(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for what in range(3):
    digest = digest_of([sys.argv[2], what])
    registry.promote("m", "production", digest, verdict="pass", run="r", recipe_digest="d")
"""


def test_eight_processes_promote_at_once(registry: Registry) -> None:
    command = [sys.executable, "-c", PROMOTER, str(registry.root)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    promoters = [subprocess.Popen([*command, str(number)], **pipes) for number in range(8)]
    for promoter in promoters:
        assert promoter.stdout.readline() == "ready\n"
    for promoter in promoters:
        promoter.stdin.write("go\n")
        promoter.stdin.flush()
    for promoter in promoters:
        promoter.communicate(timeout=60)
        assert promoter.returncode == 0
    versions = registry.list()
    assert [version.version for version in versions] == list(range(1, 25))
    assert {version.digest for version in versions} == {
        digest_of([str(n), what]) for n in range(8) for what in range(3)
    }
    assert registry.resolve("m@production").version == 24
    assert registry.verify() == []


def test_a_changed_log_is_found_and_not_built_upon(registry: Registry) -> None:
    promote(registry, 1)
    promote(registry, 2, verdict="fail", waiver=WAIVER)
    promote(registry, 3)
    path = registry.root / "audit" / "00000002.json"
    path.write_text(path.read_text().replace('"fail"', '"pass"'))
    assert "00000002.json" in registry.verify()[0]
    for use in (registry.list, lambda: registry.resolve("m@production"), lambda: promote(registry, 4)):
        with pytest.raises(RegistryError, match=r"00000002\.json has been changed"):
            use()


def test_an_entry_of_a_later_version_is_told(registry: Registry) -> None:
    registry.log.append(lambda _: {"action": "retire", "name": "m", "alias": "a", "version": 1})
    assert "unknown action 'retire'" in registry.verify()[0]
    registry.log.append(lambda _: {"action": "promote"})
    json.dumps(registry.verify())


@given(
    st.lists(
        st.tuples(st.just("promote"), st.sampled_from("ab"), st.integers(0, 4))
        | st.tuples(st.just("rollback"), st.sampled_from("ab"), st.none() | st.integers(1, 5)),
        max_size=12,
    )
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_history(tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, str, Any]]) -> None:
    """Against a model: digests in order of appearance, and a list of versions for each alias."""
    registry = Registry(tmp_path_factory.mktemp("r"))
    digests: list[int] = []
    trails: dict[str, list[int]] = {}
    ever: dict[str, set[int]] = {}
    for action, alias, what in actions:
        trail = trails.setdefault(alias, [])
        if action == "promote":
            if what not in digests:
                digests.append(what)
            version = digests.index(what) + 1
            assert promote(registry, what, alias).version == version
            if trail[-1:] != [version]:
                trail.append(version)
            ever.setdefault(alias, set()).add(version)
        elif (what is None and len(trail) < 2) or (what is not None and what not in ever.get(alias, ())):
            with pytest.raises(RegistryError):
                registry.rollback("m", alias, what)
        else:
            target = trail[-2] if what is None else what
            assert registry.rollback("m", alias, what).version == target
            if target in trail:
                del trail[len(trail) - trail[::-1].index(target) :]
            else:
                trail.append(target)
    assert [version.digest for version in registry.list()] == [digest_of(what) for what in digests]
    for alias, trail in trails.items():
        if trail:
            assert registry.resolve(f"m@{alias}").version == trail[-1]
    assert registry.verify() == []
