"""How fast a sentence classifier answers: our artifacts beside those of other tools, in turns, in one run.

    python benchmarks/encoder.py [--work FOLDER] [--lengths 32 128 512] [--batches 1 8] [--threads 1 2] [--rounds 5]
    python benchmarks/encoder.py --quick

MiniLM, fine-tuned on film reviews (`encoder.yaml`). Every round starts a fresh process for each artifact; they take
turns in random order, and whoever waits is stopped. What is timed is the model's call on token ids, with real rows that
are exactly so long. Ratios are medians over rounds of the same round's times. Peers are made and served in environments
of their own, with their own versions and defaults (`encoder_peers.py`); one that fails is listed with its reason.

Beside the times stand the accuracy on the evaluation rows, and two floors: the linear layers' multiplications in INT8,
of all tokens and of those that the head reads, at the rate that the processor's VNNI instruction reaches on registers.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).with_suffix(".yaml")
SECONDS = 0.3
"""A measurement calls the model for at least so long, after one call that warms up."""
TURNS = 2
REFERENCE = "transformers: ONNX, ONNX Runtime"
"""What speed-ups are over: ONNX in float32 as the exporter writes it."""
LAYERS, WIDTH = 6, 384
"""Of MiniLM: a token takes 12 x WIDTH^2 multiplications in each layer, but for keys and values only of those tokens
whose answers are read: ten of the twelve in the last layer are needed for the first token alone."""

Run = Callable[[dict[str, Any]], Any]
"""Named arrays -> logits [batch, labels]."""
Setting = tuple[int, int]
"""Rows and tokens of a call."""


@dataclass(frozen=True)
class Contender:
    """A model's files, and what serves them."""

    path: str
    served: str
    python: str = sys.executable
    int8: bool = False
    ours: bool = False


# In the process that is measured


def open_ours(path: str, threads: int, format: str) -> Run:
    """An artifact of ours, through the runtime that would serve it."""
    from optimize import runtimes

    runner = runtimes.get(format).open(Path(path), threads)
    return lambda inputs: runner.run(inputs)["logits"]


def open_torch(path: str, threads: int, *, compiled: bool = False) -> Run:
    """PyTorch; compiled for each shape."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(threads)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    call = torch.compile(model, dynamic=False) if compiled else model

    def run(inputs: dict[str, Any]) -> Any:
        with torch.inference_mode():
            return call(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits.numpy()

    return run


def open_compiled(path: str, threads: int) -> Run:
    import torch._dynamo

    torch._dynamo.config.cache_size_limit = 64
    return open_torch(path, threads, compiled=True)


def open_onnx(path: str, threads: int) -> Run:
    """ONNX Runtime with its own defaults."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda inputs: session.run(None, {name: inputs[name] for name in names})[0]


def open_openvino(path: str, threads: int) -> Run:
    """OpenVINO with its own defaults, which compute in bfloat16 on processors that can."""
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    model = openvino.Core().compile_model(path, "CPU", settings)
    names = [value.any_name for value in model.inputs]
    return lambda inputs: model({name: inputs[name] for name in names})[0]


OPENERS: dict[str, Callable[..., Run]] = {
    "ours": open_ours,
    "torch": open_torch,
    "compiled": open_compiled,
    "onnx": open_onnx,
    "openvino": open_openvino,
}


