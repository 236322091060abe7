"""Causal language models: a running text, cut into windows of tokens, and how well each next token is foretold."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from optimize.data import DataConfig
from optimize.errors import EvaluationError, OptimizeError, SourceError, StageError
from optimize.evaluate.metrics import PERPLEXITY
from optimize.tasks import Features, Inputs, Metric, Task
from optimize.tasks.columns import listed
from optimize.tasks.padding import NO_LABEL
from optimize.tasks.pretrained import load_model, load_tokenizer, read_config

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from optimize.calibration import Calibration

HEADS = ("ForCausalLM", "LMHeadModel")
"""How the names of architectures that foretell the next token end."""
POSITIONS = 256
"""Positions of all windows together at which the whole distribution is kept, to compare it with another model's; at
least one a window."""
BATCH_BYTES = 256 * 2**20
"""Of the logits of one batch; a single window may take more."""
BLOCK_CHARACTERS = 16
"""Of a block of text for one calibration window, a token: about four windows of English."""
WORST = 20
"""Windows that are told when a model is held against another."""
SAMPLED = "sampled"
SCORED = "scored"


class CausalLMData(DataConfig):
    """The `data` block of `task: causal-lm`."""

    text: str = "text"
    """The column of the text: a line or a document a row. Lines of a text file are rows of the column `text`."""
    separator: str = "\n"
    """What stands between two rows when they are joined into one text; "\\n" gives a text file back as it was."""
    context_length: int = Field(512, ge=2)
    """Tokens a window."""
    stride: int | None = Field(None, ge=1)
    """Tokens from one window's start to the next one's; the default is `context_length`. With a smaller one windows
    overlap, and of each but the first only the last `stride` tokens are scored."""
    max_windows: int | None = Field(None, ge=1)
    """Score only so many windows, from the beginning of the evaluation split."""

    @model_validator(mode="after")
    def _windows_leave_no_gap(self) -> CausalLMData:
        if self.stride is not None and self.stride > self.context_length:
            raise ValueError(f"stride {self.stride} is longer than context_length {self.context_length}")
        return self


class CausalLM(Task):
    """`spec`: {"name", "context_length": tokens, "stride": tokens, "separator"}.

    Rows have the column `text`. They are joined with `separator` and tokenised as one text, with the special tokens
    that the tokenizer puts around any text (Llama's: one at the very beginning), then cut into windows: the protocol
    of published WikiText-2 perplexities. A window's first token is not scored, since nothing foretells it.
    """

    name: ClassVar[str] = "causal-lm"
    generates: ClassVar[bool] = True
    unit: ClassVar[str] = "windows"
    passage: ClassVar[int] = 200
    Data: ClassVar[type[DataConfig]] = CausalLMData
    metrics: ClassVar[Mapping[str, Metric]] = {PERPLEXITY.name: PERPLEXITY}
    default_metrics: ClassVar[tuple[str, ...]] = ("perplexity",)

    # Rows

    def prepare(self, table: pa.Table, config: CausalLMData) -> tuple[pa.Table, dict[str, Any]]:
        import pyarrow as pa
        import pyarrow.compute as pc

        if config.text not in table.column_names:
            raise SourceError(
                f"the data has no column {config.text!r} for `data.text`",
                hint=f"choose one of {', '.join(map(repr, table.column_names))}",
            )
        column = table[config.text]
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise SourceError(f"column {config.text!r} holds {column.type}, not text")
        rows = pa.table({"text": pc.fill_null(column.cast(pa.string()), "")})
        return rows, {"max_windows": config.max_windows}

    def spec(self, config: CausalLMData, info: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "name": self.name,
            "context_length": config.context_length,
            "stride": config.stride or config.context_length,
            "separator": config.separator,
        }

    def evaluation_spec(self, spec: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
        return {**spec, "max_windows": info.get("max_windows")}

    def rows_of(self, inputs: Sequence[Any]) -> pa.Table:
        """Strings, or dictionaries with `text`."""
        import pyarrow as pa

        texts = [value.get("text") if isinstance(value, Mapping) else value for value in inputs]
        if not all(isinstance(text, str) for text in texts):
            raise OptimizeError("inputs must be texts", hint='give ["Once upon a time"]')
        return pa.table({"text": pa.array(texts, pa.string())})

    # The model

    def check_source(self, path: Path, spec: Mapping[str, Any]) -> bool:
        config = read_config(path / "config.json")
        architectures = config.get("architectures") or ()
        if not any(str(name).endswith(HEADS) for name in architectures):
            raise SourceError(
                f"the model foretells no next token: it is {listed(map(str, architectures)) or 'of no architecture'}",
                location=str(path),
                hint=f"take one whose architecture ends with {' or '.join(HEADS)}",
            )
        longest = max_positions(config)
        if longest is not None and spec["context_length"] > longest:
            raise SourceError(
                f"context_length {spec['context_length']} is longer than the model's {longest} positions",
                location=str(path),
                hint=f"set data.context_length to at most {longest}",
            )
        return True

    def load_model(self, path: Path, spec: Mapping[str, Any], *, trust_remote_code: bool = False) -> Any:
        if quantised := read_config(path / "config.json").get("quantization_config"):
            method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
            raise SourceError(
                f"the model is quantised already ({method}); this needs its floating-point weights",
                location=str(path),
                hint="begin with the model as it was before; a quantised one is served by a runtime",
            )
        return load_model("AutoModelForCausalLM", path, trained=True, trust_remote_code=trust_remote_code)

    def preprocessor(self, path: Path, *, trust_remote_code: bool = False) -> Any:
        return load_tokenizer(path, trust_remote_code=trust_remote_code)

    # Inputs

    def encode(self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any]) -> list[Features]:
        """The rows as one text, cut into windows: `input_ids`, `attention_mask`, which tokens are `scored`
        [context_length], and at which of these the distribution is kept (`sampled`: positions [K], K alike in all).
        """
        length, stride = spec["context_length"], spec.get("stride", spec["context_length"])
        ids = _tokens(preprocessor, spec.get("separator", "\n").join(rows["text"].to_pylist()))
        windows = [(start, ids[start : start + length]) for start in _starts(len(ids), length, stride)]
        windows = windows[: spec.get("max_windows")]
        positions = max(1, min(POSITIONS // max(len(windows), 1), stride - 1))
        generator = random.Random(0)
        features = []
        for start, window in windows:
            first = 1 if start == 0 else length - stride
            scored = range(max(first, 1), len(window))
            features.append(
                {
                    "input_ids": window,
                    "attention_mask": [1] * len(window),
                    SCORED: [int(i in scored) for i in range(length)],
                    SAMPLED: sorted(generator.choices(scored, k=positions)),
                }
            )
        return features

    def collate(self, preprocessor: Any, features: Sequence[Features], length: int | None = None) -> Inputs:
        """Padded on the right, where no token of a causal model sees it."""
        import numpy as np

        width = length or max(len(row["input_ids"]) for row in features)
        batch: Inputs = {}
        for name in features[0]:
            if name in (SCORED, SAMPLED):
                batch[name] = np.array([row[name] for row in features], dtype=np.int64)
                continue
            fill = (preprocessor.pad_token_id or 0) if name == "input_ids" else 0
            batch[name] = np.full((len(features), width), fill, dtype=np.int64)
            for i, row in enumerate(features):
                values = row[name][:width]
                batch[name][i, : len(values)] = values
        return batch

    def batches(
        self, preprocessor: Any, features: Sequence[Features], batch_size: int
    ) -> Iterator[tuple[list[int], Inputs]]:
        yield from super().batches(preprocessor, features, rows_that_fit(preprocessor, features, batch_size))

    def calibration(
        self, preprocessor: Any, rows: pa.Table, path: Path, spec: Mapping[str, Any], calibration: Calibration
    ) -> list[Features]:
        """Windows of exactly `max_length` tokens at seeded places that do not overlap.

        The text is taken in blocks of rows, shuffled, so that a corpus of gigabytes is not tokenised for a hundred
        windows: one window of each block, at a random place, and more only where there are not enough blocks.
        """
        config = read_config(path / "config.json")
        length, wanted = calibration.max_length, calibration.num_samples
        longest = max_positions(config)
        if longest is not None and length > longest:
            raise StageError(
                f"calibration wants windows of {length} tokens, longer than the model's {longest} positions",
                hint=f"set calibration.max_length to at most {longest}",
            )
        generator = random.Random(calibration.seed)
        separator = spec.get("separator", "\n")
        blocks = list(_blocks(rows["text"].to_pylist(), separator, BLOCK_CHARACTERS * length))
        generator.shuffle(blocks)
        first: list[list[int]] = []
        rest: list[list[int]] = []
        for block in blocks:
            ids = _tokens(preprocessor, block, special=False)
            offset = generator.randint(0, len(ids) % length)
            windows = [ids[start : start + length] for start in range(offset, len(ids) - length + 1, length)]
            generator.shuffle(windows)
            first += windows[:1]
            rest += windows[1:]
            if len(first) == wanted:
                break
        chosen = [*first, *rest][:wanted]
        vocabulary = _text_config(config).get("vocab_size")
        outside = max((max(window) for window in chosen), default=0)
        if isinstance(vocabulary, int) and outside >= vocabulary:
            raise StageError(
                f"the tokenizer gives token {outside}, and the model knows {vocabulary} only",
                hint="the tokenizer is not the model's: take the files of one model",
            )
        return [{"input_ids": window, "attention_mask": [1] * length} for window in chosen]

    def latency_inputs(
        self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any], *, batch_size: int, sequence_length: int
    ) -> Inputs:
        text = "\n".join(rows["text"].to_pylist())
        ids = _tokens(preprocessor, text[: 64 * batch_size * sequence_length])
        if not ids:
            raise EvaluationError("the evaluation rows have no text", hint="filter such rows out")
        needed = batch_size * sequence_length
        ids = (ids * -(-needed // len(ids)))[:needed]
        windows = [ids[start : start + sequence_length] for start in range(0, needed, sequence_length)]
        return self.collate(
            preprocessor, [{"input_ids": window, "attention_mask": [1] * sequence_length} for window in windows]
        )

    # Training

    def examples(self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any]) -> list[Features]:
        """Windows that do not overlap; each token but a window's first is to be foretold."""
        apart = {**spec, "stride": spec["context_length"]}
        windows = self.encode(preprocessor, rows, apart)
        taken = ("input_ids", "attention_mask")
        return [{**{name: row[name] for name in taken}, "labels": row["input_ids"]} for row in windows]

    def collate_examples(self, preprocessor: Any, examples: Sequence[Features]) -> Inputs:
        import numpy as np

        inputs = self.collate(preprocessor, [{name: row[name] for name in row if name != "labels"} for row in examples])
        labels = np.full(inputs["input_ids"].shape, NO_LABEL, dtype=np.int64)
        for i, row in enumerate(examples):
            labels[i, : len(row["labels"])] = row["labels"]
        return {**inputs, "labels": labels}

    # Outputs

    def read_outputs(self, raw: Mapping[str, NDArray[Any]], inputs: Inputs) -> NDArray[Any]:
        """One record a window, [batch]: `token` [L], what `log_likelihood` [L] in nats the model gave it, and whether
        that counts (`scored` [L]); the `top` token [L]; `distribution` [K, V]: log-probabilities at sampled positions.

        Position 0 is never scored. L is `context_length`, whatever the length of the batch.
        """
        import numpy as np

        if "logits" not in raw:
            raise EvaluationError(f"the model gives no `logits`, but {listed(raw)}")
        logits, ids, scored, sampled = raw["logits"], inputs["input_ids"], inputs[SCORED], inputs[SAMPLED]
        (count, width), length, vocabulary = ids.shape, scored.shape[1], logits.shape[-1]
        if ids.max() >= vocabulary:
            raise EvaluationError(
                f"the tokenizer gives token {ids.max()}, and the model knows {vocabulary} only",
                hint="the tokenizer is not the model's: take the files of one model",
            )
        records = np.zeros(count, dtype=record(length, sampled.shape[1], vocabulary))
        records["scored"] = scored
        records["token"][:, :width] = ids
        for row in range(count):
            # In pieces: the exponentials of a window would take as much memory as its logits.
            for start in range(0, width - 1, 64):
                stop = min(start + 64, width - 1)
                piece = logits[row, start:stop].astype(np.float32, copy=False)
                shares = log_softmax(piece)
                following = slice(start + 1, stop + 1)
                records["top"][row, following] = piece.argmax(axis=-1)
                records["log_likelihood"][row, following] = shares[np.arange(stop - start), ids[row, following]]
                for k, position in enumerate(sampled[row]):
                    if start < position <= stop:
                        # What is less likely than half precision can say has no share in any divergence.
                        lowest = np.finfo(np.float16).min
                        records["distribution"][row, k] = np.maximum(shares[position - 1 - start], lowest)
        records["log_likelihood"] *= records["scored"]
        return records

    def targets(self, rows: pa.Table) -> NDArray[Any]:
        """Nothing: a window's record says itself which tokens were right."""
        import numpy as np

        return np.empty(0, dtype=np.int64)

    def incomparable(self, outputs: NDArray[Any], reference: NDArray[Any]) -> str | None:
        import numpy as np

        if all(np.array_equal(outputs[name], reference[name]) for name in ("token", "scored")):
            return None
        return "its tokenizer cuts the text into other tokens or windows, so that perplexities are of different things"

    def fidelity(self, outputs: NDArray[Any], reference: NDArray[Any]) -> dict[str, Any]:
        from optimize.evaluate.fidelity import token_fidelity

        return token_fidelity(outputs, reference)

    def flips(
        self,
        preprocessor: Any,
        rows: pa.Table,
        outputs: NDArray[Any],
        reference: NDArray[Any],
        spec: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        """The windows whose log-likelihood fell most, the worst first."""
        lost = reference["log_likelihood"].sum(axis=1) - outputs["log_likelihood"].sum(axis=1)
        worst = [int(i) for i in lost.argsort()[::-1][:WORST] if lost[i] > 0]
        before, after = (self.answers(answers[worst], spec) for answers in (reference, outputs))
        return [
            {
                "window": i,
                # Not what pads the last window: its tokens are neither scored nor followed by any that is.
                "text": preprocessor.decode(outputs["token"][i][: 1 + outputs["scored"][i].nonzero()[0].max()]),
                "baseline": then,
                "candidate": now,
            }
            for i, then, now in zip(worst, before, after, strict=True)
        ]

    def answers(self, outputs: NDArray[Any], spec: Mapping[str, Any]) -> list[dict[str, Any]]:
        """[{"perplexity": of the window, "tokens": how many were scored}], a window each."""
        return [
            {"perplexity": PERPLEXITY.compute(outputs[i : i + 1], outputs[:0]), "tokens": int(window["scored"].sum())}
            for i, window in enumerate(outputs)
        ]


def record(length: int, positions: int, vocabulary: int) -> np.dtype[Any]:
    """What `CausalLM.read_outputs` says of a window of `length` tokens."""
    import numpy as np

    return np.dtype(
        [
            ("token", np.int32, (length,)),
            ("log_likelihood", np.float32, (length,)),
            ("scored", np.bool_, (length,)),
            ("top", np.int32, (length,)),
            ("distribution", np.float16, (positions, vocabulary)),
        ]
    )


def rows_that_fit(tokenizer: Any, features: Sequence[Features], batch_size: int) -> int:
    """At most `batch_size`, and no more than keep the logits of the longest rows below `BATCH_BYTES`."""
    longest = max((len(row["input_ids"]) for row in features), default=1)
    return max(1, min(batch_size, BATCH_BYTES // (4 * longest * len(tokenizer))))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Over the last axis."""
    import numpy as np

    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def max_positions(config: Mapping[str, Any]) -> int | None:
    """How many tokens a model of that `config.json` can take, where it says so."""
    found = _text_config(config)
    longest = found.get("max_position_embeddings", found.get("n_positions"))
    return longest if isinstance(longest, int) else None


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a `config.json` about the language model, where the model has others beside it."""
    part = config.get("text_config")
    return part if isinstance(part, Mapping) else config


def _tokens(preprocessor: Any, text: str, *, special: bool = True) -> list[int]:
    # verbose: else it warns that the text is longer than the model takes, which windows are for.
    return list(preprocessor(text, add_special_tokens=special, verbose=False)["input_ids"])


def _starts(tokens: int, length: int, stride: int) -> Iterator[int]:
    """Where windows begin: every token but the first is scored once, and nothing but the text's end is short."""
    start = 0
    while start == 0 or start + length - stride < tokens:
        if tokens - start > 1:
            yield start
        start += stride


def _blocks(texts: Sequence[str], separator: str, characters: int) -> Iterator[str]:
    """Consecutive rows joined, each block at least so many characters long but for the last."""
    block: list[str] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text) + len(separator)
        if size >= characters:
            yield separator.join(block)
            block, size = [], 0
    if block:
        yield separator.join(block)
