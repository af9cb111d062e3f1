"""`python -m universal`: any network, in files that load."""

import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import command, printed
from torch import nn

from target_cnn import flatten_weights
from universal import __main__ as synthesize
from universal.evaluation.networks import cnn, mlp
from universal.model.synthesizer import SYNTHESIZER, load_synthesizer
from universal.reading.graph import ComputationGraph

TRAINING = ["-m", "universal.train", "--probes", "20", "--batch-size", "32", "--validation", "500", "--device", "cpu"]
PROBES = "experts.0.task.probes"
CLASSES = (nn.AdaptiveAvgPool2d(1), nn.Flatten())  # what makes logits of a convolution's outputs


# ---- the commands ---------------------------------------------------------------------------------------------------

NET = """
from torch import nn
from helper import WIDTH

class Net(nn.Sequential):
    def __init__(self, classes=10):
        super().__init__(nn.Flatten(), nn.Linear(784, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))

def eleven():
    return Net(11)

def number():
    return 3

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(28, 10)
    def forward(self, x):
        return self.lstm(x[:, 0])[1][0][0]

def failing():
    return 1 / 0

def recurrent():
    return Recurrent()
"""


@pytest.fixture
def own_file(tmp_path, monkeypatch) -> Path:
    """A person's own file, which imports another beside it."""
    (tmp_path / "helper.py").write_text("WIDTH = 24\n")
    path = tmp_path / "my_net.py"
    path.write_text(NET)
    (tmp_path / "broken.py").write_text("\nx = undefined\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return path


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch, synthesizer):
    """The committed synthesiser is loaded once for all tests."""

    def load(path, device):
        return synthesizer if path == SYNTHESIZER else load_synthesizer(path, device)

    monkeypatch.setattr(synthesize, "load_synthesizer", load)


def test_synthesize_writes_weights_that_load(own_file):
    directory = own_file.parent
    output = printed(
        synthesize.main, "--model", f"{own_file}:Net", "--out", directory / "w.pth", "--count", 2, "--evaluate",
        "--validation", 1000, "--seed", 7,
    )  # fmt: skip
    accuracies = [float(value) for value in re.findall(r"Accuracy = (\d+\.\d+)%", output)]
    assert len(accuracies) == 2
    assert min(accuracies) > 75
    states = [torch.load(directory / f"w_{index}.pth", weights_only=True) for index in (1, 2)]
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 24), nn.ReLU(), nn.Linear(24, 10))
    network.load_state_dict(states[0])
    assert not torch.equal(states[0]["1.weight"], states[1]["1.weight"])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("target_cnn", "give module:name or file.py:name"),
        ("nowhere:Net", "nowhere cannot be imported"),
        ("nowhere.py:Net", "nowhere.py is no file"),
        ("target_cnn:Nothing", "has no callable Nothing"),
        ("{file}:Nothing", "has no callable Nothing"),
        ("{file}:number", "gives a int, not a torch.nn.Module"),
        ("{file}:eleven", "has 11 classes"),
        ("{file}:recurrent", "lstm is not supported (my_net.py, line 20: return self.lstm"),
        ("{file}:failing", "cannot be built (ZeroDivisionError: division by zero (my_net.py, line 23: return 1 / 0))"),
        ("{file}:Net(11)", "has 11 classes"),
        ("{file}:Net(classes=[])", "cannot be built (TypeError: "),
        ("{file}:Net(__import__('os').getcwd())", "are not literals"),
        ("{file}:Net(*[10])", "are not literals"),
        ("{file}:Net(**{'classes': 10})", "are not literals"),
        (
            "{broken}:Net",
            "broken.py cannot be imported (NameError: name 'undefined' is not defined (broken.py, line 2: x =",
        ),
        ("target_cnn:load_weights", "cannot be built (TypeError: "),
    ],
)
def test_a_wrong_model_gets_one_line_and_nothing_is_written(own_file, refusal, model, reason):
    out = own_file.parent / "w.pth"
    line = refusal(
        synthesize.main,
        "--model",
        model.replace("{file}", str(own_file)).replace("{broken}", str(own_file.parent / "broken.py")),
        "--out",
        out,
    )
    assert reason in line
    assert not out.exists()


def test_a_wrong_synthesiser_gets_one_line(tmp_path, refusal):
    path = tmp_path / "s.pth"
    path.write_bytes(b"nothing")
    options = ("--model", "target_cnn:TargetCNN", "--out", tmp_path / "w.pth", "--synthesizer", path)
    assert f"{path}: " in refusal(synthesize.main, *options)


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, torch.compile, lambda network: nn.DataParallel(torch.compile(nn.DataParallel(network)))],
    ids=["DataParallel", "compile", "nested"],
)
def test_a_wrapped_network_is_written_in_place(synthesizer, wrap):
    network = cnn([8, 8], 16)
    wrapper = wrap(network)
    parameters = list(network.parameters())
    assert synthesizer.synthesize(wrapper, seed=3) is wrapper
    assert all(one is other for one, other in zip(wrapper.parameters(), parameters, strict=True))
    expected = synthesizer.synthesize(cnn([8, 8], 16), seed=3)
    assert torch.equal(flatten_weights(network), flatten_weights(expected))


def test_a_network_s_own_module_is_no_wrapper():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = mlp([20])

        def forward(self, images):
            return self.module(images.relu())

    images = torch.randn(2, 1, 28, 28)
    network = Own()
    torch.testing.assert_close(ComputationGraph(network).run(images, {}), network(images))


