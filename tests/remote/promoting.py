"""Work folders with something promoted."""

from __future__ import annotations

from typing import Any

from optimize import atomic
from optimize.artifact import Artifact, digest_of
from optimize.work import Work

NAME = "m"
SHARED = b"\x01" * 5000
"""Weights that every artifact has."""
SECRET = "wJalrXUtnFEMIsecretEXAMPLEKEY"


def put(work: Work, content: object, **manifest: Any) -> Artifact:
    """An artifact in the store: shared weights and a file of its own."""
    folder = work.store.staging()
    (folder / "deep").mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "deep" / "weights.bin").write_bytes(SHARED)
    (folder / "own.txt").write_text(str(content))
    made = Artifact.from_directory(folder, format="onnx", task={"name": "text-classification"}, **manifest)
    return work.store.publish(digest_of(["key", content]), made, {"recipe": NAME, "stage": "s", "inputs": {}})


def promote(work: Work, content: object, alias: str = "production", **manifest: Any) -> str:
    """Promote an artifact with that content; its digest."""
    artifact = put(work, content, **manifest)
    run = f"run-{content}"
    atomic.write_json(work.runs / run / "run.json", {"schema": 1, "run": run, "recipe": NAME, "artifacts": []})
    atomic.write_json(work.runs / run / "recipe.json", {"base": "/", "recipe": {"name": NAME}})
    work.registry.promote(NAME, alias, artifact.digest, verdict="pass", run=run, recipe_digest=digest_of("r"))
    return artifact.digest
