"""Rules for hidden dense layers, which read one vector of each image.

More candidates than neurons are made from one part of a sample; by the other part those are chosen that together say
most of the labels; and a few ridge regressions on both tell each neuron what it should answer differently. Few images
are not parted: all of them judge, so that candidates must not know them by heart. One more rule is one more entry in
CANDIDATES.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from universal.reading.calls import Layer
from universal.rules.activation import Activation
from universal.rules.features import Chunk
from universal.rules.filters import first_axes
from universal.rules.moments import Moments
from universal.rules.numbers import Numbers
from universal.rules.refitting import ROUNDS, refitted
from universal.rules.selection import forward_selection

TIMES, FEWEST, MOST = 6, 1000, 2500  # candidates: so many times the neurons, within bounds
PLENTY, MOST_ROUNDS = 10, 30  # images of each neuron for a round of refitting, and how many pay
AMONG = 8  # images of which the nearest makes a pair
LEAST_SPREAD = 1e-2  # of responses, of what theirs were if the features were independent: below it is rounding


class Context(NamedTuple):
    """What a rule knows, of images that do not judge what it makes."""

    layer: Layer
    features: Tensor  # [n, features]
    labels: Tensor  # [n]
    members: Tensor  # [n, subclasses], how far each image is of each
    fitted: Tensor  # [classes + subclasses, features], ridge regressions onto the labels and these
    numbers: Numbers
    generator: torch.Generator

    def draw(self, most: int, *shape: int) -> Tensor:
        """Random whole numbers below `most`."""
        return torch.randint(most, shape, generator=self.generator).to(self.labels.device)

    def fields(self, count: int) -> Tensor | float:
        """Random rectangles of the map that was flattened into the features, [count, features]; 1 if there is none.

        Receptive fields: McDonnell et al. 2015 (arXiv 1412.8307).
        """
        grid = self.layer.grid
        if grid is None or len(grid) < 64:
            return 1.0
        least, inside = self.numbers.side, torch.ones(count, len(grid), dtype=torch.bool)
        for along in grid.T:
            size = least + (1 - least) * torch.rand(count, 1, dtype=torch.float32, generator=self.generator)
            first = (1 - size) * torch.rand(count, 1, dtype=torch.float32, generator=self.generator)
            inside &= (along >= first) & (along <= first + size)
        channels = self.layer.shape[1] // len(grid)
        return self.layer.weight_of(inside[:, None].expand(-1, channels, -1).float()).to(self.features)


def regressions(context: Context, share: int) -> Tensor:
    """Ridge regressions onto labels and subclasses."""
    return context.fitted


def opposites(context: Context, share: int) -> Tensor:
    """The opposites of those onto labels."""
    return -context.fitted[: len(context.fitted) - context.members.shape[1]]


def regressions_in_fields(context: Context, share: int) -> Tensor:
    """Those onto subclasses, as far as they lie in a receptive field."""
    count = round(context.numbers.fields * share)
    fields = context.fields(count)
    if isinstance(fields, float):
        return context.fitted[:0]
    first = len(context.fitted) - context.members.shape[1]
    return context.fitted[first + context.draw(context.members.shape[1], count)] * fields


def mean_differences(context: Context, share: int) -> Tensor:
    """Differences between the means of two subclasses, in receptive fields."""
    means = context.members.T @ context.features / context.members.sum(0)[:, None].clamp(min=1e-3)
    count = round(context.numbers.means * share)
    a, b = context.draw(len(means), 2, count)
    return (means[a] - means[b]) * context.fields(count)


def near_pairs(context: Context, share: int) -> Tensor:
    """Differences between an image and the nearest of a few of other classes, in receptive fields (pairs: SWIM, arXiv
    2306.16830)."""
    _, features, labels, *_ = context
    count = round(context.numbers.pairs * share)
    first, others = context.draw(len(labels), count), context.draw(len(labels), AMONG, count)
    fields, found = context.fields(count), features.new_zeros(count, features.shape[1])
    nearest = features.new_full((count,), torch.inf)
    for other in others:
        difference = (features[first] - features[other]) * fields
        distance = difference.square().sum(1).masked_fill(labels[first] == labels[other], 1e30)
        found[distance < nearest] = difference[distance < nearest]
        nearest = torch.minimum(distance, nearest)
    return found


FITTED = (regressions, opposites, regressions_in_fields)  # which know by heart the images that they are made from
CANDIDATES = (*FITTED, mean_differences, near_pairs)


def dense_layer(
    layer: Layer, known: Chunk, judging: Chunk, classes: int, numbers: Numbers, generator: torch.Generator
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weight [neurons, features] and bias of a hidden layer, made from what is `known` and chosen by what is
    `judging`; if that is nothing, by what is known."""
    activation, count = Activation(layer), layer.shape[0]
    images, moments = Chunk(*map(torch.cat, zip(known, judging, strict=True))), Moments()
    deviation = images.features.std(0) + numbers.deviation * images.features.std() + 1e-12
    for part, is_judging in ((known, False), (judging, True)):
        one_hot = F.one_hot(part.labels, classes).to(deviation)
        moments.add(part.features / deviation, one_hot, torch.full_like(part.labels, is_judging, dtype=torch.bool))
    solved, _ = moments.ridge()
    rows = known.features / deviation
    rows -= rows.mean(0)
    candidates = max(FEWEST, min(TIMES * count, MOST), 2 * count)
    most = min(candidates // 6, round(numbers.subclasses), len(rows) // 8)
    members = subclasses(rows, known.labels, max(classes, most), classes, numbers, generator)
    targets = torch.cat([F.one_hot(known.labels, classes).to(rows), members], 1)
    fitted = (solved.regress(rows, targets - targets.mean(0)) / deviation[:, None]).T
    context = Context(layer, known.features, known.labels, members, fitted, numbers, generator)
    rules = CANDIDATES
    if not len(judging.labels):
        judging, rules = known, [rule for rule in CANDIDATES if rule not in FITTED]
    weight = torch.cat([rule(context, candidates // 6) for rule in rules])
    weight, bias = thresholds(weight, judging.features, activation, numbers, generator)
    wanted = F.one_hot(judging.labels, classes).to(weight)
    kept = forward_selection(activation(F.linear(judging.features, weight, bias)), wanted, count)
    kept = kept[torch.arange(count, device=kept.device) % len(kept)]
    # From many images few neurons come further by more rounds, if each is the smoother.
    rounds = min(max(ROUNDS, len(images.labels) // (PLENTY * count)), MOST_ROUNDS)
    solved = moments.ridge_of_all(numbers.strength * rounds / ROUNDS)
    rows, one_hot = images.features[:, None], F.one_hot(images.labels, classes).to(deviation)
    return refitted(weight[kept], bias[kept], activation, rows, one_hot, solved, deviation, numbers.damping, rounds)


def thresholds(
    weight: Tensor, features: Tensor, activation: Activation, numbers: Numbers, generator: torch.Generator
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The weight scaled to responses of deviation 1, and biases by which different shares of the images are on."""
    responses = features[:512] @ weight.T
    variances = features[:512].var(0)
    # The deviation if the features were independent, and none constant.
    apart = (weight.square() @ (variances + variances.mean())).sqrt()
    scale = responses.std(0) + LEAST_SPREAD * apart + 1e-6 * responses.std() + 1e-12
    least, most = (0.5, 0.5) if activation.is_linear else (numbers.least_on, numbers.most_on)
    on = least + (most - least) * torch.rand(len(weight), dtype=torch.float32, generator=generator).to(weight)
    quantile = math.sqrt(2) * torch.erfinv(1 - 2 * on)  # of a normal distribution, which sums of many features are near
    return weight / scale[:, None], -responses.mean(0) / scale - quantile


def subclasses(
    rows: Tensor, labels: Tensor, count: int, classes: int, numbers: Numbers, generator: torch.Generator,
    rounds: int = 6,
) -> Tensor:  # fmt: skip
    """Soft membership [n, count] of centred rows in clusters of their own class, found in whitened principal
    components.

    A regression onto labels alone spans only classes - 1 directions, whatever the width.
    """
    axes, variances = first_axes(rows[:2000], round(numbers.rank))
    points = rows @ (axes / (variances.sqrt() + 1e-6))
    members, at = rows.new_zeros(len(rows), count), 0
    for label in range(classes):
        share = count // classes + (label < count % classes)
        own = (labels == label).nonzero()[:, 0]
        if share and len(own):
            centres = k_means(points[own], share, generator, rounds)
            distance = torch.cdist(points[own], centres)
            distance = distance / (distance.min(1, keepdim=True).values + 1e-6)
            members[own, at : at + share] = (-numbers.sharpness * distance).softmax(1)
        at += share
    return members


def k_means(rows: Tensor, count: int, generator: torch.Generator, rounds: int) -> Tensor:
    """Centres [count, features]; of as few rows as centres, rows."""
    centres = rows[torch.randint(len(rows), (count,), generator=generator).to(rows.device)]
    for _ in range(rounds):
        nearest = F.one_hot(torch.cdist(rows, centres).argmin(1), count).to(rows)
        numbers = nearest.sum(0)[:, None]
        centres = torch.where(numbers > 0, nearest.T @ rows / numbers.clamp(min=1), centres)
    return centres
