"""The universal synthesiser: it writes weights for any supported architecture, from that network's own random init.

Design document, sections 4.1.1 and 4.1.3. A graph is written layer by layer, from the images to the classes:

- **Probes.** A few learned images run through the network as it is written, so every layer knows what reaches it.
- **Reading.** A hidden neuron is known only by its own random weights: by their products with the keys of the neurons
  that it reads and, in linear layers, by their responses to the probes. The neurons of a layer then see each other, by
  attention. Permuted neurons are therefore written permuted. What the random weights of the first layer sum up to,
  over its neurons, makes the network's variant, which all its layers know.
- **Writing.** A weight is bilinear in the code of its neuron and the dual keys of its inputs, K (K^T K / n + r I)^-1,
  which turn a sum over n random inputs into a quadrature, with functions of the position in the kernel or the map.
  The last layer adds the ridge regression, on what the probes are there, of their learned labels; the hidden layers of
  networks without convolutions, of learned concepts, mixed by the neuron's code. The responses of the hidden neurons
  to the probes are then decorrelated, as far as the layer wants it, and standardised.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripting import UserError, load_file, save_tensors
from universal.graph import IMAGE_CHANNELS, IMAGE_SIDE, ComputationGraph, Layer

SYNTHESIZER = Path(__file__).resolve().parent / "synthesizer.pth"
MAKER = "python -m universal.train"
VERSION = 4
FREQUENCIES = 7  # cosines along each side of a kernel
SCALING_PROBES = 32  # that bring a convolution to scale, which responds to each probe at many positions
# Positive numbers that depend on the layer, and the logarithms of what they start as.
SCALARS = {
    "key_ridge": 0.0, "concept_ridge": -3.0, "concept_share": 0.0, "label_ridge": 0.0, "label_share": 0.0,
    "correlation_ridge": 0.0, "logit_scale": 0.5,
}  # fmt: skip


class AcrossNeurons(nn.Module):
    """Normalise every feature of [neurons, features] over the neurons."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, neurons: Tensor) -> Tensor:
        centred = neurons - neurons.mean(0)
        return centred * torch.rsqrt(centred.square().mean(0) + 1e-2) * self.scale + self.shift


class ConditionedMLP(nn.Module):
    """An MLP with one hidden layer for what is in a layer, [n, inputs], that depends on what the layer is, [dimension].

    The layer shifts and scales the hidden units, as in FiLM (Perez et al. 2018), so that layers of different kinds can
    share what they have in common and still be treated differently.
    """

    def __init__(self, inputs: int, dimension: int, hidden: int, outputs: int):
        super().__init__()
        self.first, self.second = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        self.shift, self.scale = nn.Linear(dimension, hidden, bias=False), nn.Linear(dimension, hidden, bias=False)

    def forward(self, values: Tensor, about: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(values) + self.shift(about)) * (1 + 0.5 * self.scale(about)))


