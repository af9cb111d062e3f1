"""The search: it asks for candidates, is told what they are worth, and nothing else."""

import numpy as np
import torch
from torch import Tensor

from scripting import MissingPackage


def ranks(rewards: Tensor) -> Tensor:
    """The mean rank of each candidate, [candidates], by its rewards [candidates, networks]: the best has the least.

    Ranks make networks weigh alike, whatever their rewards are, and are the same for every monotone function of them.
    Equal rewards share their ranks.
    """
    others, own = rewards[None], rewards[:, None]
    return ((others > own).double() + 0.5 * (others == own).double()).sum(1).mean(1)


class CovarianceSearch:
    """The covariance matrix adaptation evolution strategy (Hansen and Ostermeier 2001), of the package `cmaes`.

    Its state is the rewards that it has been told: with its seed these make everything else again.
    """

    def __init__(self, dimension: int, candidates: int, deviation: float, seed: int):
        try:
            from cmaes import CMA  # an optional package
        except ImportError as error:
            raise MissingPackage("needs the package cmaes: pip install cmaes") from error
        self.candidates = candidates
        self.start = lambda: CMA(np.zeros(dimension), deviation, population_size=candidates, seed=seed)
        self.strategy, self.told, self.means = self.start(), [], []

    def ask(self) -> Tensor:
        """New candidates, [candidates, dimension]."""
        self.asked = np.stack([self.strategy.ask() for _ in range(self.candidates)])
        return torch.tensor(self.asked, dtype=torch.float32)

    def tell(self, rewards: Tensor) -> None:
        """What the candidates that were asked for are worth, [candidates, networks]."""
        self.told.append(rewards)
        self.strategy.tell(list(zip(self.asked, ranks(rewards).tolist(), strict=True)))
        self.means.append(torch.tensor(self.strategy.mean, dtype=torch.float32))

    @property
    def found(self) -> Tensor:
        """What the search has come to, [dimension]: the average of the later half of the generations' means, for these
        go to and fro where rewards are noisy (Polyak and Juditsky 1992)."""
        return torch.stack(self.means[len(self.means) // 2 :]).mean(0)

    def state_dict(self) -> dict[str, Tensor]:
        return {"told": torch.stack(self.told) if self.told else torch.zeros(0)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go through the search again, up to where it was saved. Raises ValueError for another number of candidates."""
        self.strategy, self.told, self.means = self.start(), [], []
        for rewards in state["told"]:
            if len(rewards) != self.candidates:
                raise ValueError(f"rewards of {len(rewards)} candidates, not of {self.candidates}")
            self.ask()
            self.tell(rewards)
