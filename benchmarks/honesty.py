"""Does the tool claim what is not so? Planted effects of a known size, measured and judged as `apply` does it.

    python benchmarks/honesty.py [--repeats 50] [--only quiet|busy|slow|coverage]

quiet     an artifact against itself: at `min_speedup: 1.0` at most 5 % may pass (7 of 50: the binomial 99 % bound)
busy      the same beside a process that burns one core
slow      a runtime that sleeps for 10 % of each call: at most 1 of 50 may pass, at least 40 of 50 must fail
coverage  simulated coverage of every interval is 90 +/- 2 % (`intervals.py`)

Exits with 1 where a promise is broken. Needs a quiet machine; about ten minutes for each line.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from optimize.artifact import Artifact, sha256_file
from optimize.evaluate import evaluate
from optimize.evaluate.gates import judge
from optimize.progress import Progress
from optimize.recipe import Evaluate, Gate
from optimize.tasks.text_classification import TextClassification
from optimize.work import Work

LENGTH, WIDTH, LAYERS = 128, 256, 12
"""A call of such a model takes a few milliseconds: long against a clock, short against a process start."""

SLOW_RUNTIME = '''
"""ONNX Runtime that takes 10 % longer: it sleeps, and waits out the rest, since a sleep is never exact."""

import time
from types import SimpleNamespace

from optimize.runtimes import onnx


class Slow:
    def __init__(self, inner):
        self.inner = inner

    def run(self, inputs):
        start = time.perf_counter()
        outputs = self.inner.run(inputs)
        end = time.perf_counter()
        end += 0.1 * (end - start)
        time.sleep(max(0.0, end - time.perf_counter() - 1e-4))
        while time.perf_counter() < end:
            pass
        return outputs


runtime = SimpleNamespace(
    open=lambda directory, threads, *, trust_remote_code=False: Slow(onnx.open(directory, threads)),
    parameters=onnx.parameters,
)
'''


class Numbers(TextClassification):
    """Rows of token numbers: no tokenizer."""

    def preprocessor(self, path: Path, *, trust_remote_code: bool = False) -> None:
        return None

    def encode(self, preprocessor: None, rows: pa.Table, spec: Mapping[str, Any]) -> list[dict[str, list[int]]]:
        return [{"input_ids": ids} for ids in rows["ids"].to_pylist()]

    def collate(self, preprocessor: None, features: Sequence[Any], length: int | None = None) -> dict[str, Any]:
        return {"input_ids": np.array([row["input_ids"] for row in features])}

    def latency_inputs(self, preprocessor: None, rows: pa.Table, spec: Any, **_: int) -> dict[str, Any]:
        return self.collate(None, self.encode(None, rows, spec))


class Rows:
    """As much of `Data` as scoring asks for."""

    digests: Mapping[str, str] = {"evaluation": "sha256:rows"}

    def rows(self, split: str) -> pa.Table:
        ids = np.random.default_rng(0).integers(0, 100, size=(20, LENGTH)).tolist()
        return pa.table({"ids": ids, "label": pa.array([0, 1] * 10)})


def build(folder: Path, format: str = "onnx") -> Artifact:
    """A stack of matrix products with random weights."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> Any:
        values = generator.standard_normal(shape) / math.sqrt(shape[0])
        return numpy_helper.from_array(values.astype(np.float32), name)

    weights = [weight("embedding", 100, WIDTH), weight("head", WIDTH, 2)]
    nodes = [helper.make_node("Gather", ["embedding", "input_ids"], ["x0"])]
    for layer in range(LAYERS):
        weights.append(weight(f"w{layer}", WIDTH, WIDTH))
        nodes.append(helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"y{layer}"]))
        nodes.append(helper.make_node("Tanh", [f"y{layer}"], [f"x{layer + 1}"]))
    nodes.append(helper.make_node("ReduceMax", [f"x{LAYERS}"], ["pooled"], axes=[1], keepdims=0))
    nodes.append(helper.make_node("MatMul", ["pooled", "head"], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "stack",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", LENGTH])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        weights,
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return Artifact(
        path=folder,
        format=format,
        task={"name": "text-classification", "max_length": LENGTH, "labels": ["negative", "positive"]},
        files={"model.onnx": {"size": path.stat().st_size, "sha256": sha256_file(path)}},
    )


def install_slow_runtime(site: Path) -> None:
    """The format `onnx-slow`, through an entry point, for this process and those it starts."""
    information = site / "slow_runtime-1.0.dist-info"
    information.mkdir(parents=True)
    (site / "slow_runtime.py").write_text(SLOW_RUNTIME)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: slow_runtime\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[optimize.runtimes]\nonnx-slow = slow_runtime:runtime\n")
    sys.path.insert(0, str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])


BURN = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
"""Until whoever started it is gone, killed or not."""


@contextlib.contextmanager
def burner(on: bool) -> Iterator[None]:
    """A process that burns one core."""
    process = subprocess.Popen([sys.executable, "-c", BURN]) if on else None
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def verdict(candidate: Artifact, over: Artifact, folder: Path) -> tuple[str, float]:
    """(verdict, speed-up) at `min_speedup: 1.0`, measured from nothing."""
    evaluation = evaluate(
        {"over": over, "candidate": candidate},
        parents={"candidate": "over"},
        baseline="over",
        task=Numbers(),
        data=Rows(),  # type: ignore[arg-type]
        settings=Evaluate(
            latency={"batch_sizes": (1,), "sequence_length": LENGTH}, peak_memory=False, fidelity=False, batch_size=20
        ),
        work=Work(folder),
        progress=Progress(),
    )
    gate = Gate(metric="latency", min_speedup=1.0)
    (result,) = judge([gate], evaluation, leaves=["candidate"], baseline="over", select=None)
    return result.verdict, result.estimate


def false_passes_allowed(repeats: int) -> int:
    """The binomial 99 % bound at a true error of 5 %."""
    from scipy.stats import binom

    return int(binom.ppf(0.99, repeats, 0.05))


def case(name: str, repeats: int, folder: Path) -> bool:
    """Run one line of the table; True where the promise is kept."""
    plain = build(folder / "plain")
    candidate = build(folder / "slow", "onnx-slow") if name == "slow" else plain
    verdicts: Counter[str] = Counter()
    speedups = []
    began = time.monotonic()
    with burner(name == "busy"):
        for number in range(repeats):
            told, speedup = verdict(candidate, plain, folder / f"{name}-{number}")
            verdicts[told] += 1
            speedups.append(speedup)
    if name == "slow":
        kept = verdicts["pass"] <= math.ceil(repeats / 50) and verdicts["fail"] >= math.floor(0.8 * repeats)
    else:
        kept = verdicts["pass"] <= false_passes_allowed(repeats)
    print(
        f"{name:<9} {repeats:>7} {verdicts['pass']:>5} {verdicts['inconclusive']:>12} {verdicts['fail']:>5}"
        f" {np.median(speedups):>9.4f} {min(speedups):>8.4f} {max(speedups):>8.4f}"
        f" {time.monotonic() - began:>7.0f}  {'kept' if kept else 'BROKEN'}",
        flush=True,
    )
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--only", choices=("quiet", "busy", "slow", "coverage"))
    arguments = parser.parse_args()
    wanted = [arguments.only] if arguments.only else ["quiet", "busy", "slow", "coverage"]
    kept = []
    with tempfile.TemporaryDirectory(prefix="honesty-") as name:
        install_slow_runtime(Path(name) / "site")
        print("case      repeats  pass inconclusive  fail   speedup   lowest  highest seconds  promise")
        kept += [case(one, arguments.repeats, Path(name)) for one in wanted if one != "coverage"]
    if "coverage" in wanted:
        script = Path(__file__).with_name("intervals.py")
        kept.append(subprocess.run([sys.executable, str(script)], check=False).returncode == 0)
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
