"""Products of an activation and a parameter, over whatever axes, as the linear layers that they are.

`torch.einsum("bnd,hde->bhne", x, w)` is, with its axes moved, `F.linear`. Where both have an axis that stays, such as
that of heads which have a matrix each, there is a layer for each place along it.
"""

import itertools
import math
import string
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 64  # layers that one product may be


class Product(NamedTuple):
    """Two tensors, the letters of their axes, and of those of their product, as `torch.einsum` has them."""

    operands: tuple[Tensor, Tensor]
    letters: tuple[str, str]
    output: str


def of_matrices(first: Tensor, second: Tensor) -> Product | None:
    """`first @ second`, each [..., rows, columns]; None for vectors."""
    if min(first.dim(), second.dim()) < 2:
        return None
    count = max(first.dim(), second.dim()) - 2
    batch = string.ascii_uppercase[:count]
    sizes = [(1,) * (count + 2 - tensor.dim()) + tuple(tensor.shape[:-2]) for tensor in (first, second)]
    letters = []
    for tensor, own, other, ends in zip((first, second), sizes, sizes[::-1], ("nk", "km"), strict=True):
        # An axis of one, where the other tensor has more, is none of the product's.
        named = [batch[axis] if own[axis] > 1 or other[axis] == 1 else batch[axis].lower() for axis in range(count)]
        letters.append("".join(named[count + 2 - tensor.dim() :]) + ends)
    return Product((first, second), tuple(letters), f"{batch}nm")


def of_einsum(equation, *operands) -> Product | None:
    """What `torch.einsum` is given, if these are an equation and two tensors whose axes all differ."""
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    free = [letter for letter in string.ascii_letters if letter not in equation]
    for place, (tensor, own) in enumerate(zip(operands, letters, strict=True)):
        if "..." in own:
            if any("..." in other for other in letters[:place] + letters[place + 1 :]):
                return None
            axes = "".join(free[: tensor.dim() - len(own) + 3])
            letters[place], output = own.replace("...", axes), output.replace("...", axes)
            implied = axes
    if not arrow:
        joined = "".join(letters)
        output = (implied if "..." in equation else "") + "".join(
            letter for letter in sorted(set(joined)) if joined.count(letter) == 1 and letter not in free
        )
    if any(len(set(own)) < len(own) for own in (*letters, output)):
        return None
    return Product(tuple(operands), tuple(letters), output)


def axes_of(product: Product, weight_at: int) -> tuple[list[str], list[str], list[str], list[str]] | None:
    """The letters of the axes that both operands and the product have; that are summed over; that only the operand
    `weight_at` has; and only the other one. None if the product is none of linear layers."""
    of_w, of_x = product.letters[weight_at], product.letters[1 - weight_at]
    shared = [letter for letter in of_w if letter in of_x and letter in product.output]
    summed = [letter for letter in of_w if letter in of_x and letter not in product.output]
    new, others = (
        [letter for letter in own if letter in product.output and letter not in shared] for own in (of_w, of_x)
    )
    sizes = dict(zip("".join(product.letters), (*product.operands[0].shape, *product.operands[1].shape), strict=True))
    dropped = {*of_w, *of_x} - {*shared, *summed, *new, *others}
    is_one = summed and {*new, *others, *shared} == {*product.output} and all(sizes[letter] == 1 for letter in dropped)
    return (shared, summed, new, others) if is_one and math.prod(sizes[letter] for letter in shared) <= MOST else None


def as_layers(product: Product, weight_at: int) -> Tensor:
    """The product, by linear layers whose weights are of the operand `weight_at`."""
    w, x = product.operands[weight_at], product.operands[1 - weight_at]
    of_w, of_x = product.letters[weight_at], product.letters[1 - weight_at]
    shared, summed, new, others = axes_of(product, weight_at)
    sizes = dict(zip(of_w + of_x, (*w.shape, *x.shape), strict=True))
    features = math.prod(sizes[letter] for letter in summed)
    w, of_w = without_ones(w, of_w, {*shared, *new, *summed})
    x, of_x = without_ones(x, of_x, {*shared, *others, *summed})
    x = x.permute([of_x.index(letter) for letter in (*shared, *others, *summed)])
    x = x.reshape([sizes[letter] for letter in (*shared, *others)] + [features])
    w = w.permute([of_w.index(letter) for letter in (*shared, *new, *summed)])
    w = w.reshape([sizes[letter] for letter in shared] + [-1, features])
    places = list(itertools.product(*(range(sizes[letter]) for letter in shared)))
    parts = [F.linear(x[place], w[place]) if place else F.linear(x, w) for place in places]
    whole = parts[0] if not shared else torch.stack(parts)
    axes = [*shared, *others, *new]
    whole = whole.reshape([sizes[letter] for letter in axes])
    return whole.permute([axes.index(letter) for letter in product.output])


def without_ones(tensor: Tensor, letters: str, kept: set[str]) -> tuple[Tensor, str]:
    """A tensor, and the letters of its axes, without those axes, of one, that are not `kept`."""
    dropped = [axis for axis, letter in enumerate(letters) if letter not in kept]
    return (tensor.squeeze(dropped) if dropped else tensor), "".join(letter for letter in letters if letter in kept)
