"""The universal synthesiser: what is learned, over many data sets and architectures, of writing layers.

Design document, sections 4.1.1 and 4.1.3. It writes convolutions, from a few labelled images and the network's own
random init (`universal.model.writing`). All else is written in closed form (`universal.rules`).
"""

import math
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripting import UserError, load_file, save_tensors
from universal.model.description import DESCRIPTION, FREQUENCIES, AcrossNeurons, ConditionedMLP, mlp
from universal.model.neurons import Roles
from universal.model.tuning import Tuning
from universal.model.weights import Writer
from universal.model.writing import Probes
from universal.reading.calls import Layer
from universal.reading.graph import ComputationGraph

SYNTHESIZER = Path(__file__).resolve().parents[1] / "synthesizer.pth"
MAKER = "python -m universal.train"
VERSION = 11  # of the files; others are refused
LEARNED_CHANNELS = 3  # of inputs, whose keys are learned; what further ones, of tables and signals, are is only random


class GraphWeightSynthesizer(nn.Module):
    """The learned parts, by which `universal.model.writing.LearnedLayers` writes the layers of a network.

    `dimension` is the size of a neuron's embedding, `concepts` how many classes are told apart, `rank` the number of
    mixed position functions in a kernel, `hidden` the width of every MLP; `tunable` gives it the numbers of
    `universal.model.tuning`.
    """

    def __init__(
        self, dimension: int = 96, concepts: int = 96, rank: int = 32, hidden: int = 512, tunable: bool = False
    ):
        super().__init__()
        sizes = {"dimension": dimension, "concepts": concepts, "rank": rank, "hidden": hidden}
        self.settings = sizes | {"tunable": tunable}
        self.tuning = Tuning() if tunable else None
        self.seconds: dict[str, float] = {}  # what making it cost, as the diffusion models have it
        self.describe = mlp(DESCRIPTION, hidden, dimension)
        self.neurons = Roles(dimension, hidden)
        self.writer = Writer(dimension, hidden, rank, concepts)
        self.image_keys = nn.Parameter(torch.randn(LEARNED_CHANNELS, dimension))
        self.place_key = nn.Linear(FREQUENCIES**2, dimension, bias=False)
        self.key = ConditionedMLP(dimension, dimension, hidden, dimension)
        self.key_norm = nn.Sequential(nn.LayerNorm(dimension), AcrossNeurons())
        self.seen = nn.Linear(dimension, dimension, bias=False)
        nn.init.zeros_(self.seen.weight)
        self.class_responses = nn.Linear(concepts, dimension, bias=False)

    def probes(self, images: Tensor, one_hot: Tensor) -> Probes:
        """Labelled images [n, *shape], of classes [n, classes], as layers are written from them.

        Classes come in the order of how large their mean images are, whatever their numbers.
        """
        concepts = self.settings["concepts"]
        flat, counts = images.flatten(1).double(), one_hot.sum(0).double()
        means = (one_hot.double().T @ flat) / counts[:, None].clamp(min=1)
        place = means.square().sum(1).argsort().argsort() % concepts
        slots = one_hot @ F.one_hot(place, concepts).to(one_hot)
        responses = self.class_responses(slots - slots.mean(0)) / math.sqrt(len(images))
        return Probes(images, 3 * slots, responses)

    def keys_of_inputs(self, channels: int) -> Tensor:
        """The keys of the inputs' channels, [channels, dimension]."""
        generator = torch.Generator().manual_seed(0)
        shape = (max(0, channels - LEARNED_CHANNELS), self.image_keys.shape[1])
        more = torch.randn(shape, dtype=torch.float32, generator=generator)
        return torch.cat([self.image_keys[:channels], more.to(self.image_keys)])


def trunk_end(graph: ComputationGraph) -> Layer:
    """The first layer behind all that read windows of maps or tokens, or groups of channels: it reads one vector of
    each image, or is the last."""
    of_maps = (
        place
        for place, layer in enumerate(graph.layers)
        if not layer.last and (layer.resolution > 1 or layer.groups > 1)
    )
    behind = graph.layers[max(of_maps, default=-1) + 1 :]
    return behind[0] if behind else graph.last


