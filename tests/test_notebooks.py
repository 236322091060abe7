"""The notebooks run, on their real models and data, and show what they say; as they are committed they show it, too."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
LINE = re.compile(r"[\w-]+: (pass|fail|inconclusive|done) in [\d:.]+( s)? \(.+\)")

PROBES = {
    "01-first-recipe": """dict(
        verdict=run.verdict, names=list(run.names), rows=len(run.gates), error=run.document["error"],
        size=run.artifacts.size_bytes["int8"] / run.artifacts.size_bytes["teacher"],
        accuracy=list(run.artifacts.accuracy), times=list(run.artifacts.p50_ms_batch_1),
        same=written.digest == load("../recipes/quickstart.yaml").digest)""",
    "02-comparing-methods": """dict(
        reused=all(one["cached"] for one in first.document["artifacts"]), names=list(methods.names),
        flips=[one["details"]["flips"] for one in accuracy], differences=[one["estimate"] for one in accuracy],
        n=accuracy[0]["n"], table=table,
        duel=[duel.names, len(duel.comparisons), duel.document["compared"]])""",
    "03-sensitivity-and-mixed-precision": """dict(
        sensitivity=list(sensitivity), kept=details["kept"], layers=layers, rows=rows,
        chosen=details["sensitivity"])""",
    "04-language-models-4-bit": """dict(
        errors=errors.to_dict("list"), losses=losses, ratios=list(table.frame.ratio), verdict=run.verdict,
        perplexity=dict(run.artifacts.perplexity), sizes=dict(run.artifacts.size_bytes.astype(float)),
        layers=len(run["gptq"].artifact.details["layers"]))""",
}
"""What each notebook came to, as JSON: an expression behind its last cell."""


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One work folder for all of them, as a person has it, whichever process of the suite runs which."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if base.name.startswith("popen-") else base) / "notebooks"
    return {
        "OPTIMIZE_NOTEBOOKS_SMALL": "1",
        "OPTIMIZE_WORK": str(shared),
        "IPYTHONDIR": str(base / "ipython"),
        "PYTHONPATH": str(FOLDER.parent),
    }


def executed(name: str, environment: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    """(the notebook with its outputs, what its probe says)."""
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    execute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(execute)
    probe = nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({PROBES[name]}, default=list))")
    notebook = execute.execute(FOLDER / f"{name}.ipynb", environment, timeout=1200, more=[probe])
    (said,) = notebook.cells.pop().outputs
    return notebook, json.loads(said.text)


def shown(notebook: Any, kind: str) -> list[str]:
    """All outputs of a MIME type."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def check_outputs(notebook: Any) -> None:
    """What holds of every notebook, wherever it was executed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    lines = [data for data in shown(notebook, "text/plain") if LINE.match(data)]
    assert lines, "progress ends as a line"
    assert all("\n" not in line or "\nwarning: " in line for line in lines)
    assert not any("<progress" in html for html in shown(notebook, "text/html"))
    for image in shown(notebook, "image/png"):
        check_picture(base64.b64decode(image))
    text = json.dumps(outputs)
    assert not re.search(r"/(home|root|tmp|opt|Users|var)/|\\\\Users\\\\", text)
    assert str(FOLDER.parent) not in text


def check_picture(png: bytes) -> None:
    from matplotlib import image

    pixels = np.asarray(image.imread(io.BytesIO(png)))
    assert pixels.shape[1] > 600
    grey = pixels[..., :3] @ [0.299, 0.587, 0.114]
    assert 0.004 < (grey < 0.6).mean() < 0.4


def test_there_are_four() -> None:
    assert set(PROBES) == set(NOTEBOOKS)
    assert len(NOTEBOOKS) == 4


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_as_it_is_committed_it_shows_what_it_says(name: str) -> None:
    path = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    check_outputs(notebook)
    assert shown(notebook, "image/png")
    assert path.stat().st_size < 500_000
    assert "execution" not in json.dumps([cell.metadata for cell in notebook.cells])


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_first_recipe(environment: dict[str, str]) -> None:
    notebook, found = executed("01-first-recipe", environment)
    check_outputs(notebook)
    assert found["names"] == ["teacher", "onnx", "int8"]
    assert found["error"] is None
    assert found["verdict"] in ("pass", "fail", "inconclusive")
    assert found["rows"] == 3
    assert found["same"]
    assert 0.2 < found["size"] < 0.35
    assert all(0 < value < 1 for value in found["accuracy"])
    assert all(value > 0 for value in found["times"])
    assert len(shown(notebook, "image/png")) == 2
    html = "".join(shown(notebook, "text/html"))
    assert "per_channel: true -&gt; false" in html
    assert "positive" in "".join(shown(notebook, "text/plain")) or "label" in "".join(shown(notebook, "text/plain"))


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_comparing_methods(environment: dict[str, str]) -> None:
    from optimize.evaluate.statistics import tango_interval

    notebook, found = executed("02-comparing-methods", environment)
    check_outputs(notebook)
    assert found["names"] == ["teacher", "onnx", "dynamic", "static", "int4", "coarse-int4"]
    for flips, difference in zip(found["flips"], found["differences"], strict=True):
        assert difference == pytest.approx((flips["gained"] - flips["lost"]) / found["n"])
    for row in found["table"]:
        low, high = tango_interval(row["rows"] // 100, row["rows"] // 100, row["rows"], 0.9)
        assert (row["low"], row["high"]) == pytest.approx((100 * low, 100 * high))
    assert found["table"][-1]["low"] > -1 > found["table"][0]["low"]
    names, comparisons, compared = found["duel"]
    assert names == ["candidate", "baseline"]
    assert comparisons >= 2
    assert all(digest.startswith("sha256:") for digest in compared.values())
    assert len(shown(notebook, "image/png")) == 3


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sensitivity_and_mixed_precision(environment: dict[str, str]) -> None:
    notebook, found = executed("03-sensitivity-and-mixed-precision", environment)
    check_outputs(notebook)
    assert found["sensitivity"] == sorted(found["sensitivity"], reverse=True)
    assert found["sensitivity"][0] > 0
    assert set(found["kept"]) <= set(found["layers"])
    chosen = found["chosen"]
    assert chosen["float"] - chosen["chosen"] <= chosen["max_drop"] + 1e-9
    first, *_, last = found["rows"]
    assert last["mean KL divergence"] < first["mean KL divergence"]
    assert last["size, MB"] > first["size, MB"]
    assert len(shown(notebook, "image/png")) == 2


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_language_models_at_4_bits(environment: dict[str, str]) -> None:
    pytest.importorskip("bitsandbytes")
    notebook, found = executed("04-language-models-4-bit", environment)
    check_outputs(notebook)
    assert all(ours < theirs for ours, theirs in zip(found["errors"]["GPTQ"], found["errors"]["rounded"], strict=True))
    assert found["errors"]["GPTQ"] == sorted(found["errors"]["GPTQ"], reverse=True)
    losses = found["losses"]
    assert abs(losses["8 bits"] - losses["float"]) < 0.05
    assert all(0 < loss < math.inf for loss in losses.values())
    assert all(ratio <= 1 for ratio in found["ratios"])
    assert set(found["perplexity"]) == {"source", "gptq", "nf4"}
    assert all(1 < value < math.inf for value in found["perplexity"].values())
    assert found["perplexity"]["gptq"] > 0.99 * found["perplexity"]["source"]
    assert found["sizes"]["nf4"] < 0.6 * found["sizes"]["source"]
    assert found["layers"] == 14
    assert len(shown(notebook, "image/png")) == 3
