"""A checkpoint's tensors one at a time: read when they are asked for, written as they come, never all in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize import atomic
from optimize.errors import StageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Change = Callable[[str, "Tensor"], "Tensor"]
"""(name, tensor) -> what is written in its place, of its shape and type."""

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"

_SHARD_BYTES = 5_000_000_000
"""A larger checkpoint is written as several files, as people expect of large models."""
_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1},
}
"""Of one element, by safetensors' name of the type."""
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of floating point, by safetensors' name and by torch's."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    file: Path
    key: str
    dtype: str
    """By safetensors' name: F32, BF16, ..."""
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * _BYTES[self.dtype]

    @property
    def type(self) -> torch.dtype:
        """torch's name for its type, of floating point."""
        import torch

        return getattr(torch, FLOATS[self.dtype])  # type: ignore[no-any-return]

    def load(self) -> Tensor:
        """Its values as they are stored. The file is closed again, so that none of its pages count as ours."""
        from safetensors import safe_open

        with safe_open(self.file, "pt") as file:
            return file.get_tensor(self.key).clone()  # type: ignore[no-any-return]


def stored(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds, by name. Raises `StageError` where it can't be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            slices = {key: file.get_slice(key) for key in sorted(file.keys())}
            return {key: Stored(path, key, part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise StageError(f"the weights can't be read: {error}", location=str(path)) from error


def checkpoint_tensors(folder: Path, model: Any) -> dict[str, Stored]:
    """A checkpoint's tensors by the names that `model`, of transformers, has for them.

    Names differ where a file was saved from the bare model or by an old version: the library's own table of renamings
    tells which is which. A tied tensor stands under all of its names. What the model has no place for is left out.

    Raises `StageError` where the file holds a weight in other pieces than the model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    changes = get_model_conversion_mapping(model)
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    state = model.state_dict(keep_vars=True)
    found: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for key, tensor in stored(path).items():
            name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
            if converter is not None:
                raise StageError(
                    f"{key} is stored in other pieces than the model has it in, which can't be read lazily",
                    location=str(path),
                    hint="load the model with transformers and save it again",
                )
            if name in state:
                found[name] = tensor
    tied = {id(state[name]): tensor for name, tensor in found.items()}
    return {name: found.get(name, tied[id(value)]) for name, value in state.items() if id(value) in tied}


def write_checkpoint(folder: Path, pieces: Mapping[str, Stored], change: Change = lambda name, tensor: tensor) -> None:
    """`model.safetensors`, or several files and their index where it would be large; holds one tensor at a time."""
    shards: list[dict[str, Stored]] = [{}]
    room = _SHARD_BYTES
    for name in sorted(pieces):
        if pieces[name].size_bytes > room and shards[-1]:
            shards.append({})
            room = _SHARD_BYTES
        shards[-1][name] = pieces[name]
        room -= pieces[name].size_bytes
    if len(shards) == 1:
        _write(folder / MODEL, shards[0], change)
        return
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        _write(folder / file, shard, change)
    index = {
        "metadata": {"total_size": sum(piece.size_bytes for piece in pieces.values())},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
    }
    (folder / INDEX).write_bytes(atomic.json_bytes(index))


def _write(path: Path, pieces: Mapping[str, Stored], change: Change) -> None:
    """One safetensors file: 8 bytes of the header's length (little endian), the header (JSON), the tensors' bytes.

    Wide types come first, so that every tensor is aligned.
    """
    order = sorted(pieces, key=lambda name: (-_BYTES[pieces[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        piece = pieces[name]
        end = offset + piece.size_bytes
        header[name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_bytes_of(change(name, pieces[name].load())))


def _bytes_of(tensor: Tensor) -> Any:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
