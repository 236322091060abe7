"""What `encoder.py` measures of other tools, each of which makes its artifact of the same classifier.

Olive: conversion, transformer fusion and INT8 for ONNX Runtime, and INT8 for OpenVINO. sentence-transformers, whose
`CrossEncoder` is such a classifier: its exports to ONNX and OpenVINO and their INT8. The exporter of transformers
alone, without what `export: onnx` does to the graph, stands for plain ONNX in float32.

This file is a script, too, that the peers' Python runs: `encoder_peers.py PEER MODEL ROWS OUT`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TORCH = "torch>=2.6,<2.14"
ENVIRONMENTS = {
    "transformers": None,
    "olive": (
        "olive-ai==0.13.0",
        "requests",
        "datasets",
        "onnxruntime",
        "openvino>=2026.0",
        "nncf>=3.0",
        "transformers<5",
        TORCH,
    ),
    "sentence-transformers": (
        *("sentence-transformers>=5.1,<6", "optimum-onnx[onnxruntime]==0.1.0", "optimum-intel[openvino]<1.28"),
        *("transformers<4.58", "datasets", TORCH),
    ),
}
"""Requirements of each tool's environment; None: ours."""
SAMPLES, LENGTH = 128, 128
"""Calibration rows, and tokens of a row at most."""


# In the peer's Python


def transformers_onnx(model: Path, rows: Path, out: Path) -> str:
    """As `OnnxExporter` writes it."""
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    classifier = AutoModelForSequenceClassification.from_pretrained(model).eval()
    ids = torch.randint(1000, 2000, (2, 16))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    OnnxExporter().export(classifier, inputs, config=OnnxConfig(dynamic=True)).save_pretrained(out)
    return found(out, "*.onnx")


def olive(model: Path, rows: Path, out: Path, *passes: dict[str, Any]) -> Path:
    """A workflow from the classifier; the folder of what the last pass wrote."""
    from olive.workflows import run

    texts = {
        "name": "rows",
        "type": "HuggingfaceContainer",
        "load_dataset_config": {"data_name": "csv", "data_files": {"train": str(rows)}, "split": "train"},
        "pre_process_data_config": {
            "model_name": str(model),
            "input_cols": ["text"],
            "label_col": "label",
            "max_length": LENGTH,
            "max_samples": SAMPLES,
        },
        "dataloader_config": {"batch_size": 1},
    }
    cpu = {"type": "LocalSystem", "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}]}
    run(
        {
            "input_model": {"type": "HfModel", "model_path": str(model), "task": "text-classification"},
            "data_configs": [texts],
            "systems": {"cpu": cpu},
            "host": "cpu",
            "target": "cpu",
            "evaluate_input_model": False,
            "passes": {str(number): settings for number, settings in enumerate(passes)},
            "output_dir": str(out / "olive"),
            "cache_dir": str(out / "cache"),
        }
    )
    shutil.rmtree(out / "cache", ignore_errors=True)
    return out / "olive"


CONVERSION = {"type": "OnnxConversion", "target_opset": 17}
FUSION = {"type": "OrtTransformersOptimization", "model_type": "bert"}


def olive_onnx_dynamic(model: Path, rows: Path, out: Path) -> str:
    return found(olive(model, rows, out, CONVERSION, FUSION, {"type": "OnnxDynamicQuantization"}), "*.onnx")


def olive_onnx_static(model: Path, rows: Path, out: Path) -> str:
    static = {"type": "OnnxStaticQuantization", "data_config": "rows"}
    return found(olive(model, rows, out, CONVERSION, FUSION, static), "*.onnx")


def olive_openvino(model: Path, rows: Path, out: Path) -> str:
    quantization = {"type": "OpenVINOQuantization", "data_config": "rows", "model_type": "TRANSFORMER"}
    return found(olive(model, rows, out, CONVERSION, {"type": "OpenVINOConversion"}, quantization), "*.xml")


def cross_encoder(model: Path, backend: str) -> Any:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(model), backend=backend, max_length=LENGTH, model_kwargs={"export": True})


