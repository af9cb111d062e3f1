"""MNIST, as the synthesiser's own task: the shapes of its images, and how networks may take them."""

import torch
from torch import Tensor

from universal.reading.inputs import InputFormat

IMAGE_SIDE = 28  # pixels
IMAGE_SHAPE = (1, IMAGE_SIDE, IMAGE_SIDE)  # (channels, height, width)
CLASSES = 10
MAP = (IMAGE_SIDE, IMAGE_SIDE)
# A network may take [N, 1, 28, 28], [N, 3, 28, 28], [N, 28, 28] or [N, 784], which are tried in this order.
IMAGE_FORMATS = (
    InputFormat(("NCYX",), (1, *MAP)),
    InputFormat(("NCYX",), (3, *MAP), lambda images: images.expand(-1, 3, -1, -1)),
    InputFormat(("NYX",), MAP, lambda images: images.flatten(0, 1)),
    InputFormat(("NYX",), MAP, lambda images: images.flatten(1)),
)


def noise(count: int) -> Tensor:
    """So many images of noise, [count, 1, 28, 28], always the same."""
    return torch.randn((count, *IMAGE_SHAPE), dtype=torch.float32, generator=torch.Generator().manual_seed(0))
