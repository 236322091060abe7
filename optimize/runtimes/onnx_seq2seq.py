"""ONNX models with an encoder and a decoder: two graphs, `encoder.onnx` and `decoder.onnx`.

The encoder takes `input_ids` and `attention_mask` [batch, source] and gives, for every layer of the decoder, the keys
and values that its cross-attention reads: `cross.N.key` and `cross.N.value` [batch, heads, source, size]. The decoder
takes them, the mask as `encoder_attention_mask`, `input_ids` [batch, length] and `past_key_values.N.key` and `.value`
[batch, heads, past, size] (past may be 0); it gives `logits` [batch, length, vocabulary] and `present.N.key` and
`.value`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import EvaluationError
from optimize.runtimes.seq2seq import SourceDecoder, control_tokens_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
GRAPHS = (ENCODER, DECODER)


class OnnxSeq2SeqRunner:
    """Both graphs, loaded."""

    def __init__(self, encoder: Any, decoder: Any, directory: Path) -> None:
        self.encoder = encoder
        self.decode = decoder
        self.tokens = control_tokens_of(directory)
        self.caches = {
            value.name: value.shape for value in decoder.get_inputs() if value.name.startswith("past_key_values")
        }
        self.cross = [value.name for value in encoder.get_outputs()]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The logits of all of `decoder_input_ids` [batch, length] at once, as in training."""
        writer = OnnxWriter(self, inputs)
        return {"logits": writer.read(inputs["decoder_input_ids"])}

    def writer(self, inputs: Mapping[str, NDArray[Any]]) -> OnnxWriter:
        return OnnxWriter(self, inputs)

    def decoder(self, max_length: int) -> SourceDecoder:
        return SourceDecoder(self, max_length)


class OnnxWriter:
    """Keys and values stay where ONNX Runtime put them: nothing is copied from step to step."""

    def __init__(self, runner: OnnxSeq2SeqRunner, inputs: Mapping[str, NDArray[Any]]) -> None:
        import numpy as np
        from onnxruntime import OrtValue

        self._runner = runner
        self._value = OrtValue.ortvalue_from_numpy
        self.tokens = runner.tokens
        self.rows = len(inputs["input_ids"])
        mask = self._value(inputs["attention_mask"])
        source = {"input_ids": self._value(inputs["input_ids"]), "attention_mask": mask}
        self._held = dict(zip(runner.cross, _run(runner.encoder, runner.cross, source), strict=True))
        self._held["encoder_attention_mask"] = mask
        for name, shape in runner.caches.items():
            self._held[name] = self._value(np.empty((self.rows, shape[1], 0, shape[3]), dtype=np.float32))

    def read(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append tokens [rows, n]; the logits [rows, n, vocabulary] behind each."""
        given = {**self._held, "input_ids": self._value(input_ids)}
        presents = [name.replace("past_key_values", "present", 1) for name in self._runner.caches]
        logits, *caches = _run(self._runner.decode, ["logits", *presents], given)
        self._held.update(zip(self._runner.caches, caches, strict=True))
        return logits.numpy()  # type: ignore[no-any-return]

    def forward(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.read(input_ids[:, None])[:, -1]

    def keep(self, rows: NDArray[np.int64]) -> None:
        self.rows = len(rows)
        self._held = {name: self._value(value.numpy()[rows]) for name, value in self._held.items()}

    def truncate(self, length: int) -> None:
        import numpy as np

        for name in self._runner.caches:
            self._held[name] = self._value(np.ascontiguousarray(self._held[name].numpy()[:, :, :length]))


def _run(session: Any, names: list[str], inputs: Mapping[str, Any]) -> list[Any]:
    try:
        return session.run_with_ort_values(names, inputs)  # type: ignore[no-any-return]
    except Exception as error:  # ONNX Runtime has a class of its own for every status
        raise EvaluationError(f"the model can't take these inputs: {error}") from error
