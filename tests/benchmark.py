"""How fast the experiment is against the obvious way of writing it, and what it takes to write a network.

    python tests/benchmark.py

Runs the three scripts in a temporary directory, then a plain implementation of each part, which this file carries:
images decoded one by one, fp32, contiguous tensors, dense Adam on all 432,528,522 weights of the diffusion model. Takes
about ten minutes and 12 GiB on two cores.

    python tests/benchmark.py --only writing

writes networks of growing width and depth, beside what running the images through them takes, in a few minutes, and

    python tests/benchmark.py --only data

writes networks from more images, beside an epoch of Adam on as many, in two. Not collected by pytest.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from diffusion_model import SimpleWeightSpaceDiffusion, SpanDiffusion, load_diffusion, rollout, train_in_span  # noqa: E402
from scripting import OneLineParser, number, run_script, table  # noqa: E402
from target_cnn import (  # noqa: E402
    Dataset,
    TargetCNN,
    find_runs,
    flatten_weights,
    load_mnist,
    load_run,
    score_weights,
    scoring_data,
    train_with_adam,
)
from universal.evaluation.networks import cnn, conv, mlp  # noqa: E402
from universal.reading.graph import ComputationGraph, in_fastest_layout  # noqa: E402
from universal.rules.looking import DoubtfulWeights  # noqa: E402
from universal.rules.synthesis import write  # noqa: E402


def parse_options() -> argparse.Namespace:
    parser = OneLineParser("Measure the experiment against the obvious way of writing it, side by side.")
    parser.add_argument("--dense-steps", type=number(int, 2, 1000), default=60, help="most steps of dense training")
    parser.add_argument("--only", choices=MEASURED, default=None, help="which part to measure, without the others")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    for part in [options.only] if options.only else MEASURED:
        MEASURED[part](options)


def measure_writing(options: argparse.Namespace) -> None:
    """Measure what it takes to write networks from few images."""
    print(f"\n{machine()}, {torch.get_num_threads()} threads; {FEW} images of MNIST\n")
    print(table(["network", "weights", "reading it", "writing it", "the images' forward pass"], writing_costs()))


def measure_data(options: argparse.Namespace) -> None:
    """Measure writing from labelled images beside an epoch of Adam on them. The images are noise: only time counts."""
    print(f"\n{machine()}, {torch.get_num_threads()} threads; images of noise\n")
    header = ["network", "weights", "images", "writing it", f"an epoch of Adam, from {STEPS} steps", "ratio"]
    with warnings.catch_warnings(action="ignore", category=DoubtfulWeights):  # noise teaches nothing
        print(table(header, data_costs()))


def measure_experiment(options: argparse.Namespace) -> None:
    """Measure the three scripts, and each part of them against the obvious way."""
    rows = []

    with tempfile.TemporaryDirectory() as directory:
        scripts = {}
        for name in ("train_target_model.py", "train_diffusion.py", "evaluate_generalization.py"):
            scripts[name] = measure_script(name, Path(directory))
        run = load_run(find_runs(Path(directory) / "checkpoints_weights_cnn")[0])
        our_evaluation = our_evaluation_of(run, Path(directory) / "diffusion_optimizer.pth")
    print("500 synthetic pairs...", flush=True)  # before this process grows: a child's peak counts its parent's
    seconds_of_many, memory_of_many = many_pairs(run)
    epochs = [float(text) for text in re.findall(r"Time = ([\d.]+) s", scripts["train_target_model.py"][2])][1:]

    print("The obvious way: one epoch of the CNN...", flush=True)
    obvious_epoch = obvious_cnn_epoch()
    ours = sorted(epochs)[len(epochs) // 2]
    rows.append(["one epoch of the CNN", *compared(obvious_epoch, ours)])

    print("The obvious way: dense training of the diffusion model...", flush=True)
    start = time.perf_counter()
    torch.manual_seed(0)
    span = SpanDiffusion.of_runs([run])
    train_in_span(span, epochs=100, lr=1e-3, shrinkage=2.0)
    ours = time.perf_counter() - start
    error, output = span.losses(*span.gram_matrices())
    goal = (error + 2.0 * output).item()
    step_seconds, steps, reached = dense_training(run, goal, options.dense_steps)
    dense = step_seconds * steps
    print(f"  {step_seconds:.2f} s a step; {steps} steps {'reach' if reached else 'do not reach'} a loss of {goal:.4f}")
    rows.append(["training the diffusion model", *compared(dense, ours, at_least=not reached)])
    del span

    print("The obvious way: evaluation...", flush=True)
    obvious_evaluation = obvious_evaluation_of(run)
    rows.append(["scoring 7 generated and 6 recorded states", *compared(obvious_evaluation, our_evaluation)])
    obvious_total = len(epochs) * obvious_epoch + dense + obvious_evaluation
    our_total = scripts["train_target_model.py"][0] + scripts["train_diffusion.py"][0] + our_evaluation
    rows.append(["all three", *compared(obvious_total, our_total, at_least=not reached)])

    print(f"\n{machine()}\n")
    print(table(["what", "obvious way", "ours", "ratio"], rows))
    print()
    header = ["script, from start to exit", "seconds", "peak memory (GiB)"]
    print(table(header, [[name, f"{s:.1f}", f"{m:.2f}"] for name, (s, m, _) in scripts.items()]))
    print("\n500 pairs (100 synthetic runs of 5 epochs): ", end="")
    print(f"trained in {seconds_of_many:.1f} s, peak memory {memory_of_many:.2f} GiB")


def measure_script(name: str, directory: Path) -> tuple[float, float, str]:
    """Seconds from start to exit, peak resident memory in GiB, and the output of a script with its defaults."""
    print(f"{name}...", flush=True)
    start = time.perf_counter()
    with (directory / f"{name}.out").open("w+") as output:
        process = subprocess.Popen([sys.executable, REPOSITORY / name], cwd=directory, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if os.waitstatus_to_exitcode(status):
            sys.exit(f"{name} failed")
        output.seek(0)
        return seconds, usage.ru_maxrss / 2**20, output.read()


def compared(obvious: float, ours: float, at_least: bool = False) -> list[str]:
    """The cells of a row: seconds of both ways and their ratio."""
    more = "> " if at_least else ""
    return [f"{more}{obvious:.1f} s", f"{ours:.2f} s", f"{more}{obvious / ours:.1f}x"]


def image_loader(train: bool, batch_size: int) -> torch.utils.data.DataLoader:
    """MNIST as every tutorial reads it: each image decoded and normalised when it is asked for."""
    from torchvision import datasets, transforms

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    data = datasets.MNIST(REPOSITORY / "data", train=train, download=True, transform=transform)
    return torch.utils.data.DataLoader(data, batch_size=batch_size, shuffle=train)


def obvious_cnn_epoch() -> float:
    """Seconds of one epoch of training in fp32."""
    torch.manual_seed(0)
    model = TargetCNN()
    adam = torch.optim.Adam(model.parameters())
    start = time.perf_counter()
    for images, labels in image_loader(True, 128):
        adam.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        adam.step()
    return time.perf_counter() - start


def dense_training(run: torch.Tensor, goal: float, most_steps: int) -> tuple[float, int, bool]:
    """Seconds a step, steps taken, and whether they reached the loss `goal`, for Adam on the dense network.

    All else is as in the span: standardised weights, the last layer zero at first, the same loss and learning rate.
    """
    torch.manual_seed(0)
    reference = SpanDiffusion.of_runs([run])
    model = SimpleWeightSpaceDiffusion(run.shape[1])
    for name in ("input_mean", "input_scale", "output_mean", "output_scale"):
        model.get_buffer(name).copy_(reference.get_buffer(name))
    model.last_step.copy_(reference.steps.max())
    nn.init.zeros_(model.main_network[-1].weight)
    nn.init.zeros_(model.main_network[-1].bias)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    start = time.perf_counter()
    for step in range(most_steps):
        outputs = (model(run[:-1], reference.steps) - model.output_mean) / model.output_scale
        loss = (outputs - reference.targets).square().mean() + 2.0 * outputs.square().mean()
        if loss.item() <= goal:
            return (time.perf_counter() - start) / max(step, 1), step, True
        adam.zero_grad()
        loss.backward()
        adam.step()
    return (time.perf_counter() - start) / most_steps, most_steps, False


@torch.no_grad()
def obvious_evaluation_of(run: torch.Tensor) -> float:
    """Seconds to build the dense model, roll it out, and score seven generated and the recorded states one by one."""
    start = time.perf_counter()
    model = SimpleWeightSpaceDiffusion(run.shape[1])
    states = [*rollout(model, flatten_weights(TargetCNN()), 6), *run]
    target = TargetCNN()
    for weights in states:
        nn.utils.vector_to_parameters(weights, target.parameters())
        for images, labels in image_loader(False, 256):
            logits = target(images)
            logits.argmax(1).eq(labels).sum().item()
            F.cross_entropy(logits, labels, reduction="sum").item()
    return time.perf_counter() - start


def our_evaluation_of(run: torch.Tensor, path: Path) -> float:
    """Seconds of the same with this repository's functions."""
    start = time.perf_counter()
    model = load_diffusion(path, run.shape[1])
    states = [*rollout(model, flatten_weights(TargetCNN()), 6), *run]
    score_weights(states, scoring_data(REPOSITORY / "data", 0))
    return time.perf_counter() - start


