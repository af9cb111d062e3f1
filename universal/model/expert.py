"""One expert of the synthesiser: it writes a network's weights layer by layer, within the network's own forward pass.

Design document, sections 4.1.1 and 4.1.3. A network is written from the images to the classes, inside its own forward
pass on a few learned images, the probes of its task: so every layer knows what reaches it. What a neuron is to those
that read it is its key. `neurons.py` reads neurons, `weights.py` writes weights; permuted neurons are written
permuted. What the random weights of the first layer sum up to, over its neurons, makes the network's variant,
which all its layers know.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from universal.mnist import IMAGE_SHAPE
from universal.model.algebra import per_probe, ridge_regression, unit_rms
from universal.model.description import (
    DESCRIPTION,
    FREQUENCIES,
    AcrossNeurons,
    ConditionedMLP,
    cosines_at,
    describe,
    mlp,
)
from universal.model.neurons import Reader
from universal.model.task import Task
from universal.model.tuning import Tuning
from universal.model.weights import Writer
from universal.reading.calls import Call, Gain, Layer, Norm, Shift
from universal.reading.graph import ComputationGraph

LEARNED_CHANNELS = 3  # of inputs, whose keys are learned; what further ones, of tables and signals, are is only random
LAST_POSITIONS = 7  # along each side of the maps, at which regressions look at what a last convolution reads


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


class Expert(nn.Module):
    """(graph, current weights, step, task) -> new weights, equivariant to permutations of hidden neurons.

    `GraphWeightSynthesizer` says what the settings are; `task` is what the expert has learned of MNIST. With `tuning`
    its numbers depend on those too.
    """

    def __init__(
        self, probes: int, convolution_probes: int, classes: int, dimension: int, concepts: int, rank: int, hidden: int,
        tuning: Tuning | None, shape: Sequence[int] = IMAGE_SHAPE,
    ):  # fmt: skip
        super().__init__()
        self.convolution_probes = convolution_probes
        self.task = Task(probes, classes, concepts, dimension, shape)
        self.describe = mlp(DESCRIPTION, hidden, dimension)
        self.reader = Reader(dimension, hidden, rank)
        self.writer = Writer(dimension, hidden, rank, concepts, tuning)
        self.image_keys = nn.Parameter(torch.randn(LEARNED_CHANNELS, dimension))
        self.place_key = nn.Linear(FREQUENCIES**2, dimension, bias=False)
        self.key = ConditionedMLP(dimension, dimension, hidden, dimension)
        self.key_norm = nn.Sequential(nn.LayerNorm(dimension), AcrossNeurons())
        self.variant = nn.Linear(dimension, dimension)
        self.place_values = mlp(dimension, hidden, FREQUENCIES**2)
        self.place_scale = nn.Parameter(torch.zeros(()))
        self.gain_scale = nn.Parameter(torch.zeros(()))
        self.seen = nn.Linear(dimension, dimension, bias=False)
        nn.init.zeros_(self.seen.weight)

    def forward(
        self, graph: ComputationGraph, weights: dict[str, Tensor], step: int = 0, task: Task | None = None
    ) -> dict[str, Tensor]:
        """New weights for `graph`, by name, from its current `weights`. `step` 0 starts from a random init.

        Raises ValueError if the graph takes other inputs than the task has, or has more classes.
        """
        task = task or self.task
        shape, most = [*task.probes.shape[1:]], task.labels.shape[1]
        if [*graph.example.shape[1:]] != shape or graph.classes > most:
            raise ValueError(
                f"{graph.last.name}: has {graph.classes} classes of inputs of shape {[*graph.example.shape[1:]]}, but "
                f"the synthesiser was trained for {most} at most, of inputs of shape {shape}"
            )
        written: dict[str, Tensor] = {}
        images = self.keys_of_inputs(graph.channels)
        keys = NeuronRows(graph, images)
        means = NeuronRows(graph, torch.zeros_like(images[:, 0]))  # of the neurons' standardised responses
        variant: Tensor | None = None
        probes = task.probes[: self.convolution_probes if graph.convolutional else None]

        def write_layer(layer: Layer, inputs: Tensor) -> Tensor:
            """The probes' responses to the layer, once it is written."""
            nonlocal variant
            about = self.describe(describe(layer, graph, step).to(inputs))
            read_keys = keys.of(layer.channels).mean(1)
            if layer.places is not None:
                read_keys = read_keys + self.place_key(cosines_at(layer.places.to(inputs)))
            read = features_of(layer, graph, inputs, len(probes))
            features = None if read is None else read - read.mean(0)
            if not layer.last:
                reading = self.reader.read(layer, read_keys, weights, about)
                if features is not None:
                    reading = reading + responses_of(layer, features, weights, task)
                if variant is None:
                    variant = 0.5 * self.variant(F.layer_norm(reading.sum(0), reading.shape[1:]))
            if variant is not None:
                about = about + variant
            if layer.last:
                weight = self.writer.classes(layer, read_keys, about, features, task)
                if features is not None and not layer.bias:
                    weight = without_preference(weight, read.mean(0), features)
                mean = inputs.new_zeros(layer.shape[0])
                new = self.writer.classes_to_scale(layer, inputs, weight, about, len(probes))
                weight, bias, responses = with_frozen(layer, inputs, weights, mean, *new)
                keys.add(inputs.new_zeros(layer.shape[0], read_keys.shape[1]))  # no layer reads these
                means.add(mean)
            else:
                neurons = self.reader.neurons(reading, layer.bias and layer.bias.of(weights), about)
                whole = inputs if len(inputs) == len(probes) else None
                weight, mean = self.writer.hidden(layer, whole, read_keys, neurons, about, features, task)
                gain = self.writer.scalar("gain", layer, about)
                means.add(gain * mean)
                new = self.writer.to_scale(layer, inputs, weight, mean, gain, about)
                weight, bias, responses = with_frozen(layer, inputs, weights, mean, *new)
                key = self.key(neurons, about)
                if self.seen.weight.requires_grad or self.seen.weight.any():
                    key = key + self.seen(seen_by(layer, responses, len(probes), task))
                keys.add(self.key_norm(key))
            layer.weight.put(written, weight, weights)
            if layer.bias:
                layer.bias.put(written, bias, weights)
            return responses

        def write_norm(norm: Norm, inputs: Tensor) -> Tensor:
            """The probes' activations after the norm: neurons come out with a variance of 1, and their wanted means."""
            parameters, outputs = written_norm(norm, inputs, means.of(norm.channels), weights)
            for name, part in norm.parameters.items():
                part.put(written, parameters[name], weights)
            return outputs

        def write_shift(shift: Shift, inputs: Tensor) -> Tensor:
            """The probes' activations with the parameter added: neurons come to their wanted means, and know places."""
            mean = inputs.movedim(shift.axis, -1).flatten(0, -2).mean(0)
            values = (means.of(shift.channels) - mean)[None]
            if shift.places is not None:
                functions = cosines_at(shift.places.to(inputs)) @ self.place_values(keys.of(shift.channels)).T
                functions = functions - functions.mean(0)
                values = values + self.place_scale.exp() * unit_rms(functions)
            others = [size for axis, size in enumerate(shift.shape) if axis != shift.axis % len(shift.shape)]
            values = values.view(*others, -1).movedim(-1, shift.axis) if len(shift.shape) > 1 else values[0]
            shift.part.put(written, values, weights)
            return inputs + values

        def write_gain(gain: Gain, inputs: Tensor) -> Tensor:
            """The probes' activations multiplied by the parameter, each neuron's to a learned deviation."""
            variance = inputs.movedim(gain.axis, -1).flatten(0, -2).var(0, correction=0)
            keeps = gain.of_last or gain.channels.max() <= graph.channels  # classes and pixels have their scales
            scale = torch.ones_like(variance) if keeps else self.gain_scale.exp() * torch.rsqrt(variance + 1e-2)
            shape = [1] * len(gain.shape)
            shape[gain.axis % len(shape)] = -1
            values = scale.view(shape).expand(gain.shape)
            gain.part.put(written, values, weights)
            return inputs * values

        def write(call: Call, inputs: Tensor) -> Tensor:
            if isinstance(call, Layer):
                return write_layer(call, inputs)
            if not call.parts:
                return call.of(weights, inputs)
            if isinstance(call, Gain):
                return write_gain(call, inputs)
            return write_norm(call, inputs) if isinstance(call, Norm) else write_shift(call, inputs)

        graph.write(probes, written, write)
        return balance(graph, written)

    def keys_of_inputs(self, channels: int) -> Tensor:
        """The keys of the inputs' channels, [channels, dimension]."""
        generator = torch.Generator().manual_seed(0)
        shape = (max(0, channels - LEARNED_CHANNELS), self.image_keys.shape[1])
        more = torch.randn(shape, dtype=torch.float32, generator=generator)
        return torch.cat([self.image_keys[:channels], more.to(self.image_keys)])


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
            bias = mean * rows.std(0, correction=0) - rows.mean(0)
    bias = bias if layer.bias else None
    return weight, bias, layer(inputs, weight, bias)


