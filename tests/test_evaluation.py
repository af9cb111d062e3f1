"""Evaluating the model: its networks, and Adam at its best rate beside them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_png, small_synthesizer

from target_cnn import score
from universal import evaluate
from universal.evaluation import baselines
from universal.evaluation.networks import EVALUATED, cnn, mlp
from universal.reading.graph import ComputationGraph


@pytest.fixture
def evaluated(tmp_path, monkeypatch, capsys, digits):
    """Evaluate networks on few images and steps: the record, what was printed, and the path of the picture."""

    def run(*names: str) -> tuple[dict, str, Path]:
        monkeypatch.setattr(baselines, "FIRST_STEPS", 1)
        monkeypatch.setattr(baselines, "HELD_OUT", 100)
        monkeypatch.setattr(baselines, "RATES", (0.001, 0.003))
        monkeypatch.setattr(evaluate, "EPOCHS", 1)
        monkeypatch.setattr(evaluate, "scoring_data", lambda *_: digits[:200])
        monkeypatch.setattr(evaluate, "training_data", lambda *_: digits[200:600])
        options = ["--networks", *names, "--inits", 2, "--plot", tmp_path / "u.png", "--results", tmp_path / "u.json"]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, options), "--device", "cpu"])
        evaluate.main()
        return json.loads((tmp_path / "u.json").read_text()), capsys.readouterr().out, tmp_path / "u.png"

    return run


def test_evaluate_holds_a_network_against_adam(evaluated):
    record, printed, picture = evaluated("MLP 784-256-128-10")
    (network,) = record["networks"]
    epoch, first = network["epoch"], network["first_steps"]
    assert network["minimum"] <= network["mean"] <= network["maximum"]
    assert network["mean"] > epoch["accuracy_percent"] > first["random"]["accuracy_percent"]
    assert first["written"]["accuracy_percent"] > 80 > first["random"]["accuracy_percent"]
    assert 0 < first["random"]["seconds"] < epoch["seconds"] and network["seconds"] > 0
    assert f"| MLP 784-256-128-10 | {network['mean']:.2f} (" in printed
    assert "Written at least as well as an epoch of Adam: 1 of 1" in printed
    assert record["target_cnn"] is None and "TargetCNN" not in printed
    assert_png(picture, 1350, 630)


def test_evaluate_trains_target_cnns_on_and_tells_them_apart(evaluated):
    record, printed, picture = evaluated("TargetCNN")
    starts = {row["start"]: row["accuracy_percent"] for row in record["target_cnn"]["training"]}
    assert starts["written"][0] > 95 and starts["random"][0] < 30 < starts["random"][-1]
    assert "| epoch 1 " in printed and "| 2 of 2 " in printed
    diversity = record["target_cnn"]["diversity"]
    assert 0 < diversity["error_overlap_of_written_with_each_other"] < 1
    assert 0 < diversity["largest_of_written_with_trained"] < 1
    assert -1 < diversity["mean_cosine_of_written_weights"] < 0.9
    assert diversity["ensemble_accuracy_percent"] > 95
    assert_png(picture, 2250, 630)


def test_evaluate_refuses_what_it_cannot_do_before_it_starts(refusal):
    assert "invalid choice: 'GPT'" in refusal(evaluate.main, "--networks", "GPT")
    assert refusal(evaluate.main, "--validation", 43_000).endswith("at most 42000, so that Adam has 100 batches")


def start(seed):
    torch.manual_seed(seed)
    return mlp([])


def test_the_rate_is_chosen_on_training_images_that_are_held_out(monkeypatch, digits):
    monkeypatch.setattr(baselines, "RATES", (1e-9, 1e-3))
    monkeypatch.setattr(baselines, "HELD_OUT", 100)
    monkeypatch.setattr(baselines, "FIRST_STEPS", 2)
    seen = []
    train_with_adam = baselines.train_with_adam

    def spy(network, data, *options, **more):
        seen.append(len(data.labels))
        return train_with_adam(network, data, *options, **more)

    monkeypatch.setattr(baselines, "train_with_adam", spy)
    train, data = digits[:600], digits[600:800]
    (first, epoch) = baselines.at_best_rates(start, train, data, seed=0, points=2)
    assert first["learning_rate"] == epoch["learning_rate"] == 1e-3
    assert epoch["accuracy_percent"] > first["accuracy_percent"]
    assert seen == [500, 500, 600]  # the rates are tried without those images, the best then has them too

    # What is held out says that the init is best, whatever the images that score say.
    untrained = start(0)
    labels = torch.cat([train.labels[:500], untrained(train.images[500:]).argmax(1)])
    (first, epoch) = baselines.at_best_rates(start, train._replace(labels=labels), data, seed=0, points=2)
    assert first["learning_rate"] == epoch["learning_rate"] == 1e-9
    assert epoch["accuracy_percent"] == score(untrained, data).accuracy_percent


def test_the_first_steps_of_an_epoch_are_those_of_a_short_training(monkeypatch, digits):
    monkeypatch.setattr(baselines, "FIRST_STEPS", 2)
    (short, _), *others = baselines.curve(start, digits[:500], digits[500:800], 1e-3, seed=0, points=1)
    (first, _), (epoch, _) = baselines.curve(start, digits[:500], digits[500:800], 1e-3, seed=0, points=2)
    assert not others
    assert torch.equal(short.wrong, first.wrong) and short.cross_entropy == first.cross_entropy
    assert epoch.cross_entropy < first.cross_entropy


def test_every_network_is_written_as_a_whole():
    synthesizer = small_synthesizer(0)
    for build in EVALUATED.values():
        network = build()
        before = {name: parameter.clone() for name, parameter in network.named_parameters()}
        assert not synthesizer.write(network).left
        assert not any(torch.equal(parameter, before[name]) for name, parameter in network.named_parameters())


def test_a_wide_and_a_deep_network_are_built_as_named():
    assert len(ComputationGraph(cnn([16, 32, 32, 32, 32], 64)).layers) == 7
    residual = ComputationGraph(EVALUATED["residual network of 6 convolutions"]())
    assert sum(layer.is_convolution for layer in residual.layers) == 6
