"""What a forward pass shows of a module: its layers, norms, gains and shifts, and which neurons each reads."""

import math
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
    SUM,
    CallMode,
    Gain,
    Gate,
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
        self.vectors: dict[
            int, Tensor
        ] = {}  # what layers gave of each image, in the mean over places, by their indices
        self.largest: dict[int, Tensor] = {}  # likewise, the maximum over places
        self.norms: list[Norm] = []
        self.shifts: list[Shift] = []
        self.givers: dict[int, Layer] = {}  # which layer gave a tensor, by its id
        self.biases: list[tuple[Shift, Layer]] = []  # what may be the bias of a layer that has none
        self.gates: list[tuple[Tensor, float]] = []  # the numbers of neurons that others are multiplied by, the offset

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
        rows = len(inputs) if kind.is_convolution else math.prod(inputs.shape[:-1])
        if inputs.dim() < (own.dim() if kind.is_convolution else 2) or rows % 2:
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
        self.givers[id(result)] = layer
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
        if len(result) == 2:
            places = result.movedim(kind.axis, -1).reshape(2, -1, layer.shape[0])
            self.vectors[layer.index], self.largest[layer.index] = places.mean(1), places.amax(1)
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
            layer = self.givers.get(id(activations))
            if by_element is Shift and places is None and layer is not None and layer.bias is None:
                # What it gave may have been changed in place.
                curves, others = [*self.curves.of(activations).values()], (other.channels for other in self.shifts)
                as_given = len(curves) == 1 and curves[0] is not None and torch.equal(curves[0], identity())
                shifted = any(torch.isin(channels, neurons).any() for channels in others)
                if as_given and not shifted and torch.equal(neurons, layer.neurons):
                    self.biases.append((shift, layer))
            self.shifts.append(shift)
        if shift is not None:
            shift.sources |= numbers.sources
        return shift

    def note_gate(self, factors: tuple[Tensor, Tensor]) -> None:
        """Of two activations that are multiplied by each other one may be a gate: what is not 0 where the layer behind
        it gives 0, as of a sigmoid, or else what is linear. Of both, it is the smaller one. Of an outer product, as of
        clusters and channels, none is."""
        codes = [self.follower.numbers(factor).codes for factor in factors]
        neurons, curves = [], []
        for own, factor in zip(codes, factors, strict=True):
            found = self.follower.neurons.numbers(own.unique())
            neurons.append(torch.zeros(0) if found is None else found[found > 0])
            curves.append(list(self.curves.of(factor).values()))
        if not all(map(len, [*neurons, *curves])) or torch.isin(*neurons).any():
            return
        if self.follower.neurons.lie_across(*torch.broadcast_tensors(*codes)):
            return
        passing = [any(curve is None or curve[len(curve) // 2].abs() > 0.1 for curve in known) for known in curves]
        linear = [all(curve is not None and torch.equal(curve, identity()) for curve in known) for known in curves]
        for offset, kinds in ((0.0, passing), (1.0, linear)):
            chosen = [place for place, holds in enumerate(kinds) if holds]
            if chosen:
                self.gates.append((neurons[min(chosen, key=lambda place: factors[place].numel())], offset))
                return

    def keep_gates(self) -> None:
        """Let layers and norms, but for those of the classes, know of their neurons that are gates."""
        for numbers, offset in self.gates:
            for call in (*self.layers, *self.norms):
                own = torch.isin(call.neurons if isinstance(call, Layer) else call.channels, numbers)
                if own.any() and not (call.last if isinstance(call, Layer) else call.of_last):
                    call.gate = Gate(own, offset)

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
        of_what = [part.frozen for part in affine] or [self.layers[one].weight.frozen for one in numbers.sources - {-1}]
        frozen = bool(of_what) and all(of_what)  # then so are its statistics
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

    def heads(self, logits: Tensor, neurons: Tensor, sources: frozenset[int], name: str) -> list[Layer]:
        """The layers that the `logits` of a module of this `name` are the mean of, each divided by its `share`.

        That is one, if they are of its neurons, or all `sources`, if they are a sum of what these give. There are none
        if they are neither, or if one reads another: of what this is held out, it would have seen.
        """
        for layer in self.layers:
            if torch.equal(layer.neurons, neurons):
                own, largest = self.vectors.get(layer.index), self.largest.get(layer.index)
                if largest is not None and says_the_same(logits, largest) and not says_the_same(logits, own):
                    raise Refused(f"{name}: the classes are a maximum over places of {layer.name}: take their mean")
                layer.share = -1.0 if own is not None and fall(own, logits) else 1.0
                return [layer]
        heads = [self.layers[index] for index in sorted(sources - {-1})]
        read = reaching(set().union(*(head.sources for head in heads)) - {-1}, self.layers)
        vectors = [self.vectors.get(head.index) for head in heads if head.index not in read]
        if not heads or len(vectors) < len(heads) or any(v is None or v.shape != logits.shape for v in vectors):
            return []
        factors = factors_of(logits, torch.stack(vectors))
        for head, factor in zip(heads, factors, strict=False):
            head.share = 1 / (len(heads) * factor)
        return heads[: len(factors)]

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
        self.unfollowed: str | None = None  # the first call of a parameter and what is not known of the inputs
        self.steps: list[Step] = []
        self.heads: list[Layer] = []

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
        elif numbers is None and weight is not None and follower.parameter(weight) and self.unfollowed is None:
            self.unfollowed = f"{name_of(function)}{place_of()}"
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
            factors = tuple(map(given.get, kind.arguments))
            if kind.by_element is Gain and all(map(self.follower.numbers, factors)):
                self.inventory.note_gate(factors)
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

    def make_bias(self, shift: Shift, layer: Layer) -> None:
        """Let a layer have a parameter that is added to what it gives, as `x @ w + b`, as its bias, if both are used
        once and kept: what is added is then left out."""
        uses = [[place for place, step in enumerate(self.steps) if step.found is call] for call in (layer, shift)]
        if [len(places) for places in uses] != [1, 1] or all(layer is not kept for kept in self.inventory.layers):
            return
        layer.bias = shift.part.moved(self.follower.parameters[shift.name], torch.arange(layer.shape[0]))
        self.inventory.shifts = [other for other in self.inventory.shifts if other is not shift]
        (place,) = uses[1]
        step = self.steps[place]
        self.steps[place] = Step(step.function, None, rewritten=partial(as_they_are, SUM, step.activations))

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
            read = (
                f": what {self.unfollowed} takes is of NumPy, or of compiled code"
                if self.unfollowed and not made
                else ""
            )
            raise Refused(
                f"{name}: its output{made and f', of {made},'} cannot be followed back to what it is given{read}"
            )
        inventory = self.inventory
        found = self.follower.neurons.numbers(numbers.codes[0])
        self.heads = inventory.heads(logits, found, numbers.sources, name)
        if not self.heads:
            made = self.makers.get(id(logits), "")
            raise Refused(
                f"{name}: the output must be that of one layer, the classes, averaged and scaled at most, or a sum of "
                f"such that do not read each other{made and f'; it is of {made}'}"
            )
        for head in self.heads:
            if head.groups > 1:
                raise Refused(f"{name}: the classes are of {head.name}, which reads its channels in groups")
            head.last = True
        classes = torch.cat([found[found > 0], *(head.neurons for head in self.heads)])
        inventory.note_activations(inventory.curves.of(logits))
        for call in (*inventory.norms, *inventory.shifts):
            call.of_last = bool(torch.isin(call.channels, classes).any())
        inventory.keep_what_reaches(self.heads)
        inventory.keep_gates()
        for shift, layer in inventory.biases:
            self.make_bias(shift, layer)
        kept = {id(call) for call in inventory.all}
        self.steps = [step if id(step.found) in kept else step._replace(found=None) for step in self.steps]


def as_they_are(kind: Kind, name: str, args: tuple, kwargs: dict) -> Tensor:
    """The argument of this name of a call that is left out."""
    return kind.bind(args, kwargs)[name]


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
    """Whether an output is these logits, or their log-softmax, in whatever precision."""
    output, logits = output.float(), logits.float()
    return any(
        output.shape == each.shape and torch.allclose(output, each, rtol=1e-4, atol=1e-6)
        for each in (logits, logits.log_softmax(-1))
    )


def fall(logits: Tensor, outputs: Tensor) -> bool:
    """Whether outputs [n, classes] are the larger, the smaller these logits: as of a softmin, or what is negated."""
    falling = torch.equal(outputs.argsort(1), logits.argsort(1, descending=True))
    return falling and not torch.equal(outputs.argsort(1), logits.argsort(1))


def factors_of(logits: Tensor, vectors: Tensor) -> list[float]:
    """What each of the vectors [heads, n, classes] is multiplied by in their sum, the logits [n, classes], with a
    log-softmax after it or without; none if they are no such sum."""
    count = len(vectors)
    tried = [[1.0] * count, [1 / count] * count]
    # A log-softmax takes a number off all classes of an image. More numbers than unknown ones: else anything is a sum.
    if logits.numel() > count + len(logits) and logits.isfinite().all():
        columns = torch.cat([vectors.flatten(1).T, torch.eye(len(logits)).repeat_interleave(logits.shape[1], 0)], 1)
        tried.append(torch.linalg.lstsq(columns.double(), logits.double().view(-1, 1)).solution[:count, 0].tolist())
    for factors in tried:
        if min(map(abs, factors)) > 1e-3 and says_the_same(
            logits, (torch.tensor(factors).view(-1, 1, 1) * vectors).sum(0)
        ):
            return factors
    return []


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
