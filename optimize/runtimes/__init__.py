"""One file a format. A runtime opens an artifact's folder and turns named arrays into named arrays; it knows no task.

Third parties add a format with an entry point in the group `optimize.runtimes` whose value is a module like `onnx.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from optimize.artifact import Artifact
    from optimize.runtimes.seq2seq import ControlTokens


class Decoder(Protocol):
    """One sequence that grows, with its key/value cache: prefill is a `forward` of many tokens, decoding of one."""

    length: int
    """Tokens in the cache."""

    def forward(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append tokens [n]; the logits [vocabulary] that follow the last one. Valid until the next call."""

    def truncate(self, length: int) -> None:
        """Forget every token after the first `length`."""


class Writer(Protocol):
    """A batch of texts that a decoder writes, each from what an encoder has read: the rows go on token by token."""

    tokens: ControlTokens
    """Those that begin, end and pad a text."""
    rows: int

    def forward(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append a token to each row [rows]; the logits [rows, vocabulary] of the next one."""

    def keep(self, rows: NDArray[np.int64]) -> None:
        """Go on with these rows, in this order; one may be named several times, or not at all."""

    def truncate(self, length: int) -> None:
        """Forget every token written after the first `length`."""


class Runner(Protocol):
    """An opened model, ready to answer."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Names that the model does not take are left out; outputs are float32 where the model computes in less."""

    def decoder(self, max_length: int) -> Decoder:
        """An empty sequence of at most so many tokens. Raises `EvaluationError` where the model is no decoder."""

    def writer(self, inputs: Mapping[str, NDArray[Any]]) -> Writer:
        """The batch as its encoder reads it. Of models with an encoder and a decoder alone."""


class Runtime(Protocol):
    """What a runtime's module holds."""

    def open(self, directory: Path, threads: int, *, trust_remote_code: bool = False) -> Runner:
        """Load with exactly that many threads. Raises `EvaluationError` where the files are not what they claim."""

    def parameters(self, directory: Path) -> int:
        """How many parameters the model has, read from the files without loading them."""


RUNTIMES: dict[str, str] = {
    "transformers": "optimize.runtimes.transformers",
    "onnx": "optimize.runtimes.onnx",
    "pytorch": "optimize.runtimes.pytorch",
    "openvino": "optimize.runtimes.openvino",
    "torchscript": "optimize.runtimes.torchscript",
    "torch_export": "optimize.runtimes.torch_export",
}


def get(format: str) -> Runtime:
    """The runtime of a format. Raises `KeyError` where there is none."""
    if format in RUNTIMES:
        return cast("Runtime", import_module(RUNTIMES[format]))
    from importlib.metadata import entry_points

    for point in entry_points(group="optimize.runtimes", name=format):
        return cast("Runtime", point.load())
    raise KeyError(format)


def open_artifact(artifact: Artifact, threads: int) -> Runner:
    return get(artifact.format).open(artifact.path, threads, trust_remote_code=artifact.trust_remote_code)
