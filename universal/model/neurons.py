"""Reading: what each neuron of a layer is, from the random weights that it has."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from universal.model.description import AcrossNeurons, ConditionedMLP, PositionFunctions, mlp
from universal.reading.calls import Layer


class Reader(nn.Module):
    """(a layer, its current weights, the keys of its inputs) -> what each of its neurons is, [neurons, dimension].

    A neuron is known only by its own random weights: by their products with the keys of the neurons that it reads and,
    in networks without convolutions, by their responses to the probes. The neurons of a layer then see each other, by
    attention.
    """

    def __init__(self, dimension: int, hidden: int, rank: int):
        super().__init__()
        self.dimension = dimension
        self.functions = PositionFunctions(dimension, hidden, rank)
        self.kernels = nn.Linear(rank * dimension, dimension, bias=False)
        self.norm = nn.LayerNorm(dimension)
        self.embed = ConditionedMLP(dimension + 1, dimension, hidden, dimension)
        self.embed_more = nn.Sequential(nn.LayerNorm(dimension), mlp(dimension, hidden, dimension))
        self.attend_norm, self.attend = nn.LayerNorm(dimension), nn.MultiheadAttention(dimension, 4, batch_first=True)
        self.neuron_norm = AcrossNeurons()

    def read(self, layer: Layer, keys: Tensor, weights: dict[str, Tensor], about: Tensor) -> Tensor:
        """What the current weights say about each neuron, [neurons, dimension], from the `keys` [channels, dimension]
        of what it reads."""
        kernels = layer.kernels(weights).unflatten(0, (layer.groups, -1))
        keys = keys.view(layer.groups, -1, self.dimension)
        functions = self.functions(layer, about)
        # Whichever way makes less of it: along the positions first, or along the channels.
        if layer.positions > functions.shape[1]:
            products = torch.einsum("gocr,gcd->gord", kernels @ functions, keys)
        else:
            products = torch.einsum("gopd,pr->gord", torch.einsum("gocp,gcd->gopd", kernels, keys), functions)
        return F.layer_norm(self.kernels(products.flatten(2).flatten(0, 1)), [self.dimension])

    def neurons(self, reading: Tensor, bias: Tensor | None, about: Tensor) -> Tensor:
        """What each neuron of a hidden layer is, [neurons, dimension]."""
        bias = reading.new_zeros(len(reading)) if bias is None else bias - bias.mean()
        bias = bias * torch.rsqrt(bias.square().mean() + 1e-12)
        neurons = self.embed(torch.cat([self.norm(reading), bias[:, None]], 1), about)
        neurons = neurons + self.embed_more(neurons)
        normalised = self.attend_norm(neurons)[None]
        return self.neuron_norm(neurons + self.attend(normalised, normalised, normalised, need_weights=False)[0][0])
