"""The checkpoint that AutoGPTQ began and GPTQModel, transformers, vLLM and others load: `checkpoint_format: gptq`.

A quantised linear layer of `in` inputs and `out` outputs is four tensors; codes of `bits` bits lie one after the other
in a stream of 32-bit words, lowest bits first (of 3 bits, 32 codes fill 3 words, and two of them straddle a boundary):

    qweight  int32 [in * bits / 32, out]       codes, packed along the inputs
    qzeros   int32 [groups, out * bits / 32]   zero points less 1, packed along the outputs
    scales   float16 [groups, out]
    g_idx    int32 [in]                        the group of each input; groups = ceil(in / group_size)

Bits and group size may differ by layer: `dynamic` in config.json has a regular expression of its name for each that is
not as the rest, and the shapes say the same.

weight[o, i] = scales[g, o] * (code[i, o] - zero[g, o]), with g = g_idx[i]. Because the zero point is stored less 1 and
loaders add 1 to whole words, a zero point of 0 would carry into its neighbour: `Grid`s give 1 to 2^bits - 1.

What loads it is narrower than the format. Measured with transformers 5.23, optimum 2 and GPTQModel 7.5, on the CPU:

- `in` and `out` must be multiples of 32 (else words are not whole: `pack` refuses);
- `group_size` must be -1, 16, 32, 64, 128, 256, 512, 1024, or `in` of every layer; 192, say, is refused by the loader;
- of 4 bits, a group must have 32, 64, 128 or 256 inputs and divide `in` (so -1 only where `in` is one of these); other
  bits take a ragged last group and any `in`;
- layers of different bits load in GPTQModel (in float16) and through `optimize.load`; transformers alone (optimum) does
  not read `dynamic`, and refuses the shapes;
- all of bits 2, 3, 4 and 8, symmetric or not, negative scales, and `g_idx` in any order give exactly `dequantize()`,
  rounded to the float16 that they compute in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import StageError
from optimize.quantize.gptq_grid import Grid, Quantized

if TYPE_CHECKING:
    from torch import Tensor

TENSORS = ("qweight", "qzeros", "scales", "g_idx")
"""Endings of the names of a layer's tensors."""
_WORD = 32


def pack(quantized: Quantized, bits: int) -> dict[str, Tensor]:
    """The four tensors of a layer, on the CPU. `in` and `out` must be multiples of 32."""
    import torch

    return {
        "qweight": _pack(quantized.codes.T, bits),
        "qzeros": _pack((quantized.zeros.to(torch.int64) - 1).T, bits, along=1),
        "scales": quantized.scales.T.to("cpu", torch.float16).contiguous(),
        "g_idx": quantized.group_of.to("cpu", torch.int32).contiguous(),
    }


def unpack(tensors: Mapping[str, Tensor]) -> Quantized:
    """The inverse of `pack`; the shapes say how many bits there are."""
    import torch

    bits = bits_of(tensors["qweight"].shape, tensors["g_idx"].shape)
    zeros = (_unpack(tensors["qzeros"], bits, along=1) + 1) & (2**bits - 1)
    return Quantized(
        codes=_unpack(tensors["qweight"], bits).T.to(torch.uint8).contiguous(),
        scales=tensors["scales"].T.float().contiguous(),
        zeros=zeros.T.to(torch.uint8).contiguous(),
        group_of=tensors["g_idx"].to(torch.int32),
    )


def bits_of(qweight: Sequence[int], g_idx: Sequence[int]) -> int:
    """Of a layer's codes, from the shapes of two of its tensors."""
    return qweight[0] * _WORD // g_idx[0]


def packed_bytes(shape: Sequence[int], grid: Grid) -> int:
    """Of the four tensors of a layer of weight [out, in]."""
    out, width = shape
    groups = grid.groups(width)
    return out * width * grid.bits // 8 + groups * out * grid.bits // 8 + 2 * groups * out + 4 * width


def quantized_layers(folder: Path) -> list[str]:
    """Names of the quantised layers of a checkpoint, in the order of their names."""
    return sorted(name.removesuffix(".qweight") for name in _places(folder) if name.endswith(".qweight"))


