"""Writing a network from labelled images, layer by layer, within its own forward pass.

The module runs on a few hundred images, and each layer is written where it is first used, from the inputs that reach it
and the labels. A dense layer is a regression of all images, for which the module runs up to that layer on them.
"""

import math
import time
import warnings
from collections import ChainMap
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from universal.data.labelled import HELD_OUT, JUDGING, MOST_IMAGES, LabelledImages
from universal.model.looking import DoubtfulWeights
from universal.model.sizes import bounded
from universal.model.synthesizer import random_weights
from universal.model.writing import NeuronRows, written_norm
from universal.reading.calls import Gain, Layer, Norm, Operation, Shift
from universal.reading.graph import ComputationGraph
from universal.rules.classes import classifier
from universal.rules.activation import Activation
from universal.rules.dense import CANDIDATES, Context
from universal.rules.features import Chunk, Features, chunk_size, features_of, of_images
from universal.rules.filters import Rows, directions
from universal.rules.selection import forward_selection

FIRST = 600  # images that all layers but dense ones are written from
PLACES = 5  # along each side of the maps, at which windows are looked at
MOST_ROWS = 20_000  # of what reaches a layer
ACTIVE = 0.6  # the share of the images at which a neuron is on
THRESHOLDS = (0.3, 0.8)  # between which shares of the images a dense neuron is on
FEWEST = 20  # images to choose by
ROOM = 2**26  # elements that a layer gives of the images that are written from


class Accounts(NamedTuple):
    """What was written of a network, and how it does.

    Every parameter and buffer, by name: those `written`, and those `left` as they were; of those of which only a part
    is used, both. `count` is how many numbers were written. `held_out_percent` is the accuracy on the images that were
    held out, a fifth, with a last layer that is regressed on the others only; None if there are none. `missing` are the
    classes without an image.
    """

    written: list[str]
    left: list[str]
    count: int
    images: int
    missing: list[int]
    held_out_percent: float | None
    seconds: float


def synthesize(module: nn.Module, images, labels: Tensor | None = None, seed: int | None = None, limit: int = MOST_IMAGES) -> nn.Module:
    """`write` the weights of `module` in place, and return it."""
    write(module, images, labels, seed, limit)
    return module


@torch.no_grad()
def write(
    module: nn.Module, images, labels: Tensor | None = None, seed: int | None = None, limit: int = MOST_IMAGES
) -> Accounts:  # fmt: skip
    """Write the weights of `module` in place for labelled images, in closed form; what came of it.

    `images` are a tensor as the module takes them, with `labels` [N], or a Dataset or DataLoader of pairs; of more than
    `limit`, so many are used. What is random comes from the random init that the module has, or with `seed` from a
    fresh one. Parameters with `requires_grad=False` are kept. Raises ValueError, in one line, for images, labels or
    modules that do not go together or cannot be read; then nothing is changed.
    """
    start = time.perf_counter()
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    data = LabelledImages(images, labels, 0 if seed is None else seed, limit, device)
    graph = ComputationGraph(module, data.sample.images[:2].cpu())
    if max(data.present) >= graph.classes:
        raise ValueError(f"a label is {max(data.present)}, but {type(graph.module).__name__} has {graph.classes} outputs")
    own = graph.weights() | ({} if seed is None else random_weights(graph, seed))
    writing = Writing(graph, data, {name: tensor.to(device) for name, tensor in own.items()})
    written = writing.write()
    state = graph.state()
    broken = next((name for name, tensor in written.items() if not tensor.isfinite().all()), None)
    if broken is not None:
        raise ValueError(f"{broken}: cannot be written: the network makes NaN or infinite values of the images")
    for name in graph.written:
        state[name].copy_(written.get(name, torch.ones(())))  # of batches, a norm has seen one
    missing = sorted({*range(graph.classes)} - {*data.present})
    return Accounts(
        graph.with_tied(graph.written), graph.with_tied(graph.left), graph.count, data.count, missing,
        writing.held_out_percent, time.perf_counter() - start,
    )  # fmt: skip


