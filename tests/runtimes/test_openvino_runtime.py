"""The OpenVINO runtime answers, counts, and computes in what the file says, with as many threads as it is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimize.errors import EvaluationError, SourceError
from optimize.evaluate.host import computes_in
from optimize.runtimes import openvino as runtime
from optimize.source import vetting

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


def write(folder: Path, weight: Any = None, *, precision: str = "") -> Path:
    """A model that multiplies `x` [batch, 2] by a weight [2, 3]."""
    ov = runtime.library()
    ops = ov.opset13
    x = ops.parameter([-1, 2], np.float32, name="x")
    product = ops.matmul(x, ops.constant(WEIGHT) if weight is None else weight, False, False)
    x.output(0).set_names({"x"})
    product.output(0).set_names({"logits"})
    model = ov.Model([ops.result(product)], [x], "model")
    if precision:
        model.set_rt_info(precision, runtime.PRECISION)
    ov.save_model(model, folder / "model.xml", compress_to_fp16=False)
    return folder


def test_it_answers_and_takes_only_what_the_model_wants(tmp_path: Path) -> None:
    runner = runtime.open(write(tmp_path), threads=1)
    x = np.ones((4, 2), dtype=np.float32)
    outputs = runner.run({"token_type_ids": np.zeros((4, 2)), "x": x})
    assert list(outputs) == ["logits"]
    np.testing.assert_array_equal(outputs["logits"], x @ WEIGHT)
    runner.run({"x": 2 * x})
    np.testing.assert_array_equal(outputs["logits"], x @ WEIGHT)  # an answer is not written over by the next
    with pytest.raises(EvaluationError, match="wants x"):
        runner.run({})
    with pytest.raises(EvaluationError, match="can't take these inputs"):
        runner.run({"x": np.ones((4, 5), dtype=np.float32)})
    with pytest.raises(EvaluationError, match="no decoder"):
        runner.decoder(8)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_as_many_as_told(tmp_path: Path, threads: int) -> None:
    compiled = runtime.open(write(tmp_path), threads=threads).compiled
    assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
    assert compiled.get_property("NUM_STREAMS") == 1
    assert compiled.get_property("ENABLE_CPU_PINNING") is False


def test_it_computes_in_what_the_file_says(tmp_path: Path) -> None:
    kinds = runtime.library().Type
    for said, kind in (("", kinds.f32), ("f32", kinds.f32), ("bf16", kinds.bf16)):
        compiled = runtime.open(write(tmp_path, precision=said), threads=1).compiled
        if said != "bf16" or computes_in("bfloat16"):
            assert compiled.get_property("INFERENCE_PRECISION_HINT") == kind
    with pytest.raises(EvaluationError, match="wants to compute in 'f8'"):
        runtime.open(write(tmp_path, precision="f8"), threads=1)


def codes() -> Any:
    ops = runtime.library().opset13
    shifted = ops.subtract(
        ops.convert(ops.constant(WEIGHT.astype(np.uint8)), "f32"),
        ops.convert(ops.constant(np.ones((1, 3), dtype=np.uint8)), "f32"),
    )
    return ops.multiply(shifted, ops.constant(np.ones((1, 3), dtype=np.float32)))


def rounded() -> Any:
    ops = runtime.library().opset13
    ends = [ops.constant(np.full((1, 3), end, dtype=np.float32)) for end in (-8, 7, -8, 7)]
    return ops.fake_quantize(ops.constant(WEIGHT), *ends, 256)


@pytest.mark.parametrize("weight", [None, codes, rounded])
def test_parameters_are_counted_from_the_file(tmp_path: Path, weight: Any) -> None:
    assert runtime.parameters(write(tmp_path, weight and weight())) == 6


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"<net></net>", b"<net"])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    write(tmp_path)
    (tmp_path / "model.xml").write_bytes(content)
    with pytest.raises(EvaluationError, match="can't open it"):
        runtime.open(tmp_path, threads=1)


def test_a_folder_from_outside_is_looked_at_first(tmp_path: Path) -> None:
    names = ["model.xml", "model.bin"]
    whole = (write(tmp_path) / "model.xml").read_bytes()
    vetting.check_openvino("it", tmp_path, names)
    with pytest.raises(SourceError, match="cut off, missing, or no plain file"):
        vetting.check_openvino("it", tmp_path, ["model.xml"])
    (tmp_path / "model.xml").write_bytes(b'<!DOCTYPE net [<!ENTITY a "a">]>' + whole)
    with pytest.raises(SourceError, match="no plain XML"):
        vetting.check_openvino("it", tmp_path, names)
    (tmp_path / "model.xml").write_bytes(whole)
    (tmp_path / "model.bin").write_bytes(b"\0" * 8)
    with pytest.raises(SourceError, match="cut off"):
        vetting.check_openvino("it", tmp_path, names)


def test_nothing_is_sent_over_the_network() -> None:
    """In a process of its own: the message goes out when openvino is imported for the first time."""
    code = """
import sys
from optimize.runtimes import openvino
openvino.library()
print(*(name for name in sys.modules if name.startswith("openvino_telemetry.")))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.strip() == ""
