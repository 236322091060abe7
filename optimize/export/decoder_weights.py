"""What a checkpoint stands for: the model in float32, and the codes of its quantised layers as ONNX Runtime wants them.

Every number of a GPTQ layer, or of one of bitsandbytes, is the same float whether it is read from the checkpoint,
from this model, or from the graph: nothing is rounded again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optimize.errors import StageError
from optimize.export import nbits
from optimize.quantize.checkpoint import empty_model
from optimize.quiet import quiet
from optimize.tasks.pretrained import read_config

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from optimize.artifact import Artifact
    from optimize.context import Context

Codes = dict[str, "nbits.Packed | nbits.Bnb4"]


def load(artifact: Artifact, context: Context, block: int) -> tuple[Any, Codes]:
    """(the model in float32, layers that compute on codes by name; empty for a checkpoint in float).

    Codes of integers lie in blocks of at most `block` inputs.

    Raises `StageError` where the weights are quantised in a way that the graph could not hold.
    """
    config = read_config(artifact.path / "config.json")
    quantization = config.get("quantization_config")
    if not quantization:
        model = context.task.load_model(artifact.path, artifact.task, trust_remote_code=artifact.trust_remote_code)
        return model, {}
    readers = {"gptq": _read_gptq, "bitsandbytes": _read_bitsandbytes}
    method = quantization.get("quant_method")
    if method not in readers:
        raise StageError(
            f"weights quantised by {method!r} can't be exported", hint=f"known are {', '.join(sorted(readers))}"
        )
    return readers[method](artifact.path, empty_model(artifact, config), block)


def _filled(skeleton: Any, state: dict[str, Tensor]) -> Any:
    import torch

    with quiet():
        model, loading = type(skeleton).from_pretrained(
            None, config=skeleton.config, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
    if missing := sorted(loading["missing_keys"]):
        raise StageError(f"the weights of {', '.join(missing[:5])} are missing")
    return model.eval()


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _place(skeleton: Any, name: str) -> tuple[str, nn.Module]:
    """The module of a name in the files, which may lack the first part."""
    for full in (name, f"{skeleton.base_model_prefix}.{name}"):
        try:
            return full, skeleton.get_submodule(full)
        except AttributeError:
            continue
    raise StageError(f"the checkpoint quantises {name}, which the model does not have")


def _oriented(weight: Tensor, module: nn.Module) -> Tensor:
    """A weight [out, in] as its module stores it: GPT-2's Conv1D the other way round."""
    from transformers.pytorch_utils import Conv1D

    return weight.T.contiguous() if isinstance(module, Conv1D) else weight


def _read_gptq(folder: Path, skeleton: Any, block: int) -> tuple[Any, Codes]:
    from optimize.quantize import gptq_format

    gptq_format.read_config(folder)
    tensors = _tensors(folder)
    codes: Codes = {}
    for key in [key for key in sorted(tensors) if key.endswith(".qweight")]:
        name = key.removesuffix(".qweight")
        parts = {end: tensors.pop(f"{name}.{end}") for end in gptq_format.TENSORS}
        layer, bits = gptq_format.unpack(parts), gptq_format.bits_of(parts["qweight"].shape, parts["g_idx"].shape)
        full, module = _place(skeleton, name)
        codes[full] = nbits.pack(layer, bits, block)
        tensors[f"{name}.weight"] = _oriented(layer.dequantize(), module)
    return _filled(skeleton, tensors), codes


def _read_bitsandbytes(folder: Path, skeleton: Any, block: int) -> tuple[Any, Codes]:
    """NF4 and FP4 with their absolute maxima expanded; LLM.int8()'s rows, each with its scale."""
    import torch

    from optimize.runtimes.quantized import load_library

    load_library("bitsandbytes", extra="bitsandbytes")
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    tensors = _tensors(folder)
    codes: Codes = {}
    for key in [key for key in sorted(tensors) if key.endswith((".SCB", ".weight.absmax"))]:
        name = key.removesuffix(".SCB").removesuffix(".weight.absmax")
        full, module = _place(skeleton, name)
        stored = tensors.pop(f"{name}.weight")
        if key.endswith(".SCB"):
            scales = tensors.pop(key).float() / 127
            tensors.pop(f"{name}.weight_format", None)
            codes[full] = nbits.rows(stored, scales, block)
            weight = stored.float() * scales[:, None]
        else:
            parts = {part: tensors.pop(part) for part in list(tensors) if part.startswith(f"{name}.weight.")}
            state = QuantState.from_dict(
                {part.removeprefix(f"{name}.weight."): value for part, value in parts.items()},
                device=torch.device("cpu"),
            )
            absmax = state.absmax
            if state.nested:
                absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
            state.dtype, (out, width) = torch.float32, state.shape
            codes[full] = nbits.Bnb4(
                stored.flatten(), absmax.float(), state.blocksize, state.quant_type == "nf4", out, width
            )
            weight = dequantize_4bit(stored, state)
        tensors[f"{name}.weight"] = _oriented(weight.float(), module)
    return _filled(skeleton, tensors), codes
