"""Rules for hidden dense layers, which read one vector of each image: candidates for their neurons.

One more rule is one more entry in CANDIDATES. Which candidates a layer gets is chosen by what they say of images that
none was made from.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from universal.data.labelled import HELD_OUT, JUDGING
from universal.reading.calls import Layer
from universal.rules.features import Chunk, Features
from universal.rules.moments import Moments

SHARPNESS = 5.0  # of the membership of subclasses
RANK = 60  # principal components in which subclasses are found
MOST_SUBCLASSES = 512
PAIRS_PER_NEURON = 5
MOST_PAIRS = 2048
AMONG = 8  # images of which the nearest makes a pair
LEAST_SIDE = 0.28  # of a receptive field, as a share of the map's
PARTNERS = 2000  # images that pairs are made of


class Context(NamedTuple):
    """What a rule knows: the layer, the features of all images and of the sample, and the number of classes."""

    layer: Layer
    features: Features
    sample: Chunk
    classes: int
    generator: torch.Generator
    one_sided: bool  # whether a direction and its opposite say different things

    @property
    def known(self) -> Chunk:
        """What of the sample rules are made from."""
        return Chunk(*(values[self.sample.folds > JUDGING] for values in self.sample))


def regressions(context: Context) -> Tensor:
    """Ridge regressions onto soft subclasses, and onto the labels with both signs: [candidates, features]."""
    layer, features, sample, classes, generator, one_sided = context
    deviation = sample.features.std(0) + 1e-3 * sample.features.std() + 1e-12
    known, count = context.known, max(min(layer.shape[0], MOST_SUBCLASSES), classes)
    subclasses = Subclasses(known._replace(features=known.features / deviation), count, classes, generator)
    moments = Moments()
    for chunk in features:
        x, labels, folds = (values[chunk.folds != HELD_OUT] for values in chunk)
        x = x / deviation
        moments.add(x, torch.cat([F.one_hot(labels, classes).to(x), subclasses(x, labels)], 1), folds == JUDGING)
    solved, _ = moments.over_processes().ridge()
    weight = (solved.regression.weight / deviation[:, None]).T
    return torch.cat([weight, -weight[:classes]]) if one_sided else weight


def pairs(context: Context) -> Tensor:
    """Differences between near images of different classes, within random receptive fields: [candidates, features].

    McDonnell et al. 2015 (arXiv 1412.8307); differences of two images: SWIM (arXiv 2306.16830).
    """
    layer, generator = context.layer, context.generator
    count = max(min(PAIRS_PER_NEURON * layer.shape[0], MOST_PAIRS), layer.shape[0])
    known = Chunk(*(values[:PARTNERS] for values in context.known))
    fields = receptive_fields(layer, count, generator)
    found = []
    for part in torch.arange(count).split(256):
        a = torch.randint(len(known.labels), (len(part),), generator=generator).to(known.labels.device)
        b = torch.randint(len(known.labels), (len(part), AMONG), generator=generator).to(a.device)
        differences = known.features[a][:, None] - known.features[b]
        if fields is not None:
            differences = differences * fields[part].to(differences)[:, None]
        distances = differences.square().sum(2).masked_fill(known.labels[a][:, None] == known.labels[b], torch.inf)
        nearest = distances.argmin(1)
        found.append(differences[torch.arange(len(part)), nearest])
    return torch.cat(found)


def receptive_fields(layer: Layer, count: int, generator: torch.Generator) -> Tensor | None:
    """Random rectangles of the map that was flattened into a layer's features, [count, features]; None if there is none."""
    if layer.grid is None or len(layer.grid) < 64:
        return None
    inside = torch.ones(count, len(layer.grid), dtype=torch.bool)
    for axis in (0, 1):
        size = LEAST_SIDE + (1 - LEAST_SIDE) * torch.rand(count, 1, generator=generator)
        first = (1 - size) * torch.rand(count, 1, generator=generator)
        along = layer.grid[:, axis]
        inside &= (along >= first) & (along <= first + size)
    channels = layer.shape[1] // len(layer.grid)
    return layer.weight_of(inside[:, None].expand(-1, channels, -1).float())


CANDIDATES = {"regressions onto subclasses": regressions, "pairs of near images": pairs}


class Subclasses:
    """Soft membership of clusters within each class, as targets of a regression.

    Clusters are found by k-means in whitened principal components of some features. A regression onto labels alone spans
    only classes - 1 directions, whatever the width.
    """

    def __init__(self, known: Chunk, count: int, classes: int, generator: torch.Generator):
        features, labels, _ = known
        some = features[:PARTNERS]
        self.mean = some.mean(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the projection below is random
            _, size, axes = torch.svd_lowrank(some - self.mean, q=min(RANK, *some.shape), niter=2)
        self.whiten = axes / (size / len(some) ** 0.5 + 1e-6)
        x = (features - self.mean) @ self.whiten
        centres, of_class = [], []
        for label in range(classes):
            share = count // classes + (label < count % classes)
            own = x[labels == label]
            if share and len(own):
                centres.append(k_means(own, share, generator))
                of_class += [label] * share
        self.centres, self.of_class = torch.cat(centres), torch.tensor(of_class, device=labels.device)

    def __call__(self, features: Tensor, labels: Tensor) -> Tensor:
        """[n, clusters], 0 in other classes than an image's own."""
        distance = torch.cdist((features - self.mean) @ self.whiten, self.centres)
        distance = distance.masked_fill(labels[:, None] != self.of_class, torch.inf)
        nearest = distance.min(1, keepdim=True).values + 1e-6
        return torch.nan_to_num((-SHARPNESS * distance / nearest).softmax(1))


def k_means(rows: Tensor, count: int, generator: torch.Generator, rounds: int = 6) -> Tensor:
    """Centres [count, features]; of as few rows as centres, rows."""
    centres = rows[torch.randint(len(rows), (count,), generator=generator).to(rows.device)]
    for _ in range(rounds):
        nearest = F.one_hot(torch.cdist(rows, centres).argmin(1), count).to(rows)
        numbers = nearest.sum(0)[:, None]
        centres = torch.where(numbers > 0, nearest.T @ rows / numbers.clamp(min=1), centres)
    return centres
