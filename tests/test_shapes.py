"""Shapes beside the weights: what they say is built, and nothing else is believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimize import shapes
from optimize.errors import SourceError


def net(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, 2))


def test_a_difference_makes_the_other_model(tmp_path: Path) -> None:
    model, narrow = net(8), net(3)
    told = shapes.difference(model, narrow)
    assert told["numbers"]["1"] == {"normalized_shape": (3,)}
    shapes.write(tmp_path, told)
    read = shapes.read(tmp_path)
    assert read is not None
    shapes.resize(model, read)
    model.load_state_dict(narrow.state_dict())
    x = torch.rand(2, 4)
    torch.testing.assert_close(model(x), narrow(x))
    assert shapes.difference(model, narrow) == {"shapes": {}, "numbers": {}}


def test_models_that_are_no_kin_are_told() -> None:
    with pytest.raises(ValueError, match="is in one model and not in the other"):
        shapes.difference(net(8), nn.Linear(4, 2))


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"shapes": {}}',
        '{"shapes": {"0.weight": "wide"}, "numbers": {}}',
    ],
)
def test_a_file_without_sense_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / shapes.FILE).write_text(content)
    with pytest.raises(SourceError, match="makes no sense"):
        shapes.read(tmp_path)


@pytest.mark.parametrize(
    "told",
    [
        {"shapes": {"0.forward": [1]}, "numbers": {}},
        {"shapes": {"9.weight": [1]}, "numbers": {}},
        {"shapes": {}, "numbers": {"0": {"forward": 3}}},
        {"shapes": {}, "numbers": {"0": {"training": 1}}},
        {"shapes": {}, "numbers": {"0": {"out_features": "many"}}},
    ],
)
def test_only_tensors_and_numbers_that_are_there_change(told: dict[str, Any]) -> None:
    with pytest.raises(SourceError):
        shapes.resize(net(8), told)


def test_no_file_no_change(tmp_path: Path) -> None:
    assert shapes.read(tmp_path) is None
    assert shapes.carried(nn.Linear, tmp_path) is nn.Linear


def test_the_file_is_the_same_every_time(tmp_path: Path) -> None:
    told = shapes.difference(net(8), net(3))
    shapes.write(tmp_path, told)
    first = (tmp_path / shapes.FILE).read_bytes()
    shapes.write(tmp_path, json.loads(first))
    assert (tmp_path / shapes.FILE).read_bytes() == first
