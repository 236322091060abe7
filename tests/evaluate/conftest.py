"""A tiny ONNX classifier without a tokenizer, and runtimes that misbehave, installed as a third party's would be."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from optimize.artifact import Artifact, digest_of, sha256_file
from optimize.progress import Progress
from optimize.recipe import Evaluate
from optimize.tasks.text_classification import TextClassification
from optimize.work import Work

LENGTH = 8
VOCABULARY = 50

RUNTIMES = '''
"""Formats of a third party: ONNX Runtime with something wrong."""

import os
import signal
import time
from types import SimpleNamespace

from optimize.runtimes import onnx


class Spoilt:
    def __init__(self, inner, spoil):
        self.inner, self.spoil = inner, spoil

    def run(self, inputs):
        start = time.perf_counter()
        outputs = self.inner.run(inputs)
        self.spoil(time.perf_counter() - start)
        return outputs


def crash(_):
    print("the model is about to crash", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def _runtime(spoil):
    def open(directory, threads, *, trust_remote_code=False):
        return Spoilt(onnx.open(directory, threads), spoil)

    return SimpleNamespace(open=open, parameters=onnx.parameters)


twice = _runtime(lambda seconds: time.sleep(max(seconds, 0.001)))
hangs = _runtime(lambda seconds: time.sleep(3600))
crashes = _runtime(crash)
chatty = _runtime(lambda seconds: print("a library that prints"))
'''


class Toy(TextClassification):
    """Rows are lists of numbers: no tokenizer."""

    def preprocessor(self, path: Path, *, trust_remote_code: bool = False) -> None:
        return None

    def encode(self, preprocessor: None, rows: pa.Table, spec: Mapping[str, Any]) -> list[dict[str, list[int]]]:
        return [{"input_ids": ids} for ids in rows["ids"].to_pylist()]

    def collate(self, preprocessor: None, features: Sequence[Any], length: int | None = None) -> dict[str, Any]:
        width = max(len(row["input_ids"]) for row in features)
        return {"input_ids": np.array([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in features])}

    def latency_inputs(
        self, preprocessor: None, rows: pa.Table, spec: Any, *, batch_size: int, sequence_length: int
    ) -> dict[str, Any]:
        return {"input_ids": np.ones((batch_size, sequence_length), dtype=np.int64)}


class ToyData:
    """200 rows; `reads` counts how often they were asked for."""

    def __init__(self, labels: Sequence[int]) -> None:
        generator = np.random.default_rng(0)
        ids = [generator.integers(1, VOCABULARY, size=generator.integers(2, LENGTH)).tolist() for _ in labels]
        self.table = pa.table({"ids": ids, "label": pa.array(list(labels), pa.int64())})
        self.digests = {"evaluation": digest_of([ids, list(labels)])}
        self.num_rows = {"evaluation": len(ids)}
        self.info: dict[str, Any] = {}
        self.reads = 0

    def rows(self, split: str) -> pa.Table:
        assert split == "evaluation"
        self.reads += 1
        return self.table


def _build(folder: Path, *, seed: int, width: int, layers: int, format: str) -> Artifact:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> Any:
        values = generator.standard_normal(shape) / np.sqrt(shape[0])
        return numpy_helper.from_array(values.astype(np.float32), name)

    weights = [weight("embedding", VOCABULARY, width), weight("head", width, 2)]
    nodes = [helper.make_node("Gather", ["embedding", "input_ids"], ["h0"])]
    for layer in range(layers):
        weights.append(weight(f"w{layer}", width, width))
        nodes.append(helper.make_node("MatMul", [f"h{layer}", f"w{layer}"], [f"m{layer}"]))
        nodes.append(helper.make_node("Tanh", [f"m{layer}"], [f"h{layer + 1}"]))
    nodes.append(helper.make_node("ReduceMax", [f"h{layers}"], ["pooled"], axes=[1], keepdims=0))
    nodes.append(helper.make_node("MatMul", ["pooled", "head"], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        weights,
    )
    folder.mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    path = folder / "model.onnx"
    return Artifact(
        path=folder,
        format=format,
        task={"name": "text-classification", "max_length": LENGTH, "labels": ["negative", "positive"]},
        files={"model.onnx": {"size": path.stat().st_size, "sha256": sha256_file(path)}},
    )


@pytest.fixture
def toy(tmp_path: Path) -> Callable[..., Artifact]:
    """Makes an artifact: `toy("name", seed=0, width=32, layers=1, format="onnx")`."""

    def make(name: str, *, seed: int = 0, width: int = 32, layers: int = 1, format: str = "onnx") -> Artifact:
        return _build(tmp_path / "artifacts" / name, seed=seed, width=width, layers=layers, format=format)

    return make


@pytest.fixture
def toy_task() -> Toy:
    return Toy()


@pytest.fixture
def toy_data() -> ToyData:
    return ToyData(np.random.default_rng(1).integers(0, 2, size=200).tolist())


@pytest.fixture
def runtimes_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The formats `onnx-twice`, `onnx-hangs`, `onnx-crashes` and `onnx-chatty`, here and in new processes."""
    site = tmp_path / "site"
    information = site / "spoilt-1.0.dist-info"
    information.mkdir(parents=True)
    (site / "spoilt.py").write_text(RUNTIMES)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: spoilt\nVersion: 1.0\n")
    names = ("twice", "hangs", "crashes", "chatty")
    points = "".join(f"onnx-{name} = spoilt:{name}\n" for name in names)
    (information / "entry_points.txt").write_text(f"[optimize.runtimes]\n{points}")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]))


@pytest.fixture
def measured(work: Work, toy_data: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls `evaluate` on toys: the first is the baseline. The machine may be busy with tests: no round is dropped, and
    nobody waits for other tests' measurements."""
    from optimize.evaluate import evaluate, signals

    monkeypatch.setattr(signals, "disturbances", lambda found: [])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run(subjects: Mapping[str, Artifact], *, data: ToyData = toy_data, **changes: Any) -> Any:
        names = list(subjects)
        latency = {"batch_sizes": (1,), "sequence_length": LENGTH, "rounds": 6, "half_width": 1.0, "budget_seconds": 30}
        settings = {"latency": latency, **changes.pop("settings", {})}
        return evaluate(
            subjects,
            parents=dict(zip(names[1:], names, strict=False)),
            baseline=names[0],
            task=changes.pop("task", Toy()),
            data=data,  # type: ignore[arg-type]
            settings=Evaluate(**settings),
            work=work,
            progress=changes.pop("progress", Progress()),
            **changes,
        )

    return run
