"""Writing a network from labelled images, layer by layer, within its own forward pass.

The module runs on a few hundred images, and each layer is written where it is first used, from the inputs that reach it
and the labels. A dense layer is a regression of all images, for which the module runs up to that layer on them.
"""

import math
import time
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from universal.data.labelled import HELD_OUT, JUDGING, MOST_IMAGES, LabelledImages, agreed
from universal.model.balance import balance
from universal.model.sizes import bounded
from universal.model.synthesizer import GraphWeightSynthesizer, default_synthesizer, random_weights, trunk_end
from universal.reading.calls import Layer, Operation
from universal.reading.graph import ComputationGraph
from universal.rules.activation import Activation
from universal.rules.classes import classifier
from universal.rules.dense import dense_layer
from universal.rules.features import Chunk, Features, chunk_size, features_of, in_fastest_order
from universal.rules.judging import judged
from universal.rules.looking import DoubtfulWeights, doubt, lost
from universal.rules.numbers import BY_HAND, Numbers
from universal.rules.trunk import Trunk, fingerprint, has_learned

PROBES = 300  # images that the learned layers are written from
JUDGES = 1500  # images by which it is chosen how layers before dense ones are written
ALIKE = 0.02  # a share of the loss, within which the learned ones are taken
LOOKED_AT = 100  # images held out that a written network is looked at with
LOST_OF, LOST_BY = 400, 1000  # those by which it is told what it loses, and others from which its layers know that
FIRST, FIRST_TO_CHOOSE = 600, 6000  # images that all but dense layers are written from; some by what the labels say
ENOUGH_TO_PART = 250  # images in each part of what hidden dense layers are made from
ROOM = 2**26  # elements that a layer gives of the images that are written from


class Accounts(NamedTuple):
    """What was written of a network, and how it does.

    Every parameter and buffer, by name: those `written`, and those `left` as they were; of those of which only a part
    is used, both. `count` is how many numbers were written. `held_out_percent` is the accuracy on the `held_out`
    images, about a fifth, with a last layer that is regressed on the others only; None if there are none. `missing` are
    the classes without an image. `tries` is how many networks were written to find this one.
    """

    written: list[str]
    left: list[str]
    count: int
    images: int
    missing: list[int]
    held_out: int
    held_out_percent: float | None
    seconds: float
    tries: int = 1


def synthesize(
    module: nn.Module, images, labels: Tensor | None = None, seed: int | None = None, limit: int = MOST_IMAGES
) -> nn.Module:
    """`write` the weights of `module` in place, and return it. Warns of classes without an image."""
    missing = write(module, images, labels, seed, limit).missing
    if missing:
        named = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        warnings.warn(f"no image is of class {named}: outputs that are never right", UserWarning, stacklevel=2)
    return module


