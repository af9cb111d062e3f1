"""Balance: the same network in weights of other sizes."""

import math

import torch
from torch import Tensor

from universal.reading.graph import ComputationGraph


def balance(graph: ComputationGraph, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same network with layers as large as PyTorch's default init has them, relative to each other.

    It computes the same, in weights of the sizes that an optimiser like Adam usually starts from. Only chains of layers
    that scale with their inputs can be rescaled so; other networks are returned as they are.
    """
    if not graph.is_rescalable:
        return weights
    norms = torch.stack([weights[layer.weight.name].norm() for layer in graph.layers])
    usual = torch.tensor([math.sqrt(layer.shape[0] / 3) for layer in graph.layers]).to(norms)
    factors = (usual / (norms + 1e-8)).log()
    return graph.rescaled(weights, (factors - factors.mean()).exp())