def child(served: str) -> None:
    from peers import serve

    opened: list[Run] = []

    def arrays(inputs: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        return {name: np.array(rows, dtype=np.int64) for name, rows in inputs.items()}

    def open_model(path: str, threads: int) -> dict[str, Any]:
        kind, *format = served.split()
        opened.append(OPENERS[kind](path, threads, *format))
        return {}

    def measure(inputs: dict[str, Any]) -> dict[str, Any]:
        given, times = arrays(inputs), []
        opened[0](given)
        end = time.perf_counter() + SECONDS
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            opened[0](given)
            times.append(time.perf_counter() - start)
        return {"seconds": statistics.median(times)}

    def answer(inputs: dict[str, Any]) -> dict[str, Any]:
        return {"labels": opened[0](arrays(inputs)).argmax(axis=1).tolist()}

    serve({"open": open_model, "measure": measure, "answer": answer})


# In the process that measures


def ours(recipe: Any, work: Any) -> tuple[dict[str, Contender], Any]:
    """Every artifact of the recipe and PyTorch with the same weights; and the fine-tuned classifier itself."""
    import optimize

    run = optimize.apply(recipe, work=work, promote=False)
    if run.document["error"]:
        raise SystemExit(run.document["error"]["message"])
    made = {artifact["name"]: artifact for artifact in run.document["artifacts"]}
    teacher = made[recipe.baseline]
    found = {
        "PyTorch, eager": Contender(teacher["path"], "torch"),
        "PyTorch, torch.compile": Contender(teacher["path"], "compiled"),
    }
    for name, artifact in made.items():
        if name not in ("source", recipe.baseline):
            served = f"ours {artifact['format']}"
            found[f"ours: {name}"] = Contender(artifact["path"], served, int8="int8" in name, ours=True)
    return found, work.store.open(teacher["digest"])


def vnni_peak(threads: int) -> float | None:
    """8-bit multiplications a second of `vpdpbusd` (64 at a time, added up in 32 bits), the best of five.

    Twelve sums that do not wait for each other stay in registers. None where the processor has no such instruction.
    """
    import ctypes

    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    if not features.get("avx512vnni"):
        return None
    sums = range(12)
    phis = "".join(f"%a{i} = phi <16 x i32> [zeroinitializer, %entry], [%b{i}, %loop]\n" for i in sums)
    adds = "".join(
        f'%b{i} = call <16 x i32> asm sideeffect "vpdpbusd $1, $1, $0", "=v,v,0"'
        f"(<16 x i32> zeroinitializer, <16 x i32> %a{i})\n"
        for i in sums
    )
    code = (
        "define void @peak(i64 %n) {\nentry:\nbr label %loop\nloop:\n"
        f"%i = phi i64 [0, %entry], [%j, %loop]\n{phis}{adds}"
        "%j = add i64 %i, 1\n%end = icmp eq i64 %j, %n\nbr i1 %end, label %done, label %loop\ndone:\nret void\n}"
    )
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten()
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(code), machine)
    engine.finalize_object()
    peak = ctypes.CFUNCTYPE(None, ctypes.c_int64)(engine.get_function_address("peak"))
    loops, best = 20_000_000, 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(peak, [loops] * threads))
            best = max(best, threads * loops * len(sums) * 64 / (time.perf_counter() - start))
    return best


def measure(
    contenders: dict[str, Contender], batches: dict[Setting, Any], threads: int, chance: random.Random
) -> dict[Setting, dict[str, float]]:
    """One round of fresh processes: setting -> name -> seconds a call."""
    from peers import Process

    seconds: dict[Setting, dict[str, float]] = {}
    with ExitStack() as stack:
        processes = {}
        for name, contender in contenders.items():
            arguments = (contender.python, __file__, "--child", contender.served)
            processes[name] = stack.enter_context(Process(*arguments, threads=threads))
            processes[name].ask(do="open", path=contender.path, threads=threads)
        order = list(processes)
        for setting, inputs in batches.items():
            times: dict[str, list[float]] = {name: [] for name in order}
            for _ in range(TURNS):
                chance.shuffle(order)
                for name in order:
                    times[name].append(processes[name].ask(do="measure", inputs=inputs)["seconds"])
            seconds[setting] = {name: statistics.median(found) for name, found in times.items()}
    return seconds


def accuracies(contenders: dict[str, Contender], batches: list[Any], targets: Any) -> dict[str, float | None]:
    """The share of evaluation rows that each labels rightly; None where every length would have to be compiled."""
    from peers import Process

    found: dict[str, float | None] = {}
    for name, contender in contenders.items():
        found[name] = None
        if contender.served == "compiled":
            continue
        with Process(contender.python, __file__, "--child", contender.served, threads=2) as process:
            process.ask(do="open", path=contender.path, threads=2)
            right = 0
            for rows, inputs in batches:
                right += int((process.ask(do="answer", inputs=as_lists(inputs))["labels"] == targets[rows]).sum())
        found[name] = right / len(targets)
    return found


