"""Networks to try signatures on, and what these say of a whole network."""

import argparse
from collections.abc import Iterator

import torch
from torch import nn

from target_cnn import Dataset, TargetCNN, train_with_adam
from universal.signatures.scorer import Scorer
from universal.signatures.statistics import matrix_of, signature

EPOCH = 60_000  # images


def network_score(scorer: Scorer, network: nn.Module) -> float:
    """The mean score of a network's weights, each tensor counted by its size."""
    weights = [parameter.detach() for parameter in network.parameters() if parameter.dim() > 1]
    total = sum(scorer.judge(signature(matrix_of(weight)))["score"] * weight.numel() for weight in weights)
    return total / sum(weight.numel() for weight in weights)


def trained_networks(
    options: argparse.Namespace, seed: int, data: Dataset, epochs: int, label: str
) -> Iterator[TargetCNN]:
    """A TargetCNN before and after each of so many epochs of Adam: 469 batches, of however few images `data` has."""
    torch.manual_seed(seed)
    network = TargetCNN().to(options.device, memory_format=torch.channels_last)
    yield network
    for _ in train_with_adam(network, data[torch.arange(EPOCH) % len(data.labels)], epochs, label=label):
        yield network
