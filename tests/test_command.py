"""`python -m universal`: any network, in files that load."""

import functools
import json
import re
import struct
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, command, printed
from torch import nn

from target_cnn import flatten_weights, load_mnist, score
from universal import __main__ as synthesize
from universal.data.images import load_images
from universal.evaluation import comparison
from universal.evaluation.networks import cnn, mlp
from universal.model.synthesizer import SYNTHESIZER, load_synthesizer
from universal.reading.graph import ComputationGraph
from universal.rules.synthesis import write

# ---- the commands ---------------------------------------------------------------------------------------------------

NET = """
from torch import nn
from helper import WIDTH

class Net(nn.Sequential):
    def __init__(self, classes=10):
        super().__init__(nn.Flatten(), nn.Linear(784, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))

def nine():
    return Net(9)

def number():
    return 3

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(28, 10, batch_first=True)
    def forward(self, x):
        return self.lstm(x[:, 0])[0][:, -1]

def failing():
    return 1 / 0

def recurrent():
    return Recurrent()

made = nine()
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


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory) -> Path:
    """A directory of the first 600 training images and 500 test images of MNIST."""
    directory = tmp_path_factory.mktemp("few")
    found = load_images(REPOSITORY / "data")
    for name, part, count in (("train", found.train, 600), ("t10k", found.test, 500)):
        for kind, values in (("images", part.pixels[:count, 0]), ("labels", part.labels[:count].to(torch.uint8))):
            header = struct.pack(f">HBB{values.dim()}I", 0, 8, values.dim(), *values.shape)
            (directory / f"{name}-{kind}-idx{values.dim()}-ubyte").write_bytes(header + values.numpy().tobytes())
    return directory


@pytest.fixture
def in_place_of_mnist(monkeypatch, few_digits) -> Path:
    """What is read without --data, for speed."""
    monkeypatch.setattr(synthesize, "mnist_files", lambda: few_digits)
    return few_digits


def right_percent(network: nn.Module, record: dict) -> float:
    """The accuracy of a network on MNIST's test images, made what the .json beside its weights says."""
    found = load_images(REPOSITORY / "data", size=tuple(record["size"]), channels=record["channels"], limit=2).test
    mean, deviation = (torch.tensor(record[name]).view(-1, 1, 1) for name in ("mean", "deviation"))
    images = (found.pixels.float() / 255 - mean) / deviation
    with torch.inference_mode():
        logits = network.eval()(images.view(-1, *record["shape"]))
    return 100 * (logits.argmax(1) == found.labels).double().mean().item()


def state_of(directory: Path) -> list[tuple]:
    return [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(directory.rglob("*"))]


def test_without_data_weights_are_written_for_mnist_that_load(own_file):
    directory, before = own_file.parent, state_of(REPOSITORY / "data")
    output = printed(
        synthesize.main, "--model", f"{own_file}:Net", "--out", directory / "w.pth", "--count", 2, "--evaluate",
        "--limit", 1000, "--seed", 7,
    )  # fmt: skip
    assert "MNIST/raw: 1,000 images and 10,000 test images of 10 classes: 0, 1, " in output
    assert "Images are 28 x 28, grey, which the network takes, as [1, 28, 28]" in output
    assert output.index("Writing ") < output.index("Seed 7: wrote")
    accuracies = [float(value) for value in re.findall(r"Accuracy = (\d+\.\d+)% on 10,000 test images", output)]
    assert len(accuracies) == 2
    assert min(accuracies) > 80
    states = [torch.load(directory / f"w_{index}.pth", weights_only=True) for index in (1, 2)]
    assert not torch.equal(states[0]["1.weight"], states[1]["1.weight"])
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 24), nn.ReLU(), nn.Linear(24, 10))
    for index, state in enumerate(states):
        network.load_state_dict(state)
        record = json.loads((directory / f"w_{index + 1}.json").read_text())
        assert record["model"] == f"{own_file}:Net" and record["classes"] == [*map(str, range(10))]
        assert right_percent(network, record) == pytest.approx(accuracies[index], abs=0.02)
    assert state_of(REPOSITORY / "data") == before  # which may be read-only


