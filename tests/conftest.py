"""What the tests share: ways to run the scripts, and one small recorded experiment."""

import contextlib
import functools
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # more threads, here or in what is started, would be in each other's way
    os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import nn

import train_diffusion
import train_target_model
from diffusion_model import SpanDiffusion
from scripting import UserError
from target_cnn import Dataset, load_mnist
from universal import GraphWeightSynthesizer, load_synthesizer

REPOSITORY = Path(__file__).resolve().parent.parent


def run(script: str, *options, cwd: Path, **settings) -> subprocess.CompletedProcess:
    """Run a script of the repository in `cwd`, as a user would, on the CPU."""
    command = [sys.executable, REPOSITORY / script, *map(str, options), "--device", "cpu"]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=170, **settings)


def command(*arguments, launcher: tuple = (), **settings) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True, timeout=170,
        **settings,
    )  # fmt: skip


def small_synthesizer(seed: int, **settings) -> GraphWeightSynthesizer:
    torch.manual_seed(seed)
    return GraphWeightSynthesizer(**{"dimension": 32, "concepts": 32, "rank": 8, "hidden": 64} | settings).eval()


def assert_png(path, width: int, height: int) -> None:
    """Assert that `path` is a PNG picture of this size and not of one colour."""
    from matplotlib import image

    picture = image.imread(path)
    assert picture.shape[:2] == (height, width)
    assert picture[..., :3].std() > 0.05


def printed(main, *options, cwd=None) -> str:
    """Run a script's `main` in this process, in the directory `cwd` and on the CPU: what it prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.chdir(cwd or Path.cwd())
        patch.setattr(sys, "argv", [f"{main.__module__}.py", "--device", "cpu", *map(str, options)])
        main()
    return output.getvalue()


class Chain(nn.Module):
    """Two layers of 8 neurons between the first and the last, and a function after each."""

    def __init__(self, function, tied=False):
        super().__init__()
        self.first, self.out, self.function = nn.Linear(784, 8), nn.Linear(8, 10), function
        self.one = nn.Linear(8, 8)
        self.two = self.one if tied else nn.Linear(8, 8)

    def forward(self, x):
        x = x.flatten(1)
        for layer in (self.first, self.one, self.two):
            x = self.function(layer(x))
        return self.out(x)


@pytest.fixture
def refusal(capsys):
    """Run a script's `main` in this process, expect it to refuse, and return the one line that the user would see."""

    def run_main(main, *options, cwd=None) -> str:
        with pytest.raises((UserError, SystemExit)) as caught:
            printed(main, *options, cwd=cwd)
        if isinstance(caught.value, UserError):
            line = str(caught.value)
        else:
            assert caught.value.code == 2
            line = capsys.readouterr().err.rstrip("\n")
        assert line and "\n" not in line
        return line

    return run_main


@pytest.fixture(scope="session")
def experiment(tmp_path_factory) -> Path:
    """A directory in which two epochs of a few training images were recorded, and a narrow diffusion model was trained
    on them, with what the two scripts printed. Not to be changed."""
    directory = tmp_path_factory.mktemp("experiment")
    few = load_mnist("train", REPOSITORY / "data")[:3000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_target_model, "training_data", lambda *_: few)
        patch.setattr(train_target_model, "scoring_data", lambda *_: few[:1000])
        patch.setattr(SpanDiffusion, "of_runs", functools.partial(SpanDiffusion.of_runs, hidden=32))
        for script, options in (
            (train_target_model, ["--epochs", 2, "--batch-size", 32, "--lr", 0.002]),
            (train_diffusion, ["--epochs", 60]),
        ):
            (directory / f"{script.__name__}.out").write_text(printed(script.main, *options, cwd=directory))
    return directory


@pytest.fixture(scope="session")
def synthesizer() -> GraphWeightSynthesizer:
    """The committed synthesiser. Not to be changed."""
    return load_synthesizer()


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """The first 2,000 test images."""
    return load_mnist("test", REPOSITORY / "data")[:2000]


@pytest.fixture(scope="session")
def train_digits() -> Dataset:
    """The first 2,000 training images."""
    return load_mnist("train", REPOSITORY / "data")[:2000]
