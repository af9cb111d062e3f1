"""What trial and error has gained: networks from unseen inits, written before and after.

    python -m universal.reinforce.evaluate --reward ternary --improved ternary.pth

prints their accuracy on the test images after rounding, that of TargetCNNs in full precision, and that of the trained
TargetCNNs of `train_target_model.py`, if there are any. With --all it takes every network of `universal.evaluate`. All
are written from the same random training images.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm

from scripting import (
    add_data_options,
    mean_and_range,
    number,
    option_parser,
    run_script,
    summary_statistics,
    table,
)
from target_cnn import CHECKPOINTS, Dataset, TargetCNN, find_runs, load_run, load_weights, scoring_data, training_data
from universal.evaluation.networks import EVALUATED
from universal.model.synthesizer import SYNTHESIZER, load_synthesizer
from universal.reading.graph import Logits
from universal.reinforce.candidates import graph_of, parted, written
from universal.reinforce.rewards import ROUNDINGS, score_after

NETWORKS = ("TargetCNN", "half width", "double width")
FULL = "full precision"


def parse_options() -> argparse.Namespace:
    parser = option_parser("Evaluate what trial and error has gained.", seed=1000)
    required = {"required": True, "default": argparse.SUPPRESS}
    parser.add_argument("--reward", choices=ROUNDINGS, **required, help="how weights are rounded (required)")
    parser.add_argument("--improved", type=Path, **required, help="the synthesiser after trial and error (required)")
    parser.add_argument("--synthesizer", type=Path, default=SYNTHESIZER, help="the one before")
    parser.add_argument("--inits", type=number(int, 1, 1000), default=20, help="unseen inits, from seeds SEED on")
    parser.add_argument(
        "--limit", type=number(int, 2, 60_000), default=1000, help="training images that networks are written from"
    )
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="trained TargetCNNs, if there are any")
    parser.add_argument("--all", action="store_true", help="every network of universal.evaluate")
    add_data_options(parser)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    synthesizers = [load_synthesizer(path, options.device) for path in (options.synthesizer, options.improved)]
    data = scoring_data(options.data, options.validation, options.device)
    known, _ = parted(training_data(options.data, options.validation, options.device), options.limit, options.seed)
    trained = trained_networks(options.checkpoints)
    seeds = range(options.seed, options.seed + options.inits)
    rows, means = [], []
    for name in tqdm(EVALUATED if options.all else NETWORKS, leave=False, disable=None):
        torch.manual_seed(options.seed)
        graph = graph_of(EVALUATED[name](), data)
        kinds = (FULL, options.reward) if name == "TargetCNN" else (options.reward,)
        found = [accuracies((written(one, graph, seed, known) for seed in seeds), kinds, data) for one in synthesizers]
        copies = (Logits(graph, load_weights(TargetCNN(), each).to(options.device)) for each in trained)
        found.append(accuracies(copies if name == "TargetCNN" else (), kinds, data))
        for weights, *columns in zip(kinds, *found, strict=True):
            means.append([weights, *map(fmean, columns[:2])])
            cells = (mean_and_range(summary_statistics(values)) if values else "-" for values in columns)
            rows.append([name, weights, *cells])
    print(f"Accuracy on {len(data.labels):,} images (%), mean and range over {options.inits} unseen inits:")
    print(table(["Network", "Weights", "Before", "After", "Trained"], rows))
    if options.all:
        before, after = (fmean(row[column] for row in means if row[0] != FULL) for column in (1, 2))
        print(f"Mean over the {len(EVALUATED)} networks, {options.reward}: {before:.2f} before, {after:.2f} after")


def trained_networks(checkpoints: Path) -> list[Tensor]:
    """The weights, flat, in the last recorded epoch of each run; none if there is no such directory."""
    return [load_run(run)[-1] for run in find_runs(checkpoints)] if checkpoints.exists() else []


def accuracies(networks: Iterable[Logits | None], kinds: Sequence[str], data: Dataset) -> list[list[float]]:
    """In %, for each of the `kinds` of weights, after which they stay rounded. A network that breaks has none right."""
    found = [
        [0.0 if network is None else score_after(ROUNDINGS.get(kind), network, data).accuracy_percent for kind in kinds]
        for network in networks
    ]
    return [[row[place] for row in found] for place in range(len(kinds))]


if __name__ == "__main__":
    run_script(main)
