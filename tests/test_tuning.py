"""Random tasks, the numbers that rules have, and the search for them."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY, printed
from torch import nn

import scripting
from scripting import MNIST
from target_cnn import load_mnist
from universal import tune
from universal.rules.numbers import DEPENDENT, PROPERTIES, RANGES, Numbers, load_coefficients, numbers_of
from universal.rules.synthesis import write
from universal.training import tasks
from universal.training.architectures import Tokens
from universal.training.numbers import Trial, coefficients_of, try_all
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
    images, where = tasks.digits_apart()
    everything = load_mnist("train", MNIST)
    assert len(images) == len(everything.labels) - tasks.LAST_DIGITS == sum(map(len, where))
    assert not set(tasks.FONTS) & set(tasks.HELD_OUT_FONTS)


def test_a_letter_that_a_font_lacks_is_none():
    assert tasks.glyph("DejaVuSans", ord("a")).max() > 0.5
    assert tasks.glyph("DejaVuSans", 0x4E2D) is None  # a Chinese sign


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_without_coefficients_the_numbers_are_those_set_by_hand():
    assert numbers_of({}, 500, 0.5) == Numbers()
    for found, by_hand in zip(numbers_of(coefficients_of(torch.zeros(size())), 500, 0.5), Numbers(), strict=True):
        assert found == pytest.approx(by_hand)


def test_numbers_stay_in_their_ranges_and_depend_on_images_and_depth():
    for sign in (-1, 1):
        far = numbers_of({name: [sign * 1e3] for name in RANGES._fields}, 500, 0.5)
        assert all(0.999 * least < value < 1.001 * most for value, (least, most) in zip(far, RANGES, strict=True))
    coefficients = {"whitening": [0.0, 0.0, 1.0], "rank": [0.0, 1.0, 0.0]}
    first, last = (numbers_of(coefficients, 2000, depth) for depth in (0, 1))
    few, many = (numbers_of(coefficients, images, 0) for images in (50, 2000))
    assert first.whitening < last.whitening and first.rank == last.rank
    assert few.rank < many.rank and few.whitening == many.whitening


def test_all_committed_coefficients_are_of_numbers():
    for name, row in load_coefficients().items():
        assert name in RANGES._fields and len(row) == (len(PROPERTIES) if name in DEPENDENT else 1)


def size() -> int:
    return sum(len(PROPERTIES) if name in DEPENDENT else 1 for name in RANGES._fields)


class FlatTokens(Tokens):
    """Whose classes read all tokens, each at its place."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.out = nn.Linear(16 * 32, 10)

    def forward(self, x):
        return self.out(self.blocks(self.patches(x).flatten(2).transpose(1, 2) + self.places).flatten(1))


@pytest.mark.parametrize("name", RANGES._fields)
def test_every_number_changes_what_some_network_gets(name):
    torch.manual_seed(0)
    images, labels = (values[:800] for values in load_mnist("train", MNIST))
    convolutions = nn.Sequential(
        nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    dense = nn.Sequential(nn.Flatten(), nn.Linear(784, 40), nn.ReLU(), nn.Linear(40, 10))
    found = []
    blocks = [nn.TransformerEncoderLayer(32, 2, 32, 0.0, batch_first=True)]
    transformer = FlatTokens((1, 28, 28), 7, 32, blocks, classes=10, places=True, class_token=False, norm=False)
    for network in [transformer] if name in ("places", "attention", "stream") else [convolutions, dense]:
        for coefficients in ({}, {}, {name: [-3.0]}, {name: [3.0]}):
            write(network, images, labels, seed=0, coefficients=coefficients)
            found.append(torch.cat([tensor.flatten() for tensor in network.state_dict().values()]))
    usual, again, less, more = (found[each::4] for each in range(4))
    assert all(map(torch.equal, usual, again))
    assert any(not torch.allclose(a, b) for a, b in zip(usual * 2, less + more, strict=True))


# ---- the search ------------------------------------------------------------------------------------------------------

OPTIONS = (
    "--candidates", 4, "--networks", 1, "--reported", 1, "--processes", 1, "--report-every", 1, "--generations", 2,
    "--out", "numbers.json",
)  # fmt: skip


def test_a_search_that_was_killed_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    pytest.importorskip("cmaes")
    # As a user runs it: it would not end as long as a process that it has started holds its output.
    script = [sys.executable, "-m", "universal.tune", *map(str, OPTIONS), "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    ran = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=170)
    assert ran.returncode == 0 and ran.stderr == "" and "Generation 2/2" in ran.stdout
    assert not (tmp_path / "tuning.pth").exists()
    whole = json.loads((tmp_path / "numbers.json").read_text())
    assert set(whole) == set(RANGES._fields) and any(whole["rank"])

    save = scripting.save_training

    def killed(training):
        save(training)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scripting, "save_training", killed)
        printed(tune.main, *OPTIONS, cwd=tmp_path)
    (tmp_path / "numbers.json").unlink()
    assert "Going on from generation 1" in printed(tune.main, *OPTIONS, cwd=tmp_path)
    assert json.loads((tmp_path / "numbers.json").read_text()) == whole


def test_bad_options_are_refused(refusal, tmp_path):
    assert "--candidates" in refusal(tune.main, "--candidates", 1)
    assert ".json" in refusal(tune.main, "--out", "numbers.pth")


def test_a_network_that_cannot_be_written_ends_no_search(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("no")

    monkeypatch.setattr("universal.training.numbers.write", refuse)
    (share,) = try_all(Trial("0", torch.device("cpu"), held_out=False), [{}])
    assert share == 0
