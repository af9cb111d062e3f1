"""Evaluating the model: its networks, and Adam beside them."""

import json
import re
import sys

import pytest
from conftest import command
from torch import nn

from scripting import UserError
from universal import evaluate
from universal.evaluation.networks import EVALUATED, cnn
from universal.reading.graph import ComputationGraph

TRAINING = ["-m", "universal.train", "--probes", "20", "--batch-size", "32", "--validation", "500", "--device", "cpu"]
PROBES = "experts.0.task.probes"
CLASSES = (nn.AdaptiveAvgPool2d(1), nn.Flatten())  # what makes logits of a convolution's outputs


def test_evaluate_prints_its_tables_and_saves_everything(tmp_path):
    result = command(
        "-m", "universal.evaluate", "--inits", 2, "--steps", 2, "--epochs", 0, "--validation", 200,
        "--plot", tmp_path / "u.png", "--results", tmp_path / "u.json", "--device", "cpu",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for name in [*EVALUATED, "step 2", "ensemble of 2"]:
        assert name in result.stdout
    assert (tmp_path / "u.png").stat().st_size > 10_000
    assert (tmp_path / "u.json").exists()


def test_a_broken_record_of_adam_gets_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "RECORDED", tmp_path / "results.json")
    for content in ("{", "{}", json.dumps({"networks": [{"name": "TargetCNN", "adam": None}]})):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(UserError, match=r"results\.json: is missing or damaged"):
            evaluate.recorded_adam()


def test_what_adam_reaches_is_recorded_for_every_network():
    recorded = evaluate.recorded_adam()
    assert recorded.keys() == EVALUATED.keys()
    assert all(adam["epoch_percent"] > adam["random_first_steps_percent"] > 10 for adam in recorded.values())


def test_evaluate_holds_networks_against_adam(tmp_path, monkeypatch, capsys, digits):
    names = ["TargetCNN", "PyTorch example, older"]
    monkeypatch.setattr(evaluate, "EVALUATED", {name: EVALUATED[name] for name in names})
    monkeypatch.setattr(evaluate, "FIRST_STEPS", 3)
    monkeypatch.setattr(evaluate, "scoring_data", lambda *_: digits[:500])
    monkeypatch.setattr(evaluate, "training_data", lambda *_: digits[500:])
    outputs = ["--plot", tmp_path / "u.png", "--results", tmp_path / "u.json"]
    options = ["--inits", 2, "--steps", 1, "--epochs", 1, "--device", "cpu", *outputs]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, options)])
    evaluate.main()
    record = json.loads((tmp_path / "u.json").read_text())
    for name, network in zip(names, record["networks"], strict=True):
        adam = network["adam"]
        assert network["name"] == name
        assert adam["generated_first_steps_percent"] > 94 > adam["random_first_steps_percent"]
        assert adam["epoch_percent"] > adam["random_first_steps_percent"]
    assert record["first_steps"]["generated"] > record["first_steps"]["random"]
    assert re.search(r"Mean after 3 steps of Adam: [\d.]+% from generated weights", capsys.readouterr().out)


def test_a_wide_and_a_deep_network_are_built_as_named():
    assert len(ComputationGraph(cnn([16, 32, 32, 32, 32], 64)).layers) == 7
    residual = ComputationGraph(EVALUATED["residual network of 6 convolutions"]())
    assert sum(layer.is_convolution for layer in residual.layers) == 6
