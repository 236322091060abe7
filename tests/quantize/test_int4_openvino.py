"""INT4 for OpenVINO: packed weights, reproducible, and what is ignored stays in float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from optimize import runtimes
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.errors import StageError
from optimize.quantize.int4_openvino import Config, run
from optimize.runtimes import openvino as runtime

GROUPS = Config(group_size=16)


@pytest.fixture(scope="module")
def quantized(pico_openvino: Artifact, new_context: Callable[..., Context]) -> Artifact:
    return run(pico_openvino, GROUPS, new_context())


def test_it_is_small_and_answers_like_its_parent(
    quantized: Artifact, pico_openvino: Artifact, new_context: Callable[..., Context]
) -> None:
    # Two layers of six matrices and the pooler in 4 bits; the classifier and the embeddings in 8.
    assert quantized.details == {"quantized": {"int4": 13, "int8": 4}, "ignored": []}
    assert quantized.files["model.bin"]["size"] < 0.4 * pico_openvino.files["model.bin"]["size"]
    assert runtime.parameters(quantized.path) == runtime.parameters(pico_openvino.path)
    context = new_context()
    tokenizer = context.task.preprocessor(pico_openvino.path)
    features = context.task.encode(tokenizer, context.data.rows("validation"), pico_openvino.task)
    inputs = context.task.collate(tokenizer, features)
    got, expected = (
        runtimes.open_artifact(artifact, 1).run(inputs)["logits"] for artifact in (quantized, pico_openvino)
    )
    assert np.abs(got - expected).max() < 0.3 * np.abs(expected).max()


def test_the_bytes_are_the_same_again(
    quantized: Artifact, pico_openvino: Artifact, new_context: Callable[..., Context]
) -> None:
    assert run(pico_openvino, GROUPS, new_context()).digest == quantized.digest


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param({"ratio": 0.5}, lambda counts: 0 < counts["int4"] < 13, id="ratio"),
        pytest.param({"all_layers": True}, lambda counts: counts["int4"] > 13, id="all layers"),
        pytest.param({"sym": True}, lambda counts: counts["int4"] == 13, id="symmetric"),
        pytest.param({"group_size": -1}, lambda counts: counts["int4"] == 13, id="per channel"),
        pytest.param({"ignore": ("bert.encoder.layer.0.*",)}, lambda counts: counts["int4"] == 7, id="ignore"),
    ],
)
def test_settings_are_taken(
    pico_openvino: Artifact, new_context: Callable[..., Context], settings: dict[str, Any], expected: Any
) -> None:
    result = run(pico_openvino, Config(**{"group_size": 16, **settings}), new_context())
    assert expected(result.details["quantized"])


def test_mistakes_are_errors(pico_openvino: Artifact, new_context: Callable[..., Context]) -> None:
    with pytest.raises(StageError, match=r"'decoder\.\*' matches no layer"):
        run(pico_openvino, Config(ignore=("decoder.*",)), new_context())
    with pytest.raises(StageError, match="nothing was quantised"):
        run(pico_openvino, Config(ignore=("*",)), new_context())
