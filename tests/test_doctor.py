"""`optimize doctor`: what it finds and what it says about it."""

from __future__ import annotations

import io
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from optimize.commands import doctor

GOOD = {"numpy": {"installed": "2.1", "required": ">=2", "ok": True}}


def machine(flags: list[str], **changed: Any) -> dict[str, Any]:
    return {"free_disk_bytes": 1e12, "memory_bytes": 64e9, "cpu": {"cores": 8, "flags": flags}, **changed}


def test_this_machine(tmp_path: Path) -> None:
    found = doctor.examine(tmp_path / "not" / "yet")
    assert found["healthy"]
    assert found["packages"]["torch"]["installed"] == version("torch")
    assert set(found["extras"]) >= {"gptq", "bitsandbytes", "openvino", "pruning"}
    assert not set(found["extras"]) & {"all", "test"}
    assert found["machine"]["free_disk_bytes"] > 0
    text = io.StringIO()
    Console(file=text, width=120).print(doctor.page(found))
    assert f"optimize {version('optimize-workbench')}" in text.getvalue()
    assert version("torch") in text.getvalue()


def test_something_missing_or_old_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pretended(name: str) -> str:
        if name in ("scipy", "nncf"):
            raise PackageNotFoundError(name)
        return {"torch": "2.4.0+cpu", "openvino": "2026.1"}.get(name) or version(name)

    monkeypatch.setattr(doctor, "version", pretended)
    found = doctor.examine(tmp_path)
    assert not found["healthy"]
    assert found["packages"]["scipy"]["installed"] is None
    assert not found["packages"]["torch"]["ok"]
    assert "'scipy>=" in found["suggestions"][0]
    assert "'torch" in found["suggestions"][0]
    assert not found["extras"]["openvino"]["installed"]
    assert found["extras"]["openvino"]["install"] == "pip install 'optimize-workbench[openvino]'"


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (machine(["avx2", "avx512_vnni"]), "INT8 is fast"),
        (machine(["avx2"]), "reduce_range"),
        (machine(["avx2", "avx512_vnni", "amx_int8"]), "AMX"),
        (machine([], free_disk_bytes=1e9), "gc"),
        (machine([], memory_bytes=1e9), "batch_size"),
        (machine([], cpu={"cores": 1, "flags": []}), "One core"),
    ],
)
def test_suggestions(given: dict[str, Any], word: str) -> None:
    (said,) = doctor.suggest(given, GOOD)
    assert word in said


def test_nothing_to_suggest() -> None:
    assert doctor.suggest(machine([]), GOOD) == []


def test_it_imports_no_library(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from optimize.commands import doctor; doctor.examine(Path(sys.argv[1]));"
        "print(*{'torch', 'transformers', 'numpy', 'onnxruntime'} & set(sys.modules))"
    )
    line = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(line, capture_output=True, text=True, check=True, timeout=60).stdout.strip() == ""
