"""What networks of convolutions are drawn from: blocks of layers, one entry each, and the maps that they give."""

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

KERNELS = {3: 12, 5: 4, 1: 1, 7: 1, 4: 1, 2: 0.5, 8: 0.5, 6: 0.5}  # how often each is drawn


def drawn(draw: random.Random, shares: dict):
    """One of the keys, as often as its value says."""
    return draw.choices(list(shares), list(shares.values()))[0] if len(shares) > 1 else next(iter(shares))


class Sum(nn.Module):
    """x -> after(shortcut(x) + inner(x)): a residual connection."""

    def __init__(self, inner: nn.Module, shortcut: nn.Module | None = None, after: nn.Module | None = None):
        super().__init__()
        self.inner, self.shortcut, self.after = inner, shortcut or nn.Identity(), after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.shortcut(x) + self.inner(x))


class Concatenation(nn.Module):
    """x -> the outputs of several branches, concatenated along the channels."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Gate(nn.Module):
    """x -> x times what its gate, [N, channels, 1, 1], says of each channel (Hu et al. 2018)."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, squeezed, 1), nn.ReLU(), nn.Conv2d(squeezed, channels, 1),
            nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class Transposed(nn.Module):
    """x -> inner applied to x with axis 1, that of channels or tokens, as the last, put back there."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.movedim(1, -1)).movedim(-1, 1)


class Gain(nn.Module):
    """x -> x times a learned number for each channel, which lie on the last axis (Touvron et al. 2021)."""

    def __init__(self, channels: int, start: float):
        super().__init__()
        self.gain = nn.Parameter(torch.full((channels,), start))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


class Shuffled(nn.Module):
    """x -> half of its channels, and what inner makes of the others, in turn (Ma et al. 2018)."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        kept, others = x.chunk(2, 1)
        return torch.stack([kept, self.inner(others)], 2).flatten(1, 2)


class Maps:
    """The maps of a network in the making, of so many `channels` and a `size` (height, width), and its `layers` so far.

    `inputs` is the shape of an image, (channels, height, width). In `deep` networks blocks change the width only where
    they are told to, as those for larger images do; in others they like to keep it. `multiplications` are those that an
    image costs.
    """

    def __init__(
        self, draw: random.Random, inputs: tuple[int, ...], activation: type[nn.Module], norm: str | None, deep: bool
    ):
        self.draw, self.activation, self.norm, self.deep = draw, activation, norm, deep
        self.channels, *self.size = inputs
        self.layers: list[nn.Module] = []
        self.multiplications = 0

    @property
    def side(self) -> int:
        """The shorter one, pixels."""
        return min(self.size)

    def size_after(self, kernel: int, stride: int, padding: int) -> list[int]:
        """The size of what a convolution or pooling makes of the maps."""
        return [(side + 2 * padding - kernel) // stride + 1 for side in self.size]

    def add(self, layers: list[nn.Module], channels: int, stride: int = 1, kernel: int = 1, padding: int = 0) -> None:
        """Add layers that give so many channels, and change the size as one convolution with these options does."""
        self.layers += layers
        self.channels, self.size = channels, self.size_after(kernel, stride, padding)

    def add_pooling(self, pooling: type[nn.Module]) -> None:
        kernel = 2 if self.draw.random() < 0.9 or self.side < 5 else 3  # an InstanceNorm of one pixel fails
        # Before a ReLU the maximum is the same as after it, and the ReLU costs a quarter.
        before = isinstance(self.layers[-1], nn.ReLU) and pooling is nn.MaxPool2d and self.draw.random() < 0.6
        last = [self.layers.pop()] if before else []
        self.add([pooling(kernel, 2), *last], self.channels, stride=2, kernel=kernel)

    def conv(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, padding: int | None = None
    ) -> nn.Conv2d:
        """A convolution, whose cost is counted; padded by half its kernel, unless told otherwise."""
        padding = kernel // 2 if padding is None else padding
        places = math.prod(self.size_after(kernel, stride, padding))
        self.multiplications += inputs * outputs // groups * kernel**2 * places
        bias = self.norm is None or self.draw.random() < 0.5
        return nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=bias)

    def norms(self, channels: int) -> list[nn.Module]:
        """The norm, if there is one."""
        if self.norm == "batch":
            return [nn.BatchNorm2d(channels)]
        if self.norm == "instance":
            return [nn.InstanceNorm2d(channels, affine=self.draw.random() < 0.5)]
        if self.norm is None:
            return []
        groups = self.draw.choice([n for n in (1, 2, 4, 8) if channels % n == 0]) if self.norm == "group" else 1
        return [nn.GroupNorm(groups, channels)]

    def normalised(self, layer: nn.Conv2d, activation: bool = True) -> list[nn.Module]:
        """A convolution, the norm and the activation."""
        return [layer, *self.norms(layer.out_channels), *([self.activation()] if activation else [])]


