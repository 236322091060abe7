"""How fast a small language model answers: our artifacts beside those of other tools, in turns, in one run.

    python benchmarks/decode.py [--threads 1 2] [--rounds 5] [--only onnx llama.cpp ...]

SmolLM2-135M. Prefill: 512 tokens of a prompt; decode: 64 tokens one by one after a prompt of 128, with the largest
logit looked up each time. Every round starts a fresh process for each; they take turns in random order, and whoever
waits is stopped. Ratios are medians over rounds of the same round's figures. Beside them stands the floor that the
memory sets: the bytes of weights that a token needs, over the bandwidth that one large sum reaches here.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LLAMA = "llama-cpp-python==0.3.36"
RECIPES = Path(__file__).parents[1] / "recipes"
PROMPT, TOKENS, PREFILL = 128, 64, 512
TURNS = 3
"""Each measures so often in a round, after one turn that warms up."""

Forward = Callable[[list[int]], int]
"""Appends tokens; gives the likeliest next one."""


# In the process that is measured


def open_ours(path: str, threads: int) -> tuple[Forward, Callable[[], None]]:
    """An artifact, through the runtime that would serve it; also plain PyTorch and the kernels that plug into it."""
    import numpy as np

    from optimize import runtimes
    from optimize.runtimes import onnx

    folder = Path(path)
    format = "onnx" if (folder / onnx.MODEL).exists() else "transformers"
    decoder = runtimes.get(format).open(folder, threads).decoder(1024)
    return lambda ids: int(decoder.forward(np.array(ids)).argmax()), lambda: decoder.truncate(0)


def open_llama(path: str, threads: int) -> tuple[Forward, Callable[[], None]]:
    """llama.cpp with its own defaults."""
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(path, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    width = model.n_vocab()

    def forward(ids: list[int]) -> int:
        model.eval(ids)
        return int(np.ctypeslib.as_array(model._ctx.get_logits(), shape=(width,)).argmax())

    return forward, model.reset


def child(tool: str) -> None:
    from peers import serve

    opened: list[tuple[Forward, Callable[[], None]]] = []

    def open_model(path: str, threads: int) -> dict[str, Any]:
        opened.append((open_llama if tool == "llama.cpp" else open_ours)(path, threads))
        return {}

    def prefill(ids: list[int]) -> dict[str, Any]:
        forward, reset = opened[0]
        reset()
        start = time.perf_counter()
        forward(ids)
        return {"seconds": time.perf_counter() - start}

    def decode(ids: list[int], tokens: int) -> dict[str, Any]:
        forward, reset = opened[0]
        reset()
        token = forward(ids)
        start = time.perf_counter()
        for _ in range(tokens):
            token = forward([token])
        return {"seconds": time.perf_counter() - start}

    serve({"open": open_model, "prefill": prefill, "decode": decode})


# In the process that measures


def bandwidth(threads: int) -> float:
    """Bytes a second that a sum over 1 GB reaches, the best of five."""
    import torch

    torch.set_num_threads(threads)
    numbers = torch.ones(2**28)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (time.perf_counter() - start))
    return best


def contenders(folder: Path, work: str | None, recipes: list[str]) -> dict[str, tuple[str, str]]:
    """Name -> (the Python that runs it, the model's files). What lies in the folder `work` is not made anew."""
    from peers import MODEL, environment

    import optimize
    from optimize.source import locate
    from optimize.work import Work

    kept = Work(work or folder / "work")
    quick = ["evaluate.latency=null", "evaluate.peak_memory=false", "data.max_windows=8", "gates=[]", "promote=null"]
    found = {}
    for recipe in recipes:
        run = optimize.apply(RECIPES / f"{recipe}.yaml", work=kept, overrides=quick, promote=False)
        if run.document["error"]:
            raise SystemExit(run.document["error"]["message"])
        for artifact in run.document["artifacts"]:
            label = f"{recipe.removeprefix('smollm2-')}: {artifact['name']}, {artifact['format']}"
            label = "float32, transformers" if artifact["name"] == "source" else label
            found.setdefault(label, (sys.executable, artifact["path"]))
    origin = locate(MODEL, folder, "model")
    origin.copy(["*.gguf"], folder)
    found["llama.cpp"] = (environment(LLAMA, "numpy"), str(next(folder.glob("*.gguf"))))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="words, one of which a contender's name has")
    parser.add_argument("--recipes", nargs="+", default=["smollm2-gptq", "smollm2-nf4", "smollm2-int8"])
    parser.add_argument("--work", help="a work folder, whose artifacts are taken (default: all are made)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return 0

    chance = random.Random(0)
    ids = [chance.randrange(1000, 40000) for _ in range(PREFILL)]
    with tempfile.TemporaryDirectory(prefix="decode-") as name:
        known = contenders(Path(name), arguments.work, arguments.recipes)
        words = arguments.only or [""]
        chosen = {label: value for label, value in known.items() if any(word in label for word in words)}
        for threads in arguments.threads:
            found: dict[str, dict[str, list[float]]] = {label: {"prefill": [], "decode": []} for label in chosen}
            for _ in range(arguments.rounds):
                one = measure(chosen, threads, ids, chance)
                for label, speeds in one.items():
                    for phase, value in speeds.items():
                        found[label][phase].append(value)
            report(found, chosen, threads)
    return 0


def measure(
    chosen: dict[str, tuple[str, str]], threads: int, ids: list[int], chance: random.Random
) -> dict[str, dict[str, float]]:
    """One round of fresh processes: name -> phase -> tokens a second."""
    from contextlib import ExitStack

    from peers import Process

    seconds: dict[str, dict[str, list[float]]] = {label: {"prefill": [], "decode": []} for label in chosen}
    with ExitStack() as stack:
        processes = {
            label: stack.enter_context(Process(python, __file__, "--child", label, threads=threads))
            for label, (python, _) in chosen.items()
        }
        for label, process in processes.items():
            process.ask(do="open", path=chosen[label][1], threads=threads)
        order = list(processes)
        for turn in range(TURNS + 1):
            chance.shuffle(order)
            for label in order:
                prefill = processes[label].ask(do="prefill", ids=ids)["seconds"]
                decode = processes[label].ask(do="decode", ids=ids[:PROMPT], tokens=TOKENS)["seconds"]
                if turn:
                    seconds[label]["prefill"].append(prefill)
                    seconds[label]["decode"].append(decode)
    return {
        label: {
            "prefill": PREFILL / statistics.median(phases["prefill"]),
            "decode": TOKENS / statistics.median(phases["decode"]),
        }
        for label, phases in seconds.items()
    }


def report(found: dict[str, dict[str, list[float]]], chosen: dict[str, tuple[str, str]], threads: int) -> None:
    reference = "llama.cpp" if "llama.cpp" in found else next(iter(found))
    reached = bandwidth(threads)
    print(f"\n{threads} thread(s); memory read at {reached / 1e9:.0f} GB/s; ratios over {reference}")
    print(f"{'':<30}{'decode t/s':>11}{'ratio':>7}{'floor t/s':>11}{'prefill t/s':>12}{'ratio':>7}")
    for label, phases in found.items():
        told = []
        for phase in ("decode", "prefill"):
            ratios = [a / b for a, b in zip(phases[phase], found[reference][phase], strict=True)]
            told += [statistics.median(phases[phase]), statistics.median(ratios)]
        path = Path(chosen[label][1])
        size = path.stat().st_size if path.is_file() else max(file.stat().st_size for file in path.iterdir())
        print(
            f"{label:<30}{told[0]:>11.1f}{told[1]:>7.2f}{reached / size:>11.0f}{told[2]:>12.0f}{told[3]:>7.2f}",
            flush=True,
        )
    print(json.dumps({"threads": threads, "tokens_per_second": found}))


if __name__ == "__main__":
    sys.exit(main())
