"""PyTorch, through the model classes of transformers.

Attention is the library's default (`sdpa`), the arithmetic that of the stored weights, and denormal numbers are kept:
PyTorch's defaults, and the same as ONNX Runtime's.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize import shapes
from optimize.errors import EvaluationError
from optimize.runtimes.seq2seq import SourceDecoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from optimize.runtimes import Decoder, Writer

_LONGEST_HEADER = 100_000_000
"""What safetensors itself accepts."""
_SCALES = ("SCB", "_weight_scale", "_weight_zero_point")
"""Beside codes of bitsandbytes and of torchao: how names end that are no weights."""


class TorchRunner:
    """A loaded model that answers with a number of threads of its own."""

    def __init__(self, model: Any, threads: int, takes: Iterable[str] | None = None) -> None:
        import inspect

        self.model = model
        self.threads = threads
        self.takes = tuple(inspect.signature(model.forward).parameters if takes is None else takes)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        import torch

        with self.answering():
            outputs = self.model(
                **{name: torch.from_numpy(array) for name, array in inputs.items() if name in self.takes}
            )
        return {
            name: (value.float() if value.is_floating_point() else value).numpy()
            for name, value in outputs.items()
            if isinstance(value, torch.Tensor)
        }

    def decoder(self, max_length: int) -> Decoder:
        config = getattr(self.model, "config", None)
        if config is None or not self.model.can_generate() or "past_key_values" not in self.takes:
            raise EvaluationError(f"{type(self.model).__name__} is no decoder: it has no key/value cache to go on from")
        return SourceDecoder(self, max_length) if config.is_encoder_decoder else TorchDecoder(self, max_length)

    def writer(self, inputs: Mapping[str, NDArray[Any]]) -> Writer:
        from optimize.runtimes.transformers_seq2seq import TorchWriter

        return TorchWriter(self, inputs)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """This runner's threads, no gradients, and PyTorch's errors as ours."""
        import torch

        before = torch.get_num_threads()
        # The number is the process's: another runner, or the caller, may want another.
        torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                yield
        except (RuntimeError, IndexError, ValueError, TypeError, AssertionError) as error:
            raise EvaluationError(f"the model can't take these inputs: {error}") from error
        finally:
            torch.set_num_threads(before)


class TorchDecoder:
    """A sequence with the cache that `generate` uses by default, which grows with it.

    No mask and no positions are given: with one sequence and no padding the model derives both from the cache.
    """

    def __init__(self, runner: TorchRunner, max_length: int) -> None:
        import numpy as np

        self._runner = runner
        self._ids = np.empty(max_length, dtype=np.int64)
        # Logits of one token: those of a long prompt would be most of the memory, and a good part of the time.
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in runner.takes else {}
        self._empty()

    def _empty(self) -> None:
        from transformers import DynamicCache

        self.length = 0
        self._cache = DynamicCache(config=self._runner.model.config)

    def forward(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        import torch

        end = self.length + len(input_ids)
        if end > len(self._ids):
            raise EvaluationError(f"a sequence of {end} tokens does not fit in {len(self._ids)}")
        with self._runner.answering():
            logits = self._runner.model(
                input_ids=torch.from_numpy(input_ids)[None],
                past_key_values=self._cache,
                use_cache=True,
                **self._last_only,
            ).logits
        self._ids[self.length : end] = input_ids
        self.length = end
        return logits[0, -1].float().numpy()  # type: ignore[no-any-return]

    def truncate(self, length: int) -> None:
        from transformers.cache_utils import DynamicLayer

        if all(type(layer) is DynamicLayer for layer in self._cache.layers):
            self._cache.crop(min(length - self.length, 0))
            self.length = min(length, self.length)
        elif length < self.length:
            # A window or a state has let go of older tokens, and can only be had by reading them again.
            self._empty()
            if length:
                self.forward(self._ids[:length].copy())


def open(directory: Path, threads: int, *, trust_remote_code: bool = False) -> TorchRunner:
    """The model of `config.json`'s architecture, from safetensors and nothing else."""
    from optimize.quiet import quiet
    from optimize.runtimes.quantized import serving

    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        name = str(config["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EvaluationError(f"config.json names no architecture: {error!r}", location=str(directory)) from error
    cls, theirs = model_class(name, config, trust_remote_code)
    try:
        with quiet(), serving(config) as settings:
            model, loading = shapes.carried(cls, directory).from_pretrained(
                directory,
                dtype="auto",  # that of the files: a cast model computes in what it was cast to
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **theirs,
                **settings,
            )
    except EvaluationError:
        raise
    except Exception as error:  # transformers, safetensors and torch each raise their own
        raise EvaluationError(f"the model can't be loaded: {error}", location=str(directory)) from error
    if missing := sorted(loading["missing_keys"]):
        # They would be random numbers.
        raise EvaluationError(f"the weights of {', '.join(missing[:5])} are missing", location=str(directory))
    return TorchRunner(model.eval(), threads)


def model_class(name: str, config: Mapping[str, Any], trust_remote_code: bool) -> tuple[Any, dict[str, bool]]:
    """(the class of that name, what its loader has to be told). Raises `EvaluationError` where there is none."""
    import transformers

    cls = getattr(transformers, name, None)
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        return cls, {}
    for auto, where in (config.get("auto_map") or {}).items():
        if trust_remote_code and str(where).endswith(f".{name}") and auto.startswith("AutoModel"):
            return getattr(transformers, auto), {"trust_remote_code": True}
    raise EvaluationError(
        f"transformers {transformers.__version__} has no model class {name!r}",
        hint="a model with code of its own needs `trust_remote_code: true` in the recipe",
    )


def parameters(directory: Path) -> int:
    """Elements of the floating-point tensors in the safetensors files; integers are buffers such as position ids.

    Quantised weights count as many as they were, and their scales not at all.
    """
    tensors = {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in _header(file).items()
        if name != "__metadata__"
    }
    count = 0
    for name, tensor in tensors.items():
        layer, _, end = name.rpartition(".")
        if end == "_weight_qdata":  # torchao's codes
            count += math.prod(tensor["shape"])
        elif end == "qweight":  # GPTQ's codes, as a stream of bits
            count += tensors[f"{layer}.g_idx"]["shape"][0] * tensor["shape"][1]
        elif f"{name}.quant_map" in tensors:  # bitsandbytes' 4-bit codes, two in a byte
            start, stop = tensor["data_offsets"]
            count += 2 * (stop - start)
        elif f"{layer}.quant_map" in tensors or end in _SCALES or (end == "scales" and f"{layer}.qweight" in tensors):
            continue
        elif "F" in tensor["dtype"] or (end == "weight" and f"{layer}.SCB" in tensors):
            count += math.prod(tensor["shape"])
    return count


def _header(file: Path) -> dict[str, Any]:
    """The JSON at the head of a safetensors file: 8 bytes of its length (little endian), then the text."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            return json.loads(stream.read(length))  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise EvaluationError(f"no safetensors file: {error}", location=str(file)) from error
