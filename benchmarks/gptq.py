"""GPTQ beside its peers: seconds, peak memory and perplexity, from one run.

    python benchmarks/gptq.py [--settings 4x64 4x192 3x64] [--draws 3] [--samples 128] [--tokens 512] [--windows 64]
    python benchmarks/gptq.py --large

SmolLM2-135M (a language model whose linear weights already lie on a 4-bit grid of group 32, so groups are larger here)
is quantised by ours, by gptqmodel with its own defaults, and by rounding to nearest; each in a fresh process, one after
another, on the same windows of WikiText-2's training text. Seconds go from the model's folder to the written
checkpoint, without imports; memory is the whole process's peak. Perplexity is of the de-quantised weights in float32 on
the first windows of the test text: what the codes are worth, whoever's kernel serves them.

`--large` compares seconds and memory on a Llama of 1.1 B random weights in bfloat16 shards, with 8 samples of 256
tokens: on a small model most of a process's memory is its libraries.

Ours takes its compiled loops from the cache, as every run of it but a machine's first does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GPTQMODEL = "gptqmodel>=7.5,<7.6"
TOOLS = ("ours", "gptqmodel", "nearest")


# In the process that is measured


def ours(folder: str, out: str, bits: int, group_size: int, samples: int, tokens: int, seed: int) -> dict[str, Any]:
    """The stage `quantize: gptq` as a recipe runs it."""
    from optimize.calibration import Calibration
    from optimize.quantize import gptq

    artifact, context = room(Path(folder), Path(out))
    calibration = Calibration(num_samples=samples, max_length=tokens, seed=seed)
    config = gptq.Config(bits=bits, group_size=group_size, calibration=calibration, device="cpu")
    start = time.perf_counter()
    gptq.run(artifact, config, context)
    return {"seconds": time.perf_counter() - start}


def gptqmodel(folder: str, out: str, bits: int, group_size: int, windows: list[list[int]]) -> dict[str, Any]:
    """As its README has it."""
    from gptqmodel import GPTQModel, QuantizeConfig

    start = time.perf_counter()
    model = GPTQModel.load(f"{folder}/model", QuantizeConfig(bits=bits, group_size=group_size), device="cpu")
    calibration = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows]
    model.quantize(calibration, batch_size=8)
    model.save(out)
    return {"seconds": time.perf_counter() - start}


def child(tool: str) -> None:
    from peers import peak_bytes, serve

    def quantize(**request: Any) -> dict[str, Any]:
        found = ours(**request) if tool == "ours" else gptqmodel(**request)
        return {**found, "peak": peak_bytes()}

    if tool == "ours":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does

        import optimize.quantize.gptq
        import optimize.quantize.gptq_solver  # noqa: F401
    else:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(os.cpu_count()))

    serve({"quantize": quantize})


# In the process that measures


def room(folder: Path, out: Path) -> tuple[Any, Any]:
    """The model as an artifact, and what a stage is given."""
    from peers import TEXT

    from optimize import tasks
    from optimize.artifact import Artifact
    from optimize.context import Context
    from optimize.data import prepare
    from optimize.work import Work

    task = tasks.get("causal-lm")
    splits = {"calibration": f"{TEXT}/train.raw.gz", "evaluation": f"{TEXT}/test.raw.gz"}
    data = prepare(task.Data(splits=splits), task, Work(folder / "work"), folder)
    spec = task.spec(task.Data(splits=splits), data.info)
    out.mkdir(parents=True)
    scratch = Path(tempfile.mkdtemp(dir=folder))
    context = Context(out, scratch, task, data.for_stages(), scratch / "logs", stage="gptq")
    return Artifact.from_directory(folder / "model", format="transformers", task=spec), context


class Scorer:
    """Perplexity in float32 of the model with some of its weights replaced."""

    def __init__(self, model: Path, windows: Any) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.windows = windows

    def perplexity(self) -> float:
        import torch

        total, count = 0.0, 0
        with torch.inference_mode():
            for ids in torch.as_tensor(self.windows).split(4):
                logits = self.model(ids, use_cache=False).logits[:, :-1]
                total += float(
                    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
                )
                count += ids[:, 1:].numel()
        return float(torch.tensor(total / count).exp())

    def of(self, checkpoint: Path) -> float:
        """Of a GPTQ checkpoint."""
        import torch

        from optimize.quantize.gptq_format import load_layer, quantized_layers

        state = dict(self.weights)
        for name in quantized_layers(checkpoint):
            state[f"{name}.weight"] = torch.as_tensor(load_layer(checkpoint, name).dequantize())
        self.model.load_state_dict(state)
        return self.perplexity()

    def nearest(self, names: list[str], bits: int, group_size: int) -> float:
        """Of rounding to nearest, symmetric like the others."""
        import torch

        from optimize.quantize.gptq_solver import Grid, round_to_nearest

        grid = Grid(bits=bits, group_size=group_size, sym=True)
        state = dict(self.weights)
        for name in names:
            key = f"{name}.weight"
            state[key] = torch.as_tensor(round_to_nearest(state[key], grid).dequantize())
        self.model.load_state_dict(state)
        return self.perplexity()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", default=["4x64", "4x192", "3x64"], help="bits x group size")
    parser.add_argument("--draws", type=int, default=3, help="calibration draws for each setting")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64, help="of 512 tokens, scored")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tools", nargs="+", choices=TOOLS[:2], default=TOOLS[:2])
    parser.add_argument("--large", action="store_true", help="1.1 B weights, 8 samples of 256 tokens")
    parser.add_argument("--child", choices=TOOLS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return 0

    from peers import MODEL, TORCH, Process, environment

    from optimize.calibration import Calibration, calibration_batches
    from optimize.quantize.gptq_format import quantized_layers
    from optimize.recipe import Model
    from optimize.source import resolve_model

    request: dict[str, Any]
    pythons = {"ours": sys.executable, "gptqmodel": environment(GPTQMODEL, "optimum>=2.0", "requests", TORCH)}
    with tempfile.TemporaryDirectory(prefix="gptq-") as name:
        folder = Path(name)
        (folder / "model").mkdir()
        resolve_model(Model(source=MODEL, task="causal-lm"), folder).copy_to(folder / "model")
        if arguments.large:
            (folder / "model").rename(folder / "small")
            build_large(folder / "model", folder / "small")
            weights = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
            print(f"{weights / 1e9:.2f} GB of weights", flush=True)
            replies: dict[str, Any] = {}
            for tool in arguments.tools:
                request = {"bits": 4, "group_size": 64}
                if tool == "ours":
                    request |= {"samples": 8, "tokens": 256, "seed": 0}
                else:
                    request["windows"] = [[100 + (97 * i + 7 * j) % 4000 for j in range(256)] for i in range(8)]
                out = folder / f"{tool}-large"
                with Process(pythons[tool], __file__, "--child", tool, threads=arguments.threads) as process:
                    replies[tool] = process.ask(do="quantize", folder=str(folder), out=str(out), **request)
                shutil.rmtree(out)
                print(f"{tool:<10}{replies[tool]['seconds']:>9.0f} s{replies[tool]['peak'] / 1e9:>9.2f} GB", flush=True)
            if len(replies) == 2:
                ours, theirs = replies["ours"], replies["gptqmodel"]
                time_ratio, memory_ratio = (ours[key] / theirs[key] for key in ("seconds", "peak"))
                print(f"over gptqmodel: time {time_ratio:.2f}, memory {memory_ratio:.2f}")
            return 0
        artifact, context = room(folder, folder / "room")
        data = context.data.__class__(context.data.directory, context.data.digests, context.data.num_rows)
        tokenizer = context.task.preprocessor(artifact.path)
        spec = {**artifact.task, "context_length": 512, "stride": 512}
        test = context.task.encode(tokenizer, data.rows("evaluation"), spec)[: arguments.windows]
        scorer = Scorer(artifact.path, [window["input_ids"] for window in test])
        print(f"float32: perplexity {scorer.perplexity():.3f} on {len(test)} windows of 512 tokens", flush=True)
        print(
            f"{'bits x group':<14}{'draw':>5}  {'tool':<10}{'seconds':>9}{'peak GB':>9}{'perplexity':>12}", flush=True
        )
        found: dict[str, dict[str, list[dict[str, float]]]] = {}
        turn = 0
        for setting in arguments.settings:
            bits, group_size = map(int, setting.split("x"))
            found[setting] = {tool: [] for tool in TOOLS}
            for seed in range(arguments.draws):
                calibration = Calibration(num_samples=arguments.samples, max_length=arguments.tokens, seed=seed)
                windows = [
                    row
                    for batch in calibration_batches(artifact, calibration, context)
                    for row in batch["input_ids"].tolist()
                ]
                turn += 1
                for tool in sorted(arguments.tools, reverse=turn % 2 == 1):
                    request = {"bits": bits, "group_size": group_size}
                    if tool == "ours":
                        request |= {"samples": arguments.samples, "tokens": arguments.tokens, "seed": seed}
                    else:
                        request["windows"] = windows
                    out = folder / f"{tool}-{setting}-{seed}"
                    with Process(pythons[tool], __file__, "--child", tool, threads=arguments.threads) as process:
                        reply = process.ask(do="quantize", folder=str(folder), out=str(out), **request)
                    reply["perplexity"] = scorer.of(out)
                    layers = quantized_layers(out)
                    shutil.rmtree(out)
                    found[setting][tool].append(reply)
                    show(setting, seed, tool, reply)
            reply = {"perplexity": scorer.nearest(list(layers), bits, group_size)}
            found[setting]["nearest"] = [reply]
            show(setting, 0, "nearest", reply)
        if len(arguments.tools) == 2:
            report(found)
        return 0


def build_large(model: Path, small: Path) -> None:
    """A model of TinyLlama's shape, with the tokenizer of the small one."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(small)
    tokenizer.save_pretrained(model)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(model, max_shard_size="500MB")


def show(setting: str, seed: int, tool: str, reply: dict[str, float]) -> None:
    cost = f"{reply['seconds']:>9.1f}{reply['peak'] / 1e9:>9.2f}" if "seconds" in reply else " " * 18
    print(f"{setting:<14}{seed:>5}  {tool:<10}{cost}{reply['perplexity']:>12.3f}", flush=True)


def report(found: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """Ours over gptqmodel's, medians over the draws."""
    print(f"\n{'ours over gptqmodel':<22}{'seconds':>9}{'memory':>9}{'perplexity':>12}{'over nearest':>14}")
    for setting, tools in found.items():
        ratio = {
            key: statistics.median(one[key] for one in tools["ours"])
            / statistics.median(one[key] for one in tools["gptqmodel"])
            for key in ("seconds", "peak", "perplexity")
        }
        nearest = statistics.median(one["perplexity"] for one in tools["ours"]) / tools["nearest"][0]["perplexity"]
        print(f"{setting:<22}{ratio['seconds']:>9.2f}{ratio['peak']:>9.2f}{ratio['perplexity']:>12.4f}{nearest:>14.3f}")
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
