"""optimize: makes trained models smaller and faster, and proves it.

    import optimize

    run = optimize.apply("recipe.yaml")
    run.verdict                                # "pass", "fail", "inconclusive" or None
    run.table()                                # what a terminal shows
    run["int8"].predict(["a fine film"])       # [{"label": "positive", "score": 0.97}]
    optimize.load("minilm-sentiment@production").predict(["a fine film"])
    optimize.quantize.gptq.apply_to(model, optimize.quantize.gptq.Config(bits=4), batches)

Nothing heavy is imported until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from optimize import distill as distill
    from optimize import export as export
    from optimize import prune as prune
    from optimize import quantize as quantize
    from optimize.artifact import Artifact
    from optimize.comparison import compare
    from optimize.engine import apply
    from optimize.errors import (
        EvaluationError,
        OptimizeError,
        PromotionRefused,
        RecipeError,
        RegistryError,
        RemoteError,
        SourceError,
        StageError,
        StoreError,
    )
    from optimize.gating import gate
    from optimize.model import Model, load
    from optimize.planning import Plan, plan
    from optimize.recipe import Recipe
    from optimize.recipe.objects import stage
    from optimize.remote import pull, push
    from optimize.run import Run

_ROOMS = ("distill", "export", "prune", "quantize")
"""Packages that are found by their name alone, with the methods in them."""
_HOMES = {
    "Artifact": "artifact",
    "EvaluationError": "errors",
    "Model": "model",
    "OptimizeError": "errors",
    "Plan": "planning",
    "PromotionRefused": "errors",
    "Recipe": "recipe",
    "RecipeError": "errors",
    "RegistryError": "errors",
    "RemoteError": "errors",
    "Run": "run",
    "SourceError": "errors",
    "StageError": "errors",
    "StoreError": "errors",
    "apply": "engine",
    "compare": "comparison",
    "gate": "gating",
    "load": "model",
    "plan": "planning",
    "pull": "remote",
    "push": "remote",
    "stage": "recipe.objects",
}

__all__ = [
    "Artifact",
    "EvaluationError",
    "Model",
    "OptimizeError",
    "Plan",
    "PromotionRefused",
    "Recipe",
    "RecipeError",
    "RegistryError",
    "RemoteError",
    "Run",
    "SourceError",
    "StageError",
    "StoreError",
    "apply",
    "compare",
    "gate",
    "load",
    "plan",
    "pull",
    "push",
    "stage",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _ROOMS:
        return import_module(f"optimize.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'optimize' has no attribute {name!r}")
    return getattr(import_module(f"optimize.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted((*__all__, *_ROOMS))
