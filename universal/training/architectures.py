"""The architectures that the synthesiser trains on: random ones, of the families that people build for images."""

import math
import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from universal.mnist import CLASSES, IMAGE_SHAPE
from universal.training.blocks import Maps, Sum, Transposed, draw_block, drawn, plain

MOST_MULTIPLICATIONS = 10e6  # per image, of a drawn network: a TargetCNN has 4.2 million
MOST_DEEP_MULTIPLICATIONS = 16e6  # of one of many layers
MOST_FEATURES = 9216  # values of an image that reach the first linear layer: those of the PyTorch example

# What is drawn how often; blocks of convolutions and families of networks stand beside what draws them.
ACTIVATIONS = {
    nn.ReLU: 30, nn.GELU: 3, nn.SiLU: 2, nn.LeakyReLU: 2, nn.ELU: 2, nn.SELU: 1, nn.Tanh: 5, nn.Sigmoid: 1,
    nn.Hardswish: 1, nn.ReLU6: 1, nn.Softplus: 1,
}  # fmt: skip
DEEP_ACTIVATIONS = {nn.ReLU: 8, nn.ReLU6: 1, nn.Hardswish: 1, nn.SiLU: 1, nn.GELU: 1, nn.LeakyReLU: 1}
NORMS = {None: 20, "batch": 5, "group": 1, "layer": 1, "instance": 1}


def parameter_shapes(network: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in network.parameters()]


def log_uniform(draw: random.Random, low: int, high: int) -> int:
    """A whole number whose logarithm is uniform."""
    return round(math.exp(draw.uniform(math.log(low), math.log(high))))


# ---- dense layers, tokens and rows ----------------------------------------------------------------------------------


def draw_mlp(draw: random.Random, inputs: tuple[int, ...], classes: int) -> nn.Module:
    """0 to 5 hidden layers."""
    hidden = drawn(draw, {0: 2, 1: 4, 2: 5, 3: 2, 4: 1, 5: 1})
    widths = [log_uniform(draw, *((8, 64) if draw.random() < 0.3 else (32, 512))) for _ in range(hidden)]
    if draw.random() < 0.5:
        widths.sort(reverse=True)
    features = math.prod(inputs)
    activation, norm = drawn(draw, ACTIVATIONS), drawn(draw, {None: 6, "batch": 1, "layer": 0.5})
    return nn.Sequential(nn.Flatten(), *hidden_layers(features, widths, classes, activation, norm))


def hidden_layers(
    features: int, widths: list[int], classes: int, activation: type[nn.Module], norm: str | None
) -> list[nn.Module]:
    """Hidden linear layers and the classes."""
    layers: list[nn.Module] = []
    for width in widths:
        between = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}.get(norm, lambda _: None)(width)
        layers += [layer for layer in (nn.Linear(features, width), between, activation()) if layer is not None]
        features = width
    return [*layers, nn.Linear(features, classes)]


