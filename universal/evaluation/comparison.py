"""One written network beside Adam on the same images: accuracy over seconds, until Adam has clearly passed it."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from scripting import table
from target_cnn import score, train_with_adam
from universal.data.images import LabelledPixels
from universal.evaluation.baselines import RATES, built
from universal.reading.graph import ComputationGraph, Logits, in_fastest_layout

BATCH = 128
EPOCHS = 3
LEAST_STEPS = 300  # of small sets, of which three epochs are next to nothing
CLEARLY = 0.5  # points ahead, by which a network is passed
PAUSES = frozenset(round(10 * 1.5**power) for power in range(40))  # steps after which Adam's network is scored


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
    if len(train) % BATCH == 1:  # a batch of one has no statistics for a norm
        train = train.at(slice(len(train) - 1))
    curves = {}
    for lr in RATES:
        network = fast(
            built(build, seed, train.labels.device).float(), train
        )  # Adam's steps are lost in half precision
        curves[lr] = adam_curve(network, train, scored, lr, seed, min(written.accuracy_percent + CLEARLY, 100))
    return Comparison(written, curves)


def accuracy_percent(network: nn.Module, images: LabelledPixels) -> float:
    """The accuracy of `network`, in the precision that it takes."""
    graph = ComputationGraph(network, images[:2][0])
    precision = next(graph.module.parameters()).dtype
    return score(Logits(graph), images.to(images.labels.device, precision)).accuracy_percent


def fast(network: nn.Module, train: LabelledPixels) -> nn.Module:
    """Its logits, in the layout that it is fastest in."""
    example = train[:2][0]
    return in_fastest_layout(Logits(ComputationGraph(network, example)), example)


def adam_curve(
    network: nn.Module, train: LabelledPixels, scored: LabelledPixels, lr: float, seed: int, enough: float
) -> list[Point]:
    """Train `network` until its accuracy is `enough`, in percent, or to the end: its accuracies, over the seconds of
    training alone."""
    torch.manual_seed(seed)
    steps = math.ceil(len(train) / BATCH)
    epochs = max(EPOCHS, math.ceil(LEAST_STEPS / steps))
    points, before = [], 0.0
    label = f"Adam at {lr:g}"
    for progress in train_with_adam(network, train, epochs, lr, BATCH, pauses=PAUSES, label=label):
        ends = progress.step % steps == 0
        if ends and progress.step not in PAUSES and steps < LEAST_STEPS and progress.epoch < epochs:
            before += progress.seconds  # a small set has too many epochs to score after each
            continue
        accuracy = score(network, scored).accuracy_percent
        points.append(Point(before + progress.seconds, accuracy))
        before += progress.seconds if ends else 0
        if accuracy >= enough:
            break
    return points


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
