"""What a network takes: the axes of its inputs, and the numbers by which their channels and places are followed."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from universal.reading.following import Numbers
from universal.reading.geometry import middles

# What the axes of inputs may be: N inputs, C channels, and places, Y down and X across. Of those with as many axes as
# an example has, that counts in which layers read one channel of it each, not mixtures; if none does, the first.
AXES = ("NCYX", "NCX", "NYX", "NXC", "NC", "NX")


class InputFormat(NamedTuple):
    """How a network takes inputs.

    `sizes` are those of an input's axes, and `axes` the AXES that these may be; `convert` makes of a batch what the
    network takes, in which axes may be flattened.
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    convert: Callable[[Tensor], Tensor] = lambda inputs: inputs

    def __call__(self, inputs: Tensor) -> Tensor:
        """The inputs as the network takes them."""
        return self.convert(inputs)

    def size(self, axis: str, axes: str) -> int:
        """How long an axis is if the inputs' axes are these; 1 if it is not among them."""
        return self.sizes[axes.index(axis) - 1] if axis in axes else 1

    def numbers(self, inputs: Tensor, axes: str, codes: Tensor) -> Numbers:
        """The numbers of two `inputs` as the network takes them, if their axes are these, and the channels have these
        `codes`."""

        def along(axis: str, values: Tensor) -> Tensor:
            return values.view([-1 if axis == other else 1 for other in axes]).expand(2, *self.sizes)

        y, x = (along(axis, middles(self.size(axis, axes))) for axis in "YX")
        codes, y, x = (values.reshape(inputs.shape) for values in (along("C", codes), y, x))
        return Numbers(codes, y, x, 0, frozenset([-1]))


def format_of(example: Tensor) -> InputFormat:
    """The format of a batch of inputs as a network takes them. Raises ValueError if these are no such inputs."""
    if not isinstance(example, Tensor):
        raise ValueError(f"the example is a {type(example).__name__}: give a tensor, a batch of two or more inputs")
    if example.is_nested or example.is_meta or example.layout != torch.strided:
        raise ValueError("the example is nested, sparse or without data: give an ordinary tensor")
    given = f"the example has the shape {[*example.shape]}"
    possible = tuple(axes for axes in AXES if len(axes) == example.dim())
    if not possible:
        raise ValueError(f"{given}: give images [N, C, H, W] or [N, H, W], signals [N, C, L] or rows [N, F]")
    if len(example) < 2:
        raise ValueError(f"{given}: give a batch of two or more inputs")
    if not example.numel():
        raise ValueError(f"{given}: its inputs are empty")
    if not example.is_floating_point():
        raise ValueError(f"the example is of {example.dtype}: give inputs of floating point, as the network takes them")
    if not example.float().isfinite().all():
        raise ValueError("the example holds NaN or infinite values: leave such inputs out")
    return InputFormat(possible, tuple(example.shape[1:]))


def two_of(example: Tensor) -> Tensor:
    """Two inputs to follow through a network: the first of the `example`, or noise of their kind where these are all
    of one value, of which a network might make zeros or take another way."""
    two = example.detach()[:2].clone()
    if two.float().min() < two.float().max():
        return two
    generator = torch.Generator().manual_seed(0)
    return torch.rand(two.shape, dtype=torch.float32, generator=generator).to(two)
