"""Candidates for the few numbers of a synthesiser, and the networks that they are tried on."""

import copy
import math
import random
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from target_cnn import Dataset
from universal.data.labelled import apart
from universal.evaluation.networks import EVALUATED_SHAPES
from universal.model.synthesizer import GraphWeightSynthesizer
from universal.reading.graph import ComputationGraph, Logits, in_fastest_layout
from universal.reinforce.rewards import Reward
from universal.rules.looking import DoubtfulWeights
from universal.rules.synthesis import write
from universal.training.architectures import draw_architecture


class Trial(NamedTuple):
    """What all candidates of a generation are given alike, so that only they make a difference."""

    graph: ComputationGraph
    seed: int  # of the init, and of whatever the reward draws
    known: Dataset  # what the network is written from
    images: Dataset  # what the reward is given


def draw_trials(
    drawn: random.Random, build: Callable[[], nn.Module] | None, known: Dataset, data: Dataset, networks: int,
    images: int,
) -> list[Trial]:  # fmt: skip
    """So many `networks` from unseen inits, of random architectures or as `build` makes them, with `images` of `data`
    each; to be written from what is `known`.

    None has the parameter shapes of a network that is evaluated, unless `build` makes it.
    """
    trials = []
    for _ in range(networks):
        seed = drawn.getrandbits(31)
        torch.manual_seed(seed)
        graph = graph_of(build() if build else random_network(drawn, data), data)
        batch = torch.randint(len(data.labels), (images,)).to(data.labels.device)
        trials.append(Trial(graph, seed, known, data[batch]))
    return trials


def random_network(drawn: random.Random, data: Dataset) -> nn.Module:
    """A random architecture for images and classes as those of `data`, none of those that are evaluated."""
    shape, classes = tuple(data.images.shape[1:]), int(data.labels.max()) + 1
    return draw_architecture(drawn, shape, classes, EVALUATED_SHAPES)


def graph_of(network: nn.Module, data: Dataset) -> ComputationGraph:
    """The graph of a network, where the images of `data` are."""
    return ComputationGraph(network.to(data.images.device), data.images[:2].cpu())


def with_tuning(synthesizer: GraphWeightSynthesizer) -> GraphWeightSynthesizer:
    """The same synthesiser with the numbers of `universal.model.tuning`, which change nothing yet if it had none."""
    tunable = GraphWeightSynthesizer(**synthesizer.settings | {"tunable": True})
    tunable.load_state_dict(synthesizer.state_dict(), strict=synthesizer.settings["tunable"])
    tunable.seconds = dict(synthesizer.seconds)
    return tunable


def rewritten(synthesizer: GraphWeightSynthesizer, graph: ComputationGraph, seed: int, known: Dataset) -> Logits:
    """A copy of the network, written from what is `known` and the random init of `seed`. Raises ValueError as `write`
    does."""
    network = Logits(graph, copy.deepcopy(graph.module))  # what is left at its init must stay, whatever a reward does
    with apart(), warnings.catch_warnings(action="ignore", category=DoubtfulWeights):
        write(network.module, *known, seed=seed, limit=len(known.labels), synthesizer=synthesizer)
    return in_fastest_layout(network, known.images[:2])


def written(synthesizer: GraphWeightSynthesizer, graph: ComputationGraph, seed: int, known: Dataset) -> Logits | None:
    """The same; None if it cannot be: responses are so large, or so alike, that no regression can be solved."""
    try:
        return rewritten(synthesizer, graph, seed, known)
    except ValueError:
        return None


@torch.no_grad()
def try_candidate(
    synthesizer: GraphWeightSynthesizer, offsets: Tensor, trials: list[Trial], reward: Reward
) -> list[float]:
    """What the networks are worth that are written with these offsets; minus infinity for those that break.

    Raises UserError if the reward does.
    """
    synthesizer.tuning.offsets.copy_(offsets)
    values = []
    for trial in trials:
        network = written(synthesizer, trial.graph, trial.seed, trial.known)
        torch.manual_seed(trial.seed)
        with torch.inference_mode():
            value = -math.inf if network is None else reward.of(network, trial.images)
        values.append(-math.inf if math.isnan(value) else value)
    return values
