"""Step 2: learn to map the weights of epoch N, and N, to those of epoch N + 1 (design document, section 2.2.2).

    python train_diffusion.py

reads checkpoints_weights_cnn/ and writes diffusion_optimizer.pth. It trains in the span of the recorded weights, which
`diffusion_model.SpanDiffusion` derives: the same network as dense training in these coordinates, in a second.
"""

import argparse
import time
from pathlib import Path

import torch

from diffusion_model import SpanDiffusion, save_diffusion, train_in_span
from scripting import UserError, number, option_parser, output_file, run_script
from target_cnn import CHECKPOINTS, find_runs, load_log, load_run


def parse_options() -> argparse.Namespace:
    parser = option_parser("Train the diffusion model on all consecutive pairs of recorded weights.", seed=0)
    parser.add_argument("--epochs", type=number(int, 1, 1_000_000), default=100, help="passes over all pairs")
    parser.add_argument("--lr", type=number(float, 1e-9, 1e3), default=1e-3, help="learning rate of Adam")
    parser.add_argument(
        "--shrinkage", type=number(float, 0, 1e6), default=2.0, help="weight of the squared output in the loss"
    )
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="directory of the recorded weights")
    parser.add_argument(
        "--out", type=output_file(".pth", ".pt"), default="diffusion_optimizer.pth", help="file to write"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    print(f"Using device: {options.device}")
    directories = find_runs(options.checkpoints)
    runs = [load_run(directory).to(options.device) for directory in directories]
    logs = [load_log(directory) for directory in directories]
    if any(len(run) < 2 for run in runs):
        raise UserError(f"{options.checkpoints}: one checkpoint makes no pair: run train_target_model.py for an epoch")
    pairs = sum(len(run) - 1 for run in runs)
    print(f"Learning from {pairs} pairs of consecutive epochs in {options.checkpoints}")

    torch.manual_seed(options.seed)
    start = time.perf_counter()
    model = SpanDiffusion.of_runs(runs)
    train_in_span(model, options.epochs, options.lr, options.shrinkage)
    model.seconds["training"] = time.perf_counter() - start
    if all(logs):  # what recording cost is only known of runs that train_target_model.py recorded
        model.seconds["recording"] = sum(epoch["seconds"] for log in logs for epoch in log)
    print(f"Trained in {model.seconds['training']:.2f} s")
    save_diffusion(model.cpu(), options.out)
    print(f"Diffusion model saved to {options.out}")


if __name__ == "__main__":
    run_script(main)
