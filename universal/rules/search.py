"""Trial and error with one's own images: which numbers of the rules, and which random init, write a network best."""

import math
import random
import time
import warnings

from torch import Tensor, nn

from universal.data.labelled import HELD_OUT, MOST_IMAGES
from universal.model.synthesizer import GraphWeightSynthesizer
from universal.rules.looking import DoubtfulWeights
from universal.rules.numbers import BY_HAND, Numbers
from universal.rules.synthesis import Accounts, labelled, write

DEVIATION = 0.4  # of the logarithms of numbers that are drawn
EVERYWHERE = 8  # tries around the numbers set by hand, before those around the best so far
CHANGED = 0.5  # the share of the numbers that a later try draws anew
SHARES = ("clusters", "active", "side", "least_on", "most_on")
LARGEST_SHARE = 0.95


def search(
    module: nn.Module, images, labels: Tensor | None = None, seed: int | None = None, limit: int = MOST_IMAGES,
    synthesizer: GraphWeightSynthesizer | None = None, seconds: float = 60.0,
) -> Accounts:  # fmt: skip
    """`write` a network again and again, with other numbers of the rules and other inits, and keep the one of the
    highest accuracy on the images held out, which flatters it then; its accounts.

    The first try is what `write` alone would give. The last has all of them right, or no other would end within so many
    `seconds`, if it took as long as the longest before. Arguments, warnings and errors are those of `write`; and
    ValueError if no image is held out.
    """
    start = time.perf_counter()
    data = labelled(module, images, labels, seed, limit)
    if not (data.sample.folds == HELD_OUT).any():
        raise ValueError("no image is held out to search by: give more")
    draw, numbers = random.Random(0 if seed is None else seed), BY_HAND
    best, tries, longest = None, 0, 0.0
    while best is None or (best[0].held_out_percent < 100 and time.perf_counter() - start + longest < seconds):
        began = time.perf_counter()
        try:
            with warnings.catch_warnings(record=True, action="always", category=DoubtfulWeights) as doubts:
                accounts = write(module, data, seed=seed, synthesizer=synthesizer, numbers=numbers)
        except ValueError:  # of numbers that make values beyond all precision: others may do
            if best is None:
                raise
        else:
            if best is None or accounts.held_out_percent > best[0].held_out_percent:
                state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
                best = accounts, numbers, state, doubts
        tries, longest = tries + 1, max(longest, time.perf_counter() - began)
        numbers = drawn(draw, BY_HAND, 1.0) if tries < EVERYWHERE else drawn(draw, best[1], CHANGED)
        seed = draw.getrandbits(31)
    accounts, _, state, doubts = best
    module.load_state_dict(state)
    for doubt in doubts:
        warnings.warn(doubt.message, stacklevel=2)
    return accounts._replace(seconds=time.perf_counter() - start, tries=tries)


def drawn(draw: random.Random, around: Numbers, share: float) -> Numbers:
    """Numbers like those `around`, of which a share is changed, log-normally."""
    found = {
        name: value * math.exp(DEVIATION * draw.gauss(0, 1)) if draw.random() < share else value
        for name, value in around._asdict().items()
    }
    found |= {name: min(found[name], LARGEST_SHARE) for name in SHARES}
    found["least_on"], found["most_on"] = sorted((found["least_on"], found["most_on"]))
    return Numbers(**found)
