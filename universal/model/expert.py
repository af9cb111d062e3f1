"""One expert of the synthesiser: what it has learned, and how it is asked for a network's weights.

Design document, sections 4.1.1 and 4.1.3. What it does within the network's forward pass is in `writing.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from universal.mnist import IMAGE_SHAPE
from universal.model.description import DESCRIPTION, FREQUENCIES, AcrossNeurons, ConditionedMLP, mlp
from universal.model.neurons import Reader
from universal.model.task import Task
from universal.model.tuning import Tuning
from universal.model.weights import Writer
from universal.model.writing import Writing
from universal.reading.graph import ComputationGraph

LEARNED_CHANNELS = 3  # of inputs, whose keys are learned; what further ones, of tables and signals, are is only random


class Expert(nn.Module):
    """(graph, current weights, step, task) -> new weights, equivariant to permutations of hidden neurons.

    `GraphWeightSynthesizer` says what the settings are; `task` is what the expert has learned of MNIST. With `tuning`
    its numbers depend on those too.
    """

    def __init__(
        self, probes: int, convolution_probes: int, classes: int, dimension: int, concepts: int, rank: int, hidden: int,
        tuning: Tuning | None, shape: Sequence[int] = IMAGE_SHAPE,
    ):  # fmt: skip
        super().__init__()
        self.convolution_probes = convolution_probes
        self.task = Task(probes, classes, concepts, dimension, shape)
        self.describe = mlp(DESCRIPTION, hidden, dimension)
        self.reader = Reader(dimension, hidden, rank)
        self.writer = Writer(dimension, hidden, rank, concepts, tuning)
        self.image_keys = nn.Parameter(torch.randn(LEARNED_CHANNELS, dimension))
        self.place_key = nn.Linear(FREQUENCIES**2, dimension, bias=False)
        self.key = ConditionedMLP(dimension, dimension, hidden, dimension)
        self.key_norm = nn.Sequential(nn.LayerNorm(dimension), AcrossNeurons())
        self.variant = nn.Linear(dimension, dimension)
        self.place_values = mlp(dimension, hidden, FREQUENCIES**2)
        self.place_scale = nn.Parameter(torch.zeros(()))
        self.gain_scale = nn.Parameter(torch.zeros(()))
        self.seen = nn.Linear(dimension, dimension, bias=False)
        nn.init.zeros_(self.seen.weight)

    def forward(
        self, graph: ComputationGraph, weights: dict[str, Tensor], step: int = 0, task: Task | None = None
    ) -> dict[str, Tensor]:
        """New weights for `graph`, by name, from its current `weights`. `step` 0 starts from a random init.

        Raises ValueError if the graph takes other inputs than the task has, or has more classes.
        """
        task = task or self.task
        shape, most = [*task.probes.shape[1:]], task.labels.shape[1]
        if [*graph.example.shape[1:]] != shape or graph.classes > most:
            raise ValueError(
                f"{graph.last.name}: has {graph.classes} classes of inputs of shape {[*graph.example.shape[1:]]}, but "
                f"the synthesiser was trained for {most} at most, of inputs of shape {shape}"
            )
        return Writing(self, graph, weights, step, task).write()

    def probes_for(self, graph: ComputationGraph) -> int:
        """How many probes a network is written from: with convolutions, each costs more."""
        count = len(self.task.probes)
        return min(count, self.convolution_probes) if graph.convolutional else count

    def keys_of_inputs(self, channels: int) -> Tensor:
        """The keys of the inputs' channels, [channels, dimension]."""
        generator = torch.Generator().manual_seed(0)
        shape = (max(0, channels - LEARNED_CHANNELS), self.image_keys.shape[1])
        more = torch.randn(shape, dtype=torch.float32, generator=generator)
        return torch.cat([self.image_keys[:channels], more.to(self.image_keys)])
