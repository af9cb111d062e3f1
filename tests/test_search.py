"""Trial and error with one's own images: other numbers and inits, and what is kept."""

import itertools
import random
import warnings

import pytest
import torch
from torch import nn

from universal import search, write
from universal.rules import search as searching
from universal.rules.looking import DoubtfulWeights
from universal.rules.numbers import BY_HAND


@pytest.fixture
def clock(monkeypatch) -> None:
    """A clock that moves on by a second whenever it is looked at, so that a search does not depend on the machine."""
    seconds = itertools.count()
    monkeypatch.setattr(searching.time, "perf_counter", lambda: next(seconds))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.ReLU(), nn.Linear(12, 10))


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(*pair) for pair in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_in_no_time_it_is_what_writing_gives(train_digits):
    images, labels = train_digits.images[:400], train_digits.labels[:400]
    found, usual = mlp(), mlp()
    accounts = search(found, images, labels, seed=3, seconds=1e-3)
    assert accounts.tries == 1
    assert accounts.held_out_percent == write(usual, images, labels, seed=3).held_out_percent
    assert same(found, usual)


def test_what_is_best_on_the_images_held_out_is_kept_and_found_again(train_digits, digits, clock):
    images, labels = train_digits.images[:400], train_digits.labels[:400]
    usual = write(mlp(), images, labels, seed=3)
    found, again = mlp(), mlp()
    accounts = search(found, images, labels, seed=3, seconds=45)
    search(again, images, labels, seed=3, seconds=45)
    assert accounts.tries > 8 and accounts.held_out == usual.held_out
    assert accounts.held_out_percent > usual.held_out_percent
    assert same(found, again) and not same(found, mlp())


class Scripted:
    """A `write` that finds these accuracies, or raises them, and leaves its number in the module."""

    def __init__(self, monkeypatch, *found):
        self.found, self.tried, self.numbers, self.seeds = found, 0, [], []
        monkeypatch.setattr(searching, "write", self)

    def __call__(self, module, data, seed, synthesizer, numbers):
        value = self.found[self.tried]
        self.tried += 1
        self.numbers.append(numbers)
        self.seeds.append(seed)
        with torch.no_grad():
            module[1].bias.fill_(self.tried)
        if isinstance(value, Exception):
            raise value
        warnings.warn(f"doubtful: {self.tried}", DoubtfulWeights, stacklevel=2)
        return searching.Accounts([], [], 0, 400, [], 80, value, 0.0)


def test_later_tries_are_around_the_best_and_only_its_doubts_are_told(train_digits, monkeypatch, clock):
    found = [50.0, 70.0, ValueError("numbers beyond"), 60.0, *[10.0] * 20]
    scripted, network = Scripted(monkeypatch, *found), mlp()
    with pytest.warns(DoubtfulWeights) as told:
        accounts = search(network, train_digits.images[:400], train_digits.labels[:400], seed=3, seconds=60)
    assert [str(one.message) for one in told] == ["doubtful: 2"]
    assert accounts.held_out_percent == 70 and (network[1].bias == 2).all()
    assert accounts.tries == scripted.tried > searching.EVERYWHERE + 2
    assert scripted.numbers[0] == BY_HAND and scripted.seeds[0] == 3 and len({*scripted.seeds}) == scripted.tried
    kept = [sum(map(float.__eq__, map(float, one), map(float, scripted.numbers[1]))) for one in scripted.numbers]
    first, later = kept[2 : searching.EVERYWHERE], kept[searching.EVERYWHERE :]
    assert max(first) <= 2 and sum(later) > 5 * len(later)


def test_it_ends_with_one_that_has_all_right(train_digits, monkeypatch, clock):
    scripted = Scripted(monkeypatch, 50.0, 100.0)
    with pytest.warns(DoubtfulWeights):
        search(mlp(), train_digits.images[:400], train_digits.labels[:400], seconds=1e9)
    assert scripted.tried == 2


def test_what_cannot_be_written_is_refused(train_digits, monkeypatch):
    Scripted(monkeypatch, ValueError("cannot be written"))
    with pytest.raises(ValueError, match="cannot be written"):
        search(mlp(), train_digits.images[:400], train_digits.labels[:400], seconds=9)


def test_without_an_image_held_out_nothing_is_written():
    network, usual = mlp(), mlp()
    with pytest.raises(ValueError, match="no image is held out"):
        search(network, torch.rand(4, 1, 28, 28), torch.tensor([0, 1, 2, 3]), seconds=9)
    assert same(network, usual)


def test_numbers_stay_what_they_can_be():
    draw = random.Random(0)
    for _ in range(200):
        numbers = searching.drawn(draw, BY_HAND, 1.0)
        assert all(value > 0 for value in numbers) and numbers.least_on <= numbers.most_on <= searching.LARGEST_SHARE
        assert numbers.active <= searching.LARGEST_SHARE
