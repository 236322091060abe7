"""The pictures of a run by matplotlib, without pyplot: no state, no window, nothing of the caller's is touched.

They are readable in greyscale: what matters is told by shape, line and words, never by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from optimize.commands.reporting import plain
from optimize.notebook.extras import need
from optimize.notebook.figures import Layers, Panel, Pareto, Step, Waterfall, kinds_and_blocks
from optimize.notebook.picture import Picture
from optimize.report.table import megabytes

MANY = 40
"""Layers above which a stack is drawn as lines over its blocks."""
INK, SOFT, GREY, FAINT = "#1b1b1b", "#5c5c5c", "#9a9a9a", "#e3e3e3"
BLUE, ORANGE = "#1f5a99", "#c4570a"
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "hatch.linewidth": 0.7,
    "svg.hashsalt": "optimize",
    "text.parse_math": False,  # names come from recipes: `$` begins no formula
}
_INTERVALS = "Bars: 90 % intervals"


def pareto(found: Pareto) -> Picture:
    """Quality over time, size as area; dominated artifacts grey, gates as lines."""
    with _figure(7.2, 4.4) as figure:
        axes = figure.subplots()
        for point in found.points:
            grey = point.dominated_by is not None
            ink = GREY if grey else BLUE if not point.baseline else INK
            axes.errorbar(
                *(point.ms, point.quality),
                xerr=_arms(point.ms, point.ms_ci),
                yerr=_arms(point.quality, point.quality_ci),
                fmt="none",
                ecolor=GREY if grey else INK,
                elinewidth=1.3,
                capsize=3.5,
                zorder=3,
            )
            axes.scatter(
                *([point.ms], [point.quality]),
                s=_area(point.size_bytes, found),
                facecolor="white" if point.baseline else ink,
                edgecolor=ink,
                alpha=0.35 if grey else 0.45 if not point.baseline else 1,
                linewidth=1.4,
                zorder=2,
            )
            axes.scatter([point.ms], [point.quality], s=9, color=ink, zorder=4)
        for words, value in found.quality_limits.items():
            axes.axhline(value, color=ORANGE, linewidth=1.2, linestyle=(0, (6, 3)), zorder=1)
            _edge_label(axes, words, y=value)
        for words, value in found.ms_limits.items():
            axes.axvline(value, color=ORANGE, linewidth=1.2, linestyle=(0, (2, 2)), zorder=1)
            _edge_label(axes, words, x=value)
        axes.set_xscale("log")
        _plain_log(axes.xaxis)
        axes.margins(x=0.36, y=0.3)
        if found.less_is_better:
            axes.invert_yaxis()
        axes.grid(color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        _names(axes, found)
        axes.set_xlabel(f"p50 of a call, ms ({found.setting.replace(',', ', ').replace('_', ' ')}); faster to the left")
        axes.set_ylabel(
            f"{found.metric}, {'less is better (axis turned round)' if found.less_is_better else 'more is better'}"
        )
        note = " Grey: dominated, as far as the intervals show." if any(p.dominated_by for p in found.points) else ""
        figure.supxlabel(
            f"{_INTERVALS} of the comparison with the baseline (hollow). Area: size. Dashed: gates.{note}",
            fontsize=8,
            color=SOFT,
        )
    told = [
        f"{p.name}: {found.metric} {p.quality:.4g} [{p.quality_ci[0]:.4g}, {p.quality_ci[1]:.4g}], "
        f"{p.ms:.4g} ms [{p.ms_ci[0]:.4g}, {p.ms_ci[1]:.4g}], {megabytes(p.size_bytes)}"
        + (f", dominated by {p.dominated_by}" if p.dominated_by else "")
        for p in found.points
    ]
    return Picture(figure, plain(f"{found.metric} over time at {found.setting}\n" + "\n".join(told)))


def intervals(panels: Sequence[Panel]) -> Picture:
    """Each comparison as an estimate with its interval, and the limit of its gate where there is one."""
    heights = [len(panel.lines) + 1.6 for panel in panels]
    with _figure(7.2, 0.34 * sum(heights) + 0.5) as figure:
        rows = figure.subplots(len(panels), 1, gridspec_kw={"height_ratios": heights}, squeeze=False)[:, 0]
        for axes, panel in zip(rows, panels, strict=True):
            _interval_panel(axes, panel)
        figure.supxlabel(
            f"{_INTERVALS}. Thin line: no change. Triangle and shading: beyond a gate's limit.", fontsize=8, color=SOFT
        )
    told = [
        f"{panel.title}: {line.artifact} over {line.over} {line.estimate:.4g} [{line.ci[0]:.4g}, {line.ci[1]:.4g}]"
        + (f", {line.limit_words}: {line.verdict}" if line.limit_words else "")
        for panel in panels
        for line in panel.lines
    ]
    return Picture(figure, plain("\n".join(told)))


def waterfall(found: Waterfall) -> Picture:
    """What each stage of a chain changed, measure by measure."""
    measures = list(found.measures.items())
    stages = len(measures[0][1])
    with _figure(7.2, 0.9 + (0.62 + 0.27 * stages) * math.ceil(len(measures) / 2)) as figure:
        grid = figure.subplots(math.ceil(len(measures) / 2), 2, squeeze=False)
        for axes in grid.flat[len(measures) :]:
            axes.set_visible(False)
        for axes, (title, steps) in zip(grid.flat, measures, strict=False):
            _steps(axes, title, steps)
        figure.supxlabel(
            f"From the value before a stage to the value after it. {_INTERVALS} against the baseline.",
            fontsize=8,
            color=SOFT,
        )
    told = [
        f"{title}: " + ", ".join(f"{step.name} {_number(step.after)}" for step in steps) for title, steps in measures
    ]
    return Picture(figure, plain(f"The way to {found.artifact}\n" + "\n".join(told)))


def layers(found: Layers) -> Picture:
    """A bar a layer; of a stack of many blocks, a line a kind of layer over the blocks."""
    groups = kinds_and_blocks(found.names)
    figure = _stack(found, groups) if groups and len(found.names) > MANY else _bars(found)
    largest = max(range(len(found.values)), key=lambda place: found.values[place])
    words = f"{found.title}, {found.measure}: {len(found.names)} layers, the largest {found.names[largest]} "
    words += f"{found.values[largest]:.3g}"
    if found.reference:
        better = sum(one < other for one, other in zip(found.values, found.reference, strict=True))
        words += f"; {better} of {len(found.values)} below {found.reference_name}"
    return Picture(figure, plain(words))


# --- parts ------------------------------------------------------------------------------------------------------------


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    matplotlib = need("matplotlib", "a picture")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({name: value for name, value in _STYLE.items() if name in matplotlib.rcParams})
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        layout: Any = figure.get_layout_engine()
        layout.set(wspace=0.09, hspace=0.06)
        FigureCanvasAgg(figure)
        yield figure
        figure.draw_without_rendering()


def _interval_panel(axes: Any, panel: Panel) -> None:
    lines = panel.lines
    axes.axvline(panel.no_change, color=SOFT, linewidth=0.8)
    for place, line in enumerate(lines):
        sure = not line.ci[0] <= panel.no_change <= line.ci[1]
        axes.plot(line.ci, [place, place], color=INK, linewidth=1.8, solid_capstyle="butt", zorder=3)
        for end in line.ci:
            axes.plot([end, end], [place - 0.16, place + 0.16], color=INK, linewidth=1.3, zorder=3)
        axes.plot(
            line.estimate,
            place,
            "o",
            markersize=6,
            markerfacecolor=BLUE if sure else "white",
            markeredgecolor=INK,
            zorder=4,
        )
    ends = [end for line in lines for end in (*line.ci, line.limit) if end is not None] + [panel.no_change]
    low, high = min(ends), max(ends)
    air = 0.06 * ((high - low) or 1)
    axes.set_xlim(low - air, high + air)
    for place, line in enumerate(lines):
        if line.limit is None:
            continue
        upper = line.limit_words.startswith("max_") and "drop" not in line.limit_words
        start, end = (line.limit, high + air) if upper else (low - air, line.limit)
        axes.fill_betweenx([place - 0.36, place + 0.36], start, end, color=ORANGE, alpha=0.16, linewidth=0)
        axes.plot(line.limit, place, marker=8 if upper else 9, markersize=7, color=ORANGE, zorder=2)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_yticks(range(len(lines)), [plain(f"{line.artifact} over {line.over}") for line in lines])
    form = {"difference": "difference", "ratio": "ratio", "speedup": "times as fast"}.get(panel.unit, panel.unit)
    axes.set_title(plain(f"{panel.title}: {form}"))
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(lines)), [_gate_words(line.limit_words, line.verdict) for line in lines])
    right.tick_params(length=0, labelsize=8)
    right.spines["right"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _gate_words(limit: str, verdict: str | None) -> str:
    return plain(f"{limit}: {verdict.upper() if verdict == 'fail' else verdict}") if limit and verdict else ""


def _steps(axes: Any, title: str, steps: Sequence[Step]) -> None:
    known = [step for step in steps if step.after is not None]
    for place, step in enumerate(known):
        before = known[place - 1].after if place else None
        assert step.after is not None
        if before is None:
            axes.plot(step.after, place, "o", color=INK, markersize=5, zorder=4)
        else:
            left, width = min(before, step.after), abs(step.after - before)
            axes.barh(place, width, left=left, height=0.5, color="#b9cfe4", edgecolor=BLUE, linewidth=1, zorder=2)
            axes.plot([before, before], [place - 1, place + 0.25], color=SOFT, linewidth=0.8, linestyle=":", zorder=1)
            axes.plot([step.after] * 2, [place - 0.25, place + 0.25], color=INK, linewidth=2, zorder=3)
        if step.ci:
            axes.plot(step.ci, [place, place], color=INK, linewidth=1.2, zorder=4)
            for end in step.ci:
                axes.plot([end, end], [place - 0.13, place + 0.13], color=INK, linewidth=1.2, zorder=4)
    axes.set_title(plain(title))
    axes.set_ylim(len(known) - 0.4, -0.6)
    axes.set_yticks(range(len(known)), [plain(step.name) for step in known])
    axes.use_sticky_edges = False
    axes.margins(x=0.12)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(known)), [_number(step.after) for step in known])
    right.tick_params(length=0, labelsize=8)
    right.spines["right"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(need("matplotlib.ticker", "a picture").MaxNLocator(4))
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)


def _bars(found: Layers) -> Any:
    """Dots, since lengths mean nothing on a logarithmic axis; the largest on top."""
    order = sorted(range(len(found.names)), key=lambda place: -found.values[place])[:60]
    with _figure(7.2, 0.9 + 0.2 * len(order)) as figure:
        axes = figure.subplots()
        for row, place in enumerate(order):
            value = found.values[place]
            if found.reference:
                axes.plot([value, found.reference[place]], [row, row], color=GREY, linewidth=1, zorder=1)
                axes.plot(
                    found.reference[place], row, "D", markersize=4.5, color="white", markeredgecolor=INK, zorder=3
                )
            kept = found.names[place] in found.kept
            shape = (
                {"marker": "s", "color": "white", "markeredgecolor": INK} if kept else {"marker": "o", "color": BLUE}
            )
            axes.plot(value, row, markersize=6, zorder=4, **shape)
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.set_yticks(range(len(order)), [_shortened(found.names[place]) for place in order], fontsize=8)
        axes.tick_params(axis="y", length=0)
        _log_if_wide(axes, "x", [*found.values, *(found.reference or ())])
        axes.grid(color=FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_title(plain(found.title))
        axes.set_xlabel(plain(found.measure))
        notes = [
            f"Filled: {found.title}. Hollow: {found.reference_name}." if found.reference else "",
            "Hollow squares: kept in float." if found.kept else "",
            f"The {len(order)} largest of {len(found.names)}." if len(order) < len(found.names) else "",
        ]
        if any(notes):
            figure.supxlabel(plain(" ".join(filter(None, notes))), fontsize=8, color=SOFT)
    return figure


def _stack(found: Layers, groups: dict[str, list[tuple[int, int]]]) -> Any:
    columns = min(4, len(groups))
    rows = math.ceil(len(groups) / columns)
    with _figure(7.2, 0.7 + 1.55 * rows) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for place, axes in enumerate(grid.flat):
            axes.set_visible(place < len(groups))
            axes.tick_params(labelbottom=place + columns >= len(groups))
        for axes, (kind, places) in zip(grid.flat, groups.items(), strict=False):
            blocks = [block for block, _ in places]
            if found.reference:
                axes.plot(
                    blocks,
                    [found.reference[p] for _, p in places],
                    color=SOFT,
                    linewidth=1.1,
                    linestyle="--",
                    marker="o",
                    markersize=2.6,
                    markerfacecolor="white",
                )
            axes.plot(
                blocks, [found.values[p] for _, p in places], color=BLUE, linewidth=1.5, marker="o", markersize=2.6
            )
            axes.set_title(plain(kind), fontsize=8.5)
            axes.grid(color=FAINT, linewidth=0.7)
            axes.set_axisbelow(True)
        _log_if_wide(grid[0, 0], "y", [*found.values, *(found.reference or ())])
        figure.supxlabel(
            f"block; {found.measure}"
            + (f". Solid, filled: {found.title}; dashed, hollow: {found.reference_name}." if found.reference else ""),
            fontsize=8,
            color=SOFT,
        )
    return figure


def _names(axes: Any, found: Pareto) -> None:
    """Each artifact's name beside it, on the side where its neighbour is farther away."""
    order = sorted(found.points, key=lambda point: point.ms)
    for place, point in enumerate(order):
        before = math.log(point.ms / order[place - 1].ms) if place else math.inf
        after = math.log(order[place + 1].ms / point.ms) if place + 1 < len(order) else math.inf
        left = before > after
        away = 5 + math.sqrt(_area(point.size_bytes, found) / math.pi)
        axes.annotate(
            plain(
                f"{_shortened(point.name)}\n{megabytes(point.size_bytes)}" + (", baseline" if point.baseline else "")
            ),
            (point.ms, point.quality),
            xytext=(-away if left else away, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=8.5,
            color=SOFT if point.dominated_by else INK,
            bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1},
            zorder=5,
        )


