"""Generators of flat TargetCNN weights: the diffusion model, or the synthesiser behind the same interface."""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion_model import load_diffusion
from scripting import load_file
from target_cnn import Dataset, TargetCNN, flatten_weights, load_weights, training_data
from universal.model.synthesizer import GraphWeightSynthesizer, is_synthesizer, load_synthesizer
from universal.rules.synthesis import write


def load_generator(path: Path, dimension: int, options: argparse.Namespace) -> nn.Module:
    """The diffusion model or the universal synthesiser that is saved at `path`, for TargetCNNs.

    The latter writes from the training images that the `options` of a script name.

    Raises UserError as `load_diffusion` and `load_synthesizer` do.
    """
    if is_synthesizer(load_file(path, maker="train_diffusion.py", mmap=True)):
        data = training_data(options.data, options.validation, options.device)
        return FlatSynthesizer(load_synthesizer(path, options.device), TargetCNN().to(options.device), data)
    return load_diffusion(path, dimension, options.device)


class FlatSynthesizer(nn.Module):
    """A synthesiser for one architecture with the interface of the diffusion models: flat weights in and out.

    It writes from labelled images, in the first of several steps; the others change nothing.
    """

    def __init__(self, synthesizer: GraphWeightSynthesizer, module: nn.Module, data: Dataset):
        super().__init__()
        self.synthesizer, self.seconds = synthesizer, synthesizer.seconds
        self.module, self.data = module, data

    @torch.no_grad()
    def forward(self, weights: Tensor, step: Tensor) -> Tensor:
        """The next weights, [batch, parameters], of `weights` [batch, parameters] at `step` [batch]."""
        rows = []
        for row, index in zip(weights, step.tolist(), strict=True):
            if index == 0:
                load_weights(self.module, row)
                write(self.module, *self.data, synthesizer=self.synthesizer)
                row = flatten_weights(self.module)
            rows.append(row)
        return torch.stack(rows)
