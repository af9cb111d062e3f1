"""Generators of flat TargetCNN weights: the diffusion model, or the synthesiser behind the same interface; and the
options of the scripts that evaluate them."""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion_model import load_diffusion
from scripting import add_data_options, add_output_options, load_file, number, option_parser
from target_cnn import CHECKPOINTS, Dataset, TargetCNN, flatten_weights, load_weights, training_data
from universal.model.synthesizer import GraphWeightSynthesizer, is_synthesizer, load_synthesizer
from universal.rules.synthesis import write


def evaluation_parser(description: str, plot: str, results: str | None = None) -> argparse.ArgumentParser:
    """The options that both evaluations take. The seed is none that training uses by default."""
    parser = option_parser(description, seed=1000)
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("diffusion_optimizer.pth"),
        help="what to evaluate: a diffusion model, or universal/synthesizer.pth",
    )
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="directory of the recorded weights")
    parser.add_argument("--steps", type=number(int, 1, 1000), default=6, help="generative steps to take in a row")
    add_data_options(parser)
    add_output_options(parser, plot, results)
    return parser


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
