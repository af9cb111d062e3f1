"""The last layer: ridge regression onto the labels, then logistic regression from there where that is better."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from universal.data.labelled import HELD_OUT, agreed, is_shared
from universal.rules.features import Chunk, Features
from universal.rules.moments import Moments, Regression, Solved
from universal.rules.numbers import Numbers

SHARPNESSES = (1, 2, 4, 6, 8, 12, 16, 24)  # that logits of a ridge regression are multiplied by
USUAL_SHARPNESS = 8
TO_CHOOSE, ITERATIONS = 4, 15  # of conjugate gradients, from the decay before and from ridge regression
DECAYS = (0.04, 0.01, 3e-3, 8e-4, 2e-4, 5e-5)  # what squares of weights of scaled features add to the cross-entropy
LEAST_GAIN = 5e-5  # of cross-entropy, that is expected of a step
LONGEST = 10.0  # step, where a curvature is next to nothing
NONE = -1  # no fold


def classifier(
    features: Features, classes: int, intercept: bool, numbers: Numbers, penalty: float = 1.0
) -> tuple[Regression, Tensor | None]:
    """What maps features to logits; and the logits of those of the sample that are held out, of one that did not see
    them, or None if there are none.

    It is regressed with so many times the penalty that is found to be best.

    The logistic regression needs several passes, so it sees what is kept of the features, or else the sample.
    """
    sample = features.sample()
    deviation = sample.features.std(0) + numbers.deviation * sample.features.std() + 1e-12
    mean = sample.features.mean(0) * intercept
    moments = Moments()
    for x, labels, folds in features:
        moments.add((x - mean) / deviation, F.one_hot(labels, classes).to(x), folds == HELD_OUT)
    solved, strength = moments.over_processes().ridge(intercept)
    chunks, are_shares = features.in_memory(sample)
    held = sample.folds == HELD_OUT
    x, labels = (sample.features[held] - mean) / deviation, sample.labels[held]
    sharpness, logits, used = USUAL_SHARPNESS, None, None
    if len(labels):
        ridges = [Regression(*(sharpness * values for values in solved.regression)) for sharpness in SHARPNESSES]
        losses = [F.cross_entropy(regression(x), labels).item() for regression in ridges]
        least = min(losses)
        sharpness, found = SHARPNESSES[losses.index(least)], ridges[losses.index(least)]
        start = found
        for decay in DECAYS:  # from a strong one, which takes few iterations, on to what is near
            start = logistic(start, solved, chunks, are_shares, mean, deviation, intercept, HELD_OUT, decay, TO_CHOOSE)
            loss = agreed(F.cross_entropy(start(x), labels).item())
            if loss < least:
                least, found, used = loss, start, decay
            elif used is not None:
                break
        logits = found(x)
    solved = moments.ridge_of_all(penalty * strength, intercept)
    found = Regression(*(sharpness * values for values in solved.regression))
    if used is not None:  # from there, for what rounding does grows along the decays
        found = logistic(
            found, solved, chunks, are_shares, mean, deviation, intercept, NONE, penalty * used, ITERATIONS
        )
    weight = found.weight / deviation[:, None]
    return Regression(weight, found.bias - mean @ weight), logits


def logistic(
    start: Regression, solved: Solved, chunks: list[Chunk], are_shares: bool, mean: Tensor, deviation: Tensor,
    intercept: bool, without: int, decay: float, iterations: int,
) -> Regression:  # fmt: skip
    """The logistic regression of the features in `chunks`, from a `start`, without the images of a fold.
    If they `are_shares` of all, processes add up what they find.

    Conjugate gradients, preconditioned by the features' Gram matrix, which bounds the Hessian (Böhning 1992).
    """
    rows, labels, folds = zip(*chunks, strict=True)
    one_hot, sizes = F.one_hot(torch.cat(labels), len(start.bias)).to(mean), [len(part) for part in rows]
    used = (torch.cat(folds) != without).to(mean)[:, None]
    shared = is_shared() and are_shares

    def over_all(value: Tensor) -> Tensor:
        if shared:
            dist.all_reduce(value)
        return value

    def logits_of(parameters: Tensor) -> Tensor:
        weight = (parameters[:-1] / deviation[:, None]).T.contiguous()  # products of few columns are slow
        bias = parameters[-1] - weight @ mean
        return torch.cat([F.linear(part, weight, bias) for part in rows])

    count = over_all(used.sum())
    parameters = torch.cat([start.weight, start.bias[None]])
    decay = torch.full_like(parameters, 2 * decay)
    decay[-1] = 0
    logits = logits_of(parameters)
    direction = before = None
    for _ in range(iterations):
        shares = logits.softmax(1)
        errors = (one_hot - shares) * used
        total = errors.sum(0)
        gradient = sum(wrong.T @ part for part, wrong in zip(rows, errors.split(sizes), strict=True))
        gradient = (gradient.T - torch.outer(mean, total)) / deviation[:, None]
        downhill = over_all(torch.cat([gradient, intercept * total[None]])) / count - decay * parameters
        scaled = 2 * torch.cat([count * solved.inverse(downhill[:-1]), downhill[-1:]])
        size = (downhill * scaled).sum()
        if direction is None:
            direction = scaled
        else:  # Polak and Ribière
            direction = scaled + ((size - (before[0] * scaled).sum()) / before[1]).clamp(min=0) * direction
        before = downhill, size
        change = logits_of(direction)
        spread = (shares * change.square()).sum(1) - (shares * change).sum(1).square()
        curvature = over_all((spread * used[:, 0]).sum()) / count + (decay * direction.square()).sum()
        slope = (downhill * direction).sum()
        step = (slope / curvature.clamp(min=1e-12)).clamp(max=LONGEST)
        parameters, logits = parameters + step * direction, logits + step * change
        if agreed((step * slope).item() / 2) < LEAST_GAIN:
            break
    return Regression(parameters[:-1], parameters[-1])
