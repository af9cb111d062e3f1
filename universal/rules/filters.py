"""Rules for what reads windows of maps, or tokens: directions among the rows that reach a layer."""

import torch
import torch.nn.functional as F
from torch import Tensor

WHITENING = 0.1  # what is added to the variance of each principal direction, in units of the mean variance
ROUNDS = 6  # of k-means


def directions(rows: Tensor, count: int, both_signs: bool, generator: torch.Generator) -> Tensor:
    """So many directions [count, features] of rows [n, features]: principal ones of the whitened rows, the largest first,
    each with both signs if these say different things; and the rest by spherical k-means."""
    values = rows - rows.mean(0)
    variances, vectors = torch.linalg.eigh((values.T @ values / len(values)).double())
    variances, vectors = variances.flip(0).clamp(min=0).float(), vectors.flip(1).float()
    inverse_root = (variances + WHITENING * variances.mean() + 1e-12).rsqrt()
    rank = int((variances > 1e-5 * variances[0]).sum())
    principal = min(-(-count // (1 + both_signs)), rank)
    found = (vectors[:, :principal] * inverse_root[:principal]).T
    found = torch.cat([found, -found])[:count] if both_signs else found
    left = count - len(found)
    if left:
        whiten = (vectors * inverse_root) @ vectors.T
        found = torch.cat([found, spherical_k_means(values @ whiten, left, generator) @ whiten])
    return found


def spherical_k_means(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Directions [count, features] that rows cluster around; short rows are left out."""
    length = rows.norm(dim=1)
    rows = F.normalize(rows[length >= length.median() * 0.5], dim=1)
    centres = rows[torch.randint(len(rows), (count,), generator=generator).to(rows.device)]
    for _ in range(ROUNDS if count else 0):
        nearest = (rows @ centres.T).argmax(1)
        centres = F.normalize(F.one_hot(nearest, count).to(rows).T @ rows + 1e-6 * centres, dim=1)
    return centres
