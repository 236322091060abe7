"""The example of docs/stages-plugin.md, taken from that page, installed beside the package, validated and run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "stages-plugin.md"
CALL = "from optimize.cli import main; main()"
RUN = """
import json, sys
from pathlib import Path
from optimize import stages, tasks
from optimize.artifact import Artifact
from optimize.context import Context

model, folder = map(Path, sys.argv[1:])
(folder / "scratch").mkdir(parents=True)
(folder / "new").mkdir()
(entry,) = stages.find("prune", "smallest")
method = entry.load()
source = Artifact.from_directory(model, format="transformers", task={"name": "text-classification"})
task = tasks.get("text-classification")
context = Context(directory=folder / "new", scratch=folder / "scratch", task=task, data=None, logs=folder / "logs")
made = method.run(source, method.Config(sparsity=0.3), context)

from safetensors.numpy import load_file
matrices = [w for w in load_file(made.path / "model.safetensors").values() if w.ndim == 2]
print(json.dumps({
    "zeros": sum(int((w == 0).sum()) for w in matrices) / sum(w.size for w in matrices),
    "files": sorted(made.files) == sorted(source.files),
    "other": made.digest != source.digest,
}))
"""


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return str(found)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install` would leave: the module, and the metadata with its entry point."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "optimize_smallest.py").write_text(block("python"), encoding="utf-8")
    metadata = folder / "optimize_smallest-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: optimize-smallest\nVersion: 1.0\n")
    header, value = block("toml").splitlines()
    name, target = re.fullmatch(r'(\w+) = "([\w.:]+)"', value).groups()  # type: ignore[union-attr]
    assert header == '[project.entry-points."optimize.stages"]'
    (metadata / "entry_points.txt").write_text(f"[optimize.stages]\n{name} = {target}\n")
    return folder


def python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "OPTIMIZE_WORK": str(site / "work")}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_third_party_stage_is_listed_and_explained(site: Path) -> None:
    listed = json.loads(python(site, "-c", CALL, "stages", "--json").stdout)["stages"]
    assert "prune.smallest" in [one["stage"] for one in listed]
    (explained,) = json.loads(python(site, "-c", CALL, "stages", "prune.smallest", "--json").stdout)["stages"]
    assert explained["fields"]["sparsity"]["description"] == "The share of each matrix that becomes zero."
    assert explained["fields"]["sparsity"]["default"] == 0.5
    assert "Han et al. 2015" in explained["documentation"]


def test_a_recipe_with_it_validates(site: Path, pico_recipe: dict[str, Any], tmp_path: Path) -> None:
    import yaml

    recipe = {**pico_recipe, **yaml.safe_load(block("yaml"))}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    done = python(site, "-c", CALL, "validate", str(file), "--json")
    assert done.returncode == 0, done.stderr
    assert [one.get("prune") for one in json.loads(done.stdout)["recipe"]["stages"]] == [None, "smallest", None]

    recipe["stages"][1]["sparsety"] = recipe["stages"][1].pop("sparsity")
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    done = python(site, "-c", CALL, "validate", str(file), "--output-format", "concise")
    assert done.returncode == 2
    assert "sparsity" in done.stdout


def test_it_runs(site: Path, pico_model: Path, tmp_path: Path) -> None:
    done = python(site, "-c", RUN, str(pico_model), str(tmp_path))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["zeros"] == pytest.approx(0.3, abs=0.01)
    assert told["files"]
    assert told["other"]
