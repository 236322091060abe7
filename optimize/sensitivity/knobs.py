"""What can differ by layer: the bits of `quantize: gptq`, and the sparsity of `prune: unstructured`.

A knob knows a stage's method from the side of its layers: which there are, what becomes of one at a setting (by the
method's own code, on what calibration rows show of the layer's inputs), what that costs, and how a config says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from optimize.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from optimize.artifact import Artifact
    from optimize.blockwise.sequence import Change
    from optimize.recipe import Recipe, Stage

Setting = float
"""Bits, or a sparsity."""


class Knob(Protocol):
    name: str
    """As the stage's field is called."""
    settings: tuple[Setting, ...]
    """What is tried where nobody says otherwise."""

    def check(self, settings: tuple[Setting, ...]) -> None:
        """Raises `RecipeError` where one is out of range."""

    def layers(self, model: Any, config: Any) -> dict[str, nn.Module]:
        """The layers that the stage would change, by name."""

    def told(self, config: Any, chosen: Mapping[str, Setting]) -> Any:
        """The stage's config with these settings of layers."""

    def usual(self, config: Any) -> Setting:
        """What the stage says of layers that nothing else is said of."""

    def all_alike(self, config: Any, setting: Setting) -> Any:
        """The stage's config with another setting for layers that nothing else is said of."""

    def change(self, config: Any, layers: Mapping[str, nn.Module], artifact: Artifact) -> Change:
        """What the stage makes of layers by that config."""

    def uses_rows(self, config: Any) -> bool:
        """Whether it looks at the inputs of layers."""

    def cost(self, setting: Setting, weights: int) -> int:
        """Of a layer, in a whole number that sums up to what a budget is of."""

    def budget(self, value: float, weights: int) -> int:
        """What may be spent on layers of so many weights together."""

    def spent(self, cost: int, weights: int) -> float:
        """The inverse of `budget`."""

    def uniform(self, value: float, settings: tuple[Setting, ...]) -> Setting | None:
        """The setting of all layers that a budget allows."""

    def weight(self, artifact: Artifact, name: str, empty: Any) -> Tensor:
        """A layer's weight [out, in] in an artifact of the stage; `empty` is its model without weights."""


class Bits:
    """`quantize: gptq`: bits of a weight's code, without its share of scales."""

    name = "bits"
    settings: tuple[Setting, ...] = (2, 3, 4, 8)

    def check(self, settings: tuple[Setting, ...]) -> None:
        if wrong := [f"{one:g}" for one in settings if one not in self.settings]:
            raise RecipeError(f"{wrong[0]} is no width in bits", hint="of 2, 3, 4 and 8")

    def layers(self, model: Any, config: Any) -> dict[str, nn.Module]:
        from optimize.quantize.gptq import layers_of

        return layers_of(model, config)

    def told(self, config: Any, chosen: Mapping[str, Setting]) -> Any:
        from optimize.quantize.checkpoint import settings_of
        from optimize.quantize.gptq import Layer

        own = {name: layer.group_size for name, layer in settings_of(chosen, config.layers).items()}
        layers = {name: Layer(bits=int(bits), group_size=own.get(name)) for name, bits in chosen.items()}
        return config.model_copy(update={"layers": layers})

    def usual(self, config: Any) -> Setting:
        return int(config.bits)

    def all_alike(self, config: Any, setting: Setting) -> Any:
        return config.model_copy(update={"bits": int(setting)})

    def change(self, config: Any, layers: Mapping[str, nn.Module], artifact: Artifact) -> Change:
        from optimize.prune.masks import pruned_layers
        from optimize.quantize.gptq import grids_of
        from optimize.quantize.gptq_layers import quantize_layers

        return partial(quantize_layers, config=config, grids=grids_of(layers, config), sparse=pruned_layers(artifact))

    def uses_rows(self, config: Any) -> bool:
        return True

    def cost(self, setting: Setting, weights: int) -> int:
        return int(setting) * weights

    def budget(self, value: float, weights: int) -> int:
        return int(value * weights + 1e-6)

    def spent(self, cost: int, weights: int) -> float:
        return cost / weights

    def uniform(self, value: float, settings: tuple[Setting, ...]) -> Setting | None:
        return max((one for one in settings if one <= value), default=None)

    def weight(self, artifact: Artifact, name: str, empty: Any) -> Tensor:
        from optimize.quantize.gptq_format import load_layer

        return load_layer(artifact.path, name).dequantize()


