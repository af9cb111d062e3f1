"""Generators of flat TargetCNN weights: the diffusion model, or the synthesiser behind the same interface."""

from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion_model import load_diffusion
from scripting import load_file
from target_cnn import TargetCNN
from universal.model.balance import balance
from universal.model.synthesizer import GraphWeightSynthesizer, is_synthesizer, load_synthesizer
from universal.reading.graph import ComputationGraph


def load_generator(path: Path, dimension: int, device: torch.device) -> nn.Module:
    """The diffusion model or the universal synthesiser that is saved at `path`, for TargetCNNs.

    Raises UserError as `load_diffusion` and `load_synthesizer` do.
    """
    if is_synthesizer(load_file(path, maker="train_diffusion.py", mmap=True)):
        return FlatSynthesizer(load_synthesizer(path, device), TargetCNN())
    return load_diffusion(path, dimension, device)


class FlatSynthesizer(nn.Module):
    """A synthesiser for one architecture with the interface of the diffusion models: flat weights in and out."""

    def __init__(self, synthesizer: GraphWeightSynthesizer, module: nn.Module):
        super().__init__()
        self.synthesizer, self.seconds = synthesizer, synthesizer.seconds
        self.graph = ComputationGraph(module)

    @torch.inference_mode()
    def forward(self, weights: Tensor, step: Tensor) -> Tensor:
        """The next weights, [batch, parameters], of `weights` [batch, parameters] at `step` [batch]."""
        parameters = dict(self.graph.module.named_parameters())
        rows = []
        for row, index in zip(weights, step.tolist(), strict=True):
            parts = row.split([parameter.numel() for parameter in parameters.values()])
            own = {name: part.view_as(like) for (name, like), part in zip(parameters.items(), parts, strict=True)}
            written = balance(self.graph, self.synthesizer(self.graph, own, index), self.synthesizer.task.probes)
            rows.append(torch.cat([written[name].reshape(-1) for name in parameters]))
        return torch.stack(rows)
