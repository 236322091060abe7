"""Rows that are images: trees of folders, and tables that name files."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from optimize import tasks
from optimize.data import Data, prepare, prepared
from optimize.errors import SourceError
from optimize.work import Work

TASK = tasks.get("image-classification")
THIRDS = {"train": 0.5, "validation": 0.2, "evaluation": 0.3}


def run(work: Work, source: Path | None, **settings: object) -> Data:
    given = {"splits": THIRDS, **settings}
    return prepare(TASK.Data(source=source and str(source), **given), TASK, work, Path("/"))


def test_a_tree_of_folders(pico_images: Path, work: Work) -> None:
    data = run(work, pico_images)
    assert data.info == {"labels": ["dark", "light", "striped"]}
    rows = data.rows("evaluation")
    assert Counter(rows["label"].to_pylist()) == {0: 12, 1: 12, 2: 12}
    for row in rows.to_pylist():
        assert row["image"] == (pico_images / row["path"]).read_bytes()
        assert row["path"].startswith(data.info["labels"][row["label"]] + "/")


def test_a_changed_image_is_other_data(pico_images: Path, work: Work, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    shutil.copytree(pico_images, folder)
    config = TASK.Data(source=str(folder), splits=THIRDS)
    data = prepare(config, TASK, work, tmp_path)
    assert prepared(config, TASK, work, tmp_path) == data
    for number in range(40):
        shutil.copy(folder / "light" / f"{number}.png", folder / "dark" / f"{number}.png")
    assert prepared(config, TASK, work, tmp_path) is None
    # By other names, and with other labels, they are the same images.
    with pytest.raises(SourceError, match=r"rows are in more than one split.*/\d+\.png"):
        prepare(config, TASK, work, tmp_path)


def test_a_table_names_images_of_its_folder(pico_images: Path, work: Work, tmp_path: Path) -> None:
    shutil.copytree(pico_images, tmp_path / "rows" / "photos")
    names = [path.relative_to(tmp_path / "rows") for path in sorted((tmp_path / "rows").rglob("*.png"))]
    lines = [f"./{name.as_posix()},{'odd' if number % 2 else 'even'}" for number, name in enumerate(names)]
    (tmp_path / "rows" / "rows.csv").write_text("\n".join(["file,kind", *lines]))
    data = run(work, tmp_path / "rows", image="file", label="kind")
    assert data.info == {"labels": ["even", "odd"]}
    rows = data.rows("validation").to_pylist()
    assert all(row["image"] == (tmp_path / "rows" / row["path"]).read_bytes() for row in rows)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "linked/secret.png", "missing.png"])
def test_paths_stay_in_the_folder(name: str, pico_images: Path, work: Work, tmp_path: Path) -> None:
    shutil.copy(pico_images / "dark" / "0.png", tmp_path / "secret.png")
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path)
    (folder / "rows.csv").write_text(f"image,label\n{name},a\n")
    with pytest.raises(SourceError, match=r"not among its files|leads out of its folder"):
        run(work, folder)


def test_a_table_alone_has_no_images(work: Work, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("image,label\na.png,x\n")
    with pytest.raises(SourceError, match=r"row 1 of .* names the image 'a.png'") as caught:
        run(work, tmp_path / "rows.csv")
    assert "set data.source to the folder" in str(caught.value)


def test_bytes_in_a_column(pico_images: Path, work: Work, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = sorted(pico_images.rglob("*.png"))
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    pq.write_table(pa.table({"image": cells, "label": [path.parent.name for path in paths]}), tmp_path / "a.parquet")
    data = run(work, tmp_path / "a.parquet")
    pq.write_table(
        pa.table({"image": [cell["bytes"] for cell in cells], "label": [path.parent.name for path in paths]}),
        tmp_path / "b.parquet",
    )
    same = run(work, tmp_path / "b.parquet")
    for split in THIRDS:
        assert same.rows(split)["image"].to_pylist() == data.rows(split)["image"].to_pylist()


def test_every_split_may_have_a_tree_of_its_own(pico_images: Path, work: Work, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(pico_images.rglob("*.png"))):
        target = tmp_path / ("train" if number % 2 else "test") / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    places = {"train": str(tmp_path / "train"), "evaluation": str(tmp_path / "test")}
    assert run(work, None, splits=places).num_rows == {"train": 60, "evaluation": 60}


def test_images_in_no_folder_have_no_class(pico_images: Path, work: Work) -> None:
    with pytest.raises(SourceError, match="lies in no folder that would say its class"):
        run(work, pico_images / "dark")


def test_a_table_without_a_header(work: Work, tmp_path: Path) -> None:
    lines = [f"{i % 17},{i % 13},{i % 11},{i % 7},{i % 2}" for i in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    data = run(work, tmp_path / "rows.csv", header=False, label="4", pixels={"size": (2, 2), "max": 16})
    assert data.info == {"labels": ["0", "1"]}
    assert sum(data.num_rows.values()) == 40
