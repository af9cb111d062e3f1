"""The measures of generalisation and the verdict, on cases where the answer is known by construction."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, printed

import evaluate_diffusion
import evaluate_generalization
from diffusion_model import rollout
from target_cnn import (
    Dataset,
    TargetCNN,
    checkpoint_path,
    flatten_weights,
    load_mnist,
    load_run,
    load_weights,
    random_init,
    score_weights,
    train_with_adam,
)
from universal.experiment import generators
from universal.experiment.verdict import (
    INTERPOLATES,
    NEW_NETWORKS,
    NO_NETWORKS,
    RECALLS,
    assess,
    break_even,
    compare,
    cost,
    decide,
    error_overlap,
    input_dependence,
    match_neurons,
    mean_pairwise_overlap,
    permute_neurons,
    random_orders,
    report,
    starting_points,
)
from universal.model.synthesizer import SYNTHESIZER
from universal.rules.synthesis import write


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_mnist("test", REPOSITORY / "data")[:1000]


@pytest.fixture(scope="module")
def recorded(experiment) -> torch.Tensor:
    return load_run(experiment / "checkpoints_weights_cnn")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def named(recorded: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"epoch {epoch}": weights for epoch, weights in enumerate(recorded)}


def sets(*members: list[int]) -> list[torch.Tensor]:
    return [torch.tensor([index in group for index in range(6)]) for group in members]


def test_permuted_neurons_compute_the_same(recorded, generator):
    permuted = permute_neurons(recorded[-1], random_orders(generator))
    assert not torch.allclose(permuted, recorded[-1])
    images = torch.randn(4, 1, 28, 28)
    outputs = [load_weights(TargetCNN(), weights)(images) for weights in (recorded[-1], permuted)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


def test_matching_undoes_a_permutation(recorded, generator):
    permuted = permute_neurons(recorded[-1], random_orders(generator))
    assert torch.equal(match_neurons(permuted, recorded[-1]), recorded[-1])
    noisy = permuted + 0.3 * permuted.square().mean().sqrt() * torch.randn(len(permuted), generator=generator)
    matched = match_neurons(noisy, recorded[-1])
    assert torch.nn.functional.cosine_similarity(matched, recorded[-1], dim=0) > 0.95


def test_matching_never_makes_it_worse(recorded):
    torch.manual_seed(3)
    weights = flatten_weights(TargetCNN())
    assert match_neurons(weights, recorded[-1]) @ recorded[-1] >= weights @ recorded[-1]


def test_error_overlap_is_intersection_over_union():
    first, second, none = sets([0, 1, 2], [2, 3], [])
    assert error_overlap(first, second) == 0.25
    assert error_overlap(first, first) == error_overlap(none, none) == 1
    assert error_overlap(first, none) == 0
    assert mean_pairwise_overlap([first, first, second]) == pytest.approx((1 + 0.25 + 0.25) / 3)
    assert mean_pairwise_overlap([first]) is None


def test_a_permuted_copy_is_found_out(recorded, generator):
    wrong = sets([0], [1, 2], [2, 3])
    copy = permute_neurons(recorded[1], random_orders(generator))
    found = compare(copy, wrong[1], named(recorded), wrong)
    assert found.nearest == "epoch 1"
    assert found.relative_l2 == pytest.approx(0, abs=1e-5) and found.cosine == pytest.approx(1, abs=1e-4)
    assert found.error_overlap == 1


def test_input_dependence_is_a_ratio_of_distances():
    starts = torch.tensor([[0.0, 0.0], [0.0, 2.0], [4.0, 0.0]])
    ends = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 3.0]])
    assert input_dependence(torch.stack([starts, ends])) == [0, 0, 0.5]


def test_the_starts_are_what_they_are_called(recorded):
    inits = [torch.randn(421_642) for _ in range(2)]
    starts = starting_points(inits, recorded[0], seed=0)
    assert list(starts)[:2] == ["unseen init 1", "unseen init 2"]
    assert not starts["all zeros"].any()
    assert starts["white noise"].std().item() == pytest.approx(inits[0].std().item(), rel=0.01)
    assert torch.equal(starts["unseen init 1, neurons permuted"].sort().values, inits[0].sort().values)
    again = starting_points(inits, recorded[0], seed=0)
    assert all(torch.equal(starts[name], again[name]) for name in starts)


@pytest.mark.parametrize(
    ("accuracy", "dependence", "overlap", "cosine", "verdict"),
    [
        (99, 0.0, 0.4, 0.2, RECALLS),
        (99, 1.0, 0.95, 0.2, RECALLS),
        (99, 1.0, 0.6, 0.2, INTERPOLATES),
        (99, 1.0, 0.4, 0.99, INTERPOLATES),
        (99, 1.0, 0.4, 0.2, NEW_NETWORKS),
        (50, 1.0, 0.0, 0.0, NO_NETWORKS),
    ],
)
def test_the_rules_of_the_verdict(accuracy, dependence, overlap, cosine, verdict):
    assert decide(accuracy, dependence, overlap, cosine).verdict == verdict


def constant(recorded, data):
    """A model that returns one blend of the checkpoints."""
    blend = recorded[1:].mean(dim=0)
    return lambda weights, steps: blend.expand_as(weights)


def nearest_checkpoint(recorded, data):
    """A model that returns the checkpoint nearest to its input, the init's own aside."""
    return lambda weights, steps: recorded[1:][torch.cdist(weights, recorded[1:]).argmin(dim=1)]


def checkpoint_plus_noise(recorded, data):
    """A model that adds noise, another one for every input, to a checkpoint."""
    scale = 0.4 * recorded[-1].square().mean().sqrt()
    return lambda weights, steps: recorded[-1] + scale * torch.randn_like(weights)