@pytest.mark.parametrize("missing", ["train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz"])
def test_missing_files_of_mnist_are_named(own_file, tmp_path, monkeypatch, refusal, missing):
    def urlopen(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    raw, out = tmp_path / "data" / "MNIST" / "raw", tmp_path / "w.pth"
    raw.mkdir(parents=True)
    for path in (REPOSITORY / "data" / "MNIST" / "raw").glob("*.gz"):
        if path.name != missing:
            (raw / path.name).symlink_to(path)
    monkeypatch.setattr(synthesize, "MNIST", tmp_path / "data")
    line = refusal(synthesize.main, "--model", f"{own_file}:Net", "--out", out)
    assert line.startswith(f"{raw / missing}: is missing and could not be downloaded: ")
    assert not out.exists() and not out.with_suffix(".json").exists()
    load_mnist.cache_clear()  # of what lay at a path of this test


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("target_cnn", "give module:name or file.py:name"),
        ("nowhere:Net", "nowhere cannot be imported"),
        ("nowhere.py:Net", "nowhere.py is no file"),
        ("target_cnn:Nothing", "has no callable Nothing"),
        ("{file}:Nothing", "has no callable Nothing"),
        ("{file}:number", "gives a int, not a torch.nn.Module"),
        ("{file}:made", "my_net.py:made: is a network and not what builds one: name its class or a function"),
        ("{file}:nine", "holds 10 classes, but the network has 9 outputs: build it with 10 or more"),
        ("{file}:recurrent", "lstm is not supported (my_net.py, line 20: return self.lstm(x[:, 0])"),
        ("{file}:failing", "cannot be built (ZeroDivisionError: division by zero (my_net.py, line 23: return 1 / 0))"),
        ("{file}:Net(9)", "holds 10 classes, but the network has 9 outputs"),
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
def test_a_wrong_model_gets_one_line_and_nothing_is_written(own_file, in_place_of_mnist, refusal, model, reason):
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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file: run python -m universal.train first"),
        (b"nothing", "is damaged, not what its name says, or unsafe: make it again with python -m universal.train"),
        ({"model": "Other"}, "not a saved synthesiser: make one with"),
        ({"model": "GraphWeightSynthesizer", "version": 8}, "a synthesiser of version 8, but this code reads version"),
    ],
    ids=["missing", "broken", "other", "older"],
)
@pytest.mark.parametrize("data", [True, False])
def test_a_wrong_synthesiser_gets_one_line_and_nothing_is_lost(
    own_file, few_digits, tmp_path, refusal, content, reason, data
):
    path = tmp_path / "s.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    for name in ("w.pth", "w.json"):
        (tmp_path / name).write_text("earlier")
    options = ["--model", f"{own_file}:Net", "--out", tmp_path / "w.pth", "--synthesizer", path]
    line = refusal(synthesize.main, *options, *(("--data", few_digits) if data else ()))
    assert line.startswith(f"{path}: {reason}")
    assert all((tmp_path / name).read_text() == "earlier" for name in ("w.pth", "w.json"))


@pytest.mark.parametrize(
    ("network", "options", "taken"),
    [
        ("Conv2d(3, 8, 5, 2)", (), "28 x 28, 3 channels, which the network takes, as [3, 28, 28]"),
        ("Conv2d(1, 8, 5, 2)", ("--size", "20x24"), "20 x 24, grey, which the network takes, as [1, 20, 24]"),
        ("Linear(784, 20)", (), "28 x 28, grey, which the network takes, as [784]"),
        ("Linear(400, 20)", ("--channels", 1), "20 x 20, grey, which the network takes, as [400]"),
    ],
    ids=["colours", "size", "rows", "smaller"],
)
def test_mnist_becomes_what_the_network_takes(tmp_path, in_place_of_mnist, monkeypatch, network, options, taken):
    path, out = tmp_path / "taking.py", tmp_path / "w.pth"
    more = "AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(10)" if network[0] == "C" else "Linear(20, 10)"
    path.write_text(f"from torch import nn\ndef net(): return nn.Sequential(nn.{network}, nn.ReLU(), nn.{more})\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    output = printed(synthesize.main, "--model", f"{path}:net", "--out", out, "--evaluate", *options)
    assert f"Images are {taken}; mean 0.1" in output
    printed_percent = float(re.search(r"Accuracy = ([\d.]+)% on 500 test images", output)[1])
    assert printed_percent > 70
    built = sys.modules["taking"].net()
    built.load_state_dict(torch.load(out, weights_only=True))
    on_all = right_percent(built, json.loads(out.with_suffix(".json").read_text()))
    assert on_all == pytest.approx(printed_percent, abs=6)  # on twenty times as many


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, torch.compile, lambda network: nn.DataParallel(torch.compile(nn.DataParallel(network)))],
    ids=["DataParallel", "compile", "nested"],
)
def test_a_wrapped_network_is_written_in_place(train_digits, wrap):
    network, few = cnn([8, 8], 16), train_digits[:200]
    wrapper = wrap(network)
    parameters = list(network.parameters())
    write(wrapper, *few, seed=3)
    assert all(one is other for one, other in zip(wrapper.parameters(), parameters, strict=True))
    expected = cnn([8, 8], 16)
    write(expected, *few, seed=3)
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

