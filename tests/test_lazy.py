"""Methods are found by their name alone, and nothing heavy is imported before."""

from __future__ import annotations

import subprocess
import sys

import pytest

import optimize
from optimize.quantize import gptq, gptq_solver


def test_methods_and_their_functions_are_attributes() -> None:
    assert optimize.quantize.gptq is gptq
    assert optimize.quantize.gptq_solver.solve is gptq_solver.solve
    assert optimize.prune.unstructured.Config(sparsity=0.5).sparsity == 0.5
    assert {"gptq", "nf4", "gptq_solver"} <= set(dir(optimize.quantize))
    assert {"quantize", "prune", "distill", "export", "Recipe", "stage"} <= set(dir(optimize))


@pytest.mark.parametrize("name", ["nothing", "_private", "__path_of__"])
def test_what_is_not_there_is_an_attribute_error(name: str) -> None:
    for package in (optimize, optimize.quantize):
        with pytest.raises(AttributeError, match=name):
            getattr(package, name)
    assert not hasattr(optimize.quantize, name)


def test_nothing_heavy_is_imported() -> None:
    script = (
        "import sys, optimize\n"
        "optimize.quantize.gptq.Config(bits=3), optimize.prune.layers.Config(num_hidden_layers=2)\n"
        "optimize.Recipe; print([name for name in sys.modules if name in "
        "('torch', 'numpy', 'pandas', 'matplotlib', 'plotly', 'IPython', 'transformers', 'sqlalchemy', 'fsspec')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
