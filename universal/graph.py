"""Any supported module as a computation graph: which layers it has, what feeds them, and how to run it.

Design document, section 4.1.1. `torch.fx` traces the module, so nobody describes an architecture by hand. A graph is
run layer by layer with weights that come from outside, which is how a generator writes the weights of a layer while
the activations that reach it are already those of the generated layers before it.
"""

import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

SUPPORTED = (
    "Conv2d (one group, zero padding), Linear, ReLU, GELU, max, average and adaptive average pooling, Flatten, "
    "Dropout, Identity, additions of two activations, and the functional forms of these"
)
IMAGE_SIDE = 28  # pixels: the images that a graph takes are [N, channels, 28, 28]
IMAGE_CHANNELS = (1, 3)

POOLINGS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
ELEMENTWISE = (nn.ReLU, nn.GELU, nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d)
POOLING_FUNCTIONS = (F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d)
DROPOUTS = (nn.Dropout, nn.Dropout2d, F.dropout, F.dropout2d, torch.dropout)
RELUS = (nn.ReLU, F.relu, torch.relu, "relu", "relu_")
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
SHAPES = (nn.Flatten, nn.Identity, torch.flatten, torch.reshape, "flatten", "view", "reshape", "contiguous")
SIZES = (getattr, operator.getitem, "size")
SUPPORTED_TARGETS = {
    *POOLINGS, *ELEMENTWISE, *POOLING_FUNCTIONS, *DROPOUTS, *RELUS, *ADDITIONS, *SHAPES, *SIZES, F.gelu,
}  # fmt: skip


