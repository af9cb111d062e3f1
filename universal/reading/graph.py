"""Any module as a graph of layers: its own forward pass tells which there are, which neurons each reads, what follows.

Design document, section 4.1.1. Nobody describes an architecture by hand, and nothing is re-enacted: the module runs as
its author wrote it, under a mode that sees every call of a torch function (`calls.py`). What takes weights is a
layer, a norm, a shift or a gain; what else runs, known or unknown, is followed (`following.py`). A second run of
the same kind, on the probes of a generator, writes each layer inside its own call, from the activations that reach it,
which are already those of the written layers before it.
"""

import contextlib
import itertools
import math
import sys
import threading
from collections import ChainMap
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from scripting import in_short
from universal.mnist import IMAGE_FORMATS, noise
from universal.reading.calls import IN_PLACE, CallMode, Kind, Layer, Operation, Part, is_float
from universal.reading.inputs import InputFormat, format_of, two_of
from universal.reading.reading import Reading, logits_of
from universal.reading.refusals import Refused, place_of


class Reached(Exception):
    """Ends a forward pass at the layer that is looked at, with what reaches it."""

    def __init__(self, inputs: Tensor):
        self.inputs = inputs


class Replay(CallMode):
    """A forward pass of a graph's module, with these `weights`, that goes the way that was read: each operation by
    `compute(operation, inputs)`, on activations of the precision `dtype`."""

    def __init__(self, graph: "ComputationGraph", weights: dict[str, Tensor], dtype: torch.dtype, compute: Callable):
        super().__init__()
        self.name, self.steps, self.dtype, self.compute = type(graph.module).__name__, iter(graph.steps), dtype, compute
        self.names = {id(tensor): name for name, tensor in weights.items()}

    def another_way(self) -> ValueError:
        return ValueError(f"{self.name}: its forward pass goes another way every time")

    def call(self, kind: Kind, function: Callable, args: tuple, kwargs: dict):
        step = next(self.steps, None)
        if step is None or step.function is not function:
            raise self.another_way()
        if step.rewritten is not None:
            return self.within(step.rewritten, args, kwargs)
        if step.found is None:
            return function(*args, **kwargs)
        given, found = kind.bind(args, kwargs), step.found
        is_layer = isinstance(found, Layer)
        if is_layer and self.names.get(id(given["weight"]), found.weight.name) != found.weight.name:
            raise self.another_way()
        parts = {"weight": found.weight} if is_layer else getattr(found, "parameters", {})
        if any(part.index is not None and part.index.numel() != given[name].numel() for name, part in parts.items()):
            raise self.another_way()  # repeated for every input of the batch
        inputs = given[step.activations]
        outputs = self.compute(found, inputs.to(self.dtype)).to(inputs.dtype)
        return given["input"].copy_(outputs) if function in IN_PLACE else outputs


