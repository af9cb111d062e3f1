"""Write the weights of any supported network with the universal synthesiser.

    python -m universal.synthesize --model target_cnn:TargetCNN --out weights.pth
    python -m universal.synthesize --model my_net.py:Net --out weights.pth --count 5 --evaluate

saves a `state_dict` that the network loads as it is. With --count 5 it saves weights_1.pth to weights_5.pth, from the
seeds SEED to SEED + 4.
"""

import argparse
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from scripting import UserError, add_data_options, number, option_parser, output_file, run_script, save_tensors
from target_cnn import Dataset, Score, score, scoring_data
from universal.graph import ComputationGraph
from universal.synthesizer import SYNTHESIZER, load_synthesizer


def parse_options() -> argparse.Namespace:
    parser = option_parser("Write the weights of a network with the universal synthesiser.", seed=0)
    required = {"required": True, "default": argparse.SUPPRESS}  # --help shows no default where there is none
    parser.add_argument("--model", **required, help="what builds it: module:name, or my_net.py:Net (required)")
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
        network = build_network(build, options.model).to(options.device)
        start = time.perf_counter()
        try:
            synthesizer.synthesize(network, steps=options.steps)
            milliseconds = 1000 * (time.perf_counter() - start)
            result = scored(network, data) if options.evaluate else None
        except ValueError as error:
            raise UserError(f"{options.model}: {error}") from error
        line = f"Seed {seed}: wrote {sum(p.numel() for p in network.parameters()):,} weights in {milliseconds:.0f} ms"
        if result is not None:
            line += f", Accuracy = {result.accuracy_percent:.2f}%"
        print(line, flush=True)
        states.append({name: tensor.cpu() for name, tensor in network.state_dict().items()})
    for index, state in enumerate(states, start=1):  # only now: a network that cannot be written leaves no file
        path = options.out if options.count == 1 else options.out.with_stem(f"{options.out.stem}_{index}")
        save_tensors(path, state)
        print(f"Weights saved to {path}")


def scored(network: nn.Module, data: Dataset) -> Score:
    """The score of `network` on the images of its classes, with the channels and in the precision that it takes.

    Raises ValueError if there is no such image, or if the network cannot compute in that precision here.
    """
    graph = ComputationGraph(network)
    data = data[data.labels < graph.classes]
    if not len(data.labels):
        raise ValueError(f"none of the --validation images is of its {graph.classes} classes: hold out more of them")
    precision = next(iter(graph.parameters.values())).dtype
    images = data.images.expand(-1, graph.channels, -1, -1).to(precision)
    try:
        return score(graph.module, data._replace(images=images))
    except RuntimeError as error:
        raise ValueError(f"cannot be scored on {precision} images ({in_short(error)}): leave out --evaluate") from error


def load_builder(text: str) -> Callable[[], nn.Module]:
    """The callable that `module:name` or `path/to/file.py:name` names. Raises UserError if there is none."""
    place, colon, name = text.rpartition(":")
    if not colon or not name or not place:
        raise UserError(f"--model {text}: give module:name or file.py:name, such as target_cnn:TargetCNN")
    try:
        if place.endswith(".py"):
            if not Path(place).is_file():
                raise UserError(f"--model {text}: {place} is no file: give the path of a Python file")
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            sys.path.insert(0, str(Path(place).resolve().parent))  # what the file imports may lie beside it
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except UserError:
        raise
    except Exception as error:  # a person's own file may raise anything
        raise UserError(f"--model {text}: {place} cannot be imported ({in_short(error)}): correct it first") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"--model {text}: {place} has no callable {name}: name a class or function of it")
    return getattr(module, name)


def build_network(build: Callable[[], nn.Module], text: str) -> nn.Module:
    """What `build` returns. Raises UserError if that is not a module."""
    try:
        network = build()
    except Exception as error:
        raise UserError(f"--model {text}: cannot be built without arguments ({in_short(error)})") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"--model {text}: gives a {type(network).__name__}, not a torch.nn.Module")
    return network


def in_short(error: Exception) -> str:
    """The kind of an error and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


if __name__ == "__main__":
    run_script(main)
