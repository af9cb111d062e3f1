"""Does a weight generator generalise, or does it recall what it was trained on?

The measures follow Zeng et al., "Generative Modeling of Weights: Generalization or Memorization?" (arXiv 2506.07998):
every generated network is held against its nearest recorded checkpoint, in weights and in errors, and beside it stand
the same figures for trivial methods. All functions know networks as flat TargetCNN weights, [421642], and models as
(weights [batch, 421642], steps [batch]) -> next weights.
"""

import math
from statistics import fmean
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from scripting import summary_statistics, table
from target_cnn import Dataset, Score, TargetCNN, score_weights

# The verdict's thresholds. On MNIST the errors of two CNNs trained from different seeds overlap by about 0.4; those of
# a trained CNN and itself plus noise of a third of its weights' size, by more than 0.7.
WORKING_ACCURACY_PERCENT = 90.0  # below it nothing was generated that could be new
READS_ITS_INPUT = 0.1  # outputs that differ by less than this part of their inputs ignore them
COPY = 0.9  # error overlap with a checkpoint from which on a network is that checkpoint
RELATED = 0.5  # error overlap or cosine from which on a network is made of checkpoints

NOISE = (0.1, 0.3, 1.0)  # amplitudes, relative to the root mean square of the weights that the noise is added to
RANDOM_PROBES = ("recorded epoch 0", "white noise")
GENERATOR_COSTS = {"recording": "for its data", "training": "for its training"}

NO_NETWORKS = "generates no working networks"
RECALLS = "recalls the recorded run"
INTERPOLATES = "interpolates the recorded run"
NEW_NETWORKS = "generates new networks"


# ---- neurons and their permutations ---------------------------------------------------------------------------------


