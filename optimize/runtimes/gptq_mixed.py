"""GPTQ checkpoints whose layers differ in bits or group size, opened in transformers.

transformers leaves the work to optimum, which makes all layers with the same bits and passes over `dynamic`, where the
checkpoint says otherwise of some. Here it makes one kind of layer after the other. GPTQModel's own loader and vLLM need
no such help.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

KINDS = ("bits", "group_size")


def mixed(quantization: Mapping[str, Any]) -> bool:
    """Whether `quantization_config` says that some layers are otherwise."""
    dynamic = quantization.get("dynamic") or {}
    return any(set(KINDS) & set(settings or ()) for settings in dynamic.values())


@contextlib.contextmanager
def layers_of_their_own(quantization: Mapping[str, Any]) -> Iterator[None]:
    """Inside, transformers makes each layer as `dynamic` says. GPTQModel has to be imported before."""
    library: Any = import_module("optimum.gptq")
    dynamic_get = import_module("gptqmodel.quantization.config").dynamic_get
    original = library.GPTQQuantizer

    def kind_of(name: str) -> tuple[int, int]:
        bits, size = (dynamic_get(quantization["dynamic"], name, key, quantization[key]) for key in KINDS)
        return int(bits), int(size)

    class Mixed(original):  # type: ignore[misc, valid-type]
        def _replace_by_quant_layers(self, module: Any, names: Iterable[str], name: str = "") -> None:
            if name:  # deeper in, where all are of one kind
                super()._replace_by_quant_layers(module, names, name)
                return
            kinds: dict[tuple[int, int], list[str]] = {}
            for layer in names:
                kinds.setdefault(kind_of(layer), []).append(layer)
            for (self.bits, self.group_size), layers in kinds.items():
                self.select_quant_linear(device_map={"": "cpu"}, pack=False)
                super()._replace_by_quant_layers(module, layers)

    library.GPTQQuantizer = Mixed
    try:
        yield
    finally:
        library.GPTQQuantizer = original