def as_lists(inputs: Any) -> dict[str, Any]:
    return {name: array.tolist() for name, array in inputs.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="length 128, 1 thread, 3 rounds")
    parser.add_argument("--only", nargs="+", help="words, one of which a contender's name has")
    parser.add_argument(
        "--work", help="a work folder, whose artifacts are taken, and peers' too (default: all are made)"
    )
    parser.add_argument("--recipe", default=RECIPE, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return 0
    if arguments.quick:
        arguments.lengths, arguments.threads, arguments.rounds = [128], [1], 3

    import encoder_peers

    from optimize import recipe as recipes
    from optimize.work import Work

    chance = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="encoder-") as name:
        work = Work(arguments.work or Path(name) / "work")
        recipe = recipes.load(arguments.recipe)
        found, teacher = ours(recipe, work)
        data = encoder_peers.Data(recipe, teacher, work)
        peers, failures = encoder_peers.make(data, work.root / "peers")
        known = {**found, **{label: Contender(**peer) for label, peer in peers.items()}}
        words = arguments.only or [""]
        chosen = {label: value for label, value in known.items() if any(word in label for word in words)}
        right = accuracies(chosen, list(data.evaluation()), data.targets)
        times: dict[tuple[int, Setting], dict[str, list[float]]] = {}
        for threads in arguments.threads:
            batches = {
                (rows, length): as_lists(data.timed(rows, length))
                for length in arguments.lengths
                for rows in arguments.batches
            }
            for _ in range(arguments.rounds):
                for setting, seconds in measure(chosen, batches, threads, chance).items():
                    for label, value in seconds.items():
                        times.setdefault((threads, setting), {}).setdefault(label, []).append(value)
            report({key: value for key, value in times.items() if key[0] == threads}, threads, right)
        for label, reason in failures.items():
            print(f"left out: {label}: {reason}")
        if not arguments.only:
            ratios(times, chosen)
        rows_of = {f"{threads} threads, {rows} x {length}": row for (threads, (rows, length)), row in times.items()}
        print(json.dumps({"seconds": rows_of, "accuracy": right}))
    return 0


def report(
    times: dict[tuple[int, Setting], dict[str, list[float]]], threads: int, right: dict[str, float | None]
) -> None:
    """Milliseconds, and how many times as fast as the reference."""
    settings = [setting for _, setting in times]
    print(f"\n{threads} thread(s); milliseconds a call of rows x tokens, and the speed-up over {REFERENCE}")
    print(f"{'':<46}{'accuracy':>9}" + "".join(f"{f'{rows} x {length}':>17}" for rows, length in settings))
    for label, accuracy in right.items():
        cells = ""
        for row in times.values():
            cells += f"{1000 * statistics.median(row[label]):>10.2f}"
            cells += f"{median_ratio(row, REFERENCE, label):>6.2f}x" if REFERENCE in row else " " * 7
        print(f"{label:<46}{'' if accuracy is None else f'{accuracy:.4f}':>9}{cells}", flush=True)
    peak = vnni_peak(threads)
    if peak is None:
        print("no floor: this processor has no AVX512-VNNI")
        return
    for floor, (each, first) in {
        "all tokens": (12 * LAYERS, 0),
        "those the head reads": (12 * LAYERS - 10, 10),
    }.items():
        cells = ""
        for (_, (rows, length)), row in times.items():
            seconds = WIDTH**2 * rows * (each * length + first) / peak
            cells += f"{1000 * seconds:>10.2f}"
            cells += f"{statistics.median(row[REFERENCE]) / seconds:>6.2f}x" if REFERENCE in row else " " * 7
        label = f"floor: {floor}, {peak / 1e9:.0f} G multiplications/s"
        print(f"{label:<55}{cells}", flush=True)


def median_ratio(row: dict[str, list[float]], slow: str, fast: str) -> float:
    return statistics.median(a / b for a, b in zip(row[slow], row[fast], strict=True))


def ratios(times: dict[tuple[int, Setting], dict[str, list[float]]], known: dict[str, Contender]) -> None:
    """Our best INT8 artifact (that of the smallest geometric mean over the grid) over others."""
    grid = list(times.values())

    def slowness(label: str) -> float:
        return statistics.mean(math.log(statistics.median(row[label])) for row in grid)

    best = min((label for label, contender in known.items() if contender.ours and contender.int8), key=slowness)
    print(f"\nour best INT8 artifact: {best}")
    rivals = [label for label, contender in known.items() if contender.int8 and not contender.ours]
    olive = [label for label in rivals if label.startswith("Olive: ONNX")]
    for whose, labels, wanted in (("Olive's ONNX INT8", olive, 1.3), ("the fastest INT8 of any peer", rivals, 1.0)):
        if not labels:
            print(f"over {whose}: there is none")
            continue
        over = [min(median_ratio(row, label, best) for label in labels) for row in grid]
        print(
            f"over {whose}, the fastest in each setting: median {statistics.median(over):.2f} (asked: {wanted}), "
            f"{min(over):.2f} to {max(over):.2f}"
        )
    row = times.get((1, (8, 128)), {})
    for label in (REFERENCE, "ours: onnx"):
        if label in row:
            print(f"over {label}, 8 x 128, 1 thread: {median_ratio(row, label, best):.2f} (asked: 3.0)")


if __name__ == "__main__":
    sys.exit(main())
