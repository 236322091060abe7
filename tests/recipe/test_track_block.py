"""The block `track`: how it may be written, what is wrong with it, and what it has no part in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from optimize.errors import RecipeError
from optimize.recipe import json_schema, load
from optimize.recipe.reader import read

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def recipe(track: Any) -> dict[str, Any]:
    return {**read(QUICKSTART).value, "track": track}


def loaded(track: Any) -> list[dict[str, Any]]:
    return [target.document() for target in load(recipe(track), env=False, base=QUICKSTART.parent).track]


BLOCK = {"to": "mlflow", "timeout_seconds": 60.0, "uri": None, "experiment": None}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (None, []),
        ([], []),
        ("mlflow", [BLOCK]),
        ({"to": "mlflow", "uri": "http://127.0.0.1:5000"}, [{**BLOCK, "uri": "http://127.0.0.1:5000"}]),
        (["mlflow", {"to": "mlflow", "experiment": "x"}], [BLOCK, {**BLOCK, "experiment": "x"}]),
    ],
)
def test_how_it_may_be_written(written: Any, meant: Any) -> None:
    assert loaded(written) == meant
    jsonschema.validate(recipe(written), json_schema())


def test_it_is_no_part_of_the_digest_and_survives_being_written() -> None:
    plain, sent = load(QUICKSTART), load(recipe(["tensorboard", "wandb"]), base=QUICKSTART.parent)
    assert sent.digest == plain.digest
    assert "track" not in plain.document()
    again = load(sent.document(), base=QUICKSTART.parent)
    assert again.track == sent.track
    assert [target.to for target in again.track] == ["tensorboard", "wandb"]


@pytest.mark.parametrize(
    ("written", "where", "said", "hint"),
    [
        ("mlfow", "track", "no tracker is named 'mlfow'", "did you mean `mlflow`?"),
        ({"to": "mlfow"}, "track.to", "no tracker is named 'mlfow'", "did you mean `mlflow`?"),
        ({"to": "mlflow", "ur": "x"}, "track.ur", "unknown key `ur`", "did you mean `uri`?"),
        ({"uri": "x"}, "track", "the key `to` is missing", "one of mlflow, tensorboard, wandb"),
        (3, "track", "expected a string or a mapping of keys or a list, got 3", None),
        ([3], "track[0]", "expected a tracker's name or a mapping of keys, got 3", None),
        ({"to": "wandb", "mode": "off"}, "track.mode", "expected one of online, offline, got 'off'", None),
        ({"to": "mlflow", "timeout_seconds": 0}, "track.timeout_seconds", "expected a number above 0, got 0", None),
        (["wandb"] * 11, "track", "at most 10 trackers", None),
    ],
)
def test_mistakes(written: Any, where: str, said: str, hint: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        loaded(written)
    (found,) = caught.value.diagnostics
    assert (found.path, found.message) == (where, said)
    assert hint is None or found.hint == hint


def test_a_library_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimize.recipe.track.installed", lambda name: False)
    with pytest.raises(RecipeError) as caught:
        loaded({"to": "wandb"})
    (found,) = caught.value.diagnostics
    assert (found.path, found.message) == ("track.to", "`wandb` is not installed here")
    assert found.hint == 'pip install "optimize-workbench[wandb]"'


@pytest.mark.parametrize("form", ["file", "mapping", "override", "variable"])
def test_a_password_is_refused_and_told_nowhere(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "https://ada:s3cr3t@host"
    whole = {"to": "mlflow", "uri": address, "exprimnt": "x"}
    given: Any = recipe(whole if form in ("file", "mapping") else {"to": "mlflow"})
    overrides = [f"track.uri={address}"] if form == "override" else []
    if form == "variable":
        monkeypatch.setenv("OPTIMIZE_RECIPE__TRACK__URI", address)
    if form == "file":
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(given, default_flow_style=None, width=500), encoding="utf-8")
        given = path
    with pytest.raises(RecipeError) as caught:
        load(given, overrides, base=QUICKSTART.parent)
    assert "is no place for a password" in str(caught.value)
    assert "s3cr3t" not in str(caught.value) + repr(caught.value.diagnostics)
