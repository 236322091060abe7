"""Image classification: one image, one label out of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from optimize.config import Block
from optimize.data import DataConfig
from optimize.errors import EvaluationError, SourceError
from optimize.evaluate.metrics import ACCURACY, MACRO_F1, TOP5
from optimize.runtimes.pytorch import FRESH
from optimize.tasks import Features, Inputs, Metric, Task, images
from optimize.tasks.columns import labels, listed
from optimize.tasks.heads import answers, has_head
from optimize.tasks.pretrained import load_model, read_config

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

HEAD = "ForImageClassification"
PIXELS = "pixel_values"
"""What transformers and exported graphs call the input."""


class Pixels(Block):
    """Images that stand in columns of numbers, a pixel each: row by row, its channels side by side."""

    size: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=2, max_length=2)]
    """[height, width]."""
    channels: Literal[1, 3] = 1
    """1: grey. 3: red, green, blue."""
    max: float = Field(255, gt=0)
    """The number that means white; 0 means black."""


class ImageClassificationData(DataConfig):
    """The `data` block of `task: image-classification`.

    A folder of folders, each named after its label, needs no column at all.
    """

    image: str = "image"
    """The column of the image: its file's bytes, or its path in the folder that is the source."""
    pixels: Pixels | None = None
    """Take the images from columns of numbers: all columns but the label's, in their order."""
    label: str = "label"
    """The column of the label: a name, or a whole number."""
    labels: list[str] | dict[str | int, str] | None = None
    """The labels' names in the order of the model's outputs; or value in the data -> name, in that order (several
    values may share a name). The default is what the data holds, sorted."""
    new_head: bool = False
    """Replace a head that was trained for other labels (ImageNet's, mostly) by a new one, to be trained first."""

    @property
    def image_column(self) -> str | None:
        return None if self.pixels else self.image


