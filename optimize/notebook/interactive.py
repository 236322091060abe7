"""The same pictures by plotly, for whoever wants to point at things: `run.plot(backend="plotly")` gives its figure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from optimize.commands.reporting import plain
from optimize.notebook.extras import need
from optimize.notebook.figures import Layers, Panel, Pareto, Waterfall
from optimize.report.table import megabytes


def _objects() -> Any:
    return need("plotly.graph_objects", 'backend="plotly"')


def _said(text: object) -> str:
    """plotly reads some HTML in labels."""
    return escape(plain(text))


def pareto(found: Pareto) -> Any:
    go = _objects()
    points = found.points
    largest = max(point.size_bytes for point in points)
    figure = go.Figure(
        go.Scatter(
            x=[point.ms for point in points],
            y=[point.quality for point in points],
            error_x=_errors([(point.ms, point.ms_ci) for point in points]),
            error_y=_errors([(point.quality, point.quality_ci) for point in points]),
            mode="markers+text",
            text=[_said(point.name) for point in points],
            textposition="top center",
            customdata=[[megabytes(p.size_bytes), p.verdict or "", _said(p.dominated_by or "")] for p in points],
            hovertemplate="%{text}<br>%{y:.4g}, %{x:.4g} ms, %{customdata[0]}<br>%{customdata[1]}"
            "<br>dominated by: %{customdata[2]}<extra></extra>",
            marker={
                "size": [10 + 26 * (point.size_bytes / largest) ** 0.5 for point in points],
                "symbol": ["circle-open" if point.baseline else "circle" for point in points],
                "color": ["#9a9a9a" if point.dominated_by else "#1f5a99" for point in points],
            },
        )
    )
    for words, value in found.quality_limits.items():
        figure.add_hline(value, line_dash="dash", line_color="#c4570a", annotation_text=_said(words))
    for words, value in found.ms_limits.items():
        figure.add_vline(value, line_dash="dot", line_color="#c4570a", annotation_text=_said(words))
    figure.update_xaxes(title=f"p50, ms ({_said(found.setting)})", type="log")
    figure.update_yaxes(title=_said(found.metric), autorange="reversed" if found.less_is_better else None)
    return _laid_out(figure)


def intervals(panels: Sequence[Panel]) -> Any:
    go, make = _objects(), need("plotly.subplots", 'backend="plotly"').make_subplots
    titles = [_said(f"{panel.title}: {panel.unit}") for panel in panels]
    figure = make(rows=len(panels), cols=1, subplot_titles=titles, vertical_spacing=0.3 / max(len(panels), 1))
    for row, panel in enumerate(panels, 1):
        figure.add_trace(
            go.Scatter(
                x=[line.estimate for line in panel.lines],
                y=[_said(f"{line.artifact} over {line.over}") for line in panel.lines],
                error_x=_errors([(line.estimate, line.ci) for line in panel.lines]),
                mode="markers",
                text=[_said(f"{line.limit_words}: {line.verdict}") if line.verdict else "" for line in panel.lines],
                hovertemplate="%{y}: %{x:.4g}<br>%{text}<extra></extra>",
                marker={"color": "#1f5a99", "size": 9},
            ),
            row=row,
            col=1,
        )
        figure.add_vline(panel.no_change, line_width=1, line_color="#5c5c5c", row=row, col=1)
    figure.update_yaxes(autorange="reversed")
    return _laid_out(figure, height=90 + 130 * len(panels))


def waterfall(found: Waterfall) -> Any:
    go, make = _objects(), need("plotly.subplots", 'backend="plotly"').make_subplots
    figure = make(rows=1, cols=len(found.measures), subplot_titles=[_said(title) for title in found.measures])
    for column, steps in enumerate(found.measures.values(), 1):
        known = [(step.name, step.after) for step in steps if step.after is not None]
        changes = [value - (known[place - 1][1] if place else 0) for place, (_, value) in enumerate(known)]
        figure.add_trace(
            go.Waterfall(
                x=[_said(name) for name, _ in known],
                y=changes,
                measure=["absolute"] + ["relative"] * (len(known) - 1),
                text=[f"{value:.4g}" for _, value in known],
            ),
            row=1,
            col=column,
        )
    return _laid_out(figure)


def layers(found: Layers) -> Any:
    go = _objects()
    names = [_said(name) for name in found.names]
    symbols = ["square-open" if name in found.kept else "circle" for name in found.names]
    figure = go.Figure(
        go.Scatter(x=names, y=found.values, mode="markers", marker_symbol=symbols, name=_said(found.title))
    )
    if found.reference:
        figure.add_trace(go.Scatter(x=names, y=found.reference, mode="markers", marker_symbol="diamond-open"))
        figure.data[1].name = _said(found.reference_name)
    figure.update_yaxes(title=_said(found.measure), type="log")
    return _laid_out(figure, height=480)


def _errors(values: Sequence[tuple[float, tuple[float, float]]]) -> dict[str, Any]:
    above = [max(high - value, 0) for value, (_, high) in values]
    below = [max(value - low, 0) for value, (low, _) in values]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below}


def _laid_out(figure: Any, height: int = 420) -> Any:
    figure.update_layout(template="plotly_white", showlegend=False, height=height, margin={"t": 40, "r": 20})
    return figure
