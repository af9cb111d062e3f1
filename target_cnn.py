"""The target system: the CNN whose weights are synthesised, its task (MNIST), its score, and its weights as a vector.

Design document, section 2.1. Below the target system stands the small ground that every script shares: options,
devices, files and one-line errors.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

MNIST_MEAN, MNIST_STD = 0.1307, 0.3081
CHECKPOINTS = Path("checkpoints_weights_cnn")


class UserError(Exception):
    """Bad input. Its text is the one line that the user sees: which file or option, what is wrong, what to do."""


# ---- the network ----------------------------------------------------------------------------------------------------


class TargetCNN(nn.Module):
    """The CNN of design document section 2.1.1, with 421,642 parameters: images [N, 1, 28, 28] -> logits [N, 10]."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(64 * 7 * 7, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        # Pooling before ReLU gives the same values and gradients as after it, on a quarter of the elements.
        x = F.relu(F.max_pool2d(self.conv1(images), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


# ---- its weights as a vector, and as files --------------------------------------------------------------------------


def flatten_weights(model: nn.Module) -> Tensor:
    """A copy of all parameters of `model` as one vector, [parameters], in the order of `model.parameters()`.

    `torch.nn.utils.parameters_to_vector` does the same but refuses channels-last parameters.
    """
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def load_weights(model: nn.Module, weights: Tensor) -> nn.Module:
    """Write a flat vector, [parameters], into `model` and return it. Raises ValueError for another length."""
    expected = sum(parameter.numel() for parameter in model.parameters())
    if weights.shape != (expected,):
        raise ValueError(f"expected weights of shape [{expected}], got {list(weights.shape)}")
    with torch.no_grad():
        parts = weights.split([parameter.numel() for parameter in model.parameters()])
        for parameter, part in zip(model.parameters(), parts, strict=True):
            # A copy, where `torch.nn.utils.vector_to_parameters` would alias the vector and undo channels-last.
            parameter.copy_(part.view_as(parameter))
    return model


def checkpoint_path(directory: Path, epoch: int) -> Path:
    """Where the weights after `epoch` epochs of a training run lie."""
    return directory / f"weights_epoch_{epoch}.pth"


def load_checkpoint(path: Path) -> Tensor:
    """The weights of one recorded epoch, [421642]. Raises UserError unless it is a finite TargetCNN `state_dict`."""
    state = load_file(path)
    model = TargetCNN()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if not isinstance(state, dict) or expected != {
        name: tuple(tensor.shape) if isinstance(tensor, Tensor) else None for name, tensor in state.items()
    }:
        raise UserError(
            f"{path}: not a state_dict of TargetCNN (its layers are conv1, conv2, fc1, fc2): "
            "run train_target_model.py to record one"
        )
    model.load_state_dict(state)
    weights = flatten_weights(model)
    if not weights.isfinite().all():
        raise UserError(f"{path}: holds NaN or infinite weights: record this run again with train_target_model.py")
    return weights


def find_runs(directory: Path) -> list[Path]:
    """The directories of the training runs under `directory`: itself, or its `run_0001`, `run_0002` and so on.

    Raises UserError if there is no run, or if both layouts are mixed.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory: run train_target_model.py first")
    runs = sorted(path for path in directory.iterdir() if path.is_dir() and re.fullmatch(r"run_\d+", path.name))
    if recorded_epochs(directory):
        if runs:
            raise UserError(f"{directory}: holds both weights_epoch_*.pth and {runs[0].name}: keep only one of them")
        return [directory]
    if not runs:
        raise UserError(f"{directory}: holds no weights_epoch_*.pth: run train_target_model.py first")
    return runs


def recorded_epochs(directory: Path) -> list[int]:
    """The epochs whose weights lie in `directory`, sorted."""
    matches = (re.fullmatch(r"weights_epoch_(\d+)\.pth", path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def load_run(directory: Path) -> Tensor:
    """All checkpoints of one training run, [epochs + 1, 421642]. Raises UserError if one is missing or broken."""
    epochs = recorded_epochs(directory)
    missing = sorted(set(range(max(epochs, default=0) + 1)) - set(epochs))
    if missing:
        path = checkpoint_path(directory, missing[0])
        raise UserError(f"{path}: is missing from the recorded epochs: record the run again with train_target_model.py")
    return torch.stack([load_checkpoint(checkpoint_path(directory, epoch)) for epoch in epochs])


def load_log(directory: Path) -> list[dict] | None:
    """What train_target_model.py noted of each epoch of a run; None if another program recorded it.

    Each has `epoch`, `training_loss` (nats per image, None for epoch 0), `accuracy_percent` and `seconds`. Raises
    UserError if the file is broken.
    """
    path = directory / "training_log.json"
    if not path.exists():
        return None
    try:
        epochs = json.loads(path.read_text())["epochs"]
        keys = ("epoch", "accuracy_percent", "seconds")
        if not all(isinstance(epoch[key], int | float) for epoch in epochs for key in keys):
            raise ValueError("not numbers")
        return epochs
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged: delete it, or record the run again with train_target_model.py") from error


# ---- the task -------------------------------------------------------------------------------------------------------


class Dataset(NamedTuple):
    """A split of MNIST, whole, on one device."""

    images: Tensor  # [N, 1, 28, 28], normalised, float32
    labels: Tensor  # [N], int64

    def __getitem__(self, index) -> "Dataset":
        return Dataset(self.images[index], self.labels[index])


def load_mnist(split: str, root: Path, device: torch.device | str = "cpu") -> Dataset:
    """The "train" (60,000) or "test" (10,000) images of MNIST, unpacked from `root`/MNIST/raw or downloaded to it.

    Raises UserError if the files are broken and cannot be downloaded.
    """
    from torchvision import datasets  # imported where it is needed: it takes as long to import as torch itself

    raw = root / "MNIST" / "raw"
    try:
        with contextlib.redirect_stdout(sys.stderr):  # keep a download's messages out of the printed results
            mnist = datasets.MNIST(str(root), train=split == "train", download=True)
        images, labels = mnist.data, mnist.targets
        if images.shape != ({"train": 60_000, "test": 10_000}[split], 28, 28) or len(labels) != len(images):
            raise ValueError("wrong number of images")
    except (OSError, RuntimeError, EOFError, ValueError, AssertionError, KeyError, IndexError) as error:
        raise UserError(f"{broken_mnist_file(raw, datasets.MNIST.resources)}: restore data/ from git") from error
    images = images.unsqueeze(1).float().div_(255).sub_(MNIST_MEAN).div_(MNIST_STD)
    return Dataset(images.to(device), labels.to(device))


def broken_mnist_file(raw: Path, resources: Iterable[tuple[str, str]]) -> str:
    """Which file under `raw` is to blame, and why: "path: reason"."""
    for name, md5 in resources:
        archive = raw / name
        if not archive.is_file():
            return f"{archive}: is missing and could not be downloaded"
        if hashlib.md5(archive.read_bytes()).hexdigest() != md5:
            return f"{archive}: is damaged and could not be downloaded again"
    return f"{raw}: the unpacked *-ubyte files are damaged or cannot be written; delete them or"


def training_data(root: Path, validation: int, device: torch.device | str = "cpu") -> Dataset:
    """The training images; to tune on, all but the last `validation` of them."""
    data = load_mnist("train", root, device)
    return data[: len(data.labels) - validation]


def scoring_data(root: Path, validation: int, device: torch.device | str = "cpu") -> Dataset:
    """The images that score: the test images; to tune on, the last `validation` training images in their place."""
    return load_mnist("train", root, device)[-validation:] if validation else load_mnist("test", root, device)


# ---- the score ------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """How well one set of weights classifies a data set."""

    accuracy_percent: float
    average_loss: float  # the document's unit: cross-entropy summed over a batch of 256, averaged over images
    cross_entropy: float  # mean per image, nats
    wrong: Tensor  # [N], bool: the misclassified images


@torch.inference_mode()
def score(model: nn.Module, data: Dataset, batch_size: int = 250) -> Score:
    """Score `model` on all of `data`, in float32. `batch_size` changes the speed, not the result."""
    model.eval()
    logits = torch.cat([model(images) for images in data.images.split(batch_size)]).float()
    losses = F.cross_entropy(logits, data.labels, reduction="none")
    wrong = logits.argmax(1) != data.labels
    summed_over_batches = sum(len(batch) * batch.double().sum().item() for batch in losses.split(256))
    return Score(
        accuracy_percent=100 * (1 - wrong.double().mean().item()),
        average_loss=summed_over_batches / len(losses),
        cross_entropy=losses.double().mean().item(),
        wrong=wrong.cpu(),
    )


def score_weights(states: Iterable[Tensor], data: Dataset) -> list[Score]:
    """Score each of `states`, [421642] each, as the weights of a TargetCNN. Equal states are scored once."""
    states = list(states)
    model = TargetCNN().to(data.images.device, memory_format=torch.channels_last)
    on_cpu = data.images.device.type == "cpu" and torch.backends.mkldnn.is_available()
    scores: list[Score] = []
    for index, weights in enumerate(tqdm(states, desc="Scoring", leave=False, disable=None)):
        twin = next((i for i in range(index) if torch.equal(states[i], weights)), None)
        if twin is None:
            load_weights(model, weights)
            scores.append(score(OneDnnLayout(model) if on_cpu else model, data))
        else:
            scores.append(scores[twin])
    return scores


class OneDnnLayout(nn.Module):
    """A TargetCNN for inference with images and weights in the layout of oneDNN, a sixth faster than channels-last."""

    def __init__(self, model: TargetCNN):
        super().__init__()
        self.forward_of = functools.partial(functional_call, model)
        self.weights = {name: tensor.detach().contiguous().to_mkldnn() for name, tensor in model.named_parameters()}

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_of(self.weights, (images.to_mkldnn(),)).to_dense()


# ---- shared by the scripts: options, devices, files, errors ---------------------------------------------------------


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: an int or a float within [low, high]."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:  # NaN fails this too
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {low} to {high}")
        return value

    return parse


def output_file(*suffixes: str) -> Callable[[str], Path]:
    """An argparse type: a file that can be written, so that a wrong path ends a script before its work."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix not in suffixes:
            raise argparse.ArgumentTypeError(f"{text!r} must end in {' or '.join(suffixes)}")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r} is a directory")
        output_directory(str(path.parent))
        return path

    return parse


def output_directory(text: str) -> Path:
    """An argparse type: a directory that can be written or made."""
    path = Path(text)
    existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write to {str(existing)!r}")
    return path


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def option_parser(description: str, seed: int) -> argparse.ArgumentParser:
    """The parser of a script, with the options that every script takes."""
    parser = OneLineParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # PyTorch's CPU generator uses the lowest 32 bits only: larger seeds would repeat smaller ones unnoticed.
    parser.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=seed, help="seed of all randomness")
    parser.add_argument(
        "--device", type=device, default=default_device(), help="where to compute, such as cpu, cuda or mps"
    )
    return parser


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """The options of a script that reads MNIST."""
    parser.add_argument(
        "--data", type=Path, default=Path(__file__).resolve().parent / "data", help="directory with MNIST/raw"
    )
    parser.add_argument(
        "--validation",
        type=number(int, 0, 50_000),
        default=0,
        help="for tuning: hold out this many training images and score on them instead of the test images",
    )


