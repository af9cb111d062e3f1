"""Improve a synthesiser by trial and error, for a reward that nothing can differentiate.

    python -m universal.reinforce --reward ternary --out ternary.pth
    python -m universal.reinforce --reward my_reward.py:reward --model my_net.py:Net --data pictures/ --out mine.pth

In every generation, candidates for a few numbers of the synthesiser (`model/tuning.py`) write the same networks from
the same labelled images and unseen inits, and only the order of their rewards is learned from. Neither the reward nor a
written network is ever differentiated. What is saved is a synthesiser like any other. Killed, the same command goes on
bit for bit.

    torchrun --nproc-per-node=2 -m universal.reinforce --reward ternary --out ternary.pth

shares the candidates between processes or machines, which exchange nothing but rewards, and finds the same.
"""

import argparse
from pathlib import Path

import torch.distributed as dist

from scripting import (
    add_training_options,
    number,
    option_parser,
    run_script,
    run_to_end,
    start_processes,
)
from universal.builders import MODEL_HELP
from universal.data.sources import DATA_HELP
from universal.model.synthesizer import SYNTHESIZER, load_synthesizer, save_synthesizer
from universal.reinforce.reinforcement import MAKER, Reinforcement
from universal.reinforce.rewards import REWARDS


def parse_options() -> argparse.Namespace:
    parser = option_parser("Improve a synthesiser by trial and error.", seed=0)
    parser.add_argument(
        "--reward",
        required=True,
        help=f"{', '.join(REWARDS)}, or a function of the written module, my_reward.py:reward",
    )
    parser.add_argument("--synthesizer", type=Path, default=SYNTHESIZER, help="file of the synthesiser to start from")
    parser.add_argument(
        "--evaluations", type=number(int, 1, 10**9), default=4000, help="networks to write and reward, at most"
    )
    parser.add_argument("--candidates", type=number(int, 4, 10_000), default=20, help="tried in each generation")
    parser.add_argument("--networks", type=number(int, 1, 1000), default=2, help="that each candidate writes")
    parser.add_argument(
        "--limit",
        type=number(int, 2, 50_000),
        default=1000,
        help="training images that networks are written from, at most half of them",
    )
    parser.add_argument("--images", type=number(int, 1, 50_000), default=256, help="others, that reward each network")
    parser.add_argument("--deviation", type=number(float, 1e-6, 10), default=0.3, help="of the first candidates")
    parser.add_argument("--model", help=f"{MODEL_HELP} (default: random architectures)")
    add_training_options(parser, report_every=10, checkpoint="reinforcement.pth", out=Path("reinforced.pth"))
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument(
        "--validation",
        type=number(int, 1, 50_000),
        default=2000,
        help="training images kept apart for the reports, of --data at most a fifth",
    )
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    rank, processes = start_processes(options.device)
    reinforcement = Reinforcement(options, load_synthesizer(options.synthesizer), rank, processes)
    run_to_end(reinforcement, MAKER, rank, unit="generation")
    if rank == 0:
        synthesizer = reinforcement.result().cpu()
        synthesizer.seconds["training"] = synthesizer.seconds.get("training", 0.0) + reinforcement.seconds
        save_synthesizer(synthesizer, options.out)
        options.checkpoint.unlink(missing_ok=True)
        print(f"Found in {reinforcement.seconds / 60:.1f} min")
        print(f"Synthesiser saved to {options.out}", flush=True)
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
