"""Weights that files hold in parts: quantised ones and their scales, pruned ones and masks, directions and lengths.

One more way to hold a weight is one more entry in `FORMS`.
"""

import json
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from scripting import in_short

AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # where in a word the numbers of eight outputs stand


class Form(NamedTuple):
    """How a weight is held: what the names of its parts end in, after what they share, and what makes one of them.

    The weight takes the place of the first part. `combine` gets the parts, and None for optional ones that are not
    there. It returns the weight, or None if tensors only happen to have such names, and raises if there is none to be
    had.
    """

    parts: tuple[str, ...]
    combine: Callable[..., Tensor | None]
    optional: tuple[str, ...] = ()
    ending: str = ""  # of the name of the weight


def put_together(stored: dict[str, Tensor | str]) -> dict[str, Tensor | str]:
    """Tensors by name, with one weight in the place of its parts, or a text that says why there is none.

    What is a part of something else, or has lost its own, is no weight either.
    """
    names = {name if old_name(name) in stored else old_name(name): name for name in stored}
    found = {own: stored[name] for own, name in names.items()}
    quantised = any(is_narrow(tensor) for tensor in found.values())
    scaled_types = set()
    for form in FORMS:
        for name in [name for name in found if name.endswith(form.parts[0])]:
            shared = name.removesuffix(form.parts[0])
            parts, optional = ([found.get(shared + end) for end in ends] for ends in (form.parts, form.optional))
            if not all(isinstance(part, Tensor) for part in parts):
                continue
            try:
                weight = form.combine(*parts, *optional)
            except Exception as error:  # whatever parts that do not fit lead to
                weight = str(error) if type(error) is ValueError else f"its parts do not fit ({in_short(error)})"
            if weight is None:
                continue
            for end in (*form.parts[1:], *form.optional):
                found.pop(shared + end, None)
            scaled_types.add(parts[0].dtype)
            found[name] = weight
            names[name] = shared + form.ending if shared + form.ending not in found else name
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or tensor.dim() < 2:
            continue
        if "parametrizations." in names[name]:
            found[name] = "its parametrization is code: save it after nn.utils.parametrize.remove_parametrizations"
        elif quantised and SCALES.search(name):
            found[name] = "scales of quantised weights"
        elif is_narrow(tensor) and tensor.is_floating_point() and tensor.dtype in scaled_types:
            found[name] = "8-bit numbers whose scales are not in this file"
    return {names[name]: tensor for name, tensor in found.items()}


# `torch.nn.utils.parametrize` holds the same parts as PyTorch's older functions, under other names.
PARAMETRISED = {"original0": "_g", "original1": "_v", "original": "_orig", "0.mask": "_mask", "0._u": "_u"}
# How scales are called that stand beside quantised weights of whatever form.
SCALES = re.compile(r"(^|[._])(scales?|scale_inv|scale_weight|zeros?|zero_points?|absmax|codebooks)$")


def old_name(name: str) -> str:
    """The name that a part in `parametrizations` has in the older functions; other names as they are."""
    module, _, rest = name.rpartition("parametrizations.")
    parameter, _, part = rest.partition(".")
    return module + parameter + PARAMETRISED[part] if part in PARAMETRISED else name


def is_narrow(tensor: Tensor | str) -> bool:
    """Whether something may be the numbers of a quantised weight: integers of up to 32 bits, or floats of 8."""
    if isinstance(tensor, str) or tensor.dim() < 2 or tensor.dtype == torch.bool:
        return False
    return tensor.dtype.itemsize <= (1 if tensor.is_floating_point() else 4) and not tensor.is_complex()


# ---- pruned and normalised ------------------------------------------------------------------------------------------


def masked(weight: Tensor, mask: Tensor) -> Tensor | None:
    """What `torch.nn.utils.prune` makes of a weight."""
    return weight * mask if weight.shape == mask.shape else None


def divided_by_its_norm(weight: Tensor, vector: Tensor) -> Tensor | None:
    """What `spectral_norm` makes of a weight, but for the scale, which no statistic knows."""
    return weight if vector.dim() == 1 else None


def of_lengths(directions: Tensor, lengths: Tensor) -> Tensor | None:
    """What `weight_norm` makes of directions [outputs, ...] and their lengths, along one axis or one for all."""
    directions, lengths = directions.float(), lengths.float()
    if lengths.dim() == 0:
        return directions * lengths / directions.norm()
    own = [axis for axis, size in enumerate(lengths.shape) if size > 1]
    if lengths.dim() != directions.dim() or len(own) > 1 or any(lengths.shape[a] != directions.shape[a] for a in own):
        return None
    others = [axis for axis in range(directions.dim()) if axis not in own]
    return directions * (lengths / directions.norm(dim=others, keepdim=True))


# ---- quantised ------------------------------------------------------------------------------------------------------


