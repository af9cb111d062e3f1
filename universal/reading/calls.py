"""The calls of torch functions that take weights: layers, norms and parameters that are added or multiplied by.

One more kind of call is one more entry in `KINDS`. `CallMode` is the mode under which a forward pass shows them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from universal.reading import products

ACTIVATION_POINTS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)  # where the function after a layer is looked at


# ---- what is written -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Part:
    """The elements of a parameter that a call takes: all of them, or those at `index`, which has the part's shape.

    What is `frozen` is kept: parameters with `requires_grad=False`, and buffers.
    """

    name: str
    index: Tensor | None = None
    frozen: bool = False

    def of(self, weights: dict[str, Tensor]) -> Tensor:
        """The part's values in `weights`, the parameters by name."""
        whole = weights[self.name]
        return whole if self.index is None else whole.flatten()[self.index.to(whole.device)]

    def put(self, weights: dict[str, Tensor], values: Tensor, others: dict[str, Tensor]) -> None:
        """Set the part's values in `weights`, unless it is frozen; other elements of the parameter, if not there yet,
        are as in `others`."""
        if self.frozen:
            return
        if self.index is not None:
            whole = weights.get(self.name, others[self.name])
            index = self.index.to(whole.device).flatten()
            values = whole.flatten().to(values).index_copy(0, index, values.flatten()).view(whole.shape)
        weights[self.name] = values

    def __eq__(self, other) -> bool:
        """Whether both are the same elements of the same parameter, in the same order."""
        if not isinstance(other, Part) or self.name != other.name or self.index is None or other.index is None:
            return isinstance(other, Part) and self.name == other.name and self.index is other.index
        return torch.equal(self.index, other.index)

    def meets(self, other: "Part") -> bool:
        """Whether both have elements of the same parameter in common."""
        whole = self.index is None or other.index is None
        return self.name == other.name and (whole or bool(torch.isin(self.index, other.index).any()))

    def elements(self, size: int) -> Tensor:
        """The places of the part's elements in the parameter, of so many elements, flattened."""
        return torch.arange(size) if self.index is None else self.index.flatten()

    def moved(self, whole: Tensor, elements: Tensor) -> "Part":
        """The part that has these elements of this one, in their shape. `whole` is the parameter."""
        return Part(self.name, self.elements(whole.numel())[elements], self.frozen)


