"""Shapes that a model's `config.json` can't say, in a small file beside its weights: `shapes.json`.

Transformers' configs have one number for all layers (`intermediate_size`, `num_attention_heads`), and BERT's none for
the width of a head. A pruned model that they can't describe is built as its config says, given the shapes and numbers
of this file, and then filled from its weights as strictly as any other. Without us, `from_pretrained` refuses it, since
the weights do not fit.

    {"shapes": {"bert.encoder.layer.0.intermediate.dense.weight": [1088, 384], ...},
     "numbers": {"bert.encoder.layer.0.intermediate.dense": {"out_features": 1088}, ...}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import SourceError

if TYPE_CHECKING:
    from torch import Tensor, nn

FILE = "shapes.json"


def read(folder: Path) -> dict[str, Any] | None:
    """What the file says; None where there is none. Raises `SourceError` where it makes no sense."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        shapes = {str(name): [int(size) for size in sizes] for name, sizes in found["shapes"].items()}
        numbers = {str(name): dict(values) for name, values in found["numbers"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SourceError(f"{FILE} makes no sense: {error!r}", location=str(folder)) from error
    return {"shapes": shapes, "numbers": numbers}


def write(folder: Path, shapes: Mapping[str, Any]) -> None:
    text = json.dumps(shapes, indent=2, sort_keys=True)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def difference(plain: nn.Module, model: nn.Module) -> dict[str, Any]:
    """What of `model` is of another shape or number than in `plain`, which its config makes (on any device).

    Raises `ValueError` where one has a tensor that the other lacks.
    """
    before, after = _tensors(plain), _tensors(model)
    if odd := sorted(before.keys() ^ after.keys()):
        raise ValueError(f"{odd[0]} is in one model and not in the other")
    shapes = {name: list(tensor.shape) for name, tensor in after.items() if tensor.shape != before[name].shape}
    modules = dict(plain.named_modules())
    numbers = {}
    for name, part in model.named_modules():
        theirs = _numbers(modules[name])
        if changed := {key: value for key, value in _numbers(part).items() if theirs.get(key, value) != value}:
            numbers[name] = changed
    return {"shapes": shapes, "numbers": numbers}


def resize(model: Any, shapes: Mapping[str, Any]) -> None:
    """Give a model these shapes and numbers; tensors that change hold zeros until they are filled.

    Raises `SourceError` where the model has no such tensor or number.
    """
    import torch

    for name, sizes in shapes["shapes"].items():
        owner, _, key = name.rpartition(".")
        module = _module(model, owner)
        old = getattr(module, key, None)
        if not isinstance(old, torch.Tensor):
            raise SourceError(f"{FILE} has a shape for {name}, which the model lacks")
        new = torch.zeros(sizes, dtype=old.dtype, device=old.device)
        setattr(module, key, torch.nn.Parameter(new) if isinstance(old, torch.nn.Parameter) else new)
    for name, values in shapes["numbers"].items():
        module = _module(model, name)
        known = _numbers(module)
        for key, value in values.items():
            number = tuple(value) if isinstance(value, list) else value
            if type(known.get(key)) is not type(number):
                raise SourceError(f"{FILE} has {name}.{key}, which is no such number of the model's")
            setattr(module, key, number)
    if shapes["shapes"] and hasattr(model, "tie_weights"):
        model.tie_weights()


def carried(cls: Any, folder: Path) -> Any:
    """The class to load a folder's model with: `cls`, or, where the folder has shapes of its own, one of the model's
    own class whose models have these, and say so wherever they are saved.
    """
    found = read(folder)
    if found is None:
        return cls
    shapes: dict[str, Any] = found
    if hasattr(cls, "_model_mapping"):  # an AutoModel
        import transformers

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        cls = getattr(transformers, str((config.get("architectures") or ["none"])[0]), None)
        if cls is None:
            raise SourceError("no class of transformers is the model's architecture", location=str(folder))

    class Shaped(cls):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            resize(self, shapes)

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
            super().save_pretrained(save_directory, *args, **kwargs)
            write(Path(save_directory), shapes)

    # By which the library, and config.json, know what a model is.
    Shaped.__name__, Shaped.__qualname__, Shaped.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Shaped


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _numbers(module: nn.Module) -> dict[str, Any]:
    """Sizes and factors that a module keeps: `out_features`, `num_heads`, `scaling`, `normalized_shape`, ..."""

    def numeric(value: Any) -> bool:
        if isinstance(value, tuple):
            return all(type(part) is int for part in value)
        return type(value) in (int, float)

    return {key: value for key, value in vars(module).items() if not key.startswith("_") and numeric(value)}


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise SourceError(f"{FILE} speaks of {name}, which the model lacks") from error
