"""The function that follows a layer: of single elements, through whatever calls make it, up to the next layer or norm.

It is known by its curve, the values at ACTIVATION_POINTS. A call whose inputs have curves is called again on these in
the place of the activations, along each axis, and gives the curve of its result if it treats every element by itself.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from universal.reading.calls import ACTIVATION_POINTS, RATIOS, is_float

# For each layer, by its index, what a tensor is as its function where all other layers are neutral: values [points];
# None where it is no function of single elements, such as a sum over channels.
ByLayer = dict[int, Tensor | None]


def identity() -> Tensor:
    """The curve of what a layer gives out, [points]."""
    return torch.tensor(ACTIVATION_POINTS, dtype=torch.float32)


class Curves:
    """The curves of the tensors of one forward pass."""

    def __init__(self):
        self._by_tensor: dict[int, ByLayer] = {}
        self._alive: list[Tensor] = []  # so that no id comes again

    def of(self, tensor) -> ByLayer:
        return self._by_tensor.get(id(tensor), {})

    def set(self, tensor: Tensor, curves: ByLayer) -> None:
        self._alive.append(tensor)
        self._by_tensor[id(tensor)] = curves

    def follow(
        self, function: Callable, args: tuple, kwargs: dict, outputs: list[Tensor], moves: bool, followed: Callable
    ) -> ByLayer:  # fmt: skip
        """Find the curves of what a call gives; those that end here, since it is no function of single elements.

        One that only `moves` elements, or averages those of one neuron, carries the curves on. `followed(tensor)` is
        whether a tensor is an activation.
        """
        leaves, spec = tree_flatten((args, kwargs))
        if not any(self.of(leaf) for leaf in leaves):
            return {}
        neutral = 1.0 if function in RATIOS else 0.0
        others = [constant(leaf, neutral, bool(self.of(leaf)) or followed(leaf)) for leaf in leaves]
        ended, found = {}, {}
        for layer in dict.fromkeys(layer for leaf in leaves for layer in self.of(leaf)):
            known = [self.of(leaf).get(layer) for leaf in leaves]
            first = next((curve for curve in known if curve is not None), None)
            if first is None:
                found[layer] = None
                continue
            values = elementwise(function, others, spec, known) if len(outputs) == 1 else None
            if values is RANDOM:  # its result is of no layer
                for output in outputs:
                    self.set(output, {})
                return {}
            found[layer] = first if values is None and moves else values
            if found[layer] is None:
                ended[layer] = first
        for output in outputs if found else []:
            self.set(output, found)
        return ended


RANDOM = object()


def elementwise(function: Callable, others: list, spec, curves: list[Tensor | None]) -> Tensor | object | None:
    """The curve of a function's result, [points], from those of its arguments, or what stands for `others`.

    None unless it is a function of single elements, and RANDOM if it is another every time.
    """
    axes = min(leaf.dim() for leaf, curve in zip(others, curves, strict=True) if curve is not None)

    def along(axis: int) -> Tensor | None:
        changed = []
        for leaf, curve in zip(others, curves, strict=True):
            if curve is not None:
                shape = [1] * leaf.dim()
                shape[-axis] = -1
                leaf = curve.view(shape)
            changed.append(leaf.clone() if isinstance(leaf, Tensor) else leaf)  # which the function may change
        new_args, new_kwargs = tree_unflatten(changed, spec)
        try:
            result = function(*new_args, **new_kwargs)
        except Exception:  # of a few points a function may think whatever it likes
            return None
        result = new_args[0] if result is None else result  # it changed its first argument
        is_curve = isinstance(result, Tensor) and result.numel() == len(ACTIVATION_POINTS) and not result.is_complex()
        return result.flatten() if is_curve else None

    found = along(1) if axes else None
    if found is None:
        return None
    again = along(1)
    if again is None or not same(found, again):
        return RANDOM
    along_others = (along(axis) for axis in range(2, axes + 1))
    return found if all(other is not None and same(found, other) for other in along_others) else None


def constant(leaf, neutral: float, is_neutral: bool):
    """What stands for an argument where it is no function of the layer: a tensor of as many axes, with one element.

    That of activations of other layers is neutral, that of constants as large as these in the mean.
    """
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.is_complex() or not leaf.numel():
        is_neutral = True
    value = neutral if is_neutral else leaf.double().mean().item()
    if leaf.dtype == torch.bool and neutral == 0:  # those of a product are as good as numbers
        return torch.full([1] * leaf.dim(), value >= 0.5)
    return torch.full(
        [1] * leaf.dim(), value, dtype=torch.float32 if is_float(leaf) or leaf.dtype == torch.bool else leaf.dtype
    )


def same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=1e-4, atol=1e-6, equal_nan=True)
