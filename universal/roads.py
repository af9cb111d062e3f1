"""The four roads of the design document in one picture: any architecture, signatures, reward, any data.

    python -m universal.roads

writes random architectures of every family from a thousand of MNIST's images (section 4.1.1), holds the signature of
weights against their accuracy (4.1.2), rounds networks to three values before and after trial and error (4.1.3), and
writes networks for random data sets beside Adam (5); prints what it found and saves assets/roads.png. Some minutes.
"""

import argparse
import random
import sys
import time
import warnings
from pathlib import Path
from statistics import fmean

import torch
from torch import nn
from tqdm import tqdm

from scripting import MNIST, add_output_options, new_figure, number, option_parser, run_script, save_figure, table
from target_cnn import Dataset, TargetCNN, load_mnist, score, train_with_adam
from universal.data.splits import shuffled
from universal.evaluation.clock import RATES, built
from universal.evaluation.networks import EVALUATED, EVALUATED_SHAPES
from universal.model.synthesizer import SYNTHESIZER, GraphWeightSynthesizer, load_synthesizer
from universal.reinforce.candidates import graph_of, written
from universal.reinforce.reinforcement import MAKER
from universal.reinforce.rewards import ROUNDINGS, score_after
from universal.rules.looking import DoubtfulWeights
from universal.rules.synthesis import write
from universal.signatures.__main__ import judged
from universal.signatures.scorer import committed_scorer
from universal.training.architectures import FAMILIES, draw_architecture
from universal.training.tasks import HELD_OUT_KINDS, KINDS, draw_task

IMAGES, TEST = 1000, 1000  # that networks are written from, and that score them
TERNARY = SYNTHESIZER.with_name("ternary.pth")
STEPS = (1, 10, 30, 100, 300)  # of Adam, after which the signature of weights is looked at
ROUNDED = ("TargetCNN", "half width", "double width", "5 convolutions", "MLP 784-256-128-10")
SERIES = {  # colour and marker
    "random": ("#888888", "o"), "written": ("#0072B2", "o"), "trained": ("#D55E00", "s"),
    "trained on shuffled labels": ("#CC79A7", "^"), "rounded, before": ("#888888", "o"),
    "rounded, after": ("#0072B2", "o"), "Adam, same seconds": ("#D55E00", "s"),
}  # fmt: skip
Points = dict[str, list[tuple[float, float]]]  # by series; the first number is a place or a value on the lower axis


def parse_options() -> argparse.Namespace:
    parser = option_parser("Draw the four roads of the design document in one picture.", seed=0)
    parser.add_argument("--networks", type=number(int, 1, 1000), default=3, help="of each family, kind or width")
    parser.add_argument("--synthesizer", type=Path, default=SYNTHESIZER, help="file of the trained synthesiser")
    parser.add_argument("--ternary", type=Path, default=TERNARY, help="that after trial and error for ternary weights")
    add_output_options(parser, plot="assets/roads.png", results=None)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    synthesizer = load_synthesizer(options.synthesizer, options.device)
    improved = load_synthesizer(options.ternary, options.device, MAKER)
    digits, test = (shuffled(load_mnist(split, MNIST, options.device)) for split in ("train", "test"))
    known, test = digits[:IMAGES], test[:TEST]
    seeds = range(options.seed, options.seed + options.networks)
    roads = {
        "Any architecture (4.1.1): MNIST, from 1,000 images": architectures(synthesizer, known, test, seeds),
        "Signatures (4.1.2): of TargetCNN's weights, against their accuracy": signatures(
            synthesizer, digits, test, seeds
        ),
        "Reward (4.1.3): rounded to three values, searched for TargetCNNs alone": rewards(
            synthesizer, improved, known, test, seeds
        ),
        "Any data (5): random data sets, plain networks, 1,000 images": data_sets(synthesizer, seeds, options.device),
    }
    for title, (axis, points) in roads.items():
        print(f"\n{title}\n{table_of(axis, points)}", flush=True)
    plot(roads, options.plot)
    print(f"Plot saved to {options.plot}")


def percent(network: nn.Module, data: Dataset) -> float:
    return score(network, data).accuracy_percent


def write_quietly(network: nn.Module, data: Dataset, seed: int, synthesizer: GraphWeightSynthesizer) -> float:
    """Write a network; the seconds that it took. What is at chance is in the picture."""
    start = time.perf_counter()
    with warnings.catch_warnings(action="ignore", category=DoubtfulWeights):
        write(network, *data, seed=seed, limit=len(data.labels), synthesizer=synthesizer)
    return time.perf_counter() - start


def architectures(
    synthesizer: GraphWeightSynthesizer, known: Dataset, test: Dataset, seeds: range
) -> tuple[list[str], Points]:  # fmt: skip
    """Accuracies of random networks of every family, random and written."""
    points: Points = {"random": [], "written": []}
    for place, family in enumerate(tqdm(FAMILIES, "architectures", leave=False, disable=None)):
        for seed in seeds:
            torch.manual_seed(seed)
            drawn = random.Random(f"{family} {seed}")
            network = draw_architecture(drawn, refused=EVALUATED_SHAPES, families=[family]).to(test.images.device)
            points["random"].append((place, percent(network, test)))
            write_quietly(network, known, seed, synthesizer)
            points["written"].append((place, percent(network, test)))
    return list(FAMILIES), points


