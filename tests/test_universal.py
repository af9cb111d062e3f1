"""The universal synthesiser: equivariance, what it writes, its training, and the commands."""

import json
import math
import random
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, run
from torch import nn

import evaluate_diffusion
from diffusion_model import rollout
from scripting import UserError
from target_cnn import TargetCNN, checkpoint_path, flatten_weights, load_mnist, random_init, score
from universal import GraphWeightSynthesizer, evaluate, load_synthesizer, train
from universal import __main__ as synthesize
from universal.evaluation.networks import EVALUATED, EVALUATED_SHAPES, VisionTransformer, cnn, mlp
from universal.experiment.generators import load_generator
from universal.model import algebra
from universal.model.algebra import InverseSquareRoot, decorrelate
from universal.model.description import cosines_of
from universal.model.expert import NeuronRows, balance
from universal.model.synthesizer import SYNTHESIZER, random_weights, save_synthesizer
from universal.reading.graph import ComputationGraph
from universal.training.architectures import (
    FAMILIES,
    Concatenation,
    Gain,
    Gate,
    ResidualBlock,
    Sum,
    Tokens,
    Transposed,
    draw_architecture,
    parameter_shapes,
)

TRAINING = ["-m", "universal.train", "--probes", "20", "--batch-size", "32", "--validation", "500", "--device", "cpu"]
PROBES = "experts.0.task.probes"
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


STATISTICS = ("running_mean", "running_var")


def layer(name: str, *more: str) -> list[str]:
    return [f"{name}.{parameter}" for parameter in ("weight", "bias", *more)]


# A network, and for each set of hidden neurons: the parameters with a row for each, and those with columns for each.
NETWORKS = {
    "TargetCNN": (
        TargetCNN,
        [(layer("conv1"), ["conv2.weight"]), (layer("conv2"), ["fc1.weight"]), (layer("fc1"), ["fc2.weight"])],
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


@pytest.fixture(scope="module")
def synthesizer() -> GraphWeightSynthesizer:
    return load_synthesizer()


@pytest.fixture(scope="module")
def digits():
    return load_mnist("test", REPOSITORY / "data")[:2000]


# ---- what is drawn --------------------------------------------------------------------------------------------------


def test_drawn_architectures_can_be_read_and_cover_the_kinds():
    draw = random.Random(3)
    seen = set()
    for _ in range(250):
        network = draw_architecture(draw, classes=10, refused=EVALUATED_SHAPES)
        assert parameter_shapes(network) not in EVALUATED_SHAPES
        graph = ComputationGraph(network)
        assert graph.classes == 10
        assert set(graph.left) <= {"first"}  # the class token
        convolutions = sum(layer.is_convolution for layer in graph.layers)
        seen |= {f"{min(convolutions, 10)} convolutions", f"{graph.image_channels} channels"}
        seen |= {type(module).__name__ for module in network.modules()}
        seen |= {f"kernel {layer.shape[-1]}" for layer in graph.layers if layer.is_convolution}
        seen |= {"stride" for layer in graph.layers if layer.options.get("stride") == (2, 2)}
        seen |= {"depthwise" for layer in graph.layers if layer.groups > 1}
        seen |= {"pooled" for layer in graph.layers if layer.last and layer.pooled}
    activations = {
        "ReLU",
        "GELU",
        "SiLU",
        "LeakyReLU",
        "ELU",
        "SELU",
        "Tanh",
        "Sigmoid",
        "Hardswish",
        "ReLU6",
        "Softplus",
    }
    norms = {"BatchNorm2d", "BatchNorm1d", "GroupNorm", "InstanceNorm2d", "LayerNorm"}
    kinds = {
        "Conv1d",
        "Gain",
        "Shuffled",
        "Sum",
        "Concatenation",
        "Gate",
        "Tokens",
        "TransformerEncoderLayer",
        "Transposed",
        "MaxPool2d",
        "AvgPool2d",
    }
    kinds |= {"stride", "depthwise", "pooled", "3 channels", *(f"{n} convolutions" for n in (0, 1, 2, 3, 4, 6, 8, 10))}
    assert activations | norms | kinds | {f"kernel {n}" for n in (1, 3, 5, 7)} <= seen


@pytest.mark.parametrize("kind", FAMILIES)
def test_single_kinds_are_drawn(kind):
    draw = random.Random(0)
    networks = [draw_architecture(draw, classes=10, kinds=[kind]) for _ in range(20)]
    types = [{type(module).__name__ for module in network.modules()} for network in networks]
    graphs = [ComputationGraph(network) for network in networks]
    assert all(("Tokens" in seen) == (kind == "tokens") for seen in types)
    assert all(graph.convolutional == (kind != "mlp") for graph in graphs)
    others = {"AdaptiveAvgPool2d", "GELU", "BatchNorm2d", "Concatenation"} & set().union(*types)
    assert kind != "ordinary" or not others
    assert kind != "convolutions" or len(others) > 2


def test_the_sampler_never_returns_what_is_evaluated(monkeypatch):
    evaluated, allowed = mlp([200, 200]), mlp([21])
    draws = iter([evaluated, evaluated, allowed])
    monkeypatch.setitem(FAMILIES, "mlp", (1, lambda draw, classes: next(draws)))
    assert draw_architecture(random.Random(0), 10, EVALUATED_SHAPES, kinds=["mlp"]) is allowed


# ---- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_permuted_neurons_are_written_permuted(name, step):
    build, groups = NETWORKS[name]
    synthesizer = load_synthesizer().double()
    graph = ComputationGraph(build())
    own = graph.weights()
    weights = {key: value.double() for key, value in (own | random_weights(graph, 0)).items()}
    written = set(graph.written) - set(graph.counters)
    with torch.no_grad():
        straight = synthesizer(graph, weights, step)
        assert set(straight) == written
        straight = permuted(straight, groups, seed=1)
        crossed = synthesizer(graph, permuted(weights, groups, seed=1), step)
        other = synthesizer(graph, {k: v.double() for k, v in (own | random_weights(graph, 1)).items()}, step)
    for key in written:
        torch.testing.assert_close(crossed[key], straight[key], rtol=1e-6, atol=1e-7)
    assert any(not torch.allclose(other[key], straight[key], rtol=1e-2) for key in written)  # it reads the init


def test_a_last_layer_without_a_bias_prefers_no_class(synthesizer, digits):
    network = EVALUATED["TargetCNN"]()
    network.fc2 = nn.Linear(128, 10, bias=False)
    network = synthesizer.synthesize(network, seed=0)
    with torch.no_grad():
        logits = network(digits.images[:1000])
    assert score(network, digits[:1000]).accuracy_percent > 95  # 58 if nothing is done about it
    assert logits.mean(0).std() < 0.3 * logits.std()


def test_what_follows_the_classes_lets_them_pass(synthesizer, digits):
    head = [nn.Conv2d(32, 10, 1), nn.ReLU(), *CLASSES]  # as SqueezeNet ends
    body = [nn.Conv2d(1, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU()]
    network = synthesizer.synthesize(nn.Sequential(*body, *head), seed=0)
    with torch.no_grad():
        assert (nn.Sequential(*network[:5])(digits.images[:100]) > 0).float().mean() > 0.9


def test_what_has_an_upper_end_too_gets_no_such_bias(synthesizer, digits):
    network = synthesizer.synthesize(nn.Sequential(nn.Conv2d(1, 10, 3, 2), nn.Hardtanh(), *CLASSES), seed=0)
    with torch.no_grad():
        assert network[0](digits.images[:100]).mean().abs() < 0.5


def test_gains_bring_their_neurons_to_one_scale(synthesizer):
    gain = Gain(8, 1e-6)
    inner = nn.Sequential(nn.Linear(8, 8), nn.GELU(), gain)
    network = nn.Sequential(nn.Conv2d(1, 8, 4, 4), Sum(Transposed(inner)), *CLASSES, nn.Linear(8, 10))
    graph = ComputationGraph(network)
    accounts = synthesizer.fill(graph, seed=0)
    assert "1.inner.inner.2.gain" in accounts.written and accounts.left == []
    deviations = []
    gain.register_forward_hook(
        lambda _, inputs, output: deviations.extend(t.flatten(0, -2).std(0) for t in (*inputs, output))
    )
    with torch.no_grad():
        network(
            synthesizer.merged(synthesizer.shares(graph))["task.probes"][: synthesizer.settings["convolution_probes"]]
        )
    before, after = deviations
    assert after.max() / after.min() < 1.25 < before.max() / before.min()


def test_gains_of_maps_are_written_along_their_channels(synthesizer):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.full((1, 4, 1, 1), 0.01))

        def forward(self, x):
            return x * self.gain

    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), Scaled(), nn.Flatten(), nn.Linear(4 * 676, 10))
    assert "2.gain" in synthesizer.write(network, seed=0).written
    gains = network[2].gain.flatten()
    assert network[2].gain.shape == (1, 4, 1, 1) and gains.unique().numel() == 4 and (gains > 0.01).all()


