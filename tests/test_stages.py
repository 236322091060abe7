"""The registry of stages is data: every entry is whole, documented and used by a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from optimize import runtimes
from optimize.config import Block
from optimize.data import SPLITS
from optimize.stages import VERBS, Entry, entries

RECIPES = Path(__file__).parents[1] / "recipes"
OURS = [entry for entry in entries() if entry.module.startswith("optimize.")]


@pytest.mark.parametrize("entry", OURS, ids=lambda entry: entry.id)
def test_entry_is_whole(entry: Entry) -> None:
    module = entry.load()
    assert issubclass(module.Config, Block)
    assert isinstance(module.VERSION, int)
    assert callable(module.run)
    assert entry.verb in VERBS
    assert entry.module.split(".")[1] == entry.verb
    assert set(entry.splits) <= set(SPLITS) - {"evaluation"}
    assert {*entry.reads, *entry.sources, *entry.options, *entry.aside} <= set(module.Config.model_fields)
    for format in (*entry.takes, entry.gives):
        assert runtimes.get(format).open


@pytest.mark.parametrize("entry", OURS, ids=lambda entry: entry.id)
def test_entry_is_documented(entry: Entry) -> None:
    module = entry.load()
    assert module.__doc__
    assert f"{entry.verb}: {entry.method}" in module.__doc__
    assert entry.summary.endswith(".")
    undescribed = [name for name, field in module.Config.model_fields.items() if not field.description]
    assert undescribed == []
    assert not set(module.Config.model_fields) & set(VERBS)


def test_every_method_is_used_by_a_recipe() -> None:
    used = {
        (verb, stage[verb])
        for path in RECIPES.glob("*.yaml")
        for stage in yaml.safe_load(path.read_text())["stages"]
        for verb in VERBS
        if verb in stage
    }
    assert {(entry.verb, entry.method) for entry in OURS} <= used
