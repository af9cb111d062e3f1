"""What resembles a trained weight in some respect and was never trained: null models, and the inits of the field."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def shuffled(w: Tensor) -> Tensor:
    return w.flatten()[torch.randperm(w.numel())].view_as(w)


def scales_of(w: Tensor, rounds: int = 5) -> tuple[Tensor, Tensor]:
    """The scales of rows, [rows, 1], and of columns, [1, columns], without which all have a mean square of 1."""
    rows, columns = w.new_ones(w.shape[0], 1), w.new_ones(1, w.shape[1])
    for _ in range(rounds):
        rows = (w / columns).square().mean(1, keepdim=True).sqrt() + 1e-12
        columns = (w / rows).square().mean(0, keepdim=True).sqrt() + 1e-12
    return rows, columns


def shuffled_within_scales(w: Tensor) -> Tensor:
    """The entries shuffled after the scales of rows and columns have been taken off, which come back."""
    rows, columns = scales_of(w)
    return shuffled(w / rows / columns) * rows * columns


def same_spectrum(w: Tensor) -> Tensor:
    """The singular values of `w` with random singular vectors."""
    values = torch.linalg.svdvals(w)
    left, right = (torch.linalg.qr(torch.randn(size, len(values)))[0].to(w) for size in w.shape)
    return left * values @ right.T


def random_orthogonal(w: Tensor) -> Tensor:
    """Singular values of 1 and random singular vectors."""
    left, _, right = torch.linalg.svd(torch.randn_like(w), full_matrices=False)
    return left @ right


# [rows, columns] -> the same shape, from the global generator of torch.
NULL_MODELS: dict[str, Callable[[Tensor], Tensor]] = {
    "Gaussian": torch.randn_like,
    "uniform": lambda w: torch.rand_like(w) - 0.5,
    "entries shuffled": shuffled,
    "shuffled within scales": shuffled_within_scales,
    "same spectrum": same_spectrum,
    "random orthogonal": random_orthogonal,
}
INITS: dict[str, Callable[[Tensor], Tensor]] = {
    "PyTorch's default": lambda w: nn.init.kaiming_uniform_(torch.empty_like(w), a=5**0.5),
    "Kaiming normal": lambda w: nn.init.kaiming_normal_(torch.empty_like(w)),
    "truncated normal": lambda w: nn.init.trunc_normal_(torch.empty_like(w), std=0.02, a=-0.04, b=0.04),
    "orthogonal": lambda w: nn.init.orthogonal_(torch.empty_like(w)),
}
UNTRAINED = NULL_MODELS | INITS
