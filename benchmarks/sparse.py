"""Unstructured pruning beside the papers' own algorithms: seconds, peak memory and perplexity, from one run.

    python benchmarks/sparse.py [--sparsity 0.5 | --pattern 2:4] [--draws 3] [--samples 128] [--tokens 512]
    python benchmarks/sparse.py --large

SmolLM2-135M is pruned by magnitude, Wanda and SparseGPT, each in a fresh process, one after another, on the same
windows of WikiText-2's training text. `paper` is a port of the algorithms as their authors' code has them: the whole
model in memory in float32, block by block, all layers of a block on the inputs that the dense ones before them in it
gave, the inverse Hessian by Cholesky factors. Perplexity is in float32 on the first windows of the test text; memory is
that of the whole process at its peak.

`--large` measures Wanda and SparseGPT of ours on a Llama of 1.1 B random weights in bfloat16 shards.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOOLS: dict[str, dict[str, Any]] = {
    "magnitude": {"importance": "magnitude"},
    "wanda": {"importance": "wanda"},
    "wanda (paper)": {"paper": "wanda"},
    "sparsegpt": {"importance": "sparsegpt"},
    "sparsegpt, refine 0": {"importance": "sparsegpt", "refine": 0},
    "sparsegpt (paper)": {"paper": "sparsegpt"},
}


# In the process that is measured


def ours(folder: str, out: str, samples: int, tokens: int, seed: int, **settings: Any) -> dict[str, Any]:
    """The stage `prune: unstructured` as a recipe runs it."""
    from gptq import room

    from optimize.calibration import Calibration
    from optimize.prune import unstructured

    artifact, context = room(Path(folder), Path(out))
    calibration = Calibration(num_samples=samples, max_length=tokens, seed=seed)
    config = unstructured.Config(calibration=calibration, device="cpu", **settings)
    start = time.perf_counter()
    unstructured.run(artifact, config, context)
    return {"seconds": time.perf_counter() - start}


def paper(
    folder: str, out: str, windows: list[list[int]], method: str, sparsity: float, pattern: str
) -> dict[str, Any]:
    """A whole model, block by block, as the authors' scripts do it."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32).eval()
    model.config.use_cache = False
    blocks = model.model.layers
    states: list[Any] = []
    given: dict[str, Any] = {}

    class Reached(Exception):
        pass

    def catch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        states.append(args[0])
        given.update(kwargs)
        raise Reached

    hook = blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad():
        for window in windows:
            with contextlib.suppress(Reached):
                model(torch.tensor([window]))
        hook.remove()
        for block in blocks:
            layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
            moments = {layer: torch.zeros(layer.in_features, layer.in_features) for layer in layers}

            def add(layer: Any, args: Any, moments: dict[Any, Any] = moments) -> None:
                x = args[0].reshape(-1, args[0].shape[-1])
                moments[layer] += 2 / len(windows) * x.T @ x

            hooks = [layer.register_forward_pre_hook(add) for layer in layers]
            for state in states:
                block(state, **given)
            for hook in hooks:
                hook.remove()
            for layer in layers:
                prune = wanda if method == "wanda" else sparsegpt
                layer.weight.copy_(prune(layer.weight.clone(), moments[layer], sparsity, pattern))
            states = [block(state, **given) for state in states]
    model.save_pretrained(out)
    return {"seconds": time.perf_counter() - start}


def wanda(weight: Any, moment: Any, sparsity: float, pattern: str) -> Any:
    """Its Algorithm 1."""
    import torch

    scores = weight.abs() * moment.diagonal().sqrt()
    zeros, of = map(int, pattern.split(":")) if pattern else (int(weight.shape[1] * sparsity), weight.shape[1])
    groups = scores.reshape(-1, of)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.argsort(dim=1, stable=True)[:, :zeros], True)
    return weight.masked_fill(mask.view_as(weight), 0)


def sparsegpt(weight: Any, moment: Any, sparsity: float, pattern: str, damp: float = 0.01, size: int = 128) -> Any:
    """Its Algorithm 1, with the defaults of its authors."""
    import torch

    zeros, of = map(int, pattern.split(":")) if pattern else (0, 0)
    dead = moment.diagonal() == 0
    moment[dead, dead] = 1
    weight[:, dead] = 0
    moment.diagonal().add_(damp * moment.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True)
    for start in range(0, weight.shape[1], size):
        stop = min(start + size, weight.shape[1])
        block, factor = weight[:, start:stop].clone(), inverse[start:stop, start:stop]
        losses = torch.zeros_like(block)
        mask = torch.zeros_like(block, dtype=torch.bool)
        if not of:
            scores = block.square() / factor.diagonal().square()
            mask = scores <= scores.flatten().sort().values[int(scores.numel() * sparsity)]
        for i in range(stop - start):
            if of and i % of == 0:
                scores = block[:, i : i + of].square() / factor.diagonal()[i : i + of].square()
                mask.scatter_(1, i + scores.topk(zeros, dim=1, largest=False).indices, True)
            value = block[:, i].masked_fill(mask[:, i], 0)
            losses[:, i] = (block[:, i] - value) / factor[i, i]
            block[:, i:] -= losses[:, i : i + 1] * factor[i : i + 1, i:]
            weight[:, start + i] = value
        weight[:, stop:] -= losses @ inverse[start:stop, stop:]
    return weight