def many_pairs(run: torch.Tensor) -> tuple[float, float]:
    """Seconds and peak GiB of training on 500 pairs, in a process of its own: noisy copies of `run` as 100 runs."""
    with tempfile.TemporaryDirectory() as directory:
        torch.save(run, Path(directory) / "run.pt")
        code = (
            "import sys, time, torch; sys.path.insert(0, sys.argv[1])\n"
            "from diffusion_model import SpanDiffusion, train_in_span\n"
            "run = torch.load('run.pt', weights_only=True)\n"
            "runs = [run + 0.01 * torch.randn_like(run) for _ in range(100)]\n"
            "start = time.perf_counter(); model = SpanDiffusion.of_runs(runs); del runs\n"
            "train_in_span(model, 100, 1e-3, 2.0); print('seconds', time.perf_counter() - start)"
        )
        with (Path(directory) / "out").open("w+") as output:
            process = subprocess.Popen([sys.executable, "-c", code, REPOSITORY], cwd=directory, stdout=output)
            _, _, usage = os.wait4(process.pid, 0)
            output.seek(0)
            return float(output.read().split("seconds ")[1]), usage.ru_maxrss / 2**20


FEW = 300


@torch.no_grad()
def writing_costs() -> list[list[str]]:
    """Milliseconds to read and to write networks, and to run the images through them, the median of three each."""
    networks = {f"784-{width}-10": partial(mlp, [width]) for width in (512, 1024, 2048, 4096, 8192)}
    networks |= {f"{depth} convolutions of 16": partial(deep_cnn, depth) for depth in (4, 8, 16, 32)}
    networks |= {"TargetCNN": TargetCNN, "ResNet-18": partial(models.resnet18, num_classes=10)}
    grey, labels = load_mnist("train", REPOSITORY / "data")[:FEW]
    rows = []
    for name, build in networks.items():
        network = build()
        images = grey.expand(-1, 3, -1, -1) if name == "ResNet-18" else grey
        graph = ComputationGraph(network, images[:2])
        seconds = [
            median_seconds(run)
            for run in (
                partial(ComputationGraph, network, images[:2]),
                partial(write, network, images, labels, seed=0),
                partial(graph.run, images, graph.weights()),
            )
        ]
        count = sum(parameter.numel() for parameter in network.parameters())
        rows.append([name, f"{count:,}", *(f"{1000 * each:.0f} ms" for each in seconds)])
    return rows


