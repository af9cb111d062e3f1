"""Refitting the neurons of a layer, one vector or many of each image: what each should answer differently."""

import torch
import torch.nn.functional as F
from torch import Tensor

from universal.rules.activation import Activation
from universal.rules.moments import Solved

ROUNDS = 5


class ReadOut:
    """A softmax regression on the neurons of one layer, by a quadratic bound (Böhning 1992): steps of one solved
    system."""

    def __init__(self, neurons: Tensor, ridge: float = 1e-3):
        self.mean = neurons.mean(0)
        self.neurons = neurons - self.mean
        gram = self.neurons.T @ self.neurons / len(neurons)
        gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-12)
        self.factor = torch.linalg.cholesky(gram)

    def towards(self, errors: Tensor) -> Tensor:
        return torch.cholesky_solve((errors.T @ self.neurons).T / len(errors), self.factor)

    def fit(
        self, one_hot: Tensor, start: tuple[Tensor, Tensor] | None, steps: int = 3
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [neurons, classes], offsets, and the errors that are left."""
        weight, offset = start or (4 * self.towards(one_hot - one_hot.mean(0)), torch.zeros_like(one_hot[0]))
        for _ in range(steps):
            errors = one_hot - (self.neurons @ weight + offset).softmax(1)
            weight, offset = weight + 2 * self.towards(errors), offset + 2 * errors.mean(0)
        return weight, offset, one_hot - (self.neurons @ weight + offset).softmax(1)


def refitted(
    weight: Tensor, bias: Tensor, activation: Activation, features: Tensor, one_hot: Tensor, solved: Solved,
    deviation: Tensor, damping: float, rounds: int = ROUNDS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Neurons moved by ridge regression onto what each should answer differently, given a read-out of their means over
    places.

    `features` [n, places, d], divided by their `deviation` [d], have a ridge regression that is `solved`. With the
    slopes of the neurons and the read-out held, the changes that are wanted are linear in the weights. A strong ridge
    keeps them from learning images by heart; a round that does not lower the loss ends it.
    """
    rows = features.flatten(0, 1) / deviation
    centre = rows.mean(0)
    rows -= centre
    centre = centre * deviation

    def state(weight: Tensor, bias: Tensor, start: tuple[Tensor, Tensor] | None) -> tuple:
        before = F.linear(features, weight, bias)
        read_out = ReadOut(activation(before).mean(1))
        found = read_out.fit(one_hot, start)
        loss = F.cross_entropy(read_out.neurons @ found[0] + found[1], one_hot).item()
        return loss, weight, bias, before, found

    now, step = state(weight, bias, None), 2.0
    for _ in range(rounds):
        loss, weight, bias, before, (outgoing, offset, errors) = now
        slope = activation.slope(before)
        mean = slope.mean(1)
        curvature = (mean.T @ mean / len(mean)) * (outgoing @ outgoing.T) / 4
        curvature.diagonal().add_(damping * curvature.diagonal().mean() + 1e-12)
        change = ((errors @ outgoing.T)[:, None] * slope).flatten(0, 1)
        change = change @ torch.cholesky_inverse(torch.linalg.cholesky(curvature))  # of many rows faster than solving
        turn = (solved.regress(rows, change - change.mean(0)) / deviation[:, None]).T
        shift = change.mean(0) - turn @ centre
        while step > 0.05:
            new = state(weight + step * turn, bias + step * shift, (outgoing, offset))
            if new[0] < loss:
                break
            step /= 2
        else:
            break
        now, step = new, 1.5 * step
    return now[1], now[2]
