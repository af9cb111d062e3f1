"""The universal synthesiser: it writes weights for any supported architecture, from that network's own random init.

Design document, sections 4.1.1 and 4.1.3. A graph is written layer by layer, from the images to the classes:

- **Probes.** A few learned images run through the network as it is written, so every layer knows what reaches it.
- **Reading.** A hidden neuron is known only by its own random weights: by their response to the probes (linear layers)
  or by their products with keys that describe the input channels (convolutions). The neurons of a layer then see each
  other, by attention. Permuted neurons are therefore written permuted, and no single network can be recited.
- **Writing.** Convolutions are bilinear in the neuron's code and the dual keys of its inputs, K (K^T K / n + r I)^-1,
  which turn a sum over n random inputs into a quadrature. Linear layers are the ridge regression, on the features that
  the probes have there, onto targets: of learned concepts, mixed by the neuron's code, and in the last layer of the
  learned labels of the probes. The probes' responses of every hidden neuron are then standardised.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from target_cnn import UserError, load_file, save_tensors
from universal.graph import IMAGE_CHANNELS, IMAGE_SIDE, ComputationGraph, Layer

SYNTHESIZER = Path(__file__).resolve().parent / "synthesizer.pth"
MAKER = "python -m universal.train"
VERSION = 1
FREQUENCIES = 7  # cosines along each side of a kernel
GRID = 4  # a channel's response to a probe is described on GRID x GRID cells


class AcrossNeurons(nn.Module):
    """Normalise every feature of [neurons, features] over the neurons."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, neurons: Tensor) -> Tensor:
        centred = neurons - neurons.mean(0)
        return centred * torch.rsqrt(centred.square().mean(0) + 1e-2) * self.scale + self.shift


