"""Texts that a model with an encoder writes, a batch at once: greedily or by beam search, through any runtime's
`Writer`. One search for every format, so that where two models' texts differ, the models do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from optimize.runtimes import Writer


@dataclass(frozen=True)
class Search:
    """How texts are searched for. Raises `ValueError` for what can't be."""

    max_new_tokens: int
    num_beams: int = 1
    """Texts that are followed side by side; 1 takes the likeliest token each time."""
    length_penalty: float = 1.0
    """A finished text is judged by its log-likelihood over its length to this power; more favours longer ones."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is at least 1")


@dataclass(frozen=True)
class Written:
    """A text as tokens: without the start token, with the one that ended it, if any."""

    tokens: list[int]
    log_likelihood: float
    """In nats, of all its tokens together."""


def write(writer: Writer, search: Search) -> list[Written]:
    """A text for each row that `writer` holds; it has written nothing yet."""
    return _greedy(writer, search) if search.num_beams == 1 else _beams(writer, search)


def _greedy(writer: Writer, search: Search) -> list[Written]:
    import numpy as np

    rows = list(range(writer.rows))
    tokens: list[list[int]] = [[] for _ in rows]
    likelihood = [0.0] * len(rows)
    ids = np.full(len(rows), writer.tokens.start, dtype=np.int64)
    for _ in range(search.max_new_tokens):
        shares = _shares(writer, ids)
        ids = shares.argmax(axis=1)
        for row, token, share in zip(rows, ids.tolist(), shares, strict=True):
            tokens[row].append(token)
            likelihood[row] += float(share[token])
        going = [i for i, token in enumerate(ids.tolist()) if token not in writer.tokens.ends]
        if not going:
            break
        if len(going) < len(rows):
            writer.keep(np.array(going))
            rows, ids = [rows[i] for i in going], ids[going]
    return [Written(*found) for found in zip(tokens, likelihood, strict=True)]


def _beams(writer: Writer, search: Search) -> list[Written]:
    """As Graves (2012, arXiv:1211.3711) and Wu et al. (2016, arXiv:1609.08144) have it, and transformers by its
    defaults: a row is done once it has `num_beams` finished texts and the best open one, were it to end now, is none
    better.
    """
    import numpy as np

    beams, ends = search.num_beams, writer.tokens.ends
    rows = list(range(writer.rows))
    finished: list[list[tuple[float, Written]]] = [[] for _ in rows]
    open_texts: list[list[Written]] = [[Written([], 0.0)] + [Written([], -np.inf)] * (beams - 1) for _ in rows]
    writer.keep(np.repeat(np.arange(len(rows)), beams))
    ids: NDArray[np.int64] = np.full(len(rows) * beams, writer.tokens.start, dtype=np.int64)
    for length in range(1, search.max_new_tokens + 1):
        shares = _shares(writer, ids).reshape(len(rows), beams, -1)
        going: list[int] = []
        origins: list[int] = []
        for i, (row, of_row) in enumerate(zip(rows, shares, strict=True)):
            texts = open_texts[row]
            likelihood = np.array([text.log_likelihood for text in texts])[:, None] + of_row
            kept: list[tuple[int, Written]] = []
            for rank, place in enumerate(_largest(likelihood.ravel(), beams * (1 + len(ends)))):
                beam, token = divmod(int(place), of_row.shape[1])
                text = Written([*texts[beam].tokens, token], float(likelihood[beam, token]))
                if token not in ends:
                    kept.append((beam, text))
                elif rank < beams:
                    finished[row].append((text.log_likelihood / length**search.length_penalty, text))
                if len(kept) == beams:
                    break
            finished[row] = sorted(finished[row], key=lambda one: -one[0])[:beams]
            open_texts[row] = [text for _, text in kept]
            best_open = kept[0][1].log_likelihood / length**search.length_penalty
            if len(finished[row]) < beams or finished[row][-1][0] < best_open:
                going.append(row)
                origins += [i * beams + beam for beam, _ in kept]
        rows = going
        if not rows:
            break
        writer.keep(np.array(origins))
        ids = np.array([text.tokens[-1] for row in rows for text in open_texts[row]], dtype=np.int64)
    for row in rows:
        finished[row] += [
            (text.log_likelihood / len(text.tokens) ** search.length_penalty, text) for text in open_texts[row]
        ]
    return [max(found, key=lambda one: one[0])[1] for found in finished]


def _shares(writer: Writer, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Log-probabilities of the next tokens [rows, vocabulary]; a text is never padded from within."""
    import numpy as np
    from scipy.special import log_softmax

    logits = writer.forward(ids).astype(np.float64)
    if writer.tokens.pad is not None and writer.tokens.pad not in writer.tokens.ends:
        logits[:, writer.tokens.pad] = -np.inf
    return np.asarray(log_softmax(logits, axis=1))


def _largest(values: NDArray[np.float64], count: int) -> NDArray[Any]:
    """Places of the largest values, the largest first; of equal ones the first."""
    import numpy as np

    count = min(count, len(values))
    least = np.partition(values, len(values) - count)[len(values) - count]
    places = np.flatnonzero(values >= least)
    return places[np.argsort(-values[places], kind="stable")][:count]
