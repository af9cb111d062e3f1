"""A look at what was written: chance, NaN, dead layers and what means lose give a warning that names the layer."""

import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from target_cnn import TargetCNN
from universal import __main__ as command
from universal import write
from universal.evaluation.networks import cnn, mlp
from universal.reading.graph import ComputationGraph
from universal.rules.looking import FEWEST, DoubtfulWeights, doubt, lost


class ByHand(nn.Module):
    """A recurrence over the rows, whose layers are used 28 times."""

    def __init__(self):
        super().__init__()
        self.read, self.keep, self.out = nn.Linear(28, 32), nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x):
        state = x.new_zeros(len(x), 32)
        for row in x.squeeze(1).unbind(1):
            state = torch.tanh(self.read(row) + self.keep(state))
        return self.out(state)


class Own(nn.Module):
    """An MLP whose forward pass does something of its own with its weights, or with what they give."""

    def __init__(self, own):
        super().__init__()
        self.first, self.second, self.out, self.own = nn.Linear(784, 32), nn.Linear(32, 32), nn.Linear(32, 10), own

    def forward(self, x):
        x = self.first(x.flatten(1)).relu()
        return self.out(self.own(self, x))


def overwritten(network, x):
    network.second.weight.data = torch.zeros(32, 32)
    return network.second(x).relu()


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (ByHand, r"(read|keep), used 28 times and written for its first inputs alone: (is dead|tells)"),
        (lambda: Own(overwritten), "second: is dead"),
        (lambda: Own(lambda network, x: network.second(x.clamp(max=0)).relu()), "second: is dead"),
        (lambda: Own(lambda network, x: network.second(x).sin().mul(1e4).sin()), "rely on these weights; out tells"),
    ],
)
def test_a_network_that_is_hardly_written_gives_a_warning_that_names_the_layer(train_digits, build, reason):
    torch.manual_seed(0)
    with pytest.warns(DoubtfulWeights, match=reason) as caught:
        write(build(), *train_digits[:300], seed=0)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


@pytest.mark.parametrize(
    ("counts", "right_percent", "is_doubtful"),
    [
        ([10] * 5, 36, True), ([10] * 5, 38, False),  # 20 % and three deviations of that of 50 images
        ([1000] * 5, 23, False), ([1000] * 5, 21, True),
        ([45, 5], 94, True), ([45, 5], 96, False),  # halfway to all of them, where no three deviations are left
        ([FEWEST // 2 - 1] * 2, 0, False), ([FEWEST // 2] * 2, 0, True),
    ],
)  # fmt: skip
def test_chance_is_what_the_most_frequent_class_gives(monkeypatch, train_digits, counts, right_percent, is_doubtful):
    torch.manual_seed(0)
    graph = ComputationGraph(mlp([16]))
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = train_digits.images[:50].repeat(len(labels) // 50 + 1, 1, 1, 1)[: len(labels)]
    run = graph.run
    monkeypatch.setattr(graph, "run", lambda *args, **kwargs: run(*args, **kwargs) * 0 + F.one_hot(labels, 10))
    found = doubt(graph, images, labels, right_percent)
    assert (found is not None) == is_doubtful
    assert not is_doubtful or found.startswith(f"{right_percent} % of the images held out are right, and ")


@pytest.mark.parametrize("build", [TargetCNN, lambda: mlp([16]), lambda: cnn([4, 8], 16)])
def test_a_network_that_is_written_well_gives_none_and_stays_as_it_is_written(train_digits, build):
    network = build().train()
    with warnings.catch_warnings(action="error"):
        write(network, *train_digits[:300], seed=0)
    assert network.training and all(parameter.grad is None for parameter in network.parameters())


class Mean(nn.Module):
    """A layer of tokens, the rows of an image, that its activation tells apart, or does not."""

    def __init__(self, width: int):
        super().__init__()
        self.rows, self.out = nn.Linear(28, width), nn.Linear(width, 10)

    def forward(self, x):
        return self.out(self.rows(x.squeeze(1)).relu().mean(1))


def test_what_is_lost_by_averaging_over_places_is_told(train_digits, monkeypatch):
    torch.manual_seed(0)
    with pytest.warns(DoubtfulWeights, match=r"^\d+ % of the images held out are right, and \d+ % .* what rows gives"):
        write(Mean(16), *train_digits[:1000], seed=0)
    network = nn.Sequential(nn.Conv2d(1, 16, 7, 7), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    monkeypatch.delattr("universal.rules.looking.judged")
    with warnings.catch_warnings(action="error"):  # all places are read: nothing is lost, or looked for
        write(network, *train_digits[:1000], seed=0)


@pytest.mark.parametrize(("right_percent", "is_told"), [(50, True), (85, False), (99, False)])
def test_only_what_is_clearly_more_is_told(train_digits, right_percent, is_told):
    torch.manual_seed(0)
    graph = ComputationGraph(Mean(16))
    found = lost(graph, tuple(train_digits[:1000]), tuple(train_digits[1000:]), right_percent)
    assert (found is not None) == is_told


def test_the_command_warns_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.one, self.out = nn.Linear(784, 16), nn.Linear(16, 10)\n"
        "    def forward(self, x):\n"
        "        return self.out(self.one(x.flatten(1)).clamp(0, 0))\n"
    )
    options = ["--model", f"{tmp_path / 'net.py'}:Net", "--out", str(tmp_path / "w.pth"), "--limit", "100"]
    options += ["--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["universal", *options])
    command.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'net.py'}:Net: out: is dead")


def test_what_is_no_module_is_refused(train_digits):
    with pytest.raises(TypeError, match=r"a str cannot be written: give a torch\.nn\.Module"):
        write("x", *train_digits[:20])
