"""Charts as SVG text that takes its colours and font from the page around it."""

from __future__ import annotations

import io
import math
import re
from typing import TYPE_CHECKING

from nemo_like.observability.curves import Chart, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _LINE = "#010203", "#010204"
"""Colours that nothing else has: they become CSS variables, so a drawing is light and dark."""
_COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#06b6d4", "#ec4899", "#84cc16")
_FEW_POINTS = 30
_MANY_POINTS = 60


def draw(chart: Chart) -> str:
    """The chart as an `<svg>` element as wide as its place."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": chart.title, "font.size": 9.5}
    with mpl.rc_context(style):
        figure = Figure(figsize=(6.0, 3.1), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        _stack(axes, chart) if chart.is_stacked else _lines(axes, chart)
        _dress(axes, chart)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _adapted(buffer.getvalue(), chart.title)


def _lines(axes: Axes, chart: Chart) -> None:
    for colour, (label, points) in zip(
        _repeated(len(chart.lines)), chart.lines.items(), strict=True
    ):
        steps = list(points)
        values = [v if math.isfinite(v) else math.nan for v in points.values()]
        if len(points) > _MANY_POINTS:
            average = smoothed(points, span=max(5, len(points) // 25))
            axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
            axes.plot(steps, list(average.values()), color=colour, linewidth=1.7, label=label)
        else:
            marker = "o" if len(points) <= _FEW_POINTS else ""
            axes.plot(
                steps, values, color=colour, linewidth=1.7, marker=marker, markersize=3, label=label
            )
    finite = [v for points in chart.lines.values() for v in points.values() if math.isfinite(v)]
    if finite and min(finite) > 0 and max(finite) / min(finite) > 100:
        axes.set_yscale("log")


def _stack(axes: Axes, chart: Chart) -> None:
    steps = list(next(iter(chart.lines.values())))
    values = [list(points.values()) for points in chart.lines.values()]
    axes.stackplot(
        steps,
        values,
        labels=list(chart.lines),
        colors=_repeated(len(values)),
        alpha=0.75,
        step="mid",
    )
    axes.set_ylim(bottom=0)


def _dress(axes: Axes, chart: Chart) -> None:
    """Axes, grid and legend in the colours of the page."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.patch.set_alpha(0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0)
    axes.tick_params(which="minor", left=False, labelleft=False)
    axes.set_xlabel("step", color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    if chart.unit:
        axes.set_ylabel(chart.unit, color=_INK)
    if chart.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.yaxis.get_offset_text().set_color(_INK)
    if len(chart.lines) > 1:
        columns = min(len(chart.lines), 4)
        axes.legend(
            frameon=False, labelcolor=_INK, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1)
        )


def _repeated(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


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
