"""A recipe as YAML: reading it gives the same digest, whatever is in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimize.errors import RecipeError
from optimize.recipe import Recipe, load, reader
from optimize.recipe.writing import _Dumper, short, to_yaml

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_our_own_recipes_come_back(path: Path, tmp_path: Path) -> None:
    recipe = load(path, env=False)
    saved = recipe.save(tmp_path / "saved.yaml")
    assert load(saved, env=False).digest == recipe.digest
    assert saved.stat().st_size < path.stat().st_size  # without comments and defaults


def test_what_equals_a_default_is_left_out() -> None:
    text = to_yaml(load(RECIPES[[path.stem for path in RECIPES].index("quickstart")], env=False))
    assert text.startswith("version: 1\nname: minilm-sentiment\nmodel:\n  source: wheel://")
    assert "  - export: onnx\n  - quantize: int8\nbaseline: teacher\n" in text
    assert not any(word in text for word in ("null", "backend", "seed", "from"))


def test_a_path_that_would_lead_elsewhere_is_refused(
    pico_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    rows = Path(pico_recipe["data"]["source"])
    (here / "rows.csv").write_bytes(rows.read_bytes())
    monkeypatch.chdir(here)
    recipe = Recipe(**{**pico_recipe, "data": {**pico_recipe["data"], "source": "rows.csv"}})
    assert load(recipe.save("recipe.yaml"), env=False).digest == recipe.digest
    with pytest.raises(RecipeError, match=r"`data\.source` is 'rows\.csv', a path that starts from") as caught:
        recipe.save(there / "recipe.yaml")
    assert "absolute" in str(caught.value.hint)
    assert not (there / "recipe.yaml").exists()


# Open-ended: any text and numbers, any settings


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(["on", "yes", "~", "1e-4", "1e5", "0o17", "1_000", ".5", "-", "=", "<<", "null", "12:30", "0x1f"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@given(st.dictionaries(st.text(max_size=8).filter(lambda key: not any("\ud800" <= c <= "\udfff" for c in key)), VALUES))
@settings(max_examples=200, deadline=None)
def test_the_reader_reads_what_was_written(value: dict[str, Any]) -> None:
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    found = reader.parse(text.encode(), "test")
    assert not found.diagnostics, text
    assert found.value == value
    assert [type(part) for part in found.value.values()] == [type(part) for part in value.values()]


@given(
    epochs=st.integers(1, 9),
    rate=st.floats(1e-6, 1, exclude_min=True),
    mode=st.sampled_from(["dynamic", "static"]),
    per_channel=st.booleans(),
    ignore=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=9), max_size=2),
    fork=st.booleans(),
    samples=st.integers(1, 500),
    latency=st.none() | st.builds(dict, sequence_length=st.integers(1, 512), threads=st.integers(1, 4)),
    metrics=st.sampled_from([[], ["accuracy"], ["macro_f1"], ["macro_f1", "accuracy"]]),
    limit=st.sampled_from([{"max_drop": 0.02}, {"min": 0.5}, {"min_ratio": 0.97}]),
    gated=st.sampled_from(["accuracy", "macro_f1", "matthews"]),
    seed=st.integers(0, 2**31),
    name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_-]{0,20}\Z"),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_recipe_comes_back(
    pico_recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, **drawn: Any
) -> None:
    int8 = {"quantize": "int8", "name": "last", "mode": drawn["mode"], "per_channel": drawn["per_channel"]}
    int8 |= {"ignore": drawn["ignore"]}
    if drawn["mode"] == "static":
        int8 |= {"calibration": {"num_samples": drawn["samples"]}}
    trained = {"distill": "finetune", "name": drawn["name"] + "t", "epochs": drawn["epochs"]}
    stages = [{**trained, "learning_rate": drawn["rate"]}, {"export": "onnx"}, int8]
    if drawn["fork"]:
        stages.append({"export": "onnx", "name": "again", "from": trained["name"]})
    recipe = load(
        {
            **pico_recipe,
            "name": drawn["name"],
            "stages": stages,
            "baseline": trained["name"],
            "data": {**pico_recipe["data"], "seed": drawn["seed"]},
            "evaluate": {"metrics": drawn["metrics"], "latency": drawn["latency"]},
            "gates": [{"metric": drawn["gated"], **drawn["limit"]}],
        },
        env=False,
    )
    folder = tmp_path_factory.getbasetemp()
    again = load(recipe.save(folder / "any.yaml"), env=False)
    assert again.digest == recipe.digest
    assert short(again) == short(recipe)
    assert replace(again, file=None, base=recipe.base, gates=recipe.gates) == recipe  # gates know where they stand
    (folder / "any.yaml").unlink()
