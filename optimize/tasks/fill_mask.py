"""Masked language models: which words stand behind the masks of a text."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from optimize.data import DataConfig
from optimize.errors import EvaluationError, OptimizeError, SourceError
from optimize.evaluate.masked import PSEUDO_PERPLEXITY, TOP1, TOP5
from optimize.tasks import Features, Inputs, Metric, Task
from optimize.tasks.causal_lm import log_softmax, rows_that_fit
from optimize.tasks.columns import listed, texts
from optimize.tasks.padding import NO_LABEL, exact_length, pad, tokenize
from optimize.tasks.pretrained import architectures, load_model, load_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from optimize.calibration import Calibration
    from optimize.runtimes import Runner

HEAD = "ForMaskedLM"
ROW, HIDDEN = "row", "hidden"
"""What an input says besides the model's own: its row, and for every place the token that the mask hides there
(`NO_LABEL` where there is no mask, `UNKNOWN` where nobody knows)."""
UNKNOWN = -1
LIKELIEST = 5
"""Tokens that are kept of each mask's distribution."""


class FillMaskData(DataConfig):
    """The `data` block of `task: fill-mask`."""

    text: str = "text"
    """The column of the text."""
    max_length: int = Field(128, ge=1)
    """Tokens a row, at most; the rest is cut."""
    mask_probability: float = Field(0.15, gt=0, le=1)
    """The share of a row's tokens that are masked at once, at least one; for training as for scoring."""
    mask_seed: int = 0
    """Of the draw of these tokens. A row's masks depend on the row alone: each model, and each epoch, sees the same."""
    one_by_one: bool = False
    """Score every token of a row, each masked in a copy of the row where all others are seen: the pseudo-perplexity of
    Salazar et al. (2020, https://arxiv.org/abs/1910.14659), which takes a row as many times as it has tokens. The
    default takes it once, and is a little higher, since several tokens are missing at a time. Changes no artifact."""


