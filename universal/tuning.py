"""Tuning: the few numbers of a synthesiser that can be set by trial and error, where nothing tells a gradient.

They are offsets of the logarithms of the positive numbers with which each layer is written: the writer's own scalars,
and the slopes of a compander. A compander (as in the quantisation of signals, Bennett 1948) is a monotone function of
the magnitude of each weight, before the layer is brought to scale. A steep one makes the weights of a neuron alike, one
that is flat near zero makes most of them small; what is written next then knows what that has done.
"""

import torch
from torch import Tensor, nn

from universal.calls import Layer

KNOTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # magnitudes, in means over the neuron, where the slope may change
SLOPES = [f"slope_from_{knot}" for knot in KNOTS]
KINDS = ("every layer", "convolutions", "the first layer", "the last layer")  # whose offsets add up


class Tuning(nn.Module):
    """`offsets` [numbers, KINDS] of the logarithms of the `scalars` and of the compander's slopes. At zero, nothing
    changes."""

    def __init__(self, scalars: list[str]):
        super().__init__()
        self.names = [*scalars, *SLOPES]
        self.offsets = nn.Parameter(torch.zeros(len(self.names), len(KINDS)))

    def offset(self, name: str, layer: Layer) -> Tensor:
        """What is added to the logarithm of a number, for a layer, []."""
        return self.offsets[self.names.index(name)] @ self.kinds(layer)

    def companded(self, layer: Layer, weight: Tensor) -> Tensor:
        """`weight`, [neurons, ...], with magnitudes along the compander of its layer."""
        slopes = (self.offsets[-len(KNOTS) :] @ self.kinds(layer)).exp()
        changes = slopes.diff(prepend=slopes.new_zeros(1))
        flat = weight.flatten(1)
        unit = flat.abs().mean(1, keepdim=True) + 1e-12
        magnitudes = flat.abs() / unit
        companded = sum(change * (magnitudes - knot).relu() for knot, change in zip(KNOTS, changes, strict=True))
        return (flat.sign() * unit * companded).view_as(weight)

    def kinds(self, layer: Layer) -> Tensor:
        """Which of KINDS a layer is of, as numbers."""
        return self.offsets.new_tensor([True, layer.is_convolution, layer.depth == 0, layer.last])
