"""Adam, which written networks are held against: at the best of three learning rates.

The rate is chosen on training images that are kept apart; what is reported has then been trained on all of them.
"""

from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor, nn

from target_cnn import Dataset, Score, score, train_with_adam
from universal.model.synthesizer import GraphWeightSynthesizer
from universal.reading.graph import in_fastest_layout

RATES = (0.0003, 0.001, 0.003)
HELD_OUT = 5000  # training images, the last ones, on which the rate is chosen
FIRST_STEPS = 100

Start = Callable[[int], nn.Module]  # the network that training starts from, of a seed


def starts_of(build: Callable[[], nn.Module], synthesizer: GraphWeightSynthesizer, data: Dataset) -> dict[str, Start]:
    """Two starts for a network: what the synthesiser writes from the random init of a seed, and that init."""
    device, images = data.images.device, data.images[:2]
    return {
        "written": lambda seed: in_fastest_layout(synthesizer.synthesize(built(build, seed, device)), images),
        "random": lambda seed: in_fastest_layout(built(build, seed, device), images),
    }


def built(build: Callable[[], nn.Module], seed: int, device: torch.device) -> nn.Module:
    """A network with the random init of `seed`."""
    torch.manual_seed(seed)
    return build().to(device)


def curve(
    start: Start, train: Dataset, scored: Dataset, lr: float, seed: int, points: int
) -> list[tuple[Score, float]]:
    """Adam from a `start`, at so many `points`: after its first steps, after an epoch, after two, and so on.

    At each the score on `scored`, and the seconds of training since that epoch began. All starts of a seed see the same
    images in the same order.
    """
    network = start(seed)
    torch.manual_seed(seed)
    training = train_with_adam(network, train, max(points - 1, 1), lr, pauses=(FIRST_STEPS,), label=f"Adam at {lr:g}")
    return [(score(network, scored), progress.seconds) for progress in islice(training, points)]


def best_rates(start: Start, train: Dataset, seed: int, points: int) -> list[float]:
    """For each point of a curve, the rate of the highest accuracy there on the images that are held out."""
    known, held_out = train[:-HELD_OUT], train[-HELD_OUT:]
    curves = [curve(start, known, held_out, lr, seed, points) for lr in RATES]
    accuracies = [[result.accuracy_percent for result, _ in point] for point in zip(*curves, strict=True)]
    return [RATES[at_point.index(max(at_point))] for at_point in accuracies]


def at_best_rates(start: Start, train: Dataset, data: Dataset, seed: int, points: int) -> list[dict]:
    """The points of Adam's curve, each at the rate that is best for it: its accuracy in percent, and the seconds."""
    rates = best_rates(start, train, seed, points)
    ends = {lr: end for end, lr in enumerate(rates, start=1)}  # no curve is longer than it has to be
    curves = {lr: curve(start, train, data, lr, seed, end) for lr, end in ends.items()}
    found = []
    for point, lr in enumerate(rates):
        result, seconds = curves[lr][point]
        found.append({"learning_rate": lr, "accuracy_percent": result.accuracy_percent, "seconds": seconds})
    return found


def compare_starts(
    starts: dict[str, Start], train: Dataset, data: Dataset, seeds: range, epochs: int
) -> tuple[list[dict], dict[str, list[Tensor]]]:
    """Accuracies in percent at the start, after the first steps and after each epoch of Adam; and, by start, what the
    trained network of each seed gets wrong, [N] bool.

    Each start has the one rate that is best for it at the end, with the first seed.
    """
    rows, wrong = [], {name: [] for name in starts}
    for name, start in starts.items():
        lr = best_rates(start, train, seeds[0], epochs + 1)[-1]
        for seed in seeds:
            trained = [result for result, _ in curve(start, train, data, lr, seed, epochs + 1)]
            accuracies = [result.accuracy_percent for result in (score(start(seed), data), *trained)]
            rows.append({"seed": seed, "start": name, "learning_rate": lr, "accuracy_percent": accuracies})
            wrong[name].append(trained[-1].wrong)
    return rows, wrong


def point_names(points: int) -> list[str]:
    """What `compare_starts` gives for a curve of so many points: the start and each of them."""
    return ["start", f"{FIRST_STEPS} steps", *(f"epoch {epoch}" for epoch in range(1, points))]
