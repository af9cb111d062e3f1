"""The probability that a weight matrix was trained, from its signature."""

import functools
import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripting import UserError, load_file, refused_as
from universal.signatures.statistics import SCORED

SCORER = Path(__file__).resolve().parent / "scorer.pth"
MAKER = "python -m universal.signatures.train"
LARGEST = 6.0  # deviations: a statistic further out says no more


class Scorer(nn.Module):
    """Signatures [n, statistics] -> logits of having been trained, [members, n].

    An MLP for each of the `families` of networks, its member, which was taught with all the others and never saw it.
    `certainty` [sizes] is how often members were right about matrices of their families of 4, 8, 16, ... entries.
    """

    def __init__(self, families: list[str], hidden: int = 48):
        super().__init__()
        self.settings = {"families": families, "hidden": hidden}
        self.register_buffer("mean", torch.zeros(len(SCORED)))
        self.register_buffer("deviation", torch.ones(len(SCORED)))
        self.register_buffer("certainty", torch.full((24,), 0.5))
        sizes = [len(SCORED), hidden, hidden, 1]
        self.weights = nn.ParameterList(
            torch.randn(len(families), inputs, outputs) * math.sqrt((2 if outputs > 1 else 0.1) / inputs)
            for inputs, outputs in itertools.pairwise(sizes)
        )
        self.biases = nn.ParameterList(torch.zeros(len(families), 1, outputs) for outputs in sizes[1:])

    @property
    def families(self) -> list[str]:
        return self.settings["families"]

    def forward(self, signatures: Tensor) -> Tensor:
        x = ((signatures - self.mean) / self.deviation).clamp(-LARGEST, LARGEST)
        x = x.expand(len(self.families), *x.shape)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, F.silu(x) if layer else x, weight)
        return x[..., 0]

    @torch.no_grad()
    def judge(self, signature: dict[str, float]) -> dict[str, float]:
        """`score`, the mean probability over the members; `spread`, their standard deviation; and `certainty`."""
        probabilities = self(as_tensor([signature]).to(self.mean)).sigmoid()[:, 0]
        size = math.log2(signature["rows"] * signature["columns"]) - 2
        size = min(max(size, 0.0), len(self.certainty) - 1.001)
        below, above = self.certainty[int(size)].item(), self.certainty[int(size) + 1].item()
        return {
            "score": probabilities.mean().item(),
            "spread": probabilities.std(correction=0).item(),
            "certainty": below + (size - int(size)) * (above - below),
        }


def as_tensor(signatures: list[dict[str, float]]) -> Tensor:
    """[signatures, statistics], what a scorer reads of them."""
    return torch.tensor([[signature[name] for name in SCORED] for signature in signatures])


def score(signature: dict[str, float]) -> float:
    """The probability, in [0, 1], that a matrix with this `signature` was trained, by the committed scorer.

    It is meant as between one trained matrix and one that was not: an untrained one is no rarer than a trained one.
    """
    return committed_scorer().judge(signature)["score"]


@functools.cache
def committed_scorer() -> Scorer:
    return load_scorer()


def load_scorer(path: Path = SCORER) -> Scorer:
    """The scorer saved at `path`. Raises UserError if there is none, or it is damaged or of other statistics."""
    content = load_file(path, maker=MAKER)
    with refused_as(f"{path}: not a scorer of signatures, or damaged: make it again with {MAKER}"):
        if tuple(content["statistics"]) != SCORED:
            raise UserError(f"{path}: a scorer of other statistics: make it again with {MAKER}")
        scorer = Scorer(**content["settings"])
        scorer.load_state_dict(content["state_dict"])
    return scorer.eval()
