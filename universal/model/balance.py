"""Balance: the same function in weights from which training goes on well.

Weights before a norm may be of any size, and those before a ReLU larger if those after it are smaller: that changes
nothing about what a network computes, but much about how far a step of training moves it. Written weights are right
for the probes, whatever that takes, so that a usual step moves them too far, above all where a norm or a mean over the
maps stands before the classes.
"""

import math

import torch
from torch import Tensor

from universal.model.sizes import LARGEST
from universal.reading.calls import STATISTICS, Gain, Norm, Operation
from universal.reading.graph import ComputationGraph

MOST_TENSORS = 200  # each of which takes a forward pass
MOST_MULTIPLICATIONS = 1e10  # of all these passes: seconds
IMAGES = 32
USUAL_SLOPE = 7.0  # of the logits, by one of a network's tensors: about that of random inits
STEEP = 140.0  # that by all of them, where large steps end a training from large logits
FLATTENED = 0.5  # what the logits are then multiplied by


def balance(graph: ComputationGraph, weights: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    """All `weights` of a network, by name, so that it computes the same, but no tensor moves the logits further than
    need be.

    The logits of a network without norms that is STEEP all the same are FLATTENED. If anything else changed for the
    `images`, if the network cannot be differentiated, or if it would take too long, all stays as it is.
    """
    parameters = dict(graph.module.named_parameters())
    names = [name for name in graph.written if name in parameters and name not in graph.left]
    if not 0 < len(names) <= min(MOST_TENSORS, len(images) * (graph.classes - 1)):
        return weights
    if len(names) * images_needed(graph, names) * graph.multiplications > MOST_MULTIPLICATIONS:
        return weights
    with torch.inference_mode(False), torch.no_grad():
        own, images = {name: tensor.clone() for name, tensor in weights.items()}, images.detach().clone()
        try:
            slopes = slopes_of(graph, own, names, images[:IMAGES])
            exponents = best_exponents(slopes, symmetries(graph, own, names, images))
            room = torch.stack([LARGEST / own[name].abs().max() for name in names]).double().cpu().log()
            exponents = exponents * (room.clamp(min=0) / exponents.clamp(min=1e-12)).clamp(max=1).min()
            factors = zip(names, exponents.exp().tolist(), strict=True)
            scaled = own | {name: own[name] * factor for name, factor in factors}
            scaled |= new_statistics(graph, own, scaled, images[:IMAGES])
            ways = [(1.0, scaled)]
            if not graph.norms and (slopes * (-exponents).exp()).norm() > STEEP:
                ways.insert(0, (FLATTENED, flattened(graph, scaled)))
            before = graph.run(images[:IMAGES], own)
            same = (new for factor, new in ways if alike(factor * before, graph.run(images[:IMAGES], new)))
            return next(same, weights)
        except Exception:  # its own code may not stand gradients or double precision
            return weights


def slopes_of(graph: ComputationGraph, weights: dict[str, Tensor], names: list[str], images: Tensor) -> Tensor:
    """How far each tensor moves the logits, [names]: the root of the summed squares of their derivatives by all its
    elements, in the mean over `images`. Raises RuntimeError if there are none."""
    leaves = {name: weights[name].detach().requires_grad_() for name in names}
    # Of channels-last inputs whose gradient nobody asks for, GroupNorm's backward pass crashes in PyTorch 2.9.
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = graph.run(images, weights | leaves, batch_statistics=True)
        # The expected square of a sum of derivatives with random signs is the sum of their squares.
        signs = torch.randint(0, 2, logits.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        asked = [*leaves.values(), images]
        *gradients, _ = torch.autograd.grad((logits * signs.to(logits)).sum(), asked, allow_unused=True)
    squares = [0.0 if gradient is None else gradient.double().square().sum().item() for gradient in gradients]
    return (torch.tensor(squares, dtype=torch.float64) / len(images)).sqrt()


def images_needed(graph: ComputationGraph, names: list[str]) -> int:
    """As many as tell the ways to scale so many tensors."""
    return max(8 if graph.norms else 2, math.ceil(1.5 * len(names) / (graph.classes - 1)))


def symmetries(graph: ComputationGraph, weights: dict[str, Tensor], names: list[str], images: Tensor) -> Tensor:
    """The ways to scale tensors against each other that change nothing, [names, ways]: logarithms of their factors.

    They are the null space of the derivatives of the logits by these logarithms.
    """
    images = images[: images_needed(graph, names)].double()
    weights = {name: tensor.double() for name, tensor in weights.items()}

    def logits_with(changes: dict[str, Tensor]) -> Tensor:
        logits = graph.run(images, weights | changes, batch_statistics=True)
        return (logits - logits.mean(1, keepdim=True)).flatten()

    before, step = logits_with({}), 1e-5
    changes = [logits_with({name: weights[name] * (1 + step)}) - before for name in names]
    derivatives = torch.stack(changes, 1) / (step * before.norm().clamp(min=1e-12))
    values, vectors = torch.linalg.eigh((derivatives.T @ derivatives).cpu())
    return vectors[:, values < 1e-6]


def best_exponents(slopes: Tensor, directions: Tensor) -> Tensor:
    """Logarithms of factors along `directions` [tensors, ways] by which no tensor moves the logits too far, [tensors].

    They minimise the sum of slopes^2 exp(-2 e) + USUAL_SLOPE^2 e^2, a convex function, by Newton's method.
    """
    ways = torch.zeros(directions.shape[1], dtype=torch.float64)

    def loss(ways: Tensor) -> Tensor:
        exponents = directions @ ways
        return (slopes.square() * (-2 * exponents).exp() + USUAL_SLOPE**2 * exponents.square()).sum()

    for _ in range(50):
        exponents = directions @ ways
        squares = slopes.square() * (-2 * exponents).exp()
        gradient = directions.T @ (2 * USUAL_SLOPE**2 * exponents - 2 * squares)
        curvature = directions.T @ ((4 * squares + 2 * USUAL_SLOPE**2)[:, None] * directions)
        step = torch.linalg.solve(curvature, -gradient)
        while step.norm() > 1e-6 and not loss(ways + step) < loss(ways):
            step = step / 2
        ways = ways + step
        if step.norm() < 1e-6:
            break
    return directions @ ways


def new_statistics(
    graph: ComputationGraph, weights: dict[str, Tensor], scaled: dict[str, Tensor], images: Tensor
) -> dict[str, Tensor]:
    """Running statistics of norms, by name, that do with the `scaled` weights what those in `weights` do with these."""
    if not any(STATISTICS[0] in norm.parameters for norm in graph.norms):
        return {}

    def statistics(weights: dict[str, Tensor]) -> list[tuple[Norm, Tensor, Tensor]]:
        found = []

        def look(call: Operation, inputs: Tensor) -> Tensor:
            if isinstance(call, Norm) and STATISTICS[0] in call.parameters:
                rows = inputs.movedim(call.axis, 0).flatten(1)
                found.append((call, rows.mean(1), rows.var(1, correction=0)))
            return call.of(weights, inputs, True)

        graph.write(images, weights, look)
        return found

    new: dict[str, Tensor] = {}
    for one, other in zip(statistics(weights), statistics(scaled), strict=True):
        (norm, mean, variance), (_, new_mean, new_variance) = one, other
        running_mean, running_variance = (norm.parameters[name] for name in STATISTICS)
        factor = torch.where(variance > 0, new_variance / variance, 1.0)
        running_mean.put(new, new_mean + (running_mean.of(weights) - mean) * factor.sqrt(), weights)
        running_variance.put(new, running_variance.of(weights) * factor, weights)
    return new


def flattened(graph: ComputationGraph, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` with those of the last layers, and what is added to its outputs, FLATTENED."""
    operations = [*graph.heads, *(shift for shift in graph.shifts if shift.of_last and not isinstance(shift, Gain))]
    parts = [part for operation in operations for part in operation.parts]
    return weights | {part.name: FLATTENED * weights[part.name] for part in parts}


def alike(logits: Tensor, others: Tensor) -> bool:
    """Whether these say the same, with or without a log-softmax after them."""
    logits, others = logits.log_softmax(1), others.log_softmax(1)
    return bool((logits - others).norm() < 0.01 * logits.norm())
