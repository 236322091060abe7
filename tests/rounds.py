"""Fewer rounds of measured processes than a recipe may ask for, where how sure a speed is does not matter."""

from __future__ import annotations

from dataclasses import replace

from optimize.recipe import Recipe


def of_two_rounds(recipe: Recipe) -> Recipe:
    """A recipe can't ask for fewer than six; each starts a process for every artifact, and most import PyTorch."""
    if recipe.evaluate.latency is None:
        return recipe
    latency = recipe.evaluate.latency.model_copy(update={"rounds": 2, "half_width": 9.0, "budget_seconds": 1.0})
    return replace(recipe, evaluate=recipe.evaluate.model_copy(update={"latency": latency}))
