"""Charts as SVG text that takes its colours and font from the page around it, or as a picture."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_like.observability.curves import Chart, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _LINE = "#010203", "#010204"
"""Colours that nothing else has: they become CSS variables, so a drawing is light and dark."""
_GREY, _LIGHT_GREY = "#808080", "#80808050"
"""Readable on white and on black."""
COLOURS = (
    *("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#06b6d4", "#ec4899", "#84cc16"),
    *("#a16207", "#64748b", "#1e3a8a", "#be123c"),
)
_FEW_POINTS = 30
_MANY_POINTS = 60


@dataclass(frozen=True)
class Drawing:
    """A chart as an `<svg>` element as wide as its place, and the (label, colour) of each line."""

    title: str
    svg: str
    legend: tuple[tuple[str, str], ...]
    is_wide: bool


def draw(chart: Chart) -> Drawing:
    """The chart, drawn."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": chart.title, "font.size": 9.5}
    with mpl.rc_context(style):
        figure = Figure(figsize=(12.2 if chart.is_stacked else 6.0, 2.9), layout="constrained")
        figure.patch.set_alpha(0)
        _fill(figure.add_subplot(), chart, ink=_INK, line=_LINE)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = _adapted(buffer.getvalue(), chart.title)
    colours = zip(chart.lines, _repeated(len(chart.lines)), strict=True)
    legend = tuple((name, colour) for name, colour in colours if chart.lines[name])
    return Drawing(
        chart.title, svg, legend if len(chart.lines) > 1 else (), is_wide=chart.is_stacked
    )


def save_picture(charts: Sequence[Chart], path: Path) -> None:
    """Write charts of the same lines side by side, as PNG on white or as SVG on nothing."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(3, len(charts))
    rows = math.ceil(len(charts) / columns)
    names = list(charts[0].lines)
    is_svg = path.suffix == ".svg"
    with mpl.rc_context({"svg.hashsalt": "picture", "font.size": 9}):
        figure = Figure(figsize=(4.3 * columns, 2.6 * rows + 0.35), layout="constrained")
        figure.patch.set_alpha(0 if is_svg else 1)
        for number, chart in enumerate(charts, start=1):
            axes = figure.add_subplot(rows, columns, number)
            _fill(axes, chart, ink=_GREY, line=_LIGHT_GREY)
            axes.set_title(chart.title, loc="left", fontsize=10, color=_GREY)
        patches = [
            Patch(color=colour, label=name)
            for name, colour in zip(names, _repeated(len(names)), strict=True)
        ]
        figure.legend(
            handles=patches,
            loc="outside upper left",
            ncols=max(1, min(len(names), 2 * columns)),
            frameon=False,
            labelcolor=_GREY,
            handlelength=1,
        )
        metadata = {"Date": None, "Creator": None} if is_svg else {"Software": None}
        figure.savefig(path, dpi=160, metadata=metadata)


def _fill(axes: Axes, chart: Chart, *, ink: str, line: str) -> None:
    _stack(axes, chart) if chart.is_stacked else _lines(axes, chart)
    _dress(axes, chart, ink=ink, line=line)


def _lines(axes: Axes, chart: Chart) -> None:
    for colour, points in zip(_repeated(len(chart.lines)), chart.lines.values(), strict=True):
        steps = list(points)
        values = [v if math.isfinite(v) else math.nan for v in points.values()]
        if chart.is_noisy and len(points) > _MANY_POINTS:
            average = smoothed(points, span=max(5, len(points) // 25))
            axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
            axes.plot(steps, list(average.values()), color=colour, linewidth=1.7)
        else:
            marker = "o" if len(points) <= _FEW_POINTS else ""
            axes.plot(
                steps,
                values,
                color=colour,
                linewidth=1.7,
                marker=marker,
                markersize=3,
            )
    finite = [v for points in chart.lines.values() for v in points.values() if math.isfinite(v)]
    if finite and min(finite) > 0 and max(finite) / min(finite) > 100:
        axes.set_yscale("log")


def _stack(axes: Axes, chart: Chart) -> None:
    starts = list(next(iter(chart.lines.values())))
    width = starts[1] - starts[0] if len(starts) > 1 else 1
    edges = [start - 0.5 for start in [*starts, starts[-1] + width]]
    heights = [[*points.values(), list(points.values())[-1]] for points in chart.lines.values()]
    colours = _repeated(len(heights))
    axes.stackplot(edges, heights, colors=colours, alpha=0.8, step="post", linewidth=0)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)


def _dress(axes: Axes, chart: Chart, *, ink: str, line: str) -> None:
    """Axes and grid in the colours of the page."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

    axes.patch.set_alpha(0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(line)
    axes.grid(axis="y", color=line, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink, length=0)
    axes.tick_params(which="minor", left=False, labelleft=False)
    axes.set_xlabel(chart.across, color=ink)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    if chart.unit:
        axes.set_ylabel(chart.unit, color=ink)
    if chart.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.yaxis.get_offset_text().set_color(ink)
    if axes.get_ylim()[1] >= 10_000:
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _repeated(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _adapted(svg: str, title: str) -> str:
    """Without the XML prologue, with the page's width, colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(_INK, "var(--muted)").replace(_LINE, "var(--line)")
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    # Every chart has a clip path; equal names in one page would all mean the first.
    prefix = re.sub(r"\W", "", title)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    return svg.replace("url(#", f"url(#{prefix}-").replace('href="#', f'href="#{prefix}-')
