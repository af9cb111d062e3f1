"""Ridge regression from sums over images: however many there are, memory does not grow, and processes can add theirs.

The images that are held out have sums of their own, so that what a regression makes of them is known without another
pass. As long as there are fewer images than features their rows are kept in the place of the sums, and the regression
is solved in the smaller of the two sizes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from universal.data.labelled import gathered, is_shared
from universal.model.algebra import gram

STRENGTHS = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)  # relative to the mean variance of a feature
USUAL = 0.1  # where no image is held out


class Regression(NamedTuple):
    """What maps features [n, d] to targets [n, t]."""

    weight: Tensor  # [d, t]
    bias: Tensor  # [t]

    def __call__(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight.T.contiguous(), self.bias)  # products of few columns are slow


class Solved(NamedTuple):
    """A ridge regression, and what solves another with the same features: a Cholesky factor of their Gram matrix, or
    with their `rows` of that of these."""

    regression: Regression
    factor: Tensor
    rows: Tensor | None  # [n, d], centred
    strength: Tensor

    def inverse(self, right: Tensor) -> Tensor:
        """The inverse of the features' Gram matrix with the strength on its diagonal, times [d, t]."""
        if self.rows is None:
            return torch.cholesky_solve(right, self.factor)
        return (right - self.rows.T @ torch.cholesky_solve(self.rows @ right, self.factor)) / self.strength

    def regress(self, rows: Tensor, targets: Tensor) -> Tensor:
        """The weight [d, t] of centred targets [n, t] of the images whose centred features [n, d] these are."""
        if self.rows is None:
            return torch.cholesky_solve(rows.T @ targets, self.factor)
        return rows.T @ torch.cholesky_solve(targets, self.factor)


class Sums:
    """The sums of features [n, d] and targets [n, t], or their rows as long as these are fewer than the features."""

    def __init__(self):
        self.count, self.rows = 0, []
        self.sums: tuple[Tensor, ...] | None = None  # of x x', x t', x, t and |t|^2

    def add(self, features: Tensor, targets: Tensor) -> None:
        self.count += len(features)
        self.rows.append((features, targets))
        if self.sums is not None or self.count > features.shape[1]:
            self.add_up()

    def add_up(self) -> "Sums":
        """Let sums take the place of the rows."""
        for x, t in self.rows:
            new = (gram(x.T), (t.T @ x).T, x.sum(0), t.sum(0), t.square().sum())
            self.sums = (
                new if self.sums is None else tuple(old.add_(more) for old, more in zip(self.sums, new, strict=True))
            )
        self.rows = []
        return self

    def and_those_of(self, other: "Sums") -> "Sums":
        both = Sums()
        both.count = self.count + other.count
        if self.sums is None and other.sums is None:
            both.rows = self.rows + other.rows
            return both if both.count <= both.rows[0][0].shape[1] else both.add_up()
        both.sums = tuple(map(torch.add, self.add_up().sums, other.add_up().sums))
        return both

    def over_processes(self) -> None:
        """Add up what all processes have found, or put their rows together as long as these are fewer than features."""
        counts = gathered((self.count, self.sums is None))
        self.count = sum(count for count, _ in counts)
        if all(has_rows for _, has_rows in counts) and self.count <= self.rows[0][0].shape[1]:
            device = self.rows[0][0].device
            parts = gathered([(x.cpu(), t.cpu()) for x, t in self.rows])
            self.rows = [(x.to(device), t.to(device)) for part in parts for x, t in part]
            return
        for tensor in self.add_up().sums:
            dist.all_reduce(tensor)

    def solver(self, intercept: bool) -> Callable[[float], "Solved"]:
        """What gives the ridge regression of a strength."""
        if self.sums is None:
            x, t = map(torch.cat, zip(*self.rows, strict=True))
            mean_x, mean_t = x.mean(0) * intercept, t.mean(0) * intercept
            x, right = x - mean_x, t - mean_t
            matrix = gram(x)
        else:
            products, cross, sum_x, sum_t, _ = self.sums
            mean_x, mean_t = sum_x / self.count * intercept, sum_t / self.count * intercept
            x, right, matrix = None, cross.addr(mean_x, sum_t, alpha=-1), products.addr(mean_x, sum_x, alpha=-1)
        diagonal = matrix.diagonal().clone()
        unit = diagonal.abs().sum() / len(mean_x) + 1e-12  # rounding may leave less than nothing of what is constant
        if not unit.isfinite():
            raise torch.linalg.LinAlgError("squares of features are infinite")

        def solve(strength: float) -> Solved:
            failed = True
            while failed:  # by rounding, where features are dependent
                matrix.diagonal().copy_(diagonal + strength * unit)
                factor, failed = torch.linalg.cholesky_ex(matrix)
                used, strength = strength * unit, 10 * strength
            weight = torch.cholesky_solve(right, factor)
            weight = weight if x is None else x.T @ weight
            return Solved(Regression(weight, mean_t - mean_x @ weight), factor, x, used)

        return solve

    def error(self, regression: Regression) -> float:
        """The mean squared error of a regression, summed over targets."""
        weight, bias = regression
        if self.sums is None:
            return sum((regression(x) - t).square().sum().item() for x, t in self.rows) / self.count
        products, cross, sum_x, sum_t, squares = self.sums
        total = ((products @ weight - 2 * cross) * weight).sum() + squares + self.count * bias.square().sum()
        return (total + 2 * bias @ (sum_x @ weight - sum_t)).item() / self.count


class Moments:
    """The sums of the images to fit, and of those held out."""

    def __init__(self):
        self.fitted, self.held_out = Sums(), Sums()

    def add(self, features: Tensor, targets: Tensor, held_out: Tensor) -> None:
        """Add features [n, d] and targets [n, t] of images, some of which are `held_out`, [n] bool."""
        self.fitted.add(features[~held_out], targets[~held_out])
        self.held_out.add(features[held_out], targets[held_out])

    def over_processes(self) -> "Moments":
        """Add up what all processes have found, if there are several."""
        if is_shared():
            self.fitted.over_processes()
            self.held_out.over_processes()
        return self

    def ridge(self, intercept: bool = True) -> tuple[Solved, float]:
        """The ridge regression of the fitted images whose strength is best for those held out; and that strength."""
        solve, usual = self.fitted.solver(intercept), STRENGTHS.index(USUAL)
        found = {usual: solve(USUAL)}
        if not self.held_out.count:
            return found[usual], USUAL
        errors = {usual: self.held_out.error(found[usual].regression)}
        for step in (1, -1):  # errors have one minimum over strengths
            index = usual + step
            while 0 <= index < len(STRENGTHS):
                found[index] = solve(STRENGTHS[index])
                errors[index] = self.held_out.error(found[index].regression)
                if not errors[index] < errors[index - step]:
                    break
                index += step
            if min(errors, key=errors.get) != usual:
                break
        best = min(errors, key=errors.get)
        return found[best], STRENGTHS[best]

    def ridge_of_all(self, strength: float, intercept: bool = True) -> Solved:
        """The ridge regression of all images, of the held-out ones as well."""
        return self.fitted.and_those_of(self.held_out).solver(intercept)(strength)