class ImageClassification(Task):
    """`spec`: {"name", "labels": names in the order of the model's outputs}, and `new_head` where one was asked for.

    Rows have the columns `image` (the bytes of an image file), `path` (where it came from, for people; null where that
    is not known) and `label` (int64: the index of the name). Features keep the file's bytes: `collate` decodes a batch
    at a time, so that memory stays bounded.
    """

    name: ClassVar[str] = "image-classification"
    Data: ClassVar[type[DataConfig]] = ImageClassificationData
    metrics: ClassVar[Mapping[str, Metric]] = {metric.name: metric for metric in (ACCURACY, TOP5, MACRO_F1)}
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy", "top5")
    per_row: ClassVar[bool] = True
    has_length: ClassVar[bool] = False
    plain_modules: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("pillow",)
    extra: ClassVar[str | None] = "vision"
    notes: ClassVar[tuple[str, ...]] = ("path",)

    # Rows

    def prepare(self, table: pa.Table, config: ImageClassificationData) -> tuple[pa.Table, dict[str, Any]]:
        import pyarrow as pa

        wanted = {"label": config.label, **({} if config.pixels else {"image": config.image})}
        for key, column in wanted.items():
            if column not in table.column_names:
                raise SourceError(
                    f"the data has no column {column!r} for `data.{key}`",
                    hint=f"choose one of {', '.join(map(repr, table.column_names[:50]))}",
                )
        if config.pixels:
            contents = _from_pixels(table.drop_columns([config.label]), config.pixels)
            paths: list[str | None] = [None] * len(contents)
        else:
            cells = table[config.image].to_pylist()
            contents, paths = [cell["bytes"] for cell in cells], [cell["path"] for cell in cells]
            for number, (content, path) in enumerate(zip(contents, paths, strict=True), start=1):
                images.check(content, f"the image of row {number}" + (f" ({path})" if path else ""))
        names, indices = labels(table, config.label, config.labels)
        columns = {
            "image": pa.array(contents, pa.large_binary()),
            "path": pa.array(paths, pa.string()),
            "label": pa.array(indices, pa.int64()),
        }
        return pa.table(columns), {"labels": names}

    def spec(self, config: ImageClassificationData, info: Mapping[str, Any]) -> dict[str, Any]:
        new_head = {"new_head": True} if config.new_head else {}
        return {"name": self.name, "labels": list(info["labels"]), **new_head}

    def rows_of(self, inputs: Sequence[Any]) -> pa.Table:
        """Paths, bytes of image files, pillow's images, or arrays of uint8 [height, width] or [height, width, 3]."""
        import pyarrow as pa

        contents = [images.image_bytes(value) for value in inputs]
        for number, content in enumerate(contents, start=1):
            images.check(content, f"input {number}")
        return pa.table({"image": pa.array(contents, pa.large_binary())})

    # The model

    def check_source(self, path: Path, spec: Mapping[str, Any]) -> bool:
        config = read_config(path / "config.json")
        if "module" in config:
            return not config.get(FRESH, False)
        try:
            return has_head(path, HEAD, spec["labels"], "or train a new one (data.new_head: true)")
        except SourceError:
            if spec.get("new_head"):
                return False
            raise

    def load_model(self, path: Path, spec: Mapping[str, Any], *, trust_remote_code: bool = False) -> Any:
        """Of a folder that names a factory, the user's own module: it takes pixels and gives logits."""
        if "module" in read_config(path / "config.json"):
            from optimize.runtimes import pytorch

            return pytorch.load(path, trusted=trust_remote_code)
        names = spec["labels"]
        return load_model(
            "AutoModelForImageClassification",
            path,
            trained=self.check_source(path, spec),
            trust_remote_code=trust_remote_code,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            ignore_mismatched_sizes=bool(spec.get("new_head")),
        )

    def preprocessor(self, path: Path, *, trust_remote_code: bool = False) -> Any:
        return images.load_processor(path, trust_remote_code=trust_remote_code)

    # Inputs

    def encode(self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any]) -> list[Features]:
        return [{"image": content.as_py()} for content in rows["image"]]

    def collate(self, preprocessor: Any, features: Sequence[Features], length: int | None = None) -> Inputs:
        """{"pixel_values": float32 [batch, channels, height, width]}; images have no length."""
        mean = getattr(preprocessor, "image_mean", None)
        channels = len(mean) if isinstance(mean, (list, tuple)) else 3
        arrays = [images.pixels(row["image"], channels) for row in features]
        encoded = preprocessor(arrays, return_tensors="np", input_data_format="channels_first")
        return {PIXELS: encoded[PIXELS].astype("float32", copy=False)}

    def latency_inputs(
        self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any], *, batch_size: int, sequence_length: int
    ) -> Inputs:
        chosen = rows.take([i % rows.num_rows for i in range(batch_size)])
        return self.collate(preprocessor, self.encode(preprocessor, chosen, spec))

    # Outputs

    def read_outputs(self, raw: Mapping[str, NDArray[Any]], inputs: Inputs) -> NDArray[Any]:
        """Logits [batch, labels]."""
        if "logits" not in raw:
            raise EvaluationError(f"the model gives no `logits`, but {listed(raw)}")
        return raw["logits"].astype("float32", copy=False)

    def combine(
        self, outputs: Sequence[Any], features: Sequence[Features], rows: pa.Table, spec: Mapping[str, Any]
    ) -> NDArray[Any]:
        logits = super().combine(outputs, features, rows, spec)
        if logits.shape[1:] != (len(spec["labels"]),):
            raise EvaluationError(
                f"the model gives outputs of shape {list(logits.shape[1:])} an image for {len(spec['labels'])} labels",
                hint="give the module as many outputs (model.module_args), or name its labels with data.labels",
            )
        return logits

    def targets(self, rows: pa.Table) -> NDArray[Any]:
        """The index of each row's label [n]."""
        return rows["label"].to_numpy()  # type: ignore[no-any-return]

    def answers(self, outputs: NDArray[Any], spec: Mapping[str, Any]) -> list[dict[str, Any]]:
        """[{"label": name, "score": its probability}], a row each."""
        return answers(outputs, spec["labels"])

    def flips(
        self,
        preprocessor: Any,
        rows: pa.Table,
        outputs: NDArray[Any],
        reference: NDArray[Any],
        spec: Mapping[str, Any],
    ) -> list[dict[str, Any]] | None:
        """Each with its path; the row's number says which it is where there is none."""
        return super().flips(preprocessor, rows.drop_columns(["image"]), outputs, reference, spec)


def _from_pixels(columns: pa.Table, config: Pixels) -> list[bytes]:
    """Images of 8 bits, a row each. Raises `SourceError` where a column holds no numbers, or there are too few."""
    import numpy as np
    import pyarrow as pa

    height, width = config.size
    count = height * width * config.channels
    if columns.num_columns != count:
        raise SourceError(
            f"images of {height} x {width} pixels and {config.channels} channels need {count} columns beside the "
            f"label, and there are {columns.num_columns}",
            hint="look at data.pixels and data.label",
        )
    for field in columns.schema:
        if not (pa.types.is_integer(field.type) or pa.types.is_floating(field.type)):
            raise SourceError(f"column {field.name!r} holds {field.type}, and no pixels")
    values = np.stack([columns[name].to_numpy().astype(np.float64) for name in columns.column_names], axis=1)
    wrong = ~((values >= 0) & (values <= config.max)).all(axis=1)
    if wrong.any():
        raise SourceError(
            f"row {int(wrong.argmax()) + 1} has pixels that are missing or not between 0 and {config.max:g}",
            hint="set data.pixels.max to the number that means white",
        )
    scaled = np.rint(values * (255 / config.max)).astype(np.uint8)
    return [images.netpbm(row) for row in scaled.reshape(-1, height, width, config.channels)]
