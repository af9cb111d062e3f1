"""The pictures of the two evaluations: scores over steps, accuracy over error overlap, and filters of conv1.

Weights are flat, [421642]. Colours are told apart by the colour-blind.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from scripting import new_figure, save_figure
from target_cnn import Score

if TYPE_CHECKING:  # matplotlib is imported where a figure is made: errors and --help do not wait for it
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

FILTERS_A_ROW = 8
PIXELS = 3  # a side of one weight; between filters lie 2


def plot_comparison(generated: list[Score], original: list[Score], path: Path) -> None:
    """Save two panels, accuracy and loss over step or epoch, generated against original."""
    figure = new_figure(12, 4.8)
    draw_scores(figure.subplots(1, 2), generated, original)
    save_figure(figure, path)


def plot_evaluation(
    generated: list[Score], original: list[Score], networks: list[dict], weights: dict[str, Tensor], path: Path
) -> None:
    """Save the two panels of `plot_comparison`, one of the error overlaps, and below them the filters of conv1.

    `networks` are those of `universal.experiment.verdict.assess`; `weights` are the networks to look at, by title.
    """
    figure = new_figure(18, 7.2)
    upper, lower = figure.subfigures(2, 1, height_ratios=(4.8, 2.4))
    panels = upper.subplots(1, 3)
    draw_scores(panels[:2], generated, original)
    draw_overlaps(panels[2], networks)
    draw_filters(lower, weights)
    save_figure(figure, path)


def draw_scores(panels: "list[Axes]", generated: list[Score], original: list[Score]) -> None:
    """Draw accuracy and loss over step or epoch.

    Both show the trained range; the random start, far outside it, is named in the margin.
    """
    from matplotlib.ticker import MaxNLocator

    curves = {"generated": (generated, "#0072B2", "o-"), "original training": (original, "#D55E00", "s--")}
    for panel, field in zip(panels, ("accuracy_percent", "average_loss"), strict=True):
        trained = []
        for name, (scores, colour, style) in curves.items():
            values = [getattr(result, field) for result in scores]
            panel.plot(range(len(values)), values, style, color=colour, label=name, markersize=5)
            trained += values[1:]
        margin = 0.08 * (max(trained) - min(trained)) or 0.1
        panel.set_ylim(min(trained) - margin, max(trained) + margin)
        panel.set_xlim(-0.3, max(len(generated), len(original)) - 0.7)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_xlabel("generative step / training epoch")
        panel.grid(alpha=0.3)
    accuracy, loss = panels
    start = generated[0]
    margin_note = {"xycoords": "axes fraction", "color": "#444444"}
    accuracy.set(title="Accuracy", ylabel="accuracy (%)")
    accuracy.legend(loc="lower right")
    accuracy.annotate(f"step 0:\n{start.accuracy_percent:.1f} %", (0.02, 0.02), **margin_note)
    loss.set(title="Loss", ylabel="average loss (sum over a batch of 256)")
    loss.legend(loc="upper right")
    loss.annotate(f"step 0:\n{start.average_loss:.0f}", (0.02, 0.91), **margin_note)


def draw_overlaps(panel: "Axes", networks: list[dict]) -> None:
    """Draw each network's accuracy over its error overlap with the recorded checkpoints, a colour for each method."""
    colours = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#F0E442", "#000000", "#D55E00")
    methods = list(dict.fromkeys(network["method"] for network in networks))
    for method, colour, marker in zip(methods, colours * 2, "oD^vs<>pP*X" * 2, strict=False):
        points = [network for network in networks if network["method"] == method]
        panel.scatter(
            [network["error_overlap"] for network in points],
            [network["accuracy_percent"] for network in points],
            color=colour, marker=marker, label=method, alpha=0.8, edgecolors="#444444", linewidths=0.5,
        )  # fmt: skip
    panel.set(
        title="Is it a copy?",
        xlabel="error overlap with the nearest recorded checkpoint (IoU)",
        ylabel="accuracy (%)",
        xlim=(-0.03, 1.03),
    )
    panel.legend(loc="best", fontsize="small")
    panel.grid(alpha=0.3)


def draw_filters(row: "SubFigure", weights: dict[str, Tensor]) -> None:
    """Draw the filters of conv1 of each network as small images, all on one scale with zero in its middle."""
    mosaics = {title: filter_mosaic(network) for title, network in weights.items()}
    largest = max(mosaic.nan_to_num().abs().max().item() for mosaic in mosaics.values())
    panels = row.subplots(1, len(mosaics), squeeze=False, gridspec_kw={"wspace": 0.08})[0]
    for panel, (title, mosaic) in zip(panels, mosaics.items(), strict=True):
        picture = panel.imshow(mosaic.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
        panel.set_title(title, fontsize="medium")
        panel.set_axis_off()
    row.suptitle("The 32 filters of conv1")
    row.colorbar(picture, ax=panels, label="weight", shrink=0.7, pad=0.01)


def filter_mosaic(weights: Tensor) -> Tensor:
    """The 32 filters of conv1 side by side in rows of eight, each weight PIXELS x PIXELS; NaN where there is none."""
    filters = weights[: 32 * 9].view(-1, FILTERS_A_ROW, 3, 3)
    large = filters.repeat_interleave(PIXELS, 2).repeat_interleave(PIXELS, 3)
    framed = pad(large, (1, 1, 1, 1), value=torch.nan)
    return framed.transpose(1, 2).flatten(2).flatten(0, 1)
