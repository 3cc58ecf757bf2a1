"""Draw the curves of a supervised run and the reinforcement learning after it into one SVG file.

uv run tools/draw_curves.py logs/exp_001 logs/exp_002 docs/images/two_commands.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LEFT, RIGHT = "#3b82f6", "#f59e0b"
GREY = "#808080"  # readable on white and on black


def curve(folder: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    points = [(record["step"], record[name]) for record in map(json.loads, lines) if name in record]
    return [step for step, _ in points], [value for _, value in points]


def draw(axes: Axes, folder: Path, title: str, trained: str, label: str) -> None:
    """One run: what it trained on, and its accuracy on problems it has not seen."""
    axes.plot(*curve(folder, trained), color=LEFT, linewidth=1)
    axes.set_ylabel(label, color=LEFT)
    axes.set_xlabel("step")
    axes.set_title(title, fontsize=10)
    right = axes.twinx()
    steps, accuracies = curve(folder, "validation/accuracy")
    right.plot(steps, accuracies, color=RIGHT, marker="o", markersize=3)
    right.set_ylabel("held-out accuracy", color=RIGHT)
    right.set_ylim(0, 1)
    for one in (axes, right):
        one.spines["top"].set_visible(False)
        one.tick_params(colors=GREY)
        one.xaxis.label.set_color(GREY)
        one.title.set_color(GREY)
        for spine in one.spines.values():
            spine.set_color(GREY)


def main(supervised: str, reinforced: str, target: str) -> None:
    """Draw both runs, side by side."""
    style = {"svg.hashsalt": "curves", "font.size": 9}
    with mpl.rc_context(style):
        figure = Figure(figsize=(9.6, 2.9), layout="constrained")
        figure.patch.set_alpha(0)
        left, right = figure.subplots(1, 2)
        for axes in (left, right):
            axes.patch.set_alpha(0)
        draw(left, Path(supervised), "run_sft.py", "train/loss", "loss")
        draw(right, Path(reinforced), "run_grpo_math.py", "train/reward", "reward")
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
