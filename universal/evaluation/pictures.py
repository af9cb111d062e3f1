"""The picture of an evaluation."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scripting import new_figure, save_figure
from universal.evaluation.comparison import Comparison

if TYPE_CHECKING:  # matplotlib is imported where a figure is made: errors and --help do not wait for it
    from matplotlib.axes import Axes

RATE_COLOURS = ("#56B4E9", "#009E73", "#D55E00")  # of Adam's three rates
WRITTEN = "#0072B2"
COLOURS_OF_NUMBERS = ("#E69F00", "#009E73", "#0072B2", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def plot_from_data(rows: Sequence[dict], path: Path) -> None:
    """Save a panel for each network and data set: by the clock, what is written and the accuracy of Adam on the way."""
    panels_of: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        panels_of.setdefault((row["data"], row["network"]), []).append(row)
    columns = min(len(panels_of), 6)
    lines = math.ceil(len(panels_of) / columns)
    figure = new_figure(max(2.6 * columns, 6), 0.8 + 2.1 * lines)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    numbers = list(dict.fromkeys(row["number"] for row in rows))
    colours = dict(zip(numbers, COLOURS_OF_NUMBERS, strict=False))
    several = len({name for name, _ in panels_of}) > 1
    for panel, ((name, network), shown) in zip(panels, panels_of.items(), strict=False):
        for row in shown:
            draw_race(panel, row, colours[row["number"]])
        panel.set_title(f"{Path(name).name}:\n{network}" if several else network, fontsize=8)
        show_seconds(panel, (1,))
        panel.set_ylim(bottom=max(min(row["on_the_way"] for row in shown) - 12, 0))
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    for panel in panels[len(panels_of) :]:
        panel.axis("off")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(numbers), fontsize=8)
    figure.supxlabel("seconds", fontsize=9)
    figure.supylabel("accuracy (%)", fontsize=9)
    save_figure(figure, path)


def draw_race(panel: "Axes", row: dict, colour: str) -> None:
    """Adam's curve, and a dot where the written network stands."""
    seconds, accuracies = zip(*row["adam"]["curve"][1:], strict=True)
    images = f"{row['images']:,} images"
    panel.plot(seconds, accuracies, color=colour, lw=1, label=f"Adam, {images}")
    panel.plot(row["seconds"], row["on_the_way"], "o", color=colour, markersize=5, label=f"written, {images}")


def show_seconds(panel: "Axes", digits: tuple[int, ...] = (1, 2, 5)) -> None:
    """Seconds on a scale of logarithms, as people write them: so many of a power of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=digits))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter(NullFormatter())


def plot_comparison(found: Comparison, name: str, path: Path) -> None:
    """Save accuracy over seconds of a written network and of Adam at each rate."""
    figure = new_figure(8, 5)
    panel = figure.subplots()
    for (lr, points), colour in zip(found.adam.items(), RATE_COLOURS, strict=True):
        panel.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, label=f"Adam, rate {lr:g}")
    panel.plot(*found.written, "*", color=WRITTEN, markersize=16, zorder=3, label="written")
    panel.axhline(found.written.accuracy_percent, color=WRITTEN, alpha=0.4, lw=1)
    show_seconds(panel)
    panel.set_xlabel("seconds of writing, or of training")
    panel.set_ylabel("accuracy (%)")
    panel.set_title(name)
    panel.grid(alpha=0.3)
    panel.legend(loc="lower right")
    save_figure(figure, path)
