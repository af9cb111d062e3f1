"""Inputs of any shape, any number of classes, and networks of which a part is frozen: read, run and written."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import small_synthesizer
from test_model import layer, permuted
from torch import nn

from target_cnn import TargetCNN, score
from universal import write
from universal.evaluation.networks import cnn, mlp
from universal.model.synthesizer import random_weights
from universal.reading.geometry import middles
from universal.reading.graph import ComputationGraph, Logits
from universal.rules.trunk import Trunk

POOLED = (nn.AdaptiveAvgPool2d(1), nn.Flatten())


def residual() -> nn.Module:
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner = nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.out = nn.Linear(8 * 4 * 4, 2)

        def forward(self, x):
            x = self.stem(x).relu()
            return self.out(F.max_pool2d(x + self.inner(x), 2).flatten(1))

    return Residual()


# The shape of an input, the number of classes, a network, its sets of hidden neurons as in test_model.py, and the sides
# of the maps that linear layers read flattened.
NETWORKS = {
    "3 x 32 x 32": (
        (3, 32, 32), 7,
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(45, 8), nn.ReLU(), nn.Linear(8, 7),
        ),
        [(layer("0"), ["3.weight"]), (layer("3"), ["7.weight"]), (layer("7"), ["9.weight"])], {"7": (3, 3)},
    ),
    "1 x 64 x 64": (
        (1, 64, 64), 2,
        lambda: nn.Sequential(
            nn.Conv2d(1, 6, 5, 4, bias=False), nn.BatchNorm2d(6), nn.GELU(), nn.Conv2d(6, 4, 3, 2), nn.ReLU(),
            *POOLED, nn.Linear(4, 2),
        ),
        [(["0.weight", *layer("1", "running_mean", "running_var")], ["3.weight"]), (layer("3"), ["7.weight"])], {},
    ),
    "3 x 64 x 48": (
        (3, 64, 48), 100,
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, (4, 6), 4), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16 * 11, 8), nn.Tanh(), nn.Linear(8, 100)
        ),
        [(layer("0"), ["3.weight"]), (layer("3"), ["5.weight"])], {"3": (16, 11)},
    ),
    "4 x 16 x 16": (
        (4, 16, 16), 2, residual,
        [(layer("stem") + layer("inner"), ["out.weight"])], {"out": (4, 4)},
    ),
    "[N, 2, 128]": (
        (2, 128), 7,
        lambda: nn.Sequential(
            nn.Conv1d(2, 6, 7, 4), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 4, 5, 4), nn.ReLU(), nn.Flatten(),
            nn.Linear(28, 7),
        ),
        [([*layer("0"), *layer("1", "running_mean", "running_var")], ["3.weight"]), (layer("3"), ["6.weight"])],
        {"6": (1, 7)},
    ),
    "[N, 30]": (
        (30,), 100,
        lambda: nn.Sequential(
            nn.BatchNorm1d(30), nn.Linear(30, 12), nn.ReLU(), nn.Linear(12, 9), nn.SiLU(), nn.Linear(9, 100)
        ),
        [(layer("1"), ["3.weight"]), (layer("3"), ["5.weight"])], {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_for_other_inputs_are_read_and_run(name):
    shape, classes, build, _, maps = NETWORKS[name]
    torch.manual_seed(0)
    network, images = build().eval(), torch.randn(5, *shape)
    graph = ComputationGraph(network, images)
    first = graph.layers[0]
    assert graph.classes == classes and graph.left == [] and graph.channels == shape[0]
    assert first.channels[:, 0].tolist() == list(range(1, shape[0] + 1)) and first.places is None
    for before, after in zip(graph.layers, graph.layers[1:], strict=False):
        if after.sources == {before.index}:  # not beside a residual
            neurons = list(range(before.first_neuron, before.first_neuron + before.shape[0]))
            assert after.channels[:, 0].tolist() == neurons and after.places is None
    for after in graph.layers:
        if after.name in maps:
            down, across = maps[after.name]
            expected = torch.cartesian_prod(middles(down), middles(across)).float()
            torch.testing.assert_close(after.grid, expected)
            assert after.order is None
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(graph.run(images, {}), expected)
        torch.testing.assert_close(Logits(graph)(images), expected)
        halved = {key: 0.5 * value for key, value in graph.weights().items()}
        torch.testing.assert_close(graph.run(images, halved), torch.func.functional_call(network, halved, images))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_for_other_inputs_are_written_equivariantly(name):
    shape, classes, build, groups, _ = NETWORKS[name]
    synthesizer = small_synthesizer(0).double()
    images, labels = torch.randn(40, *shape).double(), torch.arange(40) % classes
    one_hot = F.one_hot(labels).double()
    torch.manual_seed(1)
    graph = ComputationGraph(build(), torch.randn(2, *shape))
    own = graph.weights()

    def written(seed: int, change=lambda weights: weights) -> dict:
        weights = {key: value.double() for key, value in (own | random_weights(graph, seed)).items()}
        return Trunk(graph, change(weights), images, one_hot, synthesizer).write_up_to(graph.last)

    with torch.no_grad():
        straight, other = written(seed=0), written(seed=1)
        crossed = written(seed=0, change=lambda weights: permuted(weights, groups, seed=1))
    last = {part.name for part in graph.last.parts}
    assert set(straight) == set(graph.written) - set(graph.counters) - last
    groups = [([*rows], [name for name in columns if name not in last]) for rows, columns in groups]
    for key, value in permuted(straight, groups, seed=1).items():
        torch.testing.assert_close(crossed[key], value, rtol=1e-6, atol=1e-7)
    assert any(not torch.allclose(other[key], straight[key], rtol=1e-2) for key in straight)  # it reads the init


# ---- what inputs are ------------------------------------------------------------------------------------------------


class Transposed(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.transpose(1, 2))


@pytest.mark.parametrize(
    ("build", "shape", "channels", "sides"),
    [
        (lambda: nn.Sequential(nn.Unflatten(1, (1, 40)), nn.Conv2d(1, 4, 1)), (40, 30), 1, (40, 30)),
        (lambda: nn.Conv1d(40, 4, 1), (40, 30), 40, (1, 30)),
        (lambda: Transposed(nn.Conv1d(30, 4, 1)), (40, 30), 30, (1, 40)),
        (lambda: nn.Linear(30, 4), (40, 30), 1, (1, 30)),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(1200, 4)), (40, 30), 40, (1, 30)),
        (lambda: nn.Linear(40, 4), (40,), 40, (1, 1)),
        (lambda: nn.Sequential(nn.Unflatten(1, (1, 40)), nn.Conv1d(1, 4, 1)), (40,), 1, (1, 40)),
    ],
    ids=["image", "signal", "signal, channels last", "rows of an image", "flattened signal", "table", "one signal"],
)
def test_what_channels_and_places_of_inputs_are_is_told_by_what_reads_them(build, shape, channels, sides):
    graph = ComputationGraph(nn.Sequential(build(), nn.Flatten(), nn.LazyLinear(3)), torch.randn(2, *shape))
    assert graph.channels == channels == graph.neurons.blocks[0][0]
    first = graph.layers[0]
    assert first.places is None and first.channels.shape[1] == 1
    grid = graph.last.grid if first.is_convolution else first.grid  # what a convolution gives lies where it read
    assert tuple(len(places.unique()) for places in grid.unbind(1)) == sides


@pytest.mark.parametrize("example", [torch.zeros(4, 3, 20, 12), torch.ones(2, 3, 20, 12), torch.rand(1, 3, 20, 12)])
def test_constant_and_duplicate_examples_are_read(example):
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.again, self.out = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4 * 16 * 8, 5)

        def forward(self, x):
            assert x.min() >= 0 and x.max() <= 1, "pixels lie within 0 and 1"
            x = self.conv((x - x.mean((1, 2, 3), keepdim=True)) / x.std())
            if x.std() > 0:
                x = self.again(x.relu())
            return self.out(x.flatten(1))

    graph = ComputationGraph(Careful(), example.expand(4, -1, -1, -1) if len(example) == 1 else example)
    assert [layer.name for layer in graph.layers] == ["conv", "again", "out"]


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (torch.rand(1, 3, 8, 8), r"the example has the shape \[1, 3, 8, 8\]: give a batch of two or more inputs"),
        (torch.rand(4), r"the example has the shape \[4\]: give images \[N, C, H, W\] or"),
        (torch.rand(4, 3, 8, 8, 8), r"the example has the shape \[4, 3, 8, 8, 8\]: give images"),
        (torch.zeros(4, 3, 0, 8), "its inputs are empty"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "the example is of torch.uint8: give inputs of floating point"),
        (torch.full((4, 3, 8, 8), torch.nan), "the example holds NaN or infinite values"),
        ([[0.0, 1.0]], "the example is a list: give a tensor"),
        (torch.rand(4, 3, 9, 8), r"^Sequential takes no inputs of shape \[N, 3, 9, 8\]; of .* it says Runtime"),
    ],
)  # fmt: skip
def test_examples_that_are_none_are_refused(example, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        ComputationGraph(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), example)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [None, (3, 12, 12)])
def test_modules_that_compute_in_half_precision_alone_are_read_and_written(train_digits, shape):
    class Half(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(channels, 8, 3, 4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))

        def forward(self, x):
            return self.body(x.half())

    torch.manual_seed(0)
    network = Half(1 if shape is None else 3)
    images = torch.randn(4, *(shape or (1, 28, 28)))
    network.body(images)
    network = network.half()
    graph = ComputationGraph(network, None if shape is None else images.half())
    assert [layer.name for layer in graph.layers] == ["body.0", "body.3"]
    with torch.no_grad():
        torch.testing.assert_close(graph.run(images, {}), network(images).float(), rtol=1e-2, atol=1e-2)
        assert graph.run(images, {}).dtype == torch.float32
    if shape is None:
        write(network, *train_digits[:100], seed=0)
        assert network.body[0].weight.dtype == torch.float16


# ---- what is frozen -------------------------------------------------------------------------------------------------


def test_frozen_layers_are_kept_and_what_reads_them_is_written_for_them(train_digits, digits):
    torch.manual_seed(0)
    network = cnn([16, 16], 32)
    network[0].requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    accounts = write(network, *train_digits[:300], seed=0)
    assert accounts.left == layer("0") and accounts.count == sum(before[key].numel() for key in accounts.written)
    assert all(torch.equal(value, before[key]) == (key in layer("0")) for key, value in network.state_dict().items())
    assert score(network, digits[:1000]).accuracy_percent > 85


def test_a_last_layer_alone_is_written(train_digits, digits):
    torch.manual_seed(0)
    network = mlp([64])
    network[1].requires_grad_(False)
    assert write(network, *train_digits[:300], seed=0).written == layer("3")
    assert score(network, digits).accuracy_percent > 40


def test_each_frozen_parameter_is_kept(train_digits, digits):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.still = nn.Conv2d(1, 6, 3, 2), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
            self.bare = nn.BatchNorm2d(6, affine=False)
            self.gain, self.shift = nn.Parameter(torch.rand(6, 1, 1)), nn.Parameter(torch.rand(1, 6, 1, 1))
            self.mix, self.out = nn.Conv2d(6, 6, 3, 2), nn.Linear(6 * 36, 10)

        def forward(self, x):
            x = self.still(self.bare(self.norm(self.conv(x)))).relu() * self.gain + self.shift
            return self.out(self.mix(x).relu().flatten(1))

    torch.manual_seed(0)
    network = Net()
    kept = {"conv.bias", "norm.bias", *layer("still"), "gain", "shift", "mix.weight", "out.bias"}
    for name, parameter in network.named_parameters():
        parameter.requires_grad = name not in kept
    network.norm.bias.data.fill_(3)
    network.mix.weight.data.abs_()
    before = copy.deepcopy(network.state_dict())
    accounts = write(network, *train_digits[:300], seed=0)
    statistics = {f"still.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(accounts.left) == kept | statistics
    after = network.state_dict()
    assert all(torch.equal(after[key], before[key]) == (key in accounts.left) for key in after)
    assert (network.bare.running_mean - 3).abs().max() < 0.1  # it is written for what is frozen before it
    responses = []
    network.mix.register_forward_hook(lambda _, inputs, output: responses.append(output))
    with torch.no_grad():
        network.eval()(digits.images[:200])
    assert (responses[0].mean((0, 2, 3)) / responses[0].std((0, 2, 3))).abs().max() < 1.5  # 19 and more as they were


def test_layers_that_are_used_again_are_frozen_too(train_digits):
    network = mlp([20, 20])
    again = nn.Sequential(*network[:5], network[3], nn.ReLU(), network[5])
    network[3].requires_grad_(False)
    before = network[3].weight.clone()
    assert set(write(again, *train_digits[:300], seed=0).left) == {*layer("3"), *layer("5")} and torch.equal(
        network[3].weight, before
    )


def test_a_network_without_anything_to_write_is_refused(train_digits):
    network = TargetCNN().requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"^TargetCNN: all parameters of its layers are frozen \(requires_grad=False\)"
    ):
        write(network, *train_digits[:20])
