"""Reading networks: whatever their forward pass is, what cannot be read, and that the module stays as it is."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import Chain
from torch import nn

from target_cnn import TargetCNN
from universal.evaluation.networks import EVALUATED, Example, ResidualBlock, VisionTransformer, mlp
from universal.model.description import description_of
from universal.reading import calls
from universal.reading.graph import ComputationGraph
from universal.reading.reading import logits_of
from universal.training.blocks import Gain, Gate, Sum, Transposed

CLASSES = (nn.AdaptiveAvgPool2d(1), nn.Flatten())  # what makes logits of a convolution's outputs


def flat(*layers: nn.Module, features: int, classes: int = 10) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, classes))


class OrdinaryPython(nn.Module):
    """What tracing refuses: conditions, assertions, len, loops, printing, and layers made in the forward pass."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3)
        self.more = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
        self.out = nn.Linear(6 * 13 * 13, 10)

    def forward(self, x):
        if x.ndim == 4:
            x = self.first(x)
        assert x.size(1) == 6
        for layer in self.more:
            x = nn.ReLU()(layer(x)) if x.abs().sum() > 0 else x
        print("batch of", len(x))
        return self.out(F.max_pool2d(x, 2).view(len(x), -1))


class FunctionalForm(nn.Module):
    """Parameters that belong to no layer module, in-place functions, an addition."""

    def __init__(self):
        super().__init__()
        self.kernel, self.offset = nn.Parameter(torch.randn(6, 1, 5, 5)), nn.Parameter(torch.randn(6))
        self.conv = nn.Conv2d(6, 6, 3, padding="same", dilation=2)
        self.matrix = nn.Parameter(0.1 * torch.randn(6 * 7 * 7, 20))
        self.out = nn.Parameter(torch.randn(10, 20))

    def forward(self, images):
        x = F.relu(F.conv2d(images, self.kernel, self.offset, stride=2, padding=2), inplace=True)
        y = F.gelu(self.conv(x))
        y += x
        x = F.dropout(F.max_pool2d(y, 2), training=self.training)
        return torch.tanh(x.view(x.size(0), -1) @ self.matrix) @ self.out.t()


class AttentionByHand(nn.Module):
    """Patches by unfolding, a class token, attention from one layer for queries, keys and values."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.qkv = nn.Linear(49, 16), nn.LayerNorm(16), nn.Linear(16, 48)
        self.back, self.out = nn.Linear(16, 16), nn.Linear(16, 10)
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(0.02 * torch.randn(1, 17, 16))

    def forward(self, x):
        count = x.shape[0]
        x = self.embed(x.unfold(2, 7, 7).unfold(3, 7, 7).reshape(count, 16, 49))
        x = torch.cat([self.token.expand(count, -1, -1), x], 1) + self.places
        q, k, v = self.qkv(self.norm(x)).reshape(count, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
        shares = (q @ k.transpose(-2, -1) / math.sqrt(8)).softmax(-1)
        x = x + self.back((shares @ v).transpose(1, 2).reshape(count, 17, 16))
        return self.out(x[:, 0])


class Attention(nn.Module):
    """`nn.MultiheadAttention` of one query, and `scaled_dot_product_attention`."""

    def __init__(self):
        super().__init__()
        self.rows, self.query, self.out = nn.Linear(28, 8), nn.Linear(8, 8), nn.Linear(8, 10)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.rows(x.squeeze(1))
        x = x + F.scaled_dot_product_attention(self.query(x), x, x)
        mixed, shares = self.attention(x.mean(1, keepdim=True), x, x)
        assert shares.shape == (len(x), 1, 28)
        return self.out(mixed[:, 0])


class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again, self.out = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 10)

    def forward(self, x):
        return self.out(self.again(self.again(self.first(x)).relu()).relu().mean((2, 3)))


class Rows(nn.Module):
    """A 1-dimensional convolution over the columns of [N, 28, 28]: its channels are the rows."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv1d(28, 8, 3, padding=1, groups=2), nn.Linear(8 * 28, 10)

    def forward(self, x):
        return self.out(self.conv(x).relu().flatten(1)).log_softmax(1)


class ByHand(nn.Module):
    """A recurrent network written by hand: its layers are used 28 times."""

    def __init__(self):
        super().__init__()
        self.read, self.keep, self.out = nn.Linear(28, 12), nn.Linear(12, 12), nn.Linear(12, 10)

    def forward(self, x):
        state = x.new_zeros(len(x), 12)
        for row in x.squeeze(1).unbind(1):
            state = torch.tanh(self.read(row) + self.keep(state))
        return self.out(state)


