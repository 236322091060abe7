"""Recipes that are written in Python: a method's `Config` stands for its stage.

    from optimize.distill import finetune
    from optimize.export import onnx
    from optimize.quantize import int8_onnxruntime as int8

    recipe = optimize.Recipe(
        name="minilm-sentiment",
        model={"source": "./my-model", "task": "text-classification"},
        data={"source": "reviews.csv", "text": "text", "label": "label"},
        stages=[optimize.stage(finetune.Config(epochs=1), name="teacher"), onnx.Config(), {"quantize": "int8"}],
        baseline="teacher",
    )

Objects and mappings can be mixed anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optimize.stages import entries

if TYPE_CHECKING:
    from pydantic import BaseModel

    from optimize.config import Block


def stage(config: Block, *, name: str | None = None, from_: str | None = None) -> dict[str, Any]:
    """A stage of a recipe: a method's `Config`, with a name of its own, or on another stage's artifact (`from`).

    Raises `TypeError` where `config` is the Config of no method.
    """
    block = written(config)
    if "stages" in block or not any(entry.verb in block for entry in entries()):
        raise TypeError(f"{type(config).__module__}.{type(config).__qualname__} is no method's Config")
    said = {"name": name, "from": from_}
    return {**block, **{key: value for key, value in said.items() if value is not None}}


def written(block: BaseModel) -> dict[str, Any]:
    """A block as a recipe says it: what was given, with the verb and the method where it is a method's `Config`."""
    said = block.model_dump(mode="json", exclude_unset=True)
    kind = type(block)
    for entry in entries():
        if kind.__module__ == entry.module and kind.__name__ == "Config":
            return {entry.verb: entry.method, **({"backend": entry.backend} if entry.backend else {}), **said}
    return said
