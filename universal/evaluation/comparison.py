"""One written network beside Adam on the same images: accuracy over seconds, until Adam has clearly passed it."""

import time
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from scripting import table
from target_cnn import score
from universal.data.images import LabelledPixels
from universal.evaluation.clock import RATES, Training, built, most_steps
from universal.reading.graph import ComputationGraph, Logits, in_fastest_layout

CLEARLY = 0.5  # points ahead, by which a network is passed


class Point(NamedTuple):
    seconds: float
    accuracy_percent: float


class Comparison(NamedTuple):
    """Where a written network stands, and Adam's curve at each rate."""

    written: Point
    adam: dict[float, list[Point]]

    def passed(self, lr: float) -> Point | None:
        """The first point at which Adam, at this rate, is not behind what was written."""
        level = (point for point in self.adam[lr] if point.accuracy_percent >= self.written.accuracy_percent)
        return next(level, None)


def compare(
    build: Callable[[], nn.Module], write: Callable[[nn.Module, LabelledPixels], object], train: LabelledPixels,
    scored: LabelledPixels, seed: int,
) -> Comparison:  # fmt: skip
    """Write a network of this `seed` from `train`, and train others from the same init, all scored on `scored`."""
    network = built(build, seed, train.labels.device)
    start = time.perf_counter()
    write(network, train)
    seconds = time.perf_counter() - start
    written = Point(seconds, accuracy_percent(network, scored))
    enough = min(written.accuracy_percent + CLEARLY, 100)
    last = most_steps(len(train))
    curves = {}
    for lr in RATES:
        network = fast(built(build, seed, train.labels.device).float(), train)  # steps are lost in half precision
        training = Training(network, train, scored, lr, seed, seconds, last)
        training.run({
            "end": lambda at, curve=training.curve: at.step >= last or (len(curve) > 1 and curve[-1][1] >= enough)
        })  # fmt: skip
        curves[lr] = [Point(*point) for point in training.curve[1:]]
    return Comparison(written, curves)


def accuracy_percent(network: nn.Module, images: LabelledPixels) -> float:
    """The accuracy of `network`, in the precision that it takes."""
    graph = ComputationGraph(network, images[[0, -1]][0])  # two even of one
    precision = next(graph.module.parameters()).dtype
    return score(Logits(graph), images.to(images.labels.device, precision)).accuracy_percent


def fast(network: nn.Module, train: LabelledPixels) -> nn.Module:
    """Its logits, in the layout that it is fastest in."""
    example = train[:2][0]
    return in_fastest_layout(Logits(ComputationGraph(network, example)), example)


def comparison_table(found: Comparison) -> str:
    """What was written, and at each rate: where Adam is by then, when it is level, and where it comes to."""
    header = ["", f"After {found.written.seconds:.2f} s (%)", "Level After (s)", "At the End (%)", "After (s)"]
    rows = [["written", f"{found.written.accuracy_percent:.2f}", "-", "-", "-"]]
    for lr, points in found.adam.items():
        by_then = [point for point in points if point.seconds <= found.written.seconds]
        level, last = found.passed(lr), points[-1]
        rows.append([
            f"Adam at {lr:g}", f"{by_then[-1].accuracy_percent:.2f}" if by_then else "-",
            f"{level.seconds:.2f}" if level else "-", f"{last.accuracy_percent:.2f}", f"{last.seconds:.2f}",
        ])  # fmt: skip
    return table(header, rows)


def conclusion(found: Comparison) -> str:
    """When the first of the rates is level with what was written."""
    level = [point.seconds for lr in found.adam if (point := found.passed(lr))]
    if not level:
        return "Adam does not come level with the written network, at none of the rates"
    times = min(level) / found.written.seconds
    return f"Adam is level with the written network after {min(level):.2f} s: {times:.1f} times as long as writing it"