@torch.no_grad()
def write(
    module: nn.Module, images, labels: Tensor | None = None, seed: int | None = None, limit: int = MOST_IMAGES,
    synthesizer: GraphWeightSynthesizer | None = None, numbers: Numbers = BY_HAND,
) -> Accounts:  # fmt: skip
    """Write the weights of `module` in place for labelled images; what came of it.

    `images` are a tensor as the module takes them, with `labels` [N], or a Dataset or DataLoader of pairs; of more than
    `limit`, so many are used. What is `labelled` for the module may be given in their place. What is random comes from
    the random init that the module has, or with `seed` from a fresh one. `synthesizer` has what is learned, by default
    that of this repository, `numbers` what the rules leave open. Parameters with `requires_grad=False` are kept. Warns
    of what is no better than chance, or than its own layers (DoubtfulWeights). Raises ValueError, in one line, for
    images, labels or modules that do not go together or cannot be read, and TypeError for what is no module; then
    nothing is changed.
    """
    start = time.perf_counter()
    data = images if isinstance(images, LabelledImages) else labelled(module, images, labels, seed, limit)
    device = data.device
    graph = ComputationGraph(module, data.sample.images[:2].cpu())
    if max(data.present) >= graph.classes:
        raise ValueError(
            f"a label is {max(data.present)}, but {type(graph.module).__name__} has {graph.classes} output"
            + "s" * (graph.classes > 1)
        )
    own = graph.weights() | ({} if seed is None else random_weights(graph, seed))
    synthesizer = default_synthesizer(device) if synthesizer is None else synthesizer
    own = {name: tensor.to(device) for name, tensor in own.items()}
    state = graph.state()
    for name in [name for name in graph.written if name in own]:
        if state[name].is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{name}: was made in inference mode and cannot be written: make it outside")
        if not own[name].isfinite().all():
            raise ValueError(f"{name}: holds NaN or infinite weights")
    try:
        ways = (True, False) if has_learned(graph) else (False,)
        writing = better([Writing(graph, data, own, synthesizer, numbers, learned) for learned in ways])
        written = writing.write()
    except torch.linalg.LinAlgError as error:
        reason = "what reaches one of its layers is beyond the precision of its numbers"
        raise ValueError(f"{type(graph.module).__name__}: cannot be written: {reason}") from error
    broken = next((name for name, tensor in written.items() if not tensor.isfinite().all()), None)
    if broken is not None:
        raise ValueError(f"{broken}: cannot be written: the network makes NaN or infinite values of the images")
    written |= balance(graph, own | written, writing.images)
    parameters = dict(graph.module.named_parameters())
    written |= {name: bounded(tensor) for name, tensor in written.items() if name in parameters}
    for name in graph.written:
        state[name].copy_(written.get(name, torch.ones(())))  # of batches, a norm has seen one
    held_out = (data.sample.folds == HELD_OUT).nonzero()[:, 0]
    if len(held_out):
        used = (data.sample.folds != HELD_OUT).nonzero()[:, 0]
        images, labels = data.sample.images, torch.tensor(data.present, device=device)[data.sample.labels]
        parts = held_out[: chunk_size(graph, data.shape, ROOM, LOOKED_AT)], used[:LOST_BY], held_out[:LOST_OF]
        looked_at, by, of = ((images[part], labels[part]) for part in parts)
        doubtful = doubt(graph, *looked_at, writing.held_out_percent)
        if doubtful is None and writing.held_out_percent is not None:
            doubtful = lost(graph, by, of, writing.held_out_percent)
        if doubtful is not None:
            warnings.warn(doubtful, DoubtfulWeights, stacklevel=3)  # past no_grad
    missing = sorted({*range(graph.classes)} - {*data.present})
    return Accounts(
        graph.with_tied(graph.written), graph.with_tied(graph.left), graph.count, data.count, missing,
        len(held_out), writing.held_out_percent, time.perf_counter() - start,
    )  # fmt: skip


