"""Writing what reads windows of maps, or tokens, by rules: from directions among the rows that reach a layer."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from universal.model.neurons import Order, paired
from universal.reading.calls import Layer
from universal.rules.activation import Activation
from universal.rules.dense import thresholds
from universal.rules.features import of_images
from universal.rules.filters import directions, into_stream, pooled_candidates, principal
from universal.rules.moments import Sums
from universal.rules.numbers import Numbers
from universal.rules.refitting import refitted
from universal.rules.selection import forward_selection

MANY_GROUPS = 8
ENOUGH_TO_REFIT = 200  # images: fewer would be learned by heart
PART = 100  # images whose responses to all candidates are looked at together
PLACES = 5  # along each side of the maps, at which windows are looked at
MOST_ROWS = 20_000  # of what reaches a layer


class Filters:
    """The rules, for a network whose neurons have an `order`, and images of which `one_hot` has the labels."""

    def __init__(self, order: Order, one_hot: Tensor, numbers: Numbers, generator: torch.Generator):
        self.order, self.one_hot, self.numbers, self.generator = order, one_hot, numbers, generator

    def of(self, layer: Layer, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, bias and mean responses of a layer, from its inputs of all the images."""
        rows = layer.patches(inputs, PLACES) if layer.is_convolution else of_images(inputs, -1, len(self.one_hot))[None]
        if layer.groups == 1:
            linear = layer.activation is None or Activation(layer).is_linear  # as what scales queries is
            if any(reader.pooled for reader in layer.readers) or not (layer.is_convolution or linear):
                return self.before_pooling(layer, inputs, rows[0])
            if not layer.is_convolution:
                return self.of_tokens(layer, rows[0])
        rows = rows.flatten(1, 2)[:, self.some_rows(rows)]
        weight = torch.stack([self.of_group(layer, group, values) for group, values in enumerate(rows)])
        responses = torch.einsum("gnf,gcf->ngc", rows, weight).flatten(1)
        scale, threshold, means = to_scale(layer, responses, self.numbers.active)
        order = self.order.of(layer)
        return weight.flatten(0, 1).div(scale[:, None])[order], (-threshold / scale)[order], means[order]

    def some_rows(self, rows: Tensor) -> Tensor:
        """The places of as many of the rows [groups, images, places, features] as are looked at."""
        return torch.randperm(rows.shape[1] * rows.shape[2], generator=self.generator)[:MOST_ROWS].to(rows.device)

    def of_group(self, layer: Layer, group: int, rows: Tensor) -> Tensor:
        """Directions for the neurons of a group."""
        count = layer.shape[0] // layer.groups
        if layer.groups > MANY_GROUPS:  # depthwise: a principal direction of the channel
            vectors, inverse_root = principal(rows, 4, self.numbers.whitening)
            chosen = [(group + i) % len(vectors) for i in range(count)]
            return (vectors * inverse_root[:, None])[chosen]
        return directions(rows, count, not Activation(layer).is_odd, self.numbers, self.generator)

    def before_pooling(self, layer: Layer, inputs: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of a layer of whose neurons only means over places reach the classes: of many candidates, those whose
        means say most of the labels."""
        activation, count, numbers = Activation(layer), layer.shape[0], self.numbers
        some = rows.flatten(0, 1)[self.some_rows(rows[None])]
        weight = pooled_candidates(some, rows.mean(1), self.one_hot, count, numbers, self.generator)
        weight, bias = thresholds(weight, some, activation, numbers, self.generator)
        pooled = torch.cat([
            of_images(activation(layer(part, weight.view(-1, *layer.shape[1:]), bias)), layer.axis, images).mean(1)
            for part, images in in_parts(inputs, len(self.one_hot), PART)
        ])  # fmt: skip
        kept = forward_selection(pooled, self.one_hot, count)
        kept = kept[torch.arange(count, device=kept.device) % len(kept)][self.order.of(layer)]
        weight, bias = weight[kept], bias[kept]
        if len(rows) >= ENOUGH_TO_REFIT:
            deviation = some.std(0) + numbers.deviation * some.std() + 1e-12
            sums = Sums()
            sums.add(rows.flatten(0, 1) / deviation, self.one_hot.repeat_interleave(rows.shape[1], 0))
            solved = sums.solver(True)(numbers.pooled_strength)
            weight, bias = refitted(weight, bias, activation, rows, self.one_hot, solved, deviation, numbers.damping)
        return weight, bias, (some @ weight.T + bias).mean(0)

    def of_tokens(self, layer: Layer, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of a layer of tokens that no activation follows: queries and keys, which no layer reads and which are
        the same, so that tokens attend to those like them; values; and what a block adds to the tokens."""
        compared = ~self.order.is_read(layer)
        tokens, numbers = rows.flatten(0, 1), self.numbers
        vectors, inverse_root = principal(tokens, layer.shape[0], numbers.whitening)
        weight = rows.new_zeros(layer.shape[0], rows.shape[2])
        count = int(compared.sum())
        size = paired(count, layer)
        if count:
            generator = torch.Generator().manual_seed(0)  # the same for queries and keys: which head compares what
            dealt = torch.randperm(max(size, len(vectors)), generator=generator)[:size].to(rows.device) % len(vectors)
            white = numbers.attention * vectors * inverse_root[:, None]
            weight[compared] = white[dealt].repeat(-(-count // max(size, 1)), 1)[:count]
        others = int((~compared).sum())
        if others and torch.isin(layer.neurons, self.order.summed).any():
            weight[~compared] = into_stream(tokens, rows.mean(1), self.one_hot, others, numbers, self.generator)
        elif others:
            weight[~compared] = directions(tokens, others, False, numbers, self.generator)
        weight[~compared] = weight[~compared][self.order.of(layer)[~compared].argsort().argsort()]
        return weight, -weight @ tokens.mean(0), weight.new_zeros(layer.shape[0])


def in_parts(inputs: Tensor, count: int, most: int) -> Iterator[tuple[Tensor, int]]:
    """Inputs of `count` images in parts of `most`, and how many images these are of."""
    axis = 0 if len(inputs) % count == 0 else inputs.shape.index(count)
    size = inputs.shape[axis] // count
    for part in inputs.split(most * size, axis):
        yield part, part.shape[axis] // size


def to_scale(layer: Layer, responses: Tensor, active: float) -> tuple[Tensor, Tensor, Tensor]:
    """What divides neurons, and is taken off before, so that they are on at a share of the images, `active`, and of
    deviation 1; their means then.

    `responses` [n, neurons] are those without a bias.
    """
    is_odd = Activation(layer).is_odd
    some = responses[: 2**22 // responses.shape[1]]
    # Where most responses are of one value, such as that of an empty background, a quantile may be their largest.
    threshold = torch.quantile(some, 0.5 if is_odd else 1 - active, dim=0)
    threshold = threshold.clamp(some.mean(0) - some.std(0), some.mean(0))
    after = some if is_odd else F.relu(some - threshold)
    scale = after.std(0) + 1e-5
    return scale, threshold, (some.mean(0) - threshold) / scale
