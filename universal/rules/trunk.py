"""Writing what comes before the dense layers of a network, within its own forward pass.

Convolutions are written as it was learned, from a few of the images (`universal.model.writing`), or by rules, as are
those of tokens; norms, gains and shifts from what reaches them.
"""

from collections import ChainMap
from itertools import takewhile

import torch
from torch import Tensor

from universal.model.neurons import Order
from universal.model.sizes import bounded
from universal.model.synthesizer import GraphWeightSynthesizer, trunk_end
from universal.model.writing import LearnedLayers, NeuronRows
from universal.reading.calls import Gain, Layer, Norm, Operation, Shift
from universal.reading.graph import ComputationGraph
from universal.rules.numbers import BY_HAND, Numbers
from universal.rules.windows import PART, Filters, in_parts

ENOUGH = 2**22  # activations for the statistics of a norm
# What activations are multiplied by changes them little: the product of two that say something of an image, each as
# much, says less than either.
GATED = 0.1


class Trunk:
    """A pass of labelled images through a `graph`, in which its layers are written from the random init `own`.

    `images` are [n, *shape], `one_hot` [n, classes]. With a `synthesizer`, layers are as it has learned to write them
    from the first `probes` images, but for those of which rules know more. `written` is what there is so far, by name,
    and `means` are the mean responses of its neurons. It can be differentiated by what is learned.
    """

    def __init__(
        self, graph: ComputationGraph, own: dict[str, Tensor], images: Tensor, one_hot: Tensor,
        synthesizer: GraphWeightSynthesizer | None = None, probes: int | None = None, numbers: Numbers = BY_HAND,
    ):  # fmt: skip
        if synthesizer is not None and not any(map(is_ruled, graph.layers)):
            images, one_hot = images[:probes], one_hot[:probes]
        self.graph, self.own, self.images, self.numbers = graph, own, images, numbers
        self.written: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(fingerprint(graph, own))
        self.order = Order(graph, own)
        self.filters = Filters(self.order, one_hot, numbers, self.generator)
        self.means = NeuronRows(graph, images.new_zeros(graph.channels))
        self.learned: LearnedLayers | None = None
        if synthesizer is not None:
            known = synthesizer.probes(images[:probes], one_hot[:probes])
            self.learned = LearnedLayers(synthesizer, graph, self.order, known)

    @property
    def weights(self) -> ChainMap:
        """Those of the network as far as it is written, by name."""
        return ChainMap(self.written, self.own)

    def write_up_to(self, end: Layer) -> dict[str, Tensor]:
        """Everything before a layer, by name."""
        self.graph.write(self.images, self.written, self.write_operation, end)
        return self.written

    def write_operation(self, operation: Operation, inputs: Tensor) -> Tensor:
        """Write an operation's parameters; what it then gives for the images' `inputs`."""
        if isinstance(operation, Layer):
            return self.write_layer(operation, inputs)
        if isinstance(operation, Norm) and operation.parts:
            means = self.means.of(operation.channels).to(inputs)
            parameters = norm_parameters(operation, some_of(inputs, len(self.images)), means, self.own)
            for name, part in operation.parameters.items():
                part.put(self.written, parameters[name], self.own)
        elif isinstance(operation, Shift) and operation.parts:
            values = torch.ones(operation.shape) if isinstance(operation, Gain) else self.places(operation, inputs)
            operation.part.put(self.written, operation.parameter(values.to(inputs)), self.own)
        return operation.of(self.weights, inputs)

    def write_layer(self, layer: Layer, inputs: Tensor) -> Tensor:
        """What the images' `inputs` become by a layer that it writes."""
        given = None
        if layer.weight.frozen:
            given = self.frozen(layer, inputs)
        elif self.learned is None or is_ruled(layer):
            with torch.no_grad():
                given = self.filters.of(layer, inputs)
        if self.learned is None:
            self.put(layer, *given)
            return layer.of(self.weights, inputs)
        probes = len(self.learned.probes.images)
        some = inputs if len(self.images) == probes else next(in_parts(inputs, len(self.images), probes))[0]
        *new, responses = self.learned.of(layer, some, given)
        self.put(layer, *new)
        as_is = some is inputs and layer.gate is None and not (layer.bias and layer.bias.frozen)
        return responses if as_is else layer.of(self.weights, inputs)

    def put(self, layer: Layer, weight: Tensor, bias: Tensor | None, means: Tensor) -> None:
        """Let a layer have this weight and bias, and so the mean responses `means`."""
        gate = layer.gate
        if gate is not None and (layer.bias or not gate.offset):
            weight = gate.damped(weight, GATED)
            bias, means = (
                values if values is None else gate.damped(values, GATED) + gate.offset * gate.neurons.to(values)
                for values in (bias, means)
            )
        layer.weight.put(self.written, bounded(weight.view(layer.shape)), self.own)
        if layer.bias:
            layer.bias.put(self.written, bounded(bias), self.own)
        self.means.add(means.to(self.means.rows))

    def frozen(self, layer: Layer, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weight of a layer that keeps it, the bias that brings its responses to a mean of 0, and this."""
        weight = layer.weight.of(self.own)
        bias = -layer(inputs, weight).movedim(layer.axis, -1).flatten(0, -2).mean(0)
        return weight, bias, torch.zeros_like(bias)

    def places(self, shift: Shift, inputs: Tensor) -> Tensor:
        """What is added to activations: nothing, or what tells places apart, as large as the activations."""
        if shift.places is None:
            return torch.zeros(shift.shape)
        random = torch.randn(shift.shape, dtype=torch.float32, generator=self.generator)
        spread = inputs.movedim(shift.axis, -1).flatten(0, -2).abs().mean(0)  # by which channels are told apart
        size = inputs.std().cpu() * self.numbers.places
        return size * random.index_select(shift.axis, spread.argsort().argsort().cpu())


def norm_parameters(norm: Norm, inputs: Tensor, means: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a norm by which neurons come out with a variance of 1 and these `means`.

    The classes keep their scales. Running statistics are those of `inputs`. What is frozen is as in `weights`.
    """
    frozen = {name: part.of(weights) for name, part in norm.parameters.items() if part.frozen}

    def statistics(values: Tensor) -> tuple[Tensor, Tensor]:
        rows = values.movedim(norm.axis, -1).flatten(0, -2)
        mean = rows.mean(0)
        return mean, (rows - mean).square().mean(0)  # `var` takes three times as long

    mean, variance = statistics(inputs)
    parameters = {"running_mean": mean, "running_var": variance}
    running = {name: value for name, value in parameters.items() if name in norm.parameters}
    shift, spread = statistics(norm(inputs, **running))
    if norm.of_last:
        parameters |= {"weight": variance.mean().sqrt().expand(mean.shape), "bias": torch.zeros_like(mean)}
    else:
        own = frozen.get("weight")
        scale = torch.rsqrt(spread + 1e-2) if own is None else own.reshape(len(mean), -1).mean(1)
        if own is None and norm.gate is not None and not norm.gate.offset:
            scale = norm.gate.damped(scale, GATED)
        parameters |= {"weight": scale, "bias": bounded(means.clamp(-1, 1) - shift * scale)}
    if norm.places:
        for name in ("weight", "bias"):
            parameters[name] = parameters[name].view(-1, *[1] * len(norm.places)).expand(-1, *norm.places)
    return {name: value for name, value in parameters.items() if name in norm.parameters} | frozen


def some_of(inputs: Tensor, count: int) -> Tensor:
    """The inputs of as many of `count` images as statistics are taken from."""
    if inputs.numel() <= ENOUGH or count not in inputs.shape:
        return inputs
    return next(in_parts(inputs, count, max(PART, ENOUGH * count // inputs.numel())))[0]


def is_ruled(layer: Layer) -> bool:
    """Whether rules know more of a layer than what was learned: of one of tokens, and of a convolution that is read as
    tokens, or as means over places, alone."""
    if not layer.is_convolution:
        return is_of_tokens(layer)
    alone = bool(layer.readers) and all(reader.pooled or is_of_tokens(reader) for reader in layer.readers)
    return alone and layer.groups == 1


def has_learned(graph: ComputationGraph) -> bool:
    """Whether a synthesiser has learned to write anything before the dense layers."""
    end = trunk_end(graph)
    before = takewhile(lambda layer: layer is not end, graph.layers)
    return any(not layer.weight.frozen and not is_ruled(layer) for layer in before)


def is_of_tokens(layer: Layer) -> bool:
    return not layer.is_convolution and layer.resolution > 1


def fingerprint(graph: ComputationGraph, own: dict[str, Tensor]) -> int:
    """A number that depends on the weights of the layers, but not on the order of their neurons."""
    bits = (layer.weight.of(own).contiguous().view(torch.int32).long().sum().item() for layer in graph.layers)
    return sum(bits) % 2**63