def random_weights(graph: ComputationGraph, seed: int) -> dict[str, Tensor]:
    """PyTorch's default init of all layers of `graph`, by name, from `seed`: uniform within 1 / sqrt(fan-in)."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    own = graph.weights()
    for layer in graph.layers:
        bound = 1 / math.sqrt(math.prod(layer.shape[1:]))
        for part, shape in ((layer.weight, layer.shape), (layer.bias, layer.shape[:1])):
            if part is not None:
                values = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
                part.put(weights, values, own)
    return weights


def fresh_init(graph: ComputationGraph, seed: int, device: torch.device) -> dict[str, Tensor]:
    """All weights of `graph`, by name, on a device: `random_weights`, and others as the module has them."""
    init = graph.weights() | random_weights(graph, seed)
    return {name: tensor.to(device) for name, tensor in init.items()}


# ---- files ----------------------------------------------------------------------------------------------------------


def save_synthesizer(synthesizer: GraphWeightSynthesizer, path: Path) -> None:
    """Save a synthesiser with all that rebuilds it, in 8 bits. Raises UserError if `path` cannot be written."""
    state, scales = in_8_bits(synthesizer.state_dict())
    content = {
        "model": type(synthesizer).__name__,
        "version": VERSION,
        "settings": synthesizer.settings,
        "state_dict": state,
        "scales": scales,
        "seconds": synthesizer.seconds,
    }
    save_tensors(path, content)


def in_8_bits(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Matrices and kernels as whole numbers from -127 to 127, and the scale of each of their rows, [rows].

    Vectors, and rows that are hardly longer than a scale, stay as they are, in half precision.
    """
    saved, scales = {}, {}
    for name, tensor in state.items():
        if tensor.dim() < 2 or tensor[0].numel() < 16:
            saved[name] = tensor.half()
            continue
        scale = (tensor.flatten(1).abs().amax(1) / 127).clamp(min=1e-7).half()
        saved[name] = (tensor / per_row(scale, tensor)).round().clamp(-127, 127).to(torch.int8)
        scales[name] = scale
    return saved, scales


def in_full(saved: dict[str, Tensor], scales: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state that `in_8_bits` has made these of, in single precision."""
    state = {name: tensor.float() for name, tensor in saved.items()}
    return state | {name: state[name] * per_row(scale, state[name]) for name, scale in scales.items()}


def per_row(scale: Tensor, tensor: Tensor) -> Tensor:
    """`scale` [rows] in the shape that multiplies each row of `tensor` [rows, ...]."""
    return scale.float().view(-1, *[1] * (tensor.dim() - 1))


@cache
def default_synthesizer(device: torch.device) -> GraphWeightSynthesizer:
    """The one of this repository, loaded once for each device."""
    return load_synthesizer(device=device)


def load_synthesizer(
    path: Path = SYNTHESIZER, device: torch.device | str = "cpu", maker: str = MAKER
) -> GraphWeightSynthesizer:
    """The synthesiser saved at `path`, the one of this repository by default, in evaluation mode.

    `maker` is the command that makes such a file. Raises UserError if it is missing, broken, of another kind or of
    another version.
    """
    content = load_file(path, maker=maker)
    if not is_synthesizer(content):
        raise UserError(f"{path}: not a saved synthesiser: make one with {maker}")
    version = content.get("version")
    if version != VERSION:
        raise UserError(
            f"{path}: a synthesiser of version {version}, but this code reads version {VERSION}: "
            f"make it again with {maker}"
        )
    try:
        with torch.random.fork_rng(devices=[]):  # its random weights are replaced
            synthesizer = GraphWeightSynthesizer(**content["settings"]).float()  # whatever the default is
        synthesizer.load_state_dict(in_full(content["state_dict"], content["scales"]))
        synthesizer.seconds = {name: float(seconds) for name, seconds in content["seconds"].items()}
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: a damaged synthesiser: make it again with {maker}") from error
    if not all(tensor.isfinite().all() for tensor in synthesizer.state_dict().values()):
        raise UserError(f"{path}: holds NaN or infinite weights: make it again with {maker}")
    return synthesizer.to(device).eval()


def is_synthesizer(content) -> bool:
    """Whether a loaded file is a synthesiser's, of whatever version."""
    return isinstance(content, dict) and content.get("model") == GraphWeightSynthesizer.__name__
