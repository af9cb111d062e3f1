"""Which neurons the elements of activations are of, through whatever a forward pass does with them.

No function need be known: it is called again with numbers in the place of the activations, and what comes out tells
whether it moved elements, averaged those of one neuron, or was a function of single ones.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from universal.reading.calls import CONTRACTIONS, LAYERS, Part, is_float


class Numbers(NamedTuple):
    """Which neuron each element of an activation is of, and where: tensors of the activation's shape, float64.

    A neuron is known by its code, a random number in (1, 2), so that no mean of two is a third; 0 stands for none. `y`
    and `x` are places within (0, 1).
    """

    codes: Tensor
    y: Tensor
    x: Tensor
    depth: int = 0  # how many layers the images have passed, on the longest way
    sources: frozenset[int] = frozenset()  # the layers, or -1 for the images, that it comes from with none between


class Neurons:
    """All neurons that activations are of, in blocks: the images' channels, a layer's neurons, what an unwritten layer
    gives, or sums of two others.

    Their numbers go from 1 on, in order of appearance; 0 is none.
    """

    def __init__(self):
        self.blocks: list[tuple[int, int | None, Tensor | None]] = []  # (count, the layer's index, or the pairs summed)
        self.codes = torch.zeros(1, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(0)

    def add(self, count: int, layer: int | None = None, pairs: Tensor | None = None) -> Tensor:
        """The codes of `count` new neurons, [count]: of a layer, or sums of `pairs`, [count, 2], of earlier ones."""
        self.blocks.append((count, layer, pairs))
        new = 1 + torch.rand(count, dtype=torch.float64, generator=self._generator)
        self.codes = torch.cat([self.codes, new])
        self._sorted, self._order = self.codes.sort()
        return new

    def numbers(self, codes: Tensor) -> Tensor | None:
        """The neurons' numbers, of the shape of `codes`; None if one of these is no neuron's code."""
        flat = codes.reshape(-1)
        for some in (flat[:: max(1, len(flat) // 8)], flat):  # a few first: most of what is not known shows at once
            above = torch.searchsorted(self._sorted, some - 1e-11).clamp(max=len(self._sorted) - 1)
            if not ((self._sorted[above] - some).abs() < 2e-11).all():
                return None
        return self._order[above].view(codes.shape)

    def pairs(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs of neurons, [n, 2], that codes of one shape are of at the same places; and which pair is where."""
        count = len(self.codes)
        both, inverse = (self.numbers(first) * count + self.numbers(second)).unique(return_inverse=True)
        return torch.stack([both // count, both % count], 1), inverse

    def lie_across(self, first: Tensor, second: Tensor) -> bool:
        """Whether neurons with these codes, of one shape, lie on different axes: each meets several of the others."""
        if torch.equal(first, second):  # most are
            return False
        pairs, _ = self.pairs(first, second)
        return all(numbers.unique(return_counts=True)[1].min() > 1 for numbers in pairs.T)

    def summed(self, first: Tensor, second: Tensor) -> Tensor:
        """The codes of the sums of neurons with these codes, of one shape; a sum with none is the other."""
        if torch.equal(first, second):
            return first
        pairs, inverse = self.pairs(first, second)
        codes = self.codes[pairs.amax(1)]
        new = (pairs != 0).all(1) & (pairs[:, 0] != pairs[:, 1])
        if new.any():
            codes[new] = self.add(int(new.sum()), pairs=pairs[new])
        return codes[inverse]


class Follower:
    """What is known of the tensors of one forward pass: the numbers of activations, the parts of parameters."""

    def __init__(self, parameters: dict[str, Tensor], originals: dict[str, Tensor], buffers: set[str]):
        self.neurons = Neurons()
        self.parameters, self.buffers = parameters, buffers
        self._numbers: dict[int, Numbers] = {}
        frozen = {name for name, tensor in originals.items() if not tensor.requires_grad}
        named = [*originals.items(), *parameters.items()]  # a module may keep its own beside those it is called with
        self._parts: dict[int, Part] = {id(tensor): Part(name, frozen=name in frozen) for name, tensor in named}
        self._computed: dict[int, str] = {}  # what was computed from parameters, not only moved: from which
        self._values: set[int] = set()  # whole numbers that were computed from activations
        self._alive: list[Tensor] = list(parameters.values())  # so that no id comes again

    def number(self, tensor: Tensor, numbers: Numbers) -> None:
        self._numbers[id(tensor)] = numbers
        self._alive.append(tensor)

    def numbers(self, tensor) -> Numbers | None:
        return self._numbers.get(id(tensor))

    def part(self, tensor) -> Part | None:
        return self._parts.get(id(tensor))

    def parameter(self, tensor) -> Part | None:
        """The part that a tensor is of a parameter; None where it is of a buffer, which is a constant, or complex."""
        part = self.part(tensor)
        return None if part is None or part.name in self.buffers or not is_float(tensor) else part

    def computed_from(self, tensor) -> str | None:
        return self._computed.get(id(tensor))

    def is_of_values(self, tensor) -> bool:
        return id(tensor) in self._values

    def follow(self, function: Callable, args: tuple, kwargs: dict, result) -> bool:
        """Find out what a function's `result` is of. Whether it only moved elements, or averaged those of one neuron.

        For that the function is called again, with numbers in the place of the activations.
        """
        leaves, spec = tree_flatten((args, kwargs))
        followed = {index: self.numbers(leaf) for index, leaf in enumerate(leaves) if self.numbers(leaf) is not None}

        def again(values: dict[int, Tensor], other: float | None = None) -> list:
            """The function's outputs for `values`, by place, and for `other` in the place of all other tensors."""
            changed = []
            for index, leaf in enumerate(leaves):
                if index in values:
                    leaf = values[index].clone()  # which the function may change
                elif isinstance(leaf, Tensor) and leaf.is_floating_point():
                    leaf = leaf.double() if other is None else torch.full_like(leaf, other, dtype=torch.float64)
                changed.append(leaf)
            new_args, new_kwargs = tree_unflatten(changed, spec)
            try:
                return tree_leaves(function(*new_args, **new_kwargs))
            except Exception:  # of numbers a function may think whatever it likes
                return []

        outputs = [(index, output) for index, output in enumerate(tree_leaves(result)) if is_activation(output)]
        if followed or any(id(leaf) in self._values for leaf in leaves):
            whole = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and not is_activation(leaf)]
            self._values |= {id(leaf) for leaf in whole}
            self._alive += whole
        if not followed:
            self._follow_parameters(leaves, outputs, again)
            return True
        inputs = list(followed.values())
        depth = max(numbers.depth for numbers in inputs)
        sources = frozenset().union(*(numbers.sources for numbers in inputs))
        moves = True
        for index, output in outputs:
            numbers = None
            if function not in CONTRACTIONS and function not in LAYERS:
                together = len(inputs) > 1 and broadcast(*(one.codes.shape for one in inputs)) == output.shape
                numbers = None if together else self._moved(followed, again, index, output.shape)
                if numbers is None:
                    numbers = self._elementwise(inputs, output.shape)
                    moves = moves and numbers is None
            if numbers is None:
                numbers = self._averaged(followed, again, index, output.shape)
            if numbers is None:
                moves = False
                middle = torch.full(output.shape, 0.5, dtype=torch.float64)
                numbers = Numbers(torch.zeros_like(middle), middle, middle)
            self.number(output, numbers._replace(depth=depth, sources=sources))
        return moves

    def assign(self, target: Tensor, index, value) -> None:
        """Follow `target[index] = value`, which only moves elements."""
        new = self.numbers(value)
        if new is None:
            return
        middle = torch.full(target.shape, 0.5, dtype=torch.float64)
        before = self.numbers(target) or Numbers(torch.zeros_like(middle), middle, middle)
        after = before._replace(codes=before.codes.clone(), y=before.y.clone(), x=before.x.clone())
        for own, values in zip(after[:3], new[:3], strict=True):
            own[index] = values
        depth, sources = max(before.depth, new.depth), before.sources | new.sources
        self.number(target, after._replace(depth=depth, sources=sources))

    def _moved(self, followed: dict[int, Numbers], again: Callable, index: int, shape: torch.Size) -> Numbers | None:
        """The numbers of an output whose elements are some of the inputs', or averages of one neuron's.

        A maximum over a neuron's places is one of these; that of several neurons is not, which shows when their codes
        are turned round. Tensors that are not followed, such as class tokens, are no neuron's.
        """

        def both_ways(part: str, largest: float) -> tuple[Tensor, Tensor] | None:
            values = {place: getattr(numbers, part) for place, numbers in followed.items()}
            forth = again(values, math.nan)
            back = again({place: largest - value for place, value in values.items()}, math.nan)
            return (forth[index], largest - back[index]) if len(forth) == len(back) > index else None

        first = next(iter(followed.values()))
        forth = again({place: numbers.codes for place, numbers in followed.items()}, math.nan)
        moved = forth[index] if index < len(forth) else None
        if not isinstance(moved, Tensor) or moved.shape != shape or moved.dtype != torch.float64:
            return None
        if len(followed) == 1 and torch.equal(moved.reshape(-1), first.codes.reshape(-1)):
            order = torch.arange(moved.numel(), dtype=torch.float64)
            places = again(dict.fromkeys(followed, order.view(first.codes.shape)), math.nan)[index]
            if torch.equal(places.reshape(-1), order):  # at most reshaped
                return first._replace(codes=moved, y=first.y.reshape(shape), x=first.x.reshape(shape))
        if shape != first.codes.shape and not moved.isnan().all():
            moved = moved.nan_to_num(0.0)
        numbers = self.neurons.numbers(moved)
        if numbers is None:
            return None
        codes, turned = both_ways("codes", 3.0)
        # Averages are of a neuron's code but for rounding.
        codes = torch.where((codes - turned).abs() < 1e-11, self.neurons.codes[numbers], 0.0)
        y, x = (sum(both_ways(part, 1.0)).nan_to_num(1.0) / 2 for part in ("y", "x"))
        return Numbers(codes, y, x)

    def _elementwise(self, inputs: list[Numbers], shape: torch.Size) -> Numbers | None:
        """The numbers of an output of the shape that its inputs, and what else went in, are broadcast to: of the sums
        of their neurons."""
        if broadcast(*(numbers.codes.shape for numbers in inputs), shape) != shape:
            return None
        inputs = [numbers for numbers in inputs if numbers.codes.any()] or inputs  # of others the places say nothing
        inputs = sorted(inputs, key=lambda numbers: numbers.depth)
        codes, y, x = (tensor.expand(shape) for tensor in inputs[0][:3])
        for other in inputs[1:]:
            if self.neurons.lie_across(codes, other.codes.expand(shape)):
                continue  # as what mixes tokens, and is added to them: the mean over tokens is of channels
            codes = self.neurons.summed(codes, other.codes.expand(shape))
            y, x = (y + other.y) / 2, (x + other.x) / 2
        return Numbers(codes, y, x)

    def _averaged(self, followed: dict[int, Numbers], again: Callable, index: int, shape: torch.Size) -> Numbers | None:
        """The numbers of an output that sums, with whatever weights, over elements of the same neuron.

        Found by the function of ones: where all elements that are summed have the same code, so has their mean.
        """
        ones = {place: torch.ones_like(numbers.codes) for place, numbers in followed.items()}
        total = again(ones)
        if index >= len(total) or not is_float(total[index]) or total[index].shape != shape:
            return None
        found = None
        for place, numbers in followed.items():
            codes, y, x = (again(ones | {place: values})[index] / total[index] for values in numbers[:3])
            known = self.neurons.numbers(codes) if numbers.codes.any() else None
            if known is None:
                continue
            codes = self.neurons.codes[known]
            if found is not None:
                codes = self.neurons.summed(found.codes, codes)
            found = Numbers(codes, y, x)
        return found

    def _follow_parameters(self, leaves: list, outputs: list, again: Callable) -> None:
        """Find out which parts of a parameter outputs are, if no activation went in."""
        parts = {place: self.part(leaf) for place, leaf in enumerate(leaves) if self.part(leaf) is not None}
        computed = any(id(leaf) in self._computed for leaf in leaves)
        for index, output in outputs if parts or computed else []:
            if self.part(output) is None:  # a function may return what it is given
                self._alive.append(output)
                if len(parts) == 1 and not computed:
                    ((place, part),) = parts.items()

                    def instead(values: Tensor, place: int = place, index: int = index) -> list:
                        return again({place: values}, math.nan)[index : index + 1]

                    moved = moved_elements(instead, leaves[place], output)
                    if moved is not None:
                        self._parts[id(output)] = part.moved(self.parameters[part.name], moved)
                        continue
                names = [part.name for part in parts.values()]
                names += [self._computed[id(leaf)] for leaf in leaves if id(leaf) in self._computed]
                self._computed[id(output)] = ", ".join(dict.fromkeys(names))


def broadcast(*shapes: torch.Size) -> torch.Size | None:
    """The shape that tensors of these shapes are broadcast to, if they can be."""
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return None


def moved_elements(again: Callable, before: Tensor, after: Tensor) -> Tensor | None:
    """Which elements of `before`, of the shape of `after`, these are, if `again`, which calls the function with other
    values in its place, moves those too.

    One that takes the root of a one, or leaves positive numbers as they are, only seems to move elements.
    """
    order = torch.arange(before.numel(), dtype=torch.float64).view(before.shape)
    places, *others = (again(values) for values in (order, 1e4 * (order + 0.3), -1e4 * (order + 0.3)))
    if not places or not is_float(places[0]) or places[0].shape != after.shape or not after.numel():
        return None
    (places,) = places
    whole = places.isfinite().all() and places.min() >= 0 and places.max() < before.numel()
    if not whole or not torch.equal(places, places.round()):
        return None
    moved = places.long()
    expected = 1e4 * (places + 0.3)
    if not all(found and torch.equal(found[0], sign * expected) for found, sign in zip(others, (1, -1), strict=True)):
        return None
    return moved if torch.equal(before.flatten()[moved], after) else None


def is_activation(value) -> bool:
    """Whether a value is a tensor of numbers that may be activations: real, or complex."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
