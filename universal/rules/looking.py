"""A look at what was written: does the network say of images that were held out what it was to say, and could?"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from universal.model.algebra import per_probe
from universal.reading.calls import Layer, Operation
from universal.reading.graph import ComputationGraph
from universal.rules.features import chunk_size, of_images
from universal.rules.judging import judged

FEWEST = 20  # images that say whether a network is at chance
MOST_FEATURES = 4096  # of a layer, from which it is told what it knows
CLEARLY = 3.0  # points, and two deviations, that a layer must know more than its network


class DoubtfulWeights(UserWarning):
    """What was written is hardly what was wanted: the network is at chance, gives NaN, has a dead layer, or loses
    much of what its layers know."""


@torch.no_grad()
def doubt(graph: ComputationGraph, images: Tensor, labels: Tensor, right_percent: float | None) -> str | None:
    """What is wrong with the network of a graph, as labelled images show, with the layer where it is; else None.

    The network runs as it is, so what its forward pass makes of the written weights shows as well. `right_percent` is
    what its last layer's features foretell of images that it has not seen, None if that layer is frozen; no better than
    to say always what most of them are is chance, and it is to get right as many of these.
    """
    outputs: dict[int, Tensor] = {}
    uses: dict[int, int] = {}

    def see(operation: Operation, result: Tensor) -> None:
        if isinstance(operation, Layer):
            outputs[operation.index] = result  # of its last use
            uses[operation.index] = uses.get(operation.index, 0) + 1

    def called(layer: Layer) -> str:
        often = uses[layer.index]
        return layer.name + (f", used {often} times and written for its first inputs alone" if often > 1 else "")

    right = 100 * (graph.run(images, {}, see=see).argmax(1) == labels).double().mean().item()
    for layer in graph.layers:
        if not outputs[layer.index].isfinite().all():
            return f"{called(layer)}: gives NaN or infinite values of the images"
        if is_dead(layer, outputs[layer.index], len(images)):
            return f"{called(layer)}: is dead: it lets nothing pass of any of the images"
    right_percent = right if right_percent is None else right_percent
    guessed = 100 * labels.bincount().max().item() / len(labels)
    clearly_more = guessed + 3 * math.sqrt(guessed * (100 - guessed) / len(labels))
    foretold = right_percent - max(CLEARLY, 3 * math.sqrt(right_percent * (100 - right_percent) / len(labels)))
    if len(labels) < FEWEST or (right_percent > min(clearly_more, (guessed + 100) / 2) and right > foretold):
        return None
    # What is used again comes first: of all others, what tells the classes apart least.
    worst = min(
        graph.layers,
        key=lambda layer: (-uses[layer.index], separation(layer, outputs[layer.index], labels)),
    )
    if right_percent > clearly_more and uses[worst.index] == 1:
        reason = f"what reaches its last layer foretells {right_percent:.0f} %, but not what it makes of that"
    else:
        reason = f"{called(worst)} tells the classes apart least"
    return (
        f"{min(right, right_percent):.0f} % of the images held out are right, and {guessed:.0f} % where their most "
        f"frequent class is always said: do not rely on these weights; {reason}"
    )


@torch.no_grad()
def lost(
    graph: ComputationGraph, known: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], right_percent: float
) -> str | None:  # fmt: skip
    """What the network of a graph loses by averaging over places, if a ridge regression on what a layer gives at each
    of them, from `known` images and labels, tells clearly more of those `held_out`; else None.

    There rules are weak, which choose by what means say (tokens, blocks before global pooling), and training gains.
    """
    averaged = [
        layer
        for layer in graph.layers
        if layer.resolution > 1
        and any(reader.pooled or (reader.last and not layer.is_convolution) for reader in layer.readers)
    ]
    if not averaged or len(held_out[1]) < FEWEST or right_percent + CLEARLY > 100:
        return None
    images, labels = (torch.cat(parts) for parts in zip(known, held_out, strict=True))
    found: dict[int, list[Tensor]] = {layer.index: [] for layer in averaged}
    for part in images.split(chunk_size(graph, tuple(images.shape[1:]))):
        outputs: dict[int, Tensor] = {}

        def see(operation: Operation, result: Tensor, outputs: dict[int, Tensor] = outputs) -> None:
            if isinstance(operation, Layer) and operation.index in found:
                outputs[operation.index] = result  # of its last use

        graph.run(part, {}, see=see)
        for layer in averaged:
            features = of_images(outputs[layer.index], layer.axis, len(part)).flatten(1)
            found[layer.index].append(features[:, :: -(-features.shape[1] // MOST_FEATURES)])
    count = len(known[1])
    one_hot = F.one_hot(labels[:count], graph.classes).to(images)
    told = {}
    for layer in averaged:
        features = torch.cat(found[layer.index])
        if features.isfinite().all():
            told[layer.name] = 100 * judged(features[:count], one_hot, features[count:], labels[count:])[1].item()
    name = max(told, key=told.get, default=None)
    deviation = math.sqrt(right_percent * (100 - right_percent) / len(held_out[1]))
    if name is None or told[name] < right_percent + max(CLEARLY, 2 * deviation):
        return None
    return (
        f"{right_percent:.0f} % of the images held out are right, and {told[name]:.0f} % by a regression on what "
        f"{name} gives place by place, of which means or single places are read: train on from these weights"
    )


def is_dead(layer: Layer, outputs: Tensor, probes: int) -> bool:
    """Whether nothing of what a layer gives tells the probes apart, or passes what follows it."""
    values = layer.activation
    if values and values[0] == values[1] == values[2] == values[3] and outputs.max() <= 0:
        return True
    found = per_probe(outputs, layer.axis, probes)
    return found is not None and len(found) > 1 and bool(found.std(0).max() <= 1e-6 * found.abs().max())


def separation(layer: Layer, outputs: Tensor, labels: Tensor) -> float:
    """The share of the variance of a layer's outputs that lies between the classes of the probes."""
    found = per_probe(outputs, layer.axis, len(labels))
    if found is None:
        return 1.0
    found = found - found.mean(0)
    means = torch.stack([found[labels == label].mean(0) for label in labels])
    return (means.square().sum() / found.square().sum().clamp(min=1e-12)).item()