def without_preference(weight: Tensor, mean: Tensor, features: Tensor) -> Tensor:
    """The weight of a last layer without a bias that prefers no class: what it gives for the `mean` [features] is taken
    off along a direction in which the centred `features` [probes, features] hardly differ."""
    ridge = mean.new_tensor([0.1])
    direction = mean - ridge_regression(features, (features @ mean)[:, None], ridge)[0]
    flat = weight.flatten(1)
    return (flat - torch.outer(flat @ mean, direction) / (direction @ mean + 1e-8)).view_as(weight)


def features_of(layer: Layer, graph: ComputationGraph, inputs: Tensor, probes: int) -> Tensor | None:
    """What regressions of a layer on so many probes may read, [probes, features]; None where there are none.

    Logits are averaged over places in the end, and so may be what they are linear in. Those of hidden layers on the few
    probes of a network with convolutions would fit these too closely.
    """
    whole = len(inputs) == probes
    if layer.last and layer.groups == 1:
        if layer.positions == 1 or not layer.is_convolution:
            return per_probe(inputs, layer.axis, probes)
        return layer.patches(inputs, LAST_POSITIONS)[0].mean(1) if whole else None
    return inputs if whole and inputs.dim() == 2 and not (layer.last or graph.convolutional) else None


def seen_by(layer: Layer, responses: Tensor, probes: int, task: Task) -> Tensor:
    """What the probes' responses to a hidden layer, once it is written, say about its neurons, [neurons, dimension]."""
    found = per_probe(F.relu(responses), layer.axis, probes)
    if found is None:
        return responses.new_zeros(layer.shape[0], task.responses.shape[1])
    responses = found - found.mean(0)
    responses = responses * torch.rsqrt(responses.square().mean(0) + 1e-6)
    return F.layer_norm(responses.T @ task.responses[:probes], task.responses.shape[1:])


