"""Any module as a graph of layers: its own forward pass tells which there are, which neurons each reads, what follows.

Design document, section 4.1.1. Nobody describes an architecture by hand, and nothing is re-enacted: the module runs as
its author wrote it, under a `TorchFunctionMode` that sees every call of a torch function. The calls that take weights
are layers and norms (`KINDS`); what else runs, known or unknown, only has to be followed as far as it moves channels
(`Follower`). A second run of the same kind, on the probes of a generator, writes each layer inside its own call, from
the activations that reach it, which are already those of the written layers before it.
"""

import contextlib
import itertools
import linecache
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from scripting import in_short

IMAGE_SIDE = 28  # pixels
IMAGE_CHANNELS = (1, 3)
# What a network may take: the shapes of a batch of N images, in the order in which they are tried.
IMAGE_FORMATS = {
    "[N, 1, 28, 28]": lambda images: images,
    "[N, 3, 28, 28]": lambda images: images.expand(-1, 3, -1, -1),
    "[N, 28, 28]": lambda images: images.flatten(0, 1),
    "[N, 784]": lambda images: images.flatten(1),
}
ACTIVATION_POINTS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)  # where the function after a layer is looked at


# ---- what a graph consists of ---------------------------------------------------------------------------------------


@dataclass
class Part:
    """The elements of a parameter that a call takes: all of them, or those at `index`, which has the part's shape."""

    name: str
    index: Tensor | None = None

    def of(self, weights: dict[str, Tensor]) -> Tensor:
        """The part's values in `weights`, the parameters by name."""
        whole = weights[self.name]
        return whole if self.index is None else whole.flatten()[self.index.to(whole.device)]

    def put(self, weights: dict[str, Tensor], values: Tensor, others: dict[str, Tensor]) -> None:
        """Set the part's values in `weights`; other elements of the parameter, if not there yet, are as in `others`."""
        if self.index is not None:
            whole = weights.get(self.name, others[self.name])
            index = self.index.to(whole.device).flatten()
            values = whole.flatten().to(values).index_copy(0, index, values.flatten()).view(whole.shape)
        weights[self.name] = values

    def same(self, other: "Part") -> bool:
        indices = (self.index, other.index)
        return self.name == other.name and (
            all(i is None for i in indices) or (all(i is not None for i in indices) and torch.equal(*indices))
        )

    def moved(self, whole: Tensor, elements: Tensor) -> "Part":
        """The part that has these elements of this one, in their shape. `whole` is the parameter."""
        index = torch.arange(whole.numel()) if self.index is None else self.index.flatten()
        return Part(self.name, index[elements])


