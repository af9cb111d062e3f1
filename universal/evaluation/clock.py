"""Adam by the clock: where a training stands at each moment, when it matches something, and when it is over."""

import copy
import math
import sys
from collections.abc import Callable, Container
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from target_cnn import Dataset, Progress, score, train_with_adam

BATCH = 128  # images in a step
RATES = (0.0003, 0.001, 0.003)  # of Adam, of which the best is taken
FINENESS = 1.25  # from one moment at which accuracy is noted to the next
EPOCHS, LEAST_STEPS = 3, 300  # that it takes at most; of small sets, three epochs are next to nothing
GAIN, FEWEST_STEPS = 0.1, 300  # it is over when, after so many steps, half of its time brought fewer points


def built(build: Callable[[], nn.Module], seed: int, device: torch.device) -> nn.Module:
    """A network with the random init of `seed`."""
    torch.manual_seed(seed)
    return build().to(device)


def most_steps(images: int) -> int:
    """How many steps Adam takes at most on so many images, to be compared with."""
    return max(EPOCHS * math.ceil(images / BATCH), LEAST_STEPS)


class Point(NamedTuple):
    """A network as Adam had it at a moment."""

    learning_rate: float
    seconds: float  # of training
    network: nn.Module

    def report(self, data: Dataset) -> dict:
        return {
            "learning_rate": self.learning_rate, "seconds": self.seconds,
            "accuracy_percent": score(self.network, data).accuracy_percent,
        }  # fmt: skip


class Training:
    """A training of `network` with Adam that goes on when it is told to.

    `curve` has the seconds of training and the accuracy in percent on `noted`: at the start, and at moments before,
    at and after so many `seconds`, each a quarter later than the last. It pauses after the steps in `pauses` as well,
    and is over after `most_steps` or when it has stopped gaining.
    """

    def __init__(
        self, network: nn.Module, train: Dataset, noted: Dataset, lr: float, seed: int, seconds: float,
        most_steps: int, pauses: Container[int] = (),
    ):  # fmt: skip
        self.network, self.noted, self.lr, self.seed, self.most_steps = network, noted, lr, seed, most_steps
        self.moments = [seconds * FINENESS**power for power in range(-15, 60)]
        self.curve = [(0.0, self._accuracy())]
        self.steps = train_with_adam(
            network, train, sys.maxsize, lr, BATCH, pauses={*pauses, most_steps}, moments=self.moments,
            label=f"Adam at {lr:g}",
        )  # fmt: skip

    def run(self, marks: dict[str, Callable[[Progress], bool]]) -> dict[str, Point]:
        """Train on until each of the `marks` holds: where it stood at the first pause at which it did."""
        found: dict[str, Point] = {}
        if len(self.curve) == 1:
            torch.manual_seed(self.seed)  # at all rates the same images in the same order
        for progress in self.steps:
            if progress.all_seconds >= self.moments[0] or progress.step >= self.most_steps:
                self.curve.append((progress.all_seconds, self._accuracy()))
                self.moments = [moment for moment in self.moments if moment > progress.all_seconds]
            for name in [name for name, holds in marks.items() if name not in found and holds(progress)]:
                found[name] = Point(self.lr, progress.all_seconds, copy.deepcopy(self.network))
            if len(found) == len(marks):
                break
        return found

    def is_over(self, progress: Progress) -> bool:
        """Whether it has taken all its steps, or gained next to nothing in the second half of its time."""
        most = max(accuracy for _, accuracy in self.curve)
        reached = next(seconds for seconds, accuracy in self.curve if accuracy >= most - GAIN)
        stopped = progress.step >= FEWEST_STEPS and self.curve[-1][0] >= 2 * reached
        return stopped or progress.step >= self.most_steps

    def matched(self, accuracy: float) -> float | None:
        """Seconds to this accuracy, on straight lines between the points of the curve; None if it is not reached.

        Where the start has it, those of the first moment after.
        """
        for (earlier, lower), (later, higher) in pairwise(self.curve):
            if lower >= accuracy:
                return later
            if higher >= accuracy:
                return earlier + (later - earlier) * (accuracy - lower) / (higher - lower)
        return None

    def _accuracy(self) -> float:
        return score(self.network, self.noted).accuracy_percent