class Writing:
    """The one pass in which everything is written: `written`, by name."""

    def __init__(self, graph: ComputationGraph, data: LabelledImages, own: dict[str, Tensor]):
        self.graph, self.data, self.own = graph, data, own
        self.written: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(fingerprint(graph, own))
        self.first = min(FIRST, chunk_size(graph, data.shape, ROOM))
        self.images, self.labels = (values[: self.first] for values in data.sample[:2])
        self.means = NeuronRows(graph, torch.zeros(len(graph.channels) if hasattr(graph.channels, "__len__") else graph.channels))
        self.features: Features | None = None  # of the last dense layer so far
        self.held_out_percent: float | None = None

    def write(self) -> dict[str, Tensor]:
        self.graph.write(self.images, self.written, self.write_operation)
        return self.written

    def write_operation(self, operation: Operation, inputs: Tensor) -> Tensor:
        """Write an operation's parameters; what it then gives for the first images' `inputs`."""
        if isinstance(operation, Layer):
            self.write_layer(operation, inputs)
        elif isinstance(operation, Norm) and operation.parts:
            means = self.means.of(operation.channels).to(inputs)
            parameters, _ = written_norm(operation, inputs, means, self.own)
            for name, part in operation.parameters.items():
                part.put(self.written, parameters[name], self.own)
        elif isinstance(operation, Shift) and operation.parts:
            values = torch.ones(operation.shape) if isinstance(operation, Gain) else self.places(operation, inputs)
            operation.part.put(self.written, operation.parameter(values.to(inputs)), self.own)
        return operation.of(self.weights, inputs)

    @property
    def weights(self) -> ChainMap:
        return ChainMap(self.written, self.own)

    def places(self, shift: Shift, inputs: Tensor) -> Tensor:
        """What is added to activations: nothing, or what tells places apart, as large as the activations."""
        if shift.places is None:
            return torch.zeros(shift.shape)
        return inputs.std().cpu() * torch.randn(shift.shape, generator=self.generator)

    def write_layer(self, layer: Layer, inputs: Tensor) -> None:
        read = features_of(layer, inputs, len(self.images))
        if not layer.parts:
            return
        if read is None:
            weight, bias = self.from_rows(layer, inputs)
        else:
            self.features = Features(self.graph, layer, self.data, dict(self.weights), self.features)
            weight, bias = (self.of_classes if layer.last else self.dense)(layer, self.features)
        if read is not None or layer.groups == 1:
            weight = weight.view(layer.shape)
        if not layer.last:
            order = own_order(layer, self.own)
            weight, bias = weight[order], bias[order]
        layer.weight.put(self.written, bounded(weight), self.own)
        if layer.bias:
            layer.bias.put(self.written, bounded(bias), self.own)

    # ---- windows and tokens

    def from_rows(self, layer: Layer, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of a layer that reads windows of maps, or tokens."""
        groups, count = layer.groups, layer.shape[0] // layer.groups
        if layer.is_convolution:
            rows = layer.patches(inputs, PLACES).flatten(1, 2)
        else:
            rows = of_images(inputs, -1, len(self.images)).flatten(0, 1)[None]
        labels = self.labels.repeat_interleave(rows.shape[1] // len(self.images))
        some = torch.randperm(len(labels), generator=self.generator)[:MOST_ROWS].to(labels.device)
        rows, labels = rows[:, some], labels[some]
        both_signs, parts = not is_odd(layer) and (layer.activation is not None or layer.normalised), []
        for group in range(groups):
            of_group = Rows(rows[group], labels, len(self.data.present))
            if groups > 8:  # depthwise: a principal direction of the channel
                wanted = 2 * min(4, rows.shape[2] // 2)
                parts.append(directions(of_group, wanted, True, self.generator)[[(group + i) % 4 for i in range(count)]])
            else:
                parts.append(directions(of_group, count, both_signs, self.generator))
        weight = torch.stack(parts)
        responses = torch.einsum("gnf,gcf->ngc", rows, weight).flatten(1)
        scale, threshold, mean = to_scale(layer, responses)
        self.means.add(mean.cpu())
        return weight.flatten(0, 1).div(scale[:, None]).view(layer.shape), -threshold / scale

    # ---- dense layers

    def dense(self, layer: Layer, features: Features) -> tuple[Tensor, Tensor]:
        """Weight and bias of a hidden dense layer: of the candidates, those that say most of what was held out."""
        activation, sample = Activation(layer), features.sample()
        context = Context(layer, features, sample, len(self.data.present), self.generator, not activation.is_odd)
        weight = torch.cat([rule(context) for rule in CANDIDATES.values()])
        judged = sample.folds == JUDGING
        judged = judged if judged.sum() >= FEWEST else sample.folds != HELD_OUT
        responses = sample.features[judged] @ weight.T
        deviation = responses.std(0) + 1e-6
        weight, responses = weight / deviation[:, None], responses / deviation
        low, high = (0.5, 0.5) if activation.is_linear else THRESHOLDS
        shares = low + (high - low) * torch.rand(len(weight), generator=self.generator).to(weight)
        ranks = ((1 - shares) * (len(responses) - 1)).long()
        threshold = responses.sort(0).values.gather(0, ranks[None])[0]
        labels = F.one_hot(sample.labels[judged], len(self.data.present)).to(responses)
        kept = forward_selection(activation(responses - threshold), labels, layer.shape[0])
        kept = kept[torch.arange(layer.shape[0], device=kept.device) % len(kept)]
        self.means.add((responses.mean(0) - threshold)[kept].cpu())
        return weight[kept], -threshold[kept]

    def of_classes(self, layer: Layer, features: Features) -> tuple[Tensor, Tensor]:
        """Weight and bias of the last layer."""
        regression, self.held_out_percent = classifier(features, len(self.data.present), layer.bias is not None)
        present = torch.tensor(self.data.present)
        weight, bias = regression.weight.new_zeros(layer.shape), regression.bias.new_zeros(layer.shape[0])
        weight.view(layer.shape[0], -1)[present], bias[present] = regression.weight.T, regression.bias
        return weight, bias


def fingerprint(graph: ComputationGraph, own: dict[str, Tensor]) -> int:
    """A number that depends on the weights of the layers, but not on the order of their neurons."""
    bits = (layer.weight.of(own).contiguous().view(torch.int32).long().sum().item() for layer in graph.layers)
    return sum(bits) % 2**63


def own_order(layer: Layer, own: dict[str, Tensor]) -> Tensor:
    """The place of each neuron among those of its group, by its own random weights, so that permuted neurons are
    written permuted: [neurons]."""
    sums = layer.weight.of(own).flatten(1).double().sum(1).view(layer.groups, -1)
    places = sums.argsort(1).argsort(1) + torch.arange(layer.groups, device=sums.device)[:, None] * sums.shape[1]
    return places.flatten()


def is_odd(layer: Layer) -> bool:
    """Whether the function after a layer is odd about 0: then a direction and its opposite say the same."""
    values = layer.activation
    return values is not None and all(abs(values[3 + i] + values[3 - i] - 2 * values[3]) < 0.05 for i in (1, 2, 3))


def to_scale(layer: Layer, responses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What divides neurons, and is taken off before, so that they are ACTIVE and of deviation 1; their means then.

    `responses` [n, neurons] are those without a bias.
    """
    linear = is_odd(layer) or (layer.activation is None and not layer.normalised)
    some = responses[: 2**22 // responses.shape[1]]
    # Where most responses are of one value, such as that of an empty background, a quantile may be their largest.
    threshold = torch.quantile(some, 0.5 if linear else 1 - ACTIVE, dim=0)
    threshold = threshold.clamp(some.mean(0) - some.std(0), some.mean(0))
    after = some if linear else F.relu(some - threshold)
    scale = after.std(0) + 1e-5
    return scale, threshold, (some.mean(0) - threshold) / scale