class Gate(NamedTuple):
    """Which of a layer's or norm's neurons activations are multiplied by, as in squeeze-and-excitation or gated linear
    units, [neurons], and what each gives, before its activation, where it lets everything pass."""

    neurons: Tensor  # bool
    offset: float

    def damped(self, values: Tensor, by: float) -> Tensor:
        """Rows [neurons, ...], those of the gate multiplied by this."""
        scale = torch.where(self.neurons.to(values.device), by, 1.0)
        return values * scale.view(-1, *[1] * (values.dim() - 1))


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
    options: dict  # stride, padding and dilation, one number a side, and groups of a convolution; stride of a window
    channels: Tensor
    places: Tensor | None
    grid: Tensor | None  # [positions, 2], within (0, 1), of a linear layer; None where the kernel has the positions
    order: Tensor | None
    depth: int  # how many layers the images have passed before this one, on the longest way
    sources: frozenset[int]  # indices of the layers whose outputs reach it; -1 for the images
    window: tuple[int, ...] | None  # sides of the kernel of a convolution, or of the windows that a linear layer reads
    resolution: float  # side of the maps, if they were square, or number of tokens, that it gives
    side: float  # side of the maps, if they were square, that are read through a window; 1 for other layers
    index: int = 0
    first_neuron: int = 0  # the number of its first neuron
    last: bool = False  # whether its outputs are the classes
    share: float = 1.0  # by which they are multiplied, so that the classes are their mean over all such layers
    activation: tuple[float, ...] | None = None  # the values at ACTIVATION_POINTS of the function after it
    normalised: bool = False  # whether a norm follows before the next layer
    pooled: bool = False  # whether maps or tokens were reduced to one place before it
    readers: list["Layer"] = field(default_factory=list, repr=False)  # the layers that its outputs reach
    gate: Gate | None = None  # its neurons that activations are multiplied by

    @property
    def parts(self) -> list[Part]:
        """What of it can be written."""
        return [part for part in (self.weight, self.bias) if part is not None and not part.frozen]

    @property
    def neurons(self) -> Tensor:
        """The numbers of its neurons, [neurons]."""
        return torch.arange(self.first_neuron, self.first_neuron + self.shape[0])

    @property
    def is_convolution(self) -> bool:
        return self.grid is None

    @property
    def has_window(self) -> bool:
        """Whether a neuron reads a window of maps: that of a kernel, or of the features of a linear layer."""
        return self.window is not None

    @property
    def axis(self) -> int:
        """The axis of its inputs' channels or features, and of its outputs' neurons."""
        return 1 if self.is_convolution else -1

    @property
    def groups(self) -> int:
        return self.options.get("groups", 1)

    @property
    def positions(self) -> int:
        """How many positions of a channel a neuron reads: those of the kernel, or of the map that was flattened."""
        return math.prod(self.shape[2:]) if self.is_convolution else len(self.grid)

    def weight_of(self, kernels: Tensor) -> Tensor:
        """The weight, of `shape`, whose `kernels` [neurons, channels of a group, positions] these are."""
        if self.is_convolution:
            return kernels.unflatten(2, self.shape[2:])
        flat = kernels.flatten(1)
        return flat if self.order is None else flat[:, torch.argsort(self.order)]

    def patches(self, inputs: Tensor, most: int) -> Tensor:
        """What each group of a layer with windows reads at up to `most` positions along each side of the maps.

        [groups, N, positions, features], of which the features lie as the weight of a neuron does, flattened.
        """
        if not self.is_convolution:
            rows = inputs.flatten(1, -2)
            return rows[None, :, :: -(-rows.shape[1] // most**2)]
        windows = self.windows(inputs, most)
        positions = windows.unflatten(1, (self.groups, -1)).flatten(3, 2 + len(self.shape[2:]))
        return positions.movedim((1, 0, 3), (0, 1, 2)).flatten(3)

    def mean_patch(self, inputs: Tensor) -> Tensor:
        """What a convolution of one group reads in the mean over all positions, [N, features]."""
        return self.windows(inputs).mean([*range(2, len(self.shape))]).flatten(1)

    def windows(self, inputs: Tensor, most: int | None = None) -> Tensor:
        """A view of what a convolution reads, at up to `most` positions along each side of the maps, or at all of them:
        [N, channels, *positions, *kernel]."""
        kernel = self.shape[2:]
        stride, padding, dilation = (self.options[name] for name in ("stride", "padding", "dilation"))
        # F.unfold would lay out all positions, most of which are not looked at, and takes no maps of one dimension.
        for axis, size in enumerate(kernel):
            spread = dilation[axis] * (size - 1)
            before = {"same": spread // 2, "valid": 0}[padding] if isinstance(padding, str) else padding[axis]
            after = spread - before if padding == "same" else before
            inputs = F.pad(inputs, [*[0, 0] * (len(kernel) - 1), before, after])
            count = (inputs.shape[2 + axis] - spread - 1) // stride[axis] + 1
            every = -(-count // most) if most else 1
            first = stride[axis] * ((count - 1) % every // 2)
            inputs = inputs.narrow(2 + axis, first, inputs.shape[2 + axis] - first)
            inputs = inputs.unfold(2 + axis, spread + 1, stride[axis] * every)[..., :: dilation[axis]]
        return inputs

    def of(self, weights: dict[str, Tensor], inputs: Tensor, _: bool = False) -> Tensor:
        """The layer's outputs for `inputs`, with the parameters in `weights`."""
        return self(inputs, self.weight.of(weights), self.bias and self.bias.of(weights))

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's outputs for `inputs`, with these parameters."""
        if not self.is_convolution:
            return F.linear(inputs, weight, bias)
        if self.shape[2:] == (1, 1) and self.groups == 1 and self.options["padding"] in ((0, 0), "same", "valid"):
            # A linear layer over the channels. Not as a convolution: the backward pass of oneDNN's 1x1 convolutions
            # hangs on processors with AVX2 only (PyTorch 2.15).
            down, across = self.options["stride"]
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
    places: tuple[int, ...]  # shape of the places that it scales apart
    by_inputs: str  # the argument that says to take the statistics of the inputs
    sources: frozenset[int]  # as a layer's
    of_last: bool = False  # whether it standardises the classes
    gate: Gate | None = None  # its neurons that activations are multiplied by

    @property
    def parts(self) -> list[Part]:
        """What of it can be written."""
        return [part for part in self.parameters.values() if not part.frozen]

    def of(self, weights: dict[str, Tensor], inputs: Tensor, batch_statistics: bool = False) -> Tensor:
        """What comes out with the parameters in `weights`, or with the statistics of the inputs."""
        parameters = {name: part.of(weights) for name, part in self.parameters.items()}
        if batch_statistics and STATISTICS[0] in parameters:
            parameters |= dict.fromkeys(STATISTICS) | {self.by_inputs: True}
        return self(inputs, **parameters)

    def __call__(self, inputs: Tensor, **parameters: Tensor) -> Tensor:
        """What comes out with these parameters."""
        if parameters.get("running_mean") is None or not torch.is_grad_enabled():
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

    `channels`, [inputs], are the numbers of the neurons, which lie on `axis`, counted from the last, of activations and
    parameter; `places`, [n, 2], are those of what it adds to one neuron, None if that is one number. `shape` is that of
    the parameter.
    """

    name: str
    part: Part
    channels: Tensor
    axis: int
    places: Tensor | None
    shape: tuple[int, ...]
    sources: frozenset[int]  # as a layer's
    of_last: bool = False  # whether the neurons are the classes

    @property
    def parts(self) -> list[Part]:
        """What of it can be written."""
        return [] if self.part.frozen else [self.part]

    def of(self, weights: dict[str, Tensor], inputs: Tensor, _: bool = False) -> Tensor:
        """What comes out with the parameter in `weights`."""
        return self(inputs, self.part.of(weights))

    def __call__(self, inputs: Tensor, parameter: Tensor) -> Tensor:
        return inputs + parameter

    def parameter(self, wanted: Tensor) -> Tensor:
        """The parameter that does as if this, `wanted`, were added, or of a gain multiplied by."""
        return wanted


class Difference(Shift):
    """A parameter that is taken off activations."""

    def __call__(self, inputs: Tensor, parameter: Tensor) -> Tensor:
        return inputs - parameter

    def parameter(self, wanted: Tensor) -> Tensor:
        """The parameter that does as if this, `wanted`, were added."""
        return -wanted


class Gain(Shift):
    """A parameter that activations are multiplied by, with the same attributes: one number or more for each neuron."""

    def __call__(self, inputs: Tensor, parameter: Tensor) -> Tensor:
        return inputs * parameter


class Quotient(Gain):
    """A parameter that activations are divided by."""

    def __call__(self, inputs: Tensor, parameter: Tensor) -> Tensor:
        return inputs / parameter

    def parameter(self, wanted: Tensor) -> Tensor:
        """The parameter that does as if activations were multiplied by this, `wanted`."""
        return 1 / wanted


Operation = Layer | Norm | Shift  # or a Gain, which is a Shift


# ---- one entry a kind ------------------------------------------------------------------------------------------------


@dataclass
class Kind:
    """What is particular to a kind of call: the names of its arguments, and where its neurons or channels lie."""

    arguments: tuple[str, ...]
    axis: int
    is_norm: bool = False
    by_element: type[Shift] | None = None  # what it is if its other input is a parameter
    commutes: bool = True  # whether its first input may be that as well
    is_convolution: bool = False
    transposed: bool = False  # whether the weight is [features, neurons]
    by_inputs: str = ""  # of a norm with running statistics: the argument that says not to use them
    product: Callable[..., products.Product | None] | None = None  # what it is over other axes

    def bind(self, args: tuple, kwargs: dict) -> dict:
        return dict(zip(self.arguments, args, strict=False)) | kwargs


STATISTICS = ("running_mean", "running_var")
BY_STATISTICS = ("input", *STATISTICS, "weight", "bias")
CONVOLUTION = Kind(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), 1, is_convolution=True)
KINDS: dict[Callable, Kind] = {
    torch.conv1d: CONVOLUTION,
    torch.conv2d: CONVOLUTION,
    F.linear: Kind(("input", "weight", "bias"), -1),
    torch.einsum: Kind((), -1, product=products.of_einsum),
    torch.addmm: Kind(("bias", "input", "weight"), -1, transposed=True),
    F.batch_norm: Kind((*BY_STATISTICS, "training", "momentum", "eps"), 1, is_norm=True, by_inputs="training"),
    F.instance_norm: Kind(
        (*BY_STATISTICS, "use_input_stats", "momentum", "eps"), 1, is_norm=True, by_inputs="use_input_stats"
    ),
    F.group_norm: Kind(("input", "num_groups", "weight", "bias", "eps"), 1, is_norm=True),
    F.layer_norm: Kind(("input", "normalized_shape", "weight", "bias", "eps"), -1, is_norm=True),
    F.rms_norm: Kind(("input", "normalized_shape", "weight", "eps"), -1, is_norm=True),
}
PRODUCT = Kind(("input", "weight"), -1, transposed=True, product=products.of_matrices)
PRODUCTS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)
KINDS |= dict.fromkeys(PRODUCTS, PRODUCT)
SUM = Kind(("input", "other"), -1, by_element=Shift)
KINDS |= dict.fromkeys((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__), SUM)
TIMES = Kind(("input", "other"), -1, by_element=Gain)
TIMES_FUNCTIONS = (
    torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__, torch.multiply,
    Tensor.multiply,
)  # fmt: skip
KINDS |= dict.fromkeys(TIMES_FUNCTIONS, TIMES)
MINUS = Kind(("input", "other"), -1, by_element=Difference, commutes=False)
KINDS |= dict.fromkeys((torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__, torch.subtract), MINUS)
OVER = Kind(("input", "other"), -1, by_element=Quotient, commutes=False)
OVER_FUNCTIONS = (
    torch.div, Tensor.div, Tensor.div_, Tensor.__truediv__, Tensor.__itruediv__, torch.divide, torch.true_divide,
)  # fmt: skip
KINDS |= dict.fromkeys(OVER_FUNCTIONS, OVER)
# Those that change the activations that they are given, which may be used again, or be a view of others.
IN_PLACE = {
    Tensor.add_, Tensor.__iadd__, Tensor.mul_, Tensor.__imul__, Tensor.sub_, Tensor.__isub__, Tensor.div_,
    Tensor.__itruediv__,
}  # fmt: skip
# Functions of which an argument changes nothing if it is 1, not 0.
RATIOS = {*TIMES_FUNCTIONS, *OVER_FUNCTIONS, Tensor.__rtruediv__}
DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
# Functions of two activations that sum over an axis of both: which neurons the result is of, their shapes do not tell.
CONTRACTIONS = {*PRODUCTS, torch.einsum, torch.baddbmm, torch.tensordot, F.scaled_dot_product_attention}
LAYERS = {torch.conv1d, torch.conv2d, F.linear, torch.addmm}  # likewise, of one whose weight is not to be written
# Layers that cannot be written, by the names of their functions.
REFUSED = {
    "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "lstm", "gru", "rnn_tanh", "rnn_relu",
    "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "bilinear",
}  # fmt: skip
GEOMETRY = {F.affine_grid}  # what becomes of activations there are places, not activations
OPTIONS = {"alpha", "beta", "out"}  # arguments with which a sum or product is none of KINDS
OPERANDS = ("input", "mat1", "other", "mat2")  # names of those of products, in order
EMBEDDINGS = {F.embedding, F.embedding_bag}
DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}


def gated_linear_unit(input: Tensor, dim: int = -1) -> Tensor:
    """`F.glu` in its parts, each a call."""
    passed, gate = input.chunk(2, dim)
    return passed * gate.sigmoid()


def attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check, num_heads: int, in_proj_weight, in_proj_bias,
    bias_k, bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training=True, key_padding_mask=None,
    need_weights=True, attn_mask=None, use_separate_proj_weight=False, q_proj_weight=None, k_proj_weight=None,
    v_proj_weight=None, static_k=None, static_v=None, average_attn_weights=True, is_causal=False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`F.multi_head_attention_forward` in its parts, each a call: [tokens, N, width] -> the same, and the shares."""
    if bias_k is not None or bias_v is not None or add_zero_attn or static_k is not None or static_v is not None:
        raise ValueError("attention with additional keys and values is not supported")
    if query is key and key is value and not use_separate_proj_weight:
        parts = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        separate = (q_proj_weight, k_proj_weight, v_proj_weight)
        weights = separate if use_separate_proj_weight else in_proj_weight.chunk(3)
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        parts = [F.linear(*arguments) for arguments in zip((query, key, value), weights, biases, strict=True)]
    heads = [part.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for part in parts]  # [N, heads, tokens, size]
    scores = heads[0] @ heads[1].transpose(-2, -1) * heads[0].shape[-1] ** -0.5
    for mask in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None]):
        if mask is not None:
            mask = mask.unflatten(0, scores.shape[:2]) if mask.dim() == 3 else mask  # one of each image and head
            scores = scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    shares = scores.softmax(-1)
    mixed = (shares @ heads[2]).permute(2, 0, 1, 3).flatten(2)
    shown = shares.mean(1) if average_attn_weights else shares
    return F.linear(mixed, out_proj_weight, out_proj_bias), shown if need_weights else None


class CallMode(TorchFunctionMode):
    """A forward pass of which `call` computes every call that may take weights, and `follow` sees what else there is.

    What is called `within` the mode is seen in its turn.
    """

    def call(self, kind: Kind, function: Callable, args: tuple, kwargs: dict):
        raise NotImplementedError

    def follow(self, function: Callable, args: tuple, kwargs: dict, result) -> None:
        pass

    def within(self, function: Callable, *args, **kwargs):
        with self:
            return function(*args, **kwargs)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.multi_head_attention_forward:
            return self.within(attention, *args, **kwargs)
        if function is F.glu:
            return self.within(gated_linear_unit, *args, **kwargs)
        if function in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if function is Tensor.view and not kwargs and not isinstance(args[1], torch.dtype):
            function = Tensor.reshape  # activations may lie channels-last
        if function is Tensor.view_as:
            function = Tensor.reshape_as
        if function in PRODUCTS or function is torch.addmm:
            args = (*args, *(kwargs[name] for name in OPERANDS if name in kwargs))
            kwargs = {name: value for name, value in kwargs.items() if name not in OPERANDS}
        if function in KINDS and not OPTIONS & kwargs.keys():
            return self.call(KINDS[function], function, args, kwargs)
        result = function(*args, **kwargs)
        self.follow(function, args, kwargs, result)
        return result


def is_float(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def name_of(function: Callable) -> str:
    """A torch function's name, as people write it."""
    return getattr(function, "__name__", str(function)).strip("_")