def test_pixels_keep_their_scales(synthesizer):
    network = nn.Sequential(nn.Flatten(), Gain(784, 0.7), nn.Linear(784, 10))
    synthesizer.write(network, seed=0)
    assert (network[1].gain == 1).all()


def test_keys_say_what_neurons_answer_to_the_probes():
    expert = load_synthesizer().experts[2]  # for convolutions
    graph = ComputationGraph(cnn([8, 8], 12))
    weights = random_weights(graph, 0)
    with torch.no_grad():
        knowing = expert(graph, weights)
        expert.seen.weight.zero_()
        blind = expert(graph, weights)
    first, second = (graph.layers[index].weight.name for index in (0, 1))
    norms = [knowing[name].norm() for name in (first, second)]
    one, other = (knowing[name] / norm for name, norm in zip((first, second), norms, strict=True))
    torch.testing.assert_close(blind[first] / blind[first].norm(), one, rtol=1e-4, atol=1e-6)
    assert (blind[second] / blind[second].norm() - other).norm() > 0.01


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
    some = layer.patches(inputs, most=3)
    assert 2 ** len(shape[2:]) <= some.shape[2] <= 3 ** len(shape[2:])
    assert all((layer.patches(inputs, 100) == patch[:, :, None]).all(3).any(2).all() for patch in some.unbind(2))


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


def test_experts_with_hardly_any_share_are_left_out_where_nothing_learns(synthesizer):
    shares = torch.tensor([0.0004, 0.3, 0.6996, 0.0])
    with torch.no_grad():
        few = synthesizer.merged(shares)
    name = "key.first.weight"
    one, other = (dict(synthesizer.experts[index].named_parameters())[name] for index in (1, 2))
    torch.testing.assert_close(few[name], (0.3 * one + 0.6996 * other) / 0.9996)
    torch.testing.assert_close(synthesizer.merged(shares)[name], few[name], rtol=0.01, atol=1e-3)


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


