"""The architectures that the synthesiser trains on: random ones, of the kinds that people build for MNIST."""

import math
import random
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from universal.mnist import IMAGE_CHANNELS, IMAGE_SIDE

MOST_MULTIPLICATIONS = 10e6  # per image, of a drawn network: a TargetCNN has 4.2 million
MOST_DEEP_MULTIPLICATIONS = 16e6  # of one of many layers
MOST_FEATURES = 9216  # values of an image that reach the first linear layer: those of the PyTorch example

# What is drawn how often; kinds of networks, `FAMILIES`, stand beside what draws them.
ORDINARY_STAGES = {"plain": 20, "residual": 4}
ACTIVATIONS = {
    nn.ReLU: 30, nn.GELU: 3, nn.SiLU: 2, nn.LeakyReLU: 2, nn.ELU: 2, nn.SELU: 1, nn.Tanh: 5, nn.Sigmoid: 1,
    nn.Hardswish: 1, nn.ReLU6: 1, nn.Softplus: 1,
}  # fmt: skip
NORMS = {None: 20, "batch": 5, "group": 1, "layer": 1, "instance": 1}
KERNELS = {3: 12, 5: 4, 1: 1, 7: 1, 4: 1, 2: 0.5, 8: 0.5, 6: 0.5}
STAGES = {
    "plain": 16, "residual": 4, "pre-activation": 1, "bottleneck": 1, "separable": 6, "inverted": 2, "branches": 2,
    "dense": 1, "gated": 1,
}  # fmt: skip
HEADS = {"flat": 12, "pooled": 8, "classes": 0.7, "few": 0.5}
DEEP_STAGES = {
    "plain": 2, "residual": 6, "pre-activation": 1, "bottleneck": 2, "separable": 3, "inverted": 4, "dense": 1,
    "fire": 2, "shuffled": 1, "channels-last": 2,
}  # fmt: skip
DEEP_ACTIVATIONS = {nn.ReLU: 8, nn.ReLU6: 1, nn.Hardswish: 1, nn.SiLU: 1, nn.GELU: 1, nn.LeakyReLU: 1}


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


class Tokens(nn.Module):
    """Patches of the image as tokens with places, blocks that keep their shape, and the mean or the first of them."""

    def __init__(
        self, patch: int, width: int, blocks: list[nn.Module], classes: int, places: bool, class_token: bool, norm: bool
    ):
        super().__init__()
        count = (IMAGE_SIDE // patch) ** 2
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
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


class ResidualBlock(nn.Module):
    """[N, width, height, width] -> the same shape: the input plus two convolutions of it, and a ReLU of the sum."""

    def __init__(self, width: int, kernel: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, kernel, padding="same")
        self.conv2 = nn.Conv2d(width, width, kernel, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x + self.conv2(nn.functional.relu(self.conv1(x))))


def parameter_shapes(network: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in network.parameters()]


def log_uniform(draw: random.Random, low: int, high: int) -> int:
    """A whole number whose logarithm is uniform."""
    return round(math.exp(draw.uniform(math.log(low), math.log(high))))


def drawn(draw: random.Random, weights: dict):
    """One of the keys, as often as its value says."""
    return draw.choices(list(weights), list(weights.values()))[0]


def draw_hidden(
    draw: random.Random, features: int, widths: list[int], classes: int, activation, norm
) -> list[nn.Module]:
    """Hidden linear layers and the classes."""
    layers: list[nn.Module] = []
    for width in widths:
        between = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}.get(norm, lambda _: None)(width)
        layers += [layer for layer in (nn.Linear(features, width), between, activation()) if layer is not None]
        features = width
    return [*layers, nn.Linear(features, classes)]


def draw_mlp(draw: random.Random, classes: int) -> nn.Module:
    """0 to 5 hidden layers; a linear classifier only of three channels, as that of one is evaluated."""
    hidden = drawn(draw, {0: 2, 1: 4, 2: 5, 3: 2, 4: 1, 5: 1})
    widths = [log_uniform(draw, *((8, 64) if draw.random() < 0.3 else (32, 512))) for _ in range(hidden)]
    if draw.random() < 0.5:
        widths.sort(reverse=True)
    features = IMAGE_SIDE**2 * (1 if hidden else max(IMAGE_CHANNELS))
    activation, norm = drawn(draw, ACTIVATIONS), drawn(draw, {None: 6, "batch": 1, "layer": 0.5})
    return nn.Sequential(nn.Flatten(), *draw_hidden(draw, features, widths, classes, activation, norm))