def labelled(
    module: nn.Module, images, labels: Tensor | None = None, seed: int | None = None, limit: int = MOST_IMAGES
) -> LabelledImages:
    """Images and labels as `write` takes them, for as many times as it is called. Raises what it raises."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"a {type(module).__name__} cannot be written: give a torch.nn.Module")
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    return LabelledImages(images, labels, 0 if seed is None else seed, limit, device)


def better(writings: list["Writing"]) -> "Writing":
    """That whose layers before the dense ones say most of the labels; of nearly equal ones the first."""
    if len(writings) == 1:
        return writings[0]
    losses = []
    for place, writing in enumerate(writings):
        try:
            losses.append(agreed(writing.write_trunk()) * (1 + place * ALIKE))
        except torch.linalg.LinAlgError:  # of NaN: another way may do
            losses.append(math.inf)
    return writings[losses.index(min(losses))]


class Writing:
    """The one pass in which everything is written: `written`, by name."""

    def __init__(
        self, graph: ComputationGraph, data: LabelledImages, own: dict[str, Tensor],
        synthesizer: GraphWeightSynthesizer, numbers: Numbers, learned: bool,
    ):  # fmt: skip
        self.graph, self.data, self.numbers, self.tuning = graph, data, numbers, synthesizer.tuning
        chosen = any(layer.pooled or (layer.resolution > 1 and not layer.is_convolution) for layer in graph.layers)
        used = (data.sample.folds != HELD_OUT).nonzero()[:, 0]
        first = min(FIRST_TO_CHOOSE, max(2 * FIRST, len(used) - JUDGES)) if chosen else FIRST
        used = used[: chunk_size(graph, data.shape, ROOM, first)]
        if learned:
            generator = torch.Generator().manual_seed(fingerprint(graph, own))
            used = used[torch.randperm(len(used), generator=generator)]  # others for every init
        images, labels = in_fastest_order(data.sample.images[used]), data.sample.labels[used]
        one_hot = F.one_hot(labels, len(data.present)).to(images)
        self.trunk = Trunk(graph, own, images, one_hot, synthesizer if learned else None, PROBES, numbers)
        self.images, self.weights = self.trunk.images, self.trunk.weights
        self.end, self.trunk_is_written, self.is_dense = trunk_end(graph), False, False
        self.features: Features | None = None  # of the last dense layer so far
        self.logits: Tensor | float = 0.0  # of the images held out
        self.held_out_percent: float | None = None

    def write(self) -> dict[str, Tensor]:
        """Everything that is not written yet; all, by name."""
        self.graph.write(self.images, self.trunk.written, self.write_operation)
        return self.trunk.written

    def write_trunk(self) -> float:
        """What comes before `end`; the cross-entropy of a ridge regression on what it makes of some images."""
        self.graph.write(self.images, self.trunk.written, self.write_operation, self.end)
        self.trunk_is_written = True
        sample = self.data.sample
        some = (sample.folds != HELD_OUT).nonzero()[-JUDGES:, 0]  # the first ones were seen
        part = chunk_size(self.graph, self.data.shape)
        features = torch.cat([
            features_of(self.end, self.graph.inputs_of(self.end, images, dict(self.weights)), len(images))
            for images in in_fastest_order(sample.images[some]).split(part)
        ])  # fmt: skip
        labels = sample.labels[some]
        support, query = features.split([len(some) - len(some) // 3, len(some) // 3])
        one_hot = F.one_hot(labels[: len(support)], len(self.data.present)).to(features)
        return judged(support, one_hot, query, labels[len(support) :])[0].item()

    def write_operation(self, operation: Operation, inputs: Tensor) -> Tensor:
        """Write an operation's parameters; what it then gives for the first images' `inputs`.

        A layer's weight is then spread as the synthesiser's tuning says.
        """
        if operation is self.end:
            self.trunk.learned, self.trunk_is_written, self.is_dense = None, False, True
        if self.trunk_is_written:
            return operation.of(self.weights, inputs)
        if not isinstance(operation, Layer) or operation.weight.frozen:
            return self.trunk.write_operation(operation, inputs)
        if operation.last or (self.is_dense and operation.resolution <= 1):
            self.features = Features(self.graph, operation, self.data, dict(self.weights), self.features)
            write = self.of_classes if operation.last else self.dense
            self.trunk.put(operation, *write(operation, inputs))
            if self.trunk.learned is not None:  # a head before the end
                self.trunk.learned.leave_out(operation)
            outputs = operation.of(self.weights, inputs)
        else:
            outputs = self.trunk.write_operation(operation, inputs)
        if self.tuning is None:
            return outputs
        weight, bias = operation.weight, operation.bias
        values = self.tuning.tuned(operation, inputs, weight.of(self.weights), bias and bias.of(self.weights))
        weight.put(self.trunk.written, bounded(values[0]), self.trunk.own)
        if bias:
            bias.put(self.trunk.written, bounded(values[1]), self.trunk.own)
        return operation.of(self.weights, inputs)

    # ---- dense layers: their weights, biases and mean responses

    def dense(self, layer: Layer, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of a hidden layer."""
        sample = self.features.sample()
        known, judging = (Chunk(*(values[part] for values in sample)) for part in parts_of(sample.folds))
        weight, bias = dense_layer(layer, known, judging, len(self.data.present), self.numbers, self.trunk.generator)
        order = self.trunk.order.of(layer)
        weight, bias = weight[order], bias[order]
        return weight, bias, F.linear(sample.features, weight, bias).mean(0)

    def of_classes(self, layer: Layer, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the last layer, or of one whose outputs add up to the classes, each by itself; its `inputs` are
        those of the first images."""
        intercept, classes = layer.bias is not None and not layer.bias.frozen, len(self.data.present)
        penalty = 1.0 if self.tuning is None else self.tuning.penalty(layer)
        regression, logits = classifier(self.features, classes, intercept, self.numbers, penalty)
        if logits is not None:
            self.logits = self.logits + logits
            labels = self.data.sample.labels[self.data.sample.folds == HELD_OUT]
            self.held_out_percent = 100 * (self.logits.argmax(1) == labels).double().mean().item()
        present = torch.tensor(self.data.present)
        weight, bias = regression.weight.new_zeros(layer.shape), regression.bias.new_zeros(layer.shape[0])
        weight.view(layer.shape[0], -1)[present] = layer.share * regression.weight.T
        bias[present] = layer.share * regression.bias
        if intercept and layer.activation and Activation(layer).is_flatter_below:  # as where SqueezeNet ends
            bias = bias - layer(inputs, weight.view(layer.shape), bias).min().clamp(max=0)
        return weight, bias, torch.zeros_like(bias)


def parts_of(folds: Tensor) -> tuple[Tensor, Tensor]:
    """Which images rules are made from, and which judge what these make: of few images none do that alone."""
    judging = (folds == JUDGING[0]) | (folds == JUDGING[1])
    known = (folds != HELD_OUT) & ~judging
    if min(judging.sum(), known.sum()) < ENOUGH_TO_PART:
        known, judging = known | judging, torch.zeros_like(judging)
    return known, judging
