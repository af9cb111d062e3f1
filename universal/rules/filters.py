"""Rules for what reads windows of maps, or tokens: directions among the rows, patches or tokens, that reach a layer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from universal.rules.numbers import Numbers

ROUNDS = 6  # of k-means
EXACT = 600  # features of which all principal directions are computed
CONSTANT = 1e-6  # a share of the largest variance, below which there is none but by rounding
CANDIDATES = 3  # for each neuron of which some are chosen


def principal(rows: Tensor, most: int, whitening: float) -> tuple[Tensor, Tensor]:
    """Principal directions of rows [n, features] along which these vary, the largest first and `most` at most,
    [directions, features]; and what whitens along each, with `whitening` times the mean variance added.
    """
    centred = rows - rows.mean(0)
    features = rows.shape[1]
    if features <= EXACT:
        variances, vectors = torch.linalg.eigh((centred.T @ centred / len(centred)).double())
        variances, vectors = variances.flip(0).clamp(min=0).to(rows), vectors.flip(1).to(rows)
    else:  # of thousands, few are wanted
        vectors, variances = first_axes(centred[: EXACT * 4], most)
    skew = (centred[: EXACT * 4] @ vectors).pow(3).sum(0)
    vectors = torch.where(skew < 0, -vectors, vectors)  # else it is any of two
    mean = centred.square().sum() / len(centred) / features
    most = min(most, max(int((variances > CONSTANT * variances[0]).sum()), 1))  # the others are any
    return vectors.T[:most], (variances[:most] + whitening * mean + 1e-12).rsqrt()


def first_axes(centred: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The first principal axes of centred rows [n, features], nearly, [features, axes]; and the variances along them.

    By random mixtures of rows (Halko, Martinsson and Tropp 2011). `torch.svd_lowrank` mixes features where these are
    fewer, so that their order would matter.
    """
    generator = torch.Generator().manual_seed(0)
    shape = len(centred), min(most, *centred.shape)
    mixtures = torch.randn(shape, dtype=torch.float32, generator=generator).to(centred)
    for _ in range(3):
        basis = torch.linalg.qr(centred.T @ mixtures)[0]
        mixtures = centred @ basis
    _, sizes, turns = torch.linalg.svd(mixtures, full_matrices=False)
    return basis @ turns.T, sizes.square() / len(centred)


def directions(
    rows: Tensor, count: int, both_signs: bool, numbers: Numbers, generator: torch.Generator
) -> Tensor:  # fmt: skip
    """So many directions [count, features] of rows: principal ones, whitened, the largest first, each with both signs
    if these say different things; and the rest by spherical k-means.

    None from the classes' means, which are noise in pictures where the classes are not in one place.
    """
    most = max(round(count * (1 - numbers.clusters)) // (1 + both_signs), 1)
    vectors, inverse_root = principal(rows, max(most, min(rows.shape[1], EXACT)), numbers.whitening)
    white = vectors * inverse_root[:, None]
    found = white[:most]
    found = torch.cat([found, -found])[:count] if both_signs else found
    if len(found) < count:
        centres = spherical_k_means((rows - rows.mean(0)) @ white.T, count - len(found), generator)
        found = torch.cat([found, centres @ white])
    return found


def spherical_k_means(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Directions [count, features] that rows cluster around; short rows are left out."""
    length = rows.norm(dim=1)
    order = torch.randperm(len(rows), generator=generator).to(rows.device)
    rows = F.normalize(rows[order[(length >= length.median() / 2)[order]]], dim=1)
    numbers = torch.arange(count, device=rows.device)
    centres = rows[numbers % len(rows)]
    for _ in range(ROUNDS):
        nearest = F.one_hot((rows @ centres.T - 1e-5 * numbers).argmax(1), count).to(rows)  # of equal ones the first
        centres = F.normalize(nearest.T @ rows + 1e-6 * centres, dim=1)
    return centres


def label_directions(means: Tensor, one_hot: Tensor, strength: float) -> Tensor:
    """Ridge regressions from the mean row of each image [n, features] onto its label: [classes, features].

    A mean over places is what pooling leaves: without an activation these would be the best directions.
    """
    x, y = means - means.mean(0), one_hot - one_hot.mean(0)
    gram = x.T @ x
    gram.diagonal().add_(strength * gram.diagonal().mean() + 1e-9)
    return torch.linalg.solve(gram, x.T @ y).T


def pooled_candidates(
    rows: Tensor, means: Tensor, one_hot: Tensor, count: int, numbers: Numbers, generator: torch.Generator
) -> Tensor:  # fmt: skip
    """Directions of which to choose before maps or tokens are averaged: of the rows, and of the labels and random
    mixtures of these."""
    classes = label_directions(means, one_hot, numbers.label_ridge)
    mixed = torch.randn(count, len(classes), dtype=torch.float32, generator=generator).to(classes) @ classes
    guided = F.normalize(torch.cat([classes, mixed]), dim=1)
    return torch.cat([directions(rows, CANDIDATES * count, True, numbers, generator), guided, -guided])


def into_stream(
    rows: Tensor, means: Tensor, one_hot: Tensor, count: int, numbers: Numbers, generator: torch.Generator
) -> Tensor:  # fmt: skip
    """What a block adds to its tokens: what the mean token says of the labels, and principal directions, smaller, all
    turned at random, so that a norm over the channels leaves none out."""
    guided = label_directions(means, one_hot, numbers.label_ridge)[:count]
    parts = [(guided, 1.0), (principal(rows, count - len(guided), numbers.whitening)[0], numbers.stream)]
    centred = means - means.mean(0)
    parts = [(part, size / ((centred @ part.T).std(0)[:, None] + 1e-6)) for part, size in parts if len(part)]
    basis = torch.cat([size * part for part, size in parts])
    random = torch.randn(count, count, dtype=torch.float32, generator=generator)
    turn = torch.linalg.qr(random)[0][:, : len(basis)].to(basis)
    weight = turn @ basis
    return weight / (((rows - rows.mean(0)) @ weight.T).std() + 1e-6)