def draw_tokens(draw: random.Random, classes: int) -> nn.Module:
    """A small vision transformer (Dosovitskiy et al. 2021) or an MLP-Mixer (Tolstikhin et al. 2021)."""
    patch = draw.choice([4, 7, 7])
    heads = draw.choice([2, 4])
    width = 4 * round(log_uniform(draw, 32, 96) / 4)
    count = (IMAGE_SIDE // patch) ** 2
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
            blocks.append(
                nn.TransformerEncoderLayer(
                    width, heads, wide, 0.0, activation, batch_first=True, norm_first=draw.random() < 0.5
                )
            )
    places, norm = draw.random() < 0.8, draw.random() < 0.5
    return Tokens(patch, width, blocks, classes, places, class_token, norm)


def draw_convolutional(draw: random.Random, classes: int) -> nn.Module | None:
    """A network of 1 to 10 convolutions or so; None if it would cost too much."""
    return Convolutional(draw, classes, "any").network


def draw_ordinary(draw: random.Random, classes: int) -> nn.Module | None:
    """One with ReLU, no norm, and hidden layers that read all maps; None if it would cost too much."""
    return Convolutional(draw, classes, "ordinary").network


def draw_deep(draw: random.Random, classes: int) -> nn.Module | None:
    """One of many equal blocks, as the networks for larger images are; None if it would cost too much."""
    return Convolutional(draw, classes, "deep").network


def draw_rows(draw: random.Random, classes: int) -> nn.Module:
    """1 to 3 convolutions along the columns, of which the pixels of a row are the channels, or along all pixels."""
    activation, norm = drawn(draw, ACTIVATIONS), draw.random() < 0.3
    channels, length = (IMAGE_SIDE, IMAGE_SIDE) if draw.random() < 0.8 else (1, IMAGE_SIDE**2)
    layers: list[nn.Module] = [nn.Flatten(), nn.Unflatten(1, (channels, length))]
    for _ in range(draw.randint(1, 3)):
        width, kernel = log_uniform(draw, 16, 96), draw.choice([3, 3, 5, 7])
        stride = 1 if length <= IMAGE_SIDE else 4
        layers.append(nn.Conv1d(channels, width, kernel, stride, kernel // 2))
        layers += [nn.BatchNorm1d(width)] if norm else []
        layers.append(activation())
        channels, length = width, (length - 1) // stride + 1
        if length > 6 and draw.random() < 0.6:
            layers.append(nn.MaxPool1d(2))
            length //= 2
    pooled = draw.random() < 0.2
    widths = [log_uniform(draw, 32, 128) for _ in range(drawn(draw, {0: 3, 1: 4, 2: 1}))]
    features = channels if pooled else channels * length
    hidden = draw_hidden(draw, features, widths, classes, activation, None)
    return nn.Sequential(*layers, *([nn.AdaptiveAvgPool1d(1)] if pooled else []), nn.Flatten(), *hidden)


# How often networks of each kind are drawn, and what draws them.
FAMILIES = {
    "ordinary": (5.6, draw_ordinary), "convolutions": (8.4, draw_convolutional), "mlp": (4.5, draw_mlp),
    "tokens": (3.5, draw_tokens), "deep": (5, draw_deep), "rows": (1, draw_rows),
}  # fmt: skip


def draw_architecture(
    draw: random.Random, classes: int, refused: list[list[tuple[int, ...]]] = (), kinds: Iterable[str] = FAMILIES
) -> nn.Module:
    """A random network of one of these `kinds`, whose parameters have none of the `refused` lists of shapes.

    Its weights are PyTorch's default init, from the global generator of torch.
    """
    makers = {make: share for share, make in (FAMILIES[kind] for kind in kinds)}
    while True:
        network = drawn(draw, makers)(draw, classes)
        if network is not None and parameter_shapes(network) not in refused:
            return network


class Convolutional:
    """A random network of convolutions in the making; `network` is None if it would cost too much.

    Of the `style` "any" it has 1 to 10 of them; "ordinary" ones are plain; "deep" ones have many, in stages of equal
    blocks whose maps get smaller and wider.
    """

    def __init__(self, draw: random.Random, classes: int, style: str):
        self.draw, self.ordinary, self.deep = draw, style == "ordinary", style == "deep"
        self.activation = nn.ReLU if self.ordinary else drawn(draw, DEEP_ACTIVATIONS if self.deep else ACTIVATIONS)
        self.norm = None if self.ordinary else drawn(draw, NORMS)
        self.channels = 1 if draw.random() < 0.95 else 3
        self.side, self.multiplications = IMAGE_SIDE, 0
        self.most = MOST_DEEP_MULTIPLICATIONS if self.deep else MOST_MULTIPLICATIONS
        self.layers: list[nn.Module] = []
        if self.deep:
            self.add_blocks()
        else:
            self.add_stages()
        self.add_head(classes)

    def add_stages(self) -> None:
        """1 to 10 convolutions, of one kind and plain ones, of any widths."""
        draw = self.draw
        left = drawn(draw, {1: 2, 2: 10, 3: 3, 4: 4, 5: 2, 6: 2, 8: 2, 10: 1})
        several = left > 3
        widest = 64 if left > 1 or draw.random() < 0.5 else 32
        kind = drawn(draw, ORDINARY_STAGES if self.ordinary else STAGES)
        pooling = drawn(draw, {nn.MaxPool2d: 5, nn.AvgPool2d: 1, None: 1})
        every = 1 if not several else draw.choice([1, 2, 2, 3])  # stages between reductions of the maps
        stage = 0
        while left > 0:
            width = log_uniform(draw, 4 if draw.random() < 0.2 else 8, widest)
            reduce = (
                self.side > 4 and (stage % every == every - 1 or not several) and (self.side > 7 or draw.random() < 0.3)
            )
            stride = 2 if reduce and pooling is None else 1
            used = kind if (self.layers or kind == "branches") and draw.random() < 0.8 else "plain"
            left -= self.add_stage(used, width, stride)
            stage += 1
            if reduce and pooling is not None:
                self.add_pooling(pooling)
            if self.multiplications > 2 * self.most:
                break

    def add_blocks(self) -> None:
        """A convolution of the images, and 2 to 4 stages of 1 to 4 blocks of one kind."""
        draw = self.draw
        kind = drawn(draw, DEEP_STAGES)
        if kind == "channels-last":
            self.activation, self.norm = nn.GELU, "layer"
        elif kind == "fire":
            self.norm = "batch" if draw.random() < 0.2 else None
        elif draw.random() < 0.8:
            self.norm = "batch"
        width = 4 * round(log_uniform(draw, 8, 32) / 4)
        stride = draw.choice([1, 1, 2, 4] if kind == "channels-last" else [1, 1, 2])
        self.add_stage("plain", width, stride, 4 if stride == 4 else draw.choice([3, 3, 3, 5, 7]))
        if stride == 2 and draw.random() < 0.3:
            self.layers.append(nn.MaxPool2d(3, 2, 1))
            self.side = -(-self.side // 2)
        pooling = nn.MaxPool2d if kind in ("plain", "dense", "fire") or draw.random() < 0.2 else None
        blocks = drawn(draw, {1: 4, 2: 4, 3: 1.5, 4: 0.5})
        for stage in range(draw.randint(2, 4)):
            if stage and draw.random() < 0.8:
                width = min(2 * width, 128)
            reduce = self.side > 3 and (stage > 0 or draw.random() < 0.3)
            for block in range(blocks):
                self.add_stage(kind, width, 2 if reduce and block == 0 and pooling is None else 1)
                if self.multiplications > 2 * self.most:
                    return
            if reduce and pooling is not None:
                self.add_pooling(pooling)

    def add_head(self, classes: int) -> None:
        """Global average pooling or the flattened maps, hidden layers, and the classes."""
        draw = self.draw
        heads = {"flat": 3, "pooled": 12, "classes": 1.5} if self.deep else HEADS
        head = "flat" if self.ordinary else drawn(draw, heads)
        if head == "classes":  # from a convolution
            self.layers += [self.conv(self.channels, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        else:
            if head != "flat":
                side = 1 if head == "pooled" else min(self.side, draw.randint(2, 4))
                self.layers.append(nn.AdaptiveAvgPool2d(side))
                self.side = side
            features = self.channels * self.side**2
            hidden = drawn(draw, {0: 3, 1: 6, 2: 1.5, 3: 0.5} if head == "flat" else {0: 8, 1: 2})
            widths = [
                log_uniform(draw, 16 if draw.random() < 0.2 else 32, 256 if draw.random() < 0.3 else 128)
                for _ in range(hidden)
            ]
            norm = self.norm if draw.random() < 0.5 else None
            self.layers.append(nn.Flatten())
            if self.deep and self.norm == "layer":
                self.layers.append(nn.LayerNorm(features))
            self.layers += draw_hidden(draw, features, widths, classes, self.activation, norm)
            self.multiplications += features * (widths[0] if widths else classes)
            if features > MOST_FEATURES:
                self.multiplications = math.inf
        self.network = nn.Sequential(*self.layers) if self.multiplications <= self.most else None

    def add_pooling(self, pooling: type[nn.Module]) -> None:
        size, stride = (2, 2) if self.draw.random() < 0.9 else (3, 2)
        # Before a ReLU the maximum is the same as after it, and the ReLU costs a quarter.
        before = isinstance(self.layers[-1], nn.ReLU) and pooling is nn.MaxPool2d and self.draw.random() < 0.6
        self.layers.insert(len(self.layers) - before, pooling(size, stride))
        self.side = (self.side - size) // stride + 1

    def conv(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, valid: bool = False
    ) -> nn.Conv2d:
        padding = 0 if valid else kernel // 2
        side = (self.side + 2 * padding - kernel) // stride + 1
        self.multiplications += inputs * outputs // groups * (kernel * side) ** 2
        return nn.Conv2d(
            inputs, outputs, kernel, stride, padding, groups=groups, bias=self.norm is None or self.draw.random() < 0.5
        )

    def normalised(self, layer: nn.Conv2d, activation: bool = True) -> list[nn.Module]:
        """A convolution, the norm and the activation."""
        return [layer, *self.norms(layer.out_channels), *([self.activation()] if activation else [])]

    def norms(self, channels: int) -> list[nn.Module]:
        if self.norm == "batch":
            return [nn.BatchNorm2d(channels)]
        if self.norm == "instance":
            return [nn.InstanceNorm2d(channels, affine=self.draw.random() < 0.5)]
        if self.norm is None:
            return []
        groups = self.draw.choice([n for n in (1, 2, 4, 8) if channels % n == 0]) if self.norm == "group" else 1
        return [nn.GroupNorm(groups, channels)]

    def add_stage(self, kind: str, width: int, stride: int, kernel: int | None = None) -> int:
        """Add a stage of some `kind`; the convolutions that it counts as. A `kernel` is that of a plain one."""
        inputs, draw = self.channels, self.draw
        self.channels = width
        counts = 2
        if kind == "plain":
            kernel = kernel or (3 if self.deep else drawn(draw, KERNELS if self.layers else KERNELS | {1: 0}))
            valid = self.side > kernel + 3 and (kernel == stride or draw.random() < (0.1 if self.deep else 0.25))
            layer = self.conv(inputs, width, kernel, stride, valid=valid)
            self.layers += self.normalised(layer)
            self.side = (self.side + 2 * layer.padding[0] - kernel) // stride + 1
            return 1
        if kind in ("residual", "bottleneck"):
            middle = max(4, width // 4) if kind == "bottleneck" else width
            kernels = (1, 3, 1) if kind == "bottleneck" else (draw.choice([3, 3, 3, 5]),) * 2
            same = (inputs == width and stride == 1) or (not self.deep and draw.random() < 0.6)
            if same:  # most blocks keep the width
                self.channels, width, stride = inputs, inputs, 1
                middle = inputs if kind == "residual" else max(4, inputs // 4)
            widths = [inputs, *[middle] * (len(kernels) - 1), width]
            inner = []
            for place, kernel in enumerate(kernels):
                layer = self.conv(widths[place], widths[place + 1], kernel, stride if place == 0 else 1)
                inner += self.normalised(layer, activation=place < len(kernels) - 1)
            shortcut = None if same else nn.Sequential(*self.normalised(self.conv(inputs, width, 1, stride), False))
            self.layers.append(Sum(nn.Sequential(*inner), shortcut, self.activation() if draw.random() < 0.9 else None))
            self.side = -(-self.side // stride)
        elif kind == "pre-activation":
            if not self.deep:
                self.channels, width, stride = inputs, inputs, 1
            inner = [
                *self.norms(inputs), self.activation(), self.conv(inputs, width, 3, stride),
                *self.norms(width), self.activation(), self.conv(width, width, 3),
            ]  # fmt: skip
            same = inputs == width and stride == 1
            self.layers.append(Sum(nn.Sequential(*inner), None if same else self.conv(inputs, width, 1, stride)))
            self.side = -(-self.side // stride)
        elif kind == "separable":
            depthwise = self.normalised(self.conv(inputs, inputs, 3, stride, groups=inputs), draw.random() < 0.8)
            self.layers += [*depthwise, *self.normalised(self.conv(inputs, width, 1))]
            self.side = -(-self.side // stride)
        elif kind == "inverted":
            wide = inputs * draw.choice([2, 4])
            same = stride == 1 and (inputs == width or not self.deep)
            self.channels = inputs if same else width
            gate = [Gate(wide, max(2, wide // 4))] if self.deep and draw.random() < 0.3 else []
            inner = [
                *self.normalised(self.conv(inputs, wide, 1)),
                *self.normalised(self.conv(wide, wide, draw.choice([3, 3, 5]) if self.deep else 3, stride, wide)),
                *gate,
                *self.normalised(self.conv(wide, self.channels, 1), False),
            ]
            self.layers.append(Sum(nn.Sequential(*inner)) if same else nn.Sequential(*inner))
            self.side = -(-self.side // stride)
        elif kind == "branches":
            parts = [max(4, width // 2)] * 2
            kernels = draw.choice([(1, 3), (3, 5), (3, 3)])
            self.channels = sum(parts)
            self.layers.append(Concatenation(*(
                nn.Sequential(*self.normalised(self.conv(inputs, part, kernel, stride)))
                for part, kernel in zip(parts, kernels, strict=True)
            )))  # fmt: skip
            self.side = -(-self.side // stride)
        elif kind == "dense":
            width = max(4, width // 2) if self.deep else width
            self.channels = inputs + width
            self.layers.append(
                Concatenation(nn.Identity(), nn.Sequential(*self.normalised(self.conv(inputs, width, 3))))
            )
            counts = 1
        elif kind == "fire":  # Iandola et al. 2016
            squeezed = self.normalised(self.conv(inputs, width // 4, 1))
            expanded = (nn.Sequential(*self.normalised(self.conv(width // 4, width // 2, side))) for side in (1, 3))
            self.layers += [*squeezed, Concatenation(*expanded)]
        elif kind == "shuffled" and inputs == width and stride == 1:
            half = width // 2
            self.layers.append(Shuffled(nn.Sequential(
                *self.normalised(self.conv(half, half, 1)),
                *self.normalised(self.conv(half, half, 3, groups=half), False),
                *self.normalised(self.conv(half, half, 1)),
            )))  # fmt: skip
        elif kind == "channels-last":  # Liu et al. 2022
            if inputs != width or stride > 1:
                self.layers += [Transposed(nn.LayerNorm(inputs)), self.conv(inputs, width, stride, stride, valid=True)]
                self.side //= stride
            gain = drawn(draw, {None: 1, 1e-6: 1, 1e-1: 0.5, 1.0: 0.5})
            inner = [nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
            inner += [] if gain is None else [Gain(width, gain)]
            depthwise = self.conv(width, width, draw.choice([3, 5, 7, 7]), groups=width)
            self.layers.append(Sum(nn.Sequential(depthwise, Transposed(nn.Sequential(*inner)))))
            self.multiplications += 8 * (width * self.side) ** 2
        else:  # gated, or the way down between shuffled ones
            gate = [Gate(width, max(2, width // 4))] if kind == "gated" else []
            self.layers += [*self.normalised(self.conv(inputs, width, 3, stride)), *gate]
            self.side = -(-self.side // stride)
            counts = 1
        return counts
