"""The distribution: an sdist builds a wheel that adds one top-level name, with the command and the recipes in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from the sdist, which is built from a copy of the checkout, so that nothing is left in it."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("package")
    kept = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, folder / "source", ignore=kept)
    line = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "source")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "mkdocs.yml",
        "recipes/quickstart.yaml",
        "tests/test_package.py",
    } <= names
    (built,) = (folder / "dist").glob("*.whl")
    return zipfile.ZipFile(built)


def test_one_top_level_name(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    (metadata,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {"optimize", metadata}


def test_everything_of_the_package_is_in_it(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "optimize").rglob("*.py")}
    assert here <= names
    assert "optimize/py.typed" in names
    recipes = {f"optimize/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert recipes
    assert recipes <= names


def test_metadata(wheel: zipfile.ZipFile) -> None:
    (points,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "optimize = optimize.cli:main" in wheel.read(points).decode()
    (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(path).decode())
    assert metadata["Name"] == "optimize-workbench"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    extras = {"gptq", "bitsandbytes", "openvino", "pruning", "notebook", "all", "test"}
    assert extras <= set(metadata.get_all("Provides-Extra") or [])
    (licence,) = (name for name in wheel.namelist() if name.endswith("licenses/LICENSE"))
    assert "Apache License" in wheel.read(licence).decode()


def test_a_wheel_finds_its_recipes(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    script = "from optimize.commands.init import recipes; print(recipes()['quickstart'])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    line = [sys.executable, "-c", script]
    done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert Path(done.stdout.strip()) == tmp_path / "optimize" / "recipes" / "quickstart.yaml"


def test_versions_agree() -> None:
    from importlib.metadata import version

    import optimize

    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert declared is not None
    assert declared[1] == optimize.__version__ == version("optimize-workbench")
    assert f"## {declared[1]}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_recipes_in_the_documents_validate(pico_recipe: dict[str, Any], pico_llama: Path, pico_corpus: Path) -> None:
    """A block without stages shows a part of a recipe, of the task that it names or whose metrics it speaks of."""
    import yaml

    from optimize.recipe import load

    blocks = [
        yaml.safe_load(block)
        for page in (ROOT / "README.md", ROOT / "docs" / "recipes.md")
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    ]
    assert len(blocks) >= 2
    bare = {**pico_recipe, "stages": [{"export": "onnx"}], "baseline": "source", "evaluate": {}, "gates": []}
    language = {
        **bare,
        "model": {"source": str(pico_llama)},
        "data": {"source": str(pico_corpus)},
        "stages": [{"quantize": "cast", "dtype": "bfloat16"}],
    }
    for block in blocks:
        writes = any(word in json.dumps(block) for word in ("perplexity", "decode"))
        task = block.get("model", {}).get("task", "causal-lm" if writes else "text-classification")
        base = {"causal-lm": language, "text-classification": pico_recipe}.get(task, bare)
        stages = {"baseline": block["stages"][0].get("name", "source")} if "stages" in block else {}
        whole = block if "version" in block else {**base, **stages, **block}
        data = {"source": base["data"]["source"]}
        if base is not pico_recipe:
            data |= {key: value for key, value in block.get("data", {}).items() if key not in ("source", "splits")}
        else:
            data |= base["data"]
        model = {**block.get("model", {}), "source": base["model"]["source"], "task": task}
        if "module" in model:  # and no weights
            model |= {"module": "optimize.examples:convnet", "source": None}
        recipe = load({**whole, "model": model, "data": data})
        assert len(recipe.stages) == len(whole["stages"])
