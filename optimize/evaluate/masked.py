"""How well a masked language model foretells the tokens that masks hide, of records that hold them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from optimize.evaluate.metrics import of_sums, perplexity_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def _log_likelihoods(outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
    """A row's log-likelihood in nats, and how many of its tokens were masked [n, 2]."""
    import numpy as np

    masks = outputs["masks"]
    known = masks["token"] >= 0
    return np.stack([(masks["log_likelihood"] * known).sum(axis=1, dtype=np.float64), known.sum(axis=1)], axis=1)


def _hits(best: int, outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
    """How many tokens were among the `best` likeliest, and how many were masked [n, 2]."""
    import numpy as np

    masks = outputs["masks"]
    known = masks["token"] >= 0
    return np.stack([((masks["rank"] < best) & known).sum(axis=1), known.sum(axis=1)], axis=1).astype(np.float64)


def _share_of(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return sums[..., 0] / sums[..., 1]


PSEUDO_PERPLEXITY = of_sums("pseudo_perplexity", _log_likelihoods, perplexity_of, higher_is_better=False)
TOP1 = of_sums("top1", partial(_hits, 1), _share_of)
TOP5 = of_sums("top5", partial(_hits, 5), _share_of)
"""Whole rows are resampled: the tokens of a row depend on each other."""