class GraphWeightSynthesizer(nn.Module):
    """(architecture graph, current weights, step) -> new weights, equivariant to permutations of hidden neurons.

    `probes` is the number of learned images, `classes` the most that a network may have, `dimension` the size of a
    neuron's embedding, `concepts` that of the space in which hidden linear neurons get their targets, `rank` the number
    of mixed position functions in a kernel, `hidden` the width of every MLP.
    """

    def __init__(
        self,
        probes: int = 100,
        classes: int = 10,
        dimension: int = 96,
        concepts: int = 96,
        rank: int = 32,
        hidden: int = 256,
    ):
        super().__init__()
        self.settings = {
            "probes": probes, "classes": classes, "dimension": dimension, "concepts": concepts, "rank": rank,
            "hidden": hidden,
        }  # fmt: skip
        self.seconds: dict[str, float] = {}  # what making it cost, as the diffusion models have it
        self.rank = rank

        def mlp(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))

        def normalised_mlp(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(mlp(inputs, outputs), nn.LayerNorm(outputs), AcrossNeurons())

        # What is learned of the task: images, their labels, and the concepts that hidden neurons may stand for.
        self.probes = nn.Parameter(torch.randn(probes, 1, IMAGE_SIDE, IMAGE_SIDE))
        self.labels = nn.Parameter(torch.randn(probes, classes))
        self.concepts = nn.Parameter(torch.randn(probes, concepts))
        self.log_ridge, self.log_temperature = nn.Parameter(torch.tensor(-4.0)), nn.Parameter(torch.tensor(2.0))

        # What a layer is.
        self.describe_layer = mlp(11, dimension)
        functions = FREQUENCIES**2
        self.read_functions, self.read_functions_always = mlp(functions + dimension, rank), nn.Linear(functions, rank)
        self.write_functions, self.write_functions_always = mlp(functions + dimension, rank), nn.Linear(functions, rank)
        self.key_ridge, self.concept_ridge = nn.Linear(dimension, 1), nn.Linear(dimension, 1)
        self.concept_scale = mlp(dimension, concepts)
        for start_at_zero in (self.key_ridge, self.concept_ridge, self.concept_scale[-1]):
            nn.init.zeros_(start_at_zero.weight)
            nn.init.zeros_(start_at_zero.bias)

        # What an input channel is.
        self.image_keys = nn.Parameter(torch.randn(max(IMAGE_CHANNELS), dimension))
        cells = probes * GRID**2
        self.read_maps = nn.Parameter(torch.randn(cells, dimension) / math.sqrt(cells))
        self.key = nn.Sequential(nn.LayerNorm(dimension), normalised_mlp(dimension, dimension))

        # What a neuron is.
        self.read_responses = nn.Parameter(torch.randn(probes, dimension) / math.sqrt(probes))
        self.read_kernels = nn.Linear(rank * dimension, dimension, bias=False)
        self.read_norm = nn.LayerNorm(dimension)
        self.embed = mlp(2 * dimension + 1, dimension)
        self.embed_more = nn.Sequential(nn.LayerNorm(dimension), mlp(dimension, dimension))
        self.attend_norm, self.attend = nn.LayerNorm(dimension), nn.MultiheadAttention(dimension, 4, batch_first=True)
        self.neuron_norm = AcrossNeurons()

        # What is written for it.
        self.kernel_code = nn.Sequential(
            normalised_mlp(2 * dimension, dimension), nn.Linear(dimension, rank * dimension, bias=False)
        )
        self.concept_code = normalised_mlp(2 * dimension, concepts)
        self.bias = mlp(2 * dimension, 1)

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

        def write(layer: Layer, inputs: Tensor) -> Tensor:
            if layer.last:
                weight, bias = self.write_classes(layer, inputs)
                responses = inputs.new_zeros(layer(inputs[:1], weight).shape).expand(
                    len(inputs), *[-1] * (inputs.dim() - 1)
                )
            else:
                weight, bias, responses = self.write_hidden(
                    layer,
                    inputs,
                    weights[layer.weight],
                    weights.get(layer.bias),
                    self.about(layer, graph, inputs, step),
                )
            written[layer.weight] = weight
            if layer.bias:
                written[layer.bias] = bias
            return responses

        probes = self.probes.expand(-1, graph.channels, -1, -1)
        graph(probes.to(memory_format=torch.channels_last), write)
        return written

    def about(self, layer: Layer, graph: ComputationGraph, inputs: Tensor, step: int) -> Tensor:
        """What a layer is, [dimension]."""
        dilation, stride = (torch.tensor(layer.options.get(name, 1)).float().mean() for name in ("dilation", "stride"))
        about = [
            layer.is_convolution, layer.depth == 0, layer.depth / 4, (graph.last.depth - layer.depth) / 4,
            math.log(layer.shape[1]) / 5, math.log(layer.shape[0]) / 5, math.log(math.prod(layer.shape[2:])) / 3,
            math.log(inputs.shape[-1]) / 3 if layer.is_convolution else 0, step > 0, dilation.log(), stride.log(),
        ]  # fmt: skip
        return self.describe_layer(torch.tensor([float(value) for value in about]).to(inputs))

    def write_hidden(
        self, layer: Layer, inputs: Tensor, weight: Tensor, bias: Tensor | None, about: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The new weight and bias of a hidden layer, and the probes' responses to it."""
        about_each = about.expand(layer.shape[0], -1)
        if layer.is_convolution:
            keys = self.keys(layer, inputs)
            functions = position_functions(*layer.shape[2:]).to(inputs)
            about_positions = torch.cat([functions, about.expand(len(functions), -1)], 1)
            read = unit_rms(self.read_functions(about_positions) + self.read_functions_always(functions))
            products = torch.einsum("oir,id->ord", weight.flatten(2) @ read, keys)
            reading = self.read_kernels(products.flatten(1))
        else:
            features = inputs - inputs.mean(0)
            responses = features @ weight.T
            responses = responses * torch.rsqrt(responses.square().mean(0) + 1e-12)
            reading = responses.T @ self.read_responses
        bias = reading.new_zeros(layer.shape[0]) if bias is None else bias - bias.mean()
        bias = bias * torch.rsqrt(bias.square().mean() + 1e-12)
        neurons = self.embed(torch.cat([self.read_norm(reading), bias[:, None], about_each], 1))
        neurons = neurons + self.embed_more(neurons)
        normalised = self.attend_norm(neurons)[None]
        neurons = self.neuron_norm(neurons + self.attend(normalised, normalised, normalised, need_weights=False)[0][0])
        neurons = torch.cat([neurons, about_each], 1)

        if layer.is_convolution:
            dimension = keys.shape[1]
            ridge = F.softplus(self.key_ridge(about) + 0.5) * torch.eye(dimension, device=keys.device)
            dual = unit_rms(torch.linalg.solve(keys.T @ keys / len(keys) + ridge, keys.T).T)
            write = unit_rms(self.write_functions(about_positions) + self.write_functions_always(functions))
            mix = torch.einsum("ord,id->oir", self.kernel_code(neurons).unflatten(1, (self.rank, dimension)), dual)
            # Position by position, so that the weight comes in the channels-last layout, the fastest for convolutions.
            weight = torch.einsum("oir,pr->opi", mix, write).unflatten(1, layer.shape[2:]).permute(0, 3, 1, 2)
            weight = weight / math.sqrt(math.prod(layer.shape[1:]) * self.rank * dimension)
        else:
            concepts = F.layer_norm(self.concepts, self.concepts.shape[1:]) * self.concept_scale(about).exp()
            ridge = (self.concept_ridge(about) - 3).exp()
            weight = ridge_regression(features, concepts @ self.concept_code(neurons).T, ridge)

        responses = layer(inputs, weight)
        over = [0, *range(2, responses.dim())]  # probes and positions
        variance, mean = torch.var_mean(responses, over, correction=0)
        scale = torch.rsqrt(variance + 1e-8)
        bias = 0.3 * self.bias(neurons)[:, 0] - mean * scale
        if layer.bias is None:
            bias = torch.zeros_like(bias)
        as_responses = (-1, *[1] * (responses.dim() - 2))
        responses = torch.addcmul(bias.view(as_responses), responses, scale.view(as_responses))
        return weight * scale.view(-1, *[1] * (weight.dim() - 1)), bias, responses

    def write_classes(self, layer: Layer, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The weight and bias of the last layer: ridge regression of the probes' learned labels."""
        if layer.is_convolution:  # what is averaged over positions afterwards may as well be averaged before
            inputs = torch.stack([patches.mean(1) for patches in unfold(layer, inputs)])
        mean = inputs.mean(0)
        weight = ridge_regression(inputs - mean, self.labels[:, : layer.shape[0]], self.log_ridge.exp())
        weight = weight * self.log_temperature.exp()
        return weight.view(layer.shape), -weight @ mean

    def keys(self, layer: Layer, inputs: Tensor) -> Tensor:
        """What each input channel of a convolution is, [channels, dimension]: how the probes excite it, and where."""
        if layer.depth == 0:
            return self.image_keys[: layer.shape[1]]
        maps = F.adaptive_avg_pool2d(inputs, GRID).transpose(0, 1).flatten(1)
        maps = maps - maps.mean(1, keepdim=True)
        maps = maps * torch.rsqrt(maps.square().mean(1, keepdim=True) + 1e-4)
        return self.key(maps @ self.read_maps)

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


def unit_rms(values: Tensor) -> Tensor:
    """Scaled to a root mean square of 1."""
    return values * torch.rsqrt(values.square().mean() + 1e-6)


def ridge_regression(features: Tensor, targets: Tensor, ridge: Tensor) -> Tensor:
    """The weight, [outputs, features], that maps centred `features` [probes, features] to `targets` [probes, outputs].

    In the dual form, whose matrix is only [probes, probes]. `ridge` is relative to the mean squared length of features.
    """
    gram = features @ features.T
    scale = gram.diagonal().mean() + 1e-6
    factor = torch.linalg.cholesky(gram / scale + ridge * torch.eye(len(gram), device=gram.device))
    return torch.cholesky_solve(targets, factor).T @ features / scale


def position_functions(height: int, width: int) -> Tensor:
    """Products of cosines at the positions of a kernel, [height * width, FREQUENCIES ** 2]."""

    def cosines(side: int) -> Tensor:
        angles = (torch.arange(side) + 0.5) / side * math.pi
        return torch.cos(angles[:, None] * torch.arange(FREQUENCIES))

    return torch.einsum("ym,xn->yxmn", cosines(height), cosines(width)).reshape(height * width, -1)


def unfold(layer: Layer, inputs: Tensor) -> Tensor:
    """The patches that a convolution sees, [N, inputs of a neuron, positions]."""
    padding = layer.options["padding"]
    if isinstance(padding, str):
        raise ValueError(f"{layer.name}: padding={padding!r} is not supported in the last layer; give a number")
    return F.unfold(inputs, layer.shape[2:], layer.options["dilation"], padding, layer.options["stride"])


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


class FlatSynthesizer(nn.Module):
    """A synthesiser for one architecture with the interface of the diffusion models: flat weights in and out."""

    def __init__(self, synthesizer: GraphWeightSynthesizer, module: nn.Module):
        super().__init__()
        self.synthesizer, self.seconds = synthesizer, synthesizer.seconds
        self.graph = ComputationGraph(module)

    @torch.inference_mode()
    def forward(self, weights: Tensor, step: Tensor) -> Tensor:
        """The next weights, [batch, parameters], of `weights` [batch, parameters] at `step` [batch]."""
        sizes = [parameter.numel() for parameter in self.graph.parameters.values()]
        rows = []
        for row, index in zip(weights, step.tolist(), strict=True):
            parts = zip(self.graph.parameters.items(), row.split(sizes), strict=True)
            written = self.synthesizer(self.graph, {name: part.view_as(like) for (name, like), part in parts}, index)
            rows.append(torch.cat([written[name].reshape(-1) for name in self.graph.parameters]))
        return torch.stack(rows)