def default_device() -> str:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def device(text: str) -> torch.device:
    """An argparse type: a device that can hold a tensor."""
    try:
        chosen = torch.device(text)
        torch.zeros(1, device=chosen).cpu()
        if chosen.type == "meta":
            raise RuntimeError("meta tensors hold no data")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device of this machine; try cpu") from error
    torch.backends.cudnn.deterministic = True  # the same seed must give the same weights
    return chosen


def table(header: list[str], rows: list[list[str]]) -> str:
    """An aligned Markdown table."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def load_file(path: Path, mmap: bool = False, maker: str | None = None):
    """`torch.load` on the CPU, never executing code from the file. Raises UserError if it cannot be read.

    `maker` is the command that makes such a file.
    """
    maker = maker or maker_of(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file: run {maker} first")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch.load raises whatever the broken bytes lead to
        reason = "cannot be read" if isinstance(error, PermissionError) else "is damaged, not a PyTorch file, or unsafe"
        raise UserError(f"{path}: {reason}: make it again with {maker}") from error


def maker_of(path: Path) -> str:
    """The script that writes such a file."""
    return "train_target_model.py" if path.name.startswith("weights_epoch_") else "train_diffusion.py"


def save_file(path: Path, write: Callable[[Path], None]) -> None:
    """Make `path` with `write(temporary path)`, whole or not at all: an earlier file survives any failure.

    Raises UserError if it cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        os.chmod(temporary, 0o666 & ~current_umask())  # mkstemp makes private files
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}): free some space or choose another path") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def save_tensors(path: Path, content) -> None:
    """`torch.save` through `save_file`. The bytes depend on nothing but `content`."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:  # given a path, torch.save would write its random name into the file
            torch.save(content, stream)

    save_file(path, write)


def save_json(path: Path, content) -> None:
    """Save `content` as indented JSON through `save_file`."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    save_file(path, lambda temporary: temporary.write_text(text))


def current_umask() -> int:
    """The umask of this process, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`: bad input ends with one line on standard error and exit code 2, Ctrl-C with 130."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    # Everything is written. Taking the interpreter down would only add a second, to free what torch imported.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
