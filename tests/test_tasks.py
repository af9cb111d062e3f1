"""Random tasks, and the numbers that rules have."""

import random

import pytest
import torch
from torch import Tensor, nn

from scripting import MNIST
from target_cnn import load_mnist
from universal.rules import synthesis
from universal.rules.numbers import BY_HAND, Numbers
from universal.rules.synthesis import write
from universal.training import tasks
from universal.training.architectures import Tokens
from universal.training.tasks import HELD_OUT_KINDS, KINDS, draw_task

ALL_KINDS = KINDS | HELD_OUT_KINDS


# ---- tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_task_of_every_kind_can_be_told_apart_by_more_than_chance(kind):
    found = []
    for seed in range(3):
        task = draw_task(random.Random(seed), 300, 200, {kind: ALL_KINDS[kind]})
        assert task.kind == kind and 2 <= task.classes <= 20
        assert len(task.train.labels) == 300 and len(task.test.labels) == 200
        assert set(task.train.labels.tolist()) == set(range(task.classes))
        channels, height, width = task.train.images.shape[1:]
        assert channels in (1, 3) and height == width and 16 <= height <= 32
        assert task.train.images.mean().abs() < 1e-4 and task.train.images.isfinite().all()
        network = nn.Sequential(
            nn.Conv2d(channels, 16, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
            nn.Linear(256, task.classes),
        )  # fmt: skip
        write(network, *task.train, seed=0)
        right = (network.eval()(task.test.images).argmax(1) == task.test.labels).double().mean().item()
        found.append(right * task.classes)  # 1 is chance
    assert max(found) > 1.5


def test_a_seed_makes_a_task_again_and_another_seed_another():
    first, again, other = (draw_task(random.Random(seed), 100, 50) for seed in (0, 0, 1))
    assert torch.equal(first.train.images, again.train.images) and torch.equal(first.test.labels, again.test.labels)
    assert first.train.images.shape != other.train.images.shape or not torch.equal(
        first.train.images, other.train.images
    )


def test_no_task_has_the_digits_or_fonts_that_are_held_out():
    images, where = tasks.digits()
    everything = load_mnist("train", MNIST)
    assert len(images) == len(everything.labels) - tasks.LAST_DIGITS == sum(map(len, where))
    assert not set(tasks.FONTS) & set(tasks.HELD_OUT_FONTS)


def test_a_letter_that_a_font_lacks_is_none():
    assert tasks.glyph("DejaVuSans", ord("a")).max() > 0.5
    assert tasks.glyph("DejaVuSans", 0x4E2D) is None  # a Chinese sign


# ---- numbers ---------------------------------------------------------------------------------------------------------


class FlatTokens(Tokens):
    """Whose classes read all tokens, each at its place."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.out = nn.Linear(16 * 32, 10)

    def forward(self, x):
        return self.out(self.blocks(self.patches(x).flatten(2).transpose(1, 2) + self.places).flatten(1))


def written_with(network: nn.Module, numbers: Numbers) -> Tensor:
    """All weights of a network that rules alone write for digits."""
    images, labels = (values[:800] for values in load_mnist("train", MNIST))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthesis, "better", lambda writings: writings[-1])
        write(network, images, labels, seed=0, numbers=numbers)
    return torch.cat([tensor.flatten() for tensor in network.state_dict().values()])


@pytest.fixture(scope="module")
def usual() -> list[tuple[nn.Module, Tensor]]:
    """Networks of dense layers, convolutions and tokens, and their weights by the numbers as they are."""
    convolutions = nn.Sequential(
        nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    dense = nn.Sequential(nn.Flatten(), nn.Linear(784, 40), nn.ReLU(), nn.Linear(40, 10))
    blocks = [nn.TransformerEncoderLayer(32, 2, 32, 0.0, batch_first=True)]
    transformer = FlatTokens((1, 28, 28), 7, 32, blocks, classes=10, places=True, class_token=False, norm=False)
    return [(network, written_with(network, BY_HAND)) for network in (dense, convolutions, transformer)]


@pytest.mark.parametrize("name", Numbers._fields)
def test_every_number_changes_what_some_network_gets(name, usual):
    factors = {"clusters": (10, 40)}.get(name, (0.1, 1.2))
    changed = [BY_HAND._replace(**{name: factor * getattr(BY_HAND, name)}) for factor in factors]
    networks = usual[2:] if name in ("places", "attention", "stream") else usual[:2]
    assert any(
        not torch.allclose(written_with(network, each), weights) for network, weights in networks for each in changed
    )
