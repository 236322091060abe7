"""Metrics of classification and of language models, and the user's own."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from optimize.errors import RecipeError
from optimize.tasks import Metric

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def _hits(outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
    return (outputs.argmax(axis=1) == targets).astype("float64")  # type: ignore[no-any-return]


def _among_five(outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
    """Whether fewer than five labels score higher than the right one."""
    right = outputs[range(len(targets)), targets]
    return ((outputs > right[:, None]).sum(axis=1) < 5).astype("float64")  # type: ignore[no-any-return]


def _top5(outputs: NDArray[Any], targets: NDArray[Any]) -> float:
    return float(_among_five(outputs, targets).mean())


def _accuracy(outputs: NDArray[Any], targets: NDArray[Any]) -> float:
    return float(_hits(outputs, targets).mean())


def _confusion(outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.int64]:
    """How often class i [row] was called j [column]."""
    import numpy as np

    classes = outputs.shape[1]
    pairs = targets.astype(np.int64) * classes + outputs.argmax(axis=1)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def _macro_f1_of(tables: NDArray[np.int64]) -> NDArray[np.float64]:
    """The mean of each class's F1, over classes that occur in the targets or the answers (as scikit-learn has it)."""
    import numpy as np

    occurrences = tables.sum(axis=-1) + tables.sum(axis=-2)
    hits = np.diagonal(tables, axis1=-2, axis2=-1)
    seen = occurrences > 0
    return np.asarray((2 * hits / np.where(seen, occurrences, 1)).sum(axis=-1) / np.maximum(seen.sum(axis=-1), 1))


def _matthews_of(tables: NDArray[np.int64]) -> NDArray[np.float64]:
    """Gorodkin's R_K (2004, doi:10.1016/j.compbiolchem.2004.09.006), which is Matthews' coefficient for two classes.

    0 where only one class occurs in the targets or in the answers.
    """
    import numpy as np

    counts = tables.astype(np.float64)
    rows, answered, actual = counts.sum(axis=(-2, -1)), counts.sum(axis=-2), counts.sum(axis=-1)
    covariance = np.trace(counts, axis1=-2, axis2=-1) * rows - (actual * answered).sum(axis=-1)
    spread = (rows**2 - (answered**2).sum(axis=-1)) * (rows**2 - (actual**2).sum(axis=-1))
    return np.asarray(np.where(spread > 0, covariance / np.sqrt(np.where(spread > 0, spread, 1)), 0.0))


def _macro_f1(outputs: NDArray[Any], targets: NDArray[Any]) -> float:
    return float(_macro_f1_of(_confusion(outputs, targets)))


def _matthews(outputs: NDArray[Any], targets: NDArray[Any]) -> float:
    return float(_matthews_of(_confusion(outputs, targets)))


def _log_likelihoods(outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
    """A window's log-likelihood in nats, and how many tokens were scored [n, 2]."""
    import numpy as np

    return np.stack([outputs["log_likelihood"].sum(axis=1, dtype=np.float64), outputs["scored"].sum(axis=1)], axis=1)


def perplexity_of(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp(-mean log-likelihood a token) of [..., 2]: log-likelihoods, tokens. Infinite past what a float holds."""
    import numpy as np

    with np.errstate(over="ignore"):
        return np.asarray(np.exp(-sums[..., 0] / sums[..., 1]))


def of_sums(
    name: str,
    per_row: Callable[[NDArray[Any], NDArray[Any]], NDArray[np.float64]],
    from_sums: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    higher_is_better: bool = True,
) -> Metric:
    """A metric of the kind `sums`, which is all that these two functions say."""

    def compute(outputs: NDArray[Any], targets: NDArray[Any]) -> float:
        return float(from_sums(per_row(outputs, targets).sum(axis=0)))

    return Metric(name, higher_is_better, "sums", compute, per_row, from_sums)


ACCURACY = Metric("accuracy", higher_is_better=True, kind="binary", compute=_accuracy, per_row=_hits)
TOP5 = Metric("top5", higher_is_better=True, kind="binary", compute=_top5, per_row=_among_five)
MACRO_F1 = Metric("macro_f1", higher_is_better=True, kind="set", compute=_macro_f1, from_confusion=_macro_f1_of)
MATTHEWS = Metric("matthews", higher_is_better=True, kind="set", compute=_matthews, from_confusion=_matthews_of)

PERPLEXITY = of_sums("perplexity", _log_likelihoods, perplexity_of, higher_is_better=False)
"""Of records as `optimize.tasks.causal_lm` reads them. Whole windows are resampled: neighbouring tokens depend on each
other."""


def load_metric(name: str) -> Metric:
    """The user's own metric: `module:function`, or the name of an entry point in the group `optimize.metrics`.

    The function takes (outputs [n, ...], targets [n, ...]) and returns a float. It may have the attributes
    `higher_is_better` (default True) and `per_row`, a function of the same arguments that returns one number a row [n],
    of which the metric is the mean. Raises `RecipeError` where there is no such function. Importing the module runs it.
    """
    try:
        function = _find(name)
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"no metric {name!r}: {error}",
            hint="name a function as module:function, and see that Python finds the module (PYTHONPATH)",
        ) from error
    if not callable(function):
        raise RecipeError(f"{name} is no function", hint="a metric takes (outputs, targets) and returns a number")
    per_row = getattr(function, "per_row", None)
    return Metric(
        name=name,
        higher_is_better=bool(getattr(function, "higher_is_better", True)),
        kind="set" if per_row is None else "rows",
        compute=function,
        per_row=per_row,
    )


def _find(name: str) -> Any:
    module, colon, function = name.partition(":")
    if colon:
        return getattr(import_module(module), function)
    from importlib.metadata import entry_points

    for point in entry_points(group="optimize.metrics", name=name):
        return point.load()
    raise ImportError("neither module:function nor an installed entry point of the group optimize.metrics")
