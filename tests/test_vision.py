"""Image recipes from end to end, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rounds import of_two_rounds

import optimize
from optimize.errors import RecipeError, SourceError
from optimize.recipe import load
from optimize.work import Work

FACTORY = "optimize.examples:convnet"


def recipe(images: Path, **model: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "name": "pico-images",
        "model": {
            "module": FACTORY,
            "module_args": {"classes": 3, "width": 4},
            "image": {"size": 12},
            "task": "image-classification",
            **model,
        },
        "data": {"source": str(images), "splits": {"train": 0.5, "validation": 0.1, "evaluation": 0.4}},
        "stages": [
            {"distill": "finetune", "epochs": 4, "batch_size": 8, "learning_rate": 1e-2, "threads": 1},
            {"export": "onnx"},
        ],
        "baseline": "finetune",
        "evaluate": {"latency": {"batch_sizes": [2], "half_width": 1.0, "budget_seconds": 20}, "peak_memory": False},
        "gates": [{"metric": "accuracy", "min": 0.8}, {"metric": "size", "max_ratio": 3}],
        "promote": {"alias": "production"},
    }


def test_a_module_is_trained_exported_scored_and_asked(pico_images: Path, work: Work, tmp_path: Path) -> None:
    wanted = of_two_rounds(load(recipe(pico_images)))
    run = optimize.apply(wanted, work=work)
    assert run.verdict == "pass"
    trained, exported = run.document["artifacts"]
    assert [trained["format"], exported["format"]] == ["pytorch", "onnx"]
    assert trained["scores"]["top5"]["value"] == 1
    assert exported["scores"]["accuracy"]["value"] == trained["scores"]["accuracy"]["value"] >= 0.8
    (latency,) = exported["scores"]["latency"]
    assert (latency["batch_size"], "sequence_length" in latency) == (2, False)
    assert run.document["promoted"]["alias"] == "production"
    light = pico_images / "light" / "3.png"
    (answer,) = optimize.load("pico-images@production", work=work).predict([light])
    assert answer["label"] == "light"
    folder = optimize.load(trained["digest"], work=work).artifact.export_to(tmp_path / "copy")
    with pytest.raises(SourceError, match="trust"):
        optimize.load(folder)
    (again,) = optimize.load(folder, trust_remote_code=True).predict([light])
    assert again["score"] == pytest.approx(answer["score"], abs=1e-4)
    cached = optimize.apply(wanted, work=work)
    assert all(artifact["cached"] for artifact in cached.document["artifacts"])


def test_a_module_without_weights_is_no_baseline(pico_images: Path, work: Work) -> None:
    untrained = {
        **recipe(pico_images),
        "stages": [{"export": "onnx"}],
        "baseline": "source",
        "gates": [],
        "promote": None,
    }
    with pytest.raises(RecipeError, match="no head for image-classification yet"):
        optimize.apply(untrained, work=work)


@pytest.mark.parametrize(
    ("change", "place", "told"),
    [
        ({"task": "text-classification"}, "model.module", "a module of your own is no model for text-classification"),
        ({"module": "no_such_package_of_nets:make"}, "model.module", "Python finds no `no_such_package_of_nets`"),
        ({"module": "optimize.examples"}, "model.module", "package.module:factory"),
        ({"source": "./nowhere.pt"}, "model.source", "there is no file or folder ./nowhere.pt"),
        ({"module": None, "module_args": {}, "image": None}, "model", "the key `source` is missing"),
        ({"module": None, "source": "./model"}, "model", "`module_args` says nothing without a `module`"),
        ({"image": {"mean": [0.1, 0.2]}}, "model.image", "mean has 2 numbers for 3 channels"),
    ],
)
def test_mistakes_in_the_model(pico_images: Path, change: dict[str, Any], place: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(recipe(pico_images, **change))
    assert any(told in str(one.message) + str(one.hint) for one in caught.value.diagnostics if one.path == place), (
        caught.value.diagnostics
    )


def test_a_module_is_no_model_of_transformers(pico_images: Path) -> None:
    wrong = {**recipe(pico_images), "stages": [{"quantize": "cast"}], "baseline": "source"}
    with pytest.raises(RecipeError, match="takes transformers, but the source model is pytorch"):
        load(wrong)


def test_images_have_no_length(pico_images: Path) -> None:
    wrong = recipe(pico_images)
    wrong["evaluate"] = {"latency": {"sequence_length": 128}}
    with pytest.raises(RecipeError, match="`sequence_length` does not apply to image-classification"):
        load(wrong)
    assert "sequence_length" not in load(recipe(pico_images)).document()["evaluate"]["latency"]


def test_pillow_is_asked_for(pico_images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optimize.recipe import checks

    monkeypatch.setattr(checks, "installed", lambda name: name != "pillow")
    with pytest.raises(RecipeError, match="needs pillow, not installed here") as caught:
        load(recipe(pico_images))
    assert 'pip install "optimize-workbench[vision]"' in str(caught.value)
