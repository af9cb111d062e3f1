"""Any module as a graph of layers: its own forward pass tells which there are, which neurons each reads, what follows.

Design document, section 4.1.1. Nobody describes an architecture by hand, and nothing is re-enacted: the module runs as
its author wrote it, under a mode that sees every call of a torch function (`universal.calls`). What takes weights is a
layer, a norm, a shift or a gain; what else runs, known or unknown, is followed (`universal.following`). A second run of
the same kind, on the probes of a generator, writes each layer inside its own call, from the activations that reach it,
which are already those of the written layers before it.
"""

import contextlib
import functools
import itertools
import linecache
import math
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from scripting import in_short
from universal.calls import (
    ACTIVATION_POINTS,
    DEFAULTS,
    EMBEDDINGS,
    GEOMETRY,
    REFUSED,
    STATISTICS,
    Call,
    Calls,
    Kind,
    Layer,
    Norm,
    Part,
    Shift,
    is_float,
    name_of,
)
from universal.following import Follower, Numbers

IMAGE_SIDE = 28  # pixels
IMAGE_CHANNELS = (1, 3)
# What a network may take: the shapes of a batch of N images, in the order in which they are tried.
IMAGE_FORMATS = {
    "[N, 1, 28, 28]": lambda images: images,
    "[N, 3, 28, 28]": lambda images: images.expand(-1, 3, -1, -1),
    "[N, 28, 28]": lambda images: images.flatten(0, 1),
    "[N, 784]": lambda images: images.flatten(1),
}


class Refused(ValueError):
    """What cannot be read: the call, and the line of the user's own code that it stands in."""


