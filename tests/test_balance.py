"""How large written weights are: within a bound whatever the probes say, and such that training goes on well."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import Chain
from torch import nn

from target_cnn import score
from universal import synthesize, write
from universal.evaluation.networks import ResidualBlock, VisionTransformer, cnn, mlp
from universal.model import algebra
from universal.model.balance import FLATTENED, balance, slopes_of
from universal.model.sizes import LARGEST, USUAL_LENGTH
from universal.model.synthesizer import fresh_init, random_weights
from universal.reading.graph import ComputationGraph
from universal.rules import synthesis
from universal.rules.trunk import Trunk

CLASSES = (nn.AdaptiveAvgPool2d(1), nn.Flatten())  # what makes logits of a convolution's outputs


# ---- the bound ------------------------------------------------------------------------------------------------------


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Squeezed(nn.Module):
    """A gate of which nothing passes the ReLU."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        return x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)) - 1000)).sigmoid()


def dense(*between: nn.Module, width: int = 16, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 16), *between, nn.Linear(width, 10, bias))


DEAD = {
    "maps": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3, 2),
        Of(lambda h: F.relu(h - 1000)),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(726, 10),
    ),
    "gate": lambda: nn.Sequential(nn.Conv2d(1, 8, 3, 2), Squeezed(), nn.Flatten(), nn.Linear(1352, 10)),
    "ReLU": lambda: dense(Of(lambda h: F.relu(h - 1000)), nn.Linear(16, 12), nn.ReLU(), width=12),
    "constant": lambda: dense(nn.Threshold(1e3, 1e6), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), width=12),
    "wide": lambda: dense(nn.Threshold(1e3, 1.0), nn.Linear(16, 600), nn.ReLU(), width=600),
    "last without a bias": lambda: dense(nn.Threshold(1e3, 1.0), bias=False),
    "norm": lambda: dense(nn.Threshold(1e3, 1.0), nn.LayerNorm(16)),
    "tiny": lambda: nn.Sequential(nn.Flatten(), Of(lambda x: 1e-7 * x), *dense(nn.ReLU())[1:]),
    "huge": lambda: nn.Sequential(nn.Flatten(), Of(lambda x: 1e7 * x + 1e9), *dense(nn.ReLU())[1:]),
}


@pytest.mark.parametrize("build", DEAD.values(), ids=DEAD)
def test_no_weight_is_larger_than_the_bound_whatever_the_probes_say(train_digits, build):
    torch.manual_seed(0)
    network = build()
    with warnings.catch_warnings(action="ignore"):
        write(network, *train_digits[:300], seed=0)
    assert all(parameter.abs().max() <= LARGEST for parameter in network.parameters())


def test_a_dead_gate_does_the_same_with_any_number_of_threads(train_digits):
    """Which weights of what passes nothing are chosen is up to rounding."""
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with warnings.catch_warnings(action="ignore"):
                network = synthesize(DEAD["gate"](), *train_digits[:100], seed=0)
            with torch.no_grad():
                found.append(network(train_digits.images[:300]))
    finally:
        torch.set_num_threads(threads)
    assert (found[0] - found[1]).norm() < 0.02 * found[0].norm()


def test_a_neuron_that_cannot_be_brought_to_scale_has_weights_of_the_usual_size(synthesizer, train_digits):
    few = train_digits[:60]
    graph = ComputationGraph(DEAD["maps"]())
    with torch.no_grad():
        one_hot = F.one_hot(few.labels, 10).float()
        written = Trunk(graph, fresh_init(graph, 0, "cpu"), few.images, one_hot, synthesizer).write_up_to(graph.last)
    lengths = written["2.weight"].flatten(1).norm(dim=1)
    assert (lengths < 10 * USUAL_LENGTH).all() and (lengths > 0.1 * USUAL_LENGTH).all()


def test_a_dense_layer_that_nothing_reaches_has_no_weights(train_digits):
    network = DEAD["gate"]()
    with warnings.catch_warnings(action="ignore"):
        write(network, *train_digits[:300], seed=0)
    assert (network[1].up.weight == 0).all() and network[1].up.bias.isfinite().all()