# ---- the blocks -----------------------------------------------------------------------------------------------------


def mostly_batch_norm(maps: Maps) -> None:
    if maps.draw.random() < 0.8:
        maps.norm = "batch"


def seldom_batch_norm(maps: Maps) -> None:
    maps.norm = "batch" if maps.draw.random() < 0.2 else None


def layer_norm(maps: Maps) -> None:
    maps.activation, maps.norm = nn.GELU, "layer"


class Block(NamedTuple):
    """A kind of block: `add(maps, width, stride)` adds one to the maps, and `shares` say how often it is drawn in
    networks of each family.

    It counts as so many `convolutions` where their number is drawn, and may be the `first` of a network or not. In deep
    networks of it, `style(maps)` sets the norm and activation, the first convolution has one of these `strides`, and if
    it is `pooled`, maps shrink by pooling.
    """

    add: Callable[[Maps, int, int], None]
    shares: dict[str, float]
    convolutions: int = 2
    first: bool = False
    style: Callable[[Maps], None] = mostly_batch_norm
    strides: tuple[int, ...] = (1, 1, 2)
    pooled: bool = False


BLOCKS: list[Block] = []


def block(shares: dict[str, float], **options) -> Callable:
    """Make the function that this decorates an entry of BLOCKS, with these `options`."""

    def enter(add: Callable) -> Block:
        BLOCKS.append(Block(add, shares, **options))
        return BLOCKS[-1]

    return enter


def draw_block(draw: random.Random, family: str) -> Block:
    """A kind of block for a network of this family."""
    entries = [entry for entry in BLOCKS if family in entry.shares]
    return draw.choices(entries, [entry.shares[family] for entry in entries])[0]


@block({"ordinary": 20, "convolutions": 16, "deep": 2}, convolutions=1, pooled=True)
def plain(maps: Maps, width: int, stride: int, kernel: int | None = None) -> None:
    """A convolution, padded or not."""
    draw = maps.draw
    if kernel is None:
        kernel = 3 if maps.deep else drawn(draw, KERNELS if maps.layers else KERNELS | {1: 0})
    valid = maps.side > kernel + 3 and (kernel == stride or draw.random() < (0.1 if maps.deep else 0.25))
    padding = 0 if valid else kernel // 2
    layer = maps.conv(maps.channels, width, kernel, stride, padding=padding)
    maps.add(maps.normalised(layer), width, stride, kernel, padding)


@block({"ordinary": 4, "convolutions": 4, "deep": 6})
def residual(maps: Maps, width: int, stride: int) -> None:
    """Two convolutions beside a shortcut (He et al. 2016)."""
    add_residual(maps, width, stride, kernels=2 * (maps.draw.choice([3, 3, 3, 5]),), squeeze=1)