def child() -> None:
    from peers import peak_bytes, serve

    import optimize.prune.unstructured_kernels  # noqa: F401

    def prune(**request: Any) -> dict[str, Any]:
        found = paper(**request) if "windows" in request else ours(**request)
        return {**found, "peak": peak_bytes()}

    serve({"prune": prune})


# In the process that measures


def perplexity(folder: Path, windows: Any) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for ids in torch.as_tensor(windows).split(4):
            logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            total += float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
            count += ids[:, 1:].numel()
    return float(torch.tensor(total / count).exp())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", default="", help="N:M, in place of a sparsity")
    parser.add_argument("--draws", type=int, default=3, help="calibration draws")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64, help="of 512 tokens, scored")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--large", action="store_true", help="1.1 B weights; ours alone, 8 samples of 256 tokens")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child()
        return 0

    from gptq import build_large, room
    from peers import MODEL, Process

    from optimize.calibration import Calibration, calibration_batches
    from optimize.recipe import Model
    from optimize.source import resolve_model

    def ask(**request: Any) -> dict[str, Any]:
        with Process(sys.executable, __file__, "--child", threads=arguments.threads) as process:
            return process.ask(do="prune", folder=str(folder), out=str(folder / "out"), **request)

    with tempfile.TemporaryDirectory(prefix="sparse-") as name:
        folder = Path(name)
        (folder / "model").mkdir()
        resolve_model(Model(source=MODEL, task="causal-lm"), folder).copy_to(folder / "model")
        if arguments.large:
            (folder / "model").rename(folder / "small")
            build_large(folder / "model", folder / "small")
            weights = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
            for importance in ("wanda", "sparsegpt"):
                reply = ask(importance=importance, samples=8, tokens=256, seed=0)
                shutil.rmtree(folder / "out")
                seconds, peak = reply["seconds"], reply["peak"] / 1e9
                print(
                    f"{importance}, {weights / 1e9:.2f} GB of weights: {seconds:.0f} s, peak {peak:.2f} GB", flush=True
                )
            return 0
        artifact, context = room(folder, folder / "room")
        data = context.data.__class__(context.data.directory, context.data.digests, context.data.num_rows)
        spec = {**artifact.task, "context_length": 512, "stride": 512}
        tokenizer = context.task.preprocessor(artifact.path)
        test = context.task.encode(tokenizer, data.rows("evaluation"), spec)[: arguments.windows]
        scored = [window["input_ids"] for window in test]
        dense = perplexity(artifact.path, scored)
        print(f"dense: perplexity {dense:.3f} on {len(scored)} windows of 512 tokens", flush=True)
        print(f"{'draw':<6}{'tool':<22}{'seconds':>9}{'peak GB':>9}{'perplexity':>12}", flush=True)
        found: dict[str, list[dict[str, float]]] = {tool: [] for tool in arguments.tools}
        shape = {"mask_structure": arguments.pattern} if arguments.pattern else {"sparsity": arguments.sparsity}
        for seed in range(arguments.draws):
            calibration = Calibration(num_samples=arguments.samples, max_length=arguments.tokens, seed=seed)
            batches = calibration_batches(artifact, calibration, context)
            windows = [row for batch in batches for row in batch["input_ids"].tolist()]
            for tool in sorted(arguments.tools, reverse=seed % 2 == 1):
                settings = dict(TOOLS[tool])
                if method := settings.pop("paper", None):
                    pruned = {"sparsity": arguments.sparsity, "pattern": arguments.pattern}
                    reply = ask(windows=windows, method=method, **pruned)
                else:
                    drawn = {"samples": arguments.samples, "tokens": arguments.tokens, "seed": seed}
                    reply = ask(**drawn, **shape, **settings)
                reply["perplexity"] = perplexity(folder / "out", scored)
                shutil.rmtree(folder / "out")
                found[tool].append(reply)
                cost = f"{reply['seconds']:>9.1f}{reply['peak'] / 1e9:>9.2f}"
                print(f"{seed:<6}{tool:<22}{cost}{reply['perplexity']:>12.3f}", flush=True)
        report(found)
        return 0


def report(found: dict[str, list[dict[str, float]]]) -> None:
    """Ours over the papers', medians over the draws."""

    def median(tool: str, key: str) -> float:
        return statistics.median(one[key] for one in found[tool])

    pairs = [
        ("wanda", "wanda (paper)"),
        ("sparsegpt", "sparsegpt (paper)"),
        ("sparsegpt, refine 0", "sparsegpt (paper)"),
    ]
    pairs += [("sparsegpt", "wanda"), ("wanda", "magnitude")]
    print(f"\n{'':<44}{'seconds':>9}{'memory':>9}{'perplexity':>12}")
    for one, other in pairs:
        if one in found and other in found:
            ratio = {key: median(one, key) / median(other, key) for key in ("seconds", "peak", "perplexity")}
            line = f"{ratio['seconds']:>9.2f}{ratio['peak']:>9.2f}{ratio['perplexity']:>12.4f}"
            print(f"{f'{one} over {other}':<44}{line}")
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
