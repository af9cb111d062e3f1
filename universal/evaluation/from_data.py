"""Networks written from labelled images, and Adam on the same images by the same clock.

Some training images are kept apart from both: on them Adam's rate is chosen, so that a training at each rate runs but
once. Its accuracy is noted on the way, on the first test images; what is reported of single moments, such as that at
which the network would have been written, is of all test images.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean, median
from typing import NamedTuple

import torch
from torch import nn

from scripting import mean_and_range, summary_statistics, table
from target_cnn import Dataset, Progress, score
from universal.data.splits import cut, shuffled, split_images
from universal.evaluation.clock import BATCH, RATES, Point, Training, built
from universal.evaluation.networks import EVALUATED
from universal.experiment.verdict import mean_pairwise_overlap
from universal.mnist import CLASSES, IMAGE_SIDE
from universal.model.synthesizer import GraphWeightSynthesizer
from universal.reading.graph import in_fastest_layout
from universal.rules.synthesis import write

HELD_OUT = 5000  # training images on which the rate is chosen
FIRST_STEPS = 100
ON_THE_WAY = 2000  # test images on which accuracy is noted during training
EPOCHS = 3  # of all images, for which Adam may go on until it matches
SCARCE = 200  # images up to which Adam runs until it stops gaining: labels are what is scarce then, not time
MNIST_BY_NAME = "mnist"


# ---- data sets -------------------------------------------------------------------------------------------------------


class DataSet(NamedTuple):
    """The images that both sides learn from, those that choose Adam's rate, and those that score."""

    known: Dataset
    held_out: Dataset
    test: Dataset

    @property
    def epoch(self) -> int:
        """Steps of an epoch of Adam on all training images; as if none were held out, which would make it shorter."""
        return math.ceil((len(self.known.labels) + len(self.held_out.labels)) / BATCH)

    def training(self, network: nn.Module, train: Dataset, lr: float, seed: int, seconds: float) -> Training:
        """Adam on some of the images, by the clock of a network that was written in so many seconds."""
        pauses = (FIRST_STEPS, self.epoch)
        return Training(network, train, self.test[:ON_THE_WAY], lr, seed, seconds, EPOCHS * self.epoch, pauses=pauses)


