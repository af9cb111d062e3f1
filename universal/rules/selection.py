"""Which of many candidates to keep: those that, one after another, say most about the labels."""

import torch
from torch import Tensor

from universal.model.algebra import gram

RIDGE = 1e-3  # below which what is new in a candidate is rounding
ALIKE = 1e-4  # a share of the gain: of those within it the first is chosen, not the one that rounding says
ONE_BY_ONE = 128  # neurons; of more, several are chosen at a time
LEAST = 1e-2  # deviation of a candidate, in units of the mean: below it is rounding, and not to be scaled up


def forward_selection(activations: Tensor, targets: Tensor, count: int) -> Tensor:
    """The `count` columns of `activations` [n, candidates] that, one after another, explain most of `targets` [n, k]
    beyond what those before them do: their indices. Of many, a few at a time.

    Forward orthogonal least squares (Chen, Cowan and Grant 1991), as a pivoted Cholesky factorisation of the
    candidates' correlations.
    """
    x = activations - activations.mean(0)
    deviation = x.std(0)
    x = x / deviation.clamp(min=LEAST * deviation.mean() + 1e-6)
    correlations = gram(x.T) / len(x)
    left = x.T @ (targets - targets.mean(0)) / len(x)  # what each says of the targets beyond those that are chosen
    correlations.diagonal().add_(RIDGE)
    variances = correlations.diagonal().clone()
    count = min(count, x.shape[1])
    factor, chosen = x.new_zeros(count, x.shape[1]), x.new_zeros(0, dtype=torch.long)
    while len(chosen) < count:
        gain = left.square().sum(1) / variances.clamp(min=1e-9)
        gain = torch.where(variances < 2 * RIDGE, -variances.new_ones(()) / 2, gain).index_fill(0, chosen, -1)
        alike = (gain / (gain.max().abs() * ALIKE + 1e-30)).round()
        step, size = len(chosen), min(1 + count // ONE_BY_ONE, count - len(chosen))
        best = alike.sort(descending=True, stable=True).indices[:size]  # of equal ones the first
        rows = correlations[best] - factor[:step, best].T @ factor[:step]
        root = torch.linalg.cholesky(rows[:, best])
        factor[step : step + size] = new = torch.linalg.solve_triangular(root, rows, upper=False)
        left = left - new.T @ torch.linalg.solve_triangular(root, left[best], upper=False)
        variances = variances - new.square().sum(0)
        chosen = torch.cat([chosen, best])
    return chosen