def add_residual(maps: Maps, width: int, stride: int, kernels: tuple[int, ...], squeeze: int) -> None:
    """Convolutions with these kernels, all but the last with `squeeze` times fewer channels, beside a shortcut."""
    draw, inputs = maps.draw, maps.channels
    same = (inputs == width and stride == 1) or (not maps.deep and draw.random() < 0.6)
    if same:  # most blocks keep the width
        width, stride = inputs, 1
    widths = [inputs, *[max(4, width // squeeze)] * (len(kernels) - 1), width]
    inner = []
    for place, kernel in enumerate(kernels):
        layer = maps.conv(widths[place], widths[place + 1], kernel, stride if place == 0 else 1)
        inner += maps.normalised(layer, activation=place < len(kernels) - 1)
    shortcut = None if same else nn.Sequential(*maps.normalised(maps.conv(inputs, width, 1, stride), activation=False))
    after = maps.activation() if draw.random() < 0.9 else None
    maps.add([Sum(nn.Sequential(*inner), shortcut, after)], width, stride)


@block({"convolutions": 1, "deep": 1})
def pre_activation(maps: Maps, width: int, stride: int) -> None:
    """A residual block whose norms and activations come before its convolutions (He et al. 2016)."""
    inputs = maps.channels
    if not maps.deep:
        width, stride = inputs, 1
    inner = [
        *maps.norms(inputs), maps.activation(), maps.conv(inputs, width, 3, stride),
        *maps.norms(width), maps.activation(), maps.conv(width, width, 3),
    ]  # fmt: skip
    same = inputs == width and stride == 1
    maps.add([Sum(nn.Sequential(*inner), None if same else maps.conv(inputs, width, 1, stride))], width, stride)


@block({"convolutions": 1, "deep": 2})
def bottleneck(maps: Maps, width: int, stride: int) -> None:
    """A 3x3 convolution of few channels between two of single pixels, beside a shortcut."""
    add_residual(maps, width, stride, kernels=(1, 3, 1), squeeze=4)


@block({"convolutions": 6, "deep": 3})
def separable(maps: Maps, width: int, stride: int) -> None:
    """A depthwise convolution and one of single pixels (Howard et al. 2017)."""
    inputs = maps.channels
    depthwise = maps.conv(inputs, inputs, 3, stride, groups=inputs)
    layers = maps.normalised(depthwise, activation=maps.draw.random() < 0.8)
    maps.add([*layers, *maps.normalised(maps.conv(inputs, width, 1))], width, stride)


@block({"convolutions": 2, "deep": 4})
def inverted(maps: Maps, width: int, stride: int) -> None:
    """A separable convolution of more channels, beside a shortcut if it keeps the shape (Sandler et al. 2018)."""
    draw, inputs, deep = maps.draw, maps.channels, maps.deep
    wide = inputs * draw.choice([2, 4])
    same = stride == 1 and (inputs == width or not deep)
    width = inputs if same else width
    gate = [Gate(wide, max(2, wide // 4))] if deep and draw.random() < 0.3 else []
    inner = nn.Sequential(
        *maps.normalised(maps.conv(inputs, wide, 1)),
        *maps.normalised(maps.conv(wide, wide, draw.choice([3, 3, 5]) if deep else 3, stride, groups=wide)),
        *gate,
        *maps.normalised(maps.conv(wide, width, 1), activation=False),
    )
    maps.add([Sum(inner) if same else inner], width, stride)


@block({"convolutions": 2}, first=True)
def branches(maps: Maps, width: int, stride: int) -> None:
    """Two convolutions of different kernels side by side (Szegedy et al. 2015)."""
    part = max(4, width // 2)
    parts = [
        nn.Sequential(*maps.normalised(maps.conv(maps.channels, part, kernel, stride)))
        for kernel in maps.draw.choice([(1, 3), (3, 5), (3, 3)])
    ]
    maps.add([Concatenation(*parts)], 2 * part, stride)


@block({"convolutions": 1, "deep": 1}, convolutions=1, pooled=True)
def dense(maps: Maps, width: int, stride: int) -> None:
    """The maps, and a convolution of them beside them (Huang et al. 2017), which keeps their size."""
    width = max(4, width // 2) if maps.deep else width
    added = nn.Sequential(*maps.normalised(maps.conv(maps.channels, width, 3)))
    maps.add([Concatenation(nn.Identity(), added)], maps.channels + width)


@block({"convolutions": 1}, convolutions=1)
def gated(maps: Maps, width: int, stride: int) -> None:
    """A convolution and a gate of its channels."""
    layers = maps.normalised(maps.conv(maps.channels, width, 3, stride))
    maps.add([*layers, Gate(width, max(2, width // 4))], width, stride)


@block({"deep": 2}, style=seldom_batch_norm, pooled=True)
def fire(maps: Maps, width: int, stride: int) -> None:
    """Few channels, and two convolutions of them side by side, which keep their size (Iandola et al. 2016)."""
    few = width // 4
    squeezed = maps.normalised(maps.conv(maps.channels, few, 1))
    expanded = [nn.Sequential(*maps.normalised(maps.conv(few, width // 2, kernel))) for kernel in (1, 3)]
    maps.add([*squeezed, Concatenation(*expanded)], width)


@block({"deep": 1})
def shuffled(maps: Maps, width: int, stride: int) -> None:
    """A separable convolution of half of the channels, which are then shuffled; a plain one where the shape changes."""
    if maps.channels != width or stride > 1:
        maps.add(maps.normalised(maps.conv(maps.channels, width, 3, stride)), width, stride)
        return
    half = width // 2
    inner = nn.Sequential(
        *maps.normalised(maps.conv(half, half, 1)),
        *maps.normalised(maps.conv(half, half, 3, groups=half), activation=False),
        *maps.normalised(maps.conv(half, half, 1)),
    )
    maps.add([Shuffled(inner)], width)


@block({"deep": 2}, style=layer_norm, strides=(1, 1, 2, 4))
def channels_last(maps: Maps, width: int, stride: int) -> None:
    """A depthwise convolution, and linear layers over the channels, beside a shortcut (Liu et al. 2022)."""
    if maps.channels != width or stride > 1:
        down = maps.conv(maps.channels, width, stride, stride, padding=0)
        maps.add([Transposed(nn.LayerNorm(maps.channels)), down], width, stride, kernel=stride)
    draw = maps.draw
    gain = drawn(draw, {None: 1, 1e-6: 1, 1e-1: 0.5, 1.0: 0.5})
    mixed = [nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
    mixed += [] if gain is None else [Gain(width, gain)]
    depthwise = maps.conv(width, width, draw.choice([3, 5, 7, 7]), groups=width)
    maps.multiplications += 8 * width**2 * math.prod(maps.size)
    maps.add([Sum(nn.Sequential(depthwise, Transposed(nn.Sequential(*mixed))))], width)
