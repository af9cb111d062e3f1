"""Rewards: what a written network is worth, as one number that nobody differentiates. Higher is better.

One more rounding is one more entry of ROUNDINGS. A user's own reward is any function of the written module.
"""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scripting import UserError, in_short
from target_cnn import Dataset, Score, score
from universal.builders import load_callable
from universal.reading.graph import Logits
from universal.reading.refusals import place_of

BATCH_SIZE = 64  # images that a core computes at a time: few enough to stay in its cache


# ---- roundings of a weight, [neurons, ...] ---------------------------------------------------------------------------


def ternary(weight: Tensor) -> Tensor:
    """Three values per neuron (Li et al. 2016, arXiv 1605.04711).

    Entries below 0.7 times their mean magnitude are 0, the others have the mean of their magnitudes.
    """
    flat = weight.flatten(1)
    kept = flat.abs() > 0.7 * flat.abs().mean(1, keepdim=True)
    size = (flat.abs() * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    return (size * flat.sign() * kept).view_as(weight)


def binary(weight: Tensor) -> Tensor:
    """Two values per neuron: the mean magnitude, with each entry's sign (Rastegari et al. 2016, arXiv 1603.05279)."""
    flat = weight.flatten(1)
    return torch.where(flat >= 0, 1.0, -1.0).mul(flat.abs().mean(1, keepdim=True)).view_as(weight)


def int4(weight: Tensor) -> Tensor:
    """Whole multiples, from -7 to 7, of a seventh of the neuron's largest magnitude."""
    flat = weight.flatten(1)
    unit = flat.abs().amax(1, keepdim=True) / 7 + 1e-12
    return ((flat / unit).round() * unit).view_as(weight)


def pruned80(weight: Tensor) -> Tensor:
    """The 80 % of a tensor's entries that are smallest are 0."""
    threshold = weight.abs().flatten().kthvalue(math.ceil(0.8 * weight.numel())).values
    return weight * (weight.abs() > threshold)


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "ternary": ternary, "binary": binary, "int4": int4, "pruned80": pruned80,
}  # fmt: skip


@torch.no_grad()
def round_weights(network: nn.Module, rounding: Callable[[Tensor], Tensor]) -> nn.Module:
    """Round in place all parameters of more than one dimension, and return `network`. The others stay as they are."""
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.copy_(rounding(parameter))
    return network


# ---- rewards ---------------------------------------------------------------------------------------------------------


class Reward(NamedTuple):
    """`of(network, images)` is what a written network, which it may change, is worth. `rounding` is what it does to
    the weights before it measures, if it is one of ROUNDINGS."""

    of: Callable[[Logits, Dataset], float]
    rounding: Callable[[Tensor], Tensor] | None = None


def score_after(rounding: Callable[[Tensor], Tensor] | None, network: Logits, data: Dataset) -> Score:
    """The score of a network, with its weights rounded in place if there is a `rounding`."""
    if rounding is not None:
        round_weights(network.module, rounding)
    return score(network, data, BATCH_SIZE)


def log_likelihood_after(rounding: Callable[[Tensor], Tensor]) -> Reward:
    """Minus the mean cross-entropy of the network as it is and rounded, nats per image.

    It says more than accuracy about few images. What is good only when rounded would be of less use.
    """

    def of(network: Logits, data: Dataset) -> float:
        as_it_is = score_after(None, network, data).cross_entropy
        return -(as_it_is + score_after(rounding, network, data).cross_entropy) / 2

    return Reward(of, rounding)


def accuracy(network: Logits, data: Dataset) -> float:
    """The share of images that are classified rightly, with the weights as they are."""
    return score_after(None, network, data).accuracy_percent / 100


REWARDS: dict[str, Reward] = {
    **{name: log_likelihood_after(rounding) for name, rounding in ROUNDINGS.items()},
    "accuracy": Reward(accuracy),
}


def load_reward(text: str) -> Reward:
    """One of REWARDS by name, or a user's own function, `my_reward.py:reward`, called with the written module.

    Raises UserError if there is none; its `of` raises UserError, with the line of the user's file, if the function
    fails or returns anything but a number.
    """
    if text in REWARDS:
        return REWARDS[text]
    if ":" not in text:
        raise UserError(f"--reward {text}: give one of {', '.join(REWARDS)}, or my_reward.py:function")
    function = load_callable(text, "--reward")

    def of(network: Logits, _: Dataset) -> float:
        try:
            value = float(function(network.module))
        except Exception as error:  # a person's own file may raise anything
            raise UserError(f"--reward {text}: {in_short(error)}{place_of(error)}") from error
        if math.isnan(value):
            raise UserError(f"--reward {text}: returned NaN{line_of(function)}: return a number, higher is better")
        return value

    return Reward(of)


def line_of(function: Callable) -> str:
    """Where a user's function, or class, begins."""
    function = getattr(function, "func", function)  # of a partial
    try:
        lines, number = inspect.getsourcelines(function)
        return f" ({Path(inspect.getsourcefile(function)).name}, line {number}: {lines[0].strip()})"
    except (OSError, TypeError):
        return ""
