"""`optimize init`: what it guesses, that the result validates, and that it overwrites nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from optimize.commands.init import guess_columns, init, read_rows, recipes
from optimize.errors import RecipeError
from optimize.recipe import load


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    """A file in the format of its ending."""
    if path.suffix in (".csv", ".tsv"):
        separator = "," if path.suffix == ".csv" else "\t"
        lines = [separator.join(map(str, row.values())) for row in rows]
        path.write_text("\n".join([separator.join(rows[0]), *lines]), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        import pyarrow as pa
        import pyarrow.parquet

        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def reviews(count: int = 60) -> list[dict[str, object]]:
    return [
        {"id": i, "stars": 1.5 + i % 5, "review": f"sentence {i} of a longer review", "verdict": "pn"[i % 2]}
        for i in range(count)
    ]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_columns_are_guessed_in_every_format(tmp_path: Path, ending: str) -> None:
    path = write_rows(tmp_path / f"rows.{ending}", reviews())
    columns = guess_columns(read_rows(path), path)
    assert (columns.text, columns.text_pair, columns.label, columns.values) == ("review", None, "verdict", ("n", "p"))


def test_names_that_people_use_come_first(tmp_path: Path) -> None:
    rows = [
        {"Sentence": f"no {i}", "comment": f"many more words {i}", "lang": "ab"[i % 2], "Label": i % 3}
        for i in range(60)
    ]
    columns = guess_columns(rows, tmp_path)
    assert (columns.text, columns.label, columns.values) == ("Sentence", "Label", ("0", "1", "2"))


def test_pairs(tmp_path: Path) -> None:
    rows = [{"premise": f"it rains {i}", "hypothesis": f"it is wet {i}", "label": i % 2} for i in range(60)]
    columns = guess_columns(rows, tmp_path)
    assert (columns.text, columns.text_pair, columns.label) == ("premise", "hypothesis", "label")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.csv", "", "no rows"),
        ("rows.csv", "text\na b\nc d\ne f\n", "label"),
        ("rows.csv", "a,b\n1,2\n2,1\n1,2\n2,1\n", "text"),
        ("rows.jsonl", "{", "no jsonl file"),
        ("rows.xlsx", "", "no idea"),
        (None, "", "can't be read"),
    ],
)
def test_rows_that_say_too_little(tmp_path: Path, pico_model: Path, name: str | None, content: str, told: str) -> None:
    data = tmp_path / (name or "missing.csv")
    if name:
        data.write_text(content, encoding="utf-8")
    with pytest.raises(RecipeError, match=told):
        init(tmp_path / "recipe.yaml", model=str(pico_model), data=data)
    assert not (tmp_path / "recipe.yaml").exists()


def test_a_recipe_for_ones_own_model_and_data_validates(tmp_path: Path, pico_model: Path, pico_csv: Path) -> None:
    written = init(tmp_path / "mine.yaml", model=str(pico_model), data=pico_csv)
    recipe = load(written.file)
    assert recipe.baseline == "source"
    assert [stage.id for stage in recipe.stages] == ["export.onnx", "quantize.int8"]
    assert any("already trained" in guess for guess in written.guesses)
    assert any("negative, positive" in guess for guess in written.guesses)


def test_a_model_without_a_head_is_trained_first(tmp_path: Path, pico_csv: Path) -> None:
    model = tmp_path / 'a "model"'
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    data = tmp_path / "data" / "my rows: café.csv"
    data.parent.mkdir()
    data.write_bytes(pico_csv.read_bytes())
    written = init(tmp_path / "mine.yaml", model=str(model), data=data)
    document = yaml.safe_load(written.file.read_text(encoding="utf-8"))
    assert document["model"]["source"] == './a "model"'
    assert document["data"]["source"] == "./data/my rows: café.csv"
    assert document["name"] == "my-rows-caf"
    assert document["baseline"] == "finetune"
    assert document["stages"][0] == {"distill": "finetune", "epochs": 1}


def test_a_folder_that_is_no_model(tmp_path: Path, pico_csv: Path) -> None:
    with pytest.raises(RecipeError, match=r"config\.json"):
        init(tmp_path / "mine.yaml", model=str(tmp_path), data=pico_csv)
    with pytest.raises(RecipeError, match="no folder"):
        init(tmp_path / "mine.yaml", model="./nowhere", data=pico_csv)


def test_recipes_that_come_along_validate(tmp_path: Path) -> None:
    assert "quickstart" in recipes()
    for name in recipes():
        written = init(tmp_path / f"{name}.yaml", copy_of=name)
        assert load(written.file).digest == load(recipes()[name]).digest
        assert f"optimize apply {name}.yaml" in written.file.read_text(encoding="utf-8")
    with pytest.raises(RecipeError, match="comes along"):
        init(tmp_path / "other.yaml", copy_of="../pyproject")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("mine")
    with pytest.raises(RecipeError, match="already"):
        init(file, copy_of="quickstart")
    assert file.read_text() == "mine"
    init(file, copy_of="quickstart", force=True)
    assert file.read_text() != "mine"


@pytest.mark.parametrize("options", [{}, {"model": "./m"}, {"copy_of": "quickstart", "model": "./m"}])
def test_options_that_do_not_fit_together(tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="say what"):
        init(tmp_path / "recipe.yaml", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("stem", ["2024", "true", "1e5", "2024-01-31"])
def test_a_name_is_text_whatever_it_looks_like(tmp_path: Path, pico_model: Path, pico_csv: Path, stem: str) -> None:
    data = tmp_path / f"{stem}.csv"
    data.write_bytes(pico_csv.read_bytes())
    assert load(init(tmp_path / "mine.yaml", model=str(pico_model), data=data).file).name == stem


def test_a_home_folder_that_no_shell_expanded(
    tmp_path: Path, pico_model: Path, pico_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(pico_model.parent))
    written = init(tmp_path / "mine.yaml", model=f"~/{pico_model.name}", data=pico_csv)
    assert load(written.file).model.source == str(pico_model.resolve())
