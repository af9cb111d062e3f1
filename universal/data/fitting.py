"""What images a module takes, found by trying."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from scripting import in_short
from universal.reading.graph import still
from universal.reading.reading import logits_of
from universal.reading.refusals import place_of

# Sides of squares, in pixels: first those that networks are made for most often.
SIDES = dict.fromkeys((28, 32, 64, 224, 96, 128, 48, 16, 8, 227, 256, 299, *range(4, 161)))


class Fit(NamedTuple):
    """How a module takes images, and how many classes it tells apart."""

    channels: int
    size: tuple[int, int]  # height, width
    shape: tuple[int, ...]  # of one image, as the module takes it: [C, H, W], [H, W] or flattened
    outputs: int


def fit(
    module: nn.Module, own_channels: int, own_size: tuple[int, int], channels: int | None = None,
    size: tuple[int, int] | None = None,
) -> Fit:  # fmt: skip
    """The first way that a module takes images: of their own size, or else of SIDES, in their own channels or others.

    Raises ValueError, with the module's own error and its line, if it takes them in none.
    """
    sizes = [size] if size else [own_size, *((side, side) for side in SIDES)]
    every = dict.fromkeys([channels] if channels else [own_channels, *([1, 3] if own_channels in (1, 3) else [])])
    said = None
    dtype = next((one.dtype for one in module.parameters() if one.is_floating_point()), torch.float32)
    with still(module), torch.no_grad():
        for channels, size, shape in ((c, s, shape) for s in sizes for c in every for shape in shapes_of(c, s)):
            try:
                logits = logits_of(module(torch.zeros(2, *shape, dtype=dtype)))
                if logits is None or logits.dim() != 2 or len(logits) != 2:
                    raise ValueError("what it returns is no logits [N, classes]")
            except Exception as error:  # the module's own code may raise anything
                if "required positional argument" in str(error):
                    line = f"takes more than images ({in_short(error)}): give a network of one input"
                    raise ValueError(line) from error
                said = said or (shape, f"{in_short(error)}{place_of(error)}")
            else:
                return Fit(channels, size, shape, logits.shape[1])
    shape, reason = said
    given = ", ".join(map(str, ("N", *shape)))
    tried = "" if len(sizes) == 1 else f" nor of {len(sizes)} other sizes"
    raise ValueError(
        f"takes no images [{given}]{tried} (of the first it says {reason}): "
        "give what it takes with --size and --channels, or change the network"
    )


def shapes_of(channels: int, size: tuple[int, int]) -> Iterator[tuple[int, ...]]:
    """The ways in which networks take an image, by which it may be reshaped."""
    yield channels, *size
    if channels == 1:
        yield size
    yield (channels * math.prod(size),)