def layers_of(weights: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Flat TargetCNN weights as views, a layer each: weight [neurons, inputs, positions], bias [neurons].

    A layer's inputs are the neurons of the layer before it; fc1 sees each channel of conv2 at 49 positions.
    """
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in TargetCNN().parameters()]
    parts = weights.split([shape.numel() for shape in shapes])
    layers, inputs = [], 1
    for shape, weight, bias in zip(shapes[::2], parts[::2], parts[1::2], strict=True):
        layers.append((weight.view(shape[0], inputs, -1), bias))
        inputs = shape[0]
    return layers


def permute_neurons(weights: Tensor, orders: list[Tensor]) -> Tensor:
    """The same function with the hidden neurons of each layer in another order: the old index of each new neuron."""
    layers, before = [], torch.arange(1)
    for (weight, bias), order in zip(layers_of(weights), [*orders, torch.arange(10)], strict=True):
        layers += [weight[order][:, before].reshape(-1), bias[order]]
        before = order
    return torch.cat(layers)


def random_orders(generator: torch.Generator) -> list[Tensor]:
    """A random order of the neurons of each hidden layer."""
    return [torch.randperm(width, generator=generator) for width in (32, 64, 128)]


def match_neurons(weights: Tensor, reference: Tensor, most_rounds: int = 20) -> Tensor:
    """`weights` with its hidden neurons in the order that brings it nearest to `reference`.

    Weight matching of Ainsworth et al., "Git Re-Basin" (arXiv 2209.04836): one layer's order at a time is set to the
    best given the others', an assignment problem, until none changes. It starts from the given order, so a network is
    never matched worse than as it stands.
    """
    layers, targets = layers_of(weights), layers_of(reference)
    orders = [torch.arange(len(bias)) for _, bias in layers]
    for _ in range(most_rounds):
        before = [order.clone() for order in orders]
        for hidden in range(len(layers) - 1):
            (weight, bias), (target, target_bias) = layers[hidden], targets[hidden]
            inputs = orders[hidden - 1] if hidden else torch.arange(1)
            gain = target.flatten(1) @ weight[:, inputs].flatten(1).T + torch.outer(target_bias, bias)
            outgoing, target_outgoing = layers[hidden + 1][0][orders[hidden + 1]], targets[hidden + 1][0]
            gain += target_outgoing.transpose(0, 1).flatten(1) @ outgoing.transpose(0, 1).flatten(1).T
            orders[hidden] = torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])
        if all(torch.equal(old, new) for old, new in zip(before, orders, strict=True)):
            break
    return permute_neurons(weights, orders[:-1])


# ---- is it a copy? --------------------------------------------------------------------------------------------------


class Copy(NamedTuple):
    """How close a network is to the recorded checkpoints."""

    relative_l2: float  # to the nearest checkpoint, neurons matched, relative to that checkpoint's norm
    cosine: float  # with that checkpoint, neurons matched
    nearest: str  # the name of that checkpoint
    error_overlap: float  # largest intersection over union of misclassified images with any checkpoint


def error_overlap(wrong: Tensor, other: Tensor) -> float:
    """Intersection over union of two sets of misclassified images, [N] bool each; 1 if both are empty."""
    union = (wrong | other).sum().item()
    return (wrong & other).sum().item() / union if union else 1.0


def compare(weights: Tensor, wrong: Tensor, recorded: dict[str, Tensor], recorded_wrong: list[Tensor]) -> Copy:
    """Hold a network, and the images it gets wrong, against all recorded checkpoints, by name, and theirs."""
    distances = []
    for name, checkpoint in recorded.items():
        matched = match_neurons(weights, checkpoint)
        distance = torch.linalg.vector_norm(matched - checkpoint) / torch.linalg.vector_norm(checkpoint)
        cosine = torch.nn.functional.cosine_similarity(matched, checkpoint, dim=0)
        distances.append((distance.item(), cosine.item(), name))
    return Copy(*min(distances), error_overlap=max(error_overlap(wrong, other) for other in recorded_wrong))


def mean_pairwise_overlap(wrongs: list[Tensor]) -> float | None:
    """The mean error overlap over all pairs of networks; None for fewer than two."""
    pairs = [(a, b) for index, a in enumerate(wrongs) for b in wrongs[:index]]
    return sum(error_overlap(a, b) for a, b in pairs) / len(pairs) if pairs else None


# ---- does the output depend on the input? ---------------------------------------------------------------------------


def starting_points(inits: list[Tensor], recorded_init: Tensor, seed: int) -> dict[str, Tensor]:
    """What a rollout starts from, by name: unseen inits first, then probes of whether the start matters at all."""
    generator = torch.Generator().manual_seed(seed)
    first = inits[0]
    return {
        **{f"unseen init {index + 1}": init for index, init in enumerate(inits)},
        "recorded epoch 0": recorded_init,
        "all zeros": torch.zeros_like(first),
        "white noise": torch.randn(first.shape, generator=generator) * first.std(),
        "unseen init 1, neurons permuted": permute_neurons(first, random_orders(generator)),
    }


def input_dependence(states: Tensor) -> list[float]:
    """For every start, how far its end is from the first start's end, relative to the distance of the two starts.

    `states` are the states of a rollout, [steps + 1, starts, parameters]. The first entry is 0.
    """
    starts, ends = (torch.linalg.vector_norm(rows - rows[0], dim=1) for rows in (states[0], states[-1]))
    return [0.0, *(ends[1:] / starts[1:]).tolist()]


# ---- the verdict ----------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """The verdict on a generator, and the figures that decided it."""

    verdict: str
    accuracy_percent: float  # mean over its networks
    dependence: float  # mean of `input_dependence` over random starts
    error_overlap: float  # mean over its networks, as in `Copy`
    cosine: float  # likewise


def decide(accuracy_percent: float, dependence: float, error_overlap: float, cosine: float) -> Verdict:
    """The rules of the verdict."""
    if accuracy_percent < WORKING_ACCURACY_PERCENT:
        verdict = NO_NETWORKS
    elif dependence < READS_ITS_INPUT or error_overlap >= COPY:
        verdict = RECALLS
    elif max(error_overlap, cosine) >= RELATED:
        verdict = INTERPOLATES
    else:
        verdict = NEW_NETWORKS
    return Verdict(verdict, accuracy_percent, dependence, error_overlap, cosine)


def break_even(generator_seconds: float, seconds_to_generate: float, seconds_to_train: float) -> int | None:
    """From how many networks on generating costs less than training each; None if it never does."""
    saved = seconds_to_train - seconds_to_generate
    return math.floor(generator_seconds / saved) + 1 if saved > 0 else None


# ---- all of it ------------------------------------------------------------------------------------------------------


def assess(
    starts: dict[str, Tensor], states: Tensor, inits: int, first_scores: list[Score], recorded: dict[str, Tensor],
    recorded_scores: list[Score], reference: Tensor | None, data: Dataset, seed: int,
) -> dict:  # fmt: skip
    """All measures and the verdict, as a record that can be saved as JSON.

    `states`, [steps + 1, starts, parameters], is the rollout from `starts`, the `starting_points` with so many unseen
    `inits`. `first_scores` score the states of the first start. `recorded` are the checkpoints by file name, and
    `recorded_scores` the scores of the first of them. `reference` are the weights of a CNN trained from another seed.
    `seed` is that of the trivial noise.
    """
    last = len(states) - 1
    checkpoints = list(recorded.values())
    recorded_scores = [*recorded_scores, *score_weights(checkpoints[len(recorded_scores) :], data)]
    scores = [first_scores, *(score_weights(states[:, index], data) for index in range(1, inits))]
    first_and_last = [(results[1], results[-1]) for results in scores]
    first_and_last += [score_weights(states[[1, last], index], data) for index in range(inits, len(starts))]
    distances = dict(zip(starts, input_dependence(states), strict=True))

    generated = [
        (f"generated, step {step}", states[step, index], scores[index][step])
        for step in sorted({1, last})
        for index in range(inits)
    ]
    trivial = trivial_methods(checkpoints, recorded_scores, reference, seed)
    trivial_scores = score_weights(trivial.values(), data)
    networks = [
        {"method": method, "accuracy_percent": result.accuracy_percent}
        | compare(weights, result.wrong, recorded, [checkpoint.wrong for checkpoint in recorded_scores])._asdict()
        for method, weights, result in [*generated, *zip(trivial, trivial.values(), trivial_scores, strict=True)]
    ]
    ends = networks[len(generated) - inits : len(generated)]  # the last step's
    verdict = decide(
        dependence=fmean(distances[name] for name in [*list(starts)[1:inits], *RANDOM_PROBES]),
        **{name: fmean(network[name] for network in ends) for name in ("accuracy_percent", "error_overlap", "cosine")},
    )
    over_inits = [
        {"step": step} | summary_statistics([results[step].accuracy_percent for results in scores])
        for step in range(last + 1)
    ]
    dependence = [
        {"start": name, "accuracy_percent_step_1": first.accuracy_percent,
         "accuracy_percent_last_step": end.accuracy_percent, "relative_distance": distance}
        for (name, distance), (first, end) in zip(distances.items(), first_and_last, strict=True)
    ]  # fmt: skip
    return {
        "over_inits": over_inits,
        "input_dependence": dependence,
        "networks": networks,
        "mean_overlap_among_generated": mean_pairwise_overlap([results[-1].wrong for results in scores]),
        "verdict": verdict._asdict(),
    }


def trivial_methods(
    checkpoints: list[Tensor], scores: list[Score], reference: Tensor | None, seed: int
) -> dict[str, Tensor]:
    """Networks, by the name of the method, that take no generative model to get."""
    generator = torch.Generator().manual_seed(seed)
    trained = [weights for weights, result in zip(checkpoints, scores, strict=True) if is_trained(result)]
    best = checkpoints[max(range(len(scores)), key=lambda index: scores[index].accuracy_percent)]
    noise = best.square().mean().sqrt() * torch.randn(best.shape, generator=generator)
    methods = {"mean of the recorded checkpoints": torch.stack(trained).mean(dim=0)} if trained else {}
    methods |= {f"best checkpoint + {amplitude:.0%} noise": best + amplitude * noise for amplitude in NOISE}
    return methods | ({} if reference is None else {"CNN trained from another seed": reference})


def is_trained(result: Score) -> bool:
    """Whether a checkpoint was recorded after training, not before it."""
    return result.accuracy_percent > 50


def cost(
    generator_seconds: dict[str, float], seconds_to_generate: float, log: list[dict] | None, accuracy_percent: float
) -> dict:
    """What generating costs against training, from what the scripts recorded; None where they recorded nothing.

    The seconds to train are those until the first epoch of `log` that reaches `accuracy_percent`, or, if none does, all
    of them, and `accuracy_reached` is False.
    """
    spent = sum(generator_seconds.values()) if {"recording", "training"} <= generator_seconds.keys() else None
    reached = next(
        (index for index, epoch in enumerate(log or []) if epoch["accuracy_percent"] >= accuracy_percent), None
    )
    seconds_to_train = (
        sum(epoch["seconds"] for epoch in log[: None if reached is None else reached + 1]) if log else None
    )
    known = spent is not None and seconds_to_train is not None
    return {
        "seconds_to_generate": seconds_to_generate,
        "generator_seconds": generator_seconds,
        "seconds_to_train": seconds_to_train,
        "accuracy_reached": reached is not None if log else None,
        "cheaper_from_networks": break_even(spent, seconds_to_generate, seconds_to_train) if known else None,
    }


def report(record: dict) -> str:
    """The record of `assess` and `cost` for people."""
    last = record["over_inits"][-1]["step"]
    over_inits = table(["Step", "Mean Accuracy (%)", "Std", "Min", "Max"], [
        [str(row["step"]), *(f"{row[name]:.2f}" for name in ("mean", "standard_deviation", "minimum", "maximum"))]
        for row in record["over_inits"]
    ])  # fmt: skip
    dependence = table(
        ["Start", "Accuracy, Step 1 (%)", f"Accuracy, Step {last} (%)", "Distance of Ends / of Starts"], [
        [row["start"], f"{row['accuracy_percent_step_1']:.2f}", f"{row['accuracy_percent_last_step']:.2f}",
         f"{row['relative_distance']:.4f}" if index else "-"]
        for index, row in enumerate(record["input_dependence"])
    ])  # fmt: skip
    columns = {"accuracy_percent": 2, "relative_l2": 3, "cosine": 3, "error_overlap": 3}  # and their decimals
    methods: dict[str, list[dict]] = {}
    for network in record["networks"]:
        methods.setdefault(network["method"], []).append(network)
    copies = table(["Network", "Accuracy (%)", "Relative L2", "Cosine", "Error Overlap", "Nearest Checkpoint"], [
        [method, *(range_of([network[name] for network in networks], decimals) for name, decimals in columns.items()),
         ", ".join(dict.fromkeys(network["nearest"] for network in networks))]
        for method, networks in methods.items()
    ])  # fmt: skip
    among = record["mean_overlap_among_generated"]
    verdict = record["verdict"]
    return f"""
Over {len(methods["generated, step 1"])} unseen inits:
{over_inits}

Does the output depend on the input?
{dependence}

Is it a copy?
{copies}
Mean error overlap of the generated networks among themselves: {"-" if among is None else f"{among:.3f}"}

Verdict: {verdict["verdict"]} (input dependence {verdict["dependence"]:.3f}; closeness to the nearest checkpoint: \
error overlap {verdict["error_overlap"]:.3f}, cosine {verdict["cosine"]:.3f})

{cost_lines(record["cost"])}
"""


def range_of(values: list[float], decimals: int) -> str:
    """The least and the largest of the values, or what all of them round to."""
    least, largest = (f"{value:.{decimals}f}" for value in (min(values), max(values)))
    return least if least == largest else f"{least} to {largest}"


def cost_lines(cost: dict) -> str:
    """What `cost` found, a line for each figure."""
    spent = cost["generator_seconds"]
    parts = [f"{spent[name]:.1f} s {text}" for name, text in GENERATOR_COSTS.items() if name in spent]
    lines = [
        f"Generating a network takes {cost['seconds_to_generate']:.3f} s.",
        f"The generator took {' and '.join(parts) or 'a time that was not recorded'}.",
    ]
    if cost["seconds_to_train"] is None:
        return "\n".join([*lines, "What training with Adam takes was not recorded (no training_log.json)."])
    accuracy = "reaches" if cost["accuracy_reached"] else "does not reach"
    lines.append(f"Training with Adam {accuracy} the same accuracy in {cost['seconds_to_train']:.1f} s.")
    if cost["cheaper_from_networks"] is not None:
        least = "" if cost["accuracy_reached"] else " at the latest"
        lines.append(f"Generating is cheaper from {cost['cheaper_from_networks']} networks on{least}.")
    return "\n".join(lines)
