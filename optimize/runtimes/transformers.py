"""PyTorch, through the model classes of transformers.

Attention is the library's default (`sdpa`), the arithmetic that of the stored weights, and denormal numbers are kept:
PyTorch's defaults, and the same as ONNX Runtime's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import EvaluationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LONGEST_HEADER = 100_000_000
"""What safetensors itself accepts."""


class TorchRunner:
    """A loaded model that answers with a number of threads of its own."""

    def __init__(self, model: Any, threads: int) -> None:
        import inspect

        self.model = model
        self.threads = threads
        self.takes = frozenset(inspect.signature(model.forward).parameters)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        import torch

        before = torch.get_num_threads()
        # The number is the process's: another runner, or the caller, may want another.
        torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                outputs = self.model(
                    **{name: torch.from_numpy(array) for name, array in inputs.items() if name in self.takes}
                )
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise EvaluationError(f"the model can't take these inputs: {error}") from error
        finally:
            torch.set_num_threads(before)
        return {
            name: (value.float() if value.is_floating_point() else value).numpy()
            for name, value in outputs.items()
            if isinstance(value, torch.Tensor)
        }


def open(directory: Path, threads: int, *, trust_remote_code: bool = False) -> TorchRunner:
    """The model of `config.json`'s architecture, from safetensors and nothing else."""
    from optimize.quiet import quiet

    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        name = str(config["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EvaluationError(f"config.json names no architecture: {error!r}", location=str(directory)) from error
    cls, theirs = _model_class(name, config, trust_remote_code)
    try:
        with quiet():
            model, loading = cls.from_pretrained(
                directory, use_safetensors=True, local_files_only=True, output_loading_info=True, **theirs
            )
    except Exception as error:  # transformers, safetensors and torch each raise their own
        raise EvaluationError(f"the model can't be loaded: {error}", location=str(directory)) from error
    if missing := sorted(loading["missing_keys"]):
        # They would be random numbers.
        raise EvaluationError(f"the weights of {', '.join(missing[:5])} are missing", location=str(directory))
    return TorchRunner(model.eval(), threads)


def _model_class(name: str, config: Mapping[str, Any], trust_remote_code: bool) -> tuple[Any, dict[str, bool]]:
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
    """Elements of the floating-point tensors in the safetensors files; integers are buffers such as position ids."""
    return sum(
        math.prod(tensor["shape"])
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in _header(file).items()
        if name != "__metadata__" and "F" in tensor["dtype"]
    )


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
