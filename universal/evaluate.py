"""Evaluate the universal synthesiser on networks that it was never trained on.

    python -m universal.evaluate
    python -m universal.evaluate --networks TargetCNN 'conv 4, 8, valid'
    python -m universal.evaluate --data mnist path/to/fashion-mnist --images 1000 all

Of the trained synthesiser it prints how networks written from unseen inits score on the test images, beside an epoch of
Adam at the best of three learning rates, the seconds of both, and what the networks are worth as the start of training;
and of TargetCNNs, how they train on, whether they differ from each other and from trained ones, and what an ensemble of
them gives. It saves the picture assets/universal.png and, as universal_results.json, everything it found.

With --data it writes the networks from data sets, in closed form, and prints for each number of images where Adam comes
to in the same seconds, on the same images and threads, and when it matches what was written. A run that was killed goes
on where it was, from its results.
"""

import argparse
import json
import sys
import time
from itertools import combinations, product
from operator import ge
from pathlib import Path
from statistics import fmean, median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripting import (
    MNIST,
    UserError,
    add_output_options,
    add_validation_option,
    mean_and_range,
    number,
    option_parser,
    refused_as,
    run_script,
    save_json,
    summary_statistics,
    table,
)
from target_cnn import Dataset, TargetCNN, fast_bf16, flatten_weights, score, scoring_data, training_data
from universal.evaluation.baselines import (
    FIRST_STEPS,
    HELD_OUT,
    RATES,
    at_best_rates,
    built,
    compare_starts,
    point_names,
    starts_of,
)
from universal.evaluation.from_data import conclusion_of, evaluate_from_data, load_data_set, table_of
from universal.evaluation.networks import EVALUATED
from universal.evaluation.pictures import plot_evaluation, plot_from_data
from universal.experiment.verdict import error_overlap, mean_pairwise_overlap
from universal.model.synthesizer import SYNTHESIZER, GraphWeightSynthesizer, load_synthesizer
from universal.reading.graph import in_fastest_layout

EPOCHS = 2  # of Adam, from TargetCNNs
MOST_VALIDATION = 42_000  # images, so that an epoch of Adam has its first steps


WITH_DATA = {"inits": 3, "plot": "assets/universal_data.png", "results": "universal_data_results.json"}
ALL = "all"  # as a number of images


def number_of_images(text: str) -> int | str:
    """An argparse type: how many images to write from."""
    return ALL if text == ALL else number(int, 20, 10**9)(text)


def parse_options() -> argparse.Namespace:
    parser = option_parser("Evaluate the universal synthesiser on networks that it was never trained on.", seed=1000)
    parser.add_argument("--synthesizer", type=Path, default=SYNTHESIZER, help="file of the trained synthesiser")
    parser.add_argument(
        "--networks", nargs="+", choices=EVALUATED, metavar="NAME", default=list(EVALUATED),
        help="networks to evaluate; of TargetCNN, how it trains on as well",
    )  # fmt: skip
    parser.add_argument("--inits", type=number(int, 2, 1000), default=5, help="unseen inits, from seeds SEED on")
    parser.add_argument(
        "--data", nargs="+", metavar="NAME",
        help="data sets to write the networks from, in closed form: mnist, or where labelled images lie; then the "
        f"defaults are {', '.join(f'--{name} {value}' for name, value in WITH_DATA.items())}",
    )  # fmt: skip
    parser.add_argument(
        "--images", nargs="+", type=number_of_images, metavar="N", default=[1000, 10_000, ALL],
        help="with --data: numbers of images to write from",
    )  # fmt: skip
    add_output_options(parser, plot="assets/universal.png", results="universal_results.json")
    add_validation_option(parser)
    options = parser.parse_args()
    if options.data:
        parser.set_defaults(**{name: type(getattr(options, name))(value) for name, value in WITH_DATA.items()})
        options = parser.parse_args()
    if options.validation > MOST_VALIDATION:
        parser.error(
            f"--validation {options.validation}: at most {MOST_VALIDATION}, so that Adam has {FIRST_STEPS} batches"
        )
    return options


def main() -> None:
    options = parse_options()
    print(f"Using device: {options.device}")
    seeds = range(options.seed, options.seed + options.inits)
    if options.data:
        evaluate_data_sets(options, seeds)
    else:
        evaluate_synthesizer(options, seeds)


