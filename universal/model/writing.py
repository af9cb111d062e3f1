"""Writing layers as they were learned to be written, within a network's own forward pass.

Design document, sections 4.1.1 and 4.1.3. A network is written from the images on, inside its own forward pass on a few
labelled images, the probes: so every layer knows what reaches it. What a neuron is to those that read it is its key.
`neurons.py` says what each is to be, by its place among the random weights of its layer, so that permuted neurons are
written permuted; `weights.py` writes the weights.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from universal.model.algebra import per_probe, ridge_regression, unit_rms
from universal.model.description import cosines_at, description_of
from universal.model.neurons import Order
from universal.model.sizes import bounded
from universal.reading.calls import Gain, Layer, Norm, Operation, Shift
from universal.reading.graph import ComputationGraph

if TYPE_CHECKING:
    from universal.model.synthesizer import GraphWeightSynthesizer

MOST_RESPONSES = 2048  # from which the mixtures of neurons are found that frozen ones are like


class Probes(NamedTuple):
    """Labelled images that layers are written from."""

    images: Tensor  # [n, *shape]
    concepts: Tensor  # [n, concepts], what neurons may stand for
    responses: Tensor  # [n, dimension], what it says of a neuron to respond to an image


class NeuronRows:
    """A row for each neuron that activations are of, in the order of their numbers.

    It starts with that of none, zeros, and those of the images' channels. The row of a sum of neurons is the sum of
    theirs.
    """

    def __init__(self, graph: ComputationGraph, images: Tensor):
        self.rows = torch.cat([torch.zeros_like(images[:1]), images])
        self.waiting = graph.neurons.blocks[:0:-1]
        self.written = {layer.index for layer in graph.layers}

    def of(self, numbers: Tensor) -> Tensor:
        """The rows of the neurons with these numbers."""
        while self.waiting and self.waiting[-1][1] not in self.written:
            count, _, pairs = self.waiting.pop()
            unknown = self.rows.new_zeros(count, *self.rows.shape[1:])  # of a layer that is left as it is
            self.rows = torch.cat([self.rows, unknown if pairs is None else self.at(pairs).sum(1)])
        return self.at(numbers)

    def at(self, numbers: Tensor) -> Tensor:
        """The rows at these numbers. Unlike that of indexing, its gradient is the same whatever the threads do."""
        rows = self.rows if self.rows.dim() > 1 else self.rows[:, None]
        return F.embedding(numbers.to(rows.device), rows).view(*numbers.shape, *self.rows.shape[1:])

    def add(self, rows: Tensor) -> None:
        """Add the rows of the layer that comes next."""
        self.of(torch.zeros(0, dtype=torch.long))
        self.waiting.pop()
        self.rows = torch.cat([self.rows, rows])


class Writing:
    """The learned part of a pass through a graph, by a `synthesizer`, from `probes` and the random init `weights`.

    `written` is what it has written so far, by name; `keys` and `means` say what it made of the neurons, these of
    their standardised responses.
    """

    def __init__(
        self, synthesizer: "GraphWeightSynthesizer", graph: ComputationGraph, weights: dict[str, Tensor], probes: Probes
    ):
        self.synthesizer, self.graph, self.weights, self.probes = synthesizer, graph, weights, probes
        images = synthesizer.keys_of_inputs(graph.channels)
        self.keys, self.means = NeuronRows(graph, images), NeuronRows(graph, torch.zeros_like(images[:, 0]))
        self.order = Order(graph, weights)
        self.written: dict[str, Tensor] = {}

    def write_up_to(self, end: Layer) -> dict[str, Tensor]:
        """Everything before a layer, by name."""
        self.graph.write(self.probes.images, self.written, self.write_operation, end)
        return self.written

    def write_operation(self, operation: Operation, inputs: Tensor) -> Tensor:
        """Write an operation's parameters; what it then gives for the probes' `inputs`."""
        if not operation.parts and not isinstance(operation, Layer):
            return operation.of(self.weights, inputs)
        writers = {Layer: self.write_layer, Norm: self.write_norm, Gain: self.write_gain, Shift: self.write_shift}
        return next(write for kind, write in writers.items() if isinstance(operation, kind))(operation, inputs)

    def write_layer(
        self, layer: Layer, inputs: Tensor, given: tuple[Tensor, Tensor | None, Tensor] | None = None
    ) -> Tensor:
        """The probes' responses to the layer, as it is learned to be, or of a `given` weight, bias and mean."""
        synthesizer, writer, count = self.synthesizer, self.synthesizer.writer, len(self.probes.images)
        about = synthesizer.describe(description_of(layer, self.graph).to(inputs))
        keys = self.keys.of(layer.channels).mean(1)
        if layer.places is not None:
            keys = keys + synthesizer.place_key(cosines_at(layer.places.to(inputs)))
        neurons = synthesizer.neurons(layer, keys, self.order.roles(layer), about)
        whole = inputs if len(inputs) == count else None
        weight, mean = writer.hidden(layer, whole, keys, neurons, about, self.probes.concepts)
        gain = writer.scalar("gain", about)
        new = writer.to_scale(layer, inputs, weight, mean, gain, about)
        if given is None:
            weight, bias, responses = with_frozen(layer, inputs, self.weights, mean, *new)
            means = gain * mean
        else:
            weight, bias, means = given
            responses = layer(inputs, weight, bias)
        self.means.add(means)
        key = synthesizer.key(neurons, about) + synthesizer.seen(seen_by(layer, new[2], self.probes))
        key = synthesizer.key_norm(key)
        if layer.weight.frozen or given is not None:
            key = synthesizer.key_norm(mixtures_like(layer, new[2], responses) @ key)
        self.keys.add(key)
        layer.weight.put(self.written, weight, self.weights)
        if layer.bias:
            layer.bias.put(self.written, bias, self.weights)
        return responses

    def write_norm(self, norm: Norm, inputs: Tensor) -> Tensor:
        """The probes' activations after the norm: neurons come out with a variance of 1, and their wanted means."""
        parameters, outputs = written_norm(norm, inputs, self.means.of(norm.channels), self.weights)
        for name, part in norm.parameters.items():
            part.put(self.written, parameters[name], self.weights)
        return outputs

    def write_shift(self, shift: Shift, inputs: Tensor) -> Tensor:
        """The probes' activations with the parameter added: neurons come to their wanted means, and know places."""
        mean = inputs.movedim(shift.axis, -1).flatten(0, -2).mean(0)
        values = (self.means.of(shift.channels) - mean)[None]
        if shift.places is not None:
            functions = self.synthesizer.place_values(self.keys.of(shift.channels))
            functions = cosines_at(shift.places.to(inputs)) @ functions.T
            functions = functions - functions.mean(0)
            values = values + self.synthesizer.place_scale.exp() * unit_rms(functions)
        others = [size for axis, size in enumerate(shift.shape) if axis != shift.axis % len(shift.shape)]
        values = values.view(*others, -1).movedim(-1, shift.axis) if len(shift.shape) > 1 else values[0]
        values = bounded(shift.parameter(values))
        shift.part.put(self.written, values, self.weights)
        return shift(inputs, values)

    def write_gain(self, gain: Gain, inputs: Tensor) -> Tensor:
        """The probes' activations multiplied by the parameter, each neuron's to a learned deviation."""
        variance = inputs.movedim(gain.axis, -1).flatten(0, -2).var(0, correction=0)
        keeps = gain.of_last or gain.channels.max() <= self.graph.channels  # classes, pixels: as they are
        scale = torch.ones_like(variance) if keeps else self.synthesizer.gain_scale.exp() * torch.rsqrt(variance + 1e-2)
        shape = [1] * len(gain.shape)
        shape[gain.axis % len(shape)] = -1
        values = bounded(gain.parameter(scale.view(shape).expand(gain.shape)))
        gain.part.put(self.written, values, self.weights)
        return gain(inputs, values)