class Fork(nn.Module):
    """Two branches, a gate, and a dictionary of results."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 8, 3), Gate(8, 2)
        self.pooled, self.direct, self.out = nn.Linear(8, 8), nn.Linear(3 * 784, 8), nn.Linear(16, 10)

    def forward(self, x):
        pooled = F.relu(self.pooled(self.gate(self.conv(x)).amax((2, 3))))
        return {"logits": self.out(torch.cat([pooled, torch.sigmoid(self.direct(x.flatten(1)))], 1))}


class Spatial(nn.Module):
    """A network that says where it looks (Jaderberg et al. 2015): that is no activation to be written."""

    def __init__(self):
        super().__init__()
        self.where = nn.Sequential(nn.Conv2d(1, 4, 7, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 6))
        nn.init.zeros_(self.where[3].weight)
        self.where[3].bias.data = torch.tensor([1.0, 0, 0, 0, 1, 0])
        self.conv, self.out = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)

    def forward(self, x):
        grid = F.affine_grid(self.where(x).view(-1, 2, 3), x.size(), align_corners=False)
        return self.out(self.conv(F.grid_sample(x, grid, align_corners=False)).relu().mean((2, 3)))


# Networks, the number of layers and norms that they have, and what is left at its init.
READ = {
    "ordinary Python": (OrdinaryPython, 4, 0, []),
    "functional": (FunctionalForm, 4, 0, []),
    "attention by hand": (AttentionByHand, 4, 1, ["token"]),
    "attention": (Attention, 7, 0, []),
    "used twice": (UsedTwice, 3, 0, []),
    "rows": (Rows, 2, 0, []),
    "recurrent by hand": (ByHand, 3, 0, []),
    "fork": (Fork, 6, 0, []),
    "vision transformer": (VisionTransformer, 10, 4, []),
    "flat images": (lambda: nn.Sequential(nn.Linear(784, 10)), 1, 0, []),
    "groups": (
        lambda: flat(
            nn.Conv2d(1, 8, 3, 2), nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 12, 3, groups=12), features=972
        ),
        4, 0, [],
    ),
    "circular padding": (lambda: flat(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), features=1568), 2, 0, []),
    "norms": (
        lambda: flat(
            nn.BatchNorm2d(1), nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),
            nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8), nn.LayerNorm([8, 9, 9]),
            nn.BatchNorm2d(8, affine=False), nn.InstanceNorm2d(8, affine=True, track_running_stats=True), features=648,
        ),
        4, 7, [],
    ),
    "activation with parameters": (lambda: flat(nn.Conv2d(1, 4, 3), nn.PReLU(4), features=4 * 676), 2, 0, ["1.weight"]),
    "gain": (lambda: flat(nn.Conv2d(1, 4, 3), Transposed(Gain(4, 0.5)), features=4 * 676), 2, 0, []),
    "dead layer": (lambda: dead(), 2, 0, ["dead.weight", "dead.bias"]),
    "spatial transformer": (
        Spatial, 2, 0, ["where.0.weight", "where.0.bias", "where.3.weight", "where.3.bias"]
    ),
    "classes from a convolution": (lambda: nn.Sequential(nn.Conv2d(1, 10, 3), *CLASSES), 1, 0, []),
}  # fmt: skip


def dead() -> nn.Module:
    network = mlp([12])
    network.dead = nn.Linear(3, 4)
    network.forward = lambda x: network[3](network[2](network[1](network[0](x))))
    return network


@pytest.mark.parametrize("name", READ)
def test_a_graph_computes_what_its_module_computes(name):
    build, layers, norms, left = READ[name]
    torch.manual_seed(0)
    network = build().eval()
    graph = ComputationGraph(network)
    assert (len(graph.layers), len(graph.norms), graph.left, graph.classes) == (layers, norms, left, 10)
    assert {*graph.written, *graph.left} == set(network.state_dict())
    images = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        expected = logits_of(network(graph.format(images)))
        torch.testing.assert_close(graph.run(images, {}), expected)
        halved = {key: 0.5 * value for key, value in graph.weights().items()}
        assert not torch.allclose(graph.run(images, halved), expected)


@pytest.mark.parametrize("name", EVALUATED)
def test_all_that_is_evaluated_can_be_read(name):
    network = EVALUATED[name]()
    graph = ComputationGraph(network)
    weights = {key for key, value in network.state_dict().items() if value.dim() > 1 and "places" not in key}
    assert {part.name for layer in graph.layers for part in layer.parts[:1]} == weights


def test_reading_changes_nothing():
    network = Example().train()
    network.dropout1.eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    parameters = list(network.parameters())
    random = torch.get_rng_state()
    ComputationGraph(network)
    assert network.training and network.conv1.training and not network.dropout1.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(one is other for one, other in zip(network.parameters(), parameters, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    norms = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(784, 10)).train()
    ComputationGraph(norms)
    assert norms[0].num_batches_tracked == 0 and norms[0].running_mean == 0


def test_what_a_network_does_to_its_own_tensors_or_draws_stays_within():
    class Busy(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(784, 10)
            self.register_buffer("count", torch.zeros(1, dtype=torch.long))
            self.register_buffer("mean", torch.zeros(784))

        def forward(self, x):
            x = x.flatten(1)
            self.count.add_(1)
            self.mean.lerp_(x.mean(0), 0.5)
            self.out.weight.data.clamp_(-0.01, 0.01)
            return self.out(x + 0.1 * torch.randn_like(x))

    network = Busy()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    graph = ComputationGraph(network)
    images = torch.ones(2, 1, 28, 28)
    weights = graph.weights()
    same = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random = torch.get_rng_state()
        same.append(graph.run(images, {name: tensor.clone() for name, tensor in weights.items()}))
    assert torch.equal(*same)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_threads_leave_the_fused_transformer_layer_as_it_was():
    def read(_):
        for _ in range(3):
            ComputationGraph(mlp([4]))

    assert torch.backends.mha.get_fastpath_enabled()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read, range(4)))
    assert torch.backends.mha.get_fastpath_enabled()


def test_another_way_through_the_network_is_noticed():
    class Ways(nn.Module):
        def __init__(self, way):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(784, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.out, self.way = nn.Linear(8, 10), way

        def forward(self, x):
            few = len(x) < 10
            x = self.out(self.way(self, self.a(x.flatten(1)), few))
            if few:
                F.linear(x, x.detach())  # nothing comes of it
            return x

    ways = [
        lambda self, x, few: self.b(x),
        lambda self, x, few: self.b(x) if few else self.c(x),
        lambda self, x, few: self.b(x) if few else x,
        lambda self, x, few: x if few else self.b(x),
        lambda self, x, few: x.relu() if few else F.layer_norm(x, [8]),
    ]
    for way in ways:
        graph = ComputationGraph(Ways(way))
        assert graph.run(torch.zeros(2, 1, 28, 28), {}).shape == (2, 10)
        with pytest.raises(ValueError, match="its forward pass goes another way every time"):
            graph.run(torch.zeros(20, 1, 28, 28), {})


def test_a_layer_between_two_uses_of_another_is_found():
    class Between(Chain):
        def forward(self, x):
            return self.out(self.one(self.two(self.one(self.first(x.flatten(1)).relu()).relu()).relu()))

    graph = ComputationGraph(Between(F.relu))
    assert [layer.name for layer in graph.layers] == ["first", "one", "two", "out"] and graph.left == []
    assert graph.layers[1].sources == {0, 2} and graph.layers[2].readers == [graph.layers[1]]


def test_compiled_parts_run_as_they_were_written():
    network = nn.Sequential(nn.Flatten(), torch.compile(nn.Sequential(nn.Linear(784, 9), nn.ReLU())), nn.Linear(9, 10))
    torch._dynamo.utils.counters.clear()
    assert [layer.shape for layer in ComputationGraph(network).layers] == [(9, 784), (10, 9)]
    assert not torch._dynamo.utils.counters["frames"]


def test_tied_and_partly_used_parameters_are_accounted_for():
    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.places, self.embed, self.out = (
                nn.Parameter(torch.zeros(1, 40, 8)),
                nn.Linear(28, 8),
                nn.Linear(8, 10),
            )
            self.also = self.embed

        def forward(self, x):
            return self.out((self.embed(x[:, 0]) + self.places[:, :28]).mean(1))

    graph = ComputationGraph(Places())
    assert graph.left == ["places"] and "places" in graph.written
    assert graph.count == 28 * 8 + 8 + 28 * 8 + 8 * 10 + 10
    assert set(graph.with_tied(graph.written)) == set(graph.module.state_dict())


def test_attention_takes_a_mask_for_each_image_and_head():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(28, 2, batch_first=True), nn.Linear(784, 10)

        def forward(self, x):
            mask = torch.arange(2 * len(x) * 784).view(-1, 28, 28) % 3 == 1
            return self.out(self.attention(x[:, 0], x[:, 0], x[:, 0], attn_mask=mask)[0].flatten(1))

    network = Masked().eval()
    images = torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(ComputationGraph(network).run(images, {}), network(images))


def test_options_of_convolutions_may_be_short():
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.out = nn.Parameter(torch.randn(4, 1, 1, 1)), nn.Linear(784, 10)

        def forward(self, x):
            return self.out(F.conv2d(x, self.kernel, stride=[2]).flatten(1))

    network = Short()
    graph = ComputationGraph(network)
    images = torch.randn(3, 1, 28, 28)
    assert graph.layers[0].options["stride"] == (2, 2)
    torch.testing.assert_close(graph.run(images, {}), network(images))


def test_what_a_layer_reads_is_found():
    graph = ComputationGraph(TargetCNN())
    conv1, conv2, fc1, fc2 = graph.layers
    assert [layer.depth for layer in graph.layers] == [0, 1, 2, 3]
    assert [sorted(layer.sources) for layer in graph.layers] == [[-1], [0], [1], [2]]
    assert conv2.channels[:, 0].tolist() == list(range(conv1.first_neuron, conv1.first_neuron + 32))
    assert fc1.channels[:, 0].tolist() == list(range(conv2.first_neuron, conv2.first_neuron + 64))
    assert fc1.grid.shape == (49, 2) and fc1.order is None
    torch.testing.assert_close(fc1.grid[10], torch.tensor([1.5 / 7, 3.5 / 7]))
    assert fc2.last and graph.last is fc2
    assert conv1.activation == (0, 0, 0, 0, 0.5, 1, 2)


def test_features_in_another_order_are_of_the_same_channels():
    class ChannelsLast(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.Conv2d(1, 4, 3, stride=2), nn.Linear(4 * 169, 10)

        def forward(self, x):
            return self.out(self.conv(x).permute(0, 2, 3, 1).flatten(1))

    layer = ComputationGraph(ChannelsLast()).last
    assert layer.order.tolist()[:3] == [0, 4, 8] and len(layer.channels) == 4 and len(layer.grid) == 169
    weight = torch.randn(10, 676)
    kernels = weight.unflatten(1, (169, 4)).movedim(2, 1)
    assert torch.equal(kernels[:, 1, 2], weight[:, 9])
    assert torch.equal(layer.weight_of(kernels), weight)


def test_additions_concatenations_and_products_are_followed():
    block = Sum(nn.Conv2d(4, 4, 3, padding=1))
    graph = ComputationGraph(nn.Sequential(nn.Conv2d(1, 4, 3), block, nn.Conv2d(4, 10, 3), *CLASSES))
    assert graph.last.sources == {0, 1}
    pairs = graph.neurons.blocks[-2][2]  # before the block of the last layer
    assert pairs.tolist() == [[graph.layers[0].first_neuron + i, graph.layers[1].first_neuron + i] for i in range(4)]
    gated = ComputationGraph(nn.Sequential(nn.Conv2d(1, 4, 3), Gate(4, 2), nn.Conv2d(4, 10, 3), *CLASSES))
    assert gated.last.sources == {0, 2}
    residual = ComputationGraph(nn.Sequential(nn.Conv2d(1, 4, 3, 4), ResidualBlock(4), nn.Conv2d(4, 10, 3), *CLASSES))
    assert residual.last.sources == {0, 2} and residual.last.depth == 3


class Mixer(nn.Module):
    """A block of a Mixer (Tolstikhin et al. 2021): tokens are mixed, added, and averaged."""

    def __init__(self, first: bool):
        super().__init__()
        self.first, self.patches, self.out = first, nn.Conv2d(1, 12, 7, 7), nn.Linear(12, 10)
        self.mix = Transposed(nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 16)))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)  # [N, tokens, channels]
        return self.out((x + self.mix(x) if self.first else self.mix(x) + x).mean(1))


@pytest.mark.parametrize("first", [True, False])
def test_what_mixes_tokens_leaves_them_their_channels(first):
    graph = ComputationGraph(Mixer(first))
    patches, last = graph.layers[0], graph.last
    assert last.pooled and last.channels[:, 0].tolist() == patches.neurons.tolist()
    assert last.sources == {0, 2}


def test_a_product_with_a_parameter_keeps_the_neurons():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gain, self.out = (
                nn.Conv2d(1, 4, 3),
                nn.Parameter(torch.ones(1, 4, 1, 1)),
                nn.Linear(2704, 10),
            )

        def forward(self, x):
            return self.out((self.gain * self.conv(x)).flatten(1))

    graph = ComputationGraph(Scaled())
    first = graph.layers[0].first_neuron
    assert graph.left == [] and [type(shift) for shift in graph.shifts] == [calls.Gain]
    assert graph.last.channels[:, 0].tolist() == [first, first + 1, first + 2, first + 3]


def test_lazy_modules_are_initialised():
    network = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(10))
    assert ComputationGraph(network).last.shape == (10, 2704)
    assert network[2].weight.shape == (10, 2704)


def test_wrapped_networks_are_read():
    for wrapped in (torch.compile(mlp([12])), nn.DataParallel(mlp([12]))):
        assert [layer.name for layer in ComputationGraph(wrapped).layers] == ["1", "3"]


# ---- however it is written -------------------------------------------------------------------------------------------


class Written(nn.Module):
    """A convolution and a dense layer with parameters of their own, combined as `forward(self, x)` says."""

    def __init__(self, forward, **parameters):
        super().__init__()
        self.conv, self.dense, self.out = nn.Conv2d(1, 4, 3, 3), nn.Linear(324, 8), nn.Linear(8, 10)
        for name, shape in parameters.items():
            tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            tensor = {"zero": torch.zeros(shape), "one": torch.ones(shape), "p": tensor.abs()}.get(name, tensor)
            if name.startswith("buffer"):
                self.register_buffer(name, tensor)
            else:
                setattr(self, name, nn.Parameter(tensor))
        self.run = forward

    def forward(self, x):
        return self.run(self, x)

    def maps(self, x):
        return self.conv(x)

    def rest(self, x):
        return self.out(self.dense(x.flatten(1)).relu())


# What stands in `forward`, the parameters that it takes, and what is found: (layers, shifts and gains, what is left).
SPELLINGS = {
    # Parameters, and views of them, on either side.
    "gain left": (lambda n, x: n.rest(n.g[:1] * n.maps(x)), {"g": (2, 4, 1, 1)}, (3, 1, ["g"])),
    "gain right": (lambda n, x: n.rest(n.maps(x) * n.g[:1]), {"g": (2, 4, 1, 1)}, (3, 1, ["g"])),
    "gain of three axes": (lambda n, x: n.rest(n.g * n.maps(x)), {"g": (4, 1, 1)}, (3, 1, [])),
    "gain in place": (lambda n, x: n.rest(n.maps(x).mul_(n.g)), {"g": (4, 1, 1)}, (3, 1, [])),
    "shift left": (lambda n, x: n.rest(n.b.view(1, -1, 1, 1) + n.maps(x)), {"b": (4,)}, (3, 1, [])),
    "shift of a row": (lambda n, x: n.out(n.b[0] + x.flatten(1) @ n.w), {"b": (2, 8), "w": (784, 8)}, (2, 0, ["b"])),
    "shift in place": (lambda n, x: n.rest(n.maps(x).add_(n.b)), {"b": (4, 9, 9)}, (3, 1, [])),
    "places of rows": (lambda n, x: n.rest(n.maps(x) + n.b), {"b": (1, 4, 9, 1)}, (3, 1, [])),
    "moved twice": (lambda n, x: n.out(x.flatten(1) @ n.w.flatten(1).T), {"w": (8, 28, 28)}, (2, 0, [])),
    "made contiguous": (lambda n, x: n.out(x.flatten(1) @ n.w.T.contiguous()), {"w": (8, 784)}, (2, 0, [])),
    "unsqueezed twice": (lambda n, x: n.rest(n.maps(x) * n.g.unsqueeze(-1).unsqueeze(-1)), {"g": (4,)}, (3, 1, [])),
    "taken off": (lambda n, x: n.rest(n.maps(x) - n.b), {"b": (4, 1, 1)}, (3, 1, [])),
    "divided by": (lambda n, x: n.rest(n.maps(x) / n.g), {"g": (4, 1, 1)}, (3, 1, [])),
    "taken from": (lambda n, x: n.rest(n.b - n.maps(x)), {"b": (4, 1, 1)}, (3, 0, ["b"])),
    "expanded": (lambda n, x: n.rest(n.maps(x) + n.b.expand(len(x), -1, 9, 9)), {"b": (1, 4, 1, 1)}, (3, 1, [])),
    "repeated": (lambda n, x: n.out(x.flatten(1)[:, :8] + n.b.repeat(len(x), 1)), {"b": (1, 8)}, (1, 1, [])),
    # Products over other axes.
    "weight left": (lambda n, x: n.out((n.w @ x.flatten(1).T).T), {"w": (8, 784)}, (2, 0, [])),
    "a weight for each head": (lambda n, x: n.dense((x @ n.w).flatten(1)[:, :324]), {"w": (4, 28, 6)}, (2, 0, [])),
    "einsum": (lambda n, x: n.out(torch.einsum("nchw,dhw->nd", x, n.w)), {"w": (8, 28, 28)}, (2, 0, [])),
    "einsum of heads": (
        lambda n, x: n.out(torch.einsum("nhw,hwd->nhd", x[:, 0], n.w).flatten(1)[:, :8]),
        {"w": (28, 28, 2)}, (29, 0, []),
    ),
    "einsum with dots": (lambda n, x: n.out(torch.einsum("...d,de", x.flatten(1), n.w)), {"w": (784, 8)}, (2, 0, [])),
    # What is computed from parameters, and constants, are left as they are.
    "one plus a gain": (lambda n, x: n.rest(n.maps(x) * (1 + n.g)), {"g": (4, 1, 1)}, (3, 0, ["g"])),
    "computed weight": (lambda n, x: n.out(F.linear(x.flatten(1), n.w * 2)), {"w": (8, 784)}, (1, 0, ["w"])),
    "exponential": (lambda n, x: n.rest(n.maps(x) * n.g.exp()), {"g": (4, 1, 1)}, (3, 0, ["g"])),
    "computed bias": (
        lambda n, x: n.out(F.linear(x.flatten(1), n.w, 2 * n.b)), {"w": (8, 784), "b": (8,)}, (2, 0, ["b"])
    ),
    "normed by computed gains": (
        lambda n, x: n.rest(F.layer_norm(n.maps(x), (9,), 1 + n.g)), {"g": (9,)}, (3, 0, ["g"])
    ),
    "filters in a buffer": (lambda n, x: n.rest(n.maps(F.conv2d(x, n.buffer, padding=1))), {"buffer": (1, 1, 3, 3)},
                            (3, 0, ["buffer"])),
    "a grid in a buffer": (
        lambda n, x: n.out((x.mean((1, 3))[..., None] - n.buffer).flatten(1)[:, :8]),
        {"buffer": (5,)}, (1, 0, ["buffer"])
    ),
    "features of one number": (
        lambda n, x: n.rest((x.mean((1, 3)).unsqueeze(-1) * n.w + n.b).flatten(1)[:, :324]),
        {"w": (28, 12), "b": (28, 12)}, (2, 0, ["w", "b"]),
    ),
    "frequencies": (lambda n, x: n.rest(torch.fft.fft2(n.maps(x)).real), {}, (3, 0, [])),
    "frequencies apart": (lambda n, x: n.rest(torch.view_as_real(torch.fft.fft2(n.maps(x)))[..., 0]), {}, (3, 0, [])),
    "norm of channels by hand": (
        lambda n, x: n.rest(n.g[:, None, None] * normalised(n.maps(x)) + n.b[:, None, None]),
        {"g": (4,), "b": (4,)}, (3, 2, []),
    ),
    "gain of mixed tokens": (
        lambda n, x: n.out((n.g * (x[:, 0] + F.linear(x[:, 0].mT, n.w).mT)).mean(1)[:, :8]),
        {"g": (28,), "w": (28, 28)}, (2, 1, []),
    ),
    "softmax by hand": (lambda n, x: log_softmax(n.rest(n.maps(x))), {}, (3, 0, [])),
    # Only where the parameter has the values that it has do these leave it as it is.
    "at least zero": (lambda n, x: n.out(F.linear(x.flatten(1), n.p.relu())), {"p": (8, 784)}, (1, 0, ["p"])),
    "a gate that is closed": (lambda n, x: n.rest(n.maps(x) + n.zero.sin()), {"zero": (4, 1, 1)}, (3, 0, ["zero"])),
    "at most one": (lambda n, x: n.rest(n.maps(x) * n.one.clamp(0, 1)), {"one": (4, 1, 1)}, (3, 0, ["one"])),
    "two parts in place": (lambda n, x: n.rest(in_place(n.maps(x), n.g, n.b)), {"g": (2, 1, 1), "b": (4, 1, 1)},
                           (3, 2, [])),
    "a product with factors": (
        lambda n, x: n.out(torch.addmm(n.b, x.flatten(1), n.w, beta=0.5, alpha=2)), {"w": (784, 8), "b": (8,)},
        (1, 0, ["w", "b"])
    ),
    "products by keyword": (
        lambda n, x: n.out(torch.addmm(input=n.b, mat1=torch.matmul(x.view(size=(-1, 784)), other=n.v), mat2=n.w)),
        {"v": (784, 8), "w": (8, 8), "b": (8,)}, (3, 0, []),
    ),
    "a weight for each input": (
        lambda n, x: n.out(torch.bmm(x.flatten(2), n.w.repeat(len(x), 1, 1)).squeeze(1)), {"w": (784, 8)}, (1, 0, ["w"])
    ),
    "complex numbers": (
        lambda n, x: n.out((torch.fft.fft(x.flatten(1)[:, :8]) * n.g).imag * n.b), {"g": (8,), "b": (8,)},
        (1, 1, ["g"])
    ),
    "norm of the batch": (
        lambda n, x: n.rest(F.batch_norm(n.maps(x), n.buffer_m, n.buffer_v, n.g, n.b, True)),
        {"g": (4,), "b": (4,), "buffer_m": (4,), "buffer_v": (4,)}, (3, 0, ["buffer_m", "buffer_v"])
    ),
    "put into place": (lambda n, x: n.rest(assembled(n.maps(x))), {}, (3, 0, [])),
}  # fmt: skip


def in_place(maps, gain, shift):
    """The maps, of which two channels are multiplied and all shifted, by calls of which nothing is kept."""
    maps[:, 1:3].mul_(gain)
    maps.add_(shift)
    return maps


def normalised(maps):
    """The maps, standardised over the channels."""
    centred = maps - maps.mean(1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(1, keepdim=True) + 1e-6)


def log_softmax(logits):
    return logits - logits.exp().sum(-1).log().unsqueeze(-1)


def assembled(maps):
    """The same maps, one after the other."""
    whole = torch.zeros(maps.shape)
    for channel in range(maps.shape[1]):
        whole[:, channel] = maps[:, channel]
    return whole


def test_tables_that_a_network_keeps_are_made_once():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.table = nn.Linear(784, 10), None

        def forward(self, x):
            if self.table is None:
                self.table = torch.arange(784) * 0.01 + 1
            return self.out(x.flatten(1) * self.table)

    network = Kept()
    graph, images = ComputationGraph(network), torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(graph.run(images, {}), network(images))


def test_complex_parameters_are_left():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.out = nn.Linear(784, 8, dtype=torch.cfloat), nn.Linear(8, 10)

        def forward(self, x):
            return self.out(self.first(x.flatten(1).to(torch.cfloat)).abs())

    network = Complex()
    graph, images = ComputationGraph(network), torch.randn(3, 1, 28, 28)
    assert graph.left == ["first.weight", "first.bias"]
    with torch.no_grad():
        torch.testing.assert_close(graph.run(images, {}), network(images))


def test_layers_of_one_input_at_a_time_or_of_none_are_refused():
    out = nn.Linear(784, 10)
    apart = Written(lambda n, x: torch.stack([n.last(image) for image in x.flatten(1)]))
    chosen = Written(lambda n, x: n.last(x.flatten(1)) + n.last(x.flatten(1)[:0]).sum())
    for network, reason in ((apart, "linear of one input"), (chosen, "linear of a choice of inputs, here of none")):
        network.last = out
        with pytest.raises(ValueError, match=reason + r".* is not supported \(test_reading.py, line "):
            ComputationGraph(network)
    with pytest.raises(ValueError, match="is no module"):
        ComputationGraph(lambda x: x)


@pytest.mark.parametrize("name", SPELLINGS)
def test_however_it_is_written_it_is_read_and_computed(name):
    forward, parameters, (layers, shifts, left) = SPELLINGS[name]
    torch.manual_seed(0)
    network = Written(forward, **parameters)
    graph = ComputationGraph(network)
    unused = [key for key in graph.left if key.split(".")[0] in ("conv", "dense", "out")]
    assert (len(graph.layers), len(graph.shifts)) == (layers, shifts)
    assert [key for key in graph.left if key not in unused] == left
    images = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(graph.run(images, {}), network(images), atol=1e-4, rtol=1e-4)
        for key, value in graph.weights().items():
            if key in graph.written and "." not in key:  # it is this parameter that the written one replaces
                changed = graph.run(images, {key: 2 * value + 1})
                assert not torch.allclose(changed, network(images))


class TestGains:
    """Which numbers a gain has, and where, are those of the neurons that broadcasting gives them."""

    @pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1, 1), (4, 9, 9), (4, 9, 1)])
    def test_lie_on_the_neurons(self, shape):
        graph = ComputationGraph(Written(lambda n, x: n.rest(n.g * n.maps(x)), g=shape))
        (gain,) = graph.shifts
        first = graph.layers[0].first_neuron
        assert gain.channels.tolist() == [*range(first, first + 4)] and gain.axis == -3
        assert gain.places is None if shape[-2:] == (1, 1) else len(gain.places) == shape[-1] * shape[-2]


# Functions of a layer's outputs, and one that computes the same, of which the curve is.
FUNCTIONS = {
    "factor before": (lambda h: F.relu(2 * h), lambda h: F.relu(2 * h)),
    "shift before": (lambda h: F.relu(h + 0.1), lambda h: F.relu(h + 0.1)),
    "root of a width": (lambda h: F.relu(h / math.sqrt(8)), lambda h: F.relu(h / math.sqrt(8))),
    "by a mask": (lambda h: h * (h > 0), F.relu),
    "by a mask of floats": (lambda h: h * (h > 0).float(), F.relu),
    "where": (lambda h: torch.where(h > 0, h, 0.1 * h), lambda h: F.leaky_relu(h, 0.1)),
    "maximum with zeros": (lambda h: torch.max(h, torch.zeros(1)), F.relu),
    "maximum with as many zeros": (lambda h: torch.maximum(h, torch.zeros_like(h)), F.relu),
    "set to zero": (lambda h: zeroed(h), F.relu),
    "gated by itself": (lambda h: h * torch.sigmoid(h), F.silu),
    "by hand": (lambda h: 0.5 * h * (1 + torch.erf(h / math.sqrt(2))), F.gelu),
    "dropout by hand": (lambda h: F.relu(h) * (torch.rand_like(h) > 0.5) / 0.5, lambda h: F.relu(h)),
    "pooled before": (lambda h: F.relu(F.max_pool1d(h[:, None], 1)[:, 0]), F.relu),
    "norm by hand": (lambda h: F.relu((h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True)), F.relu),
    "attention of its own": (lambda h: F.relu(h).softmax(1), F.relu),
    "two functions": (lambda h: torch.cat([F.relu(h), torch.tanh(h)], 1)[:, :8], F.relu),
    "none": (lambda h: h.flip(1), None),
    "softmax alone": (lambda h: h.softmax(1), None),
}  # fmt: skip


def zeroed(h):
    h = h.clone()
    h[h < 0] = 0
    return h


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_follows_a_layer_is_one_function(name):
    function, same = FUNCTIONS[name]
    graph = ComputationGraph(Written(lambda n, x: n.out(function(n.dense(x.flatten(1)[:, :324])))))
    found = graph.layers[0].activation
    if same is None:
        assert found is None
    else:
        expected = same(torch.tensor(calls.ACTIVATION_POINTS))
        size = found[-1] / expected[-1]
        torch.testing.assert_close(torch.tensor(found) / size, expected, atol=1e-4, rtol=1e-4)
        drawn = 1 if name == "dropout by hand" else 1e-4  # the share of a mask
        assert abs(size - 1) < drawn


def test_functions_of_sums_count_for_every_summand_alone():
    graph = ComputationGraph(nn.Sequential(nn.Conv2d(1, 4, 3, 4), ResidualBlock(4), nn.Conv2d(4, 10, 3), *CLASSES))
    relu = tuple(torch.tensor(calls.ACTIVATION_POINTS).relu().tolist())
    assert [layer.activation for layer in graph.layers] == [relu, relu, relu, None]


class Patches(nn.Module):
    """Patches of 7 x 7 pixels as tokens: by a convolution, or by a linear layer over each, flattened."""

    def __init__(self, how):
        super().__init__()
        self.how, self.out = how, nn.Linear(8, 10)
        self.embed = nn.Conv2d(1, 8, 7, 7) if how == "convolution" else nn.Linear(49, 8)

    def forward(self, x):
        if self.how == "convolution":
            x = self.embed(x).flatten(2).mT
        elif self.how == "unfold":
            x = self.embed(F.unfold(x, 7, stride=7).mT)
        elif self.how == "turned":
            x = self.embed(x.reshape(-1, 4, 7, 4, 7).permute(0, 1, 3, 4, 2).reshape(-1, 16, 49))
        else:
            x = self.embed(x.reshape(-1, 4, 7, 4, 7).permute(0, 1, 3, 2, 4).reshape(-1, 16, 49))
        return self.out(x.relu().mean(1))


@pytest.mark.parametrize("how", ["unfold", "reshape", "turned"])
def test_a_linear_layer_over_patches_is_a_convolution(how):
    convolution, linear = (ComputationGraph(Patches(way)).layers[0] for way in ("convolution", how))
    assert linear.window == convolution.window == (7, 7) and not linear.is_convolution
    assert linear.options["stride"] == convolution.options["stride"] == (7, 7)
    for name in ("side", "resolution", "positions"):
        assert getattr(linear, name) == getattr(convolution, name), name
    graphs = [ComputationGraph(Patches(way)) for way in ("convolution", how)]
    assert torch.equal(*(description_of(graph.layers[0], graph) for graph in graphs))
    # The same kernel, in the one's order of features and in the other's, computes the same.
    kernels = torch.randn(8, 1, 49)
    networks = Patches("convolution"), Patches(how)
    with torch.no_grad():
        for network, layer in zip(networks, (convolution, linear), strict=True):
            network.embed.weight.copy_(layer.weight_of(kernels))
        networks[1].embed.bias.copy_(networks[0].embed.bias)
        networks[1].out.load_state_dict(networks[0].out.state_dict())
        images = torch.randn(3, 1, 28, 28)
        torch.testing.assert_close(networks[0](images), networks[1](images))


def test_rows_and_dense_layers_are_no_windows():
    assert all(layer.window is None for layer in ComputationGraph(mlp([20])).layers)
    assert ComputationGraph(OrdinaryPython()).last.window is None
    assert ComputationGraph(Attention()).layers[0].window is None  # of 28 pixels, too wide to be told apart


class Mixed(nn.Module):
    """Whose second linear layer has a weight that is computed."""

    def __init__(self):
        super().__init__()
        self.first, self.weight, self.out = nn.Linear(784, 8), nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 10)

    def forward(self, x):
        return self.out(F.linear(self.first(x.flatten(1)).relu(), 2 * self.weight).relu())


def test_what_a_computed_weight_mixes_is_other_neurons():
    graph = ComputationGraph(Mixed())
    assert graph.left == ["weight"] and not torch.isin(graph.last.channels, graph.layers[0].neurons).any()


# ---- what cannot be read --------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(28, 8, batch_first=True), nn.Linear(8, 10)

    def forward(self, x):
        states, _ = self.lstm(x.squeeze(1))  # the line that is named
        return self.out(states[:, -1])


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(256, 4), nn.Linear(784 * 4, 10)

    def forward(self, x):
        return self.out(self.words((x * 100).long().clamp(0, 255).flatten(1)).flatten(1))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(784, 10), nn.Linear(784, 10)

    def forward(self, x):
        return self.one(x.flatten(1)) * self.two(x.flatten(1))


class HeadThatReadsAnother(TwoHeads):
    def __init__(self):
        super().__init__()
        self.two = nn.Linear(10, 10)

    def forward(self, x):
        x = self.one(x.flatten(1))
        return x + self.two(x.relu())


class Pair(TwoHeads):
    def forward(self, x):
        return self.one(x.flatten(1)), self.two(x.flatten(1))


class Raising(TwoHeads):
    def forward(self, x):
        raise KeyError("no such thing")


class Twice(nn.Module):
    """A kernel that is used twice, with other options, another bias, or another order of its elements."""

    def __init__(self, second):
        super().__init__()
        self.kernel, self.bias, self.out = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Parameter(torch.zeros(4)), mlp([])
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), second

    def forward(self, x):
        x = self.second(F.conv2d(self.first(x), self.kernel, padding=1).relu(), self)
        return self.out(x.mean(1))


class LoopOverImages(TwoHeads):
    def forward(self, x):
        return torch.cat([self.one(image.flatten()[None]) for image in x])


class ThroughNumPy(TwoHeads):
    def forward(self, x):
        return self.one(torch.from_numpy(x.flatten(1).numpy() / 2))


class Mixture(TwoHeads):
    def __init__(self):
        super().__init__()
        self.shares = nn.Linear(784, 2)

    def forward(self, x):
        x = x.flatten(1)
        first, second = self.shares(x).softmax(1).unsqueeze(2).unbind(1)
        return first * self.one(x) + second * self.two(x)


class Binarised(TwoHeads):
    def forward(self, x):
        return self.one((x > 0.5).float().flatten(1))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(784), nn.Linear(784, 10)

    def forward(self, x):
        x = self.norm(x.flatten(1)).relu()
        return self.out(F.layer_norm(x, (784,), self.norm.weight, self.norm.bias, 0.1))


def weight_normed(norm) -> nn.Module:
    return nn.Sequential(nn.Flatten(), norm(nn.Linear(784, 10)))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Recurrent, r"^lstm is not supported \(test_reading\.py, line \d+: states, _ = self\.lstm.*line that is named"),
        (lambda: nn.Sequential(nn.Flatten(2), nn.GRU(784, 10)), "gru is not supported|returns a tuple"),
        (Words, r"^embedding of values is not supported \(test_reading\.py, line \d+: return self\.out"),
        (lambda: flat(nn.ConvTranspose2d(1, 2, 3), features=1800), "^conv_transpose2d is not supported"),
        (lambda: weight_normed(nn.utils.parametrizations.weight_norm), r"computed from 1\.parametrizations\.weight"),
        (lambda: weight_normed(nn.utils.parametrizations.spectral_norm), r"computed from 1\.parametrizations\.weight"),
        (TwoHeads, "the output must be that of one layer.* it is of mul"),
        (HeadThatReadsAnother, "a sum of such that do not read each other; it is of add"),
        (lambda: Twice(lambda x, own: F.conv2d(x, own.kernel, None, 2, 1)), "takes kernel again, in another way"),
        (lambda: Twice(lambda x, own: F.conv2d(x, own.kernel, own.bias, padding=1)), "takes kernel again"),
        (lambda: Twice(lambda x, own: F.conv2d(x, own.kernel.mT, padding=1)), "takes kernel again"),
        (LoopOverImages, "linear of one input of the batch at a time is not supported"),
        (lambda: nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten()), "a maximum over places"),
        (ThroughNumPy, r"what linear \(test_reading\.py, line \d+: .*\) takes is of NumPy, or of compiled code"),
        (Mixture, "the output must be that of one layer.* it is of add"),
        (Binarised, r"its output, of gt \(test_reading\.py, line \d+: return self.one\(.*cannot be followed back"),
        (Normed, "layer_norm takes norm again, in another way"),
        (lambda: flat(features=784, classes=1), "has one class, but telling classes apart takes two"),
        (Pair, "^Pair returns a tuple, not logits"),
        (Raising, r"takes no inputs .* KeyError: 'no such thing' \(test_reading\.py, line \d+: raise KeyError"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)), r"takes no inputs .*28, 28\] it says .*1024x10"),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 3)), r"has shape \[4, 26, 26\] per image"),
        (lambda: nn.Sequential(nn.Flatten()), "the output must be that of one layer"),
        (lambda: nn.Sequential(nn.Conv2d(1, 10, 9, 5), nn.Conv2d(10, 10, 4, groups=5), nn.Flatten()), "in groups"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(build, reason):
    network = build()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=reason) as caught:
        ComputationGraph(network)
    assert "\n" not in str(caught.value)
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