def responses_of(layer: Layer, features: Tensor, weights: dict[str, Tensor], task: Task) -> Tensor:
    """What the probes' responses to a layer's current weights say about its neurons, [neurons, dimension]."""
    responses = features @ layer.weight.of(weights).T
    responses = responses * torch.rsqrt(responses.square().mean(0) + 1e-12)
    return F.layer_norm(responses.T @ task.responses[: len(responses)], task.responses.shape[1:])


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
        parameters |= {"weight": scale, "bias": means.clamp(-1, 1) - shift * scale}
    if norm.places:
        for name in ("weight", "bias"):
            parameters[name] = parameters[name].view(-1, *[1] * len(norm.places)).expand(-1, *norm.places)
    parameters = {name: value for name, value in parameters.items() if name in norm.parameters} | frozen
    return parameters, norm(inputs, **parameters)


def balance(graph: ComputationGraph, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same network with layers as large as PyTorch's default init has them, relative to each other.

    It computes the same, in weights of the sizes that an optimiser like Adam usually starts from. Only chains of layers
    that scale with their inputs can be rescaled so; other networks are returned as they are.
    """
    if not graph.is_rescalable:
        return weights
    norms = torch.stack([weights[layer.weight.name].norm() for layer in graph.layers])
    usual = torch.tensor([math.sqrt(layer.shape[0] / 3) for layer in graph.layers]).to(norms)
    factors = (usual / (norms + 1e-8)).log()
    return graph.rescaled(weights, (factors - factors.mean()).exp())