def with_frozen(
    layer: Layer, inputs: Tensor, weights: dict[str, Tensor], mean: Tensor, weight: Tensor, bias: Tensor | None,
    responses: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """A layer's weight and bias, and its responses to `inputs`, with what is frozen as in `weights`.

    The bias of a frozen weight brings its neurons to so many deviations, `mean`, in the mean.
    """
    if not any(part.frozen for part in (layer.weight, layer.bias) if part):
        return weight, bias, responses
    if layer.bias and layer.bias.frozen:
        bias = layer.bias.of(weights)
    if layer.weight.frozen:
        weight = layer.weight.of(weights)
        if layer.bias and not layer.bias.frozen:
            rows = layer(inputs, weight).movedim(layer.axis, -1).flatten(0, -2)
            bias = bounded(mean * rows.std(0, correction=0) - rows.mean(0))
    bias = bias if layer.bias else None
    return weight, bias, layer(inputs, weight, bias)


def mixtures_like(layer: Layer, written: Tensor, own: Tensor) -> Tensor:
    """The mixtures of a layer's neurons as `written` that respond to the probes as its `own`, frozen ones, do,
    [neurons, neurons]. As keys say what neurons are written, those of frozen ones are mixtures of them."""
    rows = [F.relu(responses.movedim(layer.axis, -1).flatten(0, -2)) for responses in (written, own)]
    every = -(-len(rows[0]) // MOST_RESPONSES)
    features, targets = (some[::every] - some.mean(0) for some in rows)
    features, targets = (some * torch.rsqrt(some.square().mean(0) + 1e-6) for some in (features, targets))
    return ridge_regression(features, targets, features.new_tensor([0.01]))


def seen_by(layer: Layer, responses: Tensor, probes: Probes) -> Tensor:
    """What the probes' responses to a layer, once it is written, say about its neurons, [neurons, dimension]."""
    found = per_probe(F.relu(responses), layer.axis, len(probes.images))
    if found is None:
        return responses.new_zeros(layer.shape[0], probes.responses.shape[1])
    responses = found - found.mean(0)
    responses = responses * torch.rsqrt(responses.square().mean(0) + 1e-6)
    return F.layer_norm(responses.T @ probes.responses, probes.responses.shape[1:])


def written_norm(
    norm: Norm, inputs: Tensor, means: Tensor, weights: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """The parameters of a norm by which neurons come out with a variance of 1 and these `means`; and what comes out.

    The classes keep their scales. Running statistics are those of `inputs`. What is frozen is as in `weights`.
    """
    frozen = {name: part.of(weights) for name, part in norm.parameters.items() if part.frozen}

    def statistics(values: Tensor) -> tuple[Tensor, Tensor]:
        rows = values.movedim(norm.axis, 0).flatten(1)
        return rows.mean(1), rows.var(1, correction=0)

    mean, variance = statistics(inputs)
    parameters = {"running_mean": mean, "running_var": variance}
    running = {name: value for name, value in parameters.items() if name in norm.parameters}
    shift, spread = statistics(norm(inputs, **running))
    if norm.of_last:
        parameters |= {"weight": variance.mean().sqrt().expand(mean.shape), "bias": torch.zeros_like(mean)}
    else:
        own = frozen.get("weight")
        scale = torch.rsqrt(spread + 1e-2) if own is None else own.reshape(len(mean), -1).mean(1)
        parameters |= {"weight": scale, "bias": bounded(means.clamp(-1, 1) - shift * scale)}
    if norm.places:
        for name in ("weight", "bias"):
            parameters[name] = parameters[name].view(-1, *[1] * len(norm.places)).expand(-1, *norm.places)
    parameters = {name: value for name, value in parameters.items() if name in norm.parameters} | frozen
    return parameters, norm(inputs, **parameters)
