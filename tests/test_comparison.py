"""Two artifacts side by side: by digest, by alias, by folder; with and without gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import optimize
from optimize.errors import EvaluationError, OptimizeError, PromotionRefused, RecipeError, StoreError
from optimize.promotion import promote
from optimize.run import Run
from optimize.work import Work


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(tmp_path_factory.mktemp("comparison") / "work")


@pytest.fixture
def run(pico_recipe: dict[str, Any], work: Work) -> Run:
    """A run without clocks; made once, then reused."""
    quick = {**pico_recipe, "evaluate": {"latency": None, "peak_memory": False}, "promote": {"alias": "production"}}
    return optimize.apply(quick, work=work)


def test_by_digest_and_alias(run: Run, work: Work) -> None:
    compared = optimize.compare("pico-sentiment@production", run["onnx"].artifact.digest[7:19], work=work)
    assert compared.names == ("candidate", "baseline")
    assert (compared.verdict, compared.exit_code) == (None, 0)
    found = {(one["artifact"], one["over"], one["metric"]): one for one in compared.document["comparisons"]}
    size = found["candidate", "baseline", "size"]["estimate"]
    assert size == run["int8"].artifact.size_bytes / run["onnx"].artifact.size_bytes
    assert found["candidate", "baseline", "accuracy"]["unit"] == "difference"


@pytest.mark.parametrize(("limit", "verdict", "exit_code"), [(1.5, "pass", 0), (0.01, "fail", 1)])
def test_with_gates(run: Run, work: Work, tmp_path: Path, limit: float, verdict: str, exit_code: int) -> None:
    gates = tmp_path / "gates.yaml"
    gates.write_text(f"gates: [{{metric: size, max_ratio: {limit}, on: candidate}}]")
    compared = optimize.compare("pico-sentiment@production", run["onnx"].artifact.digest, work=work, gates=gates)
    assert (compared.verdict, compared.exit_code) == (verdict, exit_code)
    with pytest.raises(PromotionRefused, match="comparison"):
        promote(compared.document["run"], alias="production", artifact="candidate", work=work)
    # A comparison is no run to take rows and settings from.
    assert optimize.compare(run["int8"].artifact.digest, run["onnx"].artifact.digest, work=work).verdict is None


def test_a_folder_of_plain_files(run: Run, work: Work, tmp_path: Path) -> None:
    folder = tmp_path / "handed-over"
    run["int8"].artifact.export_to(folder)
    compared = optimize.compare(folder, run["int8"].artifact.digest, work=work)
    (accuracy,) = (one for one in compared.document["comparisons"] if one["metric"] == "accuracy")
    assert accuracy["estimate"] == 0
    assert optimize.load(folder).predict(["a great film"]) == run["int8"].predict(["a great film"])


def test_what_names_nothing(run: Run, work: Work, tmp_path: Path) -> None:
    for reference in ("pico-sentiment@staging", "0123456789ab", str(tmp_path / "nowhere")):
        with pytest.raises(OptimizeError, match=r"pico-sentiment@staging|0123456789ab|nowhere"):
            optimize.compare(reference, run["onnx"].artifact.digest, work=work)
    empty = Work(tmp_path / "work")
    folder = tmp_path / "model"
    run["onnx"].artifact.export_to(folder)
    with pytest.raises(RecipeError, match="which rows"):
        optimize.compare(folder, folder, work=empty)


def test_damaged_bytes_are_refused(run: Run, work: Work) -> None:
    path = run["onnx"].artifact.path / "model.onnx"
    whole = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(StoreError, match=r"model\.onnx"):
            optimize.compare("pico-sentiment@production", run["onnx"].artifact.digest, work=work)
        with pytest.raises(StoreError, match=r"model\.onnx"):
            promote("latest", alias="production", artifact="onnx", work=work, waive="a trial", expires="2999-01-01")
    finally:
        path.write_bytes(whole)


def test_models_of_other_labels_are_not_compared(run: Run, work: Work, tmp_path: Path) -> None:
    import json

    folder = tmp_path / "model"
    run["onnx"].artifact.export_to(folder)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "sad", "1": "glad"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EvaluationError, match="labels"):
        optimize.compare(folder, run["onnx"].artifact.digest, work=work)


def test_a_waiver_is_recorded(run: Run, work: Work) -> None:
    with pytest.raises(PromotionRefused, match="missing"):
        promote("latest", alias="trial", artifact="finetune", work=work)
    version = promote(
        "latest", alias="trial", artifact="finetune", work=work, waive="the gates come next week", expires="2999-01-01"
    )
    assert version.waiver is not None
    assert work.registry.log.entries()[-1]["waiver"]["reason"] == "the gates come next week"
