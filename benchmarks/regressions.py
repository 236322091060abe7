"""Does `optimize gate` catch what got worse, and only that? Regressions of a known size, planted and gated end to end.

    python benchmarks/regressions.py [--repeats 50] [--only flips,bytes,...]

flips        160 of 8,000 rows lost (two points) under `max_drop: 0.01`; which ones changes every time: exit code 1
bytes        5 % more bytes under `max_ratio: 1.02`: exit code 1
sleep        a runtime that sleeps for 10 % of each call under `min_speedup: 0.95`: exit code 1
flips-limit  each row is lost with such a chance that the true drop is one point: a pass at most 7 times in 50
sleep-limit  a runtime that takes 1/0.95 of the time: a pass at most 7 times in 50
same         the candidate is the promoted artifact itself: a failure at most 7 times in 50

The first three have to be caught, with the metric and the stage named, 48 times in 50. Size is exact, so a size on the
limit is within it. Each time the recipe is applied, its candidate and what is promoted are answered and timed anew, and
the gates are judged: nothing is simulated. Those that sleep take a quiet machine and most of the time.

Exits with 1 where a promise is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from optimize.run import Run

ROWS = 8_000
WRONG = 10
"""Every tenth word is answered wrongly by the model that is promoted."""
NAME = "planted"
SLOWER = {"planted-slow": 0.10, "planted-limit": 1 / 0.95 - 1}
"""Method -> by how much its runtime is slower."""

PLUGIN = '''
"""A stage that makes a model which answers as told, and runtimes that are slower by a known share."""

import json
import shutil
import time
from types import SimpleNamespace

import numpy as np

from optimize.artifact import Artifact
from optimize.config import Block
from optimize.runtimes import onnx
from optimize.stages import Entry

VERSION = 1
SLOWER = {SLOWER!r}


def _entry(method, gives):
    return Entry(verb="quantize", method=method, module=f"planted_stage.{method.replace('-', '_')}",
                 takes=("transformers",), gives=gives, summary="A model that answers as told.")


ENTRY = _entry("planted", "onnx")
SLOW = _entry("planted-slow", "onnx-planted-slow")
LIMIT = _entry("planted-limit", "onnx-planted-limit")


class Config(Block):
    """`quantize: planted`."""

    lost: tuple[int, ...] = ()
    """Words that are answered wrongly, of those that are answered rightly without."""
    gained: tuple[int, ...] = ()
    """Words that are answered rightly, of those that are answered wrongly without."""
    padding_bytes: int = 0
    """A file of so many bytes that nothing reads."""
    layers: int = 0
    """Matrix products that take time and change no answer."""


def run(artifact, config, context, format="onnx"):
    import onnx as graphs
    from onnx import TensorProto, helper, numpy_helper

    for name in artifact.files:
        if not name.endswith(".safetensors"):
            shutil.copyfile(artifact.path / name, context.directory / name)
    size = json.loads((artifact.path / "config.json").read_text())["vocab_size"]
    words = size - 5
    table = np.zeros((size, 2), np.float32)
    for word in range(words):
        right = word % {WRONG} != 0
        right = right and word not in config.lost or word in config.gained
        table[word + 5, word % 2 if right else 1 - word % 2] = 1
    generator = np.random.default_rng(0)
    width = 256
    weights = [numpy_helper.from_array(table, "table"),
               numpy_helper.from_array(np.array([1], np.int64), "one"),
               numpy_helper.from_array(np.array(1e-9, np.float32), "tiny")]
    nodes = [helper.make_node("Gather", ["input_ids", "one"], ["word"], axis=1),
             helper.make_node("Squeeze", ["word", "one"], ["flat"]),
             helper.make_node("Gather", ["table", "flat"], ["answer"])]
    last = "answer"
    if config.layers:
        embedding = generator.standard_normal((size, width)).astype(np.float32)
        weights.append(numpy_helper.from_array(embedding, "embedding"))
        nodes.append(helper.make_node("Gather", ["embedding", "input_ids"], ["x0"]))
        for layer in range(config.layers):
            weight = (generator.standard_normal((width, width)) / 16).astype(np.float32)
            weights.append(numpy_helper.from_array(weight, f"w{layer}"))
            nodes.append(helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"y{layer}"]))
            nodes.append(helper.make_node("Tanh", [f"y{layer}"], [f"x{layer + 1}"]))
        nodes += [helper.make_node("ReduceMax", [f"x{config.layers}"], ["m"], axes=[1, 2], keepdims=0),
                  helper.make_node("Unsqueeze", ["m", "one"], ["column"]),
                  helper.make_node("Mul", ["column", "tiny"], ["nothing"]),
                  helper.make_node("Add", ["answer", "nothing"], ["sum"])]
        last = "sum"
    nodes.append(helper.make_node("Identity", [last], ["logits"]))
    graph = helper.make_graph(
        nodes, "planted",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    graphs.save(model, context.directory / "model.onnx")
    if config.padding_bytes:
        (context.directory / "padding.txt").write_bytes(b" " * config.padding_bytes)
    return Artifact.from_directory(context.directory, format=format, task=artifact.task)


class Slow:
    def __init__(self, inner, share):
        self.inner, self.share = inner, share

    def run(self, inputs):
        start = time.perf_counter()
        outputs = self.inner.run(inputs)
        end = time.perf_counter()
        end += self.share * (end - start)
        time.sleep(max(0.0, end - time.perf_counter() - 1e-4))  # a sleep is never exact: the rest is waited out
        while time.perf_counter() < end:
            pass
        return outputs


def _runtime(share):
    def open(directory, threads, *, trust_remote_code=False):
        return Slow(onnx.open(directory, threads), share)

    return SimpleNamespace(open=open, parameters=onnx.parameters)


slow = _runtime(SLOWER["planted-slow"])
limit = _runtime(SLOWER["planted-limit"])
'''
METHOD = '''
"""{summary}

    stages:
      - quantize: {method}
