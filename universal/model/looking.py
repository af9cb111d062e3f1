"""A look at what was written: does the network say of images that were held out what it was to say?"""

import math

import torch
from torch import Tensor

from universal.model.algebra import per_probe
from universal.reading.calls import Layer, Operation
from universal.reading.graph import ComputationGraph

FEWEST = 20  # images that say whether a network is at chance


class DoubtfulWeights(UserWarning):
    """What was written is hardly what was wanted: the network is at chance, gives NaN, or has a dead layer."""


@torch.no_grad()
def doubt(graph: ComputationGraph, images: Tensor, labels: Tensor, right_percent: float) -> str | None:
    """What is wrong with the network of a graph, as labelled images show, with the layer where it is; else None.

    The network runs as it is, so what its forward pass makes of the written weights shows as well. `right_percent` is
    its accuracy on images that it has not seen; no better than to say always what most of them are is chance.
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

    graph.run(images, {}, see=see)
    for layer in graph.layers:
        if not outputs[layer.index].isfinite().all():
            return f"{called(layer)}: gives NaN or infinite values of the images"
        if is_dead(layer, outputs[layer.index], len(images)):
            return f"{called(layer)}: is dead: it lets nothing pass of any of the images"
    guessed = 100 * labels.bincount().max().item() / len(labels)
    clearly_more = guessed + 3 * math.sqrt(guessed * (100 - guessed) / len(labels))
    if len(labels) < FEWEST or right_percent > min(clearly_more, (guessed + 100) / 2):
        return None
    # What is used again comes first: of all others, what tells the classes apart least.
    worst = min(
        graph.layers,
        key=lambda layer: (-uses[layer.index], separation(layer, outputs[layer.index], labels)),
    )
    return (
        f"{right_percent:.0f} % of the images held out are right, and {guessed:.0f} % where their most frequent class "
        f"is always said: do not rely on these weights; {called(worst)} tells the classes apart least"
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
