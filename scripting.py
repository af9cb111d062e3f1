"""What every script needs: options, devices, one-line errors, tables, and files that are whole or not there at all."""

import argparse
import contextlib
import errno
import json
import os
import pickle
import re
import sys
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

if TYPE_CHECKING:  # matplotlib is imported where a figure is made: errors and --help do not wait for it
    from matplotlib.figure import Figure


class UserError(Exception):
    """Bad input. Its text is the one line that the user sees: which file or option, what is wrong, what to do."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class MissingPackage(UserError):
    """An optional package is needed to read a file."""


def one_line(text: str) -> str:
    """The lines of `text` as one: it may quote what a user or another program has written."""
    return " ".join(line.strip() for line in text.splitlines())


@contextlib.contextmanager
def refused_as(line: str) -> Iterator[None]:
    """Refuse, with this line, whatever fails in the block that takes the content of a file apart.

    A UserError of the block's own passes through.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever foreign or broken content leads to
        raise UserError(line) from error


def in_short(error: Exception) -> str:
    """The kind of an error and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def program() -> str:
    """What the user runs: the name of a script, or of a package."""
    path = Path(sys.argv[0])
    return path.parent.name if path.stem == "__main__" else path.name


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`: bad input ends with one line on standard error and exit code 2, Ctrl-C with 130.

    Where nobody reads the output any more, as after `| head -1`, it ends without a word, with 141 as the shell has it.
    """
    try:
        try:
            main()
        except UserError as error:
            print(f"{program()}: error: {error}", file=sys.stderr)
            sys.exit(2)
        except OSError as error:  # such as a directory that nobody may enter
            if error.filename is None:  # as of a pipe that nobody reads
                raise
            print(f"{program()}: error: {error.filename}: {error.strerror}: choose another path", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    except BrokenPipeError:
        os._exit(141)  # the interpreter would try to write the rest again
    # Everything is written. Taking the interpreter down would only add a second, to free what torch imported.
    os._exit(0)


def summary_statistics(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation (of a single value 0), minimum and maximum, under these names."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return {"mean": fmean(values), "standard_deviation": deviation, "minimum": min(values), "maximum": max(values)}


def mean_and_range(summary: dict[str, float]) -> str:
    """What `summary_statistics` says of accuracies in percent, for a cell of a table."""
    return f"{summary['mean']:.2f} ({summary['minimum']:.2f} to {summary['maximum']:.2f})"


def table(header: list[str], rows: list[list[str]]) -> str:
    """An aligned Markdown table, whatever its cells hold."""
    header, *rows = ([cell.replace("|", r"\|") for cell in row] for row in [header, *rows])
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


MNIST = Path(__file__).resolve().parent / "data"  # where it comes with the repository


# ---- options and devices ---------------------------------------------------------------------------------------------


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
    try:  # permissions do not say it all, of /proc for instance
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {str(existing)!r}") from error
    return path


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds to the help of every option what holds without it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.required:
            return f"{action.help} (required)"
        if "(default: " in action.help:
            return action.help
        if action.const is True:  # a flag
            return f"{action.help} (default: off)"
        return f"{action.help} (default: none)" if action.default is None else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage, and whose help states the defaults."""

    def __init__(self, description: str):
        super().__init__(prog=program(), description=description, formatter_class=HelpFormatter)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def option_parser(description: str, seed: int) -> argparse.ArgumentParser:
    """The parser of a script, with the options that every script takes."""
    parser = OneLineParser(description)
    # PyTorch's CPU generator uses the lowest 32 bits only: larger seeds would repeat smaller ones unnoticed.
    parser.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=seed, help="seed of all randomness")
    fastest = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    fastest = "cpu" if fastest == "mps" else fastest  # Apple's has no double precision
    parser.add_argument("--device", type=device, default=fastest, help="where to compute, such as cpu or cuda")
    return parser


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """The options of a script that reads MNIST."""
    parser.add_argument("--data", type=Path, default=MNIST, help="directory with MNIST/raw")
    add_validation_option(parser)


def add_validation_option(parser: argparse.ArgumentParser) -> None:
    """The option of a script that scores on MNIST."""
    parser.add_argument(
        "--validation", type=number(int, 0, 50_000), default=0,
        help="for tuning: hold out this many training images and score on them instead of the test images",
    )  # fmt: skip


def add_output_options(parser: argparse.ArgumentParser, plot: str, results: str | None) -> None:
    """The options of a script that saves a picture and maybe a record, by default under these names."""
    parser.add_argument("--plot", type=output_file(".png", ".pdf", ".svg"), default=plot, help="picture to save")
    if results:
        parser.add_argument("--results", type=output_file(".json"), default=results, help="record to save")


def add_training_options(parser: argparse.ArgumentParser, report_every: int, checkpoint: str, out: Path) -> None:
    """The options of a training that goes on where it was killed (`run_to_end`)."""
    count, state, file = number(int, 1, 10**8), output_file(".pth"), output_file(out.suffix)
    parser.add_argument("--report-every", type=count, default=report_every, help="steps from report to report")
    parser.add_argument(
        "--checkpoint", type=state, default=checkpoint, help="state at the last report, deleted at the end"
    )
    parser.add_argument("--out", type=file, default=str(out), help="file to write")


def device(text: str) -> torch.device:
    """An argparse type: a device that can hold a tensor, in double precision too."""
    try:
        chosen = torch.device(text)
        torch.zeros(1, dtype=torch.float64, device=chosen).cpu()
        if chosen.type == "meta":
            raise RuntimeError("meta tensors hold no data")
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        line = f"{text!r} is not a device of this machine with double precision; try cpu"
        raise argparse.ArgumentTypeError(line) from error
    torch.backends.cudnn.deterministic = True  # the same seed must give the same weights
    return chosen


def start_processes(device: torch.device) -> tuple[int, int]:
    """This process's rank and the number of processes, which `torchrun` sets."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        return 0, 1
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(dist.get_default_backend_for_device(device))
    return dist.get_rank(), processes


# ---- files -----------------------------------------------------------------------------------------------------------


# What torch.load says of Python objects: of a foreign one, of pickles of protocol 4 or later, and of TorchScript.
PYTHON_OBJECTS = re.compile(
    rf"(GLOBAL |but got <class ')(?P<name>[\w.]+)[ ']|Unsupported operand {ord(pickle.FRAME)}\b|TorchScript archive"
)


# What trainings save beside tensors that can do nothing: their options, and NumPy's scalars and arrays of numbers and
# text. The module that rebuilds NumPy's was renamed in its version 2.
HARMLESS: list = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OV"},  # no objects, no records
    *(
        (value.__reduce__()[0], f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name, value in {"_reconstruct": np.zeros(0), "scalar": np.float64()}.items()
    ),
]


def load_file(path: Path, maker: str, mmap: bool = False):
    """The content of a PyTorch file or of a `.safetensors` file, on the CPU, never executing code from it.

    `maker` is the command that makes such a file. Raises UserError if it cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file: run {maker} first")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file as load_safetensors  # an optional package

            return load_safetensors(path)
        with (
            warnings.catch_warnings(action="ignore"),  # of what the error says too
            torch.serialization.safe_globals(HARMLESS),
        ):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except ImportError as error:
        raise MissingPackage(f"{path}: needs the package safetensors to be read: pip install safetensors") from error
    except Exception as error:  # both raise whatever the broken bytes lead to
        raise UserError(f"{path}: {why_not_read(error)} make it again with {maker}") from error


def leaves(content) -> Iterator[tuple[str, object]]:
    """What lies in nested dictionaries, with their attributes, and lists, by its dotted name and in their order.

    Each container is looked into once.
    """
    waiting, seen = [("", content)], set()
    while waiting:
        name, value = waiting.pop()
        if not isinstance(value, dict | list | tuple):
            yield name, value
        elif id(value) not in seen:
            seen.add(id(value))
            parts = value | vars(value) if isinstance(value, OrderedDict) else value
            items = list(parts.items() if isinstance(parts, dict) else enumerate(parts))
            waiting += [(f"{name}.{key}" if name else str(key), part) for key, part in reversed(items)]


def why_not_read(error: Exception) -> str:
    """The reason for a failure to read, in words, up to what to do."""
    if isinstance(error, PermissionError):
        return "cannot be read:"
    objects = PYTHON_OBJECTS.search(str(error))
    if objects is None:
        return "is damaged, not what its name says, or unsafe:"
    name = f" ({objects['name']})" if objects["name"] else ""
    return (
        f"holds a whole pickled module or other Python objects{name}, which are unsafe and never executed: "
        "save tensors only, as torch.save(model.state_dict(), ...) does, or"
    )


def save_file(path: Path, write: Callable[[Path], None]) -> None:
    """Make `path` with `write(temporary path)`, whole or not at all: an earlier file survives any failure.

    Raises UserError if it cannot be written.
    """
    # Of this process alone, so that two that write the same file at once do not mix what they write.
    temporary = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{path}: cannot be written ({why_not_written(error)}): free some space or choose another path"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def why_not_written(error: BaseException) -> str:
    """The reason for a failure to write, in words. torch.save hides the system's behind a RuntimeError of its own."""
    cause = error
    while not isinstance(cause, OSError) and cause.__context__ is not None:
        cause = cause.__context__
    if getattr(cause, "errno", None) == errno.ENOSPC:
        return "the disk is full"
    return getattr(cause, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def save_tensors(path: Path, content) -> None:
    """`torch.save` through `save_file`. The bytes depend on nothing but `content`."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:  # given a path, torch.save would write its random name into the file
            torch.save(content, stream)

    save_file(path, write)


def run_to_end(training, maker: str, rank: int = 0, unit: str = "step") -> None:
    """Run a `training` to its last step, from where an earlier one was killed; the process of rank 0 reports and saves.

    A training has its `options`, of `add_training_options`, a number of `steps`, the `step` that it is at and its
    `seconds` so far; `settings()`, which a training that goes on must share with the killed one; `parts()`, which have
    a state_dict each; `run(until)` and `report(minutes_left)`. Raises UserError if its state cannot be read or written,
    or is of other settings.
    """
    options = training.options
    resume_training(training, maker)
    if dist.is_initialized():
        steps = [0] * dist.get_world_size()
        dist.all_gather_object(steps, training.step)
        if len({*steps}) > 1:
            raise UserError(f"{options.checkpoint}: not the same on all machines: copy it to each, or delete it")
    if training.step and rank == 0:
        print(f"Going on from {unit} {training.step}, saved in {options.checkpoint}", flush=True)
    while training.step < training.steps:
        first, start = training.step, time.perf_counter()
        training.run(min(first + options.report_every, training.steps))
        seconds = time.perf_counter() - start
        training.seconds += seconds
        if rank == 0:
            training.report(seconds / (training.step - first) * (training.steps - training.step) / 60)
            if training.step < training.steps:
                save_training(training)


def save_training(training) -> None:
    """Save the state of a training, as `run_to_end` knows it."""
    states = {name: part.state_dict() for name, part in training.parts().items()}
    progress = {"step": training.step, "seconds": training.seconds}
    content = {"settings": training.settings(), "progress": progress, "states": states}
    save_tensors(training.options.checkpoint, content)


def resume_training(training, maker: str) -> None:
    """Load what `save_training` saved, if it saved anything."""
    path = training.options.checkpoint
    if not path.exists():
        return
    content = load_file(path, maker)
    with refused_as(f"{path}: not the state of a training: delete it or choose another --checkpoint"):
        if content["settings"] != training.settings():
            raise UserError(f"{path}: is of a training with other options: delete it or choose another --checkpoint")
        for name, part in training.parts().items():
            part.load_state_dict(content["states"][name])
        training.step, training.seconds = content["progress"]["step"], content["progress"]["seconds"]


def save_json(path: Path, content) -> None:
    """Save `content` as indented JSON through `save_file`."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    save_file(path, lambda temporary: temporary.write_text(text))


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches, which no window shows."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    """Save a figure in the format of the suffix of `path`. Raises UserError if it cannot be written."""
    save_file(path, lambda temporary: figure.savefig(temporary, dpi=150))