def deep_cnn(depth: int) -> nn.Module:
    """So many 3x3 convolutions, pooled after the first two."""
    return cnn([16] * depth, 32)


def median_seconds(run: Callable[[], object], repetitions: int = 3) -> float:
    """The median seconds of some runs, after one that is not counted."""
    seconds = []
    for _ in range(1 + repetitions):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[repetitions // 2]


def data_costs() -> list[list[str]]:
    """Seconds to write networks from labelled images, and of an epoch of Adam on all of these: a row each."""
    mnist = (1, 28, 28, 10)  # channels, height, width, classes
    cases: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], int]] = [
        *((f"784-{width}-10", partial(mlp, [width]), mnist, 10_000) for width in (128, 512, 2048)),
        *((f"{depth} convolutions of 16", partial(deep_cnn, depth), mnist, 10_000) for depth in (4, 8, 16)),
        *(("TargetCNN", TargetCNN, mnist, count) for count in (1000, 10_000, 60_000)),
        *(
            (f"{channels} x {side} x {side}, {classes} classes", partial(sized_cnn, channels, side, classes),
             (channels, side, side, classes), 10_000)
            for channels, side, classes in ((1, 28, 10), (3, 32, 10), (3, 32, 100), (3, 64, 100))
        ),
        ("ResNet-18", partial(models.resnet18, num_classes=10), (3, 32, 32, 10), 1000),
    ]  # fmt: skip
    rows = []
    for name, build, (*shape, classes), count in cases:
        torch.manual_seed(0)
        data = Dataset(torch.randn(count, *shape), torch.arange(count) % classes)
        network = in_fastest_layout(build(), data.images[:2])
        write(network, *data[: max(count // 10, 2 * classes)], seed=0)  # the first pass of a process takes longer
        start = time.perf_counter()
        write(network, *data, seed=0)
        ours = time.perf_counter() - start
        epoch = adam_epoch(network, data)
        weights = sum(parameter.numel() for parameter in network.parameters())
        rows.append([name, f"{weights:,}", f"{count:,}", f"{ours:.2f} s", f"{epoch:.2f} s", f"{epoch / ours:.1f}x"])
        print(f"  {name}, {count:,} images: {ours:.2f} s, {epoch:.2f} s", file=sys.stderr, flush=True)
    return rows


STEPS = 20  # of Adam, from which an epoch is reckoned


def adam_epoch(network: nn.Module, data: Dataset, batch_size: int = 128) -> float:
    """Seconds of an epoch on `data`, reckoned from some steps after the first two."""
    some = data[torch.arange((2 + STEPS) * batch_size) % len(data.labels)]
    first, last = train_with_adam(network, some, 1, batch_size=batch_size, pauses=(2,))
    return (last.seconds - first.seconds) / STEPS * len(data.labels) / batch_size


def sized_cnn(channels: int, side: int, classes: int) -> nn.Module:
    """Two 3x3 convolutions, each pooled, and a hidden linear layer, for images of any size."""
    return nn.Sequential(
        *conv(channels, 16), nn.MaxPool2d(2), *conv(16, 32), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32 * (side // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, classes),
    )  # fmt: skip


def machine() -> str:
    """The processor, its cores and memory, and the versions."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{names[0] if names else platform.processor()} ({capability}), {os.cpu_count()} cores, {memory:.0f} GiB; "
        f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    )


MEASURED = {"experiment": measure_experiment, "writing": measure_writing, "data": measure_data}


if __name__ == "__main__":
    run_script(main)