def test_what_a_wide_layer_costs_does_not_grow_with_the_cube_of_its_width(monkeypatch):
    """No matrix that is decomposed or solved with is larger than the probes are many."""
    largest = []

    def recording(function):
        def record(matrix, *args, **kwargs):
            largest.append(matrix.shape[-1])
            return function(matrix, *args, **kwargs)

        return record

    for name in ("eigh", "inv", "cholesky", "solve"):
        monkeypatch.setattr(torch.linalg, name, recording(getattr(torch.linalg, name)))
    synthesizer = load_synthesizer()
    synthesizer.synthesize(mlp([2048]), seed=0)
    assert len(largest) > 5 and max(largest) <= synthesizer.settings["probes"]
    largest.clear()
    wide = nn.Sequential(nn.Conv2d(1, 1024, 3, 4), nn.ReLU(), *CLASSES, nn.Linear(1024, 10))
    synthesizer.synthesize(wide, seed=0)
    assert max(largest) <= algebra.MOST_ROWS


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


def test_balanced_weights_compute_the_same():
    graph = ComputationGraph(TargetCNN())
    weights = {name: tensor * 3 if "conv" in name else tensor for name, tensor in random_weights(graph, 0).items()}
    balanced = balance(graph, weights)
    images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(graph.run(images, balanced), graph.run(images, weights), rtol=1e-4, atol=1e-5)
    sizes = torch.stack([balanced[layer.weight.name].norm() / layer.shape[0] ** 0.5 for layer in graph.layers])
    torch.testing.assert_close(sizes, sizes[:1].expand(4))
    gelu = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GELU(), nn.Conv2d(8, 10, 3), *CLASSES)
    for module in (gelu, Residual()):  # a GELU, and an addition of two layers
        graph = ComputationGraph(module)
        weights = random_weights(graph, 0)
        assert balance(graph, weights) is weights


def test_synthesize_fills_the_module_in_place(synthesizer):
    network = TargetCNN()
    keys, parameters = list(network.state_dict()), list(network.parameters())
    assert synthesizer.synthesize(network, seed=3) is network
    assert list(network.state_dict()) == keys
    assert all(one is other for one, other in zip(network.parameters(), parameters, strict=True))
    assert all(parameter.requires_grad and not parameter.is_inference() for parameter in network.parameters())
    same, other = (flatten_weights(synthesizer.synthesize(TargetCNN(), seed=seed)) for seed in (3, 4))
    assert torch.equal(flatten_weights(network), same)
    assert not torch.allclose(same, other)


def test_double_precision_by_default_changes_nothing(synthesizer):
    expected = flatten_weights(synthesizer.synthesize(cnn([4, 8], 12), seed=0))
    torch.set_default_dtype(torch.float64)
    try:
        network = synthesizer.synthesize(cnn([4, 8], 12), seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert network[0].weight.dtype == torch.float64
    torch.testing.assert_close(flatten_weights(network).float(), expected, rtol=0.05, atol=0.01)


def test_without_a_seed_the_module_s_own_weights_are_the_init(synthesizer):
    torch.manual_seed(5)
    network = mlp([20])
    again = mlp([20])
    again.load_state_dict(network.state_dict())
    one, other = synthesizer.synthesize(network), synthesizer.synthesize(again)
    assert torch.equal(flatten_weights(one), flatten_weights(other))


def test_every_parameter_is_written_or_left_and_named(synthesizer):
    torch.manual_seed(0)
    network = Tokens(7, 8, [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)], 10, True, True, norm=False)
    network.dead = nn.BatchNorm1d(3)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    accounts = synthesizer.write(network)
    assert sorted(accounts.written + accounts.left) == sorted(before)
    assert accounts.left == ["first", *(f"dead.{name}" for name in network.dead.state_dict())]
    after = network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in accounts.left)
    assert not any(torch.equal(after[name], before[name]) for name in accounts.written)


def test_norms_give_in_evaluation_what_they_give_in_training(synthesizer, digits):
    build = EVALUATED["BatchNorm, 4 convolutions"]
    network = synthesizer.synthesize(build(), seed=0)
    fresh = build()
    fresh.load_state_dict(network.state_dict())
    few = digits[:500]
    at_once, one_by_one = (score(fresh, few, batch_size=size) for size in (500, 1))
    assert torch.equal(at_once.wrong, one_by_one.wrong)
    assert at_once.accuracy_percent > 97.5
    with torch.inference_mode():
        trained = [network.train()(images).argmax(1) for images in few.images.split(250)]  # by the images' statistics
    assert (torch.cat(trained) == few.labels).float().mean() > 0.975


def test_a_layer_that_is_used_again_is_written_once(synthesizer, digits):
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.out = nn.Linear(784, 8), nn.Linear(8, 8), nn.Linear(8, 10)

        def forward(self, x):
            return self.out(self.again(self.again(self.first(x.flatten(1))).relu()).relu())

    torch.manual_seed(0)
    network = Again()
    graph, seen = ComputationGraph(network), []
    probes = synthesizer.task.probes[:50]
    with torch.no_grad():
        graph.write(
            probes, graph.weights(), lambda call, inputs: (seen.append(call.name), call.of(graph.weights(), inputs))[1]
        )
    assert seen == ["first", "again", "out"]
    synthesizer.synthesize(network, seed=0)
    assert score(network, digits[:1000]).accuracy_percent > 60


