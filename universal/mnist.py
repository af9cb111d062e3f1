"""MNIST, as the synthesiser's own task: the shapes of its images, and how networks may take them."""

from collections.abc import Callable

from torch import Tensor

IMAGE_SIDE = 28  # pixels
IMAGE_SHAPE = (1, IMAGE_SIDE, IMAGE_SIDE)  # (channels, height, width)
CLASSES = 10
IMAGE_CHANNELS = (1, 3)
# What a network may take: the shapes of a batch of N images, in the order in which they are tried.
IMAGE_FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "[N, 1, 28, 28]": lambda images: images,
    "[N, 3, 28, 28]": lambda images: images.expand(-1, 3, -1, -1),
    "[N, 28, 28]": lambda images: images.flatten(0, 1),
    "[N, 784]": lambda images: images.flatten(1),
}
