"""Linear algebra on the responses of neurons to probes: regressions, and making neurons less alike.

There are few probes, so that what is said here of wide layers costs no more than the probes' own forward pass: where a
layer has more neurons than responses, the Gram matrix of the responses takes the place of that of the neurons.
"""

import torch
from torch import Tensor

MOST_ROWS = 512  # responses from which the correlations of wider layers are estimated
BLOCK = 512  # rows of a Gram matrix that are computed at a time


class InverseSquareRoot(torch.autograd.Function):
    """The inverse square roots of symmetric positive definite matrices, [..., n, n].

    Its gradient is that of Daleckii and Krein (Higham, Functions of Matrices, theorem 3.11), which exists where
    eigenvalues coincide too; that of torch.linalg.eigh does not.
    """

    @staticmethod
    def forward(ctx, matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        roots = values.clamp(min=1e-6).sqrt()
        ctx.save_for_backward(roots, vectors)
        return (vectors / roots[..., None, :]) @ vectors.mT

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        roots, vectors = ctx.saved_tensors
        rows, columns = roots[..., :, None], roots[..., None, :]
        divided_differences = -1 / (rows * columns * (rows + columns))
        return vectors @ ((vectors.mT @ gradient @ vectors) * divided_differences) @ vectors.mT


def decorrelate(responses: Tensor, ridge: Tensor, values: Tensor) -> Tensor:
    """`values`, [groups, neurons, k], mixed over the neurons of a group so that their `responses` are less alike.

    `responses`, [rows, groups, neurons], are centred and of variance 1, and so they would be if they were mixed too.
    The mixing is the inverse square root of their correlations plus `ridge`, [1]: the only whitening that does not
    prefer a neuron. A neuron whose responses do not vary, and have a variance of 0, stays as it is.
    """
    rows, _, neurons = responses.shape
    if neurons == 1:
        return values
    lacking = (1 - responses.square().mean(0)).clamp(min=0)[..., None]  # of their variance
    if neurons > MOST_ROWS:
        responses = responses[:: -(-rows // MOST_ROWS)]
    grouped = responses.movedim(0, 1)  # [groups, rows, neurons]
    rows = grouped.shape[1]
    if neurons <= rows:
        correlation = grouped.mT @ grouped / rows
        mix = InverseSquareRoot.apply(correlation + ridge * torch.eye(neurons).to(values))
        variance = ((mix @ correlation) * mix).sum(2, keepdim=True).clamp(min=0)
        return torch.rsqrt(variance + lacking / ridge) * mix @ values
    # With Z the responses and G = Z Z^T / rows: (Z^T Z / rows + r)^-1/2 = r^-1/2 + Z^T g(G) Z / rows, where
    # g(s) = ((s + r)^-1/2 - r^-1/2) / s = -1 / (root (s + r) * root r * (root (s + r) + root r)).
    identity = torch.eye(rows).to(values)
    shifted = grouped @ grouped.mT / rows + ridge * identity
    inverse_root = InverseSquareRoot.apply(shifted)
    inner = inverse_root @ torch.linalg.inv(shifted @ inverse_root + ridge.sqrt() * identity)

    def mixed(columns: Tensor) -> Tensor:
        return (columns - grouped.mT @ (inner @ (grouped @ columns)) / rows) * ridge.rsqrt()

    variance = mixed(grouped.mT).square().mean(2, keepdim=True)
    return torch.rsqrt(variance + lacking / ridge) * mixed(values)


def per_probe(values: Tensor, axis: int, probes: int) -> Tensor | None:
    """What activations whose neurons lie on `axis` are of each of so many probes, [probes, neurons]: means over places.

    The probes may lie on any axis, or be folded into the first one with their places; None if they are nowhere.
    """
    values = values.movedim(axis, -1)
    *others, neurons = values.shape
    if probes in others:
        values = values.movedim(others.index(probes), 0)
    elif others[0] % probes:
        return None
    return values.reshape(probes, -1, neurons).mean(1)


def unit_responses(weight: Tensor, inputs: Tensor, each: bool = True) -> Tensor:
    """The weight, [..., neurons, features], scaled so that the responses to `inputs`, [..., n, features], of `each`
    neuron or of all, have a mean square of 1."""
    squares = (inputs @ weight.mT).square()
    return weight * torch.rsqrt((squares.mean(-2)[..., None] if each else squares.mean()) + 1e-8)


def unit_rms(values: Tensor) -> Tensor:
    """Scaled to a root mean square of 1."""
    return values * torch.rsqrt(values.square().mean() + 1e-6)


def gram(rows: Tensor) -> Tensor:
    """The inner products of rows, [n, n]; of many only one half is computed, since torch has no `syrk`."""
    if len(rows) <= 2 * BLOCK:
        return rows @ rows.T
    products = rows.new_empty(len(rows), len(rows))
    for start in range(0, len(rows), BLOCK):
        end = start + BLOCK
        products[start:end, start:] = rows[start:end] @ rows[start:].T
        products[end:, start:end] = products[start:end, end:].T
    return products


def ridge_regression(features: Tensor, targets: Tensor, ridge: Tensor) -> Tensor:
    """Weights [..., outputs, features], that map centred `features` [..., n, features] to `targets`, [..., n, outputs].

    With matrices of n or of the features, whichever are fewer; `ridge` is relative to the mean squared length of these.
    """
    rows, count = features.shape[-2:]
    scale = features.square().mean((-2, -1), keepdim=True) * count + 1e-6
    dual = rows <= count
    gram = features @ features.mT if dual else features.mT @ features
    factor = torch.linalg.cholesky(gram / scale + (ridge + 1e-3) * torch.eye(gram.shape[-1]).to(gram))
    solved = torch.cholesky_solve(targets if dual else features.mT @ targets, factor)
    return (solved.mT @ features if dual else solved.mT) / scale