class GraphWeightSynthesizer(nn.Module):
    """(architecture graph, current weights, step) -> new weights, equivariant to permutations of hidden neurons.

    `probes` is the number of learned images, of which networks with convolutions, where each costs more, only see the
    first `convolution_probes`; `classes` the most that a network may have, `dimension` the size of a neuron's
    embedding, `concepts` that of the space in which hidden linear neurons get their targets, `rank` the number of mixed
    position functions in a kernel, `hidden` the width of every MLP.
    """

    def __init__(
        self,
        probes: int = 300,
        convolution_probes: int = 128,
        classes: int = 10,
        dimension: int = 96,
        concepts: int = 96,
        rank: int = 32,
        hidden: int = 256,
    ):
        super().__init__()
        self.settings = {
            "probes": probes, "convolution_probes": convolution_probes, "classes": classes, "dimension": dimension,
            "concepts": concepts, "rank": rank, "hidden": hidden,
        }  # fmt: skip
        self.seconds: dict[str, float] = {}  # what making it cost, as the diffusion models have it
        self.convolution_probes, self.dimension, self.rank = convolution_probes, dimension, rank

        def mlp(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))

        def conditioned_mlp(inputs: int, outputs: int) -> ConditionedMLP:
            return ConditionedMLP(inputs, dimension, hidden, outputs)

        # What is learned of the task: images, their labels, and the concepts that hidden neurons may stand for.
        self.probes = nn.Parameter(torch.randn(probes, 1, IMAGE_SIDE, IMAGE_SIDE))
        self.labels = nn.Parameter(torch.randn(probes, classes))
        self.concepts = nn.Parameter(torch.randn(probes, concepts))

        # What a layer is.
        self.describe_layer = mlp(14, dimension)
        functions = FREQUENCIES**2
        self.read_functions, self.read_functions_always = conditioned_mlp(functions, rank), nn.Linear(functions, rank)
        self.write_functions, self.write_functions_always = conditioned_mlp(functions, rank), nn.Linear(functions, rank)
        self.concept_scale = nn.Linear(dimension, concepts)
        self.scalars = nn.ModuleDict({name: nn.Linear(dimension, 1) for name in SCALARS})
        for start_at_zero in (*self.scalars.values(), self.concept_scale):
            nn.init.zeros_(start_at_zero.weight)
            nn.init.zeros_(start_at_zero.bias)

        # What a neuron is, what it is to those that read it, and what the neurons of a first layer are together.
        self.read_kernels = nn.Linear(rank * dimension, dimension, bias=False)
        self.read_responses = nn.Parameter(torch.randn(probes, dimension) / math.sqrt(probes))
        self.read_norm = nn.LayerNorm(dimension)
        self.embed = conditioned_mlp(dimension + 1, dimension)
        self.embed_more = nn.Sequential(nn.LayerNorm(dimension), mlp(dimension, dimension))
        self.attend_norm, self.attend = nn.LayerNorm(dimension), nn.MultiheadAttention(dimension, 4, batch_first=True)
        self.neuron_norm = AcrossNeurons()
        self.image_keys = nn.Parameter(torch.randn(max(IMAGE_CHANNELS), dimension))
        self.key = conditioned_mlp(dimension, dimension)
        self.key_norm = nn.Sequential(nn.LayerNorm(dimension), AcrossNeurons())
        self.variant = nn.Linear(dimension, dimension)

        # What is written for it.
        self.code = conditioned_mlp(dimension, dimension + 1)
        self.code_norm = nn.Sequential(nn.LayerNorm(dimension), AcrossNeurons())
        self.classes = nn.Parameter(torch.randn(classes, dimension))
        self.class_code = conditioned_mlp(dimension, dimension)
        self.class_code_norm = nn.LayerNorm(dimension)
        self.write_kernels = nn.Linear(dimension, rank * dimension, bias=False)
        self.write_maps = nn.Linear(dimension, rank * dimension, bias=False)
        self.concept_code = conditioned_mlp(dimension, concepts)
        self.concept_code_norm = nn.Sequential(nn.LayerNorm(concepts), AcrossNeurons())

    @torch.no_grad()
    def start_from(self, images: Tensor, labels: Tensor) -> None:
        """Before training: take real images [probes, 1, 28, 28] and labels [probes] as the probes."""
        one_hot = F.one_hot(labels, self.labels.shape[1]).float()
        self.probes.copy_(images)
        self.labels.copy_(one_hot - 1 / self.labels.shape[1])
        self.concepts[:, : one_hot.shape[1]] = 3 * one_hot

    def task_parameters(self) -> list[nn.Parameter]:
        """The parameters that are data: they take a larger learning rate than the networks."""
        return [self.probes, self.labels, self.concepts]

    def forward(self, graph: ComputationGraph, weights: dict[str, Tensor], step: int = 0) -> dict[str, Tensor]:
        """New weights for `graph`, by name, from its current `weights`. `step` 0 starts from a random init.

        Raises ValueError if the graph has more classes than the synthesiser was trained on.
        """
        if graph.classes > self.labels.shape[1]:
            raise ValueError(
                f"{graph.last.name}: has {graph.classes} classes, but the synthesiser knows {self.labels.shape[1]}"
            )
        written: dict[str, Tensor] = {}
        keys: dict[str | None, Tensor] = {None: self.image_keys[: graph.channels]}
        variant: Tensor | None = None
        convolutional = any(layer.is_convolution for layer in graph.layers)

        def write(layer: Layer, inputs: Tensor) -> Tensor:
            """The probes' responses to the layer, once it is written."""
            nonlocal variant
            about = self.about(layer, graph, inputs, step)
            read_keys = sum(keys[source] for source in layer.sources)
            # Regressions of hidden layers on the few probes of a network with convolutions would fit these too closely.
            fitted = not layer.is_convolution and (layer.last or not convolutional)
            features = inputs - inputs.mean(0) if fitted else None
            if not layer.last:
                reading = self.read(layer, read_keys, weights[layer.weight], about, features)
                if variant is None:
                    variant = 0.5 * self.variant(F.layer_norm(reading.sum(0), reading.shape[1:]))
            if variant is not None:
                about = about + variant
            if layer.last:
                weight, bias = self.write_classes(layer, read_keys, about, features), inputs.new_zeros(1)
            else:
                neurons = self.neurons(reading, weights.get(layer.bias), about)
                keys[layer.name] = self.key_norm(self.key(neurons, about))
                weight, bias = self.write_hidden(layer, read_keys, neurons, about, features)
            weight, bias, responses = self.standardise(layer, inputs, weight, bias, about)
            written[layer.weight] = weight
            if layer.bias:
                written[layer.bias] = bias
            return responses

        probes = self.probes[: self.convolution_probes if convolutional else None]
        graph(probes.expand(-1, graph.channels, -1, -1).to(memory_format=torch.channels_last), write)
        return balance(graph, written)

    def about(self, layer: Layer, graph: ComputationGraph, inputs: Tensor, step: int) -> Tensor:
        """What a layer is, [dimension]."""
        dilation, stride = (torch.tensor(layer.options.get(name, 1)).float().mean() for name in ("dilation", "stride"))
        readers = [reader for reader in graph.layers if layer.name in reader.sources]
        about = [
            layer.is_convolution, layer.depth == 0, layer.last, step > 0, layer.depth / 4,
            (graph.last.depth - layer.depth) / 4, math.log(layer.channels) / 5, math.log(layer.shape[0]) / 5,
            math.log(math.prod(layer.grid)) / 3, math.log(inputs.shape[-1]) / 3 if layer.is_convolution else 0,
            dilation.log(), stride.log(), any(reader.is_convolution for reader in readers),
            any(len(reader.sources) > 1 for reader in readers),
        ]  # fmt: skip
        return self.describe_layer(torch.tensor([float(value) for value in about]).to(inputs))

    def read(self, layer: Layer, keys: Tensor, weight: Tensor, about: Tensor, features: Tensor | None) -> Tensor:
        """What the current `weight` says about each neuron, [neurons, dimension].

        `keys` [channels, dimension] tell the channels that the neurons read, and `features` [probes, inputs] of a
        linear layer what the probes are there.
        """
        functions = self.mixed_functions(layer, about, self.read_functions, self.read_functions_always)
        products = torch.einsum("oir,id->ord", weight.reshape(len(weight), layer.channels, -1) @ functions, keys)
        reading = F.layer_norm(self.read_kernels(products.flatten(1)), [self.dimension])
        if features is None:
            return reading
        responses = features @ weight.T
        responses = responses * torch.rsqrt(responses.square().mean(0) + 1e-12)
        return reading + F.layer_norm(responses.T @ self.read_responses[: len(responses)], [self.dimension])

    def neurons(self, reading: Tensor, bias: Tensor | None, about: Tensor) -> Tensor:
        """What each neuron of a hidden layer is, [neurons, dimension]."""
        bias = reading.new_zeros(len(reading)) if bias is None else bias - bias.mean()
        bias = bias * torch.rsqrt(bias.square().mean() + 1e-12)
        neurons = self.embed(torch.cat([self.read_norm(reading), bias[:, None]], 1), about)
        neurons = neurons + self.embed_more(neurons)
        normalised = self.attend_norm(neurons)[None]
        return self.neuron_norm(neurons + self.attend(normalised, normalised, normalised, need_weights=False)[0][0])

    def write_hidden(
        self, layer: Layer, keys: Tensor, neurons: Tensor, about: Tensor, features: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The new weight of a hidden layer, of any scale, and the bias of its standardised responses.

        The bias stays within one deviation. Free, it grows in training until no neuron is ever off: random inits do
        not disturb linear layers, so these are easier to write, but the network is then worth no more than a shallower
        one, and too sensitive to be trained further.
        """
        codes, bias = self.code(neurons, about).split([self.dimension, 1], 1)
        weight = self.bilinear(layer, keys, self.code_norm(codes), about)
        if features is not None:
            concepts = F.layer_norm(self.concepts[: len(features)], self.concepts.shape[1:])
            concepts = concepts * self.concept_scale(about).exp()
            ridge = self.scalar("concept_ridge", about)
            wanted = concepts @ self.concept_code_norm(self.concept_code(neurons, about)).T
            fitted = ridge_regression(features, wanted, ridge)
            share = self.scalar("concept_share", about)
            weight = unit_responses(weight, features) + share * unit_responses(fitted, features)
        return weight, torch.tanh(0.3 * bias[:, 0])

    def write_classes(self, layer: Layer, keys: Tensor, about: Tensor, features: Tensor | None) -> Tensor:
        """The new weight of the last layer, of any scale."""
        classes = F.layer_norm(self.classes[: layer.shape[0]], [self.dimension])
        codes = self.class_code_norm(self.class_code(classes, about))
        weight = self.bilinear(layer, keys, codes, about)
        if features is not None:
            # Few probes may guide the classes but not decide on them: training would take this short way and end there.
            count = len(features)
            ridge = self.scalar("label_ridge", about) + 6 / count
            fitted = ridge_regression(features, self.labels[:count, : layer.shape[0]], ridge)
            share = self.scalar("label_share", about)
            share = share / (1 + share * 64 / count)  # below count / 64
            weight = unit_responses(weight, features, each=False) + share * unit_responses(fitted, features, each=False)
        return weight - weight.mean(0)  # what all classes share changes nothing

    def bilinear(self, layer: Layer, keys: Tensor, codes: Tensor, about: Tensor) -> Tensor:
        """A weight that is bilinear in the neurons' codes and the dual keys of the input channels."""
        ridge = self.scalar("key_ridge", about) * torch.eye(self.dimension, device=keys.device)
        dual = unit_rms(torch.linalg.solve(keys.T @ keys / len(keys) + ridge, keys.T).T)
        functions = self.mixed_functions(layer, about, self.write_functions, self.write_functions_always)
        expand = self.write_kernels if layer.is_convolution else self.write_maps
        mix = torch.einsum("ord,id->oir", expand(codes).unflatten(1, (self.rank, self.dimension)), dual)
        if layer.is_convolution:
            # Position by position, so that the weight comes in the channels-last layout, the fastest for convolutions.
            weight = torch.einsum("oir,pr->opi", mix, functions).unflatten(1, layer.grid).permute(0, 3, 1, 2)
        else:
            weight = torch.einsum("oir,pr->oip", mix, functions).flatten(1)
        return weight / math.sqrt(math.prod(layer.shape[1:]) * self.rank * self.dimension)

    def mixed_functions(self, layer: Layer, about: Tensor, mix: nn.Module, mix_always: nn.Module) -> Tensor:
        """Functions of the position in a kernel or a flattened map, [positions, rank]."""
        functions = position_functions(layer).to(about)
        return unit_rms(mix(functions, about) + mix_always(functions))

    def scalar(self, name: str, about: Tensor) -> Tensor:
        """One of the positive numbers that depend on the layer, [1]."""
        return (self.scalars[name](about) + SCALARS[name]).exp()

    def standardise(
        self, layer: Layer, inputs: Tensor, weight: Tensor, bias: Tensor, about: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weight and the bias brought to scale, and the probes' responses with them.

        The responses of hidden neurons come to a variance of 1 and, where the layer has a bias, to `bias` in the mean.
        They are also made less alike: by the inverse square root of their correlations, the only whitening that does
        not prefer a neuron. The classes keep their relative scales. Of a convolution, a part of the probes is enough.
        """
        some = inputs[:SCALING_PROBES] if layer.is_convolution and not layer.last else inputs
        responses = layer(some, weight).movedim(1, -1)
        flat = responses.flatten(0, -2)
        mean = flat.mean(0)  # torch.var_mean over dimensions that lie apart is ten times slower
        if layer.last:
            logits = responses.flatten(1, -2).mean(1) if responses.dim() > 2 else responses  # averaged in the end
            scale = self.scalar("logit_scale", about) * torch.rsqrt((logits - mean).square().mean() + 1e-8)
            return weight * scale, bias - mean * scale, responses.movedim(-1, 1)  # no layer reads these
        covariance = flat.T @ flat / len(flat) - mean[:, None] * mean
        inverse_deviation = torch.rsqrt(covariance.diagonal().clamp(min=0) + 1e-8)
        correlation = covariance * inverse_deviation[:, None] * inverse_deviation
        ridge = (self.scalar("correlation_ridge", about) + 1e-2) * torch.eye(len(mean)).to(mean)
        mix = InverseSquareRoot.apply(correlation + ridge) * inverse_deviation
        mix = mix * torch.rsqrt(((mix @ covariance) * mix).sum(1, keepdim=True).clamp(min=0) + 1e-8)
        positions_first = weight.movedim(1, -1)  # as the weight lies in memory
        weight = (mix @ positions_first.flatten(1)).view(positions_first.shape).movedim(-1, 1)
        bias = bias - mix @ mean if layer.bias else torch.zeros_like(mean)
        if len(some) < len(inputs):
            return weight, bias, layer(inputs, weight, bias)
        return weight, bias, (flat @ mix.T).add_(bias).view(responses.shape).movedim(-1, 1)

    @torch.inference_mode()
    def synthesize(self, module: nn.Module, seed: int | None = None, steps: int = 1) -> nn.Module:
        """Write the weights of `module` in place, in `steps` generative steps, and return it.

        They are made from the weights that it has, or with `seed` from a fresh random init. Raises ValueError if the
        module is not supported (`universal.graph.ComputationGraph`), has too many classes or holds NaN.
        """
        graph = ComputationGraph(module)
        weights = graph.weights() if seed is None else random_weights(graph, seed)
        for name, tensor in weights.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name}: holds NaN or infinite weights")
        weights = {name: tensor.to(self.probes) for name, tensor in weights.items()}
        for step in range(steps):
            weights = self(graph, weights, step)
        for name, parameter in graph.parameters.items():
            parameter.copy_(weights[name])
        return module


def balance(graph: ComputationGraph, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same network with layers as large as PyTorch's default init has them, relative to each other.

    It computes the same, in weights of the sizes that an optimiser like Adam usually starts from. Only chains of layers
    without GELU can be rescaled so; other networks are returned as they are.
    """
    if not graph.is_rescalable:
        return weights
    norms = torch.stack([weights[layer.weight].norm() for layer in graph.layers])
    usual = torch.tensor([math.sqrt(layer.shape[0] / 3) for layer in graph.layers]).to(norms)
    factors = (usual / (norms + 1e-8)).log()
    factors = (factors - factors.mean()).exp()  # whose product is 1
    balanced = {}
    for layer, factor, gain in zip(graph.layers, factors, factors.cumprod(0), strict=True):
        balanced[layer.weight] = weights[layer.weight] * factor
        if layer.bias:
            balanced[layer.bias] = weights[layer.bias] * gain
    return balanced


def unit_responses(weight: Tensor, inputs: Tensor, each: bool = True) -> Tensor:
    """The weight, scaled so that the responses to `inputs`, of `each` neuron or of all, have a mean square of 1."""
    squares = (inputs @ weight.T).square()
    return weight * torch.rsqrt((squares.mean(0)[:, None] if each else squares.mean()) + 1e-8)


def unit_rms(values: Tensor) -> Tensor:
    """Scaled to a root mean square of 1."""
    return values * torch.rsqrt(values.square().mean() + 1e-6)


def ridge_regression(features: Tensor, targets: Tensor, ridge: Tensor) -> Tensor:
    """The weight, [outputs, features], that maps centred `features` [probes, features] to `targets` [probes, outputs].

    In the dual form, whose matrix is only [probes, probes]. `ridge` is relative to the mean squared length of features.
    """
    gram = features @ features.T
    scale = gram.diagonal().mean() + 1e-6
    factor = torch.linalg.cholesky(gram / scale + (ridge + 1e-3) * torch.eye(len(gram), device=gram.device))
    return torch.cholesky_solve(targets, factor).T @ features / scale


class InverseSquareRoot(torch.autograd.Function):
    """The inverse square root of a symmetric positive definite matrix.

    Its gradient is that of Daleckii and Krein (Higham, Functions of Matrices, theorem 3.11), which exists where
    eigenvalues coincide too; that of torch.linalg.eigh does not.
    """

    @staticmethod
    def forward(ctx, matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        roots = values.clamp(min=1e-6).sqrt()
        ctx.save_for_backward(roots, vectors)
        return (vectors / roots) @ vectors.T

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        roots, vectors = ctx.saved_tensors
        divided_differences = -1 / (roots[:, None] * roots * (roots[:, None] + roots))
        return vectors @ ((vectors.T @ gradient @ vectors) * divided_differences) @ vectors.T


def position_functions(layer: Layer) -> Tensor:
    """Products of cosines at the positions of a kernel or a flattened map, [positions, FREQUENCIES ** 2].

    A position in a kernel is the distance to its centre in pixels, so that the middle of a large kernel is like a small
    one; a position in a map is relative to the map's size.
    """

    def cosines(side: int, dilation: int) -> Tensor:
        if layer.is_convolution:
            distances = (torch.arange(side) - (side - 1) / 2) * dilation
            angles = (1 + torch.tanh(distances / 3)) / 2 * math.pi  # within a turn, however large the kernel
        else:
            angles = (torch.arange(side) + 0.5) / side * math.pi
        return torch.cos(angles[:, None] * torch.arange(FREQUENCIES))

    dilations = nn.modules.utils._pair(layer.options.get("dilation", 1))
    down, across = (cosines(side, dilation) for side, dilation in zip(layer.grid, dilations, strict=True))
    return torch.einsum("ym,xn->yxmn", down, across).flatten(0, 1).flatten(1)


def random_weights(graph: ComputationGraph, seed: int) -> dict[str, Tensor]:
    """PyTorch's default init of all layers of `graph`, by name, from `seed`: uniform within 1 / sqrt(fan-in)."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in graph.layers:
        bound = 1 / math.sqrt(math.prod(layer.shape[1:]))
        weights[layer.weight] = torch.empty(layer.shape).uniform_(-bound, bound, generator=generator)
        if layer.bias:
            weights[layer.bias] = torch.empty(layer.shape[0]).uniform_(-bound, bound, generator=generator)
    return weights


# ---- files ----------------------------------------------------------------------------------------------------------


def save_synthesizer(synthesizer: GraphWeightSynthesizer, path: Path) -> None:
    """Save a synthesiser with all that rebuilds it. Raises UserError if `path` cannot be written."""
    content = {
        "model": type(synthesizer).__name__,
        "version": VERSION,
        "settings": synthesizer.settings,
        "state_dict": synthesizer.state_dict(),
        "seconds": synthesizer.seconds,
    }
    save_tensors(path, content)


def load_synthesizer(path: Path = SYNTHESIZER, device: torch.device | str = "cpu") -> GraphWeightSynthesizer:
    """The synthesiser saved at `path`, the one of this repository by default, in evaluation mode.

    Raises UserError if the file is missing, broken, of another kind or of another version.
    """
    content = load_file(path, maker=MAKER)
    if not is_synthesizer(content):
        raise UserError(f"{path}: not a saved synthesiser: make one with {MAKER}")
    if content.get("version") != VERSION:
        raise UserError(
            f"{path}: a synthesiser of version {content.get('version')}, but this code reads version {VERSION}: "
            f"make it again with {MAKER}"
        )
    try:
        synthesizer = GraphWeightSynthesizer(**content["settings"])
        synthesizer.load_state_dict(content["state_dict"])
        synthesizer.seconds = {name: float(seconds) for name, seconds in content["seconds"].items()}
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: a damaged synthesiser: make it again with {MAKER}") from error
    if not all(tensor.isfinite().all() for tensor in synthesizer.state_dict().values()):
        raise UserError(f"{path}: holds NaN or infinite weights: make it again with {MAKER}")
    return synthesizer.to(device).eval()


def is_synthesizer(content) -> bool:
    """Whether a loaded file is a synthesiser's, of whatever version."""
    return isinstance(content, dict) and content.get("model") == GraphWeightSynthesizer.__name__