@pytest.mark.parametrize("way", ["folded", "places first", "windows"])
def test_probes_may_lie_on_any_axis_or_be_folded_with_places(synthesizer, digits, way):
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
        network = synthesizer.synthesize(Rows(way), seed=0)
        assert score(network, digits[:1000]).accuracy_percent > 25
        return
    plain, other = (synthesizer.synthesize(Rows(name), seed=0) for name in ("plain", way))
    for one, same in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, same, rtol=0.02, atol=2e-3)


def test_a_last_convolution_that_covers_the_maps_is_a_linear_layer(synthesizer, digits):
    network = nn.Sequential(nn.Conv2d(1, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 10, 12), nn.Flatten())
    synthesizer.synthesize(network, seed=0)
    assert score(network, digits[:1000]).accuracy_percent > 80


def test_infinite_masks_are_left_alone_and_nan_is_never_written(synthesizer):
    class Masked(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.register_buffer("mask", torch.full((28, 28), -math.inf).triu(1))
            self.hidden, self.norm, self.out = nn.Linear(28, 8), nn.BatchNorm1d(224), nn.Linear(224, 10)
            self.function = function

        def forward(self, x):
            x = self.function(x[:, 0])
            return self.out(self.norm(((x @ x.mT + self.mask).softmax(-1) @ self.hidden(x)).flatten(1)))

    network = synthesizer.synthesize(Masked(lambda x: x), seed=0)
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    network = Masked(lambda x: (x + 0.5).sqrt())  # of real pixels it can be taken
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match="cannot be written: the network makes NaN or infinite values of the synth"):
        synthesizer.synthesize(network, seed=0)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_nan_and_too_many_classes_are_refused(synthesizer):
    network = mlp([20])
    with torch.no_grad():
        network[1].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"1\.weight: holds NaN"):
        synthesizer.synthesize(network)
    with torch.inference_mode():
        made = synthesizer.synthesize(mlp([20]), seed=0)
    with pytest.raises(ValueError, match=r"1\.weight: was made in inference mode"):
        synthesizer.synthesize(made, seed=0)
    with pytest.raises(ValueError, match="has 11 classes, but the synthesiser knows 10"):
        synthesizer.synthesize(nn.Sequential(nn.Flatten(), nn.Linear(784, 11)), seed=0)


@pytest.mark.parametrize(
    ("name", "least"),
    [("TargetCNN", 98.0), ("MLP 784-256-128-10", 97.0), ("5 convolutions", 97.0), ("BatchNorm, 4 convolutions", 98.0)],
)
def test_the_committed_synthesiser_writes_networks_it_never_saw(synthesizer, digits, name, least):
    network = synthesizer.synthesize(EVALUATED[name](), seed=1234)
    assert score(network, digits).accuracy_percent > least


@pytest.mark.parametrize("name", ["TargetCNN", "5 convolutions", "MLP 784-256-128-10"])
def test_hidden_neurons_are_on_for_some_images_and_off_for_others(synthesizer, digits, name):
    graph = ComputationGraph(EVALUATED[name]())
    on = {}

    def respond(layer, inputs):
        outputs = layer.of(weights, inputs)
        on[layer.name] = (outputs > 0).float().mean().item()
        return outputs

    with torch.inference_mode():
        weights = synthesizer(graph, random_weights(graph, seed=1))
        graph.write(digits.images, {}, respond)
    del on[graph.last.name]
    assert all(0.2 < share < 0.9 for share in on.values()), on


def test_it_writes_three_channels_and_fewer_classes(synthesizer, digits):
    few = digits[digits.labels < 5]
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 13 * 13, 5))
    synthesizer.synthesize(network, seed=0)
    assert score(network, few._replace(images=few.images.expand(-1, 3, -1, -1))).accuracy_percent > 95


def test_it_takes_the_diffusion_model_s_place(synthesizer):
    generator = load_generator(SYNTHESIZER, 421_642, torch.device("cpu"))
    inits = torch.stack([random_init(seed) for seed in (1, 2)])
    states = rollout(generator, inits, 2)
    assert states.shape == (3, 2, 421_642)
    torch.manual_seed(2)
    torch.testing.assert_close(states[1, 1], flatten_weights(synthesizer.synthesize(TargetCNN())))


# ---- its file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "damaged"),
        (lambda path: torch.save({"conv1.weight": torch.zeros(1)}, path), "not a saved synthesiser"),
        (lambda path: resave(path, version=99), "of version 99"),
        (lambda path: resave(path, settings={"probes": 10}), "a damaged synthesiser"),
        (lambda path: resave(path, state_dict={}), "a damaged synthesiser"),
        (lambda path: path.unlink(), "no such file: run python -m universal.train"),
    ],
    ids=["truncated", "foreign", "version", "settings", "weights", "missing"],
)
def test_a_broken_synthesiser_file_is_refused(tmp_path, spoil, reason):
    path = tmp_path / "synthesizer.pth"
    save_synthesizer(GraphWeightSynthesizer(probes=20), path)
    load_synthesizer(path)
    spoil(path)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}: .*{reason}"):
        load_synthesizer(path)


def resave(path: Path, **changes) -> None:
    torch.save(torch.load(path, weights_only=True) | changes, path)


def test_nan_in_a_synthesiser_file_is_refused(tmp_path):
    synthesizer = GraphWeightSynthesizer(probes=20)
    with torch.no_grad():
        synthesizer.task.probes[0] = float("nan")
    save_synthesizer(synthesizer, tmp_path / "nan.pth")
    with pytest.raises(UserError, match=r"nan\.pth: holds NaN"):
        load_synthesizer(tmp_path / "nan.pth")


