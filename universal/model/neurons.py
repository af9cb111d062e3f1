"""What each neuron of a layer is to be: it has a role, by its place among the others."""

import torch
from torch import Tensor, nn

from universal.model.description import AcrossNeurons, ConditionedMLP, mlp
from universal.reading.calls import Layer
from universal.reading.graph import ComputationGraph

ROLES = 4096  # of neurons, and as many of those that no layer reads


class Order:
    """The order of the neurons of each layer of `graph`, by the sums of their own random `weights`, so that permuted
    neurons are written permuted.

    Neurons that are added up, as those of residual blocks, have the order of the first of them: so what stands for
    something keeps standing for it. `read` and `summed` are the numbers of those that layers read, or that are added.
    """

    def __init__(self, graph: ComputationGraph, weights: dict[str, Tensor]):
        self.inputs, blocks = graph.channels, graph.neurons.blocks
        none = torch.zeros(0, dtype=torch.long)
        self.first, at = torch.arange(len(graph.neurons.codes)), 1
        for count, _, pairs in blocks:
            if pairs is not None:
                first = self.first[pairs].amin(1)
                self.first[at : at + count] = first
                self.first[pairs] = first[:, None].expand_as(pairs)
            at += count
        self.summed = torch.cat([none, *(pairs.flatten() for _, _, pairs in blocks if pairs is not None)])
        readers = [*graph.layers, *graph.norms, *graph.shifts]
        self.read = torch.cat([self.summed, *(reader.channels.flatten() for reader in readers)])
        self.sums = torch.zeros(len(self.first), dtype=torch.float64)
        for layer in graph.layers:
            self.sums[layer.neurons] = layer.weight.of(weights).flatten(1).double().sum(1).cpu()

    def of(self, layer: Layer) -> Tensor:
        """The place of each neuron of a layer, among those of its group, [neurons]."""
        first = self.first[layer.neurons]
        values = self.sums[torch.where(first > self.inputs, first, layer.neurons)]
        places = values.unflatten(0, (layer.groups, -1)).argsort(1).argsort(1)
        return (places + places.shape[1] * torch.arange(layer.groups)[:, None]).flatten()

    def is_read(self, layer: Layer) -> Tensor:
        """Which neurons of a layer others read, or are added to others, [neurons]. The rest are compared with each
        other, as queries and keys are."""
        return torch.isin(layer.neurons, self.read)

    def roles(self, layer: Layer) -> Tensor:
        """The role of each neuron of a layer, [neurons].

        Those that are compared keep their own order, by which they are paired; if a layer has both queries and keys,
        these have the roles of those.
        """
        roles, is_read = self.of(layer) % (layer.shape[0] // layer.groups) % ROLES, self.is_read(layer)
        if layer.last or is_read.all():
            return roles
        count = int((~is_read).sum())
        roles[~is_read] = ROLES + torch.arange(count) % paired(count, layer) % ROLES
        return roles


def paired(count: int, layer: Layer) -> int:
    """Of so many neurons of a layer that are compared, how many are of one side: all, or of queries and keys in one
    layer half of them."""
    return count // 2 if 1 < count < layer.shape[0] else count


class Roles(nn.Module):
    """(a layer, the keys of its inputs, the roles of its neurons) -> what each of these is, [neurons, dimension].

    Roles are rows of a fixed random table, of which every layer takes the first ones: whatever is learned of the first
    neuron of one layer is of use for those of others. What random weights say of a neuron beside its place is not read:
    gradients of two random networks then have nothing in common.
    """

    def __init__(self, dimension: int, hidden: int):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        table = torch.randn(2 * ROLES, dimension, dtype=torch.float32, generator=generator)
        self.register_buffer("table", table, persistent=False)
        self.channels = nn.Linear(dimension, dimension, bias=False)
        self.norm = nn.LayerNorm(dimension)
        self.embed = ConditionedMLP(dimension, dimension, hidden, dimension)
        self.embed_more = nn.Sequential(nn.LayerNorm(dimension), mlp(dimension, hidden, dimension))
        self.attend_norm, self.attend = nn.LayerNorm(dimension), nn.MultiheadAttention(dimension, 4, batch_first=True)
        self.neuron_norm = AcrossNeurons()

    def forward(self, layer: Layer, keys: Tensor, roles: Tensor, about: Tensor) -> Tensor:
        """The neurons of a group are told apart by their roles, groups by the `keys` [channels, dimension] of what
        they read. The neurons then see each other, by attention."""
        groups = self.channels(keys.unflatten(0, (layer.groups, -1)).mean(1))
        groups = groups.repeat_interleave(layer.shape[0] // layer.groups, 0)
        neurons = self.embed(self.norm(self.table[roles.to(keys.device)] + groups), about)
        neurons = neurons + self.embed_more(neurons)
        normalised = self.attend_norm(neurons)[None]
        return self.neuron_norm(neurons + self.attend(normalised, normalised, normalised, need_weights=False)[0][0])
