"""Tuning: the few numbers of a synthesiser that can be set by trial and error, where nothing tells a gradient.

They say how the sizes of a layer's weights are spread:

- along a *compander* (as in the quantisation of signals, Bennett 1948), a monotone function of the magnitude of each
  weight. A steep one makes the weights of a neuron alike, one that is flat near zero makes most of them small;
- by the *relevance* of what they read: larger inputs get larger weights, or smaller ones;
- by the *evenness* of the neurons: what rounds or prunes a tensor by one threshold spares no neuron of small weights.

All that happens as soon as a layer is written, so what is written next knows what it has done. Nothing comes after the
last layer, whose regression may have another *penalty*: a strong one makes weights that stand more.
"""

import torch
from torch import Tensor, nn

from universal.model.sizes import inverse_deviation
from universal.reading.calls import Layer

KNOTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # magnitudes, in means over the neuron, where the slope may change
SLOPES = [f"slope_from_{knot}" for knot in KNOTS]
NUMBERS = ["penalty", "evenness", "relevance", *SLOPES]
LARGEST = 10.0  # logarithm of a penalty
LAYER_KINDS = ("every layer", "convolutions", "the first layer", "the last layer")  # whose offsets add up


class Tuning(nn.Module):
    """`offsets` [NUMBERS, LAYER_KINDS] of evenness and relevance, and of the logarithms of the penalty and of the
    compander's slopes. At zero, nothing changes."""

    def __init__(self):
        super().__init__()
        self.offsets = nn.Parameter(torch.zeros(len(NUMBERS), len(LAYER_KINDS)))

    def offset(self, name: str, layer: Layer) -> Tensor:
        """One of the numbers, for a layer, []."""
        return self.offsets[NUMBERS.index(name)] @ self.kinds(layer)

    def penalty(self, layer: Layer) -> float:
        """What the strength of the last layer's regression is multiplied by."""
        return self.offset("penalty", layer).clamp(-LARGEST, LARGEST).exp().item()

    def tuned(self, layer: Layer, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of a layer, as written, with other magnitudes.

        Its responses to the `inputs` keep their deviations, the classes all together, and, where there is a bias, their
        means; evenness then changes both of a hidden neuron alike.
        """
        if not (self.offsets @ self.kinds(layer)).any():
            return weight, bias
        mean, variance = statistics(layer, inputs, weight, bias)
        weight = self.spread(layer, weight, inputs)
        own_mean, own_variance = statistics(layer, inputs, weight)
        squares = [own_variance, own_mean.square(), weight.flatten(1).square().sum(1)]
        if layer.last:
            variance, *squares = (square.mean() for square in (variance, *squares))
        scale = variance.sqrt() * inverse_deviation(*squares).expand(len(weight))
        gain = torch.ones_like(scale) if layer.last else self.evening(layer, per_neuron(scale, weight) * weight)
        weight = per_neuron(gain * scale, weight) * weight
        return weight, None if bias is None else gain * (mean - scale * own_mean)

    def spread(self, layer: Layer, weight: Tensor, inputs: Tensor) -> Tensor:
        """`weight`, [neurons, ...], with other magnitudes: times how large the `inputs` are, to the power of the
        relevance, then along the compander of its layer."""
        flat = (weight * self.relevances(layer, inputs).view(*weight.shape[:2], *[1] * (weight.dim() - 2))).flatten(1)
        slopes = (self.offsets[-len(KNOTS) :] @ self.kinds(layer)).exp()
        changes = slopes.diff(prepend=slopes.new_zeros(1))
        unit = flat.abs().mean(1, keepdim=True) + 1e-12
        magnitudes = flat.abs() / unit
        companded = sum(change * (magnitudes - knot).relu() for knot, change in zip(KNOTS, changes, strict=True))
        return (flat.sign() * unit * companded).view_as(weight)

    def relevances(self, layer: Layer, inputs: Tensor) -> Tensor:
        """Powers of the root mean squares of the `inputs` of each neuron, [neurons, inputs of one]."""
        sizes = inputs.movedim(layer.axis, -1).flatten(0, -2).square().mean(0).sqrt()
        powers = (sizes / (sizes.mean() + 1e-12) + 1e-6) ** self.offset("relevance", layer)
        return powers.view(layer.groups, -1).repeat_interleave(layer.shape[0] // layer.groups, 0)

    def evening(self, layer: Layer, weight: Tensor) -> Tensor:
        """Factors for the neurons of a hidden layer, [neurons].

        They bring the mean magnitudes of their weights closer to each other, with an evenness of 1 to the same one, and
        with a negative evenness further apart.
        """
        sizes = weight.flatten(1).abs().mean(1) + 1e-12
        return (sizes.log().mean().exp() / sizes) ** self.offset("evenness", layer)

    def kinds(self, layer: Layer) -> Tensor:
        """Which of LAYER_KINDS a layer is of, as numbers."""
        return self.offsets.new_tensor([True, layer.has_window, layer.depth == 0, layer.last])


def statistics(layer: Layer, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The means and variances of the responses of a layer's neurons, [neurons] each."""
    rows = layer(inputs, weight, bias).movedim(layer.axis, -1).flatten(0, -2)
    mean = rows.mean(0)
    return mean, (rows - mean).square().mean(0)


def per_neuron(values: Tensor, weight: Tensor) -> Tensor:
    """Values [neurons] in the shape that multiplies a weight [neurons, ...]."""
    return values.view(-1, *[1] * (weight.dim() - 1))
