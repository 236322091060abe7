"""What a method found of each layer, as `apply_to` returns it: a list of rows that shows itself in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class LayerTable(list[dict[str, Any]]):
    """A row a layer, in the order in which they run: `name`, and numbers such as `error`."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], title: str) -> None:
        super().__init__(dict(row) for row in rows)
        self.title = title

    @property
    def frame(self) -> Any:
        """A pandas frame by the layers' names."""
        from optimize.notebook.extras import need

        return need("pandas", "frame").DataFrame(list(self)).set_index("name")

    def plot(self, *, backend: str = "matplotlib") -> Any:
        """The numbers of all layers as a picture, as in `Run.plot`."""
        from optimize.notebook.figures import layers_of
        from optimize.notebook.plotting import draw

        return draw("layers", layers_of(self, self.title), backend)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from optimize.notebook import shown

        head = list(dict.fromkeys(key for row in self for key in row))
        rows = [[_number(row.get(key, "")) for key in head] for row in self]
        few = rows if len(rows) <= _SHOWN else [*rows[: _SHOWN // 2], ["..."] * len(head), *rows[-_SHOWN // 2 :]]
        told = f"{self.title}: {len(self)} layers"
        return shown.bundle(
            f"{told}\n{shown.text_table(few, head)}", f"<p>{shown.safe(told)}</p>{shown.html_table(few, head)}"
        )


_SHOWN = 16


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