# ---- training -------------------------------------------------------------------------------------------------------


def command(*arguments, launcher: tuple = (), **settings) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True, timeout=170,
        **settings,
    )  # fmt: skip


def files(directory: Path, name: str) -> list:
    return ["--out", directory / f"{name}.pth", "--checkpoint", directory / f"{name}_training.pth"]


def state(directory: Path, name: str) -> dict:
    return load_synthesizer(directory / f"{name}.pth").state_dict()


def test_training_improves(tmp_path, monkeypatch, capsys):
    options = [*TRAINING[2:], "--kinds", "mlp", "--probes", 60, "--steps", 60, "--report-every", 20, "--lr", 2e-3]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*options, *files(tmp_path, "run")])])
    train.main()
    printed = capsys.readouterr().out
    accuracies = [float(accuracy) for accuracy in re.findall(r"(\d+\.\d+)% \(MLP\)", printed)]
    losses = [float(loss) for loss in re.findall(r"Loss = (\d+\.\d+)", printed)]
    assert len(accuracies) == len(losses) == 3
    assert accuracies[-1] > accuracies[0] + 10
    assert losses[-1] < 0.85 * losses[0]
    assert len(re.findall(r"Validation Accuracy = +\d+\.\d+% \(TargetCNN\).*Time Left = \d", printed)) == 3


@pytest.mark.parametrize("share, written", [(0, {2}), (0.5, {1, 2}), (1, {1})])
def test_networks_are_written_in_pairs_from_a_share_of_the_steps_on(tmp_path, monkeypatch, share, written):
    options = [*TRAINING[2:], "--steps", 4, "--kinds", "ordinary", "--pairs-from", share, *files(tmp_path, "run")]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    monkeypatch.setattr(train, "EARLIER_STEPS", {0: 1})
    training, counts = train.Training(train.parse_options(), 0, 1), []
    reward = training.parallel
    training.parallel = lambda graph, inits, *others: counts.append(len(inits)) or reward(graph, inits, *others)
    training.run(4)
    assert set(counts) == written and counts == sorted(counts)


