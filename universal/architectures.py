"""The architectures that the synthesiser trains on, drawn at random, and the ones that it is evaluated on."""

import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from target_cnn import TargetCNN
from universal.graph import IMAGE_CHANNELS, IMAGE_SIDE

MOST_MULTIPLICATIONS = 16e6  # per image, of a drawn network: a TargetCNN has 4.2 million
MOST_FEATURES = 6272  # values of an image that reach the first linear layer: twice a TargetCNN's
PLAIN = 0.93  # share of networks of the plainest kind


class ResidualBlock(nn.Module):
    """[N, width, height, width] -> the same shape: the input plus two convolutions of it, and a ReLU of the sum."""

    def __init__(self, width: int, kernel: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, kernel, padding="same")
        self.conv2 = nn.Conv2d(width, width, kernel, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


def draw_architecture(draw: random.Random, classes: int) -> nn.Module:
    """A random network: 0 to 4 convolutions, 0 to 3 hidden linear layers. Never one that is evaluated.

    Its weights are PyTorch's default init, from the global generator of torch.
    """
    while True:
        network = draw_once(draw, classes)
        if parameter_shapes(network) not in EVALUATED_SHAPES:
            return network


def parameter_shapes(network: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in network.parameters()]


def log_uniform(draw: random.Random, low: int, high: int) -> int:
    """A whole number whose logarithm is uniform."""
    return round(math.exp(draw.uniform(math.log(low), math.log(high))))


def draw_once(draw: random.Random, classes: int) -> nn.Module:
    plain = draw.random() < PLAIN  # as most people build them: the rest have everything that is supported
    channels = 1 if plain else draw.choices(IMAGE_CHANNELS, [7, 3])[0]
    convolutions = draw.choices([0, 1, 2, 3, 4], [8, 1, 7, 2, 2])[0]
    activation = nn.ReLU if plain else draw.choices([nn.ReLU, nn.GELU], [2, 1])[0]
    layers: list[nn.Module] = []
    side, multiplications = IMAGE_SIDE, 0
    while convolutions > 0:
        if layers and convolutions >= 2 and draw.random() < (0.15 if plain else 0.3):
            kernel = 3 if plain else draw.choice([3, 5])
            layers.append(ResidualBlock(channels, kernel))
            multiplications += 2 * (channels * kernel * side) ** 2
            convolutions -= 2
        else:
            width = log_uniform(draw, 8, 64)
            kernel = draw.choices([3, 5], [9, 1])[0] if plain else draw.randint(1, 7)
            stride, padding = 1, kernel // 2
            if side > 7 and not plain:
                stride = draw.choices([1, 2], [3, 1])[0]
                padding = draw.choices([kernel // 2, 0], [2, 1])[0]
            layers.append(nn.Conv2d(channels, width, kernel, stride, padding))
            side = (side + 2 * padding - kernel) // stride + 1
            multiplications += channels * width * (kernel * side) ** 2
            channels = width
            convolutions -= 1
            layers.append(activation())
        if side > 7 and (plain or draw.random() < 0.8):
            pooling = nn.MaxPool2d if plain else draw.choice([nn.MaxPool2d, nn.AvgPool2d])
            # Before a ReLU the maximum is the same as after it, and the ReLU costs a quarter.
            before = isinstance(layers[-1], activation) and (plain or draw.random() < 0.5)
            layers.insert(len(layers) - before, pooling(2))
            side //= 2
    if layers and not plain and draw.random() < 0.3:
        side = draw.randint(1, 4)
        layers.append(nn.AdaptiveAvgPool2d(side))
    if channels * side**2 > MOST_FEATURES or multiplications > MOST_MULTIPLICATIONS:
        return draw_once(draw, classes)
    features = channels * side**2
    widest = 160 if layers else 256
    hidden = draw.choices([0, 1, 2, 3], [2, 8, 1, 1] if layers else [3, 1, 6, 1])[0]
    if not layers and not hidden:
        features = max(IMAGE_CHANNELS) * IMAGE_SIDE**2  # the linear classifier of one channel is evaluated
    layers.append(nn.Flatten())
    for _ in range(hidden):
        width = log_uniform(draw, 32, widest)
        layers += [nn.Linear(features, width), activation()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, classes))


# ---- never trained on -----------------------------------------------------------------------------------------------


def mlp(hidden: list[int]) -> nn.Module:
    """A multi-layer perceptron with so many hidden neurons in each layer; a linear classifier without any."""
    widths = [IMAGE_SIDE**2, *hidden]
    layers = [layer for sizes in zip(widths, hidden, strict=False) for layer in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], 10))


def cnn(channels: list[int], hidden: int) -> nn.Module:
    """3x3 convolutions, the first two followed by pooling, and a hidden linear layer, as a TargetCNN has them."""
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(zip([1, *channels], channels, strict=False)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), *([nn.MaxPool2d(2)] if index < 2 else [])]
    side = IMAGE_SIDE // 4
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(channels[-1] * side**2, hidden), nn.ReLU(), nn.Linear(hidden, 10)
    )


def residual_network(width: int = 32) -> nn.Module:
    """6 convolutions: two residual blocks, a convolution before each, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), ResidualBlock(width),
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), ResidualBlock(width),
        nn.Flatten(), nn.Linear(width * (IMAGE_SIDE // 4) ** 2, 10),
    )  # fmt: skip


EVALUATED: dict[str, Callable[[], nn.Module]] = {
    "TargetCNN": TargetCNN,
    "half width": lambda: cnn([16, 32], 64),
    "double width": lambda: cnn([64, 128], 256),
    "5 convolutions": lambda: cnn([16, 32, 32, 32, 32], 64),
    "residual network of 6 convolutions": residual_network,
    "MLP 784-256-128-10": lambda: mlp([256, 128]),
    "linear classifier 784-10": lambda: mlp([]),
}
with torch.device("meta"):
    EVALUATED_SHAPES = [parameter_shapes(build()) for build in EVALUATED.values()]
