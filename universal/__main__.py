"""Write the weights of any network with the universal synthesiser.

    python -m universal --model target_cnn:TargetCNN --out weights.pth
    python -m universal --model my_net.py:Net --out weights.pth --count 5 --evaluate
    python -m universal --model 'torchvision.models:resnet18(num_classes=10)' --out weights.pth

saves a `state_dict` that the network loads as it is, and names what it leaves at its init. With --count 5 it saves
weights_1.pth to weights_5.pth, from the seeds SEED to SEED + 4.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from scripting import (
    UserError,
    add_data_options,
    in_short,
    number,
    option_parser,
    output_file,
    run_script,
    save_tensors,
)
from target_cnn import Dataset, Score, score, scoring_data
from universal.builders import MODEL_HELP, load_builder
from universal.model.looking import DoubtfulWeights
from universal.model.synthesizer import SYNTHESIZER, GraphWeightSynthesizer, load_synthesizer
from universal.reading.graph import ComputationGraph, Logits
from universal.reading.refusals import place_of


def parse_options() -> argparse.Namespace:
    parser = option_parser("Write the weights of a network with the universal synthesiser.", seed=0)
    required = {"required": True, "default": argparse.SUPPRESS}  # --help shows no default where there is none
    parser.add_argument("--model", **required, help=f"{MODEL_HELP} (required)")
    parser.add_argument(
        "--out",
        type=output_file(".pth", ".pt"),
        **required,
        help="file to write; with --count, its numbered siblings (required)",
    )
    parser.add_argument("--count", type=number(int, 1, 100_000), default=1, help="networks, from seeds SEED on")
    parser.add_argument("--steps", type=number(int, 1, 1000), default=1, help="generative steps to take in a row")
    parser.add_argument("--evaluate", action="store_true", help="score what was written, on images of its classes")
    parser.add_argument("--synthesizer", type=Path, default=SYNTHESIZER, help="file of the trained synthesiser")
    add_data_options(parser)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    build = load_builder(options.model)
    synthesizer = load_synthesizer(options.synthesizer, options.device)
    data = scoring_data(options.data, options.validation, options.device) if options.evaluate else None
    states = []
    for seed in range(options.seed, options.seed + options.count):
        torch.manual_seed(seed)
        try:
            network = build().to(options.device)
            report(network, seed, options, synthesizer, data)
            states.append({name: tensor.cpu() for name, tensor in network.state_dict().items()})
        except UserError:
            raise
        except Exception as error:  # a person's own module may raise anything
            raise UserError(f"{options.model}: {blamed(error)}") from error
    for index, state in enumerate(states, start=1):  # only now: a network that cannot be written leaves no file
        path = options.out if options.count == 1 else options.out.with_stem(f"{options.out.stem}_{index}")
        save_tensors(path, state)
        print(f"Weights saved to {path}")


def report(
    network: nn.Module, seed: int, options: argparse.Namespace, synthesizer: GraphWeightSynthesizer,
    data: Dataset | None,
) -> None:  # fmt: skip
    """Write `network`, of this `seed`, and print what that gave, with the accuracy if there is `data`."""
    start = time.perf_counter()
    with warnings.catch_warnings(record=True, action="always", category=DoubtfulWeights) as doubts:
        accounts = synthesizer.write(network, steps=options.steps)
    milliseconds = 1000 * (time.perf_counter() - start)
    line = f"Seed {seed}: wrote {accounts.count:,} weights in {milliseconds:.0f} ms"
    if data is not None:
        line += f", Accuracy = {scored(network, data).accuracy_percent:.2f}%"
    print(line, flush=True)
    for warning in doubts:
        print(f"{options.model}: {warning.message}", file=sys.stderr)
    if seed == options.seed and accounts.left:
        print(f"Left at their init: {', '.join(accounts.left)}")


def blamed(error: Exception) -> str:
    """What an error says, with the line of the user's own code that it came through."""
    text, place = str(error) if isinstance(error, ValueError) else in_short(error), place_of(error)
    return text if place in text else text + place


def scored(network: nn.Module, data: Dataset) -> Score:
    """The score of `network` on the images of its classes, in the precision that it takes.

    Raises ValueError if there is no such image, or if the network cannot compute in that precision here.
    """
    graph = ComputationGraph(network)
    data = data[data.labels < graph.classes]
    if not len(data.labels):
        raise ValueError(f"none of the --validation images is of its {graph.classes} classes: hold out more of them")
    precision = next(graph.module.parameters()).dtype
    try:
        return score(Logits(graph), data._replace(images=data.images.to(precision)))
    except RuntimeError as error:
        reason = f"{in_short(error)}{place_of(error)}"
        raise ValueError(f"cannot be scored on {precision} images ({reason}): leave out --evaluate") from error


if __name__ == "__main__":
    run_script(main)