class Layer(NamedTuple):
    """A convolution or linear layer of a graph."""

    name: str  # of its node
    weight: str  # name of the parameter, [outputs, inputs, height, width] or [outputs, inputs]
    bias: str | None
    shape: tuple[int, ...]  # of the weight
    options: dict  # stride, padding and dilation of a convolution; empty for a linear layer
    grid: tuple[int, int]  # height and width of the kernel, or of the maps that a linear layer reads flattened
    depth: int  # how many layers the images have passed before this one, on the longest way
    sources: tuple[str | None, ...]  # the layers whose outputs, added up, are its inputs; None for the images
    last: bool  # whether its outputs are the classes

    @property
    def is_convolution(self) -> bool:
        return len(self.shape) == 4

    @property
    def channels(self) -> int:
        """How many channels the layer reads: its inputs are their values at the positions of the grid."""
        return math.prod(self.shape[1:]) // math.prod(self.grid)

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's outputs for `inputs`, with these parameters."""
        if not self.is_convolution:
            return F.linear(inputs, weight, bias)
        if self.shape[2:] == (1, 1) and self.options["padding"] in (0, (0, 0), "same", "valid"):
            # A linear layer over the channels. Not as a convolution: the backward pass of oneDNN's 1x1 convolutions
            # hangs on processors with AVX2 only (PyTorch 2.15).
            down, across = nn.modules.utils._pair(self.options["stride"])
            return F.linear(inputs[:, :, ::down, ::across].movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
        return F.conv2d(inputs, weight, bias, **self.options)


def unwrapped(module: nn.Module) -> nn.Module:
    """The network within `torch.compile`, DataParallel and DistributedDataParallel, which compute what it computes."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif hasattr(module, "_orig_mod"):  # torch.compile's, whose type takes a second to import
            module = module._orig_mod
        else:
            return module


class ComputationGraph:
    """The computation graph of a module that classifies images [N, channels, 28, 28] as logits [N, classes].

    `module` is that module, `unwrapped`, and `parameters` are its own, by name. `layers` are its `Layer`s in order of
    computation, `channels` (1 or 3) and `classes` are read from the graph.
    Raises ValueError, naming the node, for a module that cannot be traced or that holds anything but `SUPPORTED`.
    """

    def __init__(self, module: nn.Module):
        self.module = module = unwrapped(module)
        try:
            self.nodes = list(fx.Tracer().trace(module).nodes)
        except Exception as error:  # tracing runs the module's own code, which may raise anything
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"{type(module).__name__} cannot be traced by torch.fx: {reason}") from error
        self.parameters = dict(module.named_parameters())
        self.layers: list[Layer] = []
        self._layer_of: dict[fx.Node, Layer] = {}
        self._read()
        self._measure()

    def run(self, images: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """The logits [N, classes] of images [N, channels, 28, 28], with these weights, by name."""
        return self(images, lambda layer, inputs: layer(inputs, weights[layer.weight], weights.get(layer.bias)))

    def __call__(
        self,
        images: Tensor,
        apply: Callable[[Layer, Tensor], Tensor],
        shapes: dict[fx.Node, torch.Size] | None = None,
    ) -> Tensor:
        """The logits [N, classes] of images [N, channels, 28, 28], each layer computed by `apply(layer, inputs)`.

        Dropout is off. Into `shapes` goes the shape of every activation.
        """
        values: dict[fx.Node, object] = {}
        for node in self.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            kind = self._kind(node)
            if node.op == "placeholder":
                values[node] = images
            elif node.op == "output":
                return args[0]
            elif node in self._layer_of:
                values[node] = apply(self._layer_of[node], args[0] if args else kwargs["input"])
            elif node.op == "get_attr":
                values[node] = None  # parameters come from outside
            elif kind in DROPOUTS:
                values[node] = args[0]
            elif kind in RELUS:
                values[node] = F.relu(args[0])  # never in place: other nodes may read its input
            elif kind in ADDITIONS:
                values[node] = args[0] + args[1]
            elif node.op == "call_module":
                values[node] = self.module.get_submodule(node.target)(*args, **kwargs)
            elif node.op == "call_method":
                method = "reshape" if node.target == "view" else node.target  # activations may lie channels-last
                values[node] = getattr(args[0], method)(*args[1:], **kwargs)
            else:
                values[node] = node.target(*args, **kwargs)
            if shapes is not None and isinstance(values[node], Tensor):
                shapes[node] = values[node].shape
        raise AssertionError("a traced graph ends in an output node")

    def weights(self) -> dict[str, Tensor]:
        """The module's own parameters, by name."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def _kind(self, node: fx.Node):
        """What a node computes: a type of module, a function, or the name of a method."""
        return type(self.module.get_submodule(node.target)) if node.op == "call_module" else node.target

    def _read(self) -> None:
        """Find the layers, and refuse what cannot be read."""
        depth: dict[fx.Node, int] = {}
        sources: dict[fx.Node, tuple] = {}
        for node in self.nodes:
            before = max((depth[source] for source in node.all_input_nodes), default=0)
            reached = tuple(dict.fromkeys(name for source in node.all_input_nodes for name in sources[source]))
            layer = self._read_layer(node, before, reached)
            depth[node] = before + (layer is not None)
            sources[node] = (layer.name,) if layer else (None,) if node.op == "placeholder" else reached
            if layer is not None:
                if layer.weight in {earlier.weight for earlier in self.layers}:
                    raise ValueError(f"{node.name}: uses {layer.weight} again; shared weights are not supported")
                self.layers.append(layer)
                self._layer_of[node] = layer
            elif node.op == "output":
                self._find_last(node)
            elif node.op == "get_attr":
                if node.target not in self.parameters:
                    raise ValueError(
                        f"{node.name}: reads {node.target}, not a weight of a layer; supported: {SUPPORTED}"
                    )
            elif node.op != "placeholder" and not self._is_supported(node):
                raise ValueError(f"{node.name}: {self._describe(node)} is not supported; supported: {SUPPORTED}")
        if sum(node.op == "placeholder" for node in self.nodes) != 1:
            raise ValueError(f"{type(self.module).__name__} takes more than the images as input")
        unread = set(self.parameters) - {name for layer in self.layers for name in (layer.weight, layer.bias)}
        if unread:
            raise ValueError(f"{min(unread)}: is not the weight or bias of a layer; supported: {SUPPORTED}")

    def _is_supported(self, node: fx.Node) -> bool:
        kind = self._kind(node)
        if kind in ADDITIONS:
            return len(node.all_input_nodes) == len(node.args) == 2 and not node.kwargs
        if kind is getattr:
            return node.args[1] == "shape"
        reads_indices = kind in (nn.MaxPool2d,) and self.module.get_submodule(node.target).return_indices
        return kind in SUPPORTED_TARGETS and not reads_indices

    def _describe(self, node: fx.Node) -> str:
        """What a node computes, in one line."""
        kind = self._kind(node)
        if node.op != "call_module":
            return getattr(kind, "__name__", kind)
        settings = str(self.module.get_submodule(node.target))
        return settings if len(settings.splitlines()) == 1 else kind.__name__

    def _read_layer(self, node: fx.Node, depth: int, sources: tuple) -> Layer | None:
        """The layer that a node computes, if it does."""
        kind = self._kind(node)
        if kind in (nn.Conv2d, nn.Linear):
            module = self.module.get_submodule(node.target)
            names = [f"{node.target}.weight", f"{node.target}.bias" if module.bias is not None else None]
            settings = {name: getattr(module, name, None) for name in ("stride", "padding", "dilation", "groups")}
            if getattr(module, "padding_mode", "zeros") != "zeros":
                raise ValueError(f"{node.name}: {self._describe(node)} is not supported; supported: {SUPPORTED}")
        elif kind in (F.conv2d, torch.conv2d, F.linear):
            given = dict(zip(FUNCTION_ARGUMENTS, node.args, strict=False)) | node.kwargs
            names = [getattr(given.get(name), "target", None) for name in ("weight", "bias")]
            settings = {name: given.get(name, default) for name, default in CONVOLUTION_DEFAULTS.items()}
            if names[0] not in self.parameters or (given.get("bias") is not None and names[1] not in self.parameters):
                raise ValueError(f"{node.name}: its weights are not parameters of the module")
            kind = nn.Linear if kind is F.linear else nn.Conv2d
        else:
            return None
        shape = tuple(self.parameters[names[0]].shape)
        if kind is nn.Linear:
            return Layer(node.name, *names, shape, {}, (1, 1), depth, sources, last=False)
        if settings.pop("groups") != 1:
            raise ValueError(f"{node.name}: more than one group is not supported; supported: {SUPPORTED}")
        return Layer(node.name, *names, shape, settings, shape[2:], depth, sources, last=False)

    def _find_last(self, output: fx.Node) -> None:
        """Mark the layer whose outputs are the classes."""
        node, between = output.args[0], []
        while (
            isinstance(node, fx.Node)
            and node not in self._layer_of
            and self._kind(node) in (*SHAPES, *DROPOUTS, *AVERAGES)
        ):
            between.append(self._kind(node))
            node = node.args[0]
        layer = self._layer_of.get(node) if isinstance(node, fx.Node) else None
        if layer is None or (not layer.is_convolution and any(kind in AVERAGES for kind in between)):
            name = getattr(node, "name", "output")
            raise ValueError(f"{name}: the output must be that of one Linear or Conv2d, averaged and flattened at most")
        self._layer_of[node] = self.layers[self.layers.index(layer)] = layer._replace(last=True)

    def _measure(self) -> None:
        """Find the input channels and the classes, and refuse shapes that do not fit, on tensors without data."""
        reasons, shapes = [], {}
        for self.channels in IMAGE_CHANNELS:
            try:
                logits = self(
                    torch.empty(2, self.channels, IMAGE_SIDE, IMAGE_SIDE, device="meta"),
                    lambda layer, inputs: layer(inputs, torch.empty(layer.shape, device="meta")),
                    shapes,
                )
                break
            except (RuntimeError, ValueError) as error:
                reasons.append(str(error).splitlines()[0])
        else:
            sizes = " nor ".join(f"{channels}x{IMAGE_SIDE}x{IMAGE_SIDE}" for channels in IMAGE_CHANNELS)
            raise ValueError(f"{type(self.module).__name__} takes neither {sizes} images: {reasons[0]}")
        self._find_grids(shapes)
        self.classes = self.last.shape[0]
        if logits.shape != (2, self.classes):
            raise ValueError(f"the output has shape {[*logits.shape[1:]]} per image; it must be [classes]")

    def _find_grids(self, shapes: dict[fx.Node, torch.Size]) -> None:
        """Tell every linear layer the height and width of the maps that were flattened for it.

        Raises ValueError where activations were reshaped in another way, so that a layer's channels are not those of
        the layers that it reads.
        """
        grids: dict[fx.Node, tuple[int, int]] = {}
        for node in self.nodes:
            if node in shapes:
                sources = [source for source in node.all_input_nodes if source in grids]
                layer = self._layer_of.get(node)
                if layer is not None and not layer.is_convolution:
                    if len(shapes[node]) != 2:
                        raise ValueError(f"{node.name}: its inputs must be flattened to [images, features]")
                    changed = layer._replace(grid=grids[sources[0]])
                    self._layer_of[node] = self.layers[self.layers.index(layer)] = changed
                    grids[node] = (1, 1)
                elif len(shapes[node]) == 4:
                    grids[node] = tuple(shapes[node][2:])
                else:
                    grids[node] = grids[sources[0]]
        outputs = {None: self.channels} | {layer.name: layer.shape[0] for layer in self.layers}
        for layer in self.layers:
            for source in layer.sources:
                if outputs[source] not in (1, layer.channels):
                    name = source or "the image"
                    raise ValueError(
                        f"{layer.name}: reads {layer.channels} channels, but {name} has {outputs[source]}: "
                        "of all reshaping only flattening is supported"
                    )

    @property
    def is_rescalable(self) -> bool:
        """Whether it is a chain of layers, each of which gives twice as much when it is given twice as much."""
        before = [None, *(layer.name for layer in self.layers)]
        in_a_row = all(layer.sources == (name,) for layer, name in zip(self.layers, before, strict=False))
        return in_a_row and not any(self._kind(node) in (nn.GELU, F.gelu) for node in self.nodes)

    @property
    def last(self) -> Layer:
        """The layer whose outputs are the classes."""
        return next(layer for layer in self.layers if layer.last)


AVERAGES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, F.avg_pool2d, F.adaptive_avg_pool2d)
CONVOLUTION_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
FUNCTION_ARGUMENTS = ("input", "weight", "bias", *CONVOLUTION_DEFAULTS)
