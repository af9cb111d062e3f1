"""What the tests share: ways to run the scripts, and one small recorded experiment."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_target_model
from scripting import UserError
from target_cnn import Dataset, load_mnist, training_data
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
    return GraphWeightSynthesizer(**{"probes": 20, "convolution_probes": 20, "hidden": 64} | settings).eval()


def assert_png(path, width: int, height: int) -> None:
    """Assert that `path` is a PNG picture of this size and not of one colour."""
    from matplotlib import image

    picture = image.imread(path)
    assert picture.shape[:2] == (height, width)
    assert picture[..., :3].std() > 0.05


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Run a script's `main` in this process, expect it to refuse, and return the one line that the user would see."""

    def run_main(main, *options) -> str:
        monkeypatch.setattr(sys, "argv", [main.__module__ + ".py", *map(str, options), "--device", "cpu"])
        with pytest.raises((UserError, SystemExit)) as caught:
            main()
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
    """A directory in which two epochs were recorded, of a third of the training images for speed, and the diffusion
    model was trained on them. Not to be changed."""
    directory = tmp_path_factory.mktemp("experiment")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(directory)
        patch.setattr(train_target_model, "training_data", lambda *options: training_data(*options)[:20_000])
        patch.setattr(sys, "argv", ["train_target_model.py", "--epochs", "2", "--device", "cpu"])
        train_target_model.main()
    (directory / "train_target_model.py.out").write_text(printed.getvalue())
    result = run("train_diffusion.py", "--epochs", 60, cwd=directory)
    assert result.returncode == 0, result.stderr
    (directory / "train_diffusion.py.out").write_text(result.stdout)
    return directory


@pytest.fixture(scope="session")
def synthesizer() -> GraphWeightSynthesizer:
    """The committed synthesiser. Not to be changed."""
    return load_synthesizer()


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """The first 2,000 test images."""
    return load_mnist("test", REPOSITORY / "data")[:2000]
