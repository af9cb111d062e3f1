"""One expert of the synthesiser: what it has learned, and how it is asked for a network's weights.

Design document, sections 4.1.1 and 4.1.3. What it does within the network's forward pass is in `writing.py`.
"""

import torch
from torch import Tensor, nn

from universal.mnist import IMAGE_CHANNELS
from universal.model.balance import balance
from universal.model.description import DESCRIPTION, FREQUENCIES, AcrossNeurons, ConditionedMLP, mlp
from universal.model.neurons import Reader
from universal.model.task import Task
from universal.model.tuning import Tuning
from universal.model.weights import Writer
from universal.model.writing import Writing
from universal.reading.graph import ComputationGraph


class Expert(nn.Module):
    """(graph, current weights, step, task) -> new weights, equivariant to permutations of hidden neurons.

    `GraphWeightSynthesizer` says what the settings are; `task` is what the expert has learned of MNIST. With `tuning`
    its numbers depend on those too.
    """

    def __init__(
        self, probes: int, convolution_probes: int, classes: int, dimension: int, concepts: int, rank: int, hidden: int,
        tuning: Tuning | None,
    ):  # fmt: skip
        super().__init__()
        self.convolution_probes = convolution_probes
        self.task = Task(probes, classes, concepts, dimension)
        self.describe = mlp(DESCRIPTION, hidden, dimension)
        self.reader = Reader(dimension, hidden, rank)
        self.writer = Writer(dimension, hidden, rank, concepts, tuning)
        self.image_keys = nn.Parameter(torch.randn(max(IMAGE_CHANNELS), dimension))
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

        Raises ValueError if the graph has more classes than the task.
        """
        task = task or self.task
        if graph.classes > task.labels.shape[1]:
            raise ValueError(
                f"{graph.last.name}: has {graph.classes} classes, but the synthesiser knows {task.labels.shape[1]}"
            )
        written = Writing(self, graph, weights, step, task).write()
        return balance(graph, written)
