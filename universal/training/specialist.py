"""A synthesiser that was trained for one's own images: what it gains, and from how many networks on it pays for itself.

Both it and the one that it began from write random networks for images that neither saw. What pays is that Adam need
not bring those of the latter as far.
"""

import copy
import math
import random
import time
from collections.abc import Sequence
from statistics import fmean, median
from typing import NamedTuple

from torch import nn

from target_cnn import Dataset, score
from universal.evaluation.clock import RATES, Training, built, most_steps
from universal.evaluation.networks import EVALUATED_SHAPES
from universal.model.synthesizer import GraphWeightSynthesizer
from universal.rules.synthesis import write
from universal.training.architectures import draw_architecture

NETWORKS = 3
ON_THE_WAY = 2000  # images on which its accuracy is noted


class Gain(NamedTuple):
    """One network, as both write it."""

    before: float  # accuracy in percent
    after: float
    seconds: float  # of Adam, from `before` to `after`
    level: bool  # whether it came so far


def gain(
    before: GraphWeightSynthesizer, after: GraphWeightSynthesizer, train: Dataset, scored: Dataset, seed: int
) -> Gain:
    """What a random network of this `seed`, written from `train`, gains on the images `scored`."""
    scored, classes = scored[:ON_THE_WAY], int(train.labels.max()) + 1

    def build() -> nn.Module:
        drawn = random.Random(seed)
        return draw_architecture(drawn, train.images.shape[1:], classes, EVALUATED_SHAPES, ["ordinary"])

    def written(synthesizer: GraphWeightSynthesizer) -> nn.Module:
        network = built(build, seed, train.images.device)
        write(network, *train, seed=seed, limit=len(train.labels), synthesizer=synthesizer)
        return network

    start = time.perf_counter()
    networks = [written(before), written(after)]
    seconds = (time.perf_counter() - start) / 2
    found = [score(network, scored).accuracy_percent for network in networks]
    if found[1] <= found[0]:
        return Gain(*found, 0.0, True)
    last = most_steps(len(train.labels))
    trainings = [Training(copy.deepcopy(networks[0]), train, scored, lr, seed, seconds, last) for lr in RATES]
    for each in trainings:
        each.run({"over": lambda at, each=each: each.matched(found[1]) is not None or each.is_over(at)})
    matched = [level for each in trainings if (level := each.matched(found[1])) is not None]
    return Gain(*found, min(matched or (each.curve[-1][0] for each in trainings)), bool(matched))


def conclusion_of(gains: Sequence[Gain], seconds: float) -> str:
    """From how many networks on a training of so many `seconds` pays for itself."""
    means = [fmean(each.before for each in gains), fmean(each.after for each in gains)]
    lines = [
        f"{len(gains)} random networks: {means[0]:.2f}% before, {means[1]:.2f}% after ({means[1] - means[0]:+.2f})"
    ]
    if median(each.after - each.before for each in gains) <= 0:
        return "\n".join([*lines, "It does not pay: what it began from writes them as well"])
    saved = fmean(each.seconds for each in gains)
    least = "at least " * (not all(each.level for each in gains))
    return "\n".join([
        *lines, f"Adam takes {least}{saved:.1f} s from the former to the latter: it pays from "
        f"{math.ceil(seconds / saved):,} networks on",
    ])  # fmt: skip
