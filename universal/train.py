"""Train the universal synthesiser: no recorded weights, only the reward of what it writes.

    python -m universal.train

draws at every step random data sets, some of MNIST's digits or unions of them, in any size and contrast, random
architectures, plain ones at first, and random inits. The synthesiser writes the layers of each network from a few
labelled images; what a ridge regression on them makes of other images of the same classes, differentiated through all
that, trains it (design document, section 4.1.3; regressions within: Bertinetto et al. 2019, arXiv 1805.08136). Killed,
the same command goes on from its last checkpoint. With --tasks all it learns from other images too.

    python -m universal.train --data pictures/ --out mine.pth

trains on from the general synthesiser to a specialist for networks of one's own images: for some of their classes, or
unions of them, in any size and contrast. It ends by saying from how many networks on that pays for itself.

    torchrun --nproc-per-node=2 -m universal.train

trains on several processes or machines, each with its own data sets and architectures.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist

from scripting import UserError, add_training_options, number, option_parser, run_script, run_to_end, start_processes
from target_cnn import Dataset
from universal.data.sources import DATA_HELP
from universal.data.splits import split_images
from universal.model.synthesizer import MAKER, SYNTHESIZER, load_synthesizer, save_synthesizer
from universal.training.specialist import NETWORKS, conclusion_of, gain
from universal.training.tasks import KINDS
from universal.training.training import LEARNED, Training


def parse_options() -> argparse.Namespace:
    parser = option_parser("Train the universal synthesiser on random data sets and architectures.", seed=0)
    parser.add_argument("--steps", type=number(int, 1, 10**8), default=2_000, help="of learning")
    parser.add_argument("--networks", type=number(int, 1, 1000), default=4, help="drawn in a step, per process")
    parser.add_argument("--start-from", type=Path, help="file of a synthesiser to train on")
    parser.add_argument("--lr", type=number(float, 1e-9, 1e3), default=8e-4, help="highest learning rate of AdamW")
    parser.add_argument(
        "--tasks", nargs="+", choices=[*KINDS, "all"], default=["mnist"], help="kinds of data sets (default: mnist)"
    )
    parser.add_argument(
        "--families", nargs="+", choices=LEARNED, default=list(LEARNED), help="of networks (default: all)"
    )
    parser.add_argument("--data", type=Path, help=f"in the place of --tasks, {DATA_HELP}")
    add_training_options(parser, report_every=100, checkpoint="universal_training.pth", out=SYNTHESIZER)
    options = parser.parse_args()
    if options.data is not None:
        if options.out == SYNTHESIZER:
            raise UserError(f"--data: would replace {SYNTHESIZER.name}, which is for any data: give --out")
        options.start_from = options.start_from or SYNTHESIZER
    return options


def main() -> None:
    options = parse_options()
    rank, processes = start_processes(options.device)
    own = None if options.data is None else split_images(options.data, 0, torch.device("cpu"))
    training = Training(options, rank, processes, own and own[0])
    if rank == 0:
        parameters = sum(parameter.numel() for parameter in training.synthesizer.parameters())
        print(f"Using device: {options.device}, processes: {processes}")
        print(f"Training a synthesiser of {parameters:,} parameters for {options.steps} steps", flush=True)
    run_to_end(training, MAKER, rank)
    if processes > 1:
        dist.destroy_process_group()
    if rank == 0:
        synthesizer = training.average.module.cpu()
        synthesizer.seconds = {
            "recording": 0.0,
            "training": training.earlier_seconds + training.seconds,
        }  # nothing is recorded
        save_synthesizer(synthesizer, options.out)
        options.checkpoint.unlink(missing_ok=True)
        print(f"Trained in {training.seconds / 60:.1f} min")
        print(f"Synthesiser saved to {options.out}", flush=True)
        if own is not None:
            before, after = (load_synthesizer(path, options.device) for path in (options.start_from, options.out))
            own = [Dataset(*(values.to(options.device) for values in part)) for part in own]
            gains = [gain(before, after, *own, options.seed + place) for place in range(NETWORKS)]
            print(conclusion_of(gains, training.seconds))


if __name__ == "__main__":
    run_script(main)
