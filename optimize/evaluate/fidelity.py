"""How far one model's outputs lie from another's on the same rows: a loss is pinned on the stage that caused it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def fidelity(outputs: NDArray[np.float32], reference: NDArray[np.float32]) -> dict[str, Any]:
    """Compare logits [n, classes] with a reference's.

    `kl`: KL(reference || candidate) a row, in nats. `cosine_distance`: 1 - cosine of the two rows. Both as mean,
    median, 99 % and 99.9 % quantile and maximum over rows. `flips`: rows whose top answer differs, `flip_rate` their
    share.
    Outputs with one number a row have no distribution and no top answer: `difference` (absolute) is all there is.
    """
    ours, theirs = (array.reshape(len(array), -1).astype(np.float64) for array in (outputs, reference))
    found: dict[str, Any] = {"n": len(ours)}
    if ours.shape[1] < 2:
        return {**found, "difference": spread(np.abs(ours - theirs)[:, 0])}
    flips = int((ours.argmax(axis=1) != theirs.argmax(axis=1)).sum())
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosine = np.divide((ours * theirs).sum(axis=1), lengths, out=np.ones(len(ours)), where=lengths > 0)
    return {
        **found,
        "kl": spread(_divergence(_log_softmax(ours), _log_softmax(theirs))),
        "cosine_distance": spread(np.maximum(1 - cosine, 0.0)),
        "flips": flips,
        "flip_rate": flips / len(ours),
    }


def token_fidelity(outputs: NDArray[Any], reference: NDArray[Any]) -> dict[str, Any]:
    """Compare records of windows, as `optimize.tasks.causal_lm` reads them, with a reference's.

    `agreement`: the share of the `n` scored tokens at which both think the same token the likeliest. `kl`:
    KL(reference || candidate) in nats at the `kl_positions` where the distributions were kept (the same in every
    model), as in `fidelity`. Half precision makes a divergence below 1e-4 noise.
    """
    scored = outputs["scored"]
    same = (outputs["top"] == reference["top"])[scored]
    found = {"n": int(scored.sum()), "agreement": float(same.mean()), "flips": int((~same).sum())}
    if outputs["distribution"].shape != reference["distribution"].shape:
        return found
    # A window at a time: in double precision all of them would take four times their memory.
    divergences = [
        _divergence(*(_log_softmax(window.astype(np.float64)) for window in pair))
        for pair in zip(outputs["distribution"], reference["distribution"], strict=True)
    ]
    kl = np.concatenate(divergences)
    return {**found, "kl": spread(kl), "kl_positions": len(kl)}


def _divergence(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(theirs || ours) of log-probabilities [n, classes]."""
    return np.maximum((np.exp(theirs) * (theirs - ours)).sum(axis=1), 0.0)  # type: ignore[no-any-return]


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))  # type: ignore[no-any-return]


def spread(values: NDArray[np.float64]) -> dict[str, float]:
    """Mean, median, 99 % and 99.9 % quantile, and maximum."""
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p99": float(np.quantile(values, 0.99)),
        "p999": float(np.quantile(values, 0.999)),
        "max": float(values.max()),
    }