class ComputationGraph:
    """The layers and norms of a module that classifies inputs as logits [N, classes].

    `example` is a batch of two inputs or more, as the module takes them: images [N, C, H, W] or [N, H, W], signals
    [N, C, L], or rows of a table [N, F]. Without one they are images of MNIST, [N, 1, 28, 28], of which `format` makes
    what the module takes.

    `layers` and `norms` are in order of computation; `neurons` are those that they read, the first ones the `channels`
    of the inputs. `written` and `left` are the names of the parameters and buffers that a generator writes, and of
    those that it does not; those of which it writes a part are both. `count` is how many numbers it writes. Parameters
    with `requires_grad=False` are left, and their layers computed with them. Raises ValueError, naming the call and the
    line of the user's code, for what cannot be read. The module stays as it is, but that lazy parameters are
    initialised.
    """

    def __init__(self, module: nn.Module, example: Tensor | None = None):
        self.module = unwrapped(module)
        if not isinstance(self.module, nn.Module):
            raise ValueError(f"a {type(module).__name__} is no module: give an nn.Module")
        self.precision: torch.dtype | None = None  # of the inputs, where the module computes in its own alone
        formats = IMAGE_FORMATS if example is None else [format_of(example)]
        self.example = noise(2) if example is None else two_of(example)
        with still(self.module), torch.no_grad():
            precision = None if example is None else example.dtype
            if any(isinstance(parameter, nn.UninitializedParameter) for parameter in self.module.parameters()):
                self._try_formats(formats, precision, lambda inputs, _: self.module(inputs))
            for _ in range(2):
                reading = self._try_formats(formats, precision, self._read)
                self.steps = reading.steps
                if self._is_repeated():
                    break
        found = reading.inventory
        self.layers, self.norms, self.shifts = found.layers, found.norms, found.shifts
        self.heads = reading.heads
        self.last = max(self.heads, key=lambda head: head.depth)
        self.neurons, self.classes = reading.follower.neurons, self.last.shape[0]
        self.channels = reading.channels
        counters = (f"{norm.name}.num_batches_tracked" for norm in self.norms if norm.parts)
        self.counters = [name for name in counters if name in self.state()]
        parts = [part for operation in (*self.layers, *self.norms, *self.shifts) for part in operation.parts]
        parts += map(Part, self.counters)
        self.written = list(dict.fromkeys(part.name for part in parts))
        if not any(tensor.requires_grad for name, tensor in self.state().items() if name in self.written):
            raise ValueError(
                f"{type(self.module).__name__}: all parameters of its layers are frozen (requires_grad=False), so that "
                "there is nothing to write"
            )
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

    def run(
        self, images: Tensor, weights: dict[str, Tensor], batch_statistics: bool = False, see: Callable | None = None
    ) -> Tensor:  # fmt: skip
        """The logits [N, classes] of images, of the example's shape, with these weights; others are the module's own.

        With `batch_statistics` norms use those of the images, as in training, in the place of their running ones.
        `see(operation, outputs)` is shown what each operation gives.
        """
        weights = self._own(images, but=weights) | weights

        def compute(operation: Operation, inputs: Tensor) -> Tensor:
            outputs = operation.of(weights, inputs, batch_statistics)
            if see is not None:
                see(operation, outputs)
            return outputs

        return self._forward(images, weights, compute)

    def write(
        self, images: Tensor, written: dict[str, Tensor], write: Callable, end: Layer | None = None
    ) -> None:  # fmt: skip
        """Run images, of the example's shape, while the weights are written, up to the layer `end` if there is one.

        `write(operation, inputs)` returns the outputs, and puts into `written` what it writes. It is called
        once for each, where it is first used.
        """
        own, done = self._own(images), []

        def compute(operation: Operation, inputs: Tensor) -> Tensor:
            if operation is end:
                raise Reached(inputs)
            if any(operation is other for other in done):
                return operation.of(ChainMap(written, own), inputs)
            done.append(operation)
            return write(operation, inputs)

        with contextlib.suppress(Reached):
            self._forward(images, own, compute)

    def inputs_of(
        self, layer: Layer, images: Tensor, weights: dict[str, Tensor], given: tuple[Layer, Tensor] | None = None
    ) -> Tensor:
        """What reaches a layer, where it is first used, of images, with these weights. The pass ends there.

        Of an earlier layer the first outputs may be `given`: what comes before it is then computed of two of the images
        alone, so that anything else of these that matters for what comes after has another shape. Raises RuntimeError
        if the layer is not reached.
        """
        weights, left = self._own(images, but=weights) | weights, [given] if given else []

        def compute(operation: Operation, inputs: Tensor) -> Tensor:
            if operation is layer:
                raise Reached(inputs)
            if left and operation is given[0]:
                return left.pop()[1]  # its second use is of other inputs
            return operation.of(weights, inputs)

        try:
            self._forward(images[:2] if given else images, weights, compute)
        except Reached as reached:
            return reached.inputs
        raise RuntimeError(f"{layer.name}: is not reached")

    def _forward(self, images: Tensor, weights: dict[str, Tensor], compute: Callable) -> Tensor:
        """The logits of images, in their precision, each operation by `compute(operation, inputs)`."""
        weights = self._taken(weights)
        with still(self.module), Replay(self, weights, images.dtype, compute) as replay:
            logits = logits_of(functional_call(self.module, weights, self._given(images)))
        if next(replay.steps, None) is not None:
            raise replay.another_way()
        return logits.to(images.dtype)

    def _own(self, images: Tensor, but: Collection[str] = ()) -> dict[str, Tensor]:
        """Copies, which the module may change, of its parameters and buffers, those of floating point as the images
        are, `but` some."""
        return {
            name: tensor.detach().to(images.device, images.dtype if is_float(tensor) else None, copy=True)
            for name, tensor in self.state().items()
            if name not in but
        }

    def _given(self, images: Tensor) -> Tensor:
        """Images as the module takes them: a copy, which it may change."""
        return self.format(images.to(self.precision or images.dtype, copy=True))

    def _taken(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights as the module takes them."""
        if self.precision is None:
            return weights
        state = self.state()
        return {name: tensor.to(state[name].dtype) for name, tensor in weights.items()}

    def _try_formats(self, formats: Collection[InputFormat], precision: torch.dtype | None, run: Callable):
        """What `run(inputs, reading)` returns for inputs of the first of the `formats` that the module takes.

        They are in single precision, as its parameters are made, or else in its own, in which the inputs are of
        `precision`, or of that of its first parameter.
        """
        own = [tensor.dtype for tensor in self.module.parameters() if tensor.dtype.is_floating_point]
        other = any(dtype != torch.float32 for dtype in own)
        for self.precision in [None, precision or own[0]] if other else [None]:
            failures = []
            for self.format in formats:
                inputs, reading = self._given(self.example.to("cpu", torch.float32)), Reading()
                try:
                    return run(inputs, reading)
                except Refused:
                    raise
                except Exception as error:  # the module's own code may raise anything
                    failures.append((len(reading.steps), shape_of(inputs), f"{in_short(error)}{place_of(error)}"))
        _, shape, reason = max(failures, key=lambda failure: failure[0])
        shapes = ", ".join(shape for _, shape, _ in failures)
        raise ValueError(f"{type(self.module).__name__} takes no inputs of shape {shapes}; of {shape} it says {reason}")

    def _read(self, inputs: Tensor, reading: Reading) -> Reading:
        """Find the layers, the norms and the classes in a forward pass on `inputs`."""
        for axes in self.format.axes:
            another = reading if axes == self.format.axes[0] else Reading()
            self._follow(inputs, axes, another)
            if another.tells_channels_apart:
                return another
        return reading

    def _is_repeated(self) -> bool:
        """Whether the module goes the same way again: the first time it may have made what it keeps, such as tables."""
        try:
            self.run(self.example.to("cpu", torch.float32), {})
        except ValueError:
            return False
        return True

    def _follow(self, inputs: Tensor, axes: str, reading: Reading) -> None:
        """Read a forward pass on `inputs`, whose axes are `axes`."""
        state = self._taken(self._own(inputs))
        buffers = {*dict(self.module.named_buffers())}
        reading.start(inputs, self.format, axes, state, self.state(), buffers)
        with reading:
            output = functional_call(self.module, state, inputs)
        reading.finish(output, type(self.module).__name__)

    @property
    def multiplications(self) -> float:
        """How many an input costs, nearly."""
        return sum(
            math.prod(layer.shape) * max(layer.resolution, 1) ** max(len(layer.shape) - 2, 1) for layer in self.layers
        )

    @property
    def convolutional(self) -> bool:
        return any(layer.has_window for layer in self.layers)


class Logits(nn.Module):
    """A graph's network, or a copy of it, for images of the example's shape, whatever it returns: -> logits."""

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


def shape_of(inputs: Tensor) -> str:
    """The shape of a batch of inputs, as people write it."""
    return f"[{', '.join(['N', *map(str, inputs.shape[1:])])}]"


def unwrapped(module: nn.Module) -> nn.Module:
    """The network within the wrappers of `torch.compile`, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif hasattr(module, "_orig_mod"):
            module = module._orig_mod
        else:
            return module


ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """A forward pass that computes as in evaluation, layer by layer, and leaves the module's modes, and the state of
    PyTorch's random numbers on the CPU, as they are. What the module draws there is the same every time.

    One at a time: all threads share that state, and the switch of PyTorch's fused transformer layer.
    """
    with ONE_AT_A_TIME, torch.random.fork_rng(devices=[]), uncompiled():
        modes = [(part, part.training) for part in module.modules()]
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it would hide its parts
        try:
            module.eval()
            torch.default_generator.manual_seed(0)
            yield
        finally:
            for part, training in modes:
                part.training = training
            torch.backends.mha.set_fastpath_enabled(fused)


def uncompiled() -> contextlib.AbstractContextManager:
    """What `torch.compile` has wrapped runs as it was written: its compiler would trace what sees the calls."""
    loaded = "torch._dynamo" in sys.modules  # which takes seconds
    return torch.compiler.set_stance("force_eager") if loaded else contextlib.nullcontext()
