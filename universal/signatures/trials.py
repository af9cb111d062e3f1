"""Networks to try signatures on, and what these say of a whole network."""

import argparse
import math
from collections.abc import Iterator

import torch
from torch import nn

from target_cnn import Dataset, TargetCNN, fast_bf16, train_epoch
from universal.signatures.scorer import Scorer
from universal.signatures.statistics import matrix_of, signature

BATCH_SIZE, EPOCH = 128, 60_000  # images of a batch and of an epoch


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
    adam = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    yield network
    for epoch in range(1, epochs + 1):
        rounds = math.ceil(EPOCH / len(data.labels))
        order = torch.cat([torch.randperm(len(data.labels)) for _ in range(rounds)])[:EPOCH].to(options.device)
        train_epoch(network, adam, data[order], BATCH_SIZE, fast_bf16(options.device), f"{label}, epoch {epoch}")
        yield network
