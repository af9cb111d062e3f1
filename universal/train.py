"""Train the universal synthesiser: no recorded checkpoints, only the reward of the networks that it writes.

    python -m universal.train

draws at every step a random architecture, a random init of it and a batch of training images; the synthesiser writes
the weights, and the cross-entropy of the written network on the images, differentiated through the network, trains the
synthesiser (design document, section 4.1.3). Killed, the same command goes on from its last checkpoint.

    torchrun --nproc-per-node=2 -m universal.train

trains on several processes or machines, each with its own architectures, inits and images.
"""

import argparse
from pathlib import Path

import torch.distributed as dist

from scripting import (
    add_data_options,
    add_training_options,
    number,
    option_parser,
    run_script,
    run_to_end,
    start_processes,
)
from universal.model.synthesizer import MAKER, SYNTHESIZER, save_synthesizer
from universal.training.architectures import FAMILIES
from universal.training.training import Training


def parse_options() -> argparse.Namespace:
    parser = option_parser("Train the universal synthesiser on random architectures.", seed=0)
    parser.add_argument("--steps", type=number(int, 1, 10**8), default=5_000, help="architectures drawn, per process")
    parser.add_argument("--batch-size", type=number(int, 1, 10_000), default=128, help="images of the first steps")
    parser.add_argument("--lr", type=number(float, 1e-9, 1e3), default=1e-3, help="highest learning rate of AdamW")
    parser.add_argument("--probes", type=number(int, 10, 10_000), default=300, help="learned images")
    parser.add_argument(
        "--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: fp32 on a CPU, else the faster"
    )
    parser.add_argument("--start-from", type=Path, help="file of a synthesiser to train on")
    parser.add_argument(
        "--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="of networks (default: all)"
    )
    add_training_options(parser, report_every=250, checkpoint="universal_training.pth", out=SYNTHESIZER)
    add_data_options(parser)
    parser.set_defaults(validation=2000)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    rank, processes = start_processes(options.device)
    training = Training(options, rank, processes)
    if rank == 0:
        parameters = sum(parameter.numel() for parameter in training.synthesizer.parameters())
        precision = "bf16" if training.use_bf16 else "fp32"
        print(f"Using device: {options.device}, precision: {precision}, processes: {processes}")
        print(f"Training a synthesiser of {parameters:,} parameters for {options.steps} steps", flush=True)
    run_to_end(training, MAKER, rank)
    if rank == 0:
        synthesizer = training.average.module.cpu()
        seconds = training.earlier_seconds + training.seconds
        synthesizer.seconds = {"recording": 0.0, "training": seconds}  # nothing is recorded
        save_synthesizer(synthesizer, options.out)
        options.checkpoint.unlink(missing_ok=True)
        print(f"Trained in {training.seconds / 60:.1f} min")
        print(f"Synthesiser saved to {options.out}", flush=True)
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
