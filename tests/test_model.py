"""The model: equivariance, what it writes, and its files."""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import small_synthesizer
from torch import nn

from scripting import UserError
from target_cnn import flatten_weights, score
from universal import load_synthesizer, synthesize, write
from universal.evaluation.networks import EVALUATED, ResidualBlock, VisionTransformer, cnn, mlp
from universal.mnist import IMAGE_SHAPE
from universal.model import algebra
from universal.model.algebra import InverseSquareRoot, decorrelate
from universal.model.description import cosines_of
from universal.model.neurons import ROLES, Order
from universal.model.synthesizer import SYNTHESIZER, default_synthesizer, fresh_init, random_weights, save_synthesizer
from universal.model.writing import NeuronRows
from universal.reading.graph import ComputationGraph, in_fastest_layout
from universal.rules.trunk import Trunk
from universal.training.architectures import Tokens
from universal.training.blocks import Concatenation, Gain, Gate, Sum, Transposed

CLASSES = (nn.AdaptiveAvgPool2d(1), nn.Flatten())  # what makes logits of a convolution's outputs


class Functional(nn.Module):
    """Everything in functional form, with a residual addition, and parameters that belong to no layer module."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 1, 5, 5))
        self.offset = nn.Parameter(torch.randn(6))
        self.conv = nn.Conv2d(6, 6, 3, padding="same", dilation=2)
        self.matrix, self.shift = nn.Parameter(torch.randn(6 * 7 * 7, 9)), nn.Parameter(torch.zeros(9))
        self.out = nn.Linear(9, 10)

    def forward(self, images):
        x = F.relu(F.conv2d(images, self.kernel, self.offset, stride=2, padding=2), inplace=True)
        y = F.gelu(self.conv(x))
        y += x
        return self.out(torch.tanh(F.max_pool2d(y, 2).flatten(1) @ self.matrix + self.shift))


class Residual(nn.Module):
    """Two layers that share the channels of their outputs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.inner = nn.Conv2d(8, 5, 3, padding=1)
        self.back = nn.Conv2d(5, 8, 1)
        self.out = nn.Linear(8 * 2 * 2, 10)

    def forward(self, images):
        x = self.stem(images).relu()
        x = torch.add(x, self.back(torch.relu(self.inner(x))))
        return self.out(F.adaptive_avg_pool2d(x, 2).flatten(1))


