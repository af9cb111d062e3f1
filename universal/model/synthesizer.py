"""The universal synthesiser: it writes weights for any architecture, from that network's own random init.

Design document, sections 4.1.1 and 4.1.3. It is a mixture of experts that are merged softly (Muqeet et al. 2023, arXiv
2306.03745): a router says from the layers of a network how much of each expert's parameters it gets, and the one expert
that these make writes the network (`universal.model.expert`).
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from scripting import UserError, load_file, save_tensors
from universal.mnist import IMAGE_SHAPE
from universal.model.balance import balance
from universal.model.description import DESCRIPTION, description_of
from universal.model.expert import Expert
from universal.model.looking import DoubtfulWeights, doubt
from universal.model.sizes import bounded
from universal.model.task import Task
from universal.model.tuning import Tuning
from universal.model.weights import TUNABLE
from universal.reading.graph import ComputationGraph

SYNTHESIZER = Path(__file__).resolve().parents[1] / "synthesizer.pth"
MAKER = "python -m universal.train"
LEAST_SHARE = 1e-3  # of an expert, to be worth its time
VERSION = 8  # of the files; others are refused


class Unwritable(ValueError):
    """What would have been written as NaN or infinite weights."""


class Accounts(NamedTuple):
    """Every parameter and buffer of a network, by name: those that were written, and those left at their init.

    Those of which only a part is used are both. `count` is how many numbers were written.
    """

    written: list[str]
    left: list[str]
    count: int


class GraphWeightSynthesizer(nn.Module):
    """(graph, current weights, step, task) -> new weights, equivariant to permutations of hidden neurons.

    Each of its `experts` has learned its own task, MNIST, with so many `probes`, of which networks with convolutions,
    where each costs more, only see the first `convolution_probes`; `shape` is that of the inputs and `classes` the most
    that a network may have, `dimension` the size of a neuron's embedding, `concepts` that of the space in which hidden
    linear neurons get their targets, `rank` the number of mixed position functions in a kernel, `hidden` the width of
    every MLP; `tunable` gives it the numbers of `universal.model.tuning`.
    """

    def __init__(
        self,
        probes: int = 300,
        convolution_probes: int = 128,
        classes: int = 10,
        dimension: int = 96,
        concepts: int = 96,
        rank: int = 32,
        hidden: int = 512,
        tunable: bool = False,
        experts: int = 1,
        shape: Sequence[int] = IMAGE_SHAPE,
    ):
        super().__init__()
        sizes = {
            "probes": probes, "convolution_probes": convolution_probes, "classes": classes, "dimension": dimension,
            "concepts": concepts, "rank": rank, "hidden": hidden, "shape": tuple(shape),
        }  # fmt: skip
        self.settings = sizes | {"tunable": tunable, "experts": experts}
        self.seconds: dict[str, float] = {}  # what making it cost, as the diffusion models have it
        self.tuning = Tuning(TUNABLE) if tunable else None
        self.experts = nn.ModuleList(Expert(**sizes, tuning=self.tuning) for _ in range(experts))
        self.router = nn.Linear(DESCRIPTION, experts)
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)

    def forward(
        self, graph: ComputationGraph, weights: dict[str, Tensor], step: int = 0, task: Task | None = None
    ) -> dict[str, Tensor]:
        """New weights for `graph`, by name, from its current `weights`. `step` 0 starts from a random init.

        Raises ValueError if the graph takes other inputs than the task has, or has more classes.
        """
        first, *others = self.experts
        if not others:
            return first(graph, weights, step, task)
        return functional_call(first, self.merged(self.shares(graph, step)), (graph, weights, step, task))

    @property
    def task(self) -> Task:
        """What the first expert has learned of MNIST."""
        return self.experts[0].task

    def shares(self, graph: ComputationGraph, step: int = 0) -> Tensor:
        """How much of each expert's parameters a network gets, [experts]; they sum to 1."""
        return self.router(self.description(graph, step)).softmax(0)

    def description(self, graph: ComputationGraph, step: int = 0) -> Tensor:
        """What the router knows of a network, [DESCRIPTION]: the mean of what its layers are."""
        layers = torch.stack([description_of(layer, graph, step) for layer in graph.layers])
        return layers.mean(0).to(self.router.weight)

    def merged(self, shares: Tensor) -> dict[str, Tensor]:
        """The parameters of one expert, by name: the experts' means, weighted by their `shares`.

        Where nothing learns from it, experts with hardly any share are left out.
        """
        chosen = zip(shares, self.experts, strict=True)
        if not torch.is_grad_enabled():
            chosen = ((share, expert) for share, expert in chosen if share >= LEAST_SHARE)
        (total, first), *others = chosen
        merged = dict(first.named_parameters())
        for share, expert in others:
            total = total + share
            part = share / total.clamp(min=1e-30)  # all shares so far may have come to 0
            for name, parameter in expert.named_parameters():
                merged[name] = torch.lerp(merged[name], parameter, part)
        return merged

    @torch.no_grad()
    def write(self, module: nn.Module, seed: int | None = None, steps: int = 1) -> Accounts:
        """Write the weights of `module` in place, in `steps` generative steps; which they are, and which are not.

        They are made from the weights that it has, or with `seed` from a fresh random init. Warns of DoubtfulWeights
        if the network is then at chance on the probes, gives NaN or has a dead layer. Raises ValueError if the module
        cannot be read (`ComputationGraph`), has too many classes, holds NaN or makes NaN of the probes, or if there are
        no `steps`, and TypeError if it is no module.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"a {type(module).__name__} cannot be written: give a torch.nn.Module")
        if steps < 1:
            raise ValueError(f"{steps} steps write nothing: give 1 or more")
        example = None if self.settings["shape"] == IMAGE_SHAPE else self.task.probes
        graph = ComputationGraph(module, example)
        accounts = self.fill(graph, seed, steps)
        doubtful = doubt(graph, self.task, self.experts[0].probes_for(graph))
        if doubtful is not None:
            warnings.warn(doubtful, DoubtfulWeights, stacklevel=3)  # past no_grad
        return accounts

    @torch.no_grad()
    def fill(self, graph: ComputationGraph, seed: int | None = None, steps: int = 1) -> Accounts:
        """`write` the weights of the module whose graph this is."""
        weights = graph.weights() | ({} if seed is None else random_weights(graph, seed))
        weights = {name: tensor.to(self.router.weight) for name, tensor in weights.items()}
        state = graph.state()
        names = [name for name in graph.written if name in weights]
        for name in names:
            if state[name].is_inference() and not torch.is_inference_mode_enabled():
                raise ValueError(f"{name}: was made in inference mode and cannot be written: make it outside")
            if not weights[name].isfinite().all():
                raise ValueError(f"{name}: holds NaN or infinite weights")
        try:
            for step in range(steps):
                weights |= self(graph, weights, step)
            weights = balance(graph, weights, self.task.probes)
            learned = dict(graph.module.named_parameters())
            weights |= {name: bounded(weights[name]) for name in names if name in learned}
            broken = next((name for name in names if not weights[name].isfinite().all()), None)
        except torch.linalg.LinAlgError:  # of NaN
            broken = graph.layers[0].name
        if broken is not None:
            raise Unwritable(
                f"{broken}: cannot be written: the network makes NaN or infinite values of the synthesiser's images, "
                "whose pixels are not within the bounds of real ones: has it a root or a logarithm of them?"
            )
        for name in graph.written:
            state[name].copy_(weights.get(name, torch.ones(())))  # of batches, a norm has seen one: that of the probes
        return Accounts(graph.with_tied(graph.written), graph.with_tied(graph.left), graph.count)

    def synthesize(self, module: nn.Module, seed: int | None = None, steps: int = 1) -> nn.Module:
        """`write` the weights of `module` in place, and return it."""
        self.write(module, seed, steps)
        return module


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
    """Matrices, kernels and images as whole numbers from -127 to 127, and the scale of each of their rows, [rows].

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


