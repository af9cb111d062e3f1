"""Evaluate the universal synthesiser on networks that it was never trained on.

    python -m universal.evaluate

prints how networks written from unseen inits score on the test images, beside one epoch of Adam, and what they are
worth as the start of training; and of TargetCNNs, how they score over several generative steps, whether they differ
from each other and from trained ones, and what an ensemble of them gives. It saves the picture assets/universal.png
and, as universal_results.json, everything it found. With --epochs 0 nothing is trained, and what Adam reaches from
random weights is taken from the record universal/results.json, which

    python -m universal.evaluate --results universal/results.json

saves.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_model import rollout
from scripting import (
    UserError,
    add_data_options,
    add_output_options,
    number,
    option_parser,
    run_script,
    save_file,
    save_json,
    table,
)
from target_cnn import (
    Dataset,
    Score,
    TargetCNN,
    fast_bf16,
    flatten_weights,
    score,
    score_weights,
    scoring_data,
    train_epoch,
    training_data,
)
from universal.evaluation.networks import EVALUATED
from universal.experiment.generators import FlatSynthesizer
from universal.experiment.verdict import error_overlap, mean_pairwise_overlap
from universal.model.synthesizer import SYNTHESIZER, GraphWeightSynthesizer, load_synthesizer
from universal.reading.graph import ComputationGraph, in_fastest_layout

STARTS = {"generated": "#0072B2", "random": "#D55E00"}  # colours of the two starts of training
BATCH_SIZE, FIRST_STEPS = 128, 100  # of Adam
RECORDED = Path(__file__).resolve().parent / "results.json"


def parse_options() -> argparse.Namespace:
    parser = option_parser("Evaluate the universal synthesiser on networks that it was never trained on.", seed=1000)
    parser.add_argument("--synthesizer", type=Path, default=SYNTHESIZER, help="file of the trained synthesiser")
    parser.add_argument("--inits", type=number(int, 2, 1000), default=5, help="unseen inits, from seeds SEED on")
    parser.add_argument("--steps", type=number(int, 1, 100), default=6, help="generative steps in a row")
    parser.add_argument(
        "--epochs", type=number(int, 0, 100), default=2, help="epochs of Adam from each TargetCNN; 0 to train none"
    )
    parser.add_argument("--generated-lr", type=number(float, 1e-9, 1e3), default=1e-4, help="Adam's from those written")
    parser.add_argument("--random-lr", type=number(float, 1e-9, 1e3), default=1e-3, help="Adam's from random weights")
    add_output_options(parser, plot="assets/universal.png", results="universal_results.json")
    add_data_options(parser)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    print(f"Using device: {options.device}")
    synthesizer = load_synthesizer(options.synthesizer, options.device)
    data = scoring_data(options.data, options.validation, options.device)
    train = training_data(options.data, options.validation, options.device)
    seeds = range(options.seed, options.seed + options.inits)
    milliseconds = writing_time(synthesizer)
    print(f"Writing a TargetCNN takes {milliseconds:.0f} ms, tracing not counted")

    print(f"\nOne generative step from {options.inits} unseen inits, and Adam from one of them:", flush=True)
    networks, wrong = [], {}
    recorded = {} if options.epochs or options.validation else recorded_adam()  # which is of the test images
    for name, build in EVALUATED.items():
        results = [score(generate(synthesizer, build, seed), data) for seed in seeds]
        adam = adam_from_both_starts(synthesizer, build, train, data, options) if options.epochs else recorded.get(name)
        networks.append(summary(name, results) | {"adam": adam})
        wrong[name] = [result.wrong for result in results]
        print(f"{name}: {networks[-1]['mean']:.2f} %", file=sys.stderr, flush=True)
    print(networks_table(networks), flush=True)
    starts = mean_after_first_steps(networks)
    if starts is not None:
        print(f"Mean after {FIRST_STEPS} steps of Adam: {starts['generated']:.2f}% from generated weights, "
              f"{starts['random']:.2f}% from random ones")  # fmt: skip

    print(f"\n{options.steps} generative steps of TargetCNN from {options.inits} unseen inits:", flush=True)
    steps = [summary(f"step {step}", row) for step, row in enumerate(step_scores(synthesizer, data, options), start=1)]
    print(steps_table(steps), flush=True)

    training, trained = compare_starts(synthesizer, train, data, options) if options.epochs else ([], [])
    if training:
        print(
            f"\nAdam from generated TargetCNNs (learning rate {options.generated_lr:g}) and from random ones "
            f"({options.random_lr:g}), {options.inits} seeds:\n{training_table(training)}",
            flush=True,
        )
    novelty = {
        "generated_with_each_other": mean_pairwise_overlap(wrong["TargetCNN"]),
        "trained_with_each_other": mean_pairwise_overlap(trained),
        "largest_generated_with_trained": max(
            (error_overlap(one, other) for one in wrong["TargetCNN"] for other in trained), default=None
        ),
        "largest_trained_with_each_other": max(
            (error_overlap(one, other) for index, one in enumerate(trained) for other in trained[:index]), default=None
        ),
        "mean_cosine_of_weights": mean_cosine([generate(synthesizer, TargetCNN, seed) for seed in seeds]),
    }
    ensemble = ensemble_accuracy(synthesizer, data, list(seeds))
    best = networks[0]["maximum"]
    print("\nGenerated TargetCNNs:")
    for name, value in novelty.items():
        print(f"{name.replace('_', ' ')}: {'--' if value is None else f'{value:.3f}'}")
    print(f"ensemble of {options.inits}: Accuracy = {ensemble:.2f}%, the best of them alone: {best:.2f}%")

    record = {
        "synthesizer": options.synthesizer.name, "seed": options.seed, "inits": options.inits,
        "milliseconds_to_write": milliseconds, "networks": networks, "first_steps": starts, "steps": steps,
        "training": training, "error_overlap": novelty,
        "ensemble": {"networks": options.inits, "accuracy_percent": ensemble, "best_single_percent": best},
    }  # fmt: skip
    save_json(options.results, record)
    print(f"Results saved to {options.results}")
    plot(record, options.plot)
    print(f"Plot saved to {options.plot}")


def adam_from_both_starts(
    synthesizer: GraphWeightSynthesizer, build: Callable, train: Dataset, data: Dataset, options: argparse.Namespace
) -> dict[str, float]:
    """Accuracies in percent after an epoch of Adam, and after its first steps from generated and random weights."""
    accuracies = {}
    for start, lr in (("generated", options.generated_lr), ("random", options.random_lr)):
        torch.manual_seed(options.seed)
        network = (
            generate(synthesizer, build, options.seed)
            if start == "generated"
            else in_fastest_layout(build().to(options.device), train.images[:2])
        )
        adam = torch.optim.Adam(network.parameters(), lr=lr, fused=True)
        torch.manual_seed(options.seed)
        order = torch.randperm(len(train.labels)).to(options.device)
        parts = order[: FIRST_STEPS * BATCH_SIZE], order[FIRST_STEPS * BATCH_SIZE :]
        use_bf16 = fast_bf16(options.device)
        train_epoch(network, adam, train[parts[0]], BATCH_SIZE, use_bf16, f"{start} start")
        accuracies[start] = score(network, data).accuracy_percent
    train_epoch(network, adam, train[parts[1]], BATCH_SIZE, use_bf16, "rest of the epoch")
    return {
        "epoch_percent": score(network, data).accuracy_percent,
        "generated_first_steps_percent": accuracies["generated"],
        "random_first_steps_percent": accuracies["random"],
    }


def recorded_adam() -> dict[str, dict]:
    """What Adam reaches from random weights of each network, by name, as the committed record has it.

    Raises UserError if that is missing or damaged.
    """
    try:
        networks = json.loads(RECORDED.read_text())["networks"]
        return {network["name"]: network["adam"] | {"generated_first_steps_percent": None} for network in networks}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{RECORDED}: is missing or damaged: restore it from git, or leave out --epochs 0") from error


def mean_after_first_steps(networks: list[dict]) -> dict[str, float] | None:
    """The mean over all networks of the accuracies after the first steps of Adam from both starts, in percent.

    None if any is not known.
    """
    if any(network["adam"] is None or None in network["adam"].values() for network in networks):
        return None
    return {start: fmean(network["adam"][f"{start}_first_steps_percent"] for network in networks) for start in STARTS}


def generate(synthesizer: GraphWeightSynthesizer, build, seed: int) -> nn.Module:
    """A network written from the random init of `seed`."""
    torch.manual_seed(seed)
    network = build().to(synthesizer.task.probes.device)
    return in_fastest_layout(synthesizer.synthesize(network), synthesizer.task.probes[:2])


@torch.inference_mode()
def writing_time(synthesizer: GraphWeightSynthesizer, repetitions: int = 20) -> float:
    """Median milliseconds to write the weights of a TargetCNN."""
    graph = ComputationGraph(TargetCNN().to(synthesizer.task.probes.device))
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        next(iter(synthesizer(graph, graph.weights()).values())).sum().item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 1000 * sorted(seconds)[repetitions // 2]


def step_scores(synthesizer: GraphWeightSynthesizer, data: Dataset, options: argparse.Namespace) -> list[list[Score]]:
    """For each step, the scores of the TargetCNNs of `--inits` inits."""
    inits = []
    for seed in range(options.seed, options.seed + options.inits):
        torch.manual_seed(seed)
        inits.append(flatten_weights(TargetCNN().to(options.device)))
    states = rollout(FlatSynthesizer(synthesizer, TargetCNN()), torch.stack(inits), options.steps)
    return [score_weights(states_of_step, data) for states_of_step in states[1:]]


def summary(name: str, results: list[Score]) -> dict:
    """Mean, standard deviation, minimum and maximum of accuracies in percent."""
    accuracies = torch.tensor([result.accuracy_percent for result in results], dtype=torch.float64)
    return {
        "name": name, "mean": accuracies.mean().item(),
        "standard_deviation": accuracies.std().item() if len(results) > 1 else 0.0,
        "minimum": accuracies.min().item(), "maximum": accuracies.max().item(),
    }  # fmt: skip


def networks_table(rows: list[dict]) -> str:
    """A row for each network, with what Adam reaches, as far as that is known."""
    header = [
        "Generated Network", "Mean (%)", "Min", "Max", "Epoch of Adam (%)", f"Adam {FIRST_STEPS} Steps, Generated",
        f"Adam {FIRST_STEPS} Steps, Random",
    ]  # fmt: skip
    keys = ("epoch_percent", "generated_first_steps_percent", "random_first_steps_percent")
    adam = [[(row["adam"] or {}).get(key) for key in keys] for row in rows]
    return table(header, [
        [row["name"], *(f"{row[key]:.2f}" for key in ("mean", "minimum", "maximum")),
         *("-" if value is None else f"{value:.2f}" for value in values)]
        for row, values in zip(rows, adam, strict=True)
    ])  # fmt: skip


def steps_table(rows: list[dict]) -> str:
    header = ["Generative Step", "Mean Accuracy (%)", "Standard Deviation", "Minimum (%)", "Maximum (%)"]
    keys = ("mean", "standard_deviation", "minimum", "maximum")
    return table(header, [[row["name"], *(f"{row[key]:.2f}" for key in keys)] for row in rows])


def mean_cosine(networks: list[nn.Module]) -> float:
    """Mean cosine between the weights of every two networks."""
    weights = F.normalize(torch.stack([flatten_weights(network) for network in networks]), dim=1)
    cosines = weights @ weights.T
    count = len(networks)
    return ((cosines.sum() - cosines.trace()) / (count * (count - 1))).item()


@torch.inference_mode()
def ensemble_accuracy(synthesizer: GraphWeightSynthesizer, data: Dataset, seeds: list[int]) -> float:
    """Accuracy, in percent, of the mean of the probabilities of several TargetCNNs."""
    probabilities = 0
    for seed in seeds:
        network = generate(synthesizer, TargetCNN, seed).eval()
        probabilities += torch.cat([network(images).softmax(1) for images in data.images.split(250)])
    return 100 * (probabilities.argmax(1) == data.labels).double().mean().item()


def compare_starts(
    synthesizer: GraphWeightSynthesizer, train: Dataset, data: Dataset, options: argparse.Namespace
) -> tuple[list[dict], list[Tensor]]:
    """Accuracies in percent over epochs of Adam from both starts; and what the trained networks get wrong.

    Both starts of a seed see the same images in the same order, at the learning rate that suits each: trained weights
    are not to be moved as far as random ones.
    """
    rates = {"generated": options.generated_lr, "random": options.random_lr}
    rows, trained = [], []
    for seed in range(options.seed, options.seed + options.inits):
        for start in STARTS:
            torch.manual_seed(seed)
            network = generate(synthesizer, TargetCNN, seed) if start == "generated" else TargetCNN()
            network = network.to(options.device, memory_format=torch.channels_last)
            adam = torch.optim.Adam(network.parameters(), lr=rates[start], fused=True)
            torch.manual_seed(seed)
            results = [score(network, data)]
            for epoch in range(1, options.epochs + 1):
                train_epoch(
                    network, adam, train, BATCH_SIZE, fast_bf16(options.device), f"{start} start {seed}, epoch {epoch}"
                )
                results.append(score(network, data))
            accuracies = [result.accuracy_percent for result in results]
            rows.append({"seed": seed, "start": start, "learning_rate": rates[start], "accuracy_percent": accuracies})
            if start == "random":
                trained.append(results[-1].wrong)
    return rows, trained


def training_table(training: list[dict]) -> str:
    """Mean accuracy after each epoch from both starts, and how often the generated start is ahead or level."""
    curves = {
        start: torch.tensor([row["accuracy_percent"] for row in training if row["start"] == start]) for start in STARTS
    }
    rows = [
        [str(epoch), *(f"{curve[:, epoch].mean():.2f}" for curve in curves.values()),
         f"{(curves['generated'][:, epoch] >= curves['random'][:, epoch]).sum()} of {len(curves['random'])}"]
        for epoch in range(curves["random"].shape[1])
    ]  # fmt: skip
    return table(["Epochs of Adam", "Generated Start (%)", "Random Start (%)", "Generated Not Behind"], rows)


def plot(record: dict, path: Path) -> None:
    """Save three panels: accuracies of the written networks, over steps, and as starts of training."""
    import matplotlib  # imported here: the tables do not need it

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    networks = record["networks"]
    figure = plt.figure(figsize=(15, 1.5 + 0.27 * len(networks)), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1.7, 1])
    left, middle, right = (figure.add_subplot(place) for place in (grid[:, 0], grid[0, 1], grid[1, 1]))
    rows = range(len(networks))
    means = [network["mean"] for network in networks]
    left.hlines(
        rows, [n["minimum"] for n in networks], [n["maximum"] for n in networks], color="#0072B2", alpha=0.4, lw=5
    )
    left.plot(means, rows, "o", color="#0072B2", markersize=5, label="written in one step (band: range)")
    adam = [(row, network["adam"]["epoch_percent"]) for row, network in enumerate(networks) if network["adam"]]
    left.plot([value for _, value in adam], [row for row, _ in adam], "|", color="#D55E00", markersize=12,
              markeredgewidth=2.5, label="one epoch of Adam")  # fmt: skip
    left.set_yticks(rows, [network["name"] for network in networks])
    left.invert_yaxis()
    left.set_xlim(right=100)
    left.set(title=f"Networks never trained on, {record['inits']} unseen inits", xlabel="accuracy (%)")
    left.legend(loc="lower left")

    steps = record["steps"]
    numbers = range(1, len(steps) + 1)
    middle.fill_between(
        numbers, [s["minimum"] for s in steps], [s["maximum"] for s in steps], color="#0072B2", alpha=0.2, label="range"
    )
    middle.plot(numbers, [s["mean"] for s in steps], "o-", color="#0072B2", label="mean")
    middle.set(title="TargetCNN over steps", xlabel="generative step", ylabel="accuracy (%)")
    middle.legend(loc="best")

    for row in record["training"]:
        shown = row["accuracy_percent"]
        first = 0 if row["start"] == "generated" else 1  # a random init, near 10 %, would flatten all the rest
        label = f"{row['start']} start" if row["seed"] == record["seed"] else None
        right.plot(range(first, len(shown)), shown[first:], "o-", color=STARTS[row["start"]], alpha=0.6, label=label)
    if record["training"]:
        right.set(title="Training TargetCNN with Adam", xlabel="epochs", ylabel="accuracy (%)")
        right.legend(loc="lower right")
    else:
        right.set_axis_off()
    for panel in (middle, right):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in (left, middle, right):
        panel.grid(alpha=0.3)
    save_file(path, lambda temporary: figure.savefig(temporary, dpi=150))
    plt.close(figure)


if __name__ == "__main__":
    run_script(main)
