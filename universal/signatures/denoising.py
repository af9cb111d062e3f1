"""Denoisers of weight matrices: four classical ones, and a learned one that is equivariant to permutations.

All take `noisy` matrices [n, rows, columns], of a mean square of 1 before noise of deviation `sigma` was added, and
return the estimate of what they were.
"""

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripting import load_file, refused_as
from universal.signatures.matrices import batch_of

DENOISER = Path(__file__).resolve().parent / "denoiser.pth"
LARGEST = 8.0  # of what exchangeable layers see: a few huge entries would lead them where they have never been
EVALUATED_SIGMAS = (0.25, 0.5, 1.0)
EVALUATED_SIDE = 128
MAKER = "python -m universal.signatures.diffusion"


def wiener(noisy: Tensor, sigma: float) -> Tensor:
    """The best linear estimate of entries that know nothing of each other."""
    return noisy / (1 + sigma**2)


def shrunk(values: Tensor, sigma: float, rows: int, columns: int) -> Tensor:
    """Singular values [n, min(rows, columns)], shrunk as is best for the Frobenius loss (Gavish and Donoho 2017)."""
    short, long = sorted((rows, columns))
    beta, scale = short / long, sigma * math.sqrt(long)
    x = values / scale
    kept = ((x.square() - beta - 1).square() - 4 * beta).clamp(min=0).sqrt() / x.clamp(min=1e-6)
    return kept * (x > 1 + math.sqrt(beta)) * scale


def singular_values(noisy: Tensor, sigma: float) -> Tensor:
    """Optimal shrinkage of the singular values."""
    left, values, right = torch.linalg.svd(noisy, full_matrices=False)
    return left * shrunk(values, sigma, *noisy.shape[1:])[:, None] @ right


def scales(noisy: Tensor, sigma: float) -> Tensor:
    """The variance of each entry: that of its row times that of its column."""
    squares = noisy.square()
    means = (squares.mean(axes, keepdim=True) - sigma**2 for axes in (2, 1, (1, 2)))
    rows, columns, everywhere = (mean.clamp(min=1e-3) for mean in means)
    return rows * columns / everywhere


def of_variance(variance: Tensor, noisy: Tensor, sigma: float) -> Tensor:
    """The best linear estimate of entries of this variance."""
    return noisy * variance / (variance + sigma**2)


def rows_and_columns(noisy: Tensor, sigma: float) -> Tensor:
    """Wiener with a variance for every entry, that of its row times that of its column."""
    return of_variance(scales(noisy, sigma), noisy, sigma)


def with_rest(spikes: Tensor, noisy: Tensor, sigma: float) -> Tensor:
    """An estimate, and Wiener for what it leaves."""
    rest = noisy - spikes
    return spikes + of_variance((rest.square().mean((1, 2), keepdim=True) - sigma**2).clamp(min=0), rest, sigma)


def spikes_and_rest(noisy: Tensor, sigma: float) -> Tensor:
    """Optimal shrinkage of the singular values, and Wiener for what it leaves."""
    return with_rest(singular_values(noisy, sigma), noisy, sigma)


CLASSICAL: dict[str, Callable[[Tensor, float], Tensor]] = {
    "Wiener": wiener,
    "singular values": singular_values,
    "rows and columns": rows_and_columns,
    "spikes and rest": spikes_and_rest,
}


