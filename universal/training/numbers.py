"""The search for the numbers of the rules, on random tasks and networks, by what the written networks get right."""

import argparse
import math
import random
import signal
import warnings
from itertools import chain
from multiprocessing import get_context
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from target_cnn import score
from universal.model.looking import DoubtfulWeights
from universal.reinforce.search import CovarianceSearch
from universal.rules.numbers import DEPENDENT, PROPERTIES, RANGES, Coefficients
from universal.rules.synthesis import write
from universal.training.architectures import draw_architecture
from universal.training.tasks import HELD_OUT_KINDS, KINDS, Task, draw_task

FEWEST, MOST = 100, 2000  # images to write from
SCORED = 1000  # images
PART = 4  # candidates that a process tries before it looks for more to do
MOST_MULTIPLICATIONS = 1.5e6  # per image, of a network, so that a search takes hours, not days


class Trial(NamedTuple):
    """A random network and a random task, which a seed makes again."""

    seed: str
    device: torch.device
    held_out: bool  # whether of kinds that no search sees

    def draw(self) -> tuple[nn.Module, Task]:
        draw = random.Random(self.seed)
        count = round(math.exp(draw.uniform(math.log(FEWEST), math.log(MOST))))
        task = draw_task(draw, count, SCORED, HELD_OUT_KINDS if self.held_out else KINDS)
        while True:
            network = draw_architecture(draw, tuple(task.train.images.shape[1:]), task.classes)
            with FlopCounterMode(display=False) as counter:  # without gradients it would not see into transformers
                network.eval()(task.train.images[:2])
            if counter.get_total_flops() <= 4 * MOST_MULTIPLICATIONS:  # two a multiplication, two images
                return network.to(self.device), task.to(self.device)


def try_all(trial: Trial, candidates: list[Coefficients]) -> list[float]:
    """The share of images that a network gets right when it is written with each of the coefficients; 0 where it cannot
    be written."""
    network, task = trial.draw()
    found = []
    for coefficients in candidates:
        try:
            with warnings.catch_warnings(action="ignore", category=DoubtfulWeights):
                write(network, *task.train, seed=0, coefficients=coefficients)
            found.append(score(network, task.test).accuracy_percent / 100)
        except ValueError:
            found.append(0.0)
    return found


def start() -> None:
    """What a process of the search does first."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the search itself ends it


def coefficients_of(vector: Tensor) -> Coefficients:
    """A vector of the search, as the file has it."""
    rows = vector.split([coefficients(name) for name in RANGES._fields])
    return {name: [round(value, 4) for value in row.tolist()] for name, row in zip(RANGES._fields, rows, strict=True)}


def coefficients(name: str) -> int:
    """How many a number has."""
    return len(PROPERTIES) if name in DEPENDENT else 1


class NumberSearch:
    """The state of a search, for `run_to_end`: a step is a generation of candidates."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.steps = options, options.generations
        dimension = sum(map(coefficients, RANGES._fields))
        self.search = CovarianceSearch(dimension, options.candidates, options.deviation, options.seed)
        self.step, self.seconds = 0, 0.0
        self.pool = get_context("spawn").Pool(options.processes, start)  # whose processes end with this one

    def run(self, until: int) -> None:
        while self.step < until:
            candidates = [coefficients_of(vector) for vector in self.search.ask()]
            rewards = self.tried(f"{self.options.seed} {self.step}", candidates, self.options.networks)
            self.search.tell(torch.tensor(rewards, dtype=torch.float64).T)
            self.step += 1

    def tried(
        self, seed: str, candidates: list[Coefficients], networks: int, held_out: bool = False
    ) -> list[list[float]]:  # fmt: skip
        """What each of so many networks gets right by each of the candidates, [networks, candidates]."""
        parts = [candidates[first : first + PART] for first in range(0, len(candidates), PART)]
        trials = [Trial(f"{seed} {index}", self.options.device, held_out) for index in range(networks)]
        pairs = [(trial, part) for trial in trials for part in parts]
        found = self.pool.starmap(try_all, pairs, chunksize=1)
        return [list(chain(*found[first : first + len(parts)])) for first in range(0, len(found), len(parts))]

    @property
    def result(self) -> Coefficients:
        return coefficients_of(self.search.mean)

    def report(self, minutes_left: float) -> None:
        """Print the progress: accuracies by what the search has come to and by the numbers set by hand, on networks and
        tasks that are none of the search."""
        found = self.tried("report", [{}, self.result], self.options.reported, held_out=True)
        by_hand, now = (100 * fmean(column) for column in zip(*found, strict=True))
        better = fmean((after > before) + 0.5 * (after == before) for before, after in found)
        print(
            f"Generation {self.step}/{self.steps}: Accuracy = {now:.2f}%, by Hand {by_hand:.2f}%, "
            f"Better in {100 * better:.0f}%, Time Left = {minutes_left:.1f} min",
            flush=True,
        )

    def settings(self) -> dict:
        names = ("seed", "generations", "candidates", "networks", "deviation")
        return {name: str(getattr(self.options, name)) for name in names}

    def parts(self) -> dict:
        return {"search": self.search}
