"""What a forward pass shows of a module: its layers, norms, gains and shifts, and which neurons each reads."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from universal.reading import products
from universal.reading.calls import (
    CONTRACTIONS,
    DEFAULTS,
    EMBEDDINGS,
    GEOMETRY,
    REFUSED,
    STATISTICS,
    CallMode,
    Kind,
    Layer,
    Norm,
    Operation,
    Part,
    Shift,
    is_float,
    name_of,
)
from universal.reading.curves import ByLayer, Curves, identity
from universal.reading.following import Follower, Numbers
from universal.reading.geometry import (
    find_windows,
    middles,
    per_side,
    read_channels,
    read_features,
    side_of,
    where_it_lies,
)
from universal.reading.inputs import InputFormat
from universal.reading.refusals import Refused, place_of


class Step(NamedTuple):
    """A call of one of KINDS, and what it was found to be."""

    function: Callable
    found: Operation | None  # None where it has no weights to be written
    activations: str = "input"  # which of its arguments these are
    rewritten: Callable | None = None  # what computes the same from its arguments, by calls that are read themselves


class Inventory:
    """What has weights to be written in a forward pass, found call by call: its layers, norms, shifts and gains."""

    def __init__(self, follower: Follower):
        self.follower, self.curves = follower, Curves()
        self.layers: list[Layer] = []
        self.vectors: dict[int, Tensor] = {}  # what layers gave that give one of each image, by their indices
        self.norms: list[Norm] = []
        self.shifts: list[Shift] = []

    def note_activations(self, curves: ByLayer) -> None:
        """Layers are followed by functions of these curves. Of several ways on, the first counts that is a function."""
        for layer, curve in curves.items():
            if curve is not None and self.layers[layer].activation is None and not torch.equal(curve, identity()):
                self.layers[layer].activation = tuple(curve.float().tolist())

    def layer(self, kind: Kind, function: Callable, given: dict, result: Tensor) -> Layer:
        """The layer that a call is, which gave this `result`; raises Refused if its weight is used in another way."""
        numbers = self.follower.numbers(given["input"])
        weight, bias = (self.follower.parameter(given.get(name)) for name in ("weight", "bias"))
        inputs, own = given["input"], given["weight"]
        if inputs.dim() < (own.dim() if kind.is_convolution else 2):
            raise Refused(f"{name_of(function)} of one input of the batch at a time is not supported{place_of()}")
        if not inputs.numel():
            raise Refused(f"{name_of(function)} of a choice of inputs, here of none, is not supported{place_of()}")
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
        elif (layer.weight, layer.bias) != (weight, bias) or (kind.is_convolution and layer.options != options):
            raise Refused(
                f"{name_of(function)} takes {weight.name} again, in another way, which is not supported{place_of()}"
            )
        layer.sources |= numbers.sources
        self.note_activations(self.curves.of(given["input"]))
        self.curves.set(result, {layer.index: identity()})
        for source in numbers.sources - {-1}:
            if all(layer is not reader for reader in self.layers[source].readers):
                self.layers[source].readers.append(layer)
        self._number(kind, layer, numbers, result)
        return layer

    def _number(self, kind: Kind, layer: Layer, read: Numbers, result: Tensor) -> None:
        """What comes out is of the layer's neurons, at the places where it `read`."""
        axis = kind.axis % result.dim()
        shape = [-1 if place == axis else 1 for place in range(result.dim())]
        codes = self.follower.neurons.codes[layer.first_neuron : layer.first_neuron + layer.shape[0]].view(shape)
        if kind.is_convolution:
            sides = [1] * (4 - result.dim()) + list(result.shape[2:])
            y, x = torch.meshgrid(*map(middles, sides), indexing="ij")
            y, x = (place.reshape(result.shape[2:]) for place in (y, x))
        else:
            y, x = (place.mean(-1, keepdim=True) for place in (read.y, read.x))
        expanded = [tensor.expand(result.shape) for tensor in (codes, y, x)]
        self.follower.number(result, Numbers(*expanded, read.depth + 1, frozenset([layer.index])))

    def _new_layer(
        self, kind: Kind, given: dict, options: dict, numbers: Numbers, result: Tensor, weight: Part, bias: Part | None
    ) -> Layer:
        neurons, shape = self.follower.neurons, tuple(given["weight"].shape)
        if kind.is_convolution:
            channels, places, grid, order = read_channels(numbers)
            window, side, resolution = shape[2:], side_of(given["input"].shape[2:]), side_of(result.shape[2:])
        else:
            channels, places, grid, order = read_features(numbers)
            window, side = None, 1
            resolution = max(1, result.numel() // result.shape[-1] // 2)  # tokens of each of two images
            windows = find_windows(numbers, order, len(grid))
            if windows is not None:
                window, order, side, resolution = windows.sides, windows.order, windows.map_side, windows.across
                options = {"stride": windows.stride}
        from_maps = any(self.layers[source].resolution > 1 for source in numbers.sources - {-1})
        pooled = from_maps and resolution == 1 and grid is not None and len(grid) == 1
        layer = Layer(
            name=weight.name.removesuffix(".weight"), weight=weight, bias=bias, options=options,
            shape=shape[::-1] if kind.transposed else shape, channels=neurons.numbers(channels), places=places,
            grid=grid, order=order, depth=numbers.depth, sources=numbers.sources, window=window, resolution=resolution,
            side=side, index=len(self.layers), first_neuron=len(neurons.codes), pooled=pooled,
        )  # fmt: skip
        neurons.add(layer.shape[0], layer=layer.index)
        self.layers.append(layer)
        if result.dim() == 2:
            self.vectors[layer.index] = result.clone()  # which may be changed in place
        return layer

    def shift(self, by_element: type[Shift], parameter: Tensor, activations: Tensor) -> Shift | None:
        """The shift or gain by a parameter of activations of as many neurons, if it is such a one."""
        part = self.follower.parameter(parameter)
        of_inputs = part.index is not None and parameter.dim() == activations.dim() and len(parameter) > 1
        if of_inputs and (part.index == part.index[:1]).all():
            # The same for every input of the batch: expanded, or repeated.
            parameter, part = parameter[:1], replace(part, index=part.index[:1])
        shift = next((shift for shift in self.shifts if shift.part == part and type(shift) is by_element), None)
        numbers = self.follower.numbers(activations)
        lies = where_it_lies(parameter, numbers) if shift is None else None
        if lies is not None:
            axis, codes, places = lies
            neurons = self.follower.neurons.numbers(codes)
            shift = by_element(part.name, part, neurons, axis, places, tuple(parameter.shape), numbers.sources)
            self.shifts.append(shift)
        if shift is not None:
            shift.sources |= numbers.sources
        return shift

    def norm(self, kind: Kind, function: Callable, given: dict, result: Tensor) -> Norm | None:
        """The norm that a call is, which gave this `result`; None if what it takes is not to be written."""
        numbers = self.follower.numbers(given["input"])
        if given.get(kind.by_inputs, kind.by_inputs == "use_input_stats"):
            given = given | dict.fromkeys(STATISTICS)  # it is told to take those of the inputs
        tensors = {name: given[name] for name in (*STATISTICS, "weight", "bias") if given.get(name) is not None}
        parts = {name: self.follower.part(tensor) for name, tensor in tensors.items()}
        if None in parts.values():
            return None
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
        self.note_activations(self.curves.of(given["input"]))
        self.curves.set(result, {source: identity() for source in numbers.sources - {-1}})
        for source in numbers.sources - {-1}:
            self.layers[source].normalised = True
        self.follower.number(result, numbers)
        return norm

    def heads(self, logits: Tensor, neurons: Tensor, sources: frozenset[int]) -> tuple[list[Layer], float]:
        """The layers that the `logits` are the mean of, each multiplied by what comes second.

        That is one, if they are of its neurons, or all `sources`, if they are the sum or the mean of what these give.
        There are none if they are neither, or if one reads another: of what this is held out, it would have seen.
        """
        for layer in self.layers:
            if torch.equal(layer.neurons, neurons):
                return [layer], 1.0
        heads = [self.layers[index] for index in sorted(sources - {-1})]
        read = reaching(set().union(*(head.sources for head in heads)) - {-1}, self.layers)
        if heads and not any(head.index in read or head.index not in self.vectors for head in heads):
            total, count = sum(self.vectors[head.index] for head in heads), len(heads)
            for share in (1 / count, 1.0):
                if says_the_same(logits, total / (count * share)):
                    return heads, share
        return [], 1.0

    def keep_what_reaches(self, heads: list[Layer]) -> None:
        """Leave out layers on side ways, such as those that say where an image is looked at: they stay as they are."""
        reached = reaching([head.index for head in heads], self.layers)
        for layer in self.layers:
            layer.readers = [reader for reader in layer.readers if reader.index in reached]
        self.layers = [layer for layer in self.layers if layer.index in reached]
        self.norms = [norm for norm in self.norms if norm.sources & reached]
        self.shifts = [shift for shift in self.shifts if shift.sources & reached]

    @property
    def all(self) -> list[Operation]:
        return [*self.layers, *self.norms, *self.shifts]


class Reading(CallMode):
    """A forward pass that is read: its `steps`, and in the `inventory` what has weights to be written."""

    def __init__(self):
        super().__init__()
        self.makers: dict[int, str] = {}  # by the id of a tensor: the last call of activations it is of, and its line
        self.alive: list[Tensor] = []
        self.steps: list[Step] = []
        self.heads: list[Layer] = []
        self.share = 1.0  # what each is multiplied by, so that the classes are their mean

    def start(
        self, inputs: Tensor, format: InputFormat, axes: str, parameters: dict[str, Tensor],
        originals: dict[str, Tensor], buffers: set[str],
    ) -> None:  # fmt: skip
        """Follow `inputs` of this format, whose axes are `axes`, through a pass with these `parameters`, copies of the
        `originals`, some of them `buffers`."""
        self.follower = Follower(parameters, originals, buffers)
        self.inventory = Inventory(self.follower)
        self.channels = format.size("C", axes)
        self.follower.number(inputs, format.numbers(inputs, axes, self.follower.neurons.add(self.channels)))

    @property
    def tells_channels_apart(self) -> bool:
        """Whether what each layer reads of the inputs is a channel of them, not a mixture or a part of one."""
        readers = [layer for layer in self.inventory.layers if -1 in layer.sources]
        return all(layer.places is None and layer.channels.shape[1] == 1 for layer in readers)

    def follow(self, function: Callable, args: tuple, kwargs: dict, result) -> None:
        """Follow a call without weights of its own, or with weights that are left as they are."""
        follower, assigns = self.follower, function is Tensor.__setitem__
        result = args[0] if assigns else result
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not outputs:
            return
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name_of(function) in REFUSED and any(follower.numbers(leaf) for leaf in leaves):
            raise Refused(f"{name_of(function)} is not supported{place_of()}")
        if function in GEOMETRY:
            return
        if function in EMBEDDINGS and any(follower.is_of_values(leaf) for leaf in leaves):
            raise Refused(f"{name_of(function)} of values is not supported{place_of()}")
        if assigns:
            follower.assign(*args)
        moves = assigns or follower.follow(function, args, kwargs, result)
        made = next(
            (self.makers[id(leaf)] for leaf in leaves if id(leaf) in self.makers), None
        )  # of what is not followed
        if any(follower.numbers(leaf) for leaf in leaves):
            made = f"{name_of(function)}{place_of()}"
        if made is not None:
            self.makers |= dict.fromkeys(map(id, outputs), made)
            self.alive += outputs  # so that no id comes again
        carries = moves or function in CONTRACTIONS  # which are linear in each of their operands
        ended = self.inventory.curves.follow(function, args, kwargs, outputs, carries, follower.numbers)
        self.inventory.note_activations(ended)

    def call(self, kind: Kind, function: Callable, args: tuple, kwargs: dict):
        """Read a call that may be a layer, a norm, a shift or a gain, and compute it."""
        if kind.by_element:
            return self._call_by_element(kind, function, args, kwargs)
        product = kind.product and kind.product(*args, **kwargs)
        weight_at = product and self._weight_of(kind, product)
        follower, given = self.follower, kind.bind(args, kwargs)
        numbers, weight, bias = follower.numbers(given.get("input")), given.get("weight"), given.get("bias")
        rewritten = None
        if weight_at is not None:
            rewritten = partial(product_by_layers, kind, weight_at)
        elif not kind.is_norm and follower.parameter(weight) and bias is not None and not follower.parameter(bias):
            rewritten = partial(bias_apart, kind, function)
        if rewritten is not None:
            self.steps.append(Step(function, None, rewritten=rewritten))
            return self.within(rewritten, args, kwargs)
        result = function(*args, **kwargs)
        found = None
        if numbers is not None and kind.is_norm:
            found = self.inventory.norm(kind, function, given, result)
        elif numbers is not None and follower.parameter(weight) and (kind.is_convolution or weight.dim() == 2):
            found = self.inventory.layer(kind, function, given, result)
        self.steps.append(Step(function, found))
        if found is None:
            self.follow(function, args, kwargs, result)
            if numbers is not None and weight is not None and not kind.is_norm:
                self._number_unwritten(kind, function, weight, result)
        return result

    def _weight_of(self, kind: Kind, product: products.Product) -> int | None:
        """Which of the operands of a product is a weight that is to be written, if it is one of linear layers."""
        for place, (weight, other) in enumerate((product.operands, product.operands[::-1])):
            can_be = self.follower.parameter(weight) is not None and self.follower.numbers(other) is not None
            is_plain = kind.transposed and place == 1 and weight.dim() == 2  # a layer as it is
            if can_be and (index := self.follower.parameter(weight).index) is not None:
                can_be = len(index) == 1 or not (index == index[:1]).all()  # not repeated for every input of the batch
            if can_be and not is_plain and products.axes_of(product, place) is not None:
                return place
        return None

    def _number_unwritten(self, kind: Kind, function: Callable, weight: Tensor, result: Tensor) -> None:
        """Number what a layer gives out whose weight is no parameter to be written: as neurons that nobody knows."""
        follower = self.follower
        numbers = follower.numbers(result)
        if numbers is None or follower.numbers(weight) is not None:
            return
        computed = follower.computed_from(weight)
        if computed is not None:
            self.makers[id(result)] = f"{name_of(function)}, whose weight is computed from {computed}{place_of()}"
        if not numbers.codes.any():
            axis = kind.axis % result.dim()
            codes = follower.neurons.add(result.shape[axis])
            codes = codes.view([-1 if place == axis else 1 for place in range(result.dim())])
            follower.number(result, numbers._replace(codes=codes.expand(result.shape), depth=numbers.depth + 1))

    def _call_by_element(self, kind: Kind, function: Callable, args: tuple, kwargs: dict):
        """Read a sum or a product, and compute it."""
        given = kind.bind(args, kwargs)
        name = self._activations_beside(kind, given)
        shift = None
        if name is not None:
            activations, parameter = given[name], given["other" if name == "input" else "input"]
            shift = self.inventory.shift(kind.by_element, parameter, activations)
        self.steps.append(Step(function, shift, name or "input"))
        if shift is None:
            result = function(*args, **kwargs)
            self.follow(function, args, kwargs, result)
            return result
        numbers, curves = self.follower.numbers(activations), self.inventory.curves.of(activations)
        result = function(*args, **kwargs)  # which may be the activations themselves, changed
        self.follower.number(result, numbers)
        self.inventory.curves.set(result, curves)
        return result

    def _activations_beside(self, kind: Kind, given: dict) -> str | None:
        """Which argument of a sum or product are activations, if the other is a parameter."""
        for name, other in (("input", "other"), ("other", "input")):
            activations = given.get(name)
            if (
                is_float(activations)
                and self.follower.numbers(activations)
                and self.follower.parameter(given.get(other))
            ):
                return name if given.keys() == {"input", "other"} and (kind.commutes or name == "input") else None
        return None

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
            made = self.makers.get(id(logits), "")
            raise Refused(f"{name}: its output{made and f', of {made},'} cannot be followed back to what it is given")
        inventory = self.inventory
        found = self.follower.neurons.numbers(numbers.codes[0])
        self.heads, self.share = inventory.heads(logits, found, numbers.sources)
        if not self.heads:
            made = self.makers.get(id(logits), "")
            raise Refused(
                f"{name}: the output must be that of one layer, the classes, averaged and scaled at most, or a sum of "
                f"such that do not read each other{made and f'; it is of {made}'}"
            )
        only = inventory.vectors.get(self.heads[0].index) if len(self.heads) == 1 else None
        if only is not None and fall(only, logits):
            self.share = -self.share
        for head in self.heads:
            if head.groups > 1:
                raise Refused(f"{name}: the classes are of {head.name}, which reads its channels in groups")
            head.last = True
        classes = torch.cat([found[found > 0], *(head.neurons for head in self.heads)])
        inventory.note_activations(inventory.curves.of(logits))
        for call in (*inventory.norms, *inventory.shifts):
            call.of_last = bool(torch.isin(call.channels, classes).any())
        inventory.keep_what_reaches(self.heads)
        kept = {id(call) for call in inventory.all}
        self.steps = [step if id(step.found) in kept else step._replace(found=None) for step in self.steps]


def product_by_layers(kind: Kind, weight_at: int, args: tuple, kwargs: dict) -> Tensor:
    """A product of two tensors, by linear layers whose weights are of the operand `weight_at`."""
    return products.as_layers(kind.product(*args, **kwargs), weight_at)


def bias_apart(kind: Kind, function: Callable, args: tuple, kwargs: dict) -> Tensor:
    """A layer without its bias, which is no parameter, and then the bias."""
    given = kind.bind(args, kwargs)
    bias = given.pop("bias")
    outputs = given["input"] @ given["weight"] if kind.transposed else function(**given)
    return outputs + (bias if kind.axis == -1 else bias.view(-1, *[1] * (outputs.dim() - 2)))


def says_the_same(output: Tensor, logits: Tensor) -> bool:
    """Whether an output is these logits, or their log-softmax."""
    return any(
        output.shape == each.shape and torch.allclose(output, each, rtol=1e-4, atol=1e-6)
        for each in (logits, logits.log_softmax(-1))
    )


def fall(logits: Tensor, outputs: Tensor) -> bool:
    """Whether outputs [n, classes] are the larger, the smaller these logits: as of a softmin, or what is negated."""
    falling = torch.equal(outputs.argsort(1), logits.argsort(1, descending=True))
    return falling and not torch.equal(outputs.argsort(1), logits.argsort(1))


def reaching(ends: Iterable[int], layers: list[Layer]) -> set[int]:
    """The indices of the layers whose outputs reach those of these indices, themselves among them, and -1 for the
    images."""
    reached, ahead = {-1}, set(ends)
    while ahead:
        index = ahead.pop()
        reached.add(index)
        ahead |= layers[index].sources - reached
    return reached


def logits_of(output) -> Tensor | None:
    """The logits among what a network returns: the output itself, or its `logits`, if they are a tensor."""
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", output)
    return logits if isinstance(logits, Tensor) else None