@pytest.mark.parametrize("neurons", [6, 60])  # fewer and more than responses
def test_neurons_that_do_not_vary_are_left_out_of_the_mixing(neurons):
    responses = torch.randn(40, 1, neurons, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    responses = (responses - responses.mean(0)) / responses.std(0, correction=0)
    responses[..., 2] = 0
    values = torch.randn(1, neurons, 5, dtype=torch.float64)
    mixed = algebra.decorrelate(responses, torch.tensor([0.1], dtype=torch.float64), values)
    torch.testing.assert_close(mixed[0, 2], values[0, 2])
    alive = [index for index in range(neurons) if index != 2]
    rest = algebra.decorrelate(responses[..., alive], torch.tensor([0.1], dtype=torch.float64), values[:, alive])
    torch.testing.assert_close(mixed[:, alive], rest)


# ---- balance --------------------------------------------------------------------------------------------------------


def normalised(norm) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 4, bias=False), norm(8), nn.ReLU(), nn.Conv2d(8, 12, 3), norm(12), nn.ReLU(), *CLASSES,
        nn.Linear(12, 10),
    )  # fmt: skip


# Networks, and whether anything about them can be scaled.
NETWORKS = {
    "ReLU": (lambda: Chain(F.relu), True),
    "leaky": (lambda: Chain(lambda x: F.leaky_relu(x, 0.1)), True),
    "used twice": (lambda: Chain(F.relu, tied=True), True),
    "GELU": (lambda: Chain(F.gelu), False),
    "logarithm": (lambda: Chain(lambda x: x.relu().log1p()), False),
    "constant added": (lambda: Chain(lambda x: x.relu() + 0.1), False),
    "ReLU6": (lambda: Chain(lambda x: F.relu6(4 * x + 3)), False),
    "batch norm": (lambda: normalised(nn.BatchNorm2d), True),
    "group norm": (lambda: normalised(lambda channels: nn.GroupNorm(2, channels)), True),
    "residual": (
        lambda: nn.Sequential(nn.Conv2d(1, 6, 3, 4), nn.ReLU(), ResidualBlock(6), nn.Flatten(), nn.Linear(294, 10)),
        True,
    ),
    "norm of the classes": (lambda: mlp([12]).append(nn.BatchNorm1d(10)), True),
    "transformer": (lambda: VisionTransformer(8), True),
    "two classes": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 6), nn.ReLU(), nn.Linear(6, 2)), True),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_balanced_weights_compute_the_same(name):
    build, can = NETWORKS[name]
    torch.manual_seed(0)
    graph = ComputationGraph(build())
    weights = {key: tensor * 3 if "weight" in key else tensor for key, tensor in graph.weights().items()}
    images = torch.randn(60, 1, 28, 28)
    balanced = balance(graph, weights, images[:40])
    if not can:
        last = {part.name for part in graph.last.parts}  # whose logits may be flattened
        others = {key: tensor for key, tensor in weights.items() if key not in last}
        assert all(torch.allclose(balanced[key], tensor, rtol=1e-5) for key, tensor in others.items())
        return
    for batch_statistics in (False, True):
        before, after = (graph.run(images[40:], some, batch_statistics) for some in (weights, balanced))
        factor = ((before * after).sum() / before.square().sum()).item()
        assert factor in (pytest.approx(1, abs=0.01), pytest.approx(FLATTENED, abs=0.01))
        before = factor * before
        torch.testing.assert_close(after, before, rtol=2e-3, atol=2e-3 * before.abs().max().item())
    names = [name for name in graph.written if name in dict(graph.module.named_parameters())]
    steep, flat = (slopes_of(graph, some, names, images[:32]).norm() for some in (weights, balanced))
    assert flat < 0.98 * steep