class Exchangeable(nn.Module):
    """A layer on [n, rows, columns, features], equivariant to permutations of both (Hartford et al. 2018)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.own = nn.Linear(inputs, outputs)
        self.row, self.column, self.all = (nn.Linear(inputs, outputs, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.mean(2, keepdim=True), x.mean(1, keepdim=True)
        return self.own(x) + self.row(rows) + self.column(columns) + self.all(rows.mean(1, keepdim=True))


class Denoiser(nn.Module):
    """(noisy [n, rows, columns], sigma) -> estimate of the same shape, for any shape.

    Candidates mixed entry by entry: the noisy matrix, the classical estimates, and the singular vectors under values
    that are learned from the values and the spectrum around them. Which share of each an entry takes, exchangeable
    layers say, which see all candidates, the noise level and the shape. It starts as the classical estimate by rows and
    columns. Transposing the matrix transposes the estimate, up to what the layers make of rows and columns.
    """

    def __init__(self, width: int = 32, layers: int = 3, hidden: int = 64):
        super().__init__()
        self.settings = {"width": width, "layers": layers, "hidden": hidden}
        self.spectral = nn.Sequential(
            nn.Linear(8, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 2)
        )
        features, candidates = 13, 6
        sizes = [features, *[width] * layers]
        self.layers = nn.ModuleList(Exchangeable(a, b) for a, b in itertools.pairwise(sizes))
        self.out = nn.Linear(width, candidates)
        for last in (self.spectral[-1], self.out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, noisy: Tensor, sigma: float) -> Tensor:
        rows, columns = noisy.shape[1:]
        total = math.sqrt(1 + sigma**2)
        scaled = noisy / total
        variance = scales(noisy, sigma)
        start = of_variance(variance, noisy, sigma)
        # In units in which the entries have, as far as is known, all the same variance, shrinking is best.
        spread = (variance + sigma**2).sqrt()
        low_rank, learned = self.reconstructions(noisy, sigma)
        even = [part * spread for part in self.reconstructions(noisy / spread, sigma / total)]
        spikes = with_rest(low_rank, noisy, sigma)
        known = math.log(sigma), math.log(rows / columns), math.log(rows * columns) / 4 - 2
        x = torch.stack([
            scaled, scaled.square().clamp(max=30), scaled.abs(), low_rank, learned, *even, start, spikes,
            (variance + 1e-3).log(), *(torch.full_like(scaled, number) for number in known),
        ], -1)  # fmt: skip
        h = F.gelu(self.layers[0](x.clamp(-LARGEST, LARGEST)))
        for layer in self.layers[1:]:
            h = h + F.gelu(layer(h))
        shares = 0.3 * self.out(h)
        others = torch.stack([scaled / total, low_rank, learned, *even, spikes], -1)
        return start + (shares * (others - start[..., None])).sum(-1)

    def reconstructions(self, noisy: Tensor, sigma: float) -> list[Tensor]:
        """The matrix with optimally shrunk, and with learned singular values."""
        with torch.no_grad():
            left, values, right = torch.linalg.svd(noisy, full_matrices=False)
            best = shrunk(values, sigma, *noisy.shape[1:])
            kept = best / values.clamp(min=1e-6)
        short, long = sorted(noisy.shape[1:])
        places = torch.linspace(0, 1, short).to(values).expand_as(values)
        edge = sigma * (math.sqrt(short) + math.sqrt(long))
        mean = values.square().mean(1, keepdim=True).sqrt()
        constant = torch.ones_like(values)
        x = torch.stack([
            (values / edge).clamp(max=20).log1p(), kept, places, values / mean,
            mean / edge * constant, math.log(sigma) * constant, short / long * constant,
            (values[:, :1] / edge).log1p() * constant,
        ], -1)  # fmt: skip
        gain, offset = self.spectral(x).unbind(-1)
        learned = values * torch.sigmoid(torch.logit(kept.clamp(0.02, 0.98)) + gain) * (1 + 0.1 * offset)
        return [left * one[:, None] @ right for one in (best, learned)]


def errors(estimates: Tensor, clean: Tensor) -> Tensor:
    """Mean squared errors, [n]."""
    return (estimates - clean).square().mean((1, 2))


@torch.inference_mode()
def held_out_errors(denoiser: Denoiser, matrices: list[Tensor], sigma: float, most: int) -> dict[str, float]:
    """Mean squared errors over pieces of `most` matrices of a family, by method, the denoiser's as "learned"."""
    draw = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    device = next(denoiser.parameters()).device
    chosen = draw.sample(matrices, min(most, len(matrices)))
    total = dict.fromkeys([*CLASSICAL, "learned"], 0.0)
    for matrix in chosen:
        clean = batch_of([matrix], EVALUATED_SIDE, EVALUATED_SIDE, draw)
        noisy = (clean + sigma * torch.randn(clean.shape, generator=generator)).to(device)
        for name, method in (CLASSICAL | {"learned": denoiser}).items():
            total[name] += errors(method(noisy, sigma), clean.to(device)).item() / len(chosen)
    return total


def against_best(found: dict[str, float]) -> float:
    """The learned method's error over that of the best classical one."""
    return found["learned"] / min(found[name] for name in CLASSICAL)


def load_denoiser(path: Path = DENOISER) -> Denoiser:
    """The denoiser saved at `path`. Raises UserError if there is none, or it is damaged."""
    content = load_file(path, maker=MAKER)
    with refused_as(f"{path}: not a denoiser of weights, or damaged: make it again with {MAKER}"):
        denoiser = Denoiser(**content["settings"])
        denoiser.load_state_dict(content["state_dict"])
    return denoiser.eval()
