"""Layers as they were learned to be written, within a network's own forward pass.

Design document, sections 4.1.1 and 4.1.3. A network is written from the images on, inside its own forward pass on a few
labelled images, the probes: so every layer knows what reaches it. What a neuron is to those that read it is its key.
`neurons.py` says what each is to be, by its place among the random weights of its layer, so that permuted neurons are
written permuted; `weights.py` writes the weights.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from universal.model.algebra import per_probe, ridge_regression
from universal.model.description import cosines_at, description_of
from universal.model.neurons import Order
from universal.reading.calls import Layer
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


class LearnedLayers:
    """The layers of a `graph` as a `synthesizer` has learned to write them from `probes`, in the order of the pass.

    `keys` say what the neurons of those that there were are to the ones that read them.
    """

    def __init__(self, synthesizer: "GraphWeightSynthesizer", graph: ComputationGraph, order: Order, probes: Probes):
        self.synthesizer, self.graph, self.order, self.probes = synthesizer, graph, order, probes
        self.keys = NeuronRows(graph, synthesizer.keys_of_inputs(graph.channels))

    def of(
        self, layer: Layer, inputs: Tensor, given: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """The weight, bias and mean responses of the next layer, and its responses to the probes, whose `inputs` reach
        it. The former may be `given`: they are then not as learned, but known to what is."""
        synthesizer, writer = self.synthesizer, self.synthesizer.writer
        about = synthesizer.describe(description_of(layer, self.graph).to(inputs))
        keys = self.keys.of(layer.channels).mean(1)
        if layer.places is not None:
            keys = keys + synthesizer.place_key(cosines_at(layer.places.to(inputs)))
        neurons = synthesizer.neurons(layer, keys, self.order.roles(layer), about)
        if given is None or layer.weight.frozen:
            whole = inputs if len(inputs) == len(self.probes.images) else None
            weight, mean = writer.hidden(layer, whole, keys, neurons, about, self.probes.concepts)
            gain = writer.scalar("gain", about)
            weight, bias, learned = writer.to_scale(layer, inputs, weight, mean, gain, about)
            new, responses = (weight, bias, gain * mean), learned
        if given is not None:
            new, (weight, bias, _) = given, given
            responses = layer(inputs, weight.view(layer.shape), bias if layer.bias else None)
        seen = synthesizer.seen(seen_by(layer, learned if layer.weight.frozen else responses, self.probes))
        key = synthesizer.key_norm(synthesizer.key(neurons, about) + seen)
        if layer.weight.frozen:  # what has no role is like a mixture of what has
            key = synthesizer.key_norm(mixtures_like(layer, learned, responses) @ key)
        self.keys.add(key)
        return *new, responses

    def leave_out(self, layer: Layer) -> None:
        """The next layer is one that no learned one reads."""
        self.keys.add(self.keys.rows.new_zeros(layer.shape[0], self.keys.rows.shape[1]))


def mixtures_like(layer: Layer, learned: Tensor, own: Tensor) -> Tensor:
    """The mixtures of a layer's neurons as `learned` that respond to the probes as its `own`, frozen ones, do,
    [neurons, neurons]."""
    rows = [F.relu(responses.movedim(layer.axis, -1).flatten(0, -2)) for responses in (learned, own)]
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