class FillMask(Task):
    """`spec`: {"name", "max_length": tokens, "mask_probability", "mask_seed"}.

    Rows have the column `text`, or, to be filled in, `masked`. Rows have different numbers of masks, so outputs are
    records.
    """

    name: ClassVar[str] = "fill-mask"
    Data: ClassVar[type[DataConfig]] = FillMaskData
    metrics: ClassVar[Mapping[str, Metric]] = {metric.name: metric for metric in (PSEUDO_PERPLEXITY, TOP1, TOP5)}
    default_metrics: ClassVar[tuple[str, ...]] = ("pseudo_perplexity", "top1")

    # Rows

    def prepare(self, table: pa.Table, config: FillMaskData) -> tuple[pa.Table, dict[str, Any]]:
        import pyarrow as pa

        if config.text not in table.column_names:
            raise SourceError(
                f"the data has no column {config.text!r} for `data.text`",
                hint=f"choose one of {', '.join(map(repr, table.column_names))}",
            )
        return pa.table({"text": texts(table[config.text], config.text)}), {"one_by_one": config.one_by_one}

    def spec(self, config: FillMaskData, info: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "name": self.name,
            "max_length": config.max_length,
            "mask_probability": config.mask_probability,
            "mask_seed": config.mask_seed,
        }

    def evaluation_spec(self, spec: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
        return {**spec, "one_by_one": bool(info.get("one_by_one"))}

    def rows_of(self, inputs: Sequence[Any]) -> pa.Table:
        """Texts with masks, or dictionaries with `text`."""
        import pyarrow as pa

        given = [value.get("text") if isinstance(value, Mapping) else value for value in inputs]
        if not all(isinstance(text, str) and text.strip() for text in given):
            raise OptimizeError("inputs must be texts", hint='give ["Paris is the [MASK] of France."]')
        return pa.table({"masked": pa.array(given, pa.string())})

    # The model

    def check_source(self, path: Path, spec: Mapping[str, Any]) -> bool:
        return any(name.endswith(HEAD) for name in architectures(path))

    def load_model(self, path: Path, spec: Mapping[str, Any], *, trust_remote_code: bool = False) -> Any:
        return load_model(
            "AutoModelForMaskedLM",
            path,
            trained=self.check_source(path, spec),
            trust_remote_code=trust_remote_code,
        )

    def preprocessor(self, path: Path, *, trust_remote_code: bool = False) -> Any:
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        if tokenizer.mask_token_id is None:
            raise SourceError(
                "the tokenizer has no mask token", location=str(path), hint="take a masked language model, such as BERT"
            )
        return tokenizer

    # Inputs

    def encode(self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any]) -> list[Features]:
        """The model's inputs, masked, with `row` and `hidden` beside them; several a row where tokens are masked one by
        one.
        """
        asked = "masked" in rows.column_names
        column: list[str] = rows["masked" if asked else "text"].to_pylist()
        mask, special = preprocessor.mask_token_id, set(preprocessor.all_special_ids)
        found = []
        for row, features in enumerate(tokenize(preprocessor, column, max_length=spec["max_length"])):
            ids = features["input_ids"]
            if asked:
                places = [place for place, token in enumerate(ids) if token == mask]
                if not places:
                    raise OptimizeError(
                        f"nothing to fill in: {column[row]!r}", hint=f"write {preprocessor.mask_token} for a word"
                    )
                draws = [places]
            else:
                places = [place for place, token in enumerate(ids) if token not in special]
                draws = [[place] for place in places] if spec.get("one_by_one") else [_drawn(places, ids, spec)]
            for draw in draws:
                masked, hidden = list(ids), [NO_LABEL] * len(ids)
                for place in draw:
                    masked[place], hidden[place] = mask, UNKNOWN if asked else ids[place]
                found.append({**features, "input_ids": masked, ROW: [row], HIDDEN: hidden})
        return found

    def collate(self, preprocessor: Any, features: Sequence[Features], length: int | None = None) -> Inputs:
        inputs = [{name: values for name, values in row.items() if name != ROW} for row in features]
        return pad(preprocessor, inputs, length, side="right", fill={HIDDEN: NO_LABEL, "labels": NO_LABEL})

    def batches(
        self, preprocessor: Any, features: Sequence[Features], batch_size: int
    ) -> Iterator[tuple[list[int], Inputs]]:
        yield from super().batches(preprocessor, features, rows_that_fit(preprocessor, features, batch_size))

    def calibration(
        self, preprocessor: Any, rows: pa.Table, path: Path, spec: Mapping[str, Any], calibration: Calibration
    ) -> list[Features]:
        features = super().calibration(preprocessor, rows, path, spec, calibration)
        return [{name: values for name, values in row.items() if name not in (ROW, HIDDEN)} for row in features]

    def latency_inputs(
        self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any], *, batch_size: int, sequence_length: int
    ) -> Inputs:
        columns = [rows["text"].to_pylist()]
        return exact_length(preprocessor, columns, batch_size=batch_size, sequence_length=sequence_length)

    # Training

    def examples(self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any]) -> list[Features]:
        features = self.encode(preprocessor, rows, spec)
        return [
            {**{name: values for name, values in row.items() if name not in (ROW, HIDDEN)}, "labels": row[HIDDEN]}
            for row in features
        ]

    def collate_examples(self, preprocessor: Any, examples: Sequence[Features]) -> Inputs:
        return self.collate(preprocessor, examples)

    # Outputs

    def read_outputs(self, raw: Mapping[str, NDArray[Any]], inputs: Inputs) -> NDArray[Any]:
        """The masks of each input in their order, [batch, M] of `mask_record`; where an input has fewer, their `token`
        is `NO_LABEL`.
        """
        import numpy as np

        if "logits" not in raw:
            raise EvaluationError(f"the model gives no `logits`, but {listed(raw)}")
        logits, hidden = raw["logits"], inputs[HIDDEN]
        if hidden.max() >= logits.shape[-1]:
            raise EvaluationError(
                f"the tokenizer gives token {hidden.max()}, and the model knows {logits.shape[-1]} only",
                hint="the tokenizer is not the model's: take the files of one model",
            )
        masks = hidden != NO_LABEL
        found = no_masks(len(hidden), int(masks.sum(axis=1).max()))
        for row, places in enumerate(masks):
            tokens = hidden[row, places]
            one = found[row, : len(tokens)]
            shares = log_softmax(logits[row, places].astype(np.float32, copy=False))
            own = np.where(tokens >= 0, shares[np.arange(len(tokens)), tokens], 0)
            top = np.argsort(-shares, axis=-1, kind="stable")[:, :LIKELIEST]
            one["token"], one["log_likelihood"], one["top"] = tokens, own, top
            one["rank"] = (shares > own[:, None]).sum(axis=-1)
            one["share"] = np.exp(np.take_along_axis(shares, top, axis=-1))
        return found

    def answer(
        self, runner: Runner, preprocessor: Any, inputs: Inputs, spec: Mapping[str, Any]
    ) -> list[tuple[NDArray[Any], str]]:
        """The masks of each input, and, where nobody knows what they hide, what `predict` says of them, as JSON."""
        masks = self.read_outputs(runner.run(inputs), inputs)
        asked = (inputs[HIDDEN] == UNKNOWN).any(axis=1)
        return [
            (of_row, _filled(preprocessor, of_row, ids) if ask else "")
            for of_row, ids, ask in zip(masks, inputs["input_ids"], asked, strict=True)
        ]

    def combine(
        self, outputs: Sequence[Any], features: Sequence[Features], rows: pa.Table, spec: Mapping[str, Any]
    ) -> NDArray[Any]:
        """One record a row, [n]: the `masks` of all its inputs [M], and the `text` that `predict` gives, as JSON."""
        import numpy as np

        of_rows: list[list[NDArray[Any]]] = [[no_masks(0)] for _ in range(rows.num_rows)]
        said = [b""] * rows.num_rows
        for (masks, text), row in zip(outputs, features, strict=True):
            (number,) = row[ROW]
            of_rows[number].append(masks[masks["token"] != NO_LABEL])
            said[number] = text.encode()
        joined = [np.concatenate(of_row) for of_row in of_rows]
        texts = np.array(said, dtype=np.bytes_)
        width = max(1, *map(len, joined))
        found = np.empty(len(joined), dtype=[("masks", mask_record(), (width,)), ("text", texts.dtype)])
        found["masks"], found["text"] = no_masks(len(joined), width), texts
        for one, masks in zip(found["masks"], joined, strict=True):
            one[: len(masks)] = masks
        return found

    def targets(self, rows: pa.Table) -> NDArray[Any]:
        """Nothing: a mask's record says itself which token was right."""
        import numpy as np

        return np.empty(0, dtype=np.int64)

    def answers(self, outputs: NDArray[Any], spec: Mapping[str, Any]) -> list[dict[str, Any]]:
        """[{"text": filled in, "fills": for each mask [{"token", "score"}], the likeliest first}], a row each."""
        return [json.loads(text) for text in outputs["text"].tolist()]

    def incomparable(self, outputs: NDArray[Any], reference: NDArray[Any]) -> str | None:
        import numpy as np

        if np.array_equal(outputs["masks"]["token"], reference["masks"]["token"]):
            return None
        return "its tokenizer cuts the text into other tokens, so that other ones are masked"

    def differences(self, outputs: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.float64]:
        """Of the hidden tokens' log-likelihoods, in nats; `outputs` as of `read_outputs`."""
        return super().differences(outputs["log_likelihood"], reference["log_likelihood"])

    def fidelity(self, outputs: NDArray[Any], reference: NDArray[Any]) -> dict[str, Any]:
        """`agreement`: the share of the `n` masks at which both think the same token the likeliest; `difference`: of
        the hidden token's log-likelihood, in nats.
        """
        from optimize.evaluate.fidelity import spread

        known = reference["masks"]["token"] >= 0
        ours, theirs = outputs["masks"][known], reference["masks"][known]
        same = ours["top"][:, 0] == theirs["top"][:, 0]
        apart = abs(ours["log_likelihood"].astype("float64") - theirs["log_likelihood"])
        return {
            "n": len(same),
            "agreement": float(same.mean()),
            "flips": int((~same).sum()),
            "difference": spread(apart),
        }

    def flips(
        self,
        preprocessor: Any,
        rows: pa.Table,
        outputs: NDArray[Any],
        reference: NDArray[Any],
        spec: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        """The rows where the likeliest token of a mask is another, with these masks."""
        ours, theirs = outputs["masks"], reference["masks"]
        changed = (ours["top"][..., 0] != theirs["top"][..., 0]) & (theirs["token"] >= 0)

        def tokens(ids: NDArray[Any]) -> list[str]:
            return preprocessor.convert_ids_to_tokens(ids.tolist())  # type: ignore[no-any-return]

        return [
            {
                "row": row,
                "text": rows["text"][row].as_py(),
                "hidden": tokens(theirs["token"][row, masks]),
                "baseline": tokens(theirs["top"][row, masks, 0]),
                "candidate": tokens(ours["top"][row, masks, 0]),
            }
            for row, masks in enumerate(changed)
            if masks.any()
        ]


def mask_record() -> np.dtype[Any]:
    """What is kept of a mask: the `token` that it hides, what `log_likelihood` in nats the model gave that, how many
    tokens it thought likelier (`rank`), and the `top` tokens with the `share` of each.
    """
    import numpy as np

    return np.dtype(
        [
            ("token", np.int32),
            ("log_likelihood", np.float32),
            ("rank", np.int32),
            ("top", np.int32, (LIKELIEST,)),
            ("share", np.float32, (LIKELIEST,)),
        ]
    )


def no_masks(*shape: int) -> NDArray[Any]:
    """Records that say that there is no mask."""
    import numpy as np

    found = np.zeros(shape, dtype=mask_record())
    found["token"] = NO_LABEL
    return found


def _drawn(places: Sequence[int], ids: Sequence[int], spec: Mapping[str, Any]) -> list[int]:
    """Some of the places, by the seed and the row's own tokens."""
    if not places:
        return []
    draw = random.Random(f"{spec['mask_seed']} {ids}")
    return sorted(draw.sample(places, max(1, round(spec["mask_probability"] * len(places)))))


def _filled(tokenizer: Any, masks: NDArray[Any], ids: NDArray[Any]) -> str:
    """What `predict` says of a text with masks, as JSON."""
    masks = masks[masks["token"] == UNKNOWN]
    filled = ids.copy()
    filled[ids == tokenizer.mask_token_id] = masks["top"][:, 0]
    fills = [
        [
            {"token": tokenizer.decode([token]).strip(), "score": share}
            for token, share in zip(mask["top"].tolist(), mask["share"].tolist(), strict=True)
        ]
        for mask in masks
    ]
    return json.dumps({"text": tokenizer.decode(filled, skip_special_tokens=True), "fills": fills})