@dataclass
class Layer:
    """A convolution or linear layer: a call whose weight a generator can write.

    `shape` is that of the weight, [neurons, channels of a group, *kernel] or [neurons, features]. A convolution's
    inputs are `channels`; a linear layer's are channels at `grid` positions, in the `order` of its features that brings
    the positions of a channel together. A channel is known by the neurons whose sum it is: `channels`, [inputs, n],
    are numbers of neurons, of which the mean over n counts. Where several channels come from the same neurons, `places`
    tells where, [inputs, 2].
    """

    name: str
    weight: Part
    bias: Part | None
    shape: tuple[int, ...]
    options: dict  # stride, padding, dilation and groups of a convolution; empty for a linear layer
    channels: Tensor
    places: Tensor | None
    grid: Tensor | None  # [positions, 2], within (0, 1), of a linear layer; None where the kernel has the positions
    order: Tensor | None
    depth: int  # how many layers the images have passed before this one, on the longest way
    sources: frozenset[int]  # indices of the layers whose outputs reach it; -1 for the images
    resolution: int  # side of the maps, or number of tokens, that it gives
    side: int  # side of the maps that a convolution reads; 1 for a linear layer
    index: int = 0
    first_neuron: int = 0  # the number of its first neuron
    last: bool = False  # whether its outputs are the classes
    activation: tuple[float, ...] | None = None  # the values at ACTIVATION_POINTS of the function after it
    normalised: bool = False  # whether a norm follows before the next layer
    pooled: bool = False  # whether maps or tokens were reduced to one place before it
    readers: list["Layer"] = field(default_factory=list, repr=False)  # the layers that its outputs reach

    @property
    def parts(self) -> list[Part]:
        return [part for part in (self.weight, self.bias) if part is not None]

    @property
    def is_convolution(self) -> bool:
        return self.grid is None

    @property
    def groups(self) -> int:
        return self.options.get("groups", 1)

    @property
    def positions(self) -> int:
        """How many positions of a channel a neuron reads: those of the kernel, or of the map that was flattened."""
        return math.prod(self.shape[2:]) if self.is_convolution else len(self.grid)

    def kernels(self, weights: dict[str, Tensor]) -> Tensor:
        """The layer's weight in `weights` as [neurons, channels of a group, positions]."""
        weight = self.weight.of(weights)
        if self.is_convolution:
            return weight.flatten(2)
        return (weight if self.order is None else weight[:, self.order]).unflatten(1, (-1, self.positions))

    def weight_of(self, kernels: Tensor) -> Tensor:
        """The weight, of `shape`, whose `kernels` these are."""
        if self.is_convolution:
            return kernels.unflatten(2, self.shape[2:])
        flat = kernels.flatten(1)
        return flat if self.order is None else flat[:, torch.argsort(self.order)]

    def of(self, weights: dict[str, Tensor], inputs: Tensor, _: bool = False) -> Tensor:
        """The layer's outputs for `inputs`, with the parameters in `weights`."""
        return self(inputs, self.weight.of(weights), self.bias and self.bias.of(weights))

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's outputs for `inputs`, with these parameters."""
        if not self.is_convolution:
            return F.linear(inputs, weight, bias)
        if self.shape[2:] == (1, 1) and self.groups == 1 and self.options["padding"] in (0, (0, 0), "same", "valid"):
            # A linear layer over the channels. Not as a convolution: the backward pass of oneDNN's 1x1 convolutions
            # hangs on processors with AVX2 only (PyTorch 2.15).
            down, across = nn.modules.utils._pair(self.options["stride"])
            return F.linear(inputs[:, :, ::down, ::across].movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
        return (F.conv1d if len(self.shape) == 3 else F.conv2d)(inputs, weight, bias, **self.options)


@dataclass
class Norm:
    """A norm: a call that standardises activations, and what it then scales and shifts them by.

    `channels`, [inputs], are the numbers of the neurons that it standardises; `axis` is where they lie.
    """

    name: str
    function: Callable[..., Tensor]
    settings: dict  # its arguments that are no parameters
    parameters: dict[str, Part]  # those of weight, bias, running_mean and running_var that it has
    channels: Tensor
    axis: int
    of_last: bool = False  # whether it standardises the classes

    places: tuple[int, ...] = ()  # shape of the places that it scales apart
    by_inputs: str = ""  # the argument that says to take the statistics of the inputs

    @property
    def parts(self) -> list[Part]:
        return list(self.parameters.values())

    def of(self, weights: dict[str, Tensor], inputs: Tensor, batch_statistics: bool = False) -> Tensor:
        """What comes out with the parameters in `weights`, or with the statistics of the inputs."""
        parameters = {name: part.of(weights) for name, part in self.parameters.items()}
        if batch_statistics and STATISTICS[0] in parameters:
            parameters |= dict.fromkeys(STATISTICS) | {self.by_inputs: True}
        return self(inputs, **parameters)

    def __call__(self, inputs: Tensor, **parameters: Tensor) -> Tensor:
        """What comes out with these parameters."""
        if parameters.get("running_mean") is None:
            return self.function(inputs, **(self.settings | parameters))
        # PyTorch does not differentiate with respect to running statistics.
        mean, variance, weight, bias = (parameters.get(name) for name in (*STATISTICS, "weight", "bias"))
        scale = torch.rsqrt(variance + self.settings.get("eps", 1e-5))
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        shape = (-1, *[1] * (inputs.dim() - 2))
        return inputs * scale.view(shape) + shift.view(shape)


@dataclass
class Shift:
    """A parameter that is added to activations: a bias by hand, or what tells tokens their places.

    `channels`, [inputs], are the numbers of the neurons, which lie on `axis`; `places`, [n, 2], are those of what it
    adds to one neuron, None if that is one number. `shape` is that of the parameter.
    """

    name: str
    part: Part
    channels: Tensor
    axis: int
    places: Tensor | None
    shape: tuple[int, ...]

    @property
    def parts(self) -> list[Part]:
        return [self.part]

    def of(self, weights: dict[str, Tensor], inputs: Tensor, _: bool = False) -> Tensor:
        """What comes out with the parameter in `weights`."""
        return inputs + self.part.of(weights)


# ---- the calls that take weights: one entry a kind ------------------------------------------------------------------


@dataclass
class Kind:
    """What is particular to a kind of call: the names of its arguments, and where its neurons or channels lie."""

    arguments: tuple[str, ...]
    axis: int
    is_norm: bool = False
    is_sum: bool = False
    is_convolution: bool = False
    transposed: bool = False  # whether the weight is [features, neurons]
    by_inputs: str = ""  # of a norm with running statistics: the argument that says not to use them

    def bind(self, args: tuple, kwargs: dict) -> dict:
        return dict(zip(self.arguments, args, strict=False)) | kwargs


CONVOLUTION = Kind(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), 1, is_convolution=True)
LINEAR = Kind(("input", "weight", "bias"), -1)
PRODUCT = Kind(("input", "weight"), -1, transposed=True)
KINDS: dict[Callable, Kind] = {
    torch.conv1d: CONVOLUTION,
    torch.conv2d: CONVOLUTION,
    F.linear: LINEAR,
    torch.matmul: PRODUCT,
    torch.mm: PRODUCT,
    Tensor.matmul: PRODUCT,
    Tensor.mm: PRODUCT,
    Tensor.__matmul__: PRODUCT,
    torch.addmm: Kind(("bias", "input", "weight"), -1, transposed=True),
    F.batch_norm: Kind(
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        1,
        True,
        by_inputs="training",
    ),
    F.instance_norm: Kind(
        ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
        1,
        True,
        by_inputs="use_input_stats",
    ),
    F.group_norm: Kind(("input", "num_groups", "weight", "bias", "eps"), 1, is_norm=True),
    F.layer_norm: Kind(("input", "normalized_shape", "weight", "bias", "eps"), -1, is_norm=True),
    F.rms_norm: Kind(("input", "normalized_shape", "weight", "eps"), -1, is_norm=True),
}
SUM = Kind(("input", "other"), -1, is_sum=True)
KINDS |= dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__), SUM)
STATISTICS = ("running_mean", "running_var")
DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
# Functions of two activations that sum over an axis of both: which neurons the result is of, their shapes do not tell.
CONTRACTIONS = {
    torch.matmul, torch.bmm, torch.mm, torch.einsum, Tensor.matmul, Tensor.bmm, Tensor.mm, Tensor.__matmul__,
    torch.baddbmm,
}  # fmt: skip
# Layers that cannot be written, by the names of their functions.
REFUSED = {
    "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "lstm", "gru", "rnn_tanh", "rnn_relu",
    "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "bilinear",
}  # fmt: skip
EMBEDDINGS = {F.embedding, F.embedding_bag}
DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}


def attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check, num_heads: int, in_proj_weight, in_proj_bias,
    bias_k, bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training=True, key_padding_mask=None,
    need_weights=True, attn_mask=None, use_separate_proj_weight=False, q_proj_weight=None, k_proj_weight=None,
    v_proj_weight=None, static_k=None, static_v=None, average_attn_weights=True, is_causal=False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`F.multi_head_attention_forward` in its parts, each a call: [tokens, N, width] -> the same, and the shares."""
    if bias_k is not None or bias_v is not None or add_zero_attn or static_k is not None or static_v is not None:
        raise ValueError("attention with additional keys and values is not supported")
    if use_separate_proj_weight:
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
        parts = [F.linear(*arguments) for arguments in zip((query, key, value), weights, biases, strict=True)]
    elif query is key and key is value:
        parts = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        weights = in_proj_weight.chunk(3)
        parts = [F.linear(*arguments) for arguments in zip((query, key, value), weights, biases, strict=True)]
    heads = [part.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for part in parts]  # [N, heads, tokens, size]
    scores = heads[0] @ heads[1].transpose(-2, -1) * heads[0].shape[-1] ** -0.5
    for mask in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None]):
        if mask is not None:
            scores = scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    shares = scores.softmax(-1)
    mixed = (shares @ heads[2]).permute(2, 0, 1, 3).flatten(2)
    shown = shares.mean(1) if average_attn_weights else shares
    return F.linear(mixed, out_proj_weight, out_proj_bias), shown if need_weights else None


# ---- following channels through everything else ---------------------------------------------------------------------


class Numbers(NamedTuple):
    """Which neuron each element of an activation is of, and where: tensors of the activation's shape, float64.

    A neuron is known by its code, a random number in (1, 2), so that no mean of two is a third; 0 stands for none. `y`
    and `x` are places within (0, 1).
    """

    codes: Tensor
    y: Tensor
    x: Tensor
    depth: int = 0  # how many layers the images have passed, on the longest way
    sources: frozenset[int] = (
        frozenset()
    )  # the layers, or -1 for the images, that it comes from without another between


class Neurons:
    """All neurons that activations are of, in blocks: the images' channels, a layer's neurons, or sums of two others.

    Their numbers go from 1 on, in order of appearance; 0 is none.
    """

    def __init__(self):
        self.blocks: list[tuple[int | None, Tensor | None]] = []  # (the layer's index, or the pairs of neurons summed)
        self.codes = torch.zeros(1, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(0)

    def add(self, count: int, layer: int | None = None, pairs: Tensor | None = None) -> Tensor:
        """The codes of `count` new neurons, [count]: of a layer, or sums of `pairs`, [count, 2], of earlier ones."""
        self.blocks.append((layer, pairs))
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

    def summed(self, first: Tensor, second: Tensor) -> Tensor:
        """The codes of the sums of neurons with these codes, of one shape; a sum with none is the other."""
        if torch.equal(first, second):
            return first
        count = len(self.codes)
        both, inverse = (self.numbers(first) * count + self.numbers(second)).unique(return_inverse=True)
        pairs = torch.stack([both // count, both % count], 1)
        codes = self.codes[pairs.amax(1)]
        new = (pairs != 0).all(1) & (pairs[:, 0] != pairs[:, 1])
        if new.any():
            codes[new] = self.add(int(new.sum()), pairs=pairs[new])
        return codes[inverse]


class Follower:
    """What is known of the tensors of one forward pass: the numbers of activations, the parts of parameters."""

    def __init__(self, parameters: dict[str, Tensor], originals: dict[str, Tensor]):
        self.neurons = Neurons()
        self.parameters = parameters
        self.only_scales = True  # whether nothing so far but moved, averaged or was a function of single elements
        self._numbers: dict[int, Numbers] = {}
        named = [
            *originals.items(),
            *parameters.items(),
        ]  # a module may keep its own beside those that it is called with
        self._parts: dict[int, Part] = {id(tensor): Part(name) for name, tensor in named}
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

    def computed_from(self, tensor) -> str | None:
        return self._computed.get(id(tensor))

    def is_of_values(self, tensor) -> bool:
        return id(tensor) in self._values

    def follow(self, function: Callable, args: tuple, kwargs: dict, result) -> bool:
        """Find out what a function's `result` is of. Whether it only moved elements or was a function of single ones.

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

        outputs = [(index, output) for index, output in enumerate(tree_leaves(result)) if is_float(output)]
        if followed or any(id(leaf) in self._values for leaf in leaves):
            whole = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and not is_float(leaf)]
            self._values |= {id(leaf) for leaf in whole}
            self._alive += whole
        if not followed:
            self._follow_parameters(function, leaves, outputs, again)
            return True
        inputs = list(followed.values())
        depth = max(numbers.depth for numbers in inputs)
        sources = frozenset().union(*(numbers.sources for numbers in inputs))
        plain = True
        for index, output in outputs:
            numbers = None
            if function not in CONTRACTIONS:
                numbers = self._moved(followed, again, index, output.shape) or self._elementwise(inputs, output.shape)
            if numbers is None:
                plain = False
                numbers = self._averaged(followed, again, index, output.shape)
            if numbers is None:
                self.only_scales = False
                middle = torch.full(output.shape, 0.5, dtype=torch.float64)
                numbers = Numbers(torch.zeros_like(middle), middle, middle)
            self.number(output, numbers._replace(depth=depth, sources=sources))
        return plain

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
        if len(followed) == 1 and torch.equal(moved.reshape(-1), first.codes.reshape(-1)):  # at most reshaped
            return first._replace(codes=moved, y=first.y.reshape(shape), x=first.x.reshape(shape))
        if shape != first.codes.shape and not moved.isnan().all():
            moved = moved.nan_to_num(0.0)
        if self.neurons.numbers(moved) is None:
            return None
        codes, turned = both_ways("codes", 3.0)
        codes = torch.where((codes - turned).abs() < 1e-11, codes, 0.0)
        y, x = (sum(both_ways(part, 1.0)).nan_to_num(1.0) / 2 for part in ("y", "x"))
        return Numbers(codes, y, x)

    def _elementwise(self, inputs: list[Numbers], shape: torch.Size) -> Numbers | None:
        """The numbers of an output that has the shape of its inputs, broadcast: of the sums of their neurons."""
        try:
            if torch.broadcast_shapes(*(numbers.codes.shape for numbers in inputs)) != shape:
                return None
        except RuntimeError:
            return None
        codes, y, x = (tensor.expand(shape) for tensor in inputs[0][:3])
        for other in inputs[1:]:
            self.only_scales = False
            codes = self.neurons.summed(codes, other.codes.expand(shape))
            y, x = (y + other.y) / 2, (x + other.x) / 2
        return Numbers(codes, y, x)

    def _averaged(self, followed: dict[int, Numbers], again: Callable, index: int, shape: torch.Size) -> Numbers | None:
        """The numbers of an output that sums, with whatever weights, over elements of the same neuron.

        Found by the function of ones: where all elements that are summed have the same code, so has their mean.
        """
        ones = {place: torch.ones_like(numbers.codes) for place, numbers in followed.items()}
        total = again(ones)
        if not total or total[index].shape != shape:
            return None
        found = None
        for place, numbers in followed.items():
            codes, y, x = (again(ones | {place: values})[index] / total[index] for values in numbers[:3])
            if not numbers.codes.any() or self.neurons.numbers(codes) is None:
                continue
            if found is not None:
                codes = self.neurons.summed(found.codes, codes)
            found = Numbers(codes, y, x)
        return found

    def _follow_parameters(self, function: Callable, leaves: list, outputs: list, again: Callable) -> None:
        """Find out which parts of a parameter outputs are, if no activation went in."""
        parts = {place: self.part(leaf) for place, leaf in enumerate(leaves) if self.part(leaf) is not None}
        computed = any(id(leaf) in self._computed for leaf in leaves)
        for index, output in outputs if parts or computed else []:
            if self.part(output) is None:  # a function may return what it is given
                self._alive.append(output)
                names = [part.name for part in parts.values()] + [
                    self._computed[id(v)] for v in leaves if id(v) in self._computed
                ]
                self._computed[id(output)] = ", ".join(dict.fromkeys(names))
                if len(parts) == 1 and not computed:
                    ((place, part),) = parts.items()
                    elements = torch.arange(leaves[place].numel(), dtype=torch.float64).view(leaves[place].shape)
                    moved = again({place: elements}, math.nan)[index].long()
                    if moved.shape == output.shape and torch.equal(leaves[place].flatten()[moved], output):
                        self._parts[id(output)] = part.moved(self.parameters[part.name], moved)


