"""Candidates for the few numbers of a synthesiser, and the networks that they are tried on."""

import copy
import math
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from target_cnn import Dataset
from universal.evaluation.networks import EVALUATED_SHAPES
from universal.model.synthesizer import GraphWeightSynthesizer, Unwritable
from universal.reading.graph import ComputationGraph, Logits, in_fastest_layout
from universal.reinforce.rewards import Reward
from universal.training.architectures import draw_architecture


class Trial(NamedTuple):
    """What all candidates of a generation are given alike, so that only they make a difference."""

    graph: ComputationGraph
    seed: int  # of the init, and of whatever the reward draws
    images: Dataset


def draw_trials(
    drawn: random.Random, build: Callable[[], nn.Module] | None, data: Dataset, networks: int, images: int
) -> list[Trial]:
    """So many `networks` from unseen inits, of random architectures or as `build` makes them, with `images` each.

    None has the parameter shapes of a network that is evaluated, unless `build` makes it.
    """
    trials = []
    for _ in range(networks):
        seed = drawn.getrandbits(31)
        torch.manual_seed(seed)
        network = build() if build else draw_architecture(drawn, refused=EVALUATED_SHAPES, colour=True)
        graph = graph_of(network, data)
        known = (data.labels < graph.classes).nonzero().squeeze(1)
        batch = torch.randint(len(known), (images,)).to(known.device)
        trials.append(Trial(graph, seed, data[known[batch]]))
    return trials


def graph_of(network: nn.Module, data: Dataset) -> ComputationGraph:
    """The graph of a network, where the images of `data` are."""
    graph = ComputationGraph(network.to(data.images.device))
    in_fastest_layout(Logits(graph), data.images[:2])
    return graph


def with_tuning(synthesizer: GraphWeightSynthesizer) -> GraphWeightSynthesizer:
    """The same synthesiser with the numbers of `universal.model.tuning`, which change nothing yet if it had none."""
    tunable = GraphWeightSynthesizer(**synthesizer.settings | {"tunable": True})
    tunable.load_state_dict(synthesizer.state_dict(), strict=synthesizer.settings["tunable"])
    tunable.seconds = dict(synthesizer.seconds)
    return tunable


def written(synthesizer: GraphWeightSynthesizer, graph: ComputationGraph, seed: int) -> Logits | None:
    """A copy of the network that is written from the random init of `seed`; None if its weights are not finite."""
    try:
        synthesizer.fill(graph, seed)
    except Unwritable:  # responses so large, or so alike, that no regression can be solved
        return None
    return Logits(graph, copy.deepcopy(graph.module))  # rewards may change it, and what is left at its init must stay


@torch.inference_mode()
def try_candidate(
    synthesizer: GraphWeightSynthesizer, offsets: Tensor, trials: list[Trial], reward: Reward
) -> list[float]:
    """What the networks are worth that are written with these offsets; minus infinity for those that break.

    Raises UserError if the reward does.
    """
    synthesizer.tuning.offsets.copy_(offsets)
    values = []
    for trial in trials:
        network = written(synthesizer, trial.graph, trial.seed)
        torch.manual_seed(trial.seed)
        value = -math.inf if network is None else reward.of(network, trial.images)
        values.append(-math.inf if math.isnan(value) else value)
    return values