def load_layer(folder: Path, name: str) -> Quantized:
    """One layer of a checkpoint. Raises `StageError` where it is not of `checkpoint_format: gptq`."""
    from safetensors import safe_open

    read_config(folder)
    places = _places(folder)
    tensors = {}
    for ending in TENSORS:
        with safe_open(folder / places[f"{name}.{ending}"], "pt") as file:
            tensors[ending] = file.get_tensor(f"{name}.{ending}")
    return unpack(tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """`quantization_config` of config.json. Raises `StageError` where it describes no GPTQ checkpoint."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8")).get("quantization_config", {})
    if config.get("quant_method") != "gptq" or config.get("checkpoint_format", "gptq") != "gptq":
        raise StageError(f"{folder} is no GPTQ checkpoint of `checkpoint_format: gptq`")
    return config


def quantization_config(
    grid: Grid,
    *,
    damp_percent: float,
    desc_act: bool,
    static_groups: bool,
    true_sequential: bool,
    quantized: Iterable[str] = (),
    kept: Iterable[str] = (),
    others: Mapping[str, Grid] | None = None,
    tool: str = "optimize",
) -> dict[str, Any]:
    """What config.json says under `quantization_config`, and quantize_config.json as a whole.

    `quantized` and `kept` are full names of the linear layers inside the blocks; they are only written where some are
    `kept` in float. `others` are the quantised layers that have another grid than `grid`. `desc_act` is what a loader
    must know: whether `g_idx` is out of order, which static groups avoid.
    """
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "desc_act": desc_act and not static_groups,
        "static_groups": static_groups,
        "sym": grid.sym,
        "damp_percent": damp_percent,
        "true_sequential": true_sequential,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": [tool]},
    }
    if kept := sorted(kept):
        # transformers (through optimum) replaces layers whose names end like these; GPTQModel and vLLM read `dynamic`.
        config["modules_in_block_to_quantize"] = [sorted(quantized)]
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in kept}
    if others:
        config.setdefault("dynamic", {}).update(
            {
                f"+:^{re.escape(name)}$": {"bits": one.bits, "group_size": one.group_size}
                for name, one in sorted(others.items())
            }
        )
    return config


def _places(folder: Path) -> dict[str, str]:
    """The file of each tensor."""
    from safetensors import safe_open

    places = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            places.update(dict.fromkeys(file.keys(), path.name))
    return places


def _pack(values: Tensor, bits: int, along: int = 0) -> Tensor:
    """Integers [n, m] below 2^bits as a stream of int32 words along axis `along`."""
    import torch

    values = values.to("cpu", torch.int64).movedim(along, 0)
    codes, words = _unit(bits)
    if len(values) % codes:
        raise StageError(f"{len(values)} codes of {bits} bits don't fill whole 32-bit words")
    values = values.reshape(-1, codes, values.shape[1])
    packed = torch.zeros(len(values), words, values.shape[2], dtype=torch.int64)
    for code in range(codes):
        word, shift = divmod(code * bits, _WORD)
        packed[:, word] |= values[:, code] << shift
        if shift + bits > _WORD:
            packed[:, word + 1] |= values[:, code] >> (_WORD - shift)
    return packed.to(torch.int32).reshape(-1, packed.shape[2]).movedim(0, along).contiguous()


def _unpack(packed: Tensor, bits: int, along: int = 0) -> Tensor:
    """int64, the inverse of `_pack`."""
    import torch

    codes, words = _unit(bits)
    stream = (packed.to(torch.int64) & 0xFFFFFFFF).movedim(along, 0)
    stream = stream.reshape(-1, words, stream.shape[1])
    values = torch.empty(len(stream), codes, stream.shape[2], dtype=torch.int64)
    for code in range(codes):
        word, shift = divmod(code * bits, _WORD)
        values[:, code] = stream[:, word] >> shift
        if shift + bits > _WORD:
            values[:, code] |= stream[:, word + 1] << (_WORD - shift)
    return (values & ((1 << bits) - 1)).reshape(-1, values.shape[2]).movedim(0, along)


def _unit(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole words, and those words."""
    return (_WORD, bits) if _WORD % bits else (_WORD // bits, 1)