def evaluate_data_sets(options: argparse.Namespace, seeds: range) -> None:
    """Write the networks from each data set and number of images, row by row, and hold them against Adam."""
    record = started(options)
    rows = {(row["data"], row["number"], row["network"]): row for row in record["rows"]}
    asked = []
    for name in options.data:
        data = load_data_set(name, options.validation, options.device)
        known, held_out, test = (len(part.labels) for part in data)
        print(f"\n{name}: {known:,} images to learn from, {held_out:,} on which the best of Adam's rates {RATES} is "
              f"chosen at each moment, and {test:,} that score", flush=True)  # fmt: skip
        for count in options.images:
            if count != ALL and count > known:
                print(f"\n{name}: {count:,} images left out: there are fewer")
                continue
            group = [(name, str(count), network) for network in options.networks]
            for key in [key for key in group if key not in rows]:
                try:
                    row = evaluate_from_data(key[-1], data, None if count == ALL else count, seeds)
                except ValueError as error:  # of images that nothing can be learned from
                    raise UserError(f"{name}: {error}") from error
                rows[key] = {"data": name, "number": str(count)} | row
                save_json(options.results, record | {"rows": list(rows.values())})
                print(f"{', '.join(key)}: {row['written']['mean']:.2f} %", file=sys.stderr, flush=True)
            found = [rows[key] for key in group]
            asked += found
            print(f"\n{name}, {found[0]['images']:,} images:\n{table_of(found)}\n{conclusion_of(found)}", flush=True)
    if len(asked) > len(options.networks):
        print(f"\nAll together:\n{conclusion_of(asked)}")
    print(f"Results saved to {options.results}")
    plot_from_data(asked, options.plot)
    print(f"Plot saved to {options.plot}")


def started(options: argparse.Namespace) -> dict:
    """The record of an evaluation on data sets: of one that was killed, if it had the same options, or an empty one."""
    settings = {
        "seed": options.seed, "inits": options.inits, "validation": options.validation, "device": str(options.device),
        "threads": torch.get_num_threads(), "bf16": fast_bf16(options.device),
    }  # fmt: skip
    if not options.results.exists():
        return {"settings": settings, "rows": []}
    line = f"{options.results}: is of another evaluation, or damaged: delete it or choose another --results"
    with refused_as(line):
        record = json.loads(options.results.read_text())
        if record["settings"] != settings:
            raise UserError(line)
        print(f"Going on from {len(record['rows'])} rows, saved in {options.results}")
        return record


def evaluate_synthesizer(options: argparse.Namespace, seeds: range) -> None:
    synthesizer = load_synthesizer(options.synthesizer, options.device)
    train = training_data(MNIST, options.validation, options.device)
    data = scoring_data(MNIST, options.validation, options.device)

    print(f"\nOne generative step from {options.inits} unseen inits, and Adam from one of them, at the rate of {RATES} "
          f"that is best on the last {HELD_OUT:,} training images:", flush=True)  # fmt: skip
    networks = []
    for name in options.networks:
        networks.append(evaluate_network(name, synthesizer, train, data, seeds))
        print(f"{name}: {networks[-1]['mean']:.2f} %", file=sys.stderr, flush=True)
    print(networks_table(networks))
    print(conclusion(networks), flush=True)

    record = {"synthesizer": options.synthesizer.name, "seed": options.seed, "inits": options.inits}
    record |= {"networks": networks, "target_cnn": None}
    if "TargetCNN" in options.networks:
        starts = starts_of(TargetCNN, synthesizer, data)
        training, wrong = compare_starts(starts, train, data, seeds, EPOCHS)
        print(f"\nTargetCNNs as the start of training, {options.inits} seeds:\n{training_table(training)}", flush=True)
        written = [starts["written"](seed) for seed in seeds]
        diversity = diversity_of(written, wrong["random"], data)
        print("\nWritten TargetCNNs beside trained ones:")
        for name, value in diversity.items():
            print(f"{name.replace('_', ' ')}: {value:.3f}")
        record["target_cnn"] = {"training": training, "diversity": diversity}
    save_json(options.results, record)
    print(f"Results saved to {options.results}")
    plot_evaluation(record, options.plot)
    print(f"Plot saved to {options.plot}")