def load_data_set(name: str, validation: int, device: torch.device) -> DataSet:
    """The repository's MNIST, "mnist", or the labelled images at a path, of their first ten classes, grey and 28 x 28.

    The order is random and always the same. With `validation` so many training images take the place of the test
    images. Raises UserError if it cannot be read.
    """
    path = None if name == MNIST_BY_NAME else Path(name)
    train, test = map(of_ten_classes, split_images(path, validation, device, None, (IMAGE_SIDE, IMAGE_SIDE), 1))
    return DataSet(*cut(train, min(HELD_OUT, len(train.labels) // 10)), shuffled(test))


def of_ten_classes(data: Dataset) -> Dataset:
    return data[data.labels < CLASSES]


# ---- a row: a network and a number of images -------------------------------------------------------------------------


def best(points: Iterable[Point], held_out: Dataset) -> Point:
    """The point whose rate seems best there; where accuracies tie, of the smaller loss."""

    def merit(point: Point) -> tuple[float, float]:
        result = score(point.network, held_out)
        return result.accuracy_percent, -result.cross_entropy

    return max(points, key=merit)


def adam_beside(
    network: nn.Module, train: Dataset, data: DataSet, seed: int, seconds: float, goal: float, whole: bool
) -> dict:
    """Where Adam comes to from a `network`: in the `seconds` of writing; where images are scarce, at its end; and of
    the `whole` data set, after its first steps and after an epoch, each at the rate that is best there.

    The training whose rate is best at the last of these goes on for the seconds that it takes to the `goal`, an
    accuracy on the first test images.
    """
    trainings = [data.training(copy.deepcopy(network), train, lr, seed, seconds) for lr in RATES]
    stood: dict[str, list[Point]] = {}
    for training in trainings:
        marks = {"equal_seconds": lambda progress: progress.all_seconds >= seconds}
        if len(train.labels) <= SCARCE:
            marks["end"] = training.is_over
        if whole:
            marks |= {"first_steps": after_first_steps, "epoch": lambda progress: progress.step >= data.epoch}
        for name, point in training.run(marks).items():
            stood.setdefault(name, []).append(point)
    points = {name: best(each, data.held_out) for name, each in stood.items()}

    last = max(points.values(), key=lambda point: point.seconds)
    (training,) = (each for each in trainings if each.lr == last.learning_rate)
    if training.matched(goal) is None:
        training.run({"over": lambda progress: training.matched(goal) is not None or training.is_over(progress)})
    found = {name: point.report(data.test) for name, point in points.items()}
    return found | {"curve": training.curve, "matched": training.matched(goal)}


def after_first_steps(progress: Progress) -> bool:
    return progress.step >= FIRST_STEPS


def evaluate_from_data(
    name: str, data: DataSet, count: int | None, seeds: Sequence[int], synthesizer: GraphWeightSynthesizer
) -> dict:
    """A network written from the first `count` images, or all, beside Adam and beside what is simpler."""
    train, device, build = data.known[:count], data.test.images.device, EVALUATED[name]

    def laid_out(network: nn.Module) -> nn.Module:
        return in_fastest_layout(network, train.images[:2])

    seconds, networks = [], []
    for seed in seeds:
        network = built(build, seed, device)
        begin = time.perf_counter()
        accounts = write(network, *train, seed=seed, limit=len(train.labels), synthesizer=synthesizer)
        seconds.append(time.perf_counter() - begin)
        networks.append(laid_out(network))
    scores = [score(network, data.test) for network in networks]
    goal = fmean(100 * (1 - each.wrong[:ON_THE_WAY].double().mean().item()) for each in scores)

    start = laid_out(built(build, seeds[0], device))
    adam = adam_beside(start, train, data, seeds[0], median(seconds), goal, whole=count is None)
    if count is None:
        further = (data.training(copy.deepcopy(networks[0]), train, lr, seeds[0], median(seconds)) for lr in RATES)
        points = [training.run({"end": after_first_steps})["end"] for training in further]
        adam["first_steps_from_written"] = best(points, data.held_out).report(data.test)
    written = summary_statistics([each.accuracy_percent for each in scores])
    return {
        "network": name, "images": len(train.labels), "written": written, "seconds": median(seconds),
        "left": accounts.left, "on_the_way": goal, "adam": adam,
        "error_overlap": mean_pairwise_overlap([each.wrong for each in scores]),
        "nulls": {
            "random_features": last_layer_alone(build, train, data, seeds[0], synthesizer),
            "pixels": last_layer_alone(EVALUATED["linear classifier 784-10"], train, data, seeds[0], synthesizer),
            "init": score(start, data.test).accuracy_percent,
        },
    }  # fmt: skip


def last_layer_alone(
    build: Callable[[], nn.Module], train: Dataset, data: DataSet, seed: int, synthesizer: GraphWeightSynthesizer
) -> float:
    """The accuracy in percent of a network whose other layers are frozen at their init."""
    network = built(build, seed, train.images.device).requires_grad_(False)
    *_, last = (module for module in network.modules() if isinstance(module, nn.Linear))
    last.requires_grad_(True)
    write(network, *train, limit=len(train.labels), synthesizer=synthesizer)
    return score(network, data.test).accuracy_percent


# ---- what is said of the rows ----------------------------------------------------------------------------------------


def table_of(rows: Sequence[dict]) -> str:
    """A row for each network, of one number of images."""
    adam = [row["adam"] for row in rows]
    columns = {
        "Network": [row["network"] for row in rows],
        "Written (%)": [mean_and_range(row["written"]) for row in rows],
        "Seconds": [f"{row['seconds']:.2f}" for row in rows],
        "Adam, Same Seconds (%)": [in_percent(each["equal_seconds"]) for each in adam],
        "Rate": [f"{each['equal_seconds']['learning_rate']:g}" for each in adam],
        "Seconds to Match": [
            f"{each['matched']:.2f}" if each["matched"] is not None else f"not within {bound(each):.2f}"
            for each in adam
        ],
    }  # fmt: skip
    more = {
        "end": "Adam, at Its End (%)", "epoch": "Epoch of Adam (%)", "first_steps": f"{FIRST_STEPS} Steps, Random",
        "first_steps_from_written": f"{FIRST_STEPS} Steps, Written",
    }  # fmt: skip
    columns |= {title: [in_percent(each[key]) for each in adam] for key, title in more.items() if key in adam[0]}
    if rows[0]["error_overlap"] is not None:
        columns["Error Overlap"] = [f"{row['error_overlap']:.2f}" for row in rows]
    for key, title in {"random_features": "Random Features (%)", "pixels": "Pixels (%)", "init": "Init (%)"}.items():
        columns[title] = [f"{row['nulls'][key]:.2f}" for row in rows]
    return table(list(columns), [list(cells) for cells in zip(*columns.values(), strict=True)])


def in_percent(point: dict) -> str:
    return f"{point['accuracy_percent']:.2f}"


def bound(adam: dict) -> float:
    """The seconds up to which Adam was looked at."""
    return adam["curve"][-1][0]


def conclusion_of(rows: Sequence[dict]) -> str:
    """How many networks are ahead of Adam, by how much time, and as what start of training."""
    lines = []
    scarce = [row for row in rows if "end" in row["adam"]]
    timed = [row for row in rows if "end" not in row["adam"]]
    whole = [row for row in rows if "epoch" in row["adam"]]
    if timed:
        times = [bound(row["adam"]) if (t := row["adam"]["matched"]) is None else t for row in timed]
        ratio = geometric_mean(each / row["seconds"] for each, row in zip(times, timed, strict=True))
        never = sum(row["adam"]["matched"] is None for row in timed)
        lines += [
            f"Ahead of Adam at equal seconds: {ahead(timed, 'equal_seconds')}",
            f"Seconds that Adam needs to match / seconds of writing: {ratio:.2f} in the geometric mean "
            f"({never} of {len(timed)} unmatched and counted at the seconds looked at)",
        ]
    if scarce:
        lines.append(f"Ahead of Adam when it has stopped gaining, from few images: {ahead(scarce, 'end')}")
    if whole:
        written, random = (
            fmean(row["adam"][key]["accuracy_percent"] for row in whole)
            for key in ("first_steps_from_written", "first_steps")
        )
        lines += [
            f"At least an epoch of Adam, from all images: {ahead(whole, 'epoch')}",
            f"Mean after {FIRST_STEPS} steps of Adam: {written:.2f}% from written weights, {random:.2f}% from random "
            f"ones ({written - random:+.2f})",
        ]
    return "\n".join(lines)


def ahead(rows: Sequence[dict], point: str) -> str:
    """Of how many networks the mean of what is written is not behind Adam at this point."""
    count = sum(row["written"]["mean"] >= row["adam"][point]["accuracy_percent"] for row in rows)
    return f"{count} of {len(rows)}"
