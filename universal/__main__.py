"""Write the weights of any network from labelled images: your own, or else MNIST.

    python -m universal --model my_net.py:Net --data pictures/ --out weights.pth
    python -m universal --model my_net.py:Net --data images.npz --out weights.pth --evaluate --compare
    python -m universal --model target_cnn:TargetCNN --out weights.pth
    python -m universal --model 'torchvision.models:resnet18(num_classes=10)' --out weights.pth --count 5

saves a `state_dict` that the network loads as it is, and names what it leaves at its init. Beside it, as weights.json,
it saves what else it takes to classify a picture. With --count 5 it saves weights_1.pth to weights_5.pth,
from the seeds SEED to SEED + 4.
"""

import argparse
import contextlib
import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from scripting import (
    MNIST,
    UserError,
    in_short,
    number,
    option_parser,
    output_file,
    run_script,
    save_file,
    save_tensors,
    start_processes,
)
from target_cnn import load_mnist
from universal.builders import MODEL_HELP, load_builder
from universal.data.images import ImageSet, load_images
from universal.data.labelled import FOLDS, MOST_IMAGES
from universal.data.sources import DATA_HELP
from universal.evaluation.comparison import accuracy_percent, compare, comparison_table, conclusion
from universal.model.synthesizer import SYNTHESIZER, load_synthesizer
from universal.reading.refusals import place_of
from universal.rules.looking import DoubtfulWeights
from universal.rules.search import search
from universal.rules.synthesis import Accounts, write


def parse_options() -> argparse.Namespace:
    parser = option_parser("Write the weights of a network from labelled images.", seed=0)
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument(
        "--out",
        type=output_file(".pth", ".pt"),
        required=True,
        help="file to write, and its sibling .json; with --count, their numbered siblings",
    )
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--size", type=size, help="pixels, as 64 or 48x64 (height, width); else what the network takes")
    parser.add_argument("--channels", type=int, choices=(1, 3), help="grey or colours; else what the network takes")
    parser.add_argument(
        "--limit", type=number(int, 2, 10**9), default=MOST_IMAGES, help="images to write from, at most"
    )
    parser.add_argument("--skip-broken", action="store_true", help="broken pictures are no reason for exit code 2")
    parser.add_argument(
        "--search", type=number(float, 1e-3, 10**7), metavar="SECONDS",
        help="write it again and again for so long, and keep the one that is best on the fifth held out",
    )  # fmt: skip
    parser.add_argument("--count", type=number(int, 1, 100_000), default=1, help="networks, from seeds SEED on")
    parser.add_argument(
        "--evaluate", action="store_true",
        help="score what was written, on test images of its classes; with none in --data, on the fifth held out",
    )  # fmt: skip
    parser.add_argument("--compare", action="store_true", help="train the first network with Adam beside it")
    parser.add_argument("--plot", type=output_file(".png", ".pdf", ".svg"), help="picture of --compare to save")
    parser.add_argument("--synthesizer", type=Path, default=SYNTHESIZER, help="file of the trained synthesiser")
    options = parser.parse_args()
    if options.plot and not options.compare:
        parser.error("--plot needs --compare")
    if options.data is not None and not options.data.exists():
        parser.error(f"--data {options.data}: no such file or directory: give labelled images")
    if options.out.with_suffix(".json").is_dir():
        parser.error(f"{options.out.with_suffix('.json')} is a directory, and would be written beside --out")
    return options


def size(text: str) -> tuple[int, int]:
    """An argparse type: the height and width of images in pixels."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    sides = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not all(1 <= side <= 4096 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is no size in pixels: give one such as 64 or 48x64, up to 4096")
    return sides


def main() -> None:
    options = parse_options()
    build = load_builder(options.model)
    rank, processes = start_processes(options.device)
    for option in ("compare", "search"):
        if getattr(options, option) and processes > 1:
            raise UserError(f"--{option}: runs in one process alone: leave out torchrun")
    synthesizer = load_synthesizer(options.synthesizer, options.device)
    searching = partial(search, seconds=options.search) if options.search else write
    write_from = partial(searching, limit=options.limit, synthesizer=synthesizer)
    options.data = options.data or mnist_files()
    torch.manual_seed(options.seed)
    images = load_images(
        options.data, build(), options.size, options.channels, options.limit, rank=rank, processes=processes
    )
    if rank == 0:
        describe(images, options)
        print(f"Writing {options.model}: seconds, or minutes where it is large", flush=True)
    for seed in range(options.seed, options.seed + options.count):
        torch.manual_seed(seed)
        with blaming(options):
            network = build().to(options.device)
            start = time.perf_counter()
            with warnings.catch_warnings(record=True, action="always", category=DoubtfulWeights) as doubts:
                accounts = write_from(network, images.train.to(options.device).loader(), seed=seed)
            seconds = time.perf_counter() - start
        if rank == 0:
            with blaming(options):
                path = save(network, seed, options, images)  # before it is scored, so that it is not lost
                report(network, seed, options, images, accounts, seconds)
            for warning in doubts:
                print(f"{options.model}: {warning.message}", file=sys.stderr)
            print(f"Weights saved to {path}, and how to use them to {path.with_suffix('.json')}", flush=True)
    if rank == 0 and options.compare:
        with blaming(options):
            show_comparison(options, build, images, write_from)
    if rank == 0 and images.broken and not options.skip_broken:
        raise UserError(
            f"{options.data}: {len(images.broken)} of its pictures are broken, named above; what is saved was written "
            "without them: remove them, or give --skip-broken"
        )


def mnist_files() -> Path:
    """Where MNIST's files lie, downloaded if they are missing. Raises UserError if they cannot be."""
    for split in ("train", "test"):
        load_mnist(split, MNIST)
    return MNIST / "MNIST" / "raw"