def evaluate_network(
    name: str, synthesizer: GraphWeightSynthesizer, train: Dataset, data: Dataset, seeds: range
) -> dict:
    """Accuracies in percent of networks written from the inits of `seeds`, seconds to read and write one (the median),
    and where Adam comes to from the first: `at_best_rates`."""
    results, seconds = [], []
    for seed in seeds:
        network = built(EVALUATED[name], seed, data.images.device)
        begin = time.perf_counter()
        synthesizer.synthesize(network)
        seconds.append(time.perf_counter() - begin)
        results.append(score(in_fastest_layout(network, data.images[:2]), data).accuracy_percent)
    starts = starts_of(EVALUATED[name], synthesizer, data)
    (first_written,) = at_best_rates(starts["written"], train, data, seeds[0], points=1)
    first_random, epoch = at_best_rates(starts["random"], train, data, seeds[0], points=2)
    return {
        "name": name, **summary_statistics(results), "seconds": median(seconds), "epoch": epoch,
        "first_steps": {"written": first_written, "random": first_random},
    }  # fmt: skip


def networks_table(rows: list[dict]) -> str:
    """A row for each network: what is written, beside Adam."""
    header = [
        "Network", "Written (%)", "Seconds", "Epoch of Adam (%)", "Rate", "Seconds", f"{FIRST_STEPS} Steps, Written",
        f"{FIRST_STEPS} Steps, Random",
    ]  # fmt: skip
    cells = []
    for row in rows:
        epoch, starts = row["epoch"], row["first_steps"].values()
        cells.append([
            row["name"], mean_and_range(row), f"{row['seconds']:.2f}",
            f"{epoch['accuracy_percent']:.2f}", f"{epoch['learning_rate']:g}", f"{epoch['seconds']:.2f}",
            *(f"{start['accuracy_percent']:.2f}" for start in starts),
        ])  # fmt: skip
    return table(header, cells)


def conclusion(rows: list[dict]) -> str:
    """How many networks are written at least as well as Adam trains them in an epoch, and the means over all."""
    ahead = sum(row["mean"] >= row["epoch"]["accuracy_percent"] for row in rows)
    written, random = (
        fmean(row["first_steps"][start]["accuracy_percent"] for row in rows) for start in ("written", "random")
    )
    return (
        f"Written at least as well as an epoch of Adam: {ahead} of {len(rows)}\n"
        f"Mean after {FIRST_STEPS} steps of Adam: {written:.2f}% from written weights, {random:.2f}% from random ones"
    )


def training_table(rows: list[dict]) -> str:
    """The mean over seeds at each point of Adam's curve, from both starts, and how often the written one is ahead."""
    rates = {row["start"]: row["learning_rate"] for row in rows}
    header = ["Adam", *(f"{start.title()} Start, Rate {lr:g} (%)" for start, lr in rates.items()), "Written Not Behind"]
    curves = ([row["accuracy_percent"] for row in rows if row["start"] == start] for start in rates)
    cells = []
    for name, written, random in zip(
        point_names(EPOCHS + 1), *(zip(*each, strict=True) for each in curves), strict=True
    ):
        ahead = f"{sum(map(ge, written, random))} of {len(random)}"
        cells.append([name, f"{fmean(written):.2f}", f"{fmean(random):.2f}", ahead])
    return table(header, cells)


@torch.inference_mode()
def diversity_of(written: list[nn.Module], trained_wrong: list[Tensor], data: Dataset) -> dict[str, float]:
    """How far written networks differ from each other and from trained ones, by what these get wrong, [N] bool; and
    what the mean of their probabilities classifies."""
    probabilities = [
        torch.cat([network(images).softmax(1) for images in data.images.split(250)]) for network in written
    ]
    wrong = [(each.argmax(1) != data.labels).cpu() for each in probabilities]
    accuracies = [100 * (1 - each.double().mean().item()) for each in wrong]
    together = sum(probabilities).argmax(1) == data.labels
    weights = combinations(map(flatten_weights, written), 2)
    return {
        "error_overlap_of_written_with_each_other": mean_pairwise_overlap(wrong),
        "error_overlap_of_trained_with_each_other": mean_pairwise_overlap(trained_wrong),
        "largest_of_written_with_trained": max(error_overlap(*pair) for pair in product(wrong, trained_wrong)),
        "largest_of_trained_with_each_other": max(error_overlap(*pair) for pair in combinations(trained_wrong, 2)),
        "mean_cosine_of_written_weights": fmean(F.cosine_similarity(*pair, dim=0).item() for pair in weights),
        "ensemble_accuracy_percent": 100 * together.double().mean().item(),
        "best_of_them_accuracy_percent": max(accuracies),
    }


if __name__ == "__main__":
    run_script(main)
