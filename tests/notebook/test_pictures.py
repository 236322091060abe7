"""The pictures themselves: PNGs with ink in them that can be read in greyscale, and nothing of the caller's touched."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import numpy as np
import pytest
from results import NASTY

from optimize.errors import OptimizeError
from optimize.notebook import figures
from optimize.notebook.layer_table import LayerTable
from optimize.notebook.picture import Picture
from optimize.notebook.plotting import draw

matplotlib = pytest.importorskip("matplotlib")
KINDS = ("pareto", "intervals", "waterfall", "layers")


def figure_of(kind: str, document: dict[str, Any]) -> Any:
    if kind != "layers":
        return getattr(figures, kind)(document)
    return figures.layers({"sensitivity": {"layers": {NASTY: 0.2, "b": 0.1}, "distance": "kl"}, "kept": [NASTY]}, "x")


def pixels(picture: Picture) -> np.ndarray[Any, Any]:
    """Grey values [height, width], 0 to 1."""
    from matplotlib import image

    return np.asarray(image.imread(io.BytesIO(picture.png())))[..., :3] @ [0.299, 0.587, 0.114]


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_a_png_with_words(kind: str, document: dict[str, Any]) -> None:
    picture = draw(kind, figure_of(kind, document))
    data, metadata = picture._repr_mimebundle_()
    assert set(data) == {"text/plain", "image/png"}
    assert picture.png().startswith(b"\x89PNG")
    assert len(picture.png()) < 120_000
    assert "\x1b" not in data["text/plain"]
    assert metadata["image/png"]["alt"] == data["text/plain"] == repr(picture)
    grey = pixels(picture)
    assert 0.005 < (grey < 0.5).mean() < 0.3  # ink, and air
    assert grey.shape[1] >= 700


def test_the_same_run_gives_the_same_bytes(document: dict[str, Any]) -> None:
    one, other = (draw("pareto", figures.pareto(document)).png() for _ in range(2))
    assert one == other


def test_what_is_dominated_is_paler(document: dict[str, Any]) -> None:
    """In grey values too: the bubble of a dominated artifact, beside the same one that is not."""

    def darkest_at(name: str) -> float:
        found = figures.pareto(document)
        picture = draw("pareto", found)
        axes = picture.figure.axes[0]
        point = next(point for point in found.points if point.name == name)
        x, y = axes.transData.transform((point.ms, point.quality)) * 110 / picture.figure.dpi
        grey = pixels(picture)
        around = grey[int(grey.shape[0] - y) - 9 : int(grey.shape[0] - y) - 4, int(x) + 4 : int(x) + 9]
        return float(np.median(around))

    paler = darkest_at("onnx")
    document["comparisons"][0]["ci"] = [-0.3, -0.02]
    assert darkest_at("onnx") < paler - 0.05


def test_intervals_are_visible(document: dict[str, Any]) -> None:
    picture = draw("intervals", figures.intervals(document, metric="accuracy"))
    axes = picture.figure.axes[0]
    low, high = (axes.transData.transform((end, 0))[0] for end in (-0.12, -0.08))
    assert high - low > 40


def test_names_are_no_formulas_and_no_markup(document: dict[str, Any]) -> None:
    picture = draw("waterfall", figures.waterfall(document))
    labels = [label.get_text() for axes in picture.figure.axes for label in axes.get_yticklabels()]
    assert any("<script>" in label and "$x$" in label for label in labels)
    assert not any("\x1b" in label for label in labels)


def test_matplotlib_of_the_caller_is_untouched(document: dict[str, Any]) -> None:
    matplotlib.rcParams["font.size"] = 17
    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    try:
        draw("pareto", figures.pareto(document))
        assert dict(matplotlib.rcParams) == before
        assert matplotlib.get_backend() == backend
    finally:
        matplotlib.rcdefaults()


def test_a_stack_of_many_blocks_is_drawn_by_kind() -> None:
    names = [f"model.layers.{block}.{kind}" for block in range(30) for kind in ("q_proj", "up_proj")]
    table = LayerTable([{"name": n, "error": 0.01, "rtn_error": 0.02} for n in names], "GPTQ")
    picture = table.plot()
    assert [axes.get_title() or axes.get_title("left") for axes in picture.figure.axes[:2]] == ["q_proj", "up_proj"]
    assert "60 of 60 below rounding to nearest" in repr(picture)
    assert len(table.frame) == 60


@pytest.mark.parametrize("kind", KINDS)
def test_plotly_on_request(kind: str, document: dict[str, Any]) -> None:
    go = pytest.importorskip("plotly.graph_objects")
    figure = draw(kind, figure_of(kind, document), "plotly")
    assert isinstance(figure, go.Figure)
    said = figure.to_json()
    assert "<script" not in said
    assert "\\u001b" not in said
    if kind == "pareto":
        trace = json.loads(said)["data"][0]
        assert trace["y"] == [0.8, 0.7, 0.79]


def test_what_is_missing_is_said(document: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptimizeError, match="no backend 'bokeh'"):
        draw("pareto", figures.pareto(document), "bokeh")
    for module, backend in (("matplotlib", "matplotlib"), ("plotly.graph_objects", "plotly")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(OptimizeError, match=f"needs {backend}") as caught:
            draw("pareto", figures.pareto(document), backend)
        assert "[notebook]" in str(caught.value.hint)