def deep_in_channels() -> nn.Module:
    """A depthwise convolution and norms of every kind."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
        nn.InstanceNorm2d(8, affine=True), nn.SiLU(), nn.Conv2d(8, 6, 1), nn.GroupNorm(1, 6), nn.Tanh(), *CLASSES,
        nn.Linear(6, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 10), nn.BatchNorm1d(10),
    )  # fmt: skip


IN_COLOUR = torch.randn(2, 3, 28, 28)
STATISTICS = ("running_mean", "running_var")


def layer(name: str, *more: str) -> list[str]:
    return [f"{name}.{parameter}" for parameter in ("weight", "bias", *more)]


# A network, and for each set of hidden neurons: the parameters with a row for each, and those with columns for each.
NETWORKS = {
    "CNN": (
        lambda: cnn([5, 6], 8),
        [(layer("0"), ["3.weight"]), (layer("3"), ["7.weight"]), (layer("7"), ["9.weight"])],
    ),
    "MLP": (lambda: mlp([20, 12]), [(layer("1"), ["3.weight"]), (layer("3"), ["5.weight"])]),
    "GELU, average pooling, even kernel": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 6, 4, stride=2), nn.GELU(), nn.AvgPool2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(216, 9),
            nn.GELU(), nn.Identity(), nn.Linear(9, 10),
        ),
        [(layer("0"), ["5.weight"]), (layer("5"), ["8.weight"])],
    ),
    "three channels, no bias, dilation": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, dilation=2, bias=False), nn.ReLU(inplace=True), nn.Conv2d(6, 5, (3, 1), bias=False),
            nn.ReLU(), nn.AdaptiveAvgPool2d((2, 2)), nn.Flatten(), nn.Linear(20, 10, bias=False),
        ),
        [(["0.weight"], ["2.weight"]), (["2.weight"], ["6.weight"])],
    ),
    "classes from a convolution": (
        lambda: nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 10, 1), *CLASSES),
        [(layer("0"), ["2.weight"])],
    ),
    "residual": (
        Residual,
        [(layer("stem") + layer("back"), ["inner.weight", "out.weight"]), (layer("inner"), ["back.weight"])],
    ),
    "functional": (Functional, [(["kernel", "offset", *layer("conv")], ["conv.weight", "matrix.T"]),
                                (["matrix.T", "shift"], ["out.weight"])]),
    "residual block": (
        lambda: nn.Sequential(nn.Conv2d(1, 6, 3, 4), nn.ReLU(), ResidualBlock(6), nn.Flatten(), nn.Linear(294, 10)),
        [(layer("0") + layer("2.conv2"), ["2.conv1.weight", "4.weight"]), (layer("2.conv1"), ["2.conv2.weight"])],
    ),
    "depthwise, norms": (
        deep_in_channels,
        [(["0.weight", *layer("1", *STATISTICS), *layer("3"), *layer("4")], ["6.weight"]),
         (layer("6") + layer("7"), ["11.weight"]), (layer("11") + layer("12"), ["14.weight"])],
    ),
    "gate": (
        lambda: nn.Sequential(nn.Conv2d(1, 6, 3, 2), Gate(6, 3), nn.Flatten(), nn.Linear(6 * 169, 10)),
        [(layer("0") + layer("1.gate.3"), ["1.gate.1.weight", "3.weight"]), (layer("1.gate.1"), ["1.gate.3.weight"])],
    ),
    "gains, channels last": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 4, 4), Sum(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), Transposed(nn.Sequential(
                nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8), Gain(8, 0.1),
            )))), *CLASSES, nn.Linear(8, 10, bias=False),
        ),
        [([*layer("0"), *layer("1.inner.0"), *layer("1.inner.1.inner.0"), *layer("1.inner.1.inner.3"),
           "1.inner.1.inner.4.gain"], ["1.inner.1.inner.1.weight", "4.weight"]),
         (layer("1.inner.1.inner.1"), ["1.inner.1.inner.3.weight"])],
    ),
    "rows": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Unflatten(1, (28, 28)), nn.Conv1d(28, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(156, 10)
        ),
        [(layer("2"), ["5.weight"])],
    ),
    "one of two branches": (
        lambda: nn.Sequential(
            Sum(nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(1, 6, 1)),
            Concatenation(nn.Conv2d(6, 4, 3), nn.Conv2d(6, 3, 3)), *CLASSES, nn.Linear(7, 10),
        ),
        [(layer("0.inner") + layer("0.shortcut"), ["1.branches.0.weight", "1.branches.1.weight"])],
    ),
    "vision transformer": (
        lambda: VisionTransformer(8),
        [([*layer("patches"), "places.T",
           *(name for part in ("self_attn.out_proj", "linear2", "norm1", "norm2") for block in (0, 1)
             for name in layer(f"blocks.layers.{block}.{part}"))],
          ["out.weight", *(f"blocks.layers.{block}.{part}" for part in ("self_attn.in_proj_weight", "linear1.weight")
                           for block in (0, 1))]),
         (layer("blocks.layers.0.linear1"), ["blocks.layers.0.linear2.weight"])],
    ),
}  # fmt: skip


def permuted(weights: dict, groups: list, seed: int) -> dict:
    """The weights of the same function, with the neurons of each group in another order.

    `name.T` stands for the parameter's transpose, whose last axis comes first.
    """
    weights = dict(weights)
    generator = torch.Generator().manual_seed(seed)

    def change(name: str, axis: int, order: torch.Tensor) -> None:
        name, dot, _ = name.partition(".T")
        axis = -1 - axis if dot else axis
        tensor = weights[name].movedim(axis, 0)
        block = len(tensor) // len(order)  # positions of the map that a linear layer reads
        weights[name] = tensor.unflatten(0, (len(order), block))[order].flatten(0, 1).movedim(0, axis)

    for rows, columns in groups:
        first, dot, _ = rows[0].partition(".T")
        order = torch.randperm(weights[first].shape[-1 if dot else 0], generator=generator)
        for name in rows:
            change(name, 0, order)
        for name in columns:
            change(name, 1, order)
    return weights


def write_learned(synthesizer, graph: ComputationGraph, data, seed: int) -> dict:
    """What the learned layers write in place of all before the last, from a fresh init: by name."""
    with torch.no_grad():
        one_hot = F.one_hot(data.labels, 10).float()
        written = Trunk(graph, fresh_init(graph, seed, "cpu"), data.images, one_hot, synthesizer).write_up_to(
            graph.last
        )
        for name, tensor in written.items():
            graph.state()[name].copy_(tensor)
    return written


# ---- the model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def double_synthesizer():
    """The committed synthesiser in double precision. Not to be changed."""
    return load_synthesizer().double()


@pytest.mark.parametrize("name", NETWORKS)
def test_permuted_neurons_are_written_permuted(double_synthesizer, train_digits, name):
    build, groups = NETWORKS[name]
    graph = ComputationGraph(build(), IN_COLOUR if "three" in name else None)
    images = train_digits.images[:60].double().expand(-1, graph.channels if "three" in name else 1, -1, -1)
    one_hot = F.one_hot(train_digits.labels[:60], 10).double()
    own, last = graph.weights(), {part.name for part in graph.last.parts}

    def written(seed: int, change=lambda weights: weights) -> dict:
        weights = {key: value.double() for key, value in (own | random_weights(graph, seed)).items()}
        return Trunk(graph, change(weights), images, one_hot, double_synthesizer).write_up_to(graph.last)

    with torch.no_grad():
        straight, other = written(0), written(1)
        crossed = written(0, lambda weights: permuted(weights, groups, seed=1))
    hidden = [(rows, [name for name in columns if name not in last]) for rows, columns in groups]
    straight = permuted(straight, hidden, seed=1)
    for key in straight:
        torch.testing.assert_close(crossed[key], straight[key], rtol=1e-6, atol=1e-7)
    assert any(not torch.allclose(other[key], straight[key], rtol=1e-2) for key in straight)  # it reads the init


def test_neurons_have_roles_by_their_order_and_those_that_are_added_up_the_same():
    graph = ComputationGraph(
        nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), Sum(nn.Conv2d(6, 6, 3, padding=1)), Sum(nn.Conv2d(6, 6, 1)), *CLASSES,
            nn.Linear(6, 10),
        )
    )  # fmt: skip
    weights, others = (random_weights(graph, seed) for seed in (0, 1))
    first, *added = graph.layers[:3]
    order, other = Order(graph, weights), Order(graph, weights | {"1.inner.weight": others["1.inner.weight"]})
    roles = order.roles(first)
    assert roles.tolist() == weights["0.weight"].sum((1, 2, 3)).argsort().argsort().tolist()
    assert all(torch.equal(one.roles(layer), roles) for one in (order, other) for layer in added)
    assert not torch.equal(Order(graph, others).roles(first), roles)


def test_queries_and_keys_have_the_same_roles_in_their_own_order():
    graph = ComputationGraph(VisionTransformer(8))
    together = next(layer for layer in graph.layers if layer.shape[0] == 24)
    queries, keys, values = Order(graph, random_weights(graph, 0)).roles(together).chunk(3)
    assert queries.tolist() == keys.tolist() == [ROLES + place for place in range(8)]
    assert len({*values.tolist()}) == 8 and values.max() < ROLES


def test_groups_with_the_same_roles_are_told_apart_by_what_they_read(synthesizer):
    layer = ComputationGraph(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3, groups=2), *CLASSES, nn.Linear(6, 10))
    ).layers[1]
    keys, about = torch.randn(4, synthesizer.place_key.out_features), torch.zeros(synthesizer.place_key.out_features)
    roles = torch.tensor([0, 1, 2, 0, 1, 2])
    with torch.no_grad():
        straight = synthesizer.neurons(layer, keys, roles, about)
        crossed = synthesizer.neurons(layer, keys.roll(2, 0), roles, about)
    torch.testing.assert_close(crossed, straight.roll(3, 0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(straight, straight.roll(3, 0), rtol=1e-2)


def test_layers_that_are_given_have_keys_of_their_roles_and_of_what_they_answer(synthesizer, train_digits):
    images, labels = train_digits[:120]
    graph = ComputationGraph(cnn([8, 16], 16))
    first, weights, one_hot = graph.layers[0], fresh_init(graph, 0, "cpu"), F.one_hot(labels, 10).float()
    with torch.no_grad():
        learned, same, other = (Trunk(graph, weights, images, one_hot, synthesizer).learned for _ in range(3))
        weight, bias, means, responses = learned.of(first, images)
        again = same.of(first, images, (weight, bias, means))
        changed = other.of(first, images, (weight.flip(0), bias.flip(0), torch.arange(8.0)))
    torch.testing.assert_close(again[3], responses)
    torch.testing.assert_close(same.keys.rows, learned.keys.rows, rtol=1e-4, atol=1e-5)
    assert (other.keys.rows[-8:] - learned.keys.rows[-8:]).norm() > 0.02 * learned.keys.rows[-8:].norm()
    assert torch.equal(changed[2], torch.arange(8.0))


def test_frozen_neurons_have_the_keys_of_learned_ones_that_they_are_like(synthesizer, train_digits):
    images, one_hot = train_digits[:120].images, F.one_hot(train_digits[:120].labels, 10).float()
    network, order = cnn([8, 16], 16), torch.tensor([3, 0, 1, 2, 7, 4, 5, 6])
    graph = ComputationGraph(network)
    weights, (first, second) = fresh_init(graph, 0, "cpu"), graph.layers[:2]
    with torch.no_grad():
        learned = Trunk(graph, weights, images, one_hot, synthesizer)
        learned.write_up_to(second)
        own = {part.name: part.of(learned.written)[order] for part in first.parts}
    network[0].requires_grad_(False)
    graph = ComputationGraph(network)
    with torch.no_grad():
        frozen = Trunk(graph, weights | own, images, one_hot, synthesizer)
        frozen.write_up_to(graph.layers[1])
    own, keys = (trunk.learned.keys.rows[-8:] for trunk in (learned, frozen))
    likeness = F.cosine_similarity(keys[:, None], own[None], dim=2)
    assert torch.equal(likeness.argmax(1), order)


def test_a_last_layer_without_a_bias_prefers_no_class(train_digits, digits):
    network = cnn([16, 32], 64)
    network[9] = nn.Linear(64, 10, bias=False)
    network = synthesize(network, *train_digits[:300], seed=0)
    with torch.no_grad():
        logits = network(digits.images[:500])
    assert score(network, digits[:500]).accuracy_percent > 90
    assert logits.mean(0).std() < 0.3 * logits.std()


@pytest.mark.parametrize("function", [nn.ReLU(), nn.Softplus()])
def test_what_follows_the_classes_lets_them_pass(train_digits, digits, function):
    head = [nn.Conv2d(32, 10, 1), function, *CLASSES]  # as SqueezeNet ends
    body = [nn.Conv2d(1, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU()]
    network = synthesize(nn.Sequential(*body, *head), *train_digits[:300], seed=0)
    with torch.no_grad():
        assert (network[:5](digits.images[:100]) > 0).float().mean() > 0.98
    assert score(network, digits[:1000]).accuracy_percent > 55  # below 30 if nothing is done about it


@pytest.mark.parametrize("function", [nn.Hardtanh(), nn.Sigmoid(), nn.Softmax(1)])
def test_what_has_an_upper_end_too_gets_no_such_bias(train_digits, function):
    plain, network = (
        synthesize(nn.Sequential(nn.Flatten(), nn.Linear(784, 10), last), *train_digits[:300], seed=0)
        for last in (nn.Identity(), function)
    )
    torch.testing.assert_close(network[1].bias, plain[1].bias)


def test_gains_become_one(train_digits, monkeypatch):
    monkeypatch.setattr("universal.rules.synthesis.balance", lambda graph, weights, images: weights)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.full((1, 4, 1, 1), 0.01))

        def forward(self, x):
            return x * self.gain

    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), Scaled(), nn.Flatten(), nn.Linear(4 * 676, 10))
    assert "2.gain" in write(network, *train_digits[:300], seed=0).written
    assert network[2].gain.shape == (1, 4, 1, 1) and (network[2].gain == 1).all()


def test_pixels_keep_their_scales(synthesizer, train_digits):
    network = nn.Sequential(nn.Flatten(), Gain(784, 0.7), nn.Linear(784, 10))
    assert (write_learned(synthesizer, ComputationGraph(network), train_digits[:60], seed=0)["1.gain"] == 1).all()


def test_keys_say_what_neurons_answer_to_the_probes(train_digits):
    synthesizer = load_synthesizer()
    graph = ComputationGraph(cnn([8, 8], 12))
    knowing = write_learned(synthesizer, graph, train_digits[:60], seed=0)
    with torch.no_grad():
        synthesizer.seen.weight.zero_()
    blind = write_learned(synthesizer, graph, train_digits[:60], seed=0)
    torch.testing.assert_close(blind["0.weight"], knowing["0.weight"])
    assert (blind["3.weight"] - knowing["3.weight"]).norm() > 1e-3 * knowing["3.weight"].norm()


@pytest.mark.parametrize("way", ["images", "labels"])
def test_what_is_learned_is_written_from_images_and_labels(synthesizer, train_digits, way):
    graph, few, others = ComputationGraph(cnn([8, 8], 12)), train_digits[:60], train_digits[60:120]
    changed = others if way == "images" else few._replace(labels=others.labels)
    one, same, other = (write_learned(synthesizer, graph, some, seed=0) for some in (few, few, changed))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert (other["3.weight"] - one["3.weight"]).norm() > 0.05 * one["3.weight"].norm()


def test_classes_may_have_any_numbers(synthesizer, train_digits):
    graph, few = ComputationGraph(cnn([8, 8], 12)), train_digits[:60]
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    one = write_learned(synthesizer, graph, few, seed=0)
    other = write_learned(synthesizer, graph, few._replace(labels=order[few.labels]), seed=0)
    for key in one:
        torch.testing.assert_close(other[key], one[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("convolution", "shape"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), (5, 4, 7, 7)),
        (nn.Conv2d(4, 8, (3, 5), (2, 1), (1, 2), (1, 2), groups=2), (5, 4, 11, 12)),
        (nn.Conv2d(4, 4, 4, padding="same", groups=4), (5, 4, 6, 6)),
        (nn.Conv1d(4, 6, 5, 3, 2, 2), (5, 4, 30)),
    ],
    ids=["plain", "dilated, in groups", "same", "1-d"],
)
def test_patches_are_what_a_convolution_reads(convolution, shape):
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(784, math.prod(shape[1:])), nn.Unflatten(1, shape[1:]), convolution, nn.Flatten(),
        nn.LazyLinear(10),
    )  # fmt: skip
    layer = ComputationGraph(network).layers[1]
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = convolution.weight.detach()
    neurons = weight.flatten(1).unflatten(0, (layer.groups, -1))
    read = torch.einsum("gnpf,gof->ngop", layer.patches(inputs, most=100), neurons).flatten(1, 2)
    torch.testing.assert_close(read, layer(inputs, weight).flatten(2))
    if layer.groups == 1:
        mean = layer(inputs, weight).flatten(2).mean(2)
        torch.testing.assert_close(layer.mean_patch(inputs) @ weight.flatten(1).T, mean)
    some = layer.patches(inputs, most=3)
    assert 2 ** len(shape[2:]) <= some.shape[2] <= 3 ** len(shape[2:])
    assert all((layer.patches(inputs, 100) == patch[:, :, None]).all(3).any(2).all() for patch in some.unbind(2))


@pytest.mark.parametrize("count", [3, 1100])
def test_half_of_the_inner_products_are_computed(count):
    torch.manual_seed(0)
    rows = torch.randn(count, 5)
    torch.testing.assert_close(algebra.gram(rows), rows @ rows.T)


def test_regressions_are_the_same_in_either_form():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 30, 12, dtype=torch.float64, generator=generator)
    targets = torch.randn(2, 30, 4, dtype=torch.float64, generator=generator)
    ridge = torch.tensor([0.2], dtype=torch.float64)
    few = algebra.ridge_regression(features, targets, ridge)
    wide = torch.cat([features, torch.zeros(2, 30, 40)], 2)  # which makes it the other form
    many = algebra.ridge_regression(wide, targets, ridge)
    torch.testing.assert_close(many[..., :12], few)
    strength = (0.2 + 1e-3) * features.square().sum(-1).mean(-1)[:, None, None]
    normal = features.mT @ features + strength * torch.eye(12)
    torch.testing.assert_close(few, torch.linalg.solve(normal, features.mT @ targets).mT, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("neurons", [1, 30, 100])  # fewer and more than responses
@pytest.mark.parametrize("groups", [1, 3])
def test_decorrelated_neurons_are_those_of_the_inverse_square_root(neurons, groups):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(60, groups, neurons, dtype=torch.float64, generator=generator)
    raw = raw + raw.mean(2, keepdim=True)  # alike
    standardised = (raw - raw.mean(0)) / raw.std(0, correction=0)
    values = torch.randn(groups, neurons, 7, dtype=torch.float64, generator=generator)
    ridge = torch.tensor([0.3], dtype=torch.float64)
    mixed = decorrelate(standardised, ridge, values)
    for group in range(groups):
        responses_of_group = standardised[:, group]
        correlation = responses_of_group.T @ responses_of_group / 60
        eigenvalues, vectors = torch.linalg.eigh(correlation + 0.3 * torch.eye(neurons))
        mix = vectors @ torch.diag(eigenvalues.rsqrt()) @ vectors.T
        mix = mix / (responses_of_group @ mix.T).std(0, correction=0)[:, None]
        torch.testing.assert_close(mixed[group], mix @ values[group], rtol=1e-5, atol=1e-6)


def test_what_a_wide_layer_costs_does_not_grow_with_the_cube_of_its_width(synthesizer, train_digits, monkeypatch):
    """No matrix that is decomposed or solved with is larger than MOST_ROWS."""
    largest = []

    def recording(function):
        def record(matrix, *args, **kwargs):
            largest.append(matrix.shape[-1])
            return function(matrix, *args, **kwargs)

        return record

    for name in ("eigh", "inv", "cholesky", "solve"):
        monkeypatch.setattr(torch.linalg, name, recording(getattr(torch.linalg, name)))
    wide = nn.Sequential(nn.Conv2d(1, 1024, 3, 4), nn.ReLU(), nn.Conv2d(1024, 1024, 1), nn.ReLU(), nn.Flatten())
    write_learned(synthesizer, ComputationGraph(wide.append(nn.LazyLinear(10))), train_digits[:50], seed=0)
    assert len(largest) > 3 and 50 < max(largest) <= algebra.MOST_ROWS


def test_a_sum_of_neurons_has_the_sum_of_their_rows():
    graph = ComputationGraph(nn.Sequential(nn.Conv2d(1, 3, 3), Sum(nn.Conv2d(3, 3, 1)), *CLASSES, nn.Linear(3, 10)))
    table = NeuronRows(graph, torch.zeros(1, 2))
    first, second = torch.randn(3, 2), torch.randn(3, 2)
    table.add(first)
    table.add(second)
    torch.testing.assert_close(table.of(graph.last.channels[:, 0]), first + second)


def test_the_inverse_square_root_is_one():
    features = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = features.T @ features / 40 + 0.1 * torch.eye(12)
    root = InverseSquareRoot.apply(matrix)
    torch.testing.assert_close(root @ matrix @ root, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(root, root.T)
    for symmetric in (matrix, torch.eye(12, dtype=torch.float64)):  # of which all eigenvalues coincide
        assert torch.autograd.gradcheck(
            lambda x: InverseSquareRoot.apply((x + x.T) / 2), symmetric.clone().requires_grad_()
        )


def test_a_small_kernel_is_like_the_middle_of_a_large_one():
    small, large = (cosines_of(ComputationGraph(nn.Sequential(nn.Conv2d(1, 10, k), *CLASSES)).last) for k in (3, 5))
    torch.testing.assert_close(small.view(3, 3, -1), large.view(5, 5, -1)[1:4, 1:4])


def test_synthesize_fills_the_module_in_place(train_digits):
    network = cnn([8, 8], 16)
    keys, parameters = list(network.state_dict()), list(network.parameters())
    assert synthesize(network, *train_digits[:300], seed=3) is network
    assert list(network.state_dict()) == keys
    assert all(one is other for one, other in zip(network.parameters(), parameters, strict=True))
    assert all(parameter.requires_grad and not parameter.is_inference() for parameter in network.parameters())
    same, other = (flatten_weights(synthesize(cnn([8, 8], 16), *train_digits[:300], seed=seed)) for seed in (3, 4))
    assert torch.equal(flatten_weights(network), same)
    assert not torch.allclose(same, other)


def test_double_precision_by_default_changes_nothing(train_digits):
    def written() -> nn.Module:
        default_synthesizer.cache_clear()
        return synthesize(cnn([4, 8], 12), *train_digits[:300], seed=0)

    expected = flatten_weights(written())
    torch.set_default_dtype(torch.float64)
    try:
        network = written()
    finally:
        torch.set_default_dtype(torch.float32)
    assert network[0].weight.dtype == torch.float64
    parameters = default_synthesizer(torch.device("cpu")).parameters()
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    torch.testing.assert_close(flatten_weights(network).float(), expected, rtol=0.05, atol=0.01)


def test_without_a_seed_the_module_s_own_weights_are_the_init(train_digits):
    torch.manual_seed(5)
    network = mlp([20])
    again = mlp([20])
    again.load_state_dict(network.state_dict())
    one, other = synthesize(network, *train_digits[:300]), synthesize(again, *train_digits[:300])
    assert torch.equal(flatten_weights(one), flatten_weights(other))


def test_every_parameter_is_written_or_left_and_named(train_digits):
    torch.manual_seed(0)
    blocks = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)]
    network = Tokens(IMAGE_SHAPE, 7, 8, blocks, 10, places=True, class_token=True, norm=False)
    network.dead = nn.BatchNorm1d(3)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    accounts = write(network, *train_digits[:300])
    assert sorted(accounts.written + accounts.left) == sorted(before)
    assert accounts.left == ["first", *(f"dead.{name}" for name in network.dead.state_dict())]
    after = network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in accounts.left)
    assert not any(torch.equal(after[name], before[name]) for name in accounts.written)


def test_norms_give_in_evaluation_what_they_give_in_training(train_digits, digits):
    def build():
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.BatchNorm2d(24),
            nn.ReLU(), nn.Flatten(), nn.Linear(1176, 10),
        )  # fmt: skip

    network = synthesize(build(), *train_digits[:300], seed=0)
    fresh = build()
    fresh.load_state_dict(network.state_dict())
    few = digits[:500]
    at_once, one_by_one = (score(fresh, few, batch_size=size) for size in (500, 5))
    assert torch.equal(at_once.wrong, one_by_one.wrong)
    assert at_once.accuracy_percent > 85
    with torch.inference_mode():
        trained = [network.train()(images).argmax(1) for images in few.images.split(250)]  # by the images' statistics
    assert (torch.cat(trained) == few.labels).float().mean() > 0.85


def test_a_layer_that_is_used_again_is_written_once(train_digits, digits):
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.out = nn.Linear(784, 8), nn.Linear(8, 8), nn.Linear(8, 10)

        def forward(self, x):
            return self.out(self.again(self.again(self.first(x.flatten(1))).relu()).relu())

    torch.manual_seed(0)
    network = Again()
    graph, seen = ComputationGraph(network), []
    probes = train_digits.images[:50]
    with torch.no_grad():
        graph.write(
            probes, graph.weights(), lambda call, inputs: (seen.append(call.name), call.of(graph.weights(), inputs))[1]
        )
    assert seen == ["first", "again", "out"]
    synthesize(network, *train_digits[:300], seed=0)
    assert score(network, digits[:1000]).accuracy_percent > 50


@pytest.mark.parametrize("way", ["folded", "places first", "windows"])
def test_probes_may_lie_on_any_axis_or_be_folded_with_places(train_digits, digits, way):
    class Rows(nn.Module):
        """A linear layer for each row, or convolution for each window, and logits that are averaged over them."""

        def __init__(self, way):
            super().__init__()
            torch.manual_seed(0)
            self.way, self.hidden, self.out = way, nn.Linear(28, 12), nn.Linear(12, 10)
            self.conv = nn.Conv2d(1, 12, 7) if "windows" in way else None

        def forward(self, x):
            if self.conv:
                x = x.unfold(2, 7, 7).unfold(3, 7, 7).flatten(2, 3)  # [N, 1, 16, 7, 7]
                if self.way == "windows":
                    return self.out(self.conv(x.reshape(-1, 1, 7, 7)).relu().view(-1, 16, 12)).mean(1)
                return self.out(torch.stack([self.conv(x[:, :, i]) for i in range(16)], 1).relu().flatten(2)).mean(1)
            x = x[:, 0]
            if self.way == "folded":
                return self.out(self.hidden(x.reshape(-1, 28)).relu()).view(-1, 28, 10).mean(1)
            if self.way == "places first":
                return self.out(self.hidden(x.transpose(0, 1)).relu()).mean(0)
            return self.out(self.hidden(x).relu()).mean(1)

    if way == "windows":  # written once, from the first of them or from all
        network = synthesize(Rows(way), *train_digits[:300], seed=0)
        assert score(network, digits[:1000]).accuracy_percent > 25
        return
    plain, other = (synthesize(Rows(name), *train_digits[:300], seed=0) for name in ("plain", way))
    for one, same in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, same, rtol=0.02, atol=2e-3)


def test_a_last_convolution_that_covers_the_maps_is_a_linear_layer(train_digits, digits):
    network = nn.Sequential(nn.Conv2d(1, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 10, 12), nn.Flatten())
    synthesize(network, *train_digits[:300], seed=0)
    assert score(network, digits[:1000]).accuracy_percent > 80


def test_infinite_masks_are_left_alone_and_nan_is_never_written(train_digits):
    class Masked(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.register_buffer("mask", torch.full((28, 28), -math.inf).triu(1))
            self.hidden, self.norm, self.out = nn.Linear(28, 8), nn.BatchNorm1d(224), nn.Linear(224, 10)
            self.function = function

        def forward(self, x):
            x = self.function(x[:, 0])
            return self.out(self.norm(((x @ x.mT + self.mask).softmax(-1) @ self.hidden(x)).flatten(1)))

    network = synthesize(Masked(lambda x: x), *train_digits[:300], seed=0)
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    network = Masked(lambda x: (x - 2).sqrt())  # of random pixels it can be taken
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match="out: NaN or infinite values reach it of the images"):
        synthesize(network, *train_digits[:300], seed=0)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_nan_and_too_many_classes_are_refused(train_digits):
    network = mlp([20])
    with torch.no_grad():
        network[1].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"1\.weight: holds NaN"):
        synthesize(network, *train_digits[:300])
    with torch.inference_mode():
        made = synthesize(mlp([20]), *train_digits[:300], seed=0)
    with pytest.raises(ValueError, match=r"1\.weight: was made in inference mode"):
        synthesize(made, *train_digits[:300], seed=0)
    with pytest.raises(ValueError, match="a label is 9, but Sequential has 9 outputs"):
        synthesize(nn.Sequential(nn.Flatten(), nn.Linear(784, 9)), *train_digits[:300], seed=0)


@pytest.mark.parametrize(
    ("name", "least"),
    [("TargetCNN", 89.0), ("MLP 784-256-128-10", 75.0), ("5 convolutions", 90.0), ("BatchNorm, 4 convolutions", 91.0)],
)  # of convolutions that rules alone write: 84 to 86
def test_the_committed_synthesiser_writes_networks_it_never_saw(train_digits, digits, name, least):
    network = synthesize(EVALUATED[name](), *train_digits[:300], seed=1234)
    assert score(network, digits).accuracy_percent > least


@pytest.mark.parametrize("name", ["TargetCNN", "5 convolutions", "MLP 784-256-128-10"])
def test_hidden_neurons_are_on_for_some_images_and_off_for_others(train_digits, digits, name):
    graph, on = ComputationGraph(synthesize(EVALUATED[name](), *train_digits[:300], seed=1)), {}
    weights = graph.weights()

    def respond(layer, inputs):
        outputs = layer.of(weights, inputs)
        on[layer.name] = (outputs > 0).movedim(layer.axis, -1).flatten(0, -2).float().mean(0)  # of each neuron
        return outputs

    with torch.inference_mode():
        graph.write(digits.images[:300], {}, respond)
    del on[graph.last.name]
    first, *others = (shares.mean().item() for shares in on.values())  # of the first one, most places are background
    assert all(0.2 < share < 0.9 for share in others) and 0.1 < first < 0.9
    assert all(shares.min() > 0.05 for shares in on.values())  # no neuron is dead


def test_it_writes_three_channels_and_fewer_classes(train_digits, digits):
    def in_colour(data, count: int):
        few = data[data.labels < 5][:count]
        return few._replace(images=few.images.expand(-1, 3, -1, -1))

    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 13 * 13, 5))
    synthesize(network, *in_colour(train_digits, 300), seed=0)
    assert score(network, in_colour(digits, 1000)).accuracy_percent > 92


# ---- its file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "damaged"),
        (lambda path: torch.save({"conv1.weight": torch.zeros(1)}, path), "not a saved synthesiser"),
        (lambda path: resave(path, version=8), "of version 8, but this code reads version 11"),
        (lambda path: resave(path, settings={"probes": 10}), "a damaged synthesiser"),
        (lambda path: resave(path, state_dict={}), "a damaged synthesiser"),
        (lambda path: path.unlink(), "no such file: run python -m universal.train"),
    ],
    ids=["truncated", "foreign", "version", "settings", "weights", "missing"],
)
def test_a_broken_synthesiser_file_is_refused(tmp_path, spoil, reason):
    path = tmp_path / "synthesizer.pth"
    save_synthesizer(small_synthesizer(0), path)
    load_synthesizer(path)
    spoil(path)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}: .*{reason}"):
        load_synthesizer(path)


def resave(path: Path, **changes) -> None:
    torch.save(torch.load(path, weights_only=True) | changes, path)


def test_nan_in_a_synthesiser_file_is_refused(tmp_path):
    synthesizer = small_synthesizer(0)
    with torch.no_grad():
        synthesizer.image_keys[0] = float("nan")
    save_synthesizer(synthesizer, tmp_path / "nan.pth")
    with pytest.raises(UserError, match=r"nan\.pth: holds NaN"):
        load_synthesizer(tmp_path / "nan.pth")


def test_files_are_in_8_bits_and_small(tmp_path):
    synthesizer = small_synthesizer(0)
    with torch.no_grad():
        synthesizer.writer.kernels.weight[2] *= 1000  # which its neighbours must not suffer from
    save_synthesizer(synthesizer, tmp_path / "saved.pth")
    content = torch.load(tmp_path / "saved.pth", weights_only=True)
    size = sum(tensor.numel() for tensor in synthesizer.state_dict().values())
    assert (tmp_path / "saved.pth").stat().st_size < 1.1 * size + 50_000
    assert all(tensor.dtype in (torch.int8, torch.half) for tensor in content["state_dict"].values())
    for name, tensor in load_synthesizer(tmp_path / "saved.pth").state_dict().items():
        saved = synthesizer.state_dict()[name]
        rows = saved.flatten(1).abs().amax(1) if saved.dim() > 1 else saved.abs().max()
        allowed = 0.0045
        difference = (tensor - saved).abs()
        assert ((difference.flatten(1).amax(1) if saved.dim() > 1 else difference.max()) <= allowed * rows + 1e-6).all()
    assert SYNTHESIZER.stat().st_size < 12e6


def test_networks_run_in_either_layout():
    images = torch.randn(2, 1, 28, 28)
    for name in ("PyTorch example", "PyTorch example, older"):
        torch.manual_seed(0)
        network = EVALUATED[name]().eval()
        expected = network(images)
        torch.testing.assert_close(in_fastest_layout(network, images)(images), expected, rtol=1e-3, atol=1e-4)