class Sparsity:
    """`prune: unstructured`: the share of a layer's weights that become 0."""

    name = "sparsity"
    settings: tuple[Setting, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)

    _PARTS = 1_000_000
    """Of a weight, in which costs are counted."""

    def check(self, settings: tuple[Setting, ...]) -> None:
        if wrong := [f"{one:g}" for one in settings if not 0 <= one < 1]:
            raise RecipeError(f"{wrong[0]} is no sparsity", hint="a share of the weights, such as 0.5")

    def layers(self, model: Any, config: Any) -> dict[str, nn.Module]:
        from optimize.prune.unstructured import layers_of

        return layers_of(model, config)

    def told(self, config: Any, chosen: Mapping[str, Setting]) -> Any:
        from optimize.prune.unstructured import Layer

        return config.model_copy(update={"layers": {name: Layer(sparsity=share) for name, share in chosen.items()}})

    def usual(self, config: Any) -> Setting:
        return float(config.structure.sparsity)

    def all_alike(self, config: Any, setting: Setting) -> Any:
        return config.model_copy(update={"sparsity": setting})

    def change(self, config: Any, layers: Mapping[str, nn.Module], artifact: Artifact) -> Change:
        import torch

        from optimize.prune.masks import pruned_layers
        from optimize.prune.unstructured_layers import Pruner

        return Pruner(config, layers, dict.fromkeys(layers, torch.float32), pruned_layers(artifact))

    def uses_rows(self, config: Any) -> bool:
        return str(config.importance) != "magnitude"

    def cost(self, setting: Setting, weights: int) -> int:
        return round((1 - setting) * self._PARTS) * weights

    def budget(self, value: float, weights: int) -> int:
        return round((1 - value) * self._PARTS) * weights

    def spent(self, cost: int, weights: int) -> float:
        return 1 - cost / weights / self._PARTS

    def uniform(self, value: float, settings: tuple[Setting, ...]) -> Setting | None:
        return value

    def weight(self, artifact: Artifact, name: str, empty: Any) -> Tensor:
        from optimize.blockwise.lazy_weights import checkpoint_tensors
        from optimize.blockwise.sequence import oriented

        stored = checkpoint_tensors(artifact.path, empty)[f"{name}.weight"].load()
        return oriented(empty.get_submodule(name), stored)


KNOBS: dict[str, Knob] = {"quantize.gptq": Bits(), "prune.unstructured": Sparsity()}
"""By the stage's id."""


def find_stage(recipe: Recipe, name: str | None) -> Stage:
    """The stage that is meant. Raises `RecipeError` where there is none, or several, or its knob is fixed."""
    able = [stage for stage in recipe.stages if stage.id in KNOBS]
    if name is not None:
        able = [stage for stage in able if stage.name == name]
    known = ", ".join(id.replace(".", ": ", 1) for id in KNOBS)
    if not able:
        what = f"no stage named {name!r} has" if name is not None else "no stage of this recipe has"
        raise RecipeError(f"{what} a setting for each layer", hint=f"those are {known}")
    if len(able) > 1:
        names = ", ".join(stage.name for stage in able)
        raise RecipeError(f"several stages have settings for each layer: {names}", hint="choose one with --stage")
    stage = able[0]
    if stage.entry.backend is not None:
        raise RecipeError(f"`backend: {stage.entry.backend}` knows no settings for each layer", hint="leave it out")
    if stage.id == "prune.unstructured" and (stage.config.structure.of or stage.config.global_pruning):  # type: ignore[attr-defined]
        raise RecipeError(
            f"stage {stage.name!r} says how much every layer loses, by mask_structure or global_pruning",
            hint="name a `sparsity` in its place",
        )
    return stage