def is_float(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def name_of(function: Callable) -> str:
    """A torch function's name, as people write it."""
    return getattr(function, "__name__", str(function)).strip("_")


# ---- reading a module, and running it --------------------------------------------------------------------------------


class Refused(ValueError):
    """What cannot be read: the call, and the line of the user's own code that it stands in."""


class Calls(TorchFunctionMode):
    """A forward pass of which `call(kind, function, args, kwargs)` computes every call that may take weights."""

    def __init__(self, call: Callable, follow: Callable = lambda *_: None):
        super().__init__()
        self.call, self.follow = call, follow

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.multi_head_attention_forward:
            with self:
                return attention(*args, **kwargs)
        if function in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if function is Tensor.view and all(isinstance(size, int | tuple | list) for size in args[1:]):
            function = Tensor.reshape  # activations may lie channels-last
        if function in KINDS:
            return self.call(KINDS[function], function, args, kwargs)
        result = function(*args, **kwargs)
        self.follow(function, args, kwargs, result)
        return result


class ComputationGraph:
    """The layers and norms of a module that classifies images of 28 x 28 pixels as logits [N, classes].

    `layers` and `norms` are in order of computation; `neurons` are those that they read; `format` is one of
    IMAGE_FORMATS. `written` and `left` are the names of the parameters and buffers that a generator writes, and of
    those that it does not. Raises ValueError, naming the call and the line of the user's code, for what cannot be read.
    The module stays as it is, but that lazy parameters are initialised.
    """

    def __init__(self, module: nn.Module):
        self.module = unwrapped(module)
        with still(self.module), torch.no_grad():
            if any(isinstance(parameter, nn.UninitializedParameter) for parameter in self.module.parameters()):
                self._try_formats(lambda images: self.module(images))
            self._try_formats(self._read)
        self.counters = [
            f"{norm.name}.num_batches_tracked"
            for norm in self.norms
            if f"{norm.name}.num_batches_tracked" in self.state()
        ]
        parts = [part.name for call in (*self.layers, *self.norms, *self.shifts) for part in call.parts]
        self.written = list(dict.fromkeys([*parts, *self.counters]))
        self.left = [name for name in self.state() if name not in self.written]

    # ---- running ----

    def state(self) -> dict[str, Tensor]:
        """The module's parameters and buffers, by name."""
        return dict(self.module.named_parameters()) | dict(self.module.named_buffers())

    def weights(self) -> dict[str, Tensor]:
        """The module's own parameters and buffers of floating point, by name, as float32."""
        return {name: tensor.detach().float() for name, tensor in self.state().items() if is_float(tensor)}

    def run(self, images: Tensor, weights: dict[str, Tensor], batch_statistics: bool = False) -> Tensor:
        """The logits [N, classes] of images [N, 1, 28, 28], with these weights; others are the module's own.

        With `batch_statistics` norms use those of the images, as in training, in the place of their running ones.
        """
        weights = self._own(images) | weights
        return self._forward(images, weights, lambda call, inputs: call.of(weights, inputs, batch_statistics))

    def write(self, images: Tensor, written: dict[str, Tensor], write: Callable) -> Tensor:
        """The logits of images [N, 1, 28, 28], while the weights are written.

        `write(layer, norm or shift, inputs)` returns the outputs, and puts into `written` what it writes. It is called
        once for each, where it is first used.
        """
        done: list[Layer | Norm | Shift] = []

        def compute(call: Layer | Norm | Shift, inputs: Tensor) -> Tensor:
            if any(call is other for other in done):
                return call.of(written, inputs)
            done.append(call)
            return write(call, inputs)

        return self._forward(images, self._own(images), compute)

    def _forward(self, images: Tensor, weights: dict[str, Tensor], compute: Callable) -> Tensor:
        """The logits of images [N, 1, 28, 28], each layer and norm computed by `compute(layer or norm, inputs)`."""
        calls = iter(self._calls)

        def call(kind: Kind, function: Callable, args: tuple, kwargs: dict):
            expected, found = next(calls, (None, None))
            if expected is not function:
                raise ValueError(f"{type(self.module).__name__}: its forward pass goes another way every time")
            if found is None:
                return function(*args, **kwargs)
            given = kind.bind(args, kwargs)
            inputs = given["input"]
            if kind.is_sum and inputs is weights.get(found.part.name):
                inputs = given["other"]
            return compute(found, inputs)

        with still(self.module), Calls(call):
            return logits_of(functional_call(self.module, weights, self.format(images)))

    def _own(self, images: Tensor) -> dict[str, Tensor]:
        """The module's parameters and buffers of floating point, as the images are."""
        return {name: tensor.detach().to(images) for name, tensor in self.state().items() if is_float(tensor)}

    # ---- reading ----

    def _try_formats(self, run: Callable[[Tensor], None]) -> None:
        """Run the module on images of the first of IMAGE_FORMATS that it takes."""
        device = next((tensor.device for tensor in self.state().values()), torch.device("cpu"))
        images = torch.randn(2, 1, IMAGE_SIDE, IMAGE_SIDE, generator=torch.Generator().manual_seed(0)).to(device)
        failures = []
        for name, self.format in IMAGE_FORMATS.items():
            self._calls: list[tuple[Callable, Layer | Norm | Shift | None]] = []  # those of KINDS, in order
            try:
                return run(self.format(images))
            except Refused:
                raise
            except Exception as error:  # the module's own code may raise anything
                failures.append((len(self._calls), f"of {name} it says {in_short(error)}{place_of(error)}"))
        _, furthest = max(failures, key=lambda failure: failure[0])
        raise ValueError(
            f"{type(self.module).__name__} takes no images of the shapes {', '.join(IMAGE_FORMATS)}; {furthest}"
        )

    def _read(self, images: Tensor) -> None:
        """Find the layers, the norms and the classes in a forward pass on `images`."""
        self.layers: list[Layer] = []
        self.norms: list[Norm] = []
        self.shifts: list[Shift] = []
        state = {name: tensor.detach().float() if is_float(tensor) else tensor for name, tensor in self.state().items()}
        self._follower = follower = Follower(state, self.state())
        self.neurons = follower.neurons
        follower.number(images, self._image_numbers(images))
        with Calls(self._call, self._follow):
            output = functional_call(self.module, state, images)
        logits = logits_of(output)
        if logits is None:
            raise Refused(f"{type(self.module).__name__} returns a {type(output).__name__}, not logits [N, classes]")
        self._find_last(logits)
        self.only_scales = follower.only_scales
        del self._follower

    def _image_numbers(self, images: Tensor) -> Numbers:
        self.image_channels = channels = images.shape[1] if images.dim() == 4 else 1
        codes = self.neurons.add(channels)[:, None, None].expand(channels, IMAGE_SIDE, IMAGE_SIDE)
        y, x = torch.meshgrid(2 * [middles(IMAGE_SIDE)], indexing="ij")
        codes, y, x = (tensor.expand(2, channels, -1, -1).reshape(images.shape) for tensor in (codes, y, x))
        return Numbers(codes, y, x, 0, frozenset([-1]))

    def _follow(self, function: Callable, args: tuple, kwargs: dict, result) -> None:
        """Follow a call without weights; refuse one that takes weights that are not its to be written."""
        follower = self._follower
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return
        if name_of(function) in REFUSED and any(follower.numbers(leaf) for leaf in leaves):
            raise Refused(f"{name_of(function)} is not supported{place_of()}")
        if function in EMBEDDINGS and any(follower.is_of_values(leaf) for leaf in leaves):
            raise Refused(f"{name_of(function)} of values is not supported{place_of()}")
        numbers = [follower.numbers(leaf) for leaf in leaves]
        plain = follower.follow(function, args, kwargs, result)
        parts = [follower.part(leaf) for leaf in leaves if follower.part(leaf) is not None]
        if parts and any(numbers) and not plain:
            raise Refused(f"{name_of(function)}, which takes {parts[0].name}, is not supported{place_of()}")
        if len(leaves) == 1 and numbers[0] is not None and isinstance(result, Tensor):
            self._note_activation(function, args, kwargs, numbers[0], result)

    def _note_activation(self, function: Callable, args: tuple, kwargs: dict, numbers: Numbers, result: Tensor) -> None:
        """If a function is of single elements, note its values with the layers that it follows."""
        if result.shape != numbers.codes.shape:
            return
        points = torch.tensor(ACTIVATION_POINTS)
        leaves, spec = tree_flatten((args, kwargs))
        new_args, new_kwargs = tree_unflatten([points.clone() if isinstance(v, Tensor) else v for v in leaves], spec)
        try:
            values = function(*new_args, **new_kwargs)
        except Exception:  # not a function of single elements
            return
        if isinstance(values, Tensor) and values.shape == points.shape and not torch.equal(values, points):
            for source in numbers.sources - {-1}:
                if self.layers[source].activation is None:
                    self.layers[source].activation = tuple(values.tolist())

    def _call(self, kind: Kind, function: Callable, args: tuple, kwargs: dict):
        """Read a call that may be a layer or a norm, and compute it."""
        follower = self._follower
        given = kind.bind(args, kwargs)
        if kind.is_sum:
            result = function(*args, **kwargs)
            shift = self._read_shift(given)
            self._calls.append((function, shift))
            if shift is None:
                self._follow(function, args, kwargs, result)
            else:
                summand = given["input"] if follower.part(given["input"]) is None else given["other"]
                follower.only_scales = False
                follower.number(result, follower.numbers(summand))
            return result
        numbers, weight = follower.numbers(given["input"]), given.get("weight")
        is_layer = not kind.is_norm and numbers is not None and not follower.numbers(weight)
        if is_layer and follower.part(weight) is None and follower.computed_from(weight) is not None:
            computed = follower.computed_from(weight)
            raise Refused(f"{name_of(function)}: its weight is computed from {computed}, not a parameter{place_of()}")
        result = function(*args, **kwargs)
        if numbers is None or not (kind.is_norm or (is_layer and follower.part(weight) is not None)):
            self._calls.append((function, None))
            self._follow(function, args, kwargs, result)
            return result
        read = self._read_norm if kind.is_norm else self._read_layer
        found = read(kind, function, given, numbers, result)
        self._calls.append((function, found))
        return result

    def _read_layer(self, kind: Kind, function: Callable, given: dict, numbers: Numbers, result: Tensor) -> Layer:
        weight, bias = (self._follower.part(given.get(name)) for name in ("weight", "bias"))
        if bias is None and given.get("bias") is not None:
            raise Refused(f"{name_of(function)}: the bias of {weight.name} is not a parameter{place_of()}")
        if kind.transposed:
            own = given["weight"]
            weight = weight.moved(self.state()[weight.name], torch.arange(own.numel()).view(own.shape).T)
        layer = next((layer for layer in self.layers if layer.weight.same(weight)), None)
        if layer is None:
            layer = self._new_layer(kind, given, numbers, result, weight, bias)
        # What comes out is of the layer's neurons, at the places where it reads.
        axis = kind.axis % result.dim()
        shape = [-1 if place == axis else 1 for place in range(result.dim())]
        codes = self.neurons.codes[layer.first_neuron : layer.first_neuron + layer.shape[0]].view(shape)
        if kind.is_convolution:
            sides = [1] * (4 - result.dim()) + list(result.shape[2:])
            y, x = torch.meshgrid(*map(middles, sides), indexing="ij")
            y, x = (place.reshape(result.shape[2:]) for place in (y, x))
        else:
            y, x = (place.mean(-1, keepdim=True) for place in (numbers.y, numbers.x))
        expanded = [tensor.expand(result.shape) for tensor in (codes, y, x)]
        self._follower.number(result, Numbers(*expanded, numbers.depth + 1, frozenset([layer.index])))
        return layer

    def _new_layer(self, kind: Kind, given: dict, numbers: Numbers, result, weight: Part, bias: Part | None) -> Layer:
        options = {}
        if kind.is_convolution:
            options = {name: given.get(name, default) for name, default in DEFAULTS.items()}
            read = read_channels(numbers)
            resolution = result.shape[-1]
        else:
            read = read_features(numbers)
            resolution = result.numel() // result.shape[-1] // 2  # tokens of each of the two images
        (channels, places, grid, order) = read
        shape = tuple(given["weight"].shape)
        shape = shape[::-1] if kind.transposed else shape
        reads_maps = any(self.layers[source].resolution > 1 for source in numbers.sources - {-1})
        layer = Layer(
            weight.name.removesuffix(".weight"), weight, bias, shape, options, self.neurons.numbers(channels), places,
            grid, order, numbers.depth, numbers.sources, resolution,
            given["input"].shape[-1] if kind.is_convolution else 1, index=len(self.layers),
            first_neuron=len(self.neurons.codes),
            pooled=reads_maps and resolution == 1 and grid is not None and len(grid) == 1,
        )  # fmt: skip
        self.neurons.add(shape[0], layer=layer.index)
        for source in numbers.sources - {-1}:
            self.layers[source].readers.append(layer)
        self.layers.append(layer)
        return layer

    def _read_shift(self, given: dict) -> Shift | None:
        """The parameter that a sum adds to activations of as many neurons, if it is such a one."""
        follower = self._follower
        for summand, other in (("input", "other"), ("other", "input")):
            numbers, part = follower.numbers(given[summand]), follower.part(given[other])
            if numbers is None or part is None or given.keys() - {"input", "other"} or not is_float(given[other]):
                continue
            parameter = given[other]
            shape = (1,) * (numbers.codes.dim() - parameter.dim()) + tuple(parameter.shape)
            for axis in (-1, 1):
                codes, y, x = (tensor[:1].movedim(axis, -1).flatten(0, -2) for tensor in numbers[:3])
                neurons = codes.amax(0)
                places = parameter.view(shape).movedim(axis, -1).flatten(0, -2)
                if (
                    len(shape) == numbers.codes.dim() and shape[0] == 1 and places.shape[1] == len(neurons)
                    and len(places) in (1, len(codes)) and ((codes == neurons) | (codes == 0)).all()
                ):  # fmt: skip
                    where = torch.stack([y[:, 0], x[:, 0]], 1).float() if len(places) > 1 else None
                    numbers_of = self.neurons.numbers(neurons)
                    shift = next((shift for shift in self.shifts if shift.part.same(part)), None)
                    if shift is None:
                        shift = Shift(part.name, part, numbers_of, axis, where, tuple(parameter.shape))
                        self.shifts.append(shift)
                    return shift
        return None

    def _read_norm(self, kind: Kind, function: Callable, given: dict, numbers: Numbers, result: Tensor) -> Norm:
        tensors = {name: given[name] for name in (*STATISTICS, "weight", "bias") if given.get(name) is not None}
        parts = {name: self._follower.part(tensor) for name, tensor in tensors.items()}
        if None in parts.values():
            raise Refused(
                f"{name_of(function)}: its {next(n for n in parts if not parts[n])} is no parameter{place_of()}"
            )
        axis = 1 if kind.axis == 1 else -len(given["normalized_shape"])
        codes = numbers.codes.movedim(axis, 0).flatten(1)[:, 0]
        settings = {name: value for name, value in given.items() if name not in {"input", *tensors}}
        norm = next((norm for norm in self.norms if parts and norm.parameters == parts), None)
        if norm is None:
            name = next(iter(parts.values())).name.rpartition(".")[0] if parts else name_of(function)
            places = tuple(given["normalized_shape"][1:]) if kind.axis == -1 else ()
            norm = Norm(
                name,
                function,
                settings,
                parts,
                self.neurons.numbers(codes),
                axis,
                places=places,
                by_inputs=kind.by_inputs,
            )
            self.norms.append(norm)
        for source in numbers.sources - {-1}:
            self.layers[source].normalised = True
        self._follower.number(result, numbers)
        return norm

    def _find_last(self, logits: Tensor) -> None:
        """Find the layer whose outputs are the classes."""
        numbers = self._follower.numbers(logits)
        name = type(self.module).__name__
        if logits.dim() != 2 or len(logits) != 2:
            raise Refused(f"{name}: the output has shape {[*logits.shape[1:]]} per image; it must be [classes]")
        found = None if numbers is None else self.neurons.numbers(numbers.codes[0])
        for layer in self.layers:
            own = torch.arange(layer.first_neuron, layer.first_neuron + layer.shape[0])
            if found is not None and torch.equal(found, own):
                layer.last, self.last = True, layer
        if numbers is None:
            raise Refused(f"{name}: its output cannot be followed back to the images")
        if not any(layer.last for layer in self.layers):
            raise Refused(f"{name}: the output must be that of one layer, the classes, averaged and scaled at most")
        self.classes = self.last.shape[0]
        for norm in self.norms:
            norm.of_last = bool(torch.isin(norm.channels, found).any())

    @property
    def convolutional(self) -> bool:
        return any(layer.is_convolution for layer in self.layers)

    @property
    def is_rescalable(self) -> bool:
        """Whether it is a chain of layers, each of which gives twice as much when it is given twice as much."""
        in_a_row = all(layer.sources == {layer.index - 1} for layer in self.layers)
        scale = all(layer.last or scales(layer.activation) for layer in self.layers)
        return in_a_row and scale and self.only_scales and not self.norms


def scales(values: tuple[float, ...] | None) -> bool:
    """Whether a function with these values at ACTIVATION_POINTS gives twice as much for twice as much; None does."""
    if values is None:
        return True
    at = dict(zip(ACTIVATION_POINTS, values, strict=True))
    return at[0.0] == 0 and all(abs(at[2 * p] - 2 * at[p]) < 1e-6 for p in (-1.0, -0.5, 0.5, 1.0))


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


def logits_of(output) -> Tensor | None:
    """The logits among what a network returns: the output itself, or its `logits`, if they are a tensor."""
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", output)
    return logits if isinstance(logits, Tensor) else None


def unwrapped(module: nn.Module) -> nn.Module:
    """The network within the wrappers of `torch.compile`, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif hasattr(module, "_orig_mod"):
            module = module._orig_mod
        else:
            return module


@contextlib.contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """A forward pass that computes as in evaluation, layer by layer, and leaves the module's modes as they are."""
    modes = [(part, part.training) for part in module.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused transformer layer would hide its parts
    try:
        module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training
        torch.backends.mha.set_fastpath_enabled(fast)


def place_of(error: Exception | None = None) -> str:
    """The innermost line of the user's own code that an error came through, or that runs now; "" if there is none."""
    frames = traceback.walk_tb(error.__traceback__) if error else traceback.walk_stack(sys._getframe())
    within = itertools.takewhile(lambda frame: frame[0].f_code is not ComputationGraph._read.__code__, frames)
    own = [
        (frame.f_code.co_filename, line) for frame, line in (frames if error else within)
        if not frame.f_code.co_filename.startswith((*LIBRARIES, "<")) and "importlib" not in frame.f_code.co_filename
    ]  # fmt: skip
    if not own:
        return ""
    file, line = own[-1] if error else own[0]
    return f" ({Path(file).name}, line {line}: {linecache.getline(file, line).strip()})"


LIBRARIES = (str(Path(torch.__file__).parent.parent), str(Path(__file__).parent), str(Path(contextlib.__file__).parent))
