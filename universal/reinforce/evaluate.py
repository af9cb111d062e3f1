"""What trial and error has gained: networks from unseen inits, written before and after.

    python -m universal.reinforce.evaluate --reward ternary --improved ternary.pth

prints their accuracy on the test images after rounding, that of TargetCNNs in full precision, and as a ceiling that of
networks trained with straight-through gradients, which know the rounding (Bengio et al. 2013, arXiv 1308.3432). With
--all it takes every network of `universal.evaluate`. All are written from the same random training images.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from scripting import (
    add_validation_option,
    mean_and_range,
    number,
    option_parser,
    run_script,
    summary_statistics,
    table,
)
from target_cnn import Dataset, score, train_with_adam
from universal.evaluation.clock import RATES, built
from universal.evaluation.from_data import MNIST_BY_NAME, DataSet, load_data_set
from universal.evaluation.networks import EVALUATED
from universal.model.synthesizer import SYNTHESIZER, load_synthesizer
from universal.reading.graph import Logits
from universal.reinforce.candidates import graph_of, written
from universal.reinforce.reinforcement import MAKER
from universal.reinforce.rewards import ROUNDINGS, score_after

NETWORKS = ("TargetCNN", "half width", "double width")
FULL = "full precision"
MOST_TRAINED = 3  # inits


def parse_options() -> argparse.Namespace:
    parser = option_parser("Evaluate what trial and error has gained.", seed=1000)
    parser.add_argument("--reward", choices=ROUNDINGS, required=True, help="how weights are rounded")
    parser.add_argument("--improved", type=Path, required=True, help="the synthesiser after trial and error")
    parser.add_argument("--synthesizer", type=Path, default=SYNTHESIZER, help="the one before")
    parser.add_argument("--inits", type=number(int, 1, 1000), default=20, help="unseen inits, from seeds SEED on")
    parser.add_argument(
        "--limit", type=number(int, 2, 60_000), default=5000, help="training images that networks are written from"
    )
    parser.add_argument(
        "--epochs", type=number(int, 0, 1000), default=1, help="of all training images, with straight-through gradients"
    )
    parser.add_argument("--all", action="store_true", help="every network of universal.evaluate")
    parser.add_argument("--data", default=MNIST_BY_NAME, help="mnist, or where labelled images lie")
    add_validation_option(parser)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    before = load_synthesizer(options.synthesizer, options.device)
    synthesizers = [before, load_synthesizer(options.improved, options.device, MAKER)]
    data = load_data_set(options.data, options.validation, options.device)
    known, rounding = data.known[: options.limit], ROUNDINGS[options.reward]
    seeds = range(options.seed, options.seed + options.inits)
    rows, means = [], []
    for name in tqdm(EVALUATED if options.all else NETWORKS, leave=False, disable=None):
        graph = graph_of(built(EVALUATED[name], options.seed, options.device), data.test)
        kinds = (FULL, options.reward) if name == "TargetCNN" else (options.reward,)
        columns = [
            accuracies((written(one, graph, seed, known) for seed in seeds), kinds, data.test) for one in synthesizers
        ]
        trained = straight_through(EVALUATED[name], seeds[:MOST_TRAINED], rounding, data, options.epochs)
        columns.append([trained if kind == options.reward else [] for kind in kinds])
        for weights, *found in zip(kinds, *columns, strict=True):
            means.append([weights, *map(fmean, found[:2])])
            cells = (mean_and_range(summary_statistics(values)) if values else "-" for values in found)
            rows.append([name, weights, *cells])
    print(
        f"{options.data}: accuracy on {len(data.test.labels):,} images (%), mean and range over {options.inits} unseen "
        f"inits, written from {len(known.labels):,} images; trained, straight-through, {min(MOST_TRAINED, len(seeds))} "
        f"in {options.epochs} epochs:"
    )
    print(table(["Network", "Weights", "Before", "After", "Straight-through"], rows))
    if options.all:
        before, after = (fmean(row[column] for row in means if row[0] != FULL) for column in (1, 2))
        print(f"Mean over the {len(EVALUATED)} networks, {options.reward}: {before:.2f} before, {after:.2f} after")


def accuracies(networks: Iterable[Logits | None], kinds: Sequence[str], data: Dataset) -> list[list[float]]:
    """In %, for each of the `kinds` of weights, after which they stay rounded. A network that breaks has none right."""
    found = [
        [0.0 if network is None else score_after(ROUNDINGS.get(kind), network, data).accuracy_percent for kind in kinds]
        for network in networks
    ]
    return [[row[place] for row in found] for place in range(len(kinds))]


class StraightThrough(nn.Module):
    """A parametrisation: weights are rounded, and their gradients are those of the rounded ones."""

    def __init__(self, rounding: Callable[[Tensor], Tensor]):
        super().__init__()
        self.rounding = rounding

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.rounding(weight) - weight).detach()


def straight_through(
    build: Callable[[], nn.Module], seeds: Sequence[int], rounding: Callable[[Tensor], Tensor], data: DataSet,
    epochs: int,
) -> list[float]:  # fmt: skip
    """The accuracies in % of networks that are trained rounded, at the rate that is best for the first on images held
    out; none of no epochs."""

    def trained(seed: int, rate: float) -> nn.Module:
        network = built(build, seed, data.known.images.device)
        for module in list(network.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dim() > 1:
                    parametrize.register_parametrization(module, name, StraightThrough(rounding))
        torch.manual_seed(seed)
        for _ in train_with_adam(network, data.known, epochs, rate, label=f"Straight-through at {rate:g}"):
            pass
        return network

    if not epochs:
        return []
    first, *others = seeds
    tried = {rate: trained(first, rate) for rate in RATES}
    rate = max(tried, key=lambda rate: score(tried[rate], data.held_out).accuracy_percent)
    networks = [tried[rate], *(trained(seed, rate) for seed in others)]
    return [score(network, data.test).accuracy_percent for network in networks]


if __name__ == "__main__":
    run_script(main)
