"""A run.json as pandas frames: one row an artifact, a comparison, a gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optimize.notebook.extras import need
from optimize.run import verdict_on

_PHASES = {"latency": ("batch", "batch_size"), "prefill": ("prompt", "prompt_length"), "decode": ("", "")}


def artifacts(document: Mapping[str, Any]) -> Any:
    """By name: how it was made, its bytes, each score with the ends of its interval, and its times.

    Columns of a metric are `accuracy`, `accuracy_low`, `accuracy_high`; of times `p50_ms_batch_8`, of language models
    `prefill_ms_prompt_128`, `decode_ms` and `decode_tokens_per_second`. Where a setting was measured with several
    lengths or threads, these follow: `p50_ms_batch_8_length_128`.
    """
    several = _several(document)
    rows = []
    for one in document["artifacts"]:
        row = {name: one[name] for name in ("name", "stage", "format", "size_bytes", "bits_per_weight")}
        scores = one["scores"]
        for metric, score in scores.items():
            if isinstance(score, Mapping) and "value" in score:
                low, high = score["ci"]
                row |= {metric: score["value"], f"{metric}_low": low, f"{metric}_high": high}
        for score in scores.get("latency") or ():
            row |= _times(score, several)
        row["peak_memory_bytes"] = scores.get("peak_memory_bytes")
        row["verdict"] = verdict_on(document, one["name"])
        row |= {"seconds": one["seconds"], "cached": one["cached"], "digest": one["digest"]}
        rows.append(row)
    return need("pandas", "run.artifacts").DataFrame(rows).set_index("name")


def comparisons(document: Mapping[str, Any]) -> Any:
    """One row a comparison: what was compared, at which setting, the estimate with the ends of its interval."""
    names = ("artifact", "over", "metric", "setting", "unit", "estimate", "low", "high", "confidence", "n")
    rows = [{**one, "low": one["ci"][0], "high": one["ci"][1]} for one in document["comparisons"]]
    return need("pandas", "run.comparisons").DataFrame(rows, columns=names)


def gates(document: Mapping[str, Any]) -> Any:
    """One row a gate and artifact: the limit, what was found, how far from the limit it lies, and the verdict."""
    names = ("metric", "artifact", "over", "setting", "limit", "value", "estimate", "low", "high", "margin")
    rows = []
    for one in document["gates"]:
        ((limit, value),) = one["limit"].items()
        rows.append({**one, "limit": limit, "value": value, "low": one["ci"][0], "high": one["ci"][1]})
    return need("pandas", "run.gates").DataFrame(rows, columns=(*names, "verdict", "reason"))


def _several(document: Mapping[str, Any]) -> set[str]:
    """Of lengths and threads, what was measured at more than one value."""
    scores = [score for one in document["artifacts"] for score in one["scores"].get("latency") or ()]
    names = ("sequence_length", "threads")
    return {name for name in names if len({score[name] for score in scores if name in score}) > 1}


def _times(score: Mapping[str, Any], several: set[str]) -> dict[str, Any]:
    phase = score.get("phase", "latency")
    word, key = _PHASES[phase]
    end = f"_{word}_{score[key]}" if word else ""
    end += f"_length_{score['sequence_length']}" if "sequence_length" in several & score.keys() else ""
    end += f"_threads_{score['threads']}" if "threads" in several & score.keys() else ""
    if phase == "latency":
        return {f"p50_ms{end}": score["p50_ms"], f"p90_ms{end}": score["p90_ms"]}
    found = {f"{phase}_ms{end}": score["p50_ms"]}
    return found | ({f"decode_tokens_per_second{end}": score["tokens_per_second"]} if phase == "decode" else {})
