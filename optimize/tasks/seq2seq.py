"""Texts made of texts by an encoder and a decoder (T5, BART, Marian and their kin): summaries, translations, rewriting.

`task: summarization` is `task: text2text` with the columns that summaries usually have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from optimize.data import DataConfig
from optimize.errors import EvaluationError, OptimizeError, SourceError
from optimize.evaluate.rouge import ROUGE_1, ROUGE_2, ROUGE_L
from optimize.tasks import Features, Inputs, Metric, Task, written
from optimize.tasks.columns import listed, texts
from optimize.tasks.padding import NO_LABEL, pad, tokenize
from optimize.tasks.pretrained import first_line, load_model, load_tokenizer, read_config

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from optimize.runtimes import Runner

HEADS = ("ForConditionalGeneration", "MTModel", "EncoderDecoderModel")
"""How the names of architectures end that write from what an encoder has read."""
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
"""Model types that can serve as encoder and, with cross-attention put in, as decoder."""


class TextToTextData(DataConfig):
    """The `data` block of `task: text2text`."""

    text: str = "text"
    """The column of the text that is read."""
    target: str = "target"
    """The column of the text that is to be written."""
    prefix: str = ""
    """What is put before every text, such as `summarize: ` where the model was trained so."""
    max_length: int = Field(512, ge=1)
    """Tokens of a text that is read, at most; the rest is cut."""
    max_new_tokens: int = Field(128, ge=1)
    """Tokens written, at most; longer targets are cut in training."""
    num_beams: int = Field(1, ge=1)
    """Texts that are followed side by side while one is written; 1 takes the likeliest token each time."""
    length_penalty: float = 1.0
    """With beams a text is judged by its log-likelihood over its length to this power; more favours longer ones."""


class SummarizationData(TextToTextData):
    """The `data` block of `task: summarization`."""

    target: str = "summary"
    """The column of the summary."""


class TextToText(Task):
    """`spec`: {"name", "prefix", "max_length", "max_new_tokens", "num_beams", "length_penalty"}.

    Rows have the columns `text` and `target`. A model that is an encoder alone (BERT and its kin) is made a decoder as
    well, of the same weights with new cross-attention between them, which has to be trained (Rothe et al., 2020,
    https://arxiv.org/abs/1907.12461).
    """

    name: ClassVar[str] = "text2text"
    generates: ClassVar[bool] = True
    encodes: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ("max_new_tokens", "num_beams", "length_penalty")
    notes: ClassVar[tuple[str, ...]] = ("target",)
    Data: ClassVar[type[DataConfig]] = TextToTextData
    metrics: ClassVar[Mapping[str, Metric]] = {metric.name: metric for metric in (ROUGE_1, ROUGE_2, ROUGE_L)}
    default_metrics: ClassVar[tuple[str, ...]] = ("rouge1", "rouge2", "rougeL")

    # Rows

    def prepare(self, table: pa.Table, config: TextToTextData) -> tuple[pa.Table, dict[str, Any]]:
        import pyarrow as pa

        for key in ("text", "target"):
            if getattr(config, key) not in table.column_names:
                raise SourceError(
                    f"the data has no column {getattr(config, key)!r} for `data.{key}`",
                    hint=f"choose one of {', '.join(map(repr, table.column_names))}",
                )
        columns = {key: texts(table[getattr(config, key)], getattr(config, key)) for key in ("text", "target")}
        return pa.table(columns), {}

    def spec(self, config: TextToTextData, info: Mapping[str, Any]) -> dict[str, Any]:
        said = ("prefix", "max_length", "max_new_tokens", "num_beams", "length_penalty")
        return {"name": self.name, **{name: getattr(config, name) for name in said}}

    def rows_of(self, inputs: Sequence[Any]) -> pa.Table:
        """Strings, or dictionaries with `text`."""
        import pyarrow as pa

        found = [value.get("text") if isinstance(value, Mapping) else value for value in inputs]
        if not all(isinstance(text, str) and text.strip() for text in found):
            raise OptimizeError("inputs must be texts", hint='give ["The committee met on Tuesday to ..."]')
        return pa.table({"text": pa.array(found, pa.string())})

    # The model

    def check_source(self, path: Path, spec: Mapping[str, Any]) -> bool:
        config = read_config(path / "config.json")
        architectures = [str(name) for name in config.get("architectures") or ()]
        if any(name.endswith(HEADS) for name in architectures):
            return True
        if config.get("model_type") in ENCODERS and not config.get("is_decoder"):
            return False
        raise SourceError(
            f"the model writes nothing from what an encoder has read: {listed(architectures) or 'of no architecture'}",
            location=str(path),
            hint=f"take one whose architecture ends with {', '.join(HEADS)}, or an encoder ({', '.join(ENCODERS)})",
        )

    def load_model(self, path: Path, spec: Mapping[str, Any], *, trust_remote_code: bool = False) -> Any:
        if self.check_source(path, spec):
            return load_model("AutoModelForSeq2SeqLM", path, trained=True, trust_remote_code=trust_remote_code)
        return _of_encoder(path, self.preprocessor(path, trust_remote_code=trust_remote_code))

    def preprocessor(self, path: Path, *, trust_remote_code: bool = False) -> Any:
        return load_tokenizer(path, trust_remote_code=trust_remote_code)

    # Inputs

    def encode(self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any]) -> list[Features]:
        found = [spec["prefix"] + text for text in rows["text"].to_pylist()]
        return tokenize(preprocessor, found, max_length=spec["max_length"])

    def collate(self, preprocessor: Any, features: Sequence[Features], length: int | None = None) -> Inputs:
        return pad(preprocessor, features, length, side="right")

    def latency_inputs(
        self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any], *, batch_size: int, sequence_length: int
    ) -> Inputs:
        """Running text of the rows: the source, and, where a further token is timed, the tokens that are read then."""
        found = spec["prefix"] + " ".join(rows["text"].to_pylist())
        ids = preprocessor(found[: 64 * batch_size * sequence_length], verbose=False)["input_ids"]
        if not ids:
            raise EvaluationError("the evaluation rows have no text", hint="filter such rows out")
        needed = batch_size * sequence_length
        ids = (ids * -(-needed // len(ids)))[:needed]
        return self.collate(
            preprocessor,
            [
                {"input_ids": ids[start : start + sequence_length], "attention_mask": [1] * sequence_length}
                for start in range(0, needed, sequence_length)
            ],
        )

    # Training

    def examples(self, preprocessor: Any, rows: pa.Table, spec: Mapping[str, Any]) -> list[Features]:
        targets = preprocessor(
            text_target=rows["target"].to_pylist(), truncation=True, max_length=spec["max_new_tokens"]
        )["input_ids"]
        features = self.encode(preprocessor, rows, spec)
        return [{**row, "labels": labels} for row, labels in zip(features, targets, strict=True)]

    def collate_examples(self, preprocessor: Any, examples: Sequence[Features]) -> Inputs:
        import numpy as np

        labels = np.full((len(examples), max(len(row["labels"]) for row in examples)), NO_LABEL, dtype=np.int64)
        for i, row in enumerate(examples):
            labels[i, : len(row["labels"])] = row["labels"]
        inputs = [{name: row[name] for name in row if name != "labels"} for row in examples]
        return {**self.collate(preprocessor, inputs), "labels": labels}

    # Outputs

    def answer(
        self, runner: Runner, preprocessor: Any, inputs: Inputs, spec: Mapping[str, Any]
    ) -> list[tuple[str, int, float]]:
        """What the model writes for each row, how many tokens that is, and their mean log-likelihood in nats."""
        from optimize.beam import Search, write

        try:
            search = Search(spec["max_new_tokens"], spec["num_beams"], spec["length_penalty"])
        except ValueError as error:
            raise OptimizeError(str(error)) from error
        found = write(runner.writer(inputs), search)
        said = preprocessor.batch_decode([text.tokens for text in found], skip_special_tokens=True)
        return [
            (text.strip(), len(one.tokens), one.log_likelihood / len(one.tokens))
            for text, one in zip(said, found, strict=True)
        ]

    def read_outputs(self, raw: Mapping[str, NDArray[Any]], inputs: Inputs) -> NDArray[np.float32]:
        """Logits [batch, length, vocabulary] behind each of `decoder_input_ids`."""
        if "logits" not in raw:
            raise EvaluationError(f"the model gives no `logits`, but {listed(raw)}")
        return raw["logits"].astype("float32", copy=False)

    def combine(
        self, outputs: Sequence[Any], features: Sequence[Features], rows: pa.Table, spec: Mapping[str, Any]
    ) -> NDArray[Any]:
        """A record a row: its `text`, how many `tokens` that is, and their mean log-likelihood (`score`)."""
        import numpy as np

        said, tokens, scores = zip(*outputs, strict=True)
        return written.records(said, tokens=np.array(tokens, np.int32), score=np.array(scores, np.float32))

    def targets(self, rows: pa.Table) -> NDArray[Any]:
        """The texts that were to be written [n]."""
        import numpy as np

        return np.array(rows["target"].to_pylist(), dtype=object)

    def answers(self, outputs: NDArray[Any], spec: Mapping[str, Any]) -> list[dict[str, Any]]:
        """[{"text": what was written, "tokens": how many that is, "score": their mean log-likelihood}]."""
        return [
            {"text": text, "tokens": int(one["tokens"]), "score": float(one["score"])}
            for text, one in zip(written.texts_of(outputs), outputs, strict=True)
        ]

    def fidelity(self, outputs: NDArray[Any], reference: NDArray[Any]) -> dict[str, Any]:
        return written.fidelity(outputs, reference, "score")

    def flips(
        self,
        preprocessor: Any,
        rows: pa.Table,
        outputs: NDArray[Any],
        reference: NDArray[Any],
        spec: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        return written.flips(rows, outputs, reference, lambda some: self.answers(some, spec))


class Summarization(TextToText):
    """As `TextToText`."""

    name: ClassVar[str] = "summarization"
    Data: ClassVar[type[DataConfig]] = SummarizationData


def _of_encoder(path: Path, tokenizer: Any) -> Any:
    """Encoder and decoder of one encoder's weights, with new cross-attention; in float32, in evaluation mode."""
    import torch
    from transformers import EncoderDecoderModel

    from optimize.quiet import quiet

    how = {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True}
    settings = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in how.items()}
    try:
        with quiet():
            model: Any = EncoderDecoderModel.from_encoder_decoder_pretrained(str(path), str(path), **settings)
    except Exception as error:  # transformers, safetensors and torch each raise their own
        raise SourceError(
            f"no encoder and decoder can be made of it: {first_line(error)}", location=str(path)
        ) from error
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    if start is None or end is None or tokenizer.pad_token_id is None:
        raise SourceError("the tokenizer has no tokens that begin, end and pad a text", location=str(path))
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = start, end, tokenizer.pad_token_id
    model.config.vocab_size = model.config.decoder.vocab_size
    return model.eval()
