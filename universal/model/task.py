"""What is learned of a task, apart from what is learned of networks: probes, their labels, and what they stand for."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from universal.mnist import IMAGE_SHAPE


class Task(nn.Module):
    """A classification of inputs of some `shape`, as a generator of weights knows it.

    `probes` [probes, *shape] are learned inputs and `labels` [probes, classes] what is to be said of them;
    `concepts` [probes, concepts] what hidden neurons may stand for; `classes` [classes, dimension] embeds the classes,
    and `responses` [probes, dimension] what it says of a neuron to respond to a probe.
    """

    def __init__(
        self, probes: int, classes: int, concepts: int, dimension: int, shape: Sequence[int] = IMAGE_SHAPE
    ):  # fmt: skip
        super().__init__()
        self.probes = nn.Parameter(torch.randn(probes, *shape))
        self.labels = nn.Parameter(torch.randn(probes, classes))
        self.concepts = nn.Parameter(torch.randn(probes, concepts))
        self.classes = nn.Parameter(torch.randn(classes, dimension))
        self.responses = nn.Parameter(torch.randn(probes, dimension) / math.sqrt(probes))

    @torch.no_grad()
    def start_from(self, images: Tensor, labels: Tensor) -> None:
        """Before training: take real inputs [probes, *shape] and labels [probes] as the probes."""
        one_hot = F.one_hot(labels, self.labels.shape[1]).float()
        self.probes.copy_(images)
        self.labels.copy_(one_hot - 1 / self.labels.shape[1])
        shown = min(self.concepts.shape[1], one_hot.shape[1])
        self.concepts[:, :shown] = 3 * one_hot[:, :shown]

    def data(self) -> list[nn.Parameter]:
        """The parameters that are data: they take a larger learning rate than the networks."""
        return [self.probes, self.labels, self.concepts]