def test_a_killed_training_goes_on_bit_for_bit(tmp_path, refusal):
    options = [*TRAINING, "--steps", 6, "--report-every", 2]
    whole = command(*options, *files(tmp_path, "whole"))
    assert whole.returncode == 0, whole.stderr

    killed = [sys.executable, *map(str, [*options, *files(tmp_path, "killed")])]
    with subprocess.Popen(killed, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("Step 4/6"):  # the state of step 2 is saved, that of step 4 may be
                process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed.pth").exists()
    other = refusal(train.main, *options[2:-6], *options[-4:], *files(tmp_path, "killed"), "--batch-size", 16)
    assert "other options" in other
    resumed = command(*options, *files(tmp_path, "killed"))
    assert re.search(r"Going on from step (2|4)", resumed.stdout)
    expected, found = state(tmp_path, "whole"), state(tmp_path, "killed")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    assert not (tmp_path / "killed_training.pth").exists()


def test_a_pair_is_rewarded_for_its_mean_probabilities(synthesizer, digits):
    graph = ComputationGraph(mlp([20]))
    inits = [random_weights(graph, seed) for seed in (0, 1)]
    images, labels = digits[:200]
    with torch.inference_mode():
        reward = train.Reward(synthesizer)(graph, inits, 0, images, labels)
        mean = sum(graph.run(images, synthesizer(graph, init)).softmax(1) for init in inits) / 2
        alone = [train.Reward(synthesizer)(graph, [init], 0, images, labels) for init in inits]
    torch.testing.assert_close(reward, F.nll_loss(mean.log(), labels))
    assert reward < sum(alone) / 2


def test_three_quarters_of_the_images_are_distorted_and_stay_readable(synthesizer, digits):
    torch.manual_seed(0)
    moved = train.distorted(digits.images, 1.5)
    changed = (moved != digits.images).flatten(1).any(1)
    assert changed[:1500].all()
    assert not changed[1500:].any()
    corners = moved[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]  # background, also where they come from outside the image
    assert ((corners - digits.images.min()).abs() < 1e-4).float().mean() > 0.99
    assert (moved >= digits.images.min() - 1e-5).all()
    assert (moved <= digits.images.max() + 1e-5).all()
    network = synthesizer.synthesize(TargetCNN(), seed=0)
    assert score(network, digits._replace(images=moved)).accuracy_percent > 95


def test_a_training_that_diverges_gets_one_line(tmp_path, refusal):
    options = [*TRAINING[2:-2], "--steps", 10, "--lr", 1000, *files(tmp_path, "diverged")]
    assert "lower --lr" in refusal(train.main, *options)
    assert not (tmp_path / "diverged.pth").exists()


def test_a_broken_training_state_is_refused_and_kept(tmp_path, refusal):
    path = tmp_path / "run_training.pth"
    torch.save({"settings": 1}, path)
    line = refusal(train.main, *TRAINING[2:-2], "--steps", 2, *files(tmp_path, "run"))
    assert f"{path}: " in line
    assert path.exists()


def test_training_goes_on_from_an_earlier_synthesiser(tmp_path, monkeypatch, refusal):
    path = tmp_path / "earlier.pth"
    save_synthesizer(GraphWeightSynthesizer(probes=20), path)
    options = [*TRAINING[2:], "--steps", 1, "--start-from", path, "--lr", 1e-9, *files(tmp_path, "later")]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    train.main()
    earlier, later = state(tmp_path, "earlier"), state(tmp_path, "later")
    assert all(torch.allclose(tensor, later[name], atol=1e-6) for name, tensor in earlier.items())
    missing = ("--start-from", tmp_path / "none.pth", *files(tmp_path, "other"))
    assert "none.pth: no such file" in refusal(train.main, *TRAINING[2:-2], *missing)


def small_synthesizer(seed: int, **settings) -> GraphWeightSynthesizer:
    torch.manual_seed(seed)
    return GraphWeightSynthesizer(**{"probes": 20, "convolution_probes": 20, "hidden": 64} | settings).eval()


def test_experts_are_merged_as_the_router_says():
    mixed = train.mixture([small_synthesizer(seed) for seed in (0, 1, 2)])
    graph = ComputationGraph(cnn([4, 6], 8))
    torch.testing.assert_close(mixed.shares(graph), torch.full((3,), 1 / 3))
    with torch.no_grad():
        mixed.router.bias.copy_(torch.tensor([0.5, 0.3, 0.2]).log())
        merged = mixed.merged(mixed.shares(graph))
    for name, parameter in merged.items():
        parts = [expert.get_parameter(name) for expert in mixed.experts]
        torch.testing.assert_close(parameter, 0.5 * parts[0] + 0.3 * parts[1] + 0.2 * parts[2])
    # What the router learns from is what the merged expert is worth, and networks of different kinds can be told apart.
    weights = mixed(graph, random_weights(graph, 0))
    sum(weight.square().sum() for weight in weights.values()).backward()
    assert mixed.router.weight.grad.abs().max() > 0 and mixed.experts[2].task.probes.grad.abs().max() > 0
    with torch.no_grad():
        mixed.router.weight.normal_()
    assert not torch.allclose(mixed.shares(graph), mixed.shares(ComputationGraph(mlp([20]))), atol=1e-3)


def test_a_router_that_is_sure_takes_that_expert_alone():
    one, other = small_synthesizer(0), small_synthesizer(1)
    mixed = train.mixture([one, one, other])
    with torch.no_grad():
        mixed.router.bias.copy_(torch.tensor([-200.0, -200.0, 0.0]))
        graph = ComputationGraph(cnn([4, 6], 8))
        expected, found = (synthesizer(graph, random_weights(graph, 0)) for synthesizer in (other, mixed))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_training_starts_from_the_experts_of_several_files(tmp_path, monkeypatch, refusal):
    for seed, name in enumerate(("a.pth", "b.pth")):
        synthesizer = small_synthesizer(seed, hidden=512)
        synthesizer.seconds = {"recording": 0.0, "training": 1000.0}
        save_synthesizer(synthesizer, tmp_path / name)
    save_synthesizer(small_synthesizer(0, hidden=512, dimension=32), tmp_path / "smaller.pth")
    options = [*TRAINING[2:], "--steps", 1, "--lr", 1e-9, *files(tmp_path, "both"), "--start-from"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*options, tmp_path / "a.pth", tmp_path / "b.pth"])])
    monkeypatch.setattr(train, "start_router", partial(train.start_router, networks=3, images=20))
    train.main()
    both = load_synthesizer(tmp_path / "both.pth")
    assert 2000 < both.seconds["training"] < 2100  # what its experts took is not forgotten
    for expert, name in zip(both.experts, ("a.pth", "b.pth"), strict=True):
        (earlier,) = load_synthesizer(tmp_path / name).experts
        torch.testing.assert_close(expert.state_dict(), earlier.state_dict(), rtol=0, atol=1e-6)
    different = ("--start-from", tmp_path / "a.pth", tmp_path / "smaller.pth", *files(tmp_path, "other"))
    assert "experts of different sizes" in refusal(train.main, *TRAINING[2:-2], *different)


def test_the_router_starts_with_what_each_expert_is_worth(synthesizer, digits):
    torch.manual_seed(0)
    mixed = train.mixture([GraphWeightSynthesizer(**synthesizer.settings | {"experts": 1}), synthesizer]).eval()
    train.start_router(mixed, digits, seed=0, networks=8, images=50)
    for network in (TargetCNN(), mlp([20])):
        assert mixed.shares(ComputationGraph(network))[0] < 0.1  # the expert that knows nothing yet


def test_the_router_is_as_sharp_as_is_best(digits, monkeypatch):
    def fitted(sharpest: int) -> GraphWeightSynthesizer:
        def tried(writers, synthesizer, data, seed, purpose, networks, images):
            draws = torch.Generator().manual_seed(0)
            losses = torch.rand(networks, len(writers), generator=draws)
            if purpose == "sharpness":
                losses[:, train.SHARPNESSES.index(sharpest)] = -1.0
            return torch.randn(networks, synthesizer.router.in_features, generator=draws), losses

        monkeypatch.setattr(train, "tried", tried)
        mixed = small_synthesizer(0, experts=3)
        train.start_router(mixed, digits, seed=0, networks=200)
        return mixed.router

    plain, sharp = fitted(1), fitted(4)
    assert plain.weight.abs().max() > 0
    torch.testing.assert_close(sharp.weight, 4 * plain.weight)
    torch.testing.assert_close(sharp.bias, 4 * plain.bias)


