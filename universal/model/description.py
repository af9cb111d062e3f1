"""What a layer is, as numbers, and networks that depend on it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from universal.reading.calls import ACTIVATION_POINTS, Layer
from universal.reading.graph import ComputationGraph

DEEPEST = 24  # layers before or after one, of which it still makes a difference whether there are more
FREQUENCIES = 7  # cosines along each side of a kernel or a map


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """An MLP with one hidden layer."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


class AcrossNeurons(nn.Module):
    """Normalise every feature of [neurons, features] over the neurons."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, neurons: Tensor) -> Tensor:
        centred = neurons - neurons.mean(0)
        return centred * torch.rsqrt(centred.square().mean(0) + 1e-2) * self.scale + self.shift


class ConditionedMLP(nn.Module):
    """An MLP with one hidden layer for what is in a layer, [n, inputs], that depends on what the layer is, [dimension].

    The layer shifts and scales the hidden units, as in FiLM (Perez et al. 2018), so that layers of different kinds can
    share what they have in common and still be treated differently.
    """

    def __init__(self, inputs: int, dimension: int, hidden: int, outputs: int):
        super().__init__()
        self.first, self.second = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        self.shift, self.scale = nn.Linear(dimension, hidden, bias=False), nn.Linear(dimension, hidden, bias=False)

    def forward(self, values: Tensor, about: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(values) + self.shift(about)) * (1 + 0.5 * self.scale(about)))


class PositionFunctions(nn.Module):
    """Learned functions of the position in a kernel or a flattened map, [positions, rank], that depend on the layer."""

    def __init__(self, dimension: int, hidden: int, rank: int):
        super().__init__()
        self.mix = ConditionedMLP(FREQUENCIES**2, dimension, hidden, rank)
        self.always = nn.Linear(FREQUENCIES**2, rank)

    def forward(self, layer: Layer, about: Tensor) -> Tensor:
        cosines = cosines_of(layer).to(about)
        functions = self.mix(cosines, about) + self.always(cosines)
        return functions * torch.rsqrt(functions.square().mean() + 1e-6)


def cosines_of(layer: Layer) -> Tensor:
    """Products of cosines at the positions of a kernel or a flattened map, [positions, FREQUENCIES ** 2].

    A position in a kernel is the distance to its centre in pixels, so that the middle of a large kernel is like a small
    one; a position in a map is relative to the map's size.
    """
    if not layer.has_window:
        return cosines_at(layer.grid)
    sides, places = layer.window, []
    for side, dilation in zip(sides, layer.options.get("dilation", (1,) * len(sides)), strict=True):
        distances = (torch.arange(side) - (side - 1) / 2) * dilation
        places.append((1 + torch.tanh(distances / 3)) / 2)  # within half a turn, however large the kernel
    down, across = [torch.full((1,), 0.5)] * (2 - len(sides)) + places
    return cosines_at(torch.cartesian_prod(down, across))


def cosines_at(places: Tensor) -> Tensor:
    """Products of cosines at `places`, [n, 2] within (0, 1): [n, FREQUENCIES ** 2]."""
    cosines = torch.cos(places[..., None] * math.pi * torch.arange(FREQUENCIES, device=places.device))
    return (cosines[:, 0, :, None] * cosines[:, 1, None, :]).flatten(1)


def description_of(layer: Layer, graph: ComputationGraph) -> Tensor:
    """What a layer is: its kind, size, surroundings, and the function that follows it."""
    mean = {
        name: math.log(sum(value) / len(value))
        for name, value in layer.options.items()
        if name in ("stride", "dilation")
    }
    channels = len(layer.channels)
    values = layer.activation or ACTIVATION_POINTS
    largest = max(map(abs, values))
    # What comes is brought to scale anyway: a factor far from 1 after a function says nothing about it.
    factor = 1.0 if 0.5 <= largest <= 4 or not largest else 2 / largest
    description = [
        layer.has_window, layer.depth == 0, layer.last, min(layer.depth, DEEPEST) / 4,
        min(graph.last.depth - layer.depth, DEEPEST) / 4, math.log(channels / layer.groups) / 5,
        math.log(layer.shape[0]) / 5, math.log(layer.positions) / 3, math.log(layer.side) / 3,
        mean.get("dilation", 0), mean.get("stride", 0), any(reader.has_window for reader in layer.readers),
        any(len(reader.sources) > 1 for reader in layer.readers), math.log(layer.resolution) / 3,
        math.log(layer.groups) / 3, layer.groups == channels > 1, layer.normalised,
        any(reader.pooled for reader in layer.readers), layer.pooled, not layer.has_window and layer.resolution > 1,
        layer.places is not None, layer.channels.shape[1] > 1, math.log(len(layer.sources)),
        math.log(graph.classes) - 2, graph.convolutional, math.log(len(graph.layers)) / 2,
        *(max(-3.0, min(3.0, factor * value)) for value in values),
    ]  # fmt: skip
    return torch.tensor([float(value) for value in description])


DESCRIPTION = 26 + len(ACTIVATION_POINTS)  # numbers that `description_of` gives
