"""Where activations lie: which channels and places a layer, gain or shift reads."""

import math
from collections.abc import Sequence
from typing import NamedTuple

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

    That is the axis of the neurons, counted from the last; their codes, [neurons]; and, if it adds something else at
    every place, the places, [n, 2]. Where broadcasting puts it decides, as in the sum itself.
    """
    dimensions = numbers.codes.dim()
    shape = (1,) * (dimensions - parameter.dim()) + tuple(parameter.shape)
    if len(shape) != dimensions:
        return None
    if shape[0] != 1:  # the images may lie on another axis
        of_images = [axis for axis in range(1, dimensions) if shape[axis] == 1 and is_axis_of_images(axis, numbers)]
        if not of_images:
            return None
        moved = Numbers(*(tensor.movedim(of_images[0], 0) for tensor in numbers[:3]))
        found = where_it_lies(parameter.view(shape).movedim(of_images[0], 0), moved)
        # The neurons' axis, counted from the last, is where it was if it is behind that of the images.
        return found if found is not None and found[0] + dimensions > of_images[0] else None
    codes, y, x = (tensor[:1] for tensor in numbers[:3])
    if any(size not in (1, own) for size, own in zip(shape, codes.shape, strict=True)):
        return None
    for axis in (-1, *range(1 - dimensions, -1)):
        if shape[axis] != codes.shape[axis] or -axis > parameter.dim():
            continue
        along = codes.movedim(axis, -1).flatten(0, -2)
        neurons = along.amax(0)
        if neurons.any() and ((along == neurons) | (along == 0)).all():  # beside tokens of no neuron
            # It tells places apart along those axes that it has.
            means = [tensor.movedim(axis, -1).flatten(0, -2).mean(0) for tensor in (y, x)]
            own = torch.stack([neurons, *means], 1)
            if len(own.unique(dim=0)) < len(own):
                return None  # one neuron, expanded: nothing tells its copies from each other
            alike = [place for place in range(dimensions) if shape[place] == 1]
            y, x = (tensor.mean(alike, keepdim=True) if alike else tensor for tensor in (y, x))
            y, x = (tensor.movedim(axis, -1).flatten(0, -2)[:, 0] for tensor in (y, x))
            places = torch.stack([y, x], 1).float()
            if len(places) > 1 and (places == places[0]).all():
                return None  # nothing tells what is added at one of them from the others
            return axis, neurons, places if len(places) > 1 else None
    # Of activations that are of other neurons at every place, as where tokens were mixed, it has those at the first.
    for axis in (-1, *range(1 - dimensions, -1)):
        first = codes.movedim(axis, -1).flatten(0, -2)[0]
        if parameter.numel() == shape[axis] == len(first) > 1 and first.any():
            return axis, first, None
    return None


def is_axis_of_images(axis: int, numbers: Numbers) -> bool:
    """Whether the two images may lie along an axis: it tells neither neurons nor places apart."""
    return numbers.codes.shape[axis] == 2 and all(
        torch.equal(*tensor.unbind(axis)) for tensor in (numbers.codes, numbers.y, numbers.x)
    )


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
    apart = len(several.T.unique(dim=0)) == several.shape[1]
    return several[:: max(1, len(several) // 49)].T, None if apart else places, middle, None


def ranks(places: Tensor) -> Tensor:
    """Places within (0, 1), spread evenly."""
    found, which = (places * 1e6).round().unique(return_inverse=True)
    return middles(len(found))[which]


class Windows(NamedTuple):
    """The windows of a map that the rows of features of a linear layer are: what makes it a convolution."""

    sides: tuple[int, int]  # of a window
    order: Tensor | None  # of the features, that brings the positions of a channel together, row by row
    stride: tuple[int, int]
    map_side: int  # of the map that they are windows of
    across: float  # how many there are beside each other, if they lay in a square, or in a row


WIDEST = 16  # sides of windows: in larger ones, the places in a kernel can hardly be told from each other


def find_windows(numbers: Numbers, order: Tensor | None, positions: int) -> Windows | None:
    """The windows that a linear layer reads whose features, in this `order`, are channels at so many positions.

    None unless it reads more than one, each a rectangle of as many places, somewhere else.
    """
    y, x = (tensor.flatten(0, -2) for tensor in numbers[1:3])
    count = y.shape[1]
    order = torch.arange(count) if order is None else order
    if positions == 1 or count % positions or len(y) < 3:
        return None
    y, x = (tensor[:, order].view(len(tensor), -1, positions) for tensor in (y, x))
    found = []
    for places in (y, x):
        corner = places.amin((1, 2), keepdim=True)
        within = places - corner
        if not torch.allclose(within, within[:1, :1].expand_as(within), atol=1e-9):
            return None
        inside, outside = ((values * 1e7).round().unique() / 1e7 for values in (within[0, 0], corner))
        found.append((within[0, 0], inside, outside))
    sides = tuple(len(inside) for _, inside, _ in found)
    if math.prod(sides) != positions or max(sides) > WIDEST or all(len(outside) == 1 for *_, outside in found):
        return None
    steps = [inside.diff().min().item() if len(inside) > 1 else 0.0 for _, inside, _ in found]
    steps = [step or max(steps) for step in steps]
    stride = tuple(
        round(outside.diff().min().item() / step) if len(outside) > 1 else side
        for (*_, outside), step, side in zip(found, steps, sides, strict=True)
    )
    (down, *_), (across, *_) = found
    by_rows = torch.argsort((down * 1e7).round() * 1e8 + (across * 1e7).round(), stable=True)
    order = order.view(-1, positions)[:, by_rows].flatten()
    in_order = torch.equal(order, torch.arange(count))
    counts = [len(outside) for *_, outside in found if len(outside) > 1]
    return Windows(
        sides, None if in_order else order, stride, round(1 / steps[1]), math.prod(counts) ** (1 / len(counts))
    )