class Tokens(nn.Module):
    """Patches of an image as tokens with places, blocks that keep their shape, and the mean or the first of them."""

    def __init__(
        self, inputs: tuple[int, ...], patch: int, width: int, blocks: list[nn.Module], classes: int, places: bool,
        class_token: bool, norm: bool,
    ):  # fmt: skip
        super().__init__()
        channels, height, columns = inputs
        count = (height // patch) * (columns // patch)
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.first = nn.Parameter(0.02 * torch.randn(1, 1, width)) if class_token else None
        self.places = nn.Parameter(0.02 * torch.randn(1, count + class_token, width)) if places else None
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.out = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.first is not None:
            x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        if self.places is not None:
            x = x + self.places
        x = self.norm(self.blocks(x))
        return self.out(x.mean(1) if self.first is None else x[:, 0])


def patch_sides(height: int, width: int) -> list[int]:
    """The sides of square patches that cut an image into 9 to 64 without a rest, or one that leaves a rest."""
    common = math.gcd(height, width)
    sides = [side for side in range(2, common + 1) if common % side == 0 and 9 <= height * width // side**2 <= 64]
    return sides or [min(height, width) // 4]


def draw_tokens(draw: random.Random, inputs: tuple[int, ...], classes: int) -> nn.Module:
    """A small vision transformer (Dosovitskiy et al. 2021) or an MLP-Mixer (Tolstikhin et al. 2021)."""
    sides = patch_sides(*inputs[1:])
    patch = draw.choice([*sides, sides[-1]])  # fewer tokens cost less
    heads = draw.choice([2, 4])
    width = 4 * round(log_uniform(draw, 32, 96) / 4)
    count = (inputs[1] // patch) * (inputs[2] // patch)
    blocks: list[nn.Module] = []
    mixer = draw.random() < 0.3
    class_token = not mixer and draw.random() < 0.3
    for _ in range(drawn(draw, {1: 3, 2: 4, 3: 3, 4: 2, 6: 2, 8: 1})):
        wide = width * draw.choice([1, 2, 4])
        if mixer:
            tokens = log_uniform(draw, 16, 64)
            mix = [nn.Linear(count, tokens), nn.GELU(), nn.Linear(tokens, count)]
            blocks.append(Sum(nn.Sequential(nn.LayerNorm(width), Transposed(nn.Sequential(*mix)))))
            mix = [nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width)]
            blocks.append(Sum(nn.Sequential(nn.LayerNorm(width), *mix)))
        else:
            activation = draw.choice(["relu", "gelu"])
            options = {"batch_first": True, "norm_first": draw.random() < 0.5}
            blocks.append(nn.TransformerEncoderLayer(width, heads, wide, 0.0, activation, **options))
    places, norm = draw.random() < 0.8, draw.random() < 0.5
    return Tokens(inputs, patch, width, blocks, classes, places, class_token, norm)


def draw_rows(draw: random.Random, inputs: tuple[int, ...], classes: int) -> nn.Module:
    """1 to 3 convolutions along the columns, of which the pixels of a row are the channels, or along all pixels."""
    activation, norm = drawn(draw, ACTIVATIONS), draw.random() < 0.3
    channels, height, width = inputs
    channels, length = (channels * height, width) if draw.random() < 0.8 else (channels, height * width)
    layers: list[nn.Module] = [nn.Flatten(), nn.Unflatten(1, (channels, length))]
    for _ in range(draw.randint(1, 3)):
        outputs, kernel = log_uniform(draw, 16, 96), draw.choice([3, 3, 5, 7])
        stride = 1 if length <= width else 4
        layers.append(nn.Conv1d(channels, outputs, kernel, stride, kernel // 2))
        layers += [nn.BatchNorm1d(outputs)] if norm else []
        layers.append(activation())
        channels, length = outputs, (length - 1) // stride + 1
        if length > 6 and draw.random() < 0.6:
            layers.append(nn.MaxPool1d(2))
            length //= 2
    pooled = draw.random() < 0.2
    widths = [log_uniform(draw, 32, 128) for _ in range(drawn(draw, {0: 3, 1: 4, 2: 1}))]
    features = channels if pooled else channels * length
    hidden = hidden_layers(features, widths, classes, activation, None)
    return nn.Sequential(*layers, *([nn.AdaptiveAvgPool1d(1)] if pooled else []), nn.Flatten(), *hidden)


# ---- convolutions ---------------------------------------------------------------------------------------------------


class Style(NamedTuple):
    """What the networks of a family of convolutions have in common: what is drawn how often, and how they are built."""

    add_blocks: Callable[[Maps, str, float], None]
    activations: dict[type[nn.Module], float]
    norms: dict[str | None, float]
    heads: dict[str, float]
    most: float = MOST_MULTIPLICATIONS


def draw_convolutional(draw: random.Random, inputs: tuple[int, ...], classes: int, family: str) -> nn.Module | None:
    """A network in the style of a family; None if it would cost too much."""
    style = STYLES[family]
    activation, norm = drawn(draw, style.activations), drawn(draw, style.norms)
    maps = Maps(draw, inputs, activation, norm, deep=family == "deep")
    style.add_blocks(maps, family, style.most)
    add_head(maps, drawn(draw, style.heads), classes)
    return nn.Sequential(*maps.layers) if maps.multiplications <= style.most else None


def add_any_blocks(maps: Maps, family: str, most: float) -> None:
    """1 to 10 convolutions, in blocks of one kind and plain ones, of any widths."""
    draw = maps.draw
    left = drawn(draw, {1: 2, 2: 10, 3: 3, 4: 4, 5: 2, 6: 2, 8: 2, 10: 1})
    several = left > 3
    widest = 64 if left > 1 or draw.random() < 0.5 else 32
    kind = draw_block(draw, family)
    pooling = drawn(draw, {nn.MaxPool2d: 5, nn.AvgPool2d: 1, None: 1})
    every = draw.choice([1, 2, 2, 3]) if several else 1  # blocks between reductions of the maps
    count = 0
    while left > 0 and maps.multiplications <= 2 * most:
        width = log_uniform(draw, 4 if draw.random() < 0.2 else 8, widest)
        reduce = maps.side > 4 and count % every == every - 1 and (maps.side > 7 or draw.random() < 0.3)
        used = kind if (maps.layers or kind.first) and draw.random() < 0.8 else plain
        used.add(maps, width, 2 if reduce and pooling is None else 1)
        left -= used.convolutions
        count += 1
        if reduce and pooling is not None:
            maps.add_pooling(pooling)


def add_equal_blocks(maps: Maps, family: str, most: float) -> None:
    """A convolution of the images, and 2 to 4 stages of 1 to 4 equal blocks, whose maps get smaller and wider."""
    draw = maps.draw
    kind = draw_block(draw, family)
    kind.style(maps)
    width = 4 * round(log_uniform(draw, 8, 32) / 4)
    stride = draw.choice(kind.strides)
    plain.add(maps, width, stride, kernel=4 if stride == 4 else draw.choice([3, 3, 3, 5, 7]))
    if stride == 2 and draw.random() < 0.3:
        maps.add([nn.MaxPool2d(3, 2, 1)], width, 2)
    pooling = nn.MaxPool2d if kind.pooled or draw.random() < 0.2 else None
    blocks = drawn(draw, {1: 4, 2: 4, 3: 1.5, 4: 0.5})
    for stage in range(draw.randint(2, 4)):
        if stage and draw.random() < 0.8:
            width = min(2 * width, 128)
        reduce = maps.side > 3 and (stage > 0 or draw.random() < 0.3)
        for place in range(blocks):
            kind.add(maps, width, 2 if reduce and place == 0 and pooling is None else 1)
            if maps.multiplications > 2 * most:
                return
        if reduce and pooling is not None:
            maps.add_pooling(pooling)


def add_head(maps: Maps, head: str, classes: int) -> None:
    """Global average pooling or the flattened maps, hidden layers, and the classes, or these from a convolution."""
    draw = maps.draw
    if head == "classes":
        maps.layers += [maps.conv(maps.channels, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return
    if head != "flat":
        side = 1 if head == "pooled" else min(maps.side, draw.randint(2, 4))
        maps.layers.append(nn.AdaptiveAvgPool2d(side))
        maps.size = (side, side)
    features = maps.channels * math.prod(maps.size)
    hidden = drawn(draw, {0: 3, 1: 6, 2: 1.5, 3: 0.5} if head == "flat" else {0: 8, 1: 2})
    bounds = ((16 if draw.random() < 0.2 else 32, 256 if draw.random() < 0.3 else 128) for _ in range(hidden))
    widths = [log_uniform(draw, *each) for each in bounds]
    norm = maps.norm if draw.random() < 0.5 else None
    maps.layers.append(nn.Flatten())
    if maps.deep and maps.norm == "layer":
        maps.layers.append(nn.LayerNorm(features))
    maps.layers += hidden_layers(features, widths, classes, maps.activation, norm)
    maps.multiplications += features * (widths[0] if widths else classes) if features <= MOST_FEATURES else math.inf


STYLES = {
    # Plain networks with hidden layers that read all maps.
    "ordinary": Style(add_any_blocks, {nn.ReLU: 1}, {None: 1}, {"flat": 1}),
    "convolutions": Style(add_any_blocks, ACTIVATIONS, NORMS, {"flat": 12, "pooled": 8, "classes": 0.7, "few": 0.5}),
    # Many blocks, as the networks for larger images have them.
    "deep": Style(
        add_equal_blocks, DEEP_ACTIVATIONS, NORMS, {"flat": 3, "pooled": 12, "classes": 1.5}, MOST_DEEP_MULTIPLICATIONS
    ),
}


# ---- all families ---------------------------------------------------------------------------------------------------

# How often networks of each family are drawn, and what draws them.
FAMILIES = {
    "ordinary": (5.6, partial(draw_convolutional, family="ordinary")),
    "convolutions": (8.4, partial(draw_convolutional, family="convolutions")),
    "mlp": (4.5, draw_mlp),
    "tokens": (3.5, draw_tokens),
    "deep": (5, partial(draw_convolutional, family="deep")),
    "rows": (1, draw_rows),
}


def draw_architecture(
    draw: random.Random, inputs: tuple[int, ...] = IMAGE_SHAPE, classes: int = CLASSES,
    refused: list[list[tuple[int, ...]]] = (), families: Iterable[str] = FAMILIES,
) -> nn.Module:  # fmt: skip
    """A random network of one of these `families`, whose parameters have none of the `refused` lists of shapes.

    It takes images of the shape `inputs`, (channels, height, width), of 16 to 64 pixels a side. Its weights are
    PyTorch's default init, from the global generator of torch.
    """
    shares, makers = zip(*(FAMILIES[family] for family in families), strict=True)
    while True:
        (make,) = draw.choices(makers, shares)
        network = make(draw, inputs, classes)
        if network is None:
            continue
        shapes = parameter_shapes(network)
        # A weight costs a multiplication at least.
        if shapes not in refused and sum(map(math.prod, shapes)) <= MOST_MULTIPLICATIONS:
            return network
