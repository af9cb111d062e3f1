"""Writing: the weights of a layer, from what its neurons and those that it reads are."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from universal.model.algebra import decorrelate, ridge_regression, unit_responses, unit_rms
from universal.model.description import AcrossNeurons, ConditionedMLP, PositionFunctions
from universal.model.sizes import bounded, inverse_deviation
from universal.reading.calls import Layer

LARGEST = 30.0  # logarithm of a scalar, however deep a network is
POSITIONS = 3  # along each side of the maps, at which regressions look at what a convolution reads
SCALING_PROBES = 32  # that bring a convolution to scale, which responds to each probe at many positions
# Positive numbers that depend on the layer, and the logarithms of what they start as.
SCALARS = {"key_ridge": 0.0, "patch_ridge": -2.0, "correlation_ridge": 0.0, "gain": 0.0}


class Writer(nn.Module):
    """(a layer, the keys of its inputs, its neurons) -> its weight, [neurons, ...], and bias.

    A weight is bilinear in the code of its neuron and the dual keys of its inputs, K (K^T K / n + r I)^-1, which turn a
    sum over n random inputs into a quadrature, with functions of the position in the kernel or the map. To that of a
    convolution a ridge regression is added, at some positions, onto concepts of the probes, mixed by the neuron's code.
    """

    def __init__(self, dimension: int, hidden: int, rank: int, concepts: int):
        super().__init__()
        self.dimension, self.rank = dimension, rank
        self.functions = PositionFunctions(dimension, hidden, rank)
        self.scalars = nn.ModuleDict({name: nn.Linear(dimension, 1) for name in SCALARS})
        self.concept_scale = nn.Linear(dimension, concepts)
        self.patch_share = nn.Linear(dimension, 1)
        for start_at_zero in (*self.scalars.values(), self.concept_scale, self.patch_share):
            nn.init.zeros_(start_at_zero.weight)
            nn.init.zeros_(start_at_zero.bias)
        self.code = ConditionedMLP(dimension, dimension, hidden, dimension + 1)
        self.code_norm = nn.Sequential(nn.LayerNorm(dimension), AcrossNeurons())
        self.kernels = nn.Linear(dimension, rank * dimension, bias=False)
        self.maps = nn.Linear(dimension, rank * dimension, bias=False)
        self.concept_code = ConditionedMLP(dimension, dimension, hidden, concepts)
        self.concept_code_norm = nn.Sequential(nn.LayerNorm(concepts), AcrossNeurons())

    def hidden(
        self, layer: Layer, inputs: Tensor | None, keys: Tensor, neurons: Tensor, about: Tensor, concepts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The new weight of a layer, of any scale, and the bias of its standardised responses.

        `inputs` are None if they are of parts of the probes, such as windows.

        The bias stays within one deviation. Free, it grows in training until no neuron is ever off: random inits do
        not disturb linear layers, so these are easier to write, but the network is then worth no more than a shallower
        one, and too sensitive to be trained further.
        """
        codes, bias = self.code(neurons, about).split([self.dimension, 1], 1)
        weight = self.bilinear(layer, keys, self.code_norm(codes), about)
        if layer.has_window and inputs is not None:
            concepts = F.layer_norm(concepts, concepts.shape[1:]) * self.concept_scale(about).exp()
            wanted = concepts @ self.concept_code_norm(self.concept_code(neurons, about)).T  # [probes, neurons]
            patches = layer.patches(inputs, POSITIONS)
            groups, _, positions, _ = patches.shape
            rows = (patches - patches.mean((1, 2), keepdim=True)).flatten(1, 2)
            wanted = wanted[:, None].expand(-1, positions, -1).flatten(0, 1)
            wanted = wanted.unflatten(1, (groups, -1)).movedim(1, 0)
            fitted = ridge_regression(rows, wanted, self.scalar("patch_ridge", about))
            flat = weight.flatten(1).unflatten(0, (groups, -1))
            fitted = self.patch_share(about) * unit_responses(fitted, rows)
            weight = (unit_responses(flat, rows) + fitted).view_as(weight)
        return weight, torch.tanh(0.3 * bias[:, 0])

    def bilinear(self, layer: Layer, keys: Tensor, codes: Tensor, about: Tensor) -> Tensor:
        """A weight that is bilinear in the neurons' codes and the dual keys of the input channels."""
        ridge = self.scalar("key_ridge", about) * torch.eye(self.dimension).to(keys)
        dual = unit_rms(torch.linalg.solve(keys.T @ keys / len(keys) + ridge, keys.T).T)
        dual = dual.view(layer.groups, -1, self.dimension)
        functions = self.functions(layer, about)
        expanded = (self.kernels if layer.has_window else self.maps)(codes)
        expanded = expanded.view(layer.groups, -1, self.rank, self.dimension)
        # Whichever way makes less of it: along the positions first, or along the channels. Channels come last, so that
        # the weight of a convolution lies as channels-last has it, which is the fastest.
        if layer.positions > self.rank:
            kernels = torch.einsum("gocr,pr->gopc", torch.einsum("gord,gcd->gocr", expanded, dual), functions)
        else:
            kernels = torch.einsum("gopd,gcd->gopc", torch.einsum("gord,pr->gopd", expanded, functions), dual)
        kernels = kernels.flatten(0, 1).movedim(2, 1)
        return layer.weight_of(kernels / math.sqrt(kernels[0].numel() * self.rank * self.dimension))

    def scalar(self, name: str, about: Tensor) -> Tensor:
        """One of the positive numbers that depend on the layer, [1], within exp(-LARGEST) and exp(LARGEST)."""
        return (self.scalars[name](about) + SCALARS[name]).clamp(-LARGEST, LARGEST).exp()

    def to_scale(
        self, layer: Layer, inputs: Tensor, weight: Tensor, mean: Tensor, gain: Tensor, about: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The weight and the bias of a hidden layer brought to scale, and the probes' responses with them.

        The responses of a neuron come to a deviation of `gain`, [1], and, where the layer has a bias, to so many
        deviations, `mean`, in the mean. They are also made less alike than they were. Of a convolution, a part of the
        probes is enough.
        """
        some = inputs[:SCALING_PROBES] if layer.has_window else inputs
        responses, own_mean, inverse = standardised_responses(layer, some, weight)
        responses = responses.unflatten(1, (layer.groups, -1))
        positions_first = weight.movedim(1, -1)  # as the weight of a convolution lies in memory
        values = torch.cat([positions_first.flatten(1), own_mean[:, None]], 1) * inverse[:, None]
        values = values.unflatten(0, (layer.groups, -1))
        values = decorrelate(responses, self.scalar("correlation_ridge", about) + 1e-2, values).flatten(0, 1)
        weight, own_mean = values[:, :-1].view(positions_first.shape).movedim(-1, 1), values[:, -1]
        weight = bounded(gain.view(-1, *[1] * (weight.dim() - 1)) * weight)
        bias = bounded(gain * (mean - own_mean)) if layer.bias else None
        return weight, bias, layer(inputs, weight, bias)


def standardised_responses(layer: Layer, inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The responses of a layer's neurons, [responses, neurons], standardised; their means and inverse deviations."""
    responses = layer(inputs, weight).movedim(layer.axis, -1).flatten(0, -2)
    mean = responses.mean(0)  # torch.var_mean over dimensions that lie apart is ten times slower
    responses = responses - mean
    inverse = inverse_deviation(responses.square().mean(0), mean.square(), weight.flatten(1).square().sum(1))
    return responses * inverse, mean, inverse
