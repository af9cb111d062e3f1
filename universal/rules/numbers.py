"""The numbers that the rules leave open, in one place."""

from typing import NamedTuple


class Numbers(NamedTuple):
    """Set by hand, on data sets that nobody evaluates; a search over many data sets found none that were better."""

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
    pooled_strength: float = 0.5  # likewise, before pooling
    damping: float = 0.1  # of what the neurons of a layer do together


BY_HAND = Numbers()
