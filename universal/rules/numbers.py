"""The numbers that the rules leave open, as functions of how many images there are and of how deep a layer lies.

`python -m universal.tune` finds the coefficients in COEFFICIENTS by trial and error, on tasks and networks that
nobody evaluates; all of them 0 are the numbers that were set by hand.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

COEFFICIENTS = Path(__file__).with_name("numbers.json")
FEW, MANY = 100, 2000  # images, within which numbers depend on how many there are


class Numbers(NamedTuple):
    """Those of a layer. The defaults were set by hand; RANGES has the bounds of what is searched."""

    whitening: float = 0.1  # what is added to the variance of a principal direction, in units of the mean variance
    clusters: float = 0.011  # the share of directions that are centres of k-means, at least
    active: float = 0.6  # the share of the images at which a neuron of a convolution is on
    places: float = 1.0  # the size of what tells tokens their places, in units of the tokens
    attention: float = 1.0  # the size of queries and keys, in units of whitened ones
    stream: float = 0.5  # the size of principal directions in what a block adds, beside what the labels say
    label_ridge: float = 0.3  # of regressions from means over places onto labels
    deviation: float = 0.5  # what is added to a feature's, of all features' together: a rare one is not made strong
    rank: float = 20  # principal components in which subclasses are found
    sharpness: float = 5.0  # of the membership of subclasses
    subclasses: float = 256  # at most
    side: float = 0.28  # the least of a receptive field, as a share of the map's
    least_on: float = 0.3  # of the images, a dense candidate's share, at least
    most_on: float = 0.8
    fields: float = 1.0  # candidates of this kind, in sixths of all
    means: float = 2.0
    pairs: float = 2.0
    strength: float = 3.0  # of the ridge regression of what each neuron should answer differently
    damping: float = 0.1  # of what the neurons of a layer do together


RANGES = Numbers(
    whitening=(0.003, 3), clusters=(0.01, 0.9), active=(0.1, 0.98), places=(0.1, 10), attention=(0.1, 10),
    stream=(0.05, 5), label_ridge=(0.01, 10), deviation=(0.003, 10), rank=(4, 400), sharpness=(0.5, 50),
    subclasses=(10, 1000), side=(0.1, 0.9), least_on=(0.05, 0.6), most_on=(0.61, 0.98), fields=(0.1, 10),
    means=(0.1, 10), pairs=(0.1, 10), strength=(0.1, 100), damping=(0.001, 10),
)  # fmt: skip
PROPERTIES = ("always", "images", "depth")  # what a number depends on, each by a coefficient
DEPENDENT = (
    "whitening", "clusters", "active", "label_ridge", "deviation", "rank", "sharpness", "side", "least_on", "most_on",
    "strength",
)  # fmt: skip

Coefficients = Mapping[str, list[float]]  # for the name of a number, of PROPERTIES, or of the first alone


def numbers_of(coefficients: Coefficients, images: int, depth: float) -> Numbers:
    """The numbers for so many `images` and a `depth` between 0, the first layer, and 1, the last.

    Within its range, on a scale of logarithms, a number is a sigmoid of a sum that is at home where it was set by hand.
    """
    many = (math.log(min(max(images, FEW), MANY)) - math.log(FEW)) / math.log(MANY / FEW)
    properties = (1.0, 2 * many - 1, 2 * depth - 1)
    found = {}
    for name, usual in Numbers()._asdict().items():
        if name in coefficients:
            least, most = map(math.log, getattr(RANGES, name))
            share = (math.log(usual) - least) / (most - least)
            shift = sum(map(math.prod, zip(coefficients[name], properties, strict=False)))
            share = 1 / (1 + (1 / share - 1) * math.exp(-min(max(shift, -50), 50)))
            found[name] = math.exp(least + share * (most - least))
    return Numbers(**found)


def load_coefficients() -> Coefficients:
    return json.loads(COEFFICIENTS.read_text()) if COEFFICIENTS.exists() else {}