def _area(size_bytes: int, found: Pareto) -> float:
    """Of a bubble, in square points."""
    return 40 + 860 * size_bytes / max(point.size_bytes for point in found.points)


def _edge_label(axes: Any, words: str, *, x: float | None = None, y: float | None = None) -> None:
    common = {"fontsize": 7.5, "color": ORANGE, "textcoords": "offset points"}
    if y is not None:
        axes.annotate(plain(words), (1, y), xycoords=axes.get_yaxis_transform(), xytext=(-2, 2), ha="right", **common)
    else:
        axes.annotate(
            plain(words),
            (x, 0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(-3, 3),
            ha="right",
            va="bottom",
            rotation=90,
            **common,
        )


def _arms(value: float, ci: tuple[float, float]) -> list[list[float]] | None:
    if ci[0] == ci[1]:
        return None
    return [[max(value - ci[0], 0)], [max(ci[1] - value, 0)]]


def _plain_log(axis: Any, subs: tuple[int, ...] = (1, 2, 5)) -> None:
    ticker = need("matplotlib.ticker", "a picture")
    axis.set_major_locator(ticker.LogLocator(base=10, subs=subs))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _log_if_wide(axes: Any, name: str, values: Sequence[float]) -> None:
    positive = [value for value in values if value > 0]
    if len(positive) == len(values) and positive and max(positive) / min(positive) > 30:
        getattr(axes, f"set_{name}scale")("log")
        _plain_log(getattr(axes, f"{name}axis"), (1,))


def _number(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.3g}"


def _shortened(name: str) -> str:
    name = plain(name)
    return name if len(name) <= 44 else f"{name[:14]}…{name[-29:]}"