def test_the_state_of_a_training_keeps_its_experts(tmp_path, monkeypatch):
    save_synthesizer(small_synthesizer(0, experts=2, hidden=512), tmp_path / "two.pth")
    options = [*TRAINING[2:], "--start-from", tmp_path / "two.pth", *files(tmp_path, "run")]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    training = train.Training(train.parse_options(), 0, 1)
    assert any(parameter is training.synthesizer.router.weight for parameter in training.groups[1])  # the faster group
    training.seconds = 1000.0
    training.save()
    earlier = train.earlier_synthesizer(tmp_path / "run_training.pth")
    assert earlier.seconds["training"] == 1000
    expected = load_synthesizer(tmp_path / "two.pth").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in earlier.state_dict().items())


def test_the_router_of_a_training_that_goes_on_is_not_fitted_again(tmp_path, monkeypatch):
    save_synthesizer(small_synthesizer(0, hidden=512), tmp_path / "a.pth")
    options = [*TRAINING[2:], *files(tmp_path, "run"), "--start-from", tmp_path / "a.pth", tmp_path / "a.pth"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    fitted = []
    monkeypatch.setattr(train, "start_router", lambda *_: fitted.append(True))
    for resumed in (False, True):
        training = train.Training(train.parse_options(), 0, 1)
        training.resume()
        assert training.step == resumed and fitted == [True]
        training.step = 1
        training.save()


def test_files_are_in_8_bits_and_small(tmp_path):
    synthesizer = small_synthesizer(0, tunable=True)
    with torch.no_grad():
        synthesizer.tuning.offsets.uniform_(-3, 3)
        synthesizer.experts[0].reader.kernels.weight[2] *= 1000  # which its neighbours must not suffer from
    save_synthesizer(synthesizer, tmp_path / "saved.pth")
    content = torch.load(tmp_path / "saved.pth", weights_only=True)
    size = sum(tensor.numel() for tensor in synthesizer.state_dict().values())
    assert (tmp_path / "saved.pth").stat().st_size < 1.1 * size + 50_000
    assert all(tensor.dtype in (torch.int8, torch.half) for tensor in content["state_dict"].values())
    for name, tensor in load_synthesizer(tmp_path / "saved.pth").state_dict().items():
        saved = synthesizer.state_dict()[name]
        rows = saved.flatten(1).abs().amax(1) if saved.dim() > 1 else saved.abs().max()
        allowed = 0.001 if name == "tuning.offsets" else 0.0045
        difference = (tensor - saved).abs()
        assert ((difference.flatten(1).amax(1) if saved.dim() > 1 else difference.max()) <= allowed * rows + 1e-6).all()
    for path in (SYNTHESIZER, SYNTHESIZER.with_name("ternary.pth")):
        assert path.stat().st_size < 12e6
        assert len(load_synthesizer(path).experts) > 1


def test_what_files_of_version_7_lack_changes_nothing(synthesizer, tmp_path):
    path, content = tmp_path / "7.pth", torch.load(SYNTHESIZER, weights_only=True)
    for part in ("state_dict", "scales"):
        added = ("seen", "patch_share", "patch_ridge", "gain_scale")
        content[part] = {name: v for name, v in content[part].items() if not any(new in name for new in added)}
    torch.save(content | {"version": 7}, path)
    earlier = load_synthesizer(path)
    for expert in earlier.experts:
        assert not any(tensor.any() for tensor in (expert.seen.weight, expert.writer.patch_share.weight))
    assert torch.equal(earlier.experts[0].key.first.weight, synthesizer.experts[0].key.first.weight)
    network = earlier.synthesize(TargetCNN(), seed=0)
    assert score(network, load_mnist("test", REPOSITORY / "data")[:1000]).accuracy_percent > 97
    del content["state_dict"]["experts.0.key.first.weight"], content["scales"]["experts.0.key.first.weight"]
    torch.save(content | {"version": 7}, path)
    with pytest.raises(UserError, match="damaged"):
        load_synthesizer(path)


def test_a_file_in_half_precision_of_version_6_is_read(tmp_path):
    synthesizer, path = small_synthesizer(0, experts=2), tmp_path / "6.pth"
    save_synthesizer(synthesizer, path)
    content = torch.load(path, weights_only=True)
    del content["scales"]
    state = {name: tensor.half() for name, tensor in synthesizer.state_dict().items()}
    torch.save(content | {"version": 6, "state_dict": state}, path)
    loaded = load_synthesizer(path).state_dict()
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in loaded.items())