def scaled(numbers: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor | None:
    """Numbers of 8 or 16 bits with the scales that stand beside them by name. Raises ValueError if they do not fit."""
    if not is_narrow(numbers) or numbers.dtype.itemsize > 2:
        return None
    if numbers.dtype == torch.uint8 and zero is None:  # signed numbers would not be stored so
        raise ValueError("bytes without a zero point, into which numbers may be packed")
    return dequantised(numbers, scale, zero)


def dequantised(
    numbers: Tensor, scale: Tensor, zero: Tensor | None = None, axis: int | None = None, block: int = 0
) -> Tensor:
    """(numbers - zero point) * scale. Raises ValueError if they do not fit.

    Scales and zero points are of the whole tensor, of each place along an `axis` (by default the first of their
    length), or of blocks of places along any axes, of `block` places if that is known.
    """

    def spread(values: Tensor) -> Tensor:
        if values.numel() == 1:
            return values.float().reshape(())
        shape = [*values.shape, *[1] * (numbers.dim() - values.dim())]
        if values.dim() == 1:
            fitting = [axis] if axis is not None else [a for a, size in enumerate(numbers.shape) if size == len(values)]
            if fitting:
                shape = [len(values) if place == fitting[0] % numbers.dim() else 1 for place in range(numbers.dim())]
        values = values.float().reshape(shape)
        for place, (size, count) in enumerate(zip(numbers.shape, shape, strict=True)):
            if count not in (1, size):
                values = values.repeat_interleave(block or block_size(size, count), place).narrow(place, 0, size)
        return values

    try:
        moved = numbers.float() if zero is None else numbers.float() - spread(zero)
        return moved * spread(scale)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"its scales, {list(scale.shape)}, do not fit {list(numbers.shape)}") from error


def block_size(size: int, count: int) -> int:
    """How many of `size` places share one of `count` scales: a power of 2, the last block may be shorter; or as many
    each. Raises ValueError if that cannot be."""
    for block in (2**power for power in range(size.bit_length())):
        if -(-size // block) == count:
            return block
    if size % count:
        raise ValueError
    return size // count


def unpacked(words: Tensor, bits: int, axis: int) -> Tensor:
    """The numbers in 32-bit `words` [rows, columns] along an axis, lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words[..., None] >> shifts & 2**bits - 1).movedim(-1, axis + 1).flatten(axis, axis + 1)


def from_words(weight: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor | None) -> Tensor:
    """A weight [outputs, inputs] as GPTQ or AWQ packs it, of 2, 4 or 8 bits.

    `weight` is [inputs, outputs], packed along inputs (GPTQ) or outputs (AWQ), `zeros` [groups, outputs], packed along
    outputs, `scales` [groups, outputs]; `groups` [inputs] says which an input is of, by default they are in order.
    Raises ValueError for other bits.
    """
    bits = 32 * zeros.shape[1] / scales.shape[1]
    if bits not in (2, 4, 8):
        raise ValueError(f"numbers of {bits:g} bits, packed")
    is_awq = weight.shape[1] < scales.shape[1]
    weight, zeros = unpacked(weight, int(bits), int(is_awq)), unpacked(zeros, int(bits), 1)
    if is_awq:
        weight, zeros = (one.unflatten(1, (-1, 8))[..., AWQ_PLACES].flatten(1) for one in (weight, zeros))
    elif (zeros != 2 ** (bits - 1)).any():  # as if symmetric: GPTQ's second version; the first stores them less 1
        zeros = zeros + 1
    if groups is None:
        groups = torch.arange(len(weight)) // (len(weight) // len(scales))
    groups = groups.long()
    return ((weight - zeros[groups]) * scales.float()[groups]).T


def from_bytes(
    numbers: Tensor, largest: Tensor, values: Tensor, state: Tensor, nested: Tensor | None, nested_values: Tensor | None
) -> Tensor:
    """A weight as bitsandbytes packs it: two places in a list of `values` a byte, times the `largest` of their block.

    These may be quantised in turn, `state` is JSON.
    """
    about = json.loads(bytes(state.tolist()))
    if nested is not None:
        blocks = nested.repeat_interleave(about["nested_blocksize"])[: len(largest)]
        largest = nested_values[largest.int()] * blocks + about["nested_offset"]
    numbers = numbers.contiguous().view(torch.uint8).flatten()
    places = torch.stack([numbers >> 4, numbers & 15], 1).flatten()[: math.prod(about["shape"])]
    blocks = largest.repeat_interleave(about["blocksize"])[: len(places)]
    return (values[places.int()] * blocks).view(about["shape"])


FORMS = [
    Form(("_orig", "_mask"), masked),
    Form(("_orig", "_u"), divided_by_its_norm),
    Form(("_v", "_g"), of_lengths),
    Form(("qweight", "qzeros", "scales"), from_words, optional=("g_idx",), ending="weight"),
    *(
        Form(("", ".absmax", ".quant_map", f".quant_state.bitsandbytes__{kind}"), from_bytes,
             optional=(".nested_absmax", ".nested_quant_map"))
        for kind in ("nf4", "fp4")
    ),
    Form(("weight", "SCB"), lambda numbers, largest: scaled(numbers, largest / 127), ending="weight"),  # bitsandbytes
    Form(("", "_scale_inv"), scaled),  # DeepSeek; multiplied, in spite of its name
    Form(("", "_scale"), scaled, optional=("_zero_point",)),  # compressed-tensors and others
    Form(("weight", "scale_weight"), scaled, ending="weight"),  # ComfyUI
    Form(("weight", "scales"), scaled, ending="weight"),  # gpt-fast
    Form(("._data", "._scale"), scaled),  # Quanto
    Form(("_quantized", "_scale"), scaled, optional=("_zero_point",), ending="_quantized"),  # ONNX Runtime
]  # fmt: skip