def test_permuted_neurons_are_balanced_alike():
    torch.manual_seed(0)
    network = cnn([6, 8], 12)
    crossed, order = copy.deepcopy(network), torch.randperm(6)
    with torch.no_grad():
        network[0].weight *= 4
        crossed[0].weight.copy_(network[0].weight[order])
        crossed[0].bias.copy_(network[0].bias[order])
        crossed[3].weight.copy_(network[3].weight[:, order])
    images = torch.randn(40, 1, 28, 28)
    one, other = (balance(graph, graph.weights(), images) for graph in map(ComputationGraph, (network, crossed)))
    torch.testing.assert_close(one["0.weight"][order], other["0.weight"], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(one["7.weight"], other["7.weight"], rtol=1e-3, atol=1e-6)
    assert not torch.allclose(one["0.weight"], network[0].weight, rtol=0.1)


def test_what_cannot_be_differentiated_stays_as_it_is():
    class Frozen(Chain):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    graph = ComputationGraph(Frozen(F.relu))
    weights = graph.weights()
    assert balance(graph, weights, torch.randn(40, 1, 28, 28)) is weights


def test_what_would_take_too_long_stays_as_it_is(monkeypatch):
    torch.manual_seed(0)
    graph = ComputationGraph(cnn([4, 8], 16))
    weights, images = graph.weights(), torch.randn(20, 1, 28, 28)
    assert balance(graph, weights, images) is not weights
    monkeypatch.setattr("universal.model.balance.MOST_MULTIPLICATIONS", graph.multiplications)
    assert balance(graph, weights, images) is weights


def test_balance_keeps_within_the_bound():
    graph = ComputationGraph(normalised(nn.BatchNorm2d))
    weights = graph.weights() | random_weights(graph, 0)
    weights |= {"0.weight": weights["0.weight"] / weights["0.weight"].abs().max() * 0.999 * LARGEST}
    balanced = balance(graph, weights, torch.randn(40, 1, 28, 28))
    assert all(balanced[name].abs().max() <= LARGEST for name in dict(graph.module.named_parameters()))


def bn_pooled() -> nn.Module:
    """Convolutions with BatchNorm, and global pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU(), *CLASSES, nn.Linear(32, 10),
    )  # fmt: skip


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_training_goes_on_from_a_network_with_norms_and_pooling(train_digits, digits, optimizer, monkeypatch):
    def after_steps() -> tuple[float, float]:
        """Accuracy as written and after five steps, of which the first throw back what is too steep."""
        network = synthesize(bn_pooled(), *train_digits[:300], seed=0)
        before = score(network, digits[1000:]).accuracy_percent
        steps = torch.optim.Adam(network.parameters(), 0.001)
        if optimizer == "SGD":
            steps = torch.optim.SGD(network.parameters(), 0.1)
        network.train()
        for images, labels in zip(digits.images[:640].split(128), digits.labels[:640].split(128), strict=True):
            steps.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            steps.step()
        return before, score(network, digits[1000:]).accuracy_percent

    before, after = after_steps()
    assert after > before - 3
    monkeypatch.setattr(synthesis, "balance", lambda graph, weights, images: weights)
    same, thrown_back = after_steps()
    assert same == pytest.approx(before, abs=0.2) and thrown_back < before - 5


class WideAndDeep(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.deep = nn.Linear(784, 10), cnn([8, 16], 48)

    def forward(self, x):
        return self.wide(x.flatten(1)) + self.deep(x)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = cnn([8, 16], 48)
        self.scale, self.shift = (nn.Parameter(torch.ones(10)) for _ in range(2))

    def forward(self, x):
        return self.scale * self.network(x) + self.shift


@pytest.mark.parametrize("build", [lambda: cnn([8, 16], 48), WideAndDeep, Scaled])
def test_steep_logits_are_flattened_and_choose_the_same_class(train_digits, digits, monkeypatch, build):
    monkeypatch.setattr("universal.model.balance.STEEP", 1.0)
    network = synthesize(build(), *train_digits[:300], seed=0)
    monkeypatch.setattr(synthesis, "balance", lambda graph, weights, images: weights)
    steep = synthesize(build(), *train_digits[:300], seed=0)
    with torch.no_grad():
        flat, steep = (net(digits.images[:500]) for net in (network, steep))
    torch.testing.assert_close(flat, FLATTENED * steep, rtol=1e-3, atol=1e-3 * steep.abs().max().item())
