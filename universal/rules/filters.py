"""Rules for what reads windows of maps, or tokens: directions among the rows that reach a layer."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WHITENING = 0.1  # what is added to the variance of each principal direction, in units of the mean variance
FROM_MEANS = 0.25  # the share of the directions that lie between the classes' means
ROUNDS = 6  # of k-means


class Rows(NamedTuple):
    """What reaches a layer at some places of some images, with the classes of these."""

    values: Tensor  # [n, features]
    labels: Tensor  # [n]
    classes: int


def directions(rows: Rows, count: int, both_signs: bool, generator: torch.Generator) -> Tensor:
    """So many directions [count, features]: principal ones of the whitened rows, the largest first, each with both signs
    if these say different things; differences between the classes' means; and the rest by spherical k-means."""
    values = rows.values - rows.values.mean(0)
    variances, vectors = torch.linalg.eigh((values.T @ values / len(values)).double())
    variances, vectors = variances.flip(0).clamp(min=0).float(), vectors.flip(1).float()
    inverse_root = (variances + WHITENING * variances.mean() + 1e-12).rsqrt()
    from_means = int(FROM_MEANS * count) if count >= 8 else 0
    rank = int((variances > 1e-5 * variances[0]).sum())
    principal = min((count - from_means) // (1 + both_signs), rank)
    main = (vectors[:, :principal] * inverse_root[:principal]).T
    found = [main, -main] if both_signs else [main]
    left = count - principal * (1 + both_signs)
    if left:
        whiten = (vectors * inverse_root) @ vectors.T
        white = values @ whiten
        means = mixtures_of_means(Rows(white, rows.labels, rows.classes), min(from_means, left), generator)
        found.append(torch.cat([means, spherical_k_means(white, left - len(means), generator)]) @ whiten)
    return torch.cat(found)[:count]


def mixtures_of_means(rows: Rows, count: int, generator: torch.Generator) -> Tensor:
    """Random mixtures of the differences between the classes' means, [count, features], of length 1."""
    members = F.one_hot(rows.labels, rows.classes).to(rows.values)
    means = members.T @ rows.values / members.sum(0).clamp(min=1)[:, None]
    mixing = torch.randn(count, rows.classes, generator=generator).to(means)
    return F.normalize(mixing @ (means - means.mean(0)), dim=1)


def spherical_k_means(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Directions [count, features] that rows cluster around; short rows are left out."""
    length = rows.norm(dim=1)
    rows = F.normalize(rows[length >= length.median() * 0.5], dim=1)
    centres = rows[torch.randint(len(rows), (count,), generator=generator).to(rows.device)]
    for _ in range(ROUNDS if count else 0):
        nearest = (rows @ centres.T).argmax(1)
        centres = F.normalize(F.one_hot(nearest, count).to(rows).T @ rows + 1e-6 * centres, dim=1)
    return centres
