"""What a forward pass shows of a module: its layers, norms, gains and shifts, and which neurons each reads."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from universal.reading.calls import (
    ACTIVATION_POINTS,
    DEFAULTS,
    EMBEDDINGS,
    GEOMETRY,
    REFUSED,
    STATISTICS,
    Call,
    Kind,
    Layer,
    Norm,
    Part,
    Shift,
    name_of,
)
from universal.reading.following import Follower, Numbers
from universal.reading.geometry import middles, per_side, read_channels, read_features, side_of, where_it_lies
from universal.reading.inputs import InputFormat
from universal.reading.refusals import Refused, place_of


class Reading:
    """What a forward pass has shown so far: its `calls` of KINDS in order, with the layers, norms and shifts found."""

    def __init__(self):
        self.layers: list[Layer] = []
        self.norms: list[Norm] = []
        self.shifts: list[Shift] = []
        self.calls: list[tuple[Callable, Call | None]] = []
        self.last: Layer | None = None

    def start(
        self, inputs: Tensor, format: InputFormat, axes: str, parameters: dict[str, Tensor],
        originals: dict[str, Tensor], buffers: set[str],
    ) -> None:  # fmt: skip
        """Follow `inputs` of this format, whose axes are `axes`, through a pass with these `parameters`, copies of the
        `originals`, some of them `buffers`."""
        self.buffers = buffers
        self.follower = Follower(parameters, originals)
        self.channels = format.size("C", axes)
        self.follower.number(inputs, format.numbers(inputs, axes, self.follower.neurons.add(self.channels)))

    @property
    def tells_channels_apart(self) -> bool:
        """Whether what each layer reads of the inputs is a channel of them, not a mixture or a part of one."""
        readers = [layer for layer in self.layers if -1 in layer.sources]
        return all(layer.places is None and layer.channels.shape[1] == 1 for layer in readers)

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
            side, resolution = side_of(given["input"].shape[2:]), side_of(result.shape[2:])
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
        affine = [parts[name] for name in ("weight", "bias") if name in parts]
        frozen = bool(affine) and all(part.frozen for part in affine)  # then so are its statistics
        parts |= {name: replace(parts[name], frozen=frozen) for name in STATISTICS if name in parts}
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


def logits_of(output) -> Tensor | None:
    """The logits among what a network returns: the output itself, or its `logits`, if they are a tensor."""
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", output)
    return logits if isinstance(logits, Tensor) else None
