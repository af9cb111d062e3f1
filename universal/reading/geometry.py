"""Where activations lie: which channels and places a layer, gain or shift reads."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from universal.reading.following import Numbers


def per_side(option: int | str | Sequence[int], sides: int) -> str | tuple[int, ...]:
    """An option of a convolution as one number for each of so many sides, or its name."""
    if isinstance(option, str):
        return option
    numbers = (option,) if isinstance(option, int) else tuple(option)
    return numbers * sides if len(numbers) == 1 else numbers


def side_of(sizes: Sequence[int]) -> float:
    """The side of a square map, or cube, of as many places as one of these `sizes`."""
    return math.prod(sizes) ** (1 / len(sizes))


def where_it_lies(parameter: Tensor, numbers: Numbers) -> tuple[int, Tensor, Tensor | None] | None:
    """How a parameter that is added to activations with these numbers, or multiplied, fits them, if it does.

    That is the axis of the neurons; their codes, [neurons]; and, if it adds something else at every place, the places.
    """
    shape = (1,) * (numbers.codes.dim() - parameter.dim()) + tuple(parameter.shape)
    if len(shape) != numbers.codes.dim() or shape[0] != 1:
        return None
    for axis in (-1, 1):
        codes, y, x = (tensor[:1].movedim(axis, -1).flatten(0, -2) for tensor in numbers[:3])
        neurons = codes.amax(0)
        added = parameter.view(shape).movedim(axis, -1).flatten(0, -2)
        fits = added.shape[1] == len(neurons) and len(added) in (1, len(codes))
        if fits and ((codes == neurons) | (codes == 0)).all():  # beside tokens of no neuron
            return axis, neurons, torch.stack([y[:, 0], x[:, 0]], 1).float() if len(added) > 1 else None
    return None


def middles(count: int) -> Tensor:
    """The middles of `count` equal parts of (0, 1)."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def read_channels(numbers: Numbers) -> tuple[Tensor, Tensor | None, None, None]:
    """What a convolution reads: `channels`, `places`, `grid` and `order` of `Layer`, codes for numbers."""
    codes, y, x = (tensor[0].flatten(1) for tensor in numbers[:3])
    codes = codes[:, :1] if (codes == codes[:, :1]).all() else codes[:, :: max(1, codes.shape[1] // 49)]
    repeated = len(codes.sum(1).unique()) < len(codes)
    return codes, torch.stack([y.mean(1), x.mean(1)], 1).float() if repeated else None, None, None


def read_features(numbers: Numbers) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """What a linear layer reads: `channels`, `places`, `grid` and `order` of `Layer`, codes for numbers."""
    codes, y, x = (tensor.flatten(0, -2) for tensor in numbers[:3])
    places = torch.stack([ranks(y.mean(0)), ranks(x.mean(0))], 1).float()
    middle = torch.full((1, 2), 0.5)
    if (codes == codes[0]).all():
        _, which, counts = codes[0].unique(return_inverse=True, return_counts=True)
        count = int(counts[0])
        if (counts == count).all():
            first = torch.full_like(counts, codes.shape[1]).scatter_reduce(0, which, torch.arange(len(which)), "amin")
            order = torch.argsort(first[which], stable=True)
            grids = places[order].view(-1, count, 2)
            if (grids == grids[0]).all() or count == 1:
                in_order = torch.equal(order, torch.arange(len(order)))
                channels = codes[0, order].view(-1, count)[:, :1]
                return channels, None, grids[0] if count > 1 else middle, None if in_order else order
        return codes[:1].T, places, middle, None
    several = codes.unique(dim=0)
    if (several.sort(0).values == several.sort(0).values[:, :1]).all():  # the same channels everywhere: it mixes places
        return several[:, 0][None], None, places, None
    return (
        several[:: max(1, len(several) // 49)].T,
        places if len(several.T.unique(dim=0)) < several.shape[1] else None,
        middle,
        None,
    )


def ranks(places: Tensor) -> Tensor:
    """Places within (0, 1), spread evenly."""
    found, which = (places * 1e6).round().unique(return_inverse=True)
    return middles(len(found))[which]