class ComputationGraph:
    """The layers and norms of a module that classifies images of 28 x 28 pixels as logits [N, classes].

    `layers` and `norms` are in order of computation; `neurons` are those that they read; `format` is one of
    IMAGE_FORMATS. `written` and `left` are the names of the parameters and buffers that a generator writes, and of
    those that it does not; those of which it writes a part are both. `count` is how many numbers it writes. Raises
    ValueError, naming the call and the line of the user's code, for what cannot be read. The module stays as it is, but
    that lazy parameters are initialised.
    """

    def __init__(self, module: nn.Module):
        self.module = unwrapped(module)
        with still(self.module), torch.no_grad():
            if any(isinstance(parameter, nn.UninitializedParameter) for parameter in self.module.parameters()):
                self._try_formats(lambda images, _: self.module(images))
            reading = self._try_formats(self._read)
        self.layers, self.norms, self.shifts, self.last = reading.layers, reading.norms, reading.shifts, reading.last
        self.neurons, self.classes, self._calls = reading.follower.neurons, reading.last.shape[0], reading.calls
        counters = (f"{norm.name}.num_batches_tracked" for norm in self.norms)
        self.counters = [name for name in counters if name in self.state()]
        parts = [part for call in (*self.layers, *self.norms, *self.shifts) for part in call.parts]
        parts += map(Part, self.counters)
        self.written = list(dict.fromkeys(part.name for part in parts))
        sizes = {name: tensor.numel() for name, tensor in self.state().items()}
        counts = {name: sizes[name] for name in self.written}
        for name in {part.name for part in parts if part.index is not None}:
            counts[name] = len(torch.cat([part.elements(sizes[name]) for part in parts if part.name == name]).unique())
        self.left = [name for name, size in sizes.items() if counts.get(name, 0) < size]
        self.count = sum(counts.values())

    def state(self) -> dict[str, Tensor]:
        """The module's parameters and buffers, by name."""
        return dict(self.module.named_parameters()) | dict(self.module.named_buffers())

    def with_tied(self, names: list[str]) -> list[str]:
        """`names`, and all others that the module has for the same tensors."""
        chosen = {id(tensor) for name, tensor in self.state().items() if name in names}
        every = itertools.chain(
            self.module.named_parameters(remove_duplicate=False), self.module.named_buffers(remove_duplicate=False)
        )
        return names + [name for name, tensor in every if id(tensor) in chosen and name not in names]

    def weights(self) -> dict[str, Tensor]:
        """The module's own parameters and buffers of floating point, by name, as float32."""
        return {name: tensor.detach().float() for name, tensor in self.state().items() if is_float(tensor)}

    def run(self, images: Tensor, weights: dict[str, Tensor], batch_statistics: bool = False) -> Tensor:
        """The logits [N, classes] of images [N, 1, 28, 28], with these weights; others are the module's own.

        With `batch_statistics` norms use those of the images, as in training, in the place of their running ones.
        """
        weights = self._own(images, but=weights) | weights
        return self._forward(images, weights, lambda call, inputs: call.of(weights, inputs, batch_statistics))

    def write(self, images: Tensor, written: dict[str, Tensor], write: Callable) -> Tensor:
        """The logits of images [N, 1, 28, 28], while the weights are written.

        `write(call, inputs)` returns the outputs, and puts into `written` what it writes. It is called
        once for each, where it is first used.
        """
        done: list[Call] = []

        def compute(call: Call, inputs: Tensor) -> Tensor:
            if any(call is other for other in done):
                return call.of(written, inputs)
            done.append(call)
            return write(call, inputs)

        return self._forward(images, self._own(images), compute)

    def _forward(self, images: Tensor, weights: dict[str, Tensor], compute: Callable) -> Tensor:
        """The logits of images [N, 1, 28, 28], each layer and norm computed by `compute(layer or norm, inputs)`."""
        calls = iter(self._calls)
        names = {id(tensor): name for name, tensor in weights.items()}
        another_way = ValueError(f"{type(self.module).__name__}: its forward pass goes another way every time")

        def call(kind: Kind, function: Callable, args: tuple, kwargs: dict):
            expected, found = next(calls, (None, None))
            if expected is not function:
                raise another_way
            if found is None:
                return function(*args, **kwargs)
            given = kind.bind(args, kwargs)
            inputs = given["input"]
            if isinstance(found, Layer) and names.get(id(given["weight"]), found.weight.name) != found.weight.name:
                raise another_way
            if kind.by_element and inputs is weights.get(found.part.name):
                inputs = given["other"]
            return compute(found, inputs)

        with still(self.module), Calls(call):
            logits = logits_of(functional_call(self.module, weights, self.format(images)))
        if next(calls, None) is not None:
            raise another_way
        return logits

    def _own(self, images: Tensor, but: Collection[str] = ()) -> dict[str, Tensor]:
        """Copies, which the module may change, of its parameters and buffers, those of floating point as the images
        are, `but` some."""
        return {
            name: tensor.detach().to(images.device, images.dtype if is_float(tensor) else None, copy=True)
            for name, tensor in self.state().items()
            if name not in but
        }

    def _try_formats(self, run: Callable):
        """What `run(images, reading)` returns for images of the first of IMAGE_FORMATS that the module takes."""
        images = noise(2)
        failures = []
        for name, self.format in IMAGE_FORMATS.items():
            reading = Reading()
            try:
                return run(self.format(images), reading)
            except Refused:
                raise
            except Exception as error:  # the module's own code may raise anything
                failures.append((len(reading.calls), f"of {name} it says {in_short(error)}{place_of(error)}"))
        _, furthest = max(failures, key=lambda failure: failure[0])
        raise ValueError(
            f"{type(self.module).__name__} takes no images of the shapes {', '.join(IMAGE_FORMATS)}; {furthest}"
        )

    def _read(self, images: Tensor, reading: "Reading") -> "Reading":
        """Find the layers, the norms and the classes in a forward pass on `images`, on the CPU."""
        state = self._own(torch.zeros((), dtype=torch.float32))
        self.image_channels = images.shape[1] if images.dim() == 4 else 1
        reading.start(images, self.image_channels, state, self.state(), {*dict(self.module.named_buffers())})
        with Calls(reading.call, reading.follow):
            output = functional_call(self.module, state, images)
        reading.finish(output, type(self.module).__name__)
        return reading

    @property
    def convolutional(self) -> bool:
        return any(layer.is_convolution for layer in self.layers)

    @functools.cached_property
    def is_rescalable(self) -> bool:
        """Whether it is a chain of layers that can be `rescaled` against each other, as tried with random weights."""
        if self.norms or not all(layer.sources == {layer.index - 1} for layer in self.layers):
            return False
        generator = torch.Generator().manual_seed(0)
        written = {name: tensor for name, tensor in self.weights().items() if name in self.written}
        device = next(iter(written.values())).device
        weights = {}
        for name, tensor in written.items():
            values = torch.randn(tensor.shape, dtype=torch.float32, generator=generator)
            weights[name] = (values / math.sqrt(max(1, values[0].numel()))).to(device)
        factors = torch.linspace(2, -2, len(self.layers)).exp()
        with torch.no_grad():
            images = noise(2).to(device)
            before, after = (self.run(images, some) for some in (weights, self.rescaled(weights, factors)))
        return torch.allclose(before, after, rtol=1e-3, atol=1e-3 * before.abs().max().item())

    def rescaled(self, weights: dict[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
        """`weights` with those of each layer times its factor, and its biases times all factors so far.

        In a chain of layers that give twice as much when they are given twice as much, and with `factors`, [layers],
        whose product is 1, this changes nothing about what is computed.
        """
        scaled = {}
        for layer, factor, gain in zip(self.layers, factors, factors.cumprod(0), strict=True):
            scaled[layer.weight.name] = weights[layer.weight.name] * factor
            if layer.bias:
                scaled[layer.bias.name] = weights[layer.bias.name] * gain
        return weights | scaled


class Logits(nn.Module):
    """A graph's network, or a copy of it, for images [N, 1, 28, 28], whatever it takes and returns: -> logits."""

    def __init__(self, graph: ComputationGraph, module: nn.Module | None = None):
        super().__init__()
        self.module, self.format = graph.module if module is None else module, graph.format

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.module(self.format(images)))


def in_fastest_layout(network: nn.Module, images: Tensor) -> nn.Module:
    """`network` with channels last, in place, unless it then cannot run: views of maps may need the other layout."""
    network.to(memory_format=torch.channels_last).eval()
    try:
        with torch.no_grad():
            network(images)
    except RuntimeError:
        network.to(memory_format=torch.contiguous_format)
    return network


class Reading:
    """What a forward pass has shown so far: its `calls` of KINDS in order, with the layers, norms and shifts found."""

    def __init__(self):
        self.layers: list[Layer] = []
        self.norms: list[Norm] = []
        self.shifts: list[Shift] = []
        self.calls: list[tuple[Callable, Call | None]] = []
        self.last: Layer | None = None

    def start(
        self, images: Tensor, channels: int, parameters: dict[str, Tensor], originals: dict[str, Tensor],
        buffers: set[str],
    ) -> None:  # fmt: skip
        """Follow `images` of so many channels through a pass with these `parameters`, copies of the `originals`, some
        of them `buffers`."""
        self.buffers = buffers
        self.follower = Follower(parameters, originals)
        self.follower.number(images, image_numbers(images, self.follower.neurons.add(channels)))

    def follow(self, function: Callable, args: tuple, kwargs: dict, result) -> None:
        """Follow a call without weights; refuse one that takes weights that are not its to be written."""
        follower = self.follower
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return
        if name_of(function) in REFUSED and any(follower.numbers(leaf) for leaf in leaves):
            raise Refused(f"{name_of(function)} is not supported{place_of()}")
        if function in GEOMETRY:
            return
        if function in EMBEDDINGS and any(follower.is_of_values(leaf) for leaf in leaves):
            raise Refused(f"{name_of(function)} of values is not supported{place_of()}")
        numbers = [follower.numbers(leaf) for leaf in leaves]
        plain = follower.follow(function, args, kwargs, result)
        parts = [follower.part(leaf) for leaf in leaves if follower.part(leaf) is not None]
        if parts and any(numbers) and not plain:
            raise Refused(f"{name_of(function)}, which takes {parts[0].name}, is not supported{place_of()}")
        if (
            len(leaves) == 1
            and numbers[0] is not None
            and isinstance(result, Tensor)
            and result.shape == leaves[0].shape
        ):
            values = values_at_points(function, args, kwargs)
            for source in numbers[0].sources - {-1} if values else ():
                self.layers[source].activation = self.layers[source].activation or values

    def call(self, kind: Kind, function: Callable, args: tuple, kwargs: dict):
        """Read a call that may be a layer or a norm, and compute it."""
        follower = self.follower
        given = kind.bind(args, kwargs)
        if kind.by_element:
            result = function(*args, **kwargs)
            shift = self._read_shift(kind.by_element, given)
            self.calls.append((function, shift))
            if shift is None:
                self.follow(function, args, kwargs, result)
            else:
                summand = given["input"] if follower.part(given["input"]) is None else given["other"]
                follower.number(result, follower.numbers(summand))
            return result
        numbers, weight = follower.numbers(given["input"]), given.get("weight")
        is_layer = not kind.is_norm and numbers is not None and not follower.numbers(weight)
        if is_layer and follower.part(weight) is None and follower.computed_from(weight) is not None:
            computed = follower.computed_from(weight)
            raise Refused(f"{name_of(function)}: its weight is computed from {computed}, not a parameter{place_of()}")
        result = function(*args, **kwargs)
        if numbers is None or not (kind.is_norm or (is_layer and follower.part(weight) is not None)):
            self.calls.append((function, None))
            self.follow(function, args, kwargs, result)
            return result
        read = self._read_norm if kind.is_norm else self._read_layer
        found = read(kind, function, given, numbers, result)
        self.calls.append((function, found))
        return result

    def _read_layer(self, kind: Kind, function: Callable, given: dict, numbers: Numbers, result: Tensor) -> Layer:
        weight, bias = (self.follower.part(given.get(name)) for name in ("weight", "bias"))
        if bias is None and given.get("bias") is not None:
            raise Refused(f"{name_of(function)}: the bias of {weight.name} is not a parameter{place_of()}")
        own = given["weight"]
        if not kind.is_convolution and own.dim() != 2:
            raise Refused(f"{name_of(function)} with a weight of {own.dim()} dimensions is not supported{place_of()}")
        if kind.transposed:
            weight = weight.moved(self.follower.parameters[weight.name], torch.arange(own.numel()).view(own.shape).T)
        options = {}
        if kind.is_convolution:
            options = {name: given.get(name, default) for name, default in DEFAULTS.items()}
            sides = own.dim() - 2
            options |= {name: per_side(options[name], sides) for name in ("stride", "padding", "dilation")}
        layer = next((layer for layer in self.layers if layer.weight.meets(weight)), None)
        if layer is None:
            layer = self._new_layer(kind, given, options, numbers, result, weight, bias)
        elif (layer.weight, layer.bias, layer.options) != (weight, bias, options):
            raise Refused(
                f"{name_of(function)} takes {weight.name} again, in another way, which is not supported{place_of()}"
            )
        layer.sources |= numbers.sources
        for source in numbers.sources - {-1}:
            if all(layer is not reader for reader in self.layers[source].readers):
                self.layers[source].readers.append(layer)
        # What comes out is of the layer's neurons, at the places where it reads.
        axis = kind.axis % result.dim()
        shape = [-1 if place == axis else 1 for place in range(result.dim())]
        codes = self.follower.neurons.codes[layer.first_neuron : layer.first_neuron + layer.shape[0]].view(shape)
        if kind.is_convolution:
            sides = [1] * (4 - result.dim()) + list(result.shape[2:])
            y, x = torch.meshgrid(*map(middles, sides), indexing="ij")
            y, x = (place.reshape(result.shape[2:]) for place in (y, x))
        else:
            y, x = (place.mean(-1, keepdim=True) for place in (numbers.y, numbers.x))
        expanded = [tensor.expand(result.shape) for tensor in (codes, y, x)]
        self.follower.number(result, Numbers(*expanded, numbers.depth + 1, frozenset([layer.index])))
        return layer

    def _new_layer(
        self, kind: Kind, given: dict, options: dict, numbers: Numbers, result: Tensor, weight: Part, bias: Part | None
    ) -> Layer:
        neurons, shape = self.follower.neurons, tuple(given["weight"].shape)
        if kind.is_convolution:
            channels, places, grid, order = read_channels(numbers)
            side, resolution = given["input"].shape[-1], result.shape[-1]
        else:
            channels, places, grid, order = read_features(numbers)
            side, resolution = 1, result.numel() // result.shape[-1] // 2  # tokens of each of the two images
        read = [self.layers[source] for source in numbers.sources - {-1}]
        layer = Layer(
            name=weight.name.removesuffix(".weight"),
            weight=weight,
            bias=bias,
            shape=shape[::-1] if kind.transposed else shape,
            options=options,
            channels=neurons.numbers(channels),
            places=places,
            grid=grid,
            order=order,
            depth=numbers.depth,
            sources=numbers.sources,
            resolution=resolution,
            side=side,
            index=len(self.layers),
            first_neuron=len(neurons.codes),
            pooled=resolution == 1
            and grid is not None
            and len(grid) == 1
            and any(source.resolution > 1 for source in read),
        )
        neurons.add(layer.shape[0], layer=layer.index)
        self.layers.append(layer)
        return layer

    def _read_shift(self, by_element: type[Shift], given: dict) -> Shift | None:
        """The parameter that a sum or product combines with activations of as many neurons, if it is such a one."""
        for summand, other in (("input", "other"), ("other", "input")):
            numbers, part = self.follower.numbers(given[summand]), self.follower.part(given[other])
            if numbers is None or part is None or given.keys() - {"input", "other"}:
                continue
            if part.name in self.buffers:  # masks, and places that are not learned
                continue
            known = (shift for shift in self.shifts if shift.part == part and type(shift) is by_element)
            shift = next(known, None)
            lies = where_it_lies(given[other], numbers) if shift is None else None
            if lies is not None:
                axis, codes, places = lies
                neurons = self.follower.neurons.numbers(codes)
                shift = by_element(part.name, part, neurons, axis, places, tuple(given[other].shape))
                self.shifts.append(shift)
            return shift
        return None

    def _read_norm(self, kind: Kind, function: Callable, given: dict, numbers: Numbers, result: Tensor) -> Norm:
        tensors = {name: given[name] for name in (*STATISTICS, "weight", "bias") if given.get(name) is not None}
        parts = {name: self.follower.part(tensor) for name, tensor in tensors.items()}
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
            neurons = self.follower.neurons.numbers(codes)
            norm = Norm(name, function, settings, parts, neurons, axis, places, kind.by_inputs, numbers.sources)
            self.norms.append(norm)
        elif (norm.function, norm.settings) != (function, settings):
            raise Refused(f"{name_of(function)} takes {norm.name} again, in another way, not supported{place_of()}")
        norm.sources |= numbers.sources
        for source in numbers.sources - {-1}:
            self.layers[source].normalised = True
        self.follower.number(result, numbers)
        return norm

    def finish(self, output, name: str) -> None:
        """Find the layer whose outputs are the classes in what the module, of this `name`, returns."""
        logits = logits_of(output)
        if logits is None:
            raise Refused(f"{name} returns a {type(output).__name__}, not logits [N, classes]")
        if logits.dim() != 2 or len(logits) != 2:
            raise Refused(f"{name}: the output has shape {[*logits.shape[1:]]} per image; it must be [classes]")
        if logits.shape[1] < 2:
            raise Refused(f"{name}: has one class, but telling classes apart takes two")
        numbers = self.follower.numbers(logits)
        if numbers is None:
            raise Refused(f"{name}: its output cannot be followed back to the images")
        found = self.follower.neurons.numbers(numbers.codes[0])
        for layer in self.layers:
            if torch.equal(found, torch.arange(layer.first_neuron, layer.first_neuron + layer.shape[0])):
                layer.last, self.last = True, layer
        if self.last is None:
            raise Refused(f"{name}: the output must be that of one layer, the classes, averaged and scaled at most")
        for call in (*self.norms, *self.shifts):
            call.of_last = bool(torch.isin(call.channels, found).any())
        # Layers on side ways, such as those that say where an image is looked at, are left as they are.
        reached = reaching(self.last, self.layers)
        for layer in self.layers:
            layer.readers = [reader for reader in layer.readers if reader.index in reached]
        self.layers = [layer for layer in self.layers if layer.index in reached]
        self.norms = [norm for norm in self.norms if norm.sources & reached]
        kept = {id(call) for call in (*self.layers, *self.norms, *self.shifts)}
        self.calls = [(function, found if id(found) in kept else None) for function, found in self.calls]


def noise(count: int) -> Tensor:
    """So many images of noise, [count, 1, 28, 28], always the same."""
    shape = (count, 1, IMAGE_SIDE, IMAGE_SIDE)
    return torch.randn(shape, dtype=torch.float32, generator=torch.Generator().manual_seed(0))


def per_side(option: int | str | Sequence[int], sides: int) -> str | tuple[int, ...]:
    """An option of a convolution as one number for each of so many sides, or its name."""
    if isinstance(option, str):
        return option
    numbers = (option,) if isinstance(option, int) else tuple(option)
    return numbers * sides if len(numbers) == 1 else numbers


def image_numbers(images: Tensor, codes: Tensor) -> Numbers:
    """The numbers of two images, in whatever format, whose channels have these `codes`."""
    shape = (2, len(codes), IMAGE_SIDE, IMAGE_SIDE)
    y, x = torch.meshgrid(2 * [middles(IMAGE_SIDE)], indexing="ij")
    codes, y, x = (tensor.expand(shape).reshape(images.shape) for tensor in (codes[:, None, None], y, x))
    return Numbers(codes, y, x, 0, frozenset([-1]))


def reaching(last: Layer, layers: list[Layer]) -> set[int]:
    """The indices of the layers whose outputs reach the layer `last`, itself among them, and -1 for the images."""
    reached, ahead = {-1}, {last.index}
    while ahead:
        index = ahead.pop()
        reached.add(index)
        ahead |= layers[index].sources - reached
    return reached


def values_at_points(function: Callable, args: tuple, kwargs: dict) -> tuple[float, ...] | None:
    """The values at ACTIVATION_POINTS of a function of one tensor; None unless it is one of single elements."""
    points = torch.tensor(ACTIVATION_POINTS)
    leaves, spec = tree_flatten((args, kwargs))
    new_args, new_kwargs = tree_unflatten([points.clone() if isinstance(v, Tensor) else v for v in leaves], spec)
    try:
        values = function(*new_args, **new_kwargs)
    except Exception:  # of a single row of points a function may think whatever it likes
        return None
    is_one = isinstance(values, Tensor) and values.shape == points.shape and not torch.equal(values, points)
    return tuple(values.tolist()) if is_one else None


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
    """A forward pass that computes as in evaluation, layer by layer, and leaves the module's modes, and PyTorch's state
    of random numbers, as they are. What the module draws is the same every time."""
    modes = [(part, part.training) for part in module.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused transformer layer would hide its parts
    try:
        module.eval()
        with torch.random.fork_rng(devices=[]), uncompiled():
            torch.default_generator.manual_seed(0)
            yield
    finally:
        for part, training in modes:
            part.training = training
        torch.backends.mha.set_fastpath_enabled(fast)


def uncompiled() -> contextlib.AbstractContextManager:
    """What `torch.compile` has wrapped runs as it was written: its compiler would trace what sees the calls."""
    loaded = "torch._dynamo" in sys.modules  # which takes seconds
    return torch.compiler.set_stance("force_eager") if loaded else contextlib.nullcontext()


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