@contextlib.contextmanager
def blaming(options: argparse.Namespace) -> Iterator[None]:
    """Refuse, in one line, whatever a person's own module raises."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # it may be anything
        raise UserError(f"{options.model} and {options.data}: {blamed(error)}") from error


def describe(images: ImageSet, options: argparse.Namespace) -> None:
    """Print what was found and what is made of it, and which pictures are broken."""
    for line in images.broken:
        print(line, file=sys.stderr)
    test = f" and {len(images.test):,} test images" if images.test else ""
    names = ", ".join(images.classes[:10]) + (", ..." if len(images.classes) > 10 else "")
    print(f"{options.data}: {len(images.train):,} images{test} of {len(images.classes)} classes: {names}")
    shape, channels = images.fit.shape, "grey" if images.fit.channels == 1 else f"{images.fit.channels} channels"
    height, width = images.fit.size
    mean, deviation = (", ".join(f"{value:.4f}" for value in values.tolist())
                       for values in (images.train.mean, images.train.deviation))  # fmt: skip
    given = "as --size and --channels say" if options.size and options.channels else "which the network takes"
    print(f"Images are {height} x {width}, {channels}, {given}, as {[*shape]}; mean {mean}, deviation {deviation}",
          flush=True)  # fmt: skip


def report(
    network: nn.Module, seed: int, options: argparse.Namespace, images: ImageSet, accounts: Accounts, seconds: float
) -> None:
    """Print what writing `network`, of this `seed`, gave, with the accuracy if it is asked for."""
    line = f"Seed {seed}: wrote {accounts.count:,} weights in {1000 * seconds:.0f} ms"
    if accounts.tries > 1:
        line += f", the best of {accounts.tries} tries"
    if options.evaluate:
        line += f", Accuracy = {accuracy_in_words(network, accounts, images, options.device)}"
    print(line, flush=True)
    if seed == options.seed and accounts.left:
        print(f"Left at their init: {', '.join(accounts.left)}")
    if seed == options.seed:
        missing = [images.classes[label] for label in accounts.missing if label < len(images.classes)]
        if missing:
            print(f"{options.data}: none of the images used is of {', '.join(missing)}", file=sys.stderr)


def accuracy_in_words(network: nn.Module, accounts: Accounts, images: ImageSet, device: torch.device) -> str:
    """On test images, or where there are none on those that were held out."""
    if images.test is None:
        percent = accounts.held_out_percent
        chose = ", which chose it" * (accounts.tries > 1)
        return "unknown" if percent is None else f"{percent:.2f}% on {accounts.held_out:,} images held out{chose}"
    return f"{accuracy_percent(network, images.test.to(device)):.2f}% on {len(images.test):,} test images"


def save(network: nn.Module, seed: int, options: argparse.Namespace, images: ImageSet) -> Path:
    """Save what was written, with its .json beside it, or neither; the path."""
    index = seed - options.seed + 1
    path = options.out if options.count == 1 else options.out.with_stem(f"{options.out.stem}_{index}")
    state = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    text = json.dumps({"model": options.model} | images.record(), indent=2, ensure_ascii=False) + "\n"

    def write_both(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")
        save_tensors(path, state)

    save_file(path.with_suffix(".json"), write_both)
    return path


def show_comparison(
    options: argparse.Namespace, build: Callable[[], nn.Module], images: ImageSet, write_from: Callable
) -> None:
    """Train the same network with Adam beside a written one, and print and plot both."""
    train = images.train.to(options.device)
    if images.test is None:  # neither of the two is to know those that score
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(options.seed)).to(options.device)
        known, kept = order[len(order) // FOLDS :], order[: len(order) // FOLDS]
        if not len(kept):
            raise UserError(f"{options.data}: holds {len(train)} images, too few to keep some apart for --compare")
        train, scored, named = train.at(known), train.at(kept), f"{len(kept):,} others"
    else:
        scored, named = images.test.to(options.device), f"{len(images.test):,} test images"
    print(f"\nBeside Adam, both from {len(train):,} images; accuracy on {named}:", flush=True)
    found = compare(
        build,
        lambda network, known: write_from(network, known.loader(), seed=options.seed),
        train,
        scored,
        options.seed,
    )
    print(f"{comparison_table(found)}\n{conclusion(found)}")
    if options.plot:
        from universal.evaluation.pictures import plot_comparison

        plot_comparison(found, options.model, options.plot)
        print(f"Plot saved to {options.plot}")


def blamed(error: Exception) -> str:
    """What an error says, with the line of the user's own code that it came through."""
    text, place = str(error) if isinstance(error, ValueError) else in_short(error), place_of(error)
    return text if place in text else text + place


if __name__ == "__main__":
    run_script(main)
