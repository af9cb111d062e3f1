"""What reaches a layer of all images: in chunks, each computed once where memory allows."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from target_cnn import fast_bf16
from universal.data.labelled import LabelledImages, gathered, is_shared
from universal.reading.calls import Layer
from universal.reading.graph import ComputationGraph

CACHE = 2**28  # elements of features that are kept for the next pass, one GiB
LARGEST_MAP = 2**23  # elements that a layer gives of a chunk
LARGEST_CHUNK = 1000  # images


def chunk_size(
    graph: ComputationGraph, shape: tuple[int, ...], largest: int = LARGEST_MAP, most: int = LARGEST_CHUNK
) -> int:
    """How many images of a shape, `most` at most, go through a network at once, so that no layer gives more than
    `largest` elements."""
    widest = max(
        round(max(layer.resolution, 1) ** (2 if layer.is_convolution else 1)) * layer.shape[0] for layer in graph.layers
    )
    return max(min(largest // max(widest, torch.Size(shape).numel()), most), 8)


def features_of(layer: Layer, inputs: Tensor, count: int) -> Tensor | None:
    """What a layer without groups whose outputs are one number a neuron reads of each of `count` images, [count,
    features].

    None if it gives more. The last layer may: the classes are then what they are in the mean over places.
    """
    if layer.is_convolution:
        if layer.last:
            return layer.mean_patch(inputs)
        patches = layer.patches(inputs, 2)[0]
        return patches[:, 0] if patches.shape[1] == 1 else None
    if inputs.numel() == count * inputs.shape[-1]:  # the images may lie on any axis
        return inputs.reshape(count, -1)
    return of_images(inputs, -1, count).mean(1) if layer.last else None


def of_images(inputs: Tensor, axis: int, count: int) -> Tensor:
    """Activations whose channels lie on `axis`, by image: [count, places, channels].

    The images may lie on any axis, or be folded into the first one with their places.
    """
    inputs = inputs.movedim(axis, -1)
    others = inputs.shape[:-1]
    if count in others:
        inputs = inputs.movedim(others.index(count), 0)
    return inputs.reshape(count, -1, inputs.shape[-1])


def in_fastest_order(images: Tensor) -> Tensor:
    """Images in the order in memory in which convolutions and pooling are fast."""
    return images.to(memory_format=torch.channels_last if images.dim() == 4 else torch.contiguous_format)


class Chunk(NamedTuple):
    features: Tensor  # [n, features], float32
    labels: Tensor  # [n]
    folds: Tensor  # [n]


class Features:
    """What reaches a `layer` of `data`, with the weights that are written so far.

    `before`, those of an earlier layer, saves the pass up to there where all of them are kept.
    """

    def __init__(
        self, graph: ComputationGraph, layer: Layer, data: LabelledImages, weights: dict[str, Tensor],
        before: "Features | None" = None,
    ):  # fmt: skip
        self.graph, self.layer, self.data, self.weights = graph, layer, data, weights
        self.before = before if before is not None and before.is_flat else None
        if self.before is not None:
            self.before.before = None  # whose features nobody needs any more
        fast = graph.convolutional and fast_bf16(data.sample.images.device)
        self.precision = torch.bfloat16 if fast else torch.float32
        self.cast = {name: tensor.to(self.precision) for name, tensor in weights.items()}
        self.size = chunk_size(graph, data.shape)
        self.kept: list[Tensor] = []
        self.is_flat = False  # whether they are all that reaches the layer, in its shape

    def __iter__(self) -> Iterator[Chunk]:
        for index, batch in enumerate(self.data.batches(self.size)):
            if index < len(self.kept):
                features = self.kept[index]
            else:
                features = self.continued(batch.images, index)
                features = self.of(batch.images) if features is None else features
                if self.data.resident is not None and (index + 1) * self.size * features.shape[1] <= CACHE:
                    self.kept.append(features)
            yield Chunk(features, batch.labels, batch.folds)

    def sample(self) -> Chunk:
        """Those of the images of the sample."""
        wanted = self.data.sample
        if self.data.resident is not None and not is_shared():  # it begins with the sample
            chunks, count = [], 0
            for chunk in self:
                chunks.append(chunk)
                count += len(chunk.labels)
                if count >= len(wanted.labels):
                    break
            return Chunk(*(torch.cat(values)[: len(wanted.labels)] for values in zip(*chunks, strict=True)))
        features = torch.cat([self.of(images) for images in wanted.images.split(self.size)])
        return Chunk(features, wanted.labels, wanted.folds)

    @property
    def all_kept(self) -> bool:
        return self.data.resident is not None and len(self.kept) * self.size >= len(self.data.resident.labels)

    def in_memory(self, sample: Chunk) -> tuple[list[Chunk], bool]:
        """What can be passed over again at no cost, and whether it is this process's share of all: all, after a pass in
        which every process has kept them, or else the sample."""
        kept = all(gathered(self.all_kept)) if is_shared() else self.all_kept
        return (list(self), True) if kept else ([sample], False)

    def of(self, images: Tensor) -> Tensor:
        """What reaches the layer of some images."""
        inputs = self.graph.inputs_of(self.layer, in_fastest_order(images.to(self.precision)), self.cast)
        self.is_flat = inputs.dim() == 2
        return self.checked(features_of(self.layer, inputs, len(images)))

    def continued(self, images: Tensor, index: int) -> Tensor | None:
        """The same for the chunk of an index, from the features that are kept of the layer before."""
        if self.before is None or index >= len(self.before.kept):
            return None
        outputs = self.before.layer.of(self.weights, self.before.kept[index])
        try:
            inputs = self.graph.inputs_of(self.layer, images, self.weights, (self.before.layer, outputs))
        except Exception:  # of activations of two images beside those of all
            inputs = None
        if inputs is None or len(inputs) != len(images):
            self.before = None
            return None
        self.is_flat = inputs.dim() == 2
        return self.checked(features_of(self.layer, inputs, len(images)))

    def checked(self, features: Tensor) -> Tensor:
        if not features.isfinite().all():
            raise ValueError(f"{self.layer.name}: NaN or infinite values reach it of the images")
        return features.float()