OTHER_NETS = """
import torch
from torch import nn

def net(classes=10):
    return nn.Sequential(nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(1152, classes))

def two(): return net(2)
def seven(): return net(7)
def double(): return net().double()
def half(): return net().half()
def brain(): return net().bfloat16()
def mixed(): return net().append(nn.Linear(10, 10).double())
def compiled(): return torch.compile(net())
def parallel(): return nn.DataParallel(torch.compile(net(4).half()))
"""


@pytest.mark.parametrize("name", ["two", "seven", "double", "half", "brain", "compiled", "parallel"])
def test_networks_of_every_kind_are_written_scored_and_saved(tmp_path, monkeypatch, capsys, digits, name):
    path, out = tmp_path / "other_nets.py", tmp_path / "w.pth"
    path.write_text(OTHER_NETS)
    monkeypatch.setattr(synthesize, "scoring_data", lambda *_: digits[:1000])
    options = ["--model", f"{path}:{name}", "--out", out, "--evaluate", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["synthesize.py", *map(str, options)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    synthesize.main()
    printed = float(re.search(r"Accuracy = (\d+\.\d+)%", capsys.readouterr().out)[1])
    assert printed > 85

    network = getattr(sys.modules["other_nets"], name)()
    network.load_state_dict(torch.load(out, weights_only=True))  # as it is
    inner = network.module._orig_mod if name == "parallel" else network._orig_mod if name == "compiled" else network
    few = digits[:1000]
    few = few[few.labels < len(inner[-1].bias)]
    with torch.inference_mode():
        logits = inner(few.images.to(inner[-1].bias.dtype))
    right = (logits.argmax(1) == few.labels).double().mean().item()
    assert printed == pytest.approx(100 * right, abs=0.2 if name in ("half", "brain", "parallel") else 0.006)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("two", "none of the --validation images is of its 2 classes: hold out more"),
        ("mixed", "cannot be scored on torch.float32 images (RuntimeError: "),
    ],
)
def test_what_cannot_be_scored_gets_one_line_and_is_not_saved(tmp_path, monkeypatch, refusal, digits, name, reason):
    (tmp_path / "other_nets.py").write_text(OTHER_NETS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(synthesize, "scoring_data", lambda *_: digits[digits.labels > 1])
    options = ["--model", f"{tmp_path}/other_nets.py:{name}", "--out", tmp_path / "w.pth", "--evaluate"]
    assert reason in refusal(synthesize.main, *options)
    assert not (tmp_path / "w.pth").exists()


FAILING = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, fails=None, least=0):
        super().__init__()
        self.hidden, self.out, self.fails, self.least = nn.Linear(784, 12), nn.Linear(12, 10), fails, least

    def forward(self, x):
        hidden = self.hidden(x.flatten(1)).relu()
        if len(x) > self.least:
            fail(self.fails)
        return self.out(hidden)

    def state_dict(self, *args, **kwargs):
        if self.fails == "saving":
            raise OSError("no state")
        return super().state_dict(*args, **kwargs)

def fail(kind):
    if kind == "value":
        raise ValueError("a value\\nof two lines")
    if kind == "key":
        {}["missing"]
    if kind == "shape":
        torch.zeros(2, 3).view(7)
    if kind == "assertion":
        assert False, "never"
    if kind == "memory":
        raise MemoryError
    if kind == "name":
        undefined
"""


@pytest.mark.parametrize("least", [2, 350], ids=["written", "scored"])  # images that it takes without an error
@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        ("value", 'a value of two lines (failing.py, line 23: raise ValueError("a value'),
        ("key", "KeyError: 'missing' (failing.py, line 25: {}["),
        ("shape", "shape '[7]' is invalid for input of size 6 (failing.py, line 27: torch.zeros(2, 3).view(7))"),
        ("assertion", "AssertionError: never (failing.py, line 29: assert False"),
        ("memory", "MemoryError: no message (failing.py, line 31: raise MemoryError)"),
        ("name", "NameError: name 'undefined' is not defined (failing.py, line 33: undefined)"),
    ],
)
def test_an_error_of_the_module_is_one_line_that_names_its_own(
    tmp_path, monkeypatch, refusal, digits, fails, reason, least
):
    (tmp_path / "failing.py").write_text(FAILING)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(synthesize, "scoring_data", lambda *_: digits[:500])
    monkeypatch.setattr(synthesize, "score", lambda network, data: network(data.images))
    model = f"{tmp_path}/failing.py:Net('{fails}', {least})"
    line = refusal(synthesize.main, "--model", model, "--out", tmp_path / "w.pth", "--evaluate")
    assert line.startswith(f"{model}: ") and reason in line and "failing.py, line" in line
    assert not (tmp_path / "w.pth").exists()


def test_an_error_in_saving_is_one_line_too(tmp_path, monkeypatch, refusal):
    (tmp_path / "failing.py").write_text(FAILING)
    monkeypatch.setattr(sys, "path", list(sys.path))
    line = refusal(synthesize.main, "--model", f"{tmp_path}/failing.py:Net('saving')", "--out", tmp_path / "w.pth")
    assert "OSError: no state (failing.py, line 18: raise OSError" in line


def test_a_process_that_refuses_ends_with_one_line_and_code_2(tmp_path):
    result = command("-m", "universal", "--model", "nowhere:Net", "--out", tmp_path / "w.pth", "--device", "cpu")
    assert result.returncode == 2 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("universal: error: --model nowhere:Net: nowhere cannot be imported")
