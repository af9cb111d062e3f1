"""The networks that the synthesiser is evaluated on, as people build them for MNIST. Training draws none of them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from target_cnn import TargetCNN
from universal.mnist import IMAGE_SIDE
from universal.training.architectures import parameter_shapes


def mlp(hidden: list[int], activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """A multi-layer perceptron with so many hidden neurons in each layer; a linear classifier without any."""
    widths = [IMAGE_SIDE**2, *hidden]
    layers = [layer for sizes in zip(widths, hidden, strict=False) for layer in (nn.Linear(*sizes), activation())]
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


class ResidualBlock(nn.Module):
    """[N, width, height, width] -> the same shape: the input plus two convolutions of it, and a ReLU of the sum."""

    def __init__(self, width: int, kernel: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, kernel, padding="same")
        self.conv2 = nn.Conv2d(width, width, kernel, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


def residual_network(width: int = 32) -> nn.Module:
    """6 convolutions: two residual blocks, a convolution before each, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), ResidualBlock(width),
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), ResidualBlock(width),
        nn.Flatten(), nn.Linear(width * (IMAGE_SIDE // 4) ** 2, 10),
    )  # fmt: skip


class Example(nn.Module):
    """The CNN of the MNIST example of PyTorch."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(9216, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout1(F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2))
        x = self.dropout2(F.relu(self.fc1(torch.flatten(x, 1))))
        return F.log_softmax(self.fc2(x), dim=1)


class OldExample(nn.Module):
    """The older form of that example."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 10, 5), nn.Conv2d(10, 20, 5)
        self.conv2_drop = nn.Dropout2d()
        self.fc1, self.fc2 = nn.Linear(320, 50), nn.Linear(50, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2_drop(self.conv2(x)), 2))
        x = F.dropout(F.relu(self.fc1(x.view(-1, 320))), training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


class TwoBranches(nn.Module):
    """3x3 and 5x5 convolutions of the image side by side, concatenated."""

    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(1, 16, 5, padding=2)
        self.conv, self.out = nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32 * 49, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.cat([F.relu(self.small(x)), F.relu(self.large(x))], 1), 2)
        return self.out(F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1))


class VisionTransformer(nn.Module):
    """Patches of 7 x 7 pixels, two `nn.TransformerEncoderLayer`s, and the mean of the tokens."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.places = nn.Parameter(0.02 * torch.randn(1, 16, width))
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.out = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.out(self.blocks(x).mean(1))


def conv(inputs: int, outputs: int, kernel: int = 3, activation: type[nn.Module] = nn.ReLU, **options) -> nn.Sequential:
    """A convolution, padded to keep the size unless `options` say otherwise, and what follows it."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, **({"padding": kernel // 2} | options)), activation())


def separable(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A depthwise separable convolution, as MobileNet has them."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 1), nn.ReLU()
    )


def pooled(*layers: nn.Module, features: int) -> nn.Sequential:
    """Layers, global average pooling, and the classes."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, 10))


def lenet(activation: type[nn.Module], pooling: type[nn.Module]) -> nn.Sequential:
    """LeNet-5 (LeCun et al. 1998)."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), activation(), pooling(2), nn.Conv2d(6, 16, 5), activation(), pooling(2),
        nn.Flatten(), nn.Linear(400, 120), activation(), nn.Linear(120, 84), activation(), nn.Linear(84, 10),
    )  # fmt: skip


def two_wide_kernels(first: Callable, second: Callable) -> nn.Sequential:
    """Convolutions of 16 and 32 channels, 5x5, each pooled."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), first(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5, padding=2), second(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 49, 10),
    )  # fmt: skip


def batch_normalised() -> nn.Sequential:
    """Four convolutions and a hidden linear layer, each with BatchNorm."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32), *block(32, 32), nn.MaxPool2d(2), *block(32, 64), *block(64, 64), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(3136, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


# The first seven as they were from the beginning; then what people build.
EVALUATED: dict[str, Callable[[], nn.Module]] = {
    "TargetCNN": TargetCNN,
    "half width": lambda: cnn([16, 32], 64),
    "double width": lambda: cnn([64, 128], 256),
    "5 convolutions": lambda: cnn([16, 32, 32, 32, 32], 64),
    "residual network of 6 convolutions": residual_network,
    "MLP 784-256-128-10": lambda: mlp([256, 128]),
    "linear classifier 784-10": lambda: mlp([]),
    "PyTorch example": Example,
    "PyTorch example, older": OldExample,
    "FedAvg CNN": lambda: nn.Sequential(
        *conv(1, 32, 5), nn.MaxPool2d(2), *conv(32, 64, 5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3136, 512),
        nn.ReLU(), nn.Linear(512, 10),
    ),
    "MLP 784-200-200-10": lambda: mlp([200, 200]),
    "MLP 784-512-512-10": lambda: mlp([512, 512]),
    "LeNet-300-100": lambda: mlp([300, 100]),
    "LeNet-5, ReLU, max pooling": lambda: lenet(nn.ReLU, nn.MaxPool2d),
    "LeNet-5, tanh, average pooling": lambda: lenet(nn.Tanh, nn.AvgPool2d),
    "MLP 784-30-10, sigmoid": lambda: mlp([30], nn.Sigmoid),
    "MLP 784-16-10": lambda: mlp([16]),
    "conv 4, 8, valid": lambda: nn.Sequential(
        *conv(1, 4, padding=0), nn.MaxPool2d(2), *conv(4, 8, padding=0), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(200, 10),
    ),
    "conv 32, 32, 64, 64, valid": lambda: nn.Sequential(
        *conv(1, 32, padding=0), *conv(32, 32, padding=0), nn.MaxPool2d(2), *conv(32, 64, padding=0),
        *conv(64, 64, padding=0), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1024, 200), nn.ReLU(), nn.Linear(200, 200),
        nn.ReLU(), nn.Linear(200, 10),
    ),
    "conv 8x8 stride 2, 4x4 stride 2": lambda: nn.Sequential(
        *conv(1, 16, 8, stride=2, padding=3), nn.MaxPool2d(2, 1), *conv(16, 32, 4, stride=2, padding=0),
        nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
    ),
    "8 convolutions, global pooling": lambda: pooled(
        *conv(1, 16), *conv(16, 16), nn.MaxPool2d(2), *conv(16, 32), *conv(32, 32), *conv(32, 32), nn.MaxPool2d(2),
        *conv(32, 64), *conv(64, 64), *conv(64, 64), features=64,
    ),
    "residual block, global pooling": lambda: pooled(*conv(1, 32), nn.MaxPool2d(2), ResidualBlock(32), features=32),
    "BatchNorm, 4 convolutions": batch_normalised,
    "depthwise separable, global pooling": lambda: pooled(
        *conv(1, 16, stride=2), separable(16, 32), separable(32, 64, 2), separable(64, 64), features=64
    ),
    "LeakyReLU, 2 convolutions": lambda: two_wide_kernels(nn.LeakyReLU, nn.LeakyReLU),
    "ELU and SiLU, 2 convolutions": lambda: two_wide_kernels(nn.ELU, nn.SiLU),
    "two branches, concatenated": TwoBranches,
    "vision transformer": VisionTransformer,
    "MLP of 5 hidden layers": lambda: mlp([512, 256, 128, 64, 32]),
    "MLP 784-2000-10": lambda: mlp([2000]),
}  # fmt: skip
with torch.random.fork_rng(devices=[]):  # on the device "meta", random numbers would import a compiler, for seconds
    EVALUATED_SHAPES = [parameter_shapes(build()) for build in EVALUATED.values()]
