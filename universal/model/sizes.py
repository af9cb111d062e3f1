"""How large what is written may be, whatever the probes say.

No weight, bias, gain or shift is larger than LARGEST in magnitude. A neuron whose responses to the probes do not vary
cannot be brought to scale, and gets weights of the size of PyTorch's default init; what would be too large in spite of
that is cut off. Running statistics are measured, not written, and may be larger.
"""

import math

import torch
from torch import Tensor

LARGEST = 1_000.0
USUAL_LENGTH = 1 / math.sqrt(3)  # of a neuron's weights in PyTorch's default init, however many there are


def bounded(values: Tensor) -> Tensor:
    """`values`, cut off at LARGEST."""
    return values.clamp(-LARGEST, LARGEST)


def inverse_deviation(variance: Tensor, mean_square: Tensor, length_square: Tensor) -> Tensor:
    """What brings responses of this `variance`, to weights of so many squares in all, to a variance of 1.

    Where that took weights or a bias larger than LARGEST they hardly vary, and what does may be rounding: what brings
    the weights to the length that they usually have.
    """
    varies = LARGEST**2 * variance > mean_square + length_square
    usual = USUAL_LENGTH * torch.rsqrt(length_square + 1e-12)
    return torch.where(varies, torch.rsqrt(torch.where(varies, variance, 1.0)), usual)


def centred(values: Tensor) -> Tensor:
    """`values`, [n, ...], minus their mean over n; 0 where they do not vary but by rounding."""
    mean = values.mean(0)
    varying = values - mean
    return varying * (LARGEST**2 * varying.square().mean(0) > mean.square())