"""

from planted_stage import VERSION, Config, run as _run


def run(artifact, config, context):
    return _run(artifact, config, context, format={format!r})
'''


def install(site: Path) -> None:
    """The stages and runtimes, as a distribution of a third party, for this process and those that it starts."""
    package = site / "planted_stage"
    information = site / "planted_stage-1.0.dist-info"
    package.mkdir(parents=True)
    information.mkdir()
    (package / "__init__.py").write_text(
        PLUGIN.replace("{SLOWER!r}", repr(SLOWER)).replace("{WRONG}", str(WRONG)), encoding="utf-8"
    )
    formats = {"planted": "onnx", "planted-slow": "onnx-planted-slow", "planted-limit": "onnx-planted-limit"}
    for method, format in formats.items():
        code = METHOD.format(summary="A model that answers as told.", method=method, format=format)
        (package / f"{method.replace('-', '_')}.py").write_text(code, encoding="utf-8")
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: planted_stage\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[optimize.stages]\nplanted = planted_stage:ENTRY\nplanted-slow = planted_stage:SLOW\n"
        "planted-limit = planted_stage:LIMIT\n"
        "[optimize.runtimes]\nonnx-planted-slow = planted_stage:slow\nonnx-planted-limit = planted_stage:limit\n"
    )
    sys.path.insert(0, str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])


class Project:
    """A model of `rows` words, a row for each of them, and a work folder in which a first version is promoted."""

    def __init__(self, folder: Path, rows: int = ROWS) -> None:
        self.folder, self.rows = folder, rows
        self.model, self.data = folder / "model", folder / "words.csv"
        _write_model(self.model, rows)
        with self.data.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([f"word{i}", ["even", "odd"][i % 2]] for i in range(rows))

    def recipe(
        self, gates: list[dict[str, Any]], candidate: Mapping[str, Any], *, method: str = "planted", **common: Any
    ) -> dict[str, Any]:
        """A recipe whose `candidate` is what `plain` is but for what is planted; `common` is said of both."""
        timed = any(gate["metric"] == "latency" for gate in gates)
        return {
            "version": 1,
            "name": NAME,
            "model": {"source": str(self.model), "task": "text-classification"},
            "data": {
                "text": "text",
                "label": "label",
                "splits": {"evaluation": str(self.data)},
            },
            "stages": [
                {"quantize": "planted", "name": "plain", **common},
                {"quantize": method, "name": "candidate", "from": "source", **common, **candidate},
            ],
            "baseline": "plain",
            "evaluate": {
                "latency": {"batch_sizes": [1], "sequence_length": 64, "threads": 1} if timed else None,
                "peak_memory": False,
                "fidelity": False,
                "batch_size": 500,
            },
            "gates": gates,
            "promote": {"alias": "production"},
        }

    def work(self, name: str) -> Path:
        return self.folder / "work" / name

    def promote(self, name: str, gates: list[dict[str, Any]], **common: Any) -> None:
        """Promote a first version that nothing is wrong with, in a work folder of that name."""
        import optimize

        free = [{"metric": "size", "max": 1e12}]
        recipe = self.recipe(gates, {}, **common)
        run = optimize.apply(
            {**recipe, "gates": free, "evaluate": {**recipe["evaluate"], "latency": None}}, work=self.work(name)
        )
        assert run.document["promoted"], run.summary

    def gate(self, name: str, gates: list[dict[str, Any]], candidate: Mapping[str, Any], **how: Any) -> Run:
        import optimize

        return optimize.gate(self.recipe(gates, candidate, **how), against=f"{NAME}@production", work=self.work(name))


def _write_model(folder: Path, words: int) -> None:
    """A BERT classifier with one word a token; the planted stage takes its tokenizer and its labels."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    vocabulary = {
        word: i
        for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(words))])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token="[MASK]", model_max_length=64, **special
    ).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        labels = {"id2label": {0: "even", 1: "odd"}, "label2id": {"even": 0, "odd": 1}}
        config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes, **labels)
        BertForSequenceClassification(config).save_pretrained(folder)