def test_a_file_of_a_single_expert_of_version_5_is_read(tmp_path):
    synthesizer, path = small_synthesizer(0), tmp_path / "5.pth"
    save_synthesizer(synthesizer, path)
    content = torch.load(path, weights_only=True)
    del content["settings"]["experts"]
    state = {name.removeprefix("experts.0."): tensor for name, tensor in synthesizer.state_dict().items()}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("router.")}
    torch.save(content | {"version": 5, "state_dict": state}, path)
    loaded = load_synthesizer(path)
    assert all(torch.equal(tensor, synthesizer.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_two_processes_train_together(tmp_path):
    options = [*TRAINING, "--steps", 4, "--report-every", 4]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    both = command(*options, *files(tmp_path, "both"), launcher=launcher)
    assert both.returncode == 0, both.stderr
    assert "processes: 2" in both.stdout
    assert both.stdout.count("Step 4/4") == 1  # one process reports
    alone = command(*options, *files(tmp_path, "alone"))
    assert alone.returncode == 0, alone.stderr
    found, expected = state(tmp_path, "both"), state(tmp_path, "alone")
    assert not torch.equal(found[PROBES], expected[PROBES])  # the other process's gradients are in it
    assert (found[PROBES] - expected[PROBES]).abs().max() < 1  # from the same start


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


def test_synthesize_writes_weights_that_load(own_file):
    directory = own_file.parent
    result = command(
        "-m", "universal", "--model", f"{own_file}:Net", "--out", directory / "w.pth", "--count", 2,
        "--evaluate", "--validation", 1000, "--seed", 7, "--device", "cpu",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    accuracies = [float(value) for value in re.findall(r"Accuracy = (\d+\.\d+)%", result.stdout)]
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


def test_evaluate_prints_its_tables_and_saves_everything(tmp_path):
    result = command(
        "-m", "universal.evaluate", "--inits", 2, "--steps", 2, "--epochs", 0, "--validation", 200,
        "--plot", tmp_path / "u.png", "--results", tmp_path / "u.json", "--device", "cpu",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for name in [*EVALUATED, "step 2", "ensemble of 2"]:
        assert name in result.stdout
    assert (tmp_path / "u.png").stat().st_size > 10_000
    assert (tmp_path / "u.json").exists()


def test_a_broken_record_of_adam_gets_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "RECORDED", tmp_path / "results.json")
    for content in ("{", "{}", json.dumps({"networks": [{"name": "TargetCNN", "adam": None}]})):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(UserError, match=r"results\.json: is missing or damaged"):
            evaluate.recorded_adam()


def test_a_widened_synthesiser_writes_the_same():
    torch.manual_seed(0)
    narrow = GraphWeightSynthesizer(probes=20, convolution_probes=20, hidden=64).eval()
    wide = train.widened(narrow)
    assert wide.settings["hidden"] == GraphWeightSynthesizer(probes=20).settings["hidden"] > 64
    assert train.widened(wide) is wide
    graph = ComputationGraph(cnn([4, 6], 8))
    with torch.no_grad():
        expected, found = (one(graph, random_weights(graph, 0)) for one in (narrow, wide))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


def test_what_adam_reaches_is_recorded_for_every_network():
    recorded = evaluate.recorded_adam()
    assert recorded.keys() == EVALUATED.keys()
    assert all(adam["epoch_percent"] > adam["random_first_steps_percent"] > 10 for adam in recorded.values())


def test_networks_run_in_either_layout():
    images = torch.randn(2, 1, 28, 28)
    for name in ("PyTorch example", "PyTorch example, older"):
        torch.manual_seed(0)
        network = EVALUATED[name]().eval()
        expected = network(images)
        torch.testing.assert_close(evaluate.in_fastest_layout(network, images)(images), expected, rtol=1e-3, atol=1e-4)


def test_evaluate_holds_networks_against_adam(tmp_path, monkeypatch, capsys, digits):
    names = ["TargetCNN", "PyTorch example, older"]
    monkeypatch.setattr(evaluate, "EVALUATED", {name: EVALUATED[name] for name in names})
    monkeypatch.setattr(evaluate, "FIRST_STEPS", 3)
    monkeypatch.setattr(evaluate, "scoring_data", lambda *_: digits[:500])
    monkeypatch.setattr(evaluate, "training_data", lambda *_: digits[500:])
    outputs = ["--plot", tmp_path / "u.png", "--results", tmp_path / "u.json"]
    options = ["--inits", 2, "--steps", 1, "--epochs", 1, "--device", "cpu", *outputs]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, options)])
    evaluate.main()
    record = json.loads((tmp_path / "u.json").read_text())
    for name, network in zip(names, record["networks"], strict=True):
        adam = network["adam"]
        assert network["name"] == name
        assert adam["generated_first_steps_percent"] > 94 > adam["random_first_steps_percent"]
        assert adam["epoch_percent"] > adam["random_first_steps_percent"]
    assert record["first_steps"]["generated"] > record["first_steps"]["random"]
    assert re.search(r"Mean after 3 steps of Adam: [\d.]+% from generated weights", capsys.readouterr().out)


def test_evaluate_generalization_finds_new_networks(experiment, tmp_path):
    result = run(
        "evaluate_generalization.py", "--model", SYNTHESIZER, "--checkpoints", experiment / "checkpoints_weights_cnn",
        "--inits", 2, "--steps", 1, "--reference-epochs", 0, "--validation", 4000, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "Verdict: generates new networks" in result.stdout


def test_a_wide_and_a_deep_network_are_built_as_named():
    assert len(ComputationGraph(cnn([16, 32, 32, 32, 32], 64)).layers) == 7
    residual = ComputationGraph(EVALUATED["residual network of 6 convolutions"]())
    assert sum(layer.is_convolution for layer in residual.layers) == 6


def test_evaluate_diffusion_takes_the_synthesiser(tmp_path, monkeypatch, capsys, digits):
    for epoch in (0, 1):
        torch.save(TargetCNN().state_dict(), checkpoint_path(tmp_path, epoch))
    options = ["--model", SYNTHESIZER, "--checkpoints", tmp_path, "--plot", tmp_path / "plot.png"]
    options += ["--steps", 1, "--device", "cpu"]
    monkeypatch.setattr(evaluate_diffusion, "scoring_data", lambda *_: digits[:500])
    monkeypatch.setattr(sys, "argv", ["evaluate_diffusion.py", *map(str, options)])
    evaluate_diffusion.main()
    assert float(re.search(r"\| 1 +\| ([\d.]+)% +\| [\d.]+% +\|", capsys.readouterr().out)[1]) > 97
    assert (tmp_path / "plot.png").exists()


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
