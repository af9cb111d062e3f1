"""Trial and error beside other methods with as many evaluations of the reward, and beside gradients.

    python -m universal.reinforce.compare --reward ternary

prints, for TargetCNNs, what each method makes of the same number of evaluations, on the test images. It saves the
picture assets/trial_and_error.png and everything it found as trial_and_error.json.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scripting import (
    add_data_options,
    add_output_options,
    new_figure,
    number,
    option_parser,
    run_script,
    save_figure,
    save_json,
    table,
)
from target_cnn import (
    Dataset,
    Score,
    TargetCNN,
    flatten_weights,
    load_weights,
    scoring_data,
    training_data,
)
from universal.model.synthesizer import GraphWeightSynthesizer, load_synthesizer, random_weights
from universal.reading.graph import Logits
from universal.reinforce.reinforcement import Reinforcement, add_search_options
from universal.reinforce.rewards import REWARDS, ROUNDINGS, score_after
from universal.reinforce.search import WeightSearch
from universal.reinforce.trials import graph_of, with_tuning, written

CURVE_INITS, CURVE_POINTS, CURVE_IMAGES = 3, 20, 1000  # of the curves, on training images that nothing was tuned on
PAIRED, STEP, DEVIATION = 100, 0.1, 0.3  # candidates, learning rate, relative deviation of `evolve`
UNTRAINED = {"probes": 100, "convolution_probes": 64, "dimension": 32, "concepts": 32, "rank": 16, "hidden": 64}
FIRST_INIT = 10_000  # seed of the inits that are learned from

Networks = Callable[[Iterable[int]], Iterable[Logits]]  # what is made from the inits of these seeds


def parse_options() -> argparse.Namespace:
    parser = option_parser("Compare trial and error with other methods.", seed=0)
    add_search_options(parser)
    parser.add_argument("--inits", type=number(int, 1, 1000), default=20, help="unseen inits, from seed 1000 on")
    add_output_options(parser, plot="assets/trial_and_error.png", results="trial_and_error.json")
    add_data_options(parser)
    parser.set_defaults(model="target_cnn:TargetCNN", evaluations=2560)
    options = parser.parse_args()
    if options.reward not in ROUNDINGS:
        parser.error(f"--reward {options.reward}: give one of {', '.join(ROUNDINGS)}")
    return options


def main() -> None:
    options = parse_options()
    comparison = Comparison(options)
    print(f"TargetCNN rounded to {options.reward}, from {options.evaluations} evaluations:", flush=True)
    methods = [comparison.run(name) for name in METHODS]
    print(table(["Method", "Evaluations", "Minutes", "Mean (%)", "Minimum", "Maximum"], [
        [row["method"], str(row["evaluations"][-1]), f"{row['seconds'] / 60:.1f}",
         *(f"{of(row['accuracy_percent']):.2f}" for of in (fmean, min, max))] for row in methods
    ]), flush=True)  # fmt: skip
    plot(methods, options)
    print(f"\nPicture saved to {options.plot}")
    save_json(options.results, {"reward": options.reward, "seed": options.seed, "methods": methods})
    print(f"Record saved to {options.results}")


class Point(NamedTuple):
    """Where a method has come to: after so many evaluations, `networks(seeds)` are what it makes from unseen inits."""

    evaluations: int
    networks: Networks
    rounded: bool = True  # whether they are measured after rounding


class Comparison:
    """The data, the rounding and the TargetCNN of a comparison."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.rounding = options, ROUNDINGS[options.reward]
        train = training_data(options.data, max(options.validation, CURVE_IMAGES), options.device)
        self.train = train._replace(images=train.images.to(memory_format=torch.channels_last))
        self.held_out = scoring_data(options.data, CURVE_IMAGES, options.device)
        self.test = scoring_data(options.data, options.validation, options.device)
        self.unseen = range(1000, 1000 + options.inits)
        torch.manual_seed(options.seed)
        self.graph = graph_of(TargetCNN(), self.train)

    def batch(self, seed: int) -> Dataset:
        """Training images for one evaluation, or for those that must be comparable."""
        torch.manual_seed(seed)
        return self.train[torch.randint(len(self.train.labels), (self.options.images,)).to(self.options.device)]

    def write(self, synthesizer: GraphWeightSynthesizer) -> Networks:
        """What a synthesiser writes from the inits of given seeds, leaving out what breaks."""
        return lambda seeds: filter(None, (written(synthesizer, self.graph, seed) for seed in seeds))

    def measure(self, networks: Iterable[Logits], data: Dataset, rounded: bool) -> list[Score]:
        """The scores of networks, after rounding if they are to be `rounded`."""
        return [score_after(self.rounding if rounded else None, network, data) for network in networks]

    def run(self, name: str) -> dict:
        """Run a method, and measure it on the way and at its end."""
        start, measuring, curve = time.perf_counter(), 0.0, []
        torch.manual_seed(self.options.seed)
        for point in METHODS[name](self):
            pause = time.perf_counter()
            inits = range(2000, 2000 + CURVE_INITS)
            scores = self.measure(point.networks(inits), self.held_out, point.rounded)
            if scores:  # else all of them broke
                accuracy = fmean(one.accuracy_percent for one in scores)
                curve.append((point.evaluations, 100 - accuracy, fmean(one.cross_entropy for one in scores)))
                print(f"{name}: {point.evaluations} evaluations, {accuracy:.2f}% held out", flush=True)
            measuring += time.perf_counter() - pause
        seconds = time.perf_counter() - start - measuring
        scores = self.measure(point.networks(self.unseen), self.test, point.rounded)
        accuracies = [one.accuracy_percent for one in scores] or [0.0]  # if all broke, they classify nothing
        evaluations, errors, entropies = map(list, zip(*curve, strict=True))
        return {
            "method": name, "seconds": seconds, "evaluations": evaluations, "held_out_error_percent": errors,
            "held_out_cross_entropy": entropies, "accuracy_percent": accuracies,
        }  # fmt: skip

    def every(self, count: int) -> int:
        """How many of `count` steps lie between two points of a curve."""
        return max(1, count // CURVE_POINTS)


# ---- methods ---------------------------------------------------------------------------------------------------------


def trial_and_error(comparison: Comparison) -> Iterator[Point]:
    """The search of `python -m universal.reinforce`, on TargetCNNs."""
    options = comparison.options
    held_out = argparse.Namespace(**vars(options) | {"validation": max(options.validation, CURVE_IMAGES)})
    reinforcement = Reinforcement(held_out, load_synthesizer(options.synthesizer))
    while True:
        yield Point(reinforcement.evaluations, comparison.write(reinforcement.result()))
        if reinforcement.step == reinforcement.steps:
            return
        reinforcement.run(min(reinforcement.step + comparison.every(reinforcement.steps), reinforcement.steps))


def best_of_inits(comparison: Comparison) -> Iterator[Point]:
    """Random search: of networks written from so many inits, the one of the highest reward on the same images."""
    options, images, best_reward = comparison.options, comparison.batch(0), -float("inf")
    synthesizer = load_synthesizer(options.synthesizer, options.device)
    best: list[Logits] = []
    for count in range(1, options.evaluations + 1):
        for network in comparison.write(synthesizer)([FIRST_INIT + count]):
            reward = REWARDS[options.reward].of(network, images)
            if reward > best_reward:
                best, best_reward = [network], reward
        if count == 1 or count % comparison.every(options.evaluations) == 0 or count == options.evaluations:
            yield Point(count, lambda seeds, best=best: best)


def evolved_weights(comparison: Comparison) -> Iterator[Point]:
    """An evolution strategy on the weights of one TargetCNN, from a random init."""
    network = TargetCNN().to(comparison.options.device, memory_format=torch.channels_last)
    return evolve(comparison, network, comparison.options.reward, lambda seeds: [Logits(comparison.graph, network)])


def from_nothing(comparison: Comparison) -> Iterator[Point]:
    """The same strategy on all parameters of a small untrained synthesiser, with accuracy as its only reward."""
    synthesizer = GraphWeightSynthesizer(**UNTRAINED).to(comparison.options.device).eval()
    return evolve(comparison, synthesizer, "accuracy", comparison.write(synthesizer), rounded=False)


def evolve(
    comparison: Comparison, module: torch.nn.Module, reward: str, networks: Networks, rounded: bool = True
) -> Iterator[Point]:
    """Evolve the parameters of `module` for the reward of the networks that they make from unseen inits."""
    options = comparison.options
    candidates = min(PAIRED, options.evaluations // 2 * 2)
    sizes = [parameter.detach().square().mean().sqrt().clamp(min=0.01) for parameter in module.parameters()]
    deviations = [DEVIATION * size.expand(p.numel()) for size, p in zip(sizes, module.parameters(), strict=True)]
    search = WeightSearch(flatten_weights(module).cpu(), torch.cat(deviations).cpu(), candidates, STEP, options.seed)
    generations = options.evaluations // candidates
    for generation in range(generations + 1):
        load_weights(module, search.mean.to(options.device))
        if generation % comparison.every(generations) == 0 or generation == generations:
            yield Point(generation * candidates, networks, rounded)
        if generation == generations:
            return
        images, rewards = comparison.batch(generation), []
        with torch.inference_mode():
            for weights in search.ask():
                load_weights(module, weights.to(options.device))
                made = list(networks([FIRST_INIT + generation]))
                rewards.append([REWARDS[reward].of(made[0], images) if made else -float("inf")])
        search.tell(torch.tensor(rewards))


def straight_through(comparison: Comparison) -> Iterator[Point]:
    """What cannot be had by trial and error: all parameters, by gradients that pass the rounding as if it were not
    there (Bengio et al. 2013, arXiv 1308.3432). An evaluation is a network, forwards and backwards."""
    options, graph = comparison.options, comparison.graph
    synthesizer = with_tuning(load_synthesizer(options.synthesizer)).to(options.device)
    adam = torch.optim.AdamW(synthesizer.parameters(), lr=3e-4, betas=(0.95, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        adam, 3e-4, total_steps=options.evaluations + 1, pct_start=0.1, cycle_momentum=False
    )
    for step in range(options.evaluations + 1):
        if step == options.evaluations or step % comparison.every(options.evaluations) == 0:
            yield Point(step, comparison.write(synthesizer))
        weights = synthesizer(graph, random_weights(graph, FIRST_INIT + step))
        images, labels = comparison.batch(step)
        rounded = {name: rounded_straight_through(weight, comparison.rounding) for name, weight in weights.items()}
        adam.zero_grad()
        losses = [F.cross_entropy(graph.run(images, each), labels) for each in (weights, rounded)]
        (sum(losses) / 2).backward()  # the reward, as it is built in
        torch.nn.utils.clip_grad_norm_(synthesizer.parameters(), 1.0)
        adam.step()
        schedule.step()


def rounded_straight_through(weight: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """`weight` rounded, if it has more than one dimension, with the gradient of `weight` itself."""
    return weight + (rounding(weight) - weight).detach() if weight.dim() > 1 else weight


METHODS: dict[str, Callable[[Comparison], Iterator[Point]]] = {
    "trial and error": trial_and_error,
    "best of N inits": best_of_inits,
    "evolution of one network's weights": evolved_weights,
    "from nothing, full precision": from_nothing,
    "gradients, straight through": straight_through,
}
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#CC79A7", "#555555")


def plot(methods: list[dict], options: argparse.Namespace) -> None:
    """Save two panels over evaluations: minus the cross-entropy, which is rewarded, and the error."""
    figure = new_figure(12, 4.8)
    panels = figure.subplots(1, 2)
    for row, colour in zip(methods, COLOURS, strict=True):
        for panel, key in zip(panels, ("held_out_cross_entropy", "held_out_error_percent"), strict=True):
            values = [-value for value in row[key]] if key == "held_out_cross_entropy" else row[key]
            panel.plot(row["evaluations"], values, color=colour, label=row["method"])
    panels[0].set(xlabel="Evaluations of the reward", ylabel="Minus cross-entropy (nats per image)", yscale="symlog")
    panels[1].set(xlabel="Evaluations of the reward", ylabel="Error on held-out images (%)", yscale="log")
    panels[0].set_title(f"TargetCNNs, {options.reward}, on held-out images")
    panels[1].set_title("Their error")
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods))
    save_figure(figure, options.plot)


if __name__ == "__main__":
    run_script(main)
