"""Which of many candidates to keep: those that, one after another, say most about the labels."""

import torch
from torch import Tensor

RIDGE = 1e-3  # below which what is new in a candidate is rounding
ALIKE = 1e-4  # a share of the gain: of those within it the first is chosen, not the one that rounding says
LEAST = 1e-2  # deviation of a candidate, in units of the mean: below it is rounding, and not to be scaled up


def forward_selection(activations: Tensor, targets: Tensor, count: int) -> Tensor:
    """The `count` columns of `activations` [n, candidates] that, one after another, explain most of `targets` [n, k]
    beyond what those before them do: their indices.

    Forward orthogonal least squares (Chen, Cowan and Grant 1991), as a pivoted Cholesky factorisation of the
    candidates' correlations.
    """
    x = activations - activations.mean(0)
    deviation = x.std(0)
    x = x / deviation.clamp(min=LEAST * deviation.mean() + 1e-6)
    correlations = x.T @ x / len(x)
    left = x.T @ (targets - targets.mean(0)) / len(x)  # what each says of the targets beyond those that are chosen
    correlations.diagonal().add_(RIDGE)
    variances = correlations.diagonal().clone()
    factor = x.new_zeros(min(count, x.shape[1]), x.shape[1])
    chosen, free = [], torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    for step in range(len(factor)):
        gain = left.square().sum(1) / variances.clamp(min=1e-9)
        gain = torch.where(variances < 2 * RIDGE, -variances.new_ones(()) / 2, gain).masked_fill(~free, -1)
        most = gain.max()
        best = (gain >= most - ALIKE * most.abs()).byte().argmax()  # the first one
        free[best] = False
        chosen.append(best)
        root = variances[best].clamp(min=1e-9).sqrt()
        row = (correlations[best] - factor[:step, best] @ factor[:step]) / root
        left = left - row[:, None] * (left[best] / root)
        variances = variances - row.square()
        factor[step] = row
    return torch.stack(chosen)
