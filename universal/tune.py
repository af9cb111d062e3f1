"""Find the numbers that the rules leave open, by trial and error over random data sets and architectures.

    python -m universal.tune

draws in every generation a few random networks and tasks, writes each network with every candidate's numbers, and ranks
the candidates by the images that the networks get right (CMA-ES). Killed, the same command goes on from its last
report.
"""

import argparse
import os

from scripting import add_training_options, number, option_parser, run_script, run_to_end, save_json
from universal.rules.numbers import COEFFICIENTS
from universal.training.numbers import NumberSearch


def parse_options() -> argparse.Namespace:
    parser = option_parser("Find the numbers that the rules leave open, by trial and error.", seed=0)
    count = number(int, 1, 10**6)
    parser.add_argument("--generations", type=count, default=16, help="of candidates")
    parser.add_argument("--candidates", type=number(int, 4, 10_000), default=64, help="tried in each generation")
    parser.add_argument("--networks", type=count, default=4, help="random ones that each candidate writes")
    parser.add_argument("--reported", type=count, default=24, help="networks of each report")
    parser.add_argument("--deviation", type=number(float, 1e-6, 10), default=0.3, help="of the first candidates")
    parser.add_argument("--processes", type=count, default=os.cpu_count(), help="of one thread each")
    add_training_options(parser, report_every=4, checkpoint="tuning.pth", out=COEFFICIENTS)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    search = NumberSearch(options)
    run_to_end(search, "python -m universal.tune", unit="generation")
    save_json(options.out, search.result)
    options.checkpoint.unlink(missing_ok=True)
    print(f"Found in {search.seconds / 60:.1f} min")
    print(f"Numbers saved to {options.out}", flush=True)


if __name__ == "__main__":
    run_script(main)