def flips(rows: int, share: float, seed: int, *, exact: bool) -> dict[str, list[int]]:
    """Words to lose, of those that are right: exactly that share of all rows, or each with the chance for it."""
    generator = np.random.default_rng(seed)
    right = np.array([word for word in range(rows) if word % WRONG])
    if exact:
        lost = generator.choice(right, round(share * rows), replace=False)
    else:
        lost = right[generator.random(right.size) < share * rows / right.size]
    return {"lost": sorted(lost.tolist())}


def caught(run: Run, metric: str) -> bool:
    """Whether the gate failed with exit code 1, and says which metric of which stage it was, over what."""
    failed = [gate for gate in run.document["gates"] if gate["verdict"] == "fail"]
    named = all(
        (gate["metric"], gate["artifact"], gate["over"]) == (metric, "candidate", "production") for gate in failed
    )
    told = f"{metric} of candidate" in run.summary or (metric == "latency" and "candidate is" in run.summary)
    return run.exit_code == 1 and bool(failed) and named and told


ACCURACY = [{"metric": "accuracy", "max_drop": 0.01}]
SIZE = [{"metric": "size", "max_ratio": 1.02}]
LATENCY = [{"metric": "latency", "min_speedup": 0.95}]
PADDING = 2_000_000
LAYERS = 24


def flips_case(project: Project, seed: int) -> Run:
    return project.gate("flips", ACCURACY, flips(project.rows, 0.02, seed, exact=True))


def flips_limit_case(project: Project, seed: int) -> Run:
    return project.gate("flips", ACCURACY, flips(project.rows, 0.01, seed, exact=False))


def bytes_case(project: Project, seed: int) -> Run:
    """5 % more bytes of all that ships, to the byte."""
    from optimize.work import Work

    work = Work(project.work("bytes"))
    whole = work.store.open(work.registry.resolve(f"{NAME}@production").digest).size_bytes
    more = {"padding_bytes": PADDING + math.ceil(0.05 * whole) + seed}
    return project.gate("bytes", SIZE, more, padding_bytes=PADDING)


def sleep_case(project: Project, seed: int) -> Run:
    return project.gate("sleep", LATENCY, {}, method="planted-slow", layers=LAYERS)


def sleep_limit_case(project: Project, seed: int) -> Run:
    return project.gate("sleep", LATENCY, {}, method="planted-limit", layers=LAYERS)


def same_case(project: Project, seed: int) -> Run:
    return project.gate("sleep", LATENCY, {}, layers=LAYERS)


CASES: dict[str, tuple[Callable[[Project, int], Run], str, dict[str, Any]]] = {
    "flips": (flips_case, "accuracy", {}),
    "bytes": (bytes_case, "size", {"padding_bytes": PADDING}),
    "sleep": (sleep_case, "latency", {"layers": LAYERS}),
    "flips-limit": (flips_limit_case, "accuracy", {}),
    "sleep-limit": (sleep_limit_case, "latency", {"layers": LAYERS}),
    "same": (same_case, "latency", {"layers": LAYERS}),
}
"""Name -> what is gated, the metric that has to be named, and what the promoted version was made with."""


def kept(name: str, verdicts: Counter[str], repeats: int) -> bool:
    """Whether the promise of that line holds."""
    from scipy.stats import binom

    if name in ("flips", "bytes", "sleep"):
        return verdicts["caught"] >= repeats - math.floor(repeats / 25)
    allowed = int(binom.ppf(0.99, repeats, 0.05))
    return verdicts["pass" if name.endswith("limit") else "fail"] <= allowed


def measure(name: str, repeats: int, project: Project) -> Counter[str]:
    """The verdicts of `repeats` gates; `caught` counts those that failed and named what was planted."""
    case, metric, common = CASES[name]
    place = name.split("-", maxsplit=1)[0].replace("same", "sleep")
    if not project.work(place).exists():
        project.promote(place, SIZE, **common)
    verdicts: Counter[str] = Counter()
    for seed in range(repeats):
        run = case(project, seed)
        verdicts[str(run.verdict)] += 1
        verdicts["caught"] += caught(run, metric)
    return verdicts


@contextlib.contextmanager
def planted_project(rows: int = ROWS) -> Iterator[Project]:
    with tempfile.TemporaryDirectory(prefix="regressions-") as name:
        install(Path(name) / "site")
        yield Project(Path(name), rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--only", default=",".join(CASES), help="names of lines, with commas between them")
    arguments = parser.parse_args()
    promises = []
    print("case         repeats  pass inconclusive  fail  caught seconds  promise")
    with planted_project() as project:
        for name in arguments.only.split(","):
            began = time.monotonic()
            found = measure(name, arguments.repeats, project)
            promises.append(kept(name, found, arguments.repeats))
            print(
                f"{name:<12} {arguments.repeats:>7} {found['pass']:>5} {found['inconclusive']:>12} {found['fail']:>5}"
                f" {found['caught']:>7} {time.monotonic() - began:>7.0f}  {'kept' if promises[-1] else 'BROKEN'}",
                flush=True,
            )
    return 0 if all(promises) else 1


if __name__ == "__main__":
    sys.exit(main())
