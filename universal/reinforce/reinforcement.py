"""Reinforcement: a search for the few numbers with which a synthesiser writes the networks of the highest reward."""

import argparse
import math
import random
from statistics import fmean

import torch
import torch.distributed as dist
from torch import Tensor

from scripting import UserError
from universal.builders import load_builder
from universal.data.splits import shuffled, split_images
from universal.model.synthesizer import GraphWeightSynthesizer
from universal.reinforce.candidates import (
    draw_trials,
    graph_of,
    random_network,
    rewritten,
    try_candidate,
    with_tuning,
    written,
)
from universal.reinforce.rewards import load_reward, score_after
from universal.reinforce.search import CovarianceSearch

MAKER = "python -m universal.reinforce"
SIDES = (16, 64)  # of images that random architectures take
REPORTED_INITS = 3  # whose networks are scored in reports


class Reinforcement:
    """The state of a search, for `run_to_end`: what a step, a generation of candidates, changes.

    Raises UserError if there is no such reward or model, if the model or the images cannot be read, or if the
    evaluations do not suffice for a step.
    """

    def __init__(
        self, options: argparse.Namespace, synthesizer: GraphWeightSynthesizer, rank: int = 0, processes: int = 1
    ):
        self.options, self.rank, self.processes = options, rank, processes
        a_step = options.candidates * options.networks
        self.steps = options.evaluations // a_step
        if not self.steps:
            raise UserError(f"--evaluations {options.evaluations}: --candidates times --networks, {a_step}, are needed")
        self.reward = load_reward(options.reward)
        self.build = load_builder(options.model) if options.model else None
        self.synthesizer = with_tuning(synthesizer).to(options.device).eval()
        self.start = self.synthesizer.tuning.offsets.detach().clone()
        self.search = CovarianceSearch(self.start.numel(), options.candidates, options.deviation, options.seed)
        torch.manual_seed(options.seed)
        network = self.build and self.build()
        data, self.validation = split_images(options.data, options.validation, options.device, network)
        data = shuffled(data, options.seed)
        count = min(options.limit, len(data.labels) // 2)
        self.known, self.data = data[:count], data[count:]
        if network is None:
            sides = data.images.shape[2:]
            if not all(SIDES[0] <= side <= SIDES[1] for side in sides):
                size = " x ".join(map(str, sides))
                raise UserError(f"{options.data}: has images of {size} pixels, too small or large for random networks: "
                                "give --model")  # fmt: skip
            network = random_network(random.Random(options.seed), data)
        try:
            self.reported = graph_of(network, data)
            # Of candidates it only counts against them if nothing can be written.
            rewritten(self.synthesizer, self.reported, options.seed, self.known)
        except ValueError as error:
            raise UserError(f"--model {options.model}: {error}") from error
        self.step, self.seconds = 0, 0.0

    def run(self, until: int) -> None:
        """Search up to step `until`. Raises UserError if the reward fails."""
        options = self.options
        while self.step < until:
            # A seed of its own for every generation, the same in all processes.
            drawn = random.Random(f"{options.seed} {self.step}")
            trials = draw_trials(drawn, self.build, self.known, self.data, options.networks, options.images)
            candidates = self.search.ask()
            rewards = torch.zeros(len(candidates), len(trials), dtype=torch.float64)
            for index in range(self.rank, len(candidates), self.processes):
                offsets = self.offsets(candidates[index])
                rewards[index] = torch.tensor(try_candidate(self.synthesizer, offsets, trials, self.reward))
            if self.processes > 1:
                rewards = rewards.to(options.device)
                dist.all_reduce(rewards)
                rewards = rewards.cpu()
            self.search.tell(rewards)
            self.latest = rewards
            self.step += 1

    def offsets(self, moved: Tensor) -> Tensor:
        """The offsets of a synthesiser, `moved` so far, flat, from where they were."""
        return self.start + moved.to(self.start).view_as(self.start)

    @torch.no_grad()
    def result(self) -> GraphWeightSynthesizer:
        """The synthesiser with what the search has come to."""
        self.synthesizer.tuning.offsets.copy_(self.offsets(self.search.found))
        return self.synthesizer

    @property
    def evaluations(self) -> int:
        """How many networks have been written and rewarded."""
        return self.step * self.options.candidates * self.options.networks

    def report(self, minutes_left: float) -> None:
        """Print the progress, with the mean accuracy on validation images of networks that the search so far writes."""
        networks = [written(self.result(), self.reported, seed, self.known) for seed in range(REPORTED_INITS)]
        accuracy = fmean(
            math.nan if each is None else score_after(self.reward.rounding, each, self.validation).accuracy_percent
            for each in networks
        )
        print(
            f"Evaluation {self.evaluations}/{self.evaluations // self.step * self.steps}: "
            f"Median Reward = {self.latest.median():.4f}, Validation Accuracy = {accuracy:5.2f}%, "
            f"Time Left = {minutes_left:.1f} min",
            flush=True,
        )

    def settings(self) -> dict:
        """What a search that goes on must share with the one that was interrupted."""
        names = (
            "seed", "reward", "model", "synthesizer", "evaluations", "candidates", "networks", "limit", "images",
            "deviation", "validation", "data",
        )  # fmt: skip
        return {name: str(getattr(self.options, name)) for name in names}

    def parts(self) -> dict:
        """What has a state_dict."""
        return {"search": self.search}