def signatures(
    synthesizer: GraphWeightSynthesizer, digits: Dataset, test: Dataset, seeds: range
) -> tuple[str, Points]:  # fmt: skip
    """How trained the weights of TargetCNNs look, in the mean over their matrices, against their accuracy."""
    points: Points = {"random": [], "written": [], "trained": [], "trained on shuffled labels": []}
    scorer = committed_scorer().to(test.images.device)

    def look(series: str, network: nn.Module) -> None:
        weights = {name: part for name, part in network.state_dict().items() if part.dim() > 1}
        rows = judged(weights, {}, scorer, test.images.device, outputs_first=True)
        points[series].append((percent(network, test), fmean(row["score"] for row in rows)))

    wrong = Dataset(digits.images, shuffled(digits, seed=1).labels)
    for seed in tqdm(seeds, "signatures", leave=False, disable=None):
        network = built(TargetCNN, seed, test.images.device)
        look("random", network)
        write_quietly(network, digits[:IMAGES], seed, synthesizer)
        look("written", network)
        for series, data in (("trained", digits), ("trained on shuffled labels", wrong)):
            network = built(TargetCNN, seed, test.images.device)
            for progress in train_with_adam(network, data, 1, pauses=STEPS):
                look(series, network)
                if progress.step >= STEPS[-1]:
                    break
    return "accuracy (%)", points


def rewards(
    synthesizer: GraphWeightSynthesizer, improved: GraphWeightSynthesizer, known: Dataset, test: Dataset, seeds: range
) -> tuple[list[str], Points]:  # fmt: skip
    """Accuracies of networks that are rounded to three values, before and after trial and error for TargetCNNs."""
    points: Points = {"rounded, before": [], "rounded, after": []}
    for place, name in enumerate(tqdm(ROUNDED, "rewards", leave=False, disable=None)):
        graph = graph_of(built(EVALUATED[name], seeds[0], test.images.device), test)
        for series, one in zip(points, (synthesizer, improved), strict=True):
            for seed in seeds:
                network = written(one, graph, seed, known)
                right = 0.0 if network is None else score_after(ROUNDINGS["ternary"], network, test).accuracy_percent
                points[series].append((place, right))
    return list(ROUNDED), points


def data_sets(
    synthesizer: GraphWeightSynthesizer, seeds: range, device: torch.device
) -> tuple[list[str], Points]:  # fmt: skip
    """Accuracies of random plain networks for random data sets, written, and of Adam in the same seconds: at the best
    of its rates on the same test images, which flatters it."""
    points: Points = {"Adam, same seconds": [], "written": []}
    kinds = KINDS | HELD_OUT_KINDS
    for place, kind in enumerate(tqdm(kinds, "data sets", leave=False, disable=None)):
        for seed in seeds:
            draw = random.Random(f"{kind} {seed}")
            task = draw_task(draw, IMAGES, TEST, {kind: kinds[kind]}).to(device)

            def build(seed=seed, task=task) -> nn.Module:
                drawn = random.Random(seed)
                return draw_architecture(drawn, task.train.images.shape[1:], task.classes, families=["ordinary"])

            network = built(build, seed, device)
            seconds = write_quietly(network, task.train, seed, synthesizer)
            points["written"].append((place, percent(network, task.test)))
            found = []
            for rate in RATES:
                network = built(build, seed, device)
                for progress in train_with_adam(network, task.train, sys.maxsize, rate, moments=[seconds]):
                    if progress.all_seconds >= seconds:
                        break
                found.append(percent(network, task.test))
            points["Adam, same seconds"].append((place, max(found)))
    return list(kinds), points


def table_of(axis: list[str] | str, points: Points) -> str:
    """The means of every series, for each name on the axis; or of both numbers, where the axis is one of numbers."""
    if isinstance(axis, str):
        means = (
            [name, *(f"{fmean(values):.3g}" for values in zip(*found, strict=True))] for name, found in points.items()
        )
        return table(["", axis, "score"], list(means))
    rows = [
        [name, *(f"{fmean(value for at, value in found if at == place):.1f}" for found in points.values())]
        for place, name in enumerate(axis)
    ]
    return table(["accuracy (%)", *points], rows)


def plot(roads: dict[str, tuple[list[str] | str, Points]], path: Path) -> None:
    """Save a panel for each road, with a point for every network."""
    figure = new_figure(16, 9)
    for panel, (title, (axis, points)) in zip(figure.subplots(2, 2).flat, roads.items(), strict=True):
        for index, (name, found) in enumerate(points.items()):
            places, values = zip(*found, strict=True)
            if not isinstance(axis, str):  # series beside each other
                places = [place + 0.3 * (index - (len(points) - 1) / 2) for place in places]
            colour, marker = SERIES[name]
            panel.scatter(places, values, color=colour, marker=marker, s=24, alpha=0.7, label=name)
        if isinstance(axis, str):
            panel.set(xlabel=axis, ylabel="score of the signature", ylim=(-0.03, 1.03))
        else:
            panel.set_xticks(range(len(axis)), axis, rotation=15, ha="right", fontsize=9)
            panel.set(ylabel="accuracy (%)", ylim=(0, 101))
        panel.set_title(title)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="lower right", framealpha=0.9)
    save_figure(figure, path)


if __name__ == "__main__":
    run_script(main)