def sentence_transformers_onnx(model: Path, rows: Path, out: Path) -> str:
    from sentence_transformers import export_dynamic_quantized_onnx_model

    export_dynamic_quantized_onnx_model(cross_encoder(model, "onnx"), "avx512_vnni", str(out))
    return found(out, "*.onnx")


def sentence_transformers_openvino(model: Path, rows: Path, out: Path) -> str:
    from sentence_transformers import export_static_quantized_openvino_model

    folder = out / "rows"
    folder.mkdir()
    shutil.copy(rows, folder / "train.csv")
    export_static_quantized_openvino_model(
        cross_encoder(model, "openvino"),
        None,
        str(out),
        dataset_name=str(folder),
        dataset_config_name="default",
        dataset_split="train",
        column_name="text",
    )
    return found(out, "*.xml")


def found(folder: Path, glob: str) -> str:
    """The one file of that name."""
    (file,) = folder.rglob(glob)
    return str(file)


PEERS: dict[str, tuple[str, Callable[[Path, Path, Path], str], str, bool]] = {
    "transformers: ONNX, ONNX Runtime": ("transformers", transformers_onnx, "onnx", False),
    "Olive: ONNX INT8 dynamic": ("olive", olive_onnx_dynamic, "onnx", True),
    "Olive: ONNX INT8 static": ("olive", olive_onnx_static, "onnx", True),
    "Olive: OpenVINO INT8": ("olive", olive_openvino, "openvino", True),
    "sentence-transformers: ONNX INT8": ("sentence-transformers", sentence_transformers_onnx, "onnx", True),
    "sentence-transformers: OpenVINO INT8": ("sentence-transformers", sentence_transformers_openvino, "openvino", True),
}
"""Name -> the environment, what makes the file in it, what serves it, and whether it is INT8."""


# In the process that measures


class Data:
    """The rows of a recipe, as its teacher wants them."""

    def __init__(self, recipe: Any, teacher: Any, work: Any) -> None:
        from optimize import tasks
        from optimize.data import prepare

        self.artifact = teacher
        self.task = tasks.get(recipe.model.task)
        self.rows = prepare(recipe.data, self.task, work, recipe.base)
        self.tokenizer = self.task.preprocessor(teacher.path)
        self.targets = self.task.targets(self.rows.rows("evaluation"))

    def evaluation(self) -> Iterator[tuple[list[int], Any]]:
        """(row numbers, inputs) of all evaluation rows."""
        features = self.task.encode(self.tokenizer, self.rows.rows("evaluation"), self.artifact.task)
        return self.task.batches(self.tokenizer, features, 32)

    def timed(self, rows: int, length: int) -> Any:
        """Inputs of real rows, exactly so long."""
        table, spec = self.rows.rows("evaluation"), self.artifact.task
        return self.task.latency_inputs(self.tokenizer, table, spec, batch_size=rows, sequence_length=length)


def make(data: Data, folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Every peer that can be had, as keywords of `Contender`, and why the others can't."""
    from peers import environment
    from pyarrow import csv

    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.csv"
    csv.write_csv(data.rows.rows("calibration").slice(0, SAMPLES), rows)
    made, failures = {}, {}
    for number, (name, (room, _, served, int8)) in enumerate(PEERS.items()):
        out, note = folder / str(number), folder / f"{number}.json"
        try:
            needs = ENVIRONMENTS[room]
            python = environment(*needs) if needs else sys.executable
            if not note.exists():
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                print(f"making {name}", file=sys.stderr, flush=True)
                command = [python, __file__, name, str(data.artifact.path), str(rows), str(out)]
                process = subprocess.run(command, capture_output=True, text=True, check=False)
                if process.returncode:
                    failures[name] = process.stderr.strip().rpartition("\n")[2] or f"ended with {process.returncode}"
                    continue
                note.write_text(process.stdout.strip().rpartition("\n")[2], encoding="utf-8")
            path = json.loads(note.read_text(encoding="utf-8"))
            made[name] = {"path": path, "served": served, "python": python, "int8": int8}
        except subprocess.CalledProcessError as error:
            failures[name] = f"{room} can't be installed: {error}"
    return made, failures


if __name__ == "__main__":
    chosen, *places = sys.argv[1:]
    print(json.dumps(PEERS[chosen][1](*map(Path, places))))
