"""What was chosen goes into a recipe's text, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimize.recipe import load
from optimize.sensitivity.knobs import KNOBS
from optimize.sensitivity.writing import config_of, edited

KNOB = KNOBS["quantize.gptq"]


def test_a_choice_is_said_briefly(language: Path) -> None:
    stage = load(language).stages[0]
    names = [f"model.layers.{block}.{name}" for block in range(12) for name in ("a", "b")]
    chosen = dict.fromkeys(names, 4.0) | {names[2]: 8.0, names[3]: 8.0, names[4]: 2.0, "lm_head": 8.0}
    config = config_of(stage, KNOB, chosen)
    told = {name: layer.bits for name, layer in config.layers.items()}  # type: ignore[attr-defined]
    assert told == {"model.layers.1.*": 8, "model.layers.2.a": 2, "lm_head": 8}


@pytest.mark.parametrize("ending", ["", "\n"])
def test_layers_that_are_there_are_replaced(language: Path, ending: str) -> None:
    text = language.read_text()
    stage = load(language).stages[0]
    once = edited(text, stage, {"a.*": {"bits": 8}, "b": {"bits": 2, "group_size": 64}})
    assert once is not None
    assert (
        '    layers:  # by `optimize sensitivity`\n      "a.*": {bits: 8}\n      "b": {bits: 2, group_size: 64}\n'
        in once
    )
    assert edited(once, stage, {}) == text
    # The last key of the file, and `layers` in the middle of a stage with a comment behind it.
    bare = "stages:\n  - quantize: gptq" + ending
    assert edited(bare, stage, {"a": {"bits": 8}}) == (
        'stages:\n  - quantize: gptq\n    layers:  # by `optimize sensitivity`\n      "a": {bits: 8}\n'
    )


def test_what_is_no_block_is_not_edited(language: Path) -> None:
    stage = load(language).stages[0]
    for text in (
        "stages: [{quantize: gptq, bits: 4}]\n",
        "stages:\n  - {quantize: gptq}\n",
        "stages:\n  - {quantize: gptq,\n     bits: 4}\n",
        "stages: []\n",
    ):
        assert edited(text, stage, {"a": {"bits": 8}}) is None
