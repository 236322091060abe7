"""Images, their labels, and the two kinds of model that classify them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from optimize import runtimes
from optimize.artifact import Artifact
from optimize.errors import EvaluationError, OptimizeError, SourceError
from optimize.evaluate.metrics import TOP5
from optimize.model import Model
from optimize.tasks import images
from optimize.tasks.image_classification import ImageClassification, ImageClassificationData, Pixels

TASK = ImageClassification()
SPEC = {"name": "image-classification", "labels": ["dark", "light", "striped"]}


def png(size: tuple[int, int] = (12, 12), level: int = 100, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, level if mode == "L" else (level,) * len(mode)).save(stream, "PNG")
    return stream.getvalue()


def table(contents: list[bytes], labels: list[str]) -> pa.Table:
    return pa.table({"image": [{"bytes": content, "path": None} for content in contents], "label": labels})


def config(**settings: object) -> ImageClassificationData:
    return ImageClassificationData(source="rows", **settings)


# Rows


def test_rows_are_the_bytes_of_files() -> None:
    contents = [png(level=level) for level in (1, 2, 3)]
    rows, info = TASK.prepare(table(contents, ["b", "a", "b"]), config())
    assert info == {"labels": ["a", "b"]}
    assert rows["image"].to_pylist() == contents
    assert rows["label"].to_pylist() == [1, 0, 1]
    assert TASK.spec(config(), info) == {"name": "image-classification", "labels": ["a", "b"]}


def test_columns_of_pixels_become_images() -> None:
    values = np.arange(16).reshape(2, 8)
    columns = {str(i): values[:, i] for i in range(8)} | {"digit": [7, 8]}
    rows, info = TASK.prepare(pa.table(columns), config(pixels={"size": [2, 4], "max": 15}, label="digit"))
    assert info["labels"] == ["7", "8"]
    assert images.pixels(rows["image"][1].as_py(), 1).tolist() == [(values[1] * 17).reshape(2, 4).tolist()]


@pytest.mark.parametrize(
    ("pixels", "told"),
    [
        ({"size": (3, 3)}, "need 9 columns beside the label, and there are 2"),
        ({"size": (1, 2), "max": 5}, "row 2 has pixels that are missing or not between 0 and 5"),
    ],
)
def test_pixels_that_make_no_image(pixels: dict[str, object], told: str) -> None:
    columns = pa.table({"0": [1, 2], "1": [3, 9], "label": ["a", "b"]})
    with pytest.raises(SourceError, match=told):
        TASK.prepare(columns, config(pixels=Pixels(**pixels)))


def test_an_image_that_is_cut_off_is_named() -> None:
    good = png()
    with pytest.raises(SourceError, match="the image of row 2 can't be read"):
        TASK.prepare(table([good, good[: len(good) // 2]], ["a", "b"]), config())


def test_a_decompression_bomb_is_refused_unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = png((400, 300))
    monkeypatch.setattr(images, "MAX_PIXELS", 100_000)
    with pytest.raises(SourceError, match="row 1 would unpack to 400 x 300 pixels"):
        TASK.prepare(table([bomb], ["a"]), config())


def test_formats_that_start_programs_are_not_read() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(SourceError, match="row 1 can't be read"):
        TASK.prepare(table([postscript], ["a"]), config())


# Inputs


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_every_kind_of_image_has_three_channels(mode: str, pico_vit: Artifact) -> None:
    processor = TASK.preprocessor(pico_vit.path)
    batch = TASK.collate(processor, [{"image": png((20, 30), 255, mode)}, {"image": png((12, 12), 0)}])
    assert list(batch) == ["pixel_values"]
    assert (batch["pixel_values"].shape, batch["pixel_values"].dtype) == ((2, 3, 12, 12), np.float32)
    assert np.allclose(batch["pixel_values"][0], 1)
    assert np.allclose(batch["pixel_values"][1], -1)


def test_a_processor_of_one_channel_gives_grey(tmp_path: Path) -> None:
    from optimize.source.image import Image as Wanted

    wanted = Wanted(size=(4, 6), channels=1, mean=(0.25,), std=(0.5,)).processor()
    (tmp_path / images.PROCESSOR).write_text(json.dumps(wanted))
    batch = TASK.collate(TASK.preprocessor(tmp_path), [{"image": png(level=255)}])
    assert batch["pixel_values"].shape == (1, 1, 4, 6)
    assert np.allclose(batch["pixel_values"], 1.5)


def test_the_photograph_is_turned_as_the_camera_noted() -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("L", (6, 2)).save(stream, "PNG", exif=exif)
    assert images.decode(stream.getvalue()).size == (2, 6)


def test_latency_inputs_repeat_real_rows(pico_vit: Artifact) -> None:
    rows = pa.table({"image": pa.array([png(level=0), png(level=255)], pa.large_binary())})
    inputs = TASK.latency_inputs(TASK.preprocessor(pico_vit.path), rows, SPEC, batch_size=3, sequence_length=0)
    assert inputs["pixel_values"][:, 0, 0, 0].tolist() == [-1, 1, -1]


# Outputs


def test_top5_against_sorting() -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(200, 9)), rng.integers(0, 9, 200)
    among = [target in np.argsort(-row)[:5] for row, target in zip(logits, targets, strict=True)]
    assert TOP5.compute(logits, targets) == pytest.approx(np.mean(among))
    assert TOP5.per_row is not None
    assert TOP5.per_row(logits, targets).tolist() == among
    assert TOP5.compute(logits[:, :4], targets % 4) == 1


def test_flips_say_which_image_and_hold_no_pixels() -> None:
    rows = pa.table({"image": [b"1", b"2"], "path": ["dark/1.png", None], "label": [0, 1]})
    now, then = np.eye(3, dtype="float32")[[1, 1]], np.eye(3, dtype="float32")[[0, 1]]
    (flip,) = TASK.flips(None, rows, now, then, SPEC) or []
    assert {"row": 0, "path": "dark/1.png", "label": 0}.items() <= flip.items()
    assert (flip["baseline"]["label"], flip["candidate"]["label"]) == ("dark", "light")
    assert "image" not in flip


# Models


def test_predict_takes_paths_images_and_arrays(pico_vit: Artifact, tmp_path: Path) -> None:
    model = Model(pico_vit, threads=1)
    (tmp_path / "a.png").write_bytes(png(level=30))
    array = np.full((12, 12, 3), 30, np.uint8)
    inputs = [tmp_path / "a.png", str(tmp_path / "a.png"), png(level=30), Image.fromarray(array), array]
    answers = model.predict([*inputs, {"image": array[..., 0]}])
    assert len({(answer["label"], round(answer["score"], 6)) for answer in answers}) == 1
    assert answers[0]["label"] in SPEC["labels"]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("nowhere.png", "no image at nowhere.png"),
        (b"no image", "input 1 can't be read"),
        (np.zeros((4, 4)), "an array of float64 and shape \\[4, 4\\] is no image"),
        (7, "int is no image"),
    ],
)
def test_what_is_no_image(value: object, told: str) -> None:
    with pytest.raises(OptimizeError, match=told):
        TASK.rows_of([value])


def test_the_head_must_be_for_these_labels(pico_vit: Artifact) -> None:
    assert TASK.check_source(pico_vit.path, SPEC)
    other = {**SPEC, "labels": ["cat", "dog"]}
    with pytest.raises(SourceError, match="labels that don't match") as caught:
        TASK.check_source(pico_vit.path, other)
    assert "data.new_head: true" in str(caught.value)
    assert not TASK.check_source(pico_vit.path, {**other, "new_head": True})
    assert TASK.load_model(pico_vit.path, {**other, "new_head": True}).classifier.out_features == 2


def test_as_many_outputs_as_labels(pico_module: Artifact) -> None:
    runner = runtimes.open_artifact(pico_module, 1)
    rows = TASK.rows_of([png()])
    with pytest.raises(EvaluationError, match=r"outputs of shape \[3\] an image for 2 labels"):
        TASK.respond(runner, TASK.preprocessor(pico_module.path), rows, {**SPEC, "labels": ["a", "b"]}, batch_size=1)