def load_synthesizer(path: Path = SYNTHESIZER, device: torch.device | str = "cpu") -> GraphWeightSynthesizer:
    """The synthesiser saved at `path`, the one of this repository by default, in evaluation mode.

    Raises UserError if the file is missing, broken, of another kind or of another version.
    """
    content = load_file(path, maker=MAKER)
    if not is_synthesizer(content):
        raise UserError(f"{path}: not a saved synthesiser: make one with {MAKER}")
    version = content.get("version")
    if version != VERSION:
        raise UserError(
            f"{path}: a synthesiser of version {version}, but this code reads version {VERSION}: "
            f"make it again with {MAKER}"
        )
    try:
        synthesizer = GraphWeightSynthesizer(**content["settings"])
        synthesizer.load_state_dict(in_full(content["state_dict"], content["scales"]))
        synthesizer.seconds = {name: float(seconds) for name, seconds in content["seconds"].items()}
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: a damaged synthesiser: make it again with {MAKER}") from error
    if not all(tensor.isfinite().all() for tensor in synthesizer.state_dict().values()):
        raise UserError(f"{path}: holds NaN or infinite weights: make it again with {MAKER}")
    return synthesizer.to(device).eval()


def is_synthesizer(content) -> bool:
    """Whether a loaded file is a synthesiser's, of whatever version."""
    return isinstance(content, dict) and content.get("model") == GraphWeightSynthesizer.__name__
