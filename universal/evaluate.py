"""Evaluate the universal synthesiser on networks, and data sets, that it was never trained on.

    python -m universal.evaluate
    python -m universal.evaluate --data mnist path/to/fashion-mnist --images 1000 all --networks TargetCNN

writes the networks from data sets, and prints for each number of images where Adam comes to in the same seconds, on the
same images and threads, and when it matches what was written. It saves a picture and, as universal_results.json,
everything it found. A run that was killed goes on where it was, from its results.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch

from scripting import (
    UserError,
    add_output_options,
    add_validation_option,
    number,
    option_parser,
    refused_as,
    run_script,
    save_json,
)
from target_cnn import fast_bf16
from universal.evaluation.clock import RATES
from universal.evaluation.from_data import conclusion_of, evaluate_from_data, load_data_set, table_of
from universal.evaluation.networks import EVALUATED
from universal.evaluation.pictures import plot_from_data
from universal.model.synthesizer import SYNTHESIZER, load_synthesizer

ALL = "all"  # as a number of images


def number_of_images(text: str) -> int | str:
    """An argparse type: how many images to write from."""
    return ALL if text == ALL else number(int, 20, 10**9)(text)


def parse_options() -> argparse.Namespace:
    parser = option_parser("Evaluate the universal synthesiser on networks that it was never trained on.", seed=1000)
    parser.add_argument("--synthesizer", type=Path, default=SYNTHESIZER, help="file of the trained synthesiser")
    parser.add_argument(
        "--networks", nargs="+", choices=EVALUATED, metavar="NAME", default=list(EVALUATED), help="networks to evaluate"
    )
    parser.add_argument("--inits", type=number(int, 2, 1000), default=3, help="unseen inits, from seeds SEED on")
    parser.add_argument(
        "--data", nargs="+", metavar="NAME", default=["mnist"],
        help="data sets to write the networks from: mnist, or where labelled images lie",
    )  # fmt: skip
    parser.add_argument(
        "--images", nargs="+", type=number_of_images, metavar="N", default=[1000, 10_000, ALL],
        help="numbers of images to write from",
    )  # fmt: skip
    add_output_options(parser, plot="assets/universal.png", results="universal_results.json")
    add_validation_option(parser)
    options = parser.parse_args()
    for name in options.data:
        if name != "mnist" and not Path(name).exists():
            parser.error(f"--data {name}: no such file or directory: give mnist, or labelled images")
    return options


def main() -> None:
    options = parse_options()
    print(f"Using device: {options.device}")
    seeds = range(options.seed, options.seed + options.inits)
    synthesizer = load_synthesizer(options.synthesizer, options.device)
    record = started(options)
    rows = {(row["data"], row["number"], row["network"]): row for row in record["rows"]}
    asked = []
    for name in options.data:
        data = load_data_set(name, options.validation, options.device)
        known, held_out, test = (len(part.labels) for part in data)
        print(f"\n{name}: {known:,} images to learn from, {held_out:,} on which the best of Adam's rates {RATES} is "
              f"chosen at each moment, and {test:,} that score", flush=True)  # fmt: skip
        for count in options.images:
            if count != ALL and count > known:
                print(f"\n{name}: {count:,} images left out: there are fewer")
                continue
            group = [(name, str(count), network) for network in options.networks]
            for key in [key for key in group if key not in rows]:
                try:
                    row = evaluate_from_data(key[-1], data, None if count == ALL else count, seeds, synthesizer)
                except ValueError as error:  # of images that nothing can be learned from
                    raise UserError(f"{name}: {error}") from error
                rows[key] = {"data": name, "number": str(count)} | row
                save_json(options.results, record | {"rows": list(rows.values())})
                print(f"{', '.join(key)}: {row['written']['mean']:.2f} %", file=sys.stderr, flush=True)
            found = [rows[key] for key in group]
            asked += found
            print(f"\n{name}, {found[0]['images']:,} images:\n{table_of(found)}\n{conclusion_of(found)}", flush=True)
    if not asked:
        raise UserError("--images: no data set holds so many: give smaller numbers, or all")
    if len(asked) > len(options.networks):
        print(f"\nAll together:\n{conclusion_of(asked)}")
    print(f"Results saved to {options.results}")
    plot_from_data(asked, options.plot)
    print(f"Plot saved to {options.plot}")


def started(options: argparse.Namespace) -> dict:
    """The record of an evaluation on data sets: of one that was killed, if it had the same options, or an empty one."""
    settings = {
        "seed": options.seed, "inits": options.inits, "validation": options.validation, "device": str(options.device),
        "synthesizer": hashlib.sha256(options.synthesizer.read_bytes()).hexdigest(),
        "threads": torch.get_num_threads(), "bf16": fast_bf16(options.device),
    }  # fmt: skip
    if not options.results.exists():
        return {"settings": settings, "rows": []}
    line = f"{options.results}: is of another evaluation, or damaged: delete it or choose another --results"
    with refused_as(line):
        record = json.loads(options.results.read_text())
        if record["settings"] != settings:
            raise UserError(line)
        print(f"Going on from {len(record['rows'])} rows, saved in {options.results}")
        return record


if __name__ == "__main__":
    run_script(main)