def fresh_training(recorded, data):
    """A model that trains a CNN from its input."""
    images = load_mnist("train", REPOSITORY / "data")[:2000]

    def train(weights):
        with torch.inference_mode(False), torch.enable_grad():
            model = load_weights(TargetCNN(), weights.clone()).to(memory_format=torch.channels_last)
            list(train_with_adam(model, images, 1, lr=0.002, batch_size=32, use_bf16=False))
        return flatten_weights(model)

    # Nothing can be trained from zeros.
    return lambda weights, steps: torch.stack([train(row) if row.any() else row for row in weights])


def identity(recorded, data):
    """A model that does nothing."""
    return lambda weights, steps: weights


@pytest.mark.parametrize(
    ("make_model", "verdict"),
    [
        (constant, RECALLS),
        (nearest_checkpoint, RECALLS),
        (checkpoint_plus_noise, INTERPOLATES),
        (fresh_training, NEW_NETWORKS),
        (identity, NO_NETWORKS),
    ],
)
def test_the_verdict_where_it_is_known(recorded, data, make_model, verdict):
    inits = []
    for seed in (10, 11):
        torch.manual_seed(seed)
        inits.append(flatten_weights(TargetCNN()))
    starts = starting_points(inits, recorded[0], seed=0)
    states = rollout(make_model(recorded, data), torch.stack(list(starts.values())), 1)
    first_scores = score_weights(states[:, 0], data)
    record = assess(starts, states, 2, first_scores, named(recorded), [], recorded[0], data, seed=0)
    assert record["verdict"]["verdict"] == verdict, record["verdict"]
    record["cost"] = cost({}, 0.1, None, 99.0)
    assert f"Verdict: {verdict} (input dependence" in report(record)


def test_the_cost_breaks_even_where_generating_has_become_cheaper():
    assert break_even(generator_seconds=10, seconds_to_generate=1, seconds_to_train=3) == 6
    assert break_even(generator_seconds=9, seconds_to_generate=1, seconds_to_train=3) == 5
    assert break_even(generator_seconds=10, seconds_to_generate=3, seconds_to_train=3) is None
    log = [{"epoch": epoch, "accuracy_percent": 97.0 + epoch, "seconds": float(epoch)} for epoch in range(4)]
    spent = {"recording": 6.0, "training": 1.0}
    reached = cost(spent, 0.5, log, accuracy_percent=99.0)
    assert reached["seconds_to_train"] == 3 and reached["accuracy_reached"]
    assert reached["cheaper_from_networks"] == 3  # 7 + 3 * 0.5 < 3 * 3
    beyond = cost(spent, 0.5, log, accuracy_percent=101)
    assert beyond["seconds_to_train"] == 6 and not beyond["accuracy_reached"]
    unknown = cost({}, 0.5, None, accuracy_percent=99.0)
    assert unknown["seconds_to_train"] is unknown["cheaper_from_networks"] is None


@pytest.fixture
def writes_from_few(monkeypatch, train_digits) -> list:
    """Written networks are written from few training images; how often, and with which options, these are asked for."""
    asked = []
    monkeypatch.setattr(generators, "training_data", lambda *options: asked.append(options) or train_digits[:500])
    return asked


def test_it_takes_the_diffusion_model_s_place(synthesizer, train_digits, writes_from_few):
    device = torch.device("cpu")
    options = argparse.Namespace(data=Path("somewhere"), validation=7, device=device)
    generator = generators.load_generator(SYNTHESIZER, 421_642, options)
    assert writes_from_few == [(Path("somewhere"), 7, device)]
    inits = torch.stack([random_init(seed) for seed in (1, 2)])
    states = rollout(generator, inits, 2)
    assert states.shape == (3, 2, 421_642)
    assert torch.equal(states[2], states[1])  # it writes but once
    torch.manual_seed(2)
    network = TargetCNN()
    write(network, *train_digits[:500], synthesizer=synthesizer)
    torch.testing.assert_close(states[1, 1], flatten_weights(network))
    assert not torch.equal(states[1, 0], states[1, 1])


def test_evaluate_generalization_finds_new_networks(experiment, tmp_path, monkeypatch, digits, writes_from_few):
    monkeypatch.setattr(evaluate_generalization, "scoring_data", lambda *_: digits[:1000])
    output = printed(
        evaluate_generalization.main, "--model", SYNTHESIZER, "--checkpoints", experiment / "checkpoints_weights_cnn",
        "--inits", 2, "--steps", 1, "--reference-epochs", 0, cwd=tmp_path,
    )  # fmt: skip
    assert "Verdict: generates new networks" in output
    assert re.search(r"\| generated, step 1 +\| 9\d\.\d\d(?: to 9\d\.\d\d)? +\| [\d.]+ to [\d.]+ ", output)
    record = json.loads((tmp_path / "generalization_results.json").read_text())
    methods = [network["method"] for network in record["networks"]]
    assert methods.count("generated, step 1") == 2 and "CNN trained from another seed" not in methods


def test_evaluate_diffusion_takes_the_synthesiser(tmp_path, monkeypatch, digits, writes_from_few):
    for epoch in (0, 1):
        torch.save(TargetCNN().state_dict(), checkpoint_path(tmp_path, epoch))
    options = ["--model", SYNTHESIZER, "--checkpoints", tmp_path, "--plot", tmp_path / "plot.png", "--steps", 1]
    monkeypatch.setattr(evaluate_diffusion, "scoring_data", lambda *_: digits[:500])
    output = printed(evaluate_diffusion.main, *options)
    assert float(re.search(r"\| 1 +\| ([\d.]+)% +\| [\d.]+% +\|", output)[1]) > 90
    assert (tmp_path / "plot.png").exists()
    assert len(writes_from_few) == 1