def eleven(): return net(11)
def double(): return net().double()
def half(): return net().half()
def brain(): return net().bfloat16()
def compiled(): return torch.compile(net())
def parallel(): return nn.DataParallel(torch.compile(net(12).half()))
def mixed(): return net().append(nn.Linear(10, 10).double())
def two(): return net(2)
"""


@pytest.mark.parametrize("name", ["eleven", "double", "half", "brain", "compiled", "parallel"])
def test_networks_of_every_kind_are_written_scored_and_saved(tmp_path, monkeypatch, few_digits, name):
    path, out = tmp_path / "other_nets.py", tmp_path / "w.pth"
    path.write_text(OTHER_NETS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    output = printed(synthesize.main, "--model", f"{path}:{name}", "--data", few_digits, "--out", out, "--evaluate")
    accuracy = float(re.search(r"Accuracy = (\d+\.\d+)% on 500 test images", output)[1])
    assert accuracy > 85

    network = getattr(sys.modules["other_nets"], name)()
    network.load_state_dict(torch.load(out, weights_only=True))  # as it is
    inner = network.module._orig_mod if name == "parallel" else network._orig_mod if name == "compiled" else network
    images, labels = load_images(few_digits).test[:]
    with torch.inference_mode():
        logits = inner(images.to(inner[-1].bias.dtype))
    right = (logits.argmax(1) == labels).double().mean().item()
    assert accuracy == pytest.approx(100 * right, abs=0.4 if name in ("half", "brain", "parallel") else 0.006)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("two", "holds 10 classes, but the network has 2 outputs: build it with 10 or more"),
        (
            "mixed",
            "takes no images [N, 1, 28, 28] (of the first it says RuntimeError: mat1 and mat2 must have the same",
        ),
    ],
)
def test_what_does_not_go_with_the_images_gets_one_line_and_is_not_saved(
    tmp_path, monkeypatch, refusal, few_digits, name, reason
):
    (tmp_path / "other_nets.py").write_text(OTHER_NETS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = ["--model", f"{tmp_path}/other_nets.py:{name}", "--data", few_digits, "--size", 28, "--channels", 1]
    assert reason in refusal(synthesize.main, *options, "--out", tmp_path / "w.pth", "--evaluate")
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
    tmp_path, monkeypatch, refusal, in_place_of_mnist, fails, reason, least
):
    (tmp_path / "failing.py").write_text(FAILING)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(comparison, "score", functools.partial(score, batch_size=500))
    model = f"{tmp_path}/failing.py:Net('{fails}', {least})"
    line = refusal(synthesize.main, "--model", model, "--out", tmp_path / "w.pth", "--evaluate", "--limit", 300)
    assert line.startswith(f"{model} and {in_place_of_mnist}: ") and reason in line and "failing.py, line" in line
    assert (tmp_path / "w.pth").exists() == (least == 350)  # what is written is not lost


def test_an_error_in_saving_is_one_line_too(tmp_path, monkeypatch, refusal, in_place_of_mnist):
    (tmp_path / "failing.py").write_text(FAILING)
    monkeypatch.setattr(sys, "path", list(sys.path))
    line = refusal(synthesize.main, "--model", f"{tmp_path}/failing.py:Net('saving')", "--out", tmp_path / "w.pth")
    assert "OSError: no state (failing.py, line 18: raise OSError" in line
    assert not list(tmp_path.glob("w.*"))


def test_a_process_that_refuses_ends_with_one_line_and_code_2(tmp_path):
    result = command("-m", "universal", "--model", "nowhere:Net", "--out", tmp_path / "w.pth", "--device", "cpu")
    assert result.returncode == 2 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("universal: error: --model nowhere:Net: nowhere cannot be imported")
