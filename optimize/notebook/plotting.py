"""`run.plot(...)`: which picture, by which library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optimize.errors import OptimizeError

if TYPE_CHECKING:
    from optimize.run import Run

KINDS = ("pareto", "intervals", "waterfall", "layers")
BACKENDS = ("matplotlib", "plotly")


def plot(run: Run, kind: str, backend: str, **options: Any) -> Any:
    """See `Run.plot`."""
    from optimize.notebook import figures

    if kind == "layers":
        name = options.pop("artifact", None) or _with_layers(run)
        return draw("layers", figures.layers(run[name].artifact.details, name), backend)
    if kind not in KINDS:
        raise OptimizeError(f"there is no picture {kind!r}", hint=f"one of {', '.join(KINDS)}")
    return draw(kind, getattr(figures, kind)(run.document, **options), backend)


def draw(kind: str, figure: Any, backend: str = "matplotlib") -> Any:
    """A `Picture`, or plotly's figure. Raises `OptimizeError` where the library is missing or unknown."""
    if backend not in BACKENDS:
        raise OptimizeError(f"there is no backend {backend!r}", hint=f"one of {', '.join(BACKENDS)}")
    if backend == "plotly":
        from optimize.notebook import interactive

        return getattr(interactive, kind)(figure)
    from optimize.notebook import static

    return getattr(static, kind)(figure)


def _with_layers(run: Run) -> str:
    """The last artifact whose stage left a table of layers."""
    from optimize.notebook.figures import layers

    for name in reversed(run.names):
        try:
            layers(run[name].artifact.details, name)
        except OptimizeError:
            continue
        return name
    raise OptimizeError("no artifact of this run has a table of layers", hint="quantise with gptq, nf4 or max_drop")
