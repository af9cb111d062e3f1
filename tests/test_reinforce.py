"""Trial and error: roundings, rewards, searches, the numbers that they set, and the command."""

import copy
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, small_synthesizer
from torch import nn

import scripting
from target_cnn import scoring_data, training_data
from universal import load_synthesizer
from universal.evaluation.networks import mlp
from universal.model.synthesizer import save_synthesizer
from universal.model.tuning import SLOPES, SPREAD
from universal.reading.graph import ComputationGraph, Logits
from universal.reinforce import candidates, evaluate, reinforcement
from universal.reinforce.__main__ import main
from universal.reinforce.candidates import draw_trials, try_candidate, with_tuning, written
from universal.reinforce.rewards import REWARDS, ROUNDINGS, Reward, round_weights
from universal.reinforce.search import CovarianceSearch, ranks
from universal.training.architectures import parameter_shapes

NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(784, 12), nn.ReLU(), nn.Linear(12, 10))

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(28, 8, batch_first=True), nn.Linear(8, 10)

    def forward(self, images):
        return self.out(self.rnn(images[:, 0])[0][:, -1])
"""

REWARDS_OF_A_USER = """
import torch

def alike(network):
    \"\"\"How alike the magnitudes of the first layer's weights are.\"\"\"
    assert torch.is_inference_mode_enabled()
    magnitudes = network[1].weight.abs()
    magnitudes *= 1.0  # a reward may change the network
    return float(magnitudes.mean() / magnitudes.std())

def fails(network):
    return network.width

def not_a_number(network):
    return float("nan")

def words(network):
    return "good"

def infinite(network):
    return float("-inf")

def noise(network):
    value = torch.rand(()).item()
    with open("noise.txt", "a") as stream:
        print(value, file=stream)
    return value
"""


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> Path:
    """A small untrained synthesiser to search from."""
    path = tmp_path_factory.mktemp("synthesizer") / "small.pth"
    save_synthesizer(small_synthesizer(0), path)
    return path


@pytest.fixture
def users(tmp_path, monkeypatch, digits, small_file) -> Path:
    """A directory with a user's network, rewards and synthesiser, in which the command runs, on few images."""
    shutil.copy(small_file, tmp_path / "small.pth")
    (tmp_path / "small_net.py").write_text(NET)
    (tmp_path / "my_reward.py").write_text(REWARDS_OF_A_USER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reinforcement, "training_data", lambda *_: digits[200:])
    monkeypatch.setattr(reinforcement, "scoring_data", lambda *_: digits[:200])
    return tmp_path


@pytest.fixture
def tunable(synthesizer):
    """The committed synthesiser, with the numbers that a search sets. To be changed."""
    return with_tuning(synthesizer).eval()


# ---- roundings -------------------------------------------------------------------------------------------------------


def test_roundings_leave_the_values_that_their_names_say():
    weight = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    rounded = {name: rounding(weight) for name, rounding in ROUNDINGS.items()}
    for neuron in range(5):
        assert len(rounded["ternary"][neuron].unique()) == 3
        assert len(rounded["binary"][neuron].unique()) == 2
        assert 3 < len(rounded["int4"][neuron].unique()) <= 15
    assert (rounded["pruned80"] == 0).float().mean() == pytest.approx(0.8, abs=0.01)
    for name, result in rounded.items():
        assert result.shape == weight.shape
        assert ((result == 0) | (result.sign() == weight.sign())).all(), name


@pytest.mark.parametrize("name", ROUNDINGS)
def test_to_round_again_changes_nothing(name):
    once = ROUNDINGS[name](torch.randn(5, 40, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(ROUNDINGS[name](once), once)


def test_ternary_is_as_in_li_et_al():
    # The mean magnitude is 0.5, so that what is below 0.35 goes; the mean of the others is 0.8.
    rounded = ROUNDINGS["ternary"](torch.tensor([[1.0, -0.6, 0.3, -0.1]]))
    assert torch.allclose(rounded, torch.tensor([[0.8, -0.8, 0.0, 0.0]]))


def test_a_neuron_of_zeros_stays_one():
    for rounding in ROUNDINGS.values():
        assert torch.equal(rounding(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_only_matrices_are_rounded():
    network = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    after = round_weights(network, ROUNDINGS["binary"]).state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["0.weight"]


# ---- the numbers that are searched -----------------------------------------------------------------------------------


def test_without_offsets_nothing_changes(synthesizer, tunable):
    torch.manual_seed(0)
    for network in (nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4056, 10)), mlp([9])):
        expected = copy.deepcopy(synthesizer.synthesize(network, 1).state_dict())
        for name, tensor in tunable.synthesize(network, 1).state_dict().items():
            assert torch.allclose(tensor, expected[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("flat", [0, 3])
def test_a_compander_is_odd_and_monotone_and_flat_where_its_slope_is_small(tunable, flat):
    layer = ComputationGraph(mlp([4])).layers[0]
    tuning = tunable.tuning
    weight, inputs = torch.linspace(-3, 3, 4 * 784).view(4, 784), torch.randn(5, 784)
    with torch.no_grad():
        assert torch.allclose(tuning.spread(layer, weight, inputs), weight, rtol=1e-4)
        tuning.offsets[tuning.names.index(SLOPES[flat]), 0] = -5
        companded = tuning.spread(layer, weight, inputs)
        assert torch.allclose(tuning.spread(layer, -weight, inputs), -companded)
    order = weight.flatten(1).argsort(1)
    steps = companded.gather(1, order).diff()
    assert (steps >= 0).all()
    assert 0.005 < steps.min() / steps.max() < 0.01  # e ** -5


def test_a_compander_can_bring_every_layer_near_three_values(tunable):
    network = nn.Sequential(nn.Conv2d(1, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 8, 3, 2), nn.ReLU(), nn.Flatten(),
                            nn.Linear(288, 20), nn.ReLU(), nn.Linear(20, 10))  # fmt: skip

    def errors():
        weights = [parameter for parameter in tunable.synthesize(network, 1).parameters() if parameter.dim() > 1]
        return [((ROUNDINGS["ternary"](weight) - weight).norm() / weight.norm()).item() for weight in weights]

    before = errors()
    with torch.no_grad():
        tunable.tuning.offsets[-len(SLOPES) :, 0] = -5.0
        tunable.tuning.offsets[tunable.tuning.names.index("slope_from_0.5"), 0] = 2.0
    after = errors()
    assert max(after) < 0.25
    assert all(error < 0.7 * old for error, old in zip(after, before, strict=True))


def sizes_of(weight: torch.Tensor) -> torch.Tensor:
    return weight.flatten(1).abs().mean(1)


@pytest.mark.parametrize("groups", [1, 2])
def test_evenness_makes_the_neurons_of_hidden_layers_equally_large(tunable, groups):
    network = nn.Sequential(nn.Conv2d(1, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, groups=groups), nn.ReLU(),
                            nn.Flatten(), nn.Linear(288, 20), nn.ReLU(), nn.Linear(20, 10))  # fmt: skip
    spreads = []
    for evenness in (-1.0, 0.0, 1.0):
        with torch.no_grad():
            tunable.tuning.offsets[tunable.tuning.names.index("evenness"), 0] = evenness
        sizes = [
            sizes_of(parameter) for parameter in tunable.synthesize(network, 1).parameters() if parameter.dim() > 1
        ]
        spreads.append([(size.std() / size.mean()).item() for size in sizes[:-1]])
    further, before, equal = spreads
    assert max(equal) < 1e-3 < min(before)
    assert all(far > 1.5 * near for far, near in zip(further, before, strict=True))


def test_a_neuron_that_is_made_larger_keeps_its_mean_in_deviations(tunable):
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 30), nn.ReLU(), nn.Linear(30, 10))

    def means():
        with torch.no_grad():
            responses = tunable.synthesize(network, 1)[:2](tunable.task.probes)
        return responses.mean(0) / responses.std(0)

    before = means()
    with torch.no_grad():
        tunable.tuning.offsets[tunable.tuning.names.index("evenness"), 0] = 2.0
    torch.testing.assert_close(means(), before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("groups", [1, 2])
def test_relevance_gives_large_inputs_large_weights(tunable, groups):
    graph = ComputationGraph(
        nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3, groups=groups), nn.Flatten(), nn.Linear(4608, 10))
    )
    layer, tuning = graph.layers[1], tunable.tuning
    inputs = torch.randn(50, 6, 9, 9) * torch.arange(1, 7).view(6, 1, 1)
    weight = torch.ones(8, 6 // groups, 3, 3)
    with torch.no_grad():
        tuning.offsets[tuning.names.index("relevance"), 1] = 1.0  # of convolutions
        spread = tuning.spread(layer, weight, inputs)
    for neuron in range(8):
        first = 0 if groups == 1 or neuron < 4 else 3  # what each half of the neurons reads
        read = torch.arange(1.0, 7.0)[first : first + 6 // groups]
        torch.testing.assert_close(sizes_of(spread[neuron]), read / 3.5, rtol=0.1, atol=0.01)


def test_an_offset_is_for_its_kind_of_layer_alone(tunable):
    graph = ComputationGraph(mlp([9, 8]))
    before = copy.deepcopy(tunable.synthesize(graph.module, 1).state_dict())
    with torch.no_grad():
        tunable.tuning.offsets[tunable.tuning.names.index("slope_from_1.0"), 3] = 2.0
    after = tunable.synthesize(graph.module, 1).state_dict()
    ratio = {name: (after[name] / before[name]).flatten() for name in before}
    assert ratio["1.weight"].std() < 1e-3 < ratio[graph.last.weight.name].std()  # other layers are only rescaled


# ---- trials ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_is_a_number_of_a_small_network(tunable, digits, name):
    trials = draw_trials(random.Random(0), lambda: mlp([16]), digits, networks=2, images=200)
    offsets = torch.zeros_like(tunable.tuning.offsets)
    good = try_candidate(tunable, offsets, trials, REWARDS[name])
    assert len(good) == 2 and good == try_candidate(tunable, offsets, trials, REWARDS[name])
    noise = 2 * torch.randn(offsets.shape, generator=torch.Generator().manual_seed(0))
    assert sum(good) > sum(try_candidate(tunable, noise, trials, REWARDS[name]))


def test_a_rounding_is_rewarded_for_the_network_as_it_is_and_rounded(digits):
    network = mlp([16])
    with torch.no_grad():
        logits = [network(digits.images), round_weights(copy.deepcopy(network), ROUNDINGS["binary"])(digits.images)]
    expected = -sum(F.cross_entropy(each, digits.labels).item() for each in logits) / 2
    assert REWARDS["binary"].of(Logits(ComputationGraph(network)), digits) == pytest.approx(expected, rel=1e-3)


def test_networks_that_break_are_worth_nothing_and_never_rewarded(tunable, digits):
    trials = draw_trials(random.Random(0), lambda: mlp([16]), digits, networks=1, images=20)
    offsets = torch.zeros_like(tunable.tuning.offsets)
    offsets[tunable.tuning.names.index("slope_from_0.0")] = 1e3  # whose exponential is infinite
    never = Reward(lambda network, images: pytest.fail("rewarded"))
    assert try_candidate(tunable, offsets, trials, never) == [-float("inf")]


def test_random_architectures_are_none_of_those_that_are_evaluated(digits, monkeypatch):
    def shapes():
        drawn = draw_trials(random.Random(1), None, digits, networks=3, images=5)
        return [parameter_shapes(trial.graph.module) for trial in drawn]

    first, *others = shapes()
    assert first not in others
    monkeypatch.setattr(candidates, "EVALUATED_SHAPES", [first])
    assert first not in shapes()


def test_a_reward_cannot_spoil_what_is_left_at_its_init(tunable):
    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act, self.out = nn.Linear(784, 8), nn.PReLU(8), nn.Linear(8, 10)

        def forward(self, images):
            return self.out(self.act(self.fc(images.flatten(1))))

    graph = ComputationGraph(Slope())
    network = written(tunable, graph, seed=0)
    with torch.no_grad():
        network.module.act.weight.zero_()
    assert (graph.module.act.weight == 0.25).all()


# ---- searches --------------------------------------------------------------------------------------------------------


def test_the_search_finds_a_known_best():
    pytest.importorskip("cmaes")
    search, best = CovarianceSearch(6, 12, deviation=0.5, seed=0), torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0, -0.5])
    for _ in range(150):
        search.tell(-(search.ask() - best).square().sum(1)[:, None].double())
    assert (search.mean - best).norm() < 0.3


def test_ranks_are_shared_by_equals_and_blind_to_scale():
    rewards = torch.tensor([[3.0, -1e9], [1.0, 5.0], [1.0, -1e9]])
    assert ranks(rewards).tolist() == [(0.5 + 2) / 2, (2 + 0.5) / 2, (2 + 2) / 2]
    assert torch.equal(ranks(rewards), ranks(rewards.exp() + 7))
    assert ranks(torch.tensor([[0.0], [-float("inf")]])).tolist() == [0.5, 1.5]


# ---- the command -----------------------------------------------------------------------------------------------------


def options_of(users: Path, name: str, reward: str = "my_reward.py:alike") -> list[str]:
    return [
        "--reward", reward, "--synthesizer", "small.pth", "--model", "small_net.py:Net",
        "--evaluations", "24", "--candidates", "4", "--networks", "1", "--images", "50",
        "--validation", "200", "--report-every", "2",
        "--out", str(users / f"{name}.pth"), "--checkpoint", str(users / f"{name}.state.pth"),
    ]  # fmt: skip


def command(monkeypatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["reinforce", *options, "--device", "cpu"])
    main()


def offsets_in(path: Path) -> torch.Tensor:
    return load_synthesizer(path).tuning.offsets.detach()


def test_a_users_reward_rises_and_a_killed_search_goes_on_bit_for_bit(users, monkeypatch, capsys):
    pytest.importorskip("cmaes")
    command(monkeypatch, *options_of(users, "whole"))
    printed = capsys.readouterr().out
    rewards = [float(line.split("Median Reward = ")[1].split(",")[0]) for line in printed.splitlines()[:3]]
    assert rewards[0] < rewards[2]
    assert printed.startswith("Evaluation 8/24: ")

    save = scripting.save_training

    def killed(training):
        save(training)
        raise KeyboardInterrupt

    monkeypatch.setattr(scripting, "save_training", killed)
    with pytest.raises(KeyboardInterrupt):
        command(monkeypatch, *options_of(users, "killed"))
    monkeypatch.setattr(scripting, "save_training", save)
    assert not (users / "killed.pth").exists()
    command(monkeypatch, *options_of(users, "killed"))
    assert "Going on from generation 2" in capsys.readouterr().out
    assert not (users / "killed.state.pth").exists()
    assert torch.equal(offsets_in(users / "killed.pth"), offsets_in(users / "whole.pth"))
    whole = offsets_in(users / "whole.pth")
    assert whole.abs().max() > 0.01
    assert (whole[: -len(SPREAD)] == 0).all()  # without --scalars

    further = ["--synthesizer", "whole.pth", "--deviation", "1e-6", "--evaluations", "4", "--scalars"]
    command(monkeypatch, *options_of(users, "further"), *further)
    moved = offsets_in(users / "further.pth") - whole
    assert 0 < moved.abs().max() < 1e-4
    assert (moved[: -len(SPREAD)] != 0).any()


def test_candidates_of_a_generation_share_their_randomness_and_no_two_generations_do(users, monkeypatch):
    pytest.importorskip("cmaes")
    command(monkeypatch, *options_of(users, "noise", "my_reward.py:noise"))
    values = (users / "noise.txt").read_text().split()
    generations = [values[start : start + 4] for start in range(0, 24, 4)]
    assert len(values) == 24
    assert all(len(set(generation)) == 1 for generation in generations)
    assert len(set(values)) == 6


def test_two_processes_find_what_one_finds(users, monkeypatch):
    pytest.importorskip("cmaes")
    options = [*options_of(users, "both", "ternary"), "--evaluations", "8"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {  # as torchrun sets it
        "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "universal.reinforce", *options, "--device", "cpu"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]  # fmt: skip
    printed = [process.communicate(timeout=170) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert "Evaluation 8/8" in printed[0][0] and not printed[1][0]  # one process reports
    monkeypatch.setattr(reinforcement, "training_data", training_data)  # as the two have them
    monkeypatch.setattr(reinforcement, "scoring_data", scoring_data)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        command(monkeypatch, *options_of(users, "alone", "ternary"), "--evaluations", "8")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(offsets_in(users / "both.pth"), offsets_in(users / "alone.pth"))


@pytest.mark.parametrize(
    "reward, line",
    [
        ("my_reward.py:fails", "(my_reward.py, line 12: return network.width)"),
        ("my_reward.py:not_a_number", "returned NaN (my_reward.py, line 14: def not_a_number(network):)"),
        ("my_reward.py:words", "ValueError: could not convert string to float"),
        ("my_reward.py:missing", "my_reward.py has no callable missing"),
        ("their_reward.py:reward", "their_reward.py is no file"),
        ("quaternary", "give one of ternary, binary, int4, pruned80, accuracy, or my_reward.py:function"),
    ],
)
def test_rewards_that_fail_get_one_line(users, refusal, reward, line):
    pytest.importorskip("cmaes")
    assert line in refusal(main, *options_of(users, "none", reward))
    assert not (users / "none.pth").exists()


def test_a_model_that_cannot_be_read_gets_one_line(users, refusal):
    pytest.importorskip("cmaes")
    options = [option.replace("small_net.py:Net", "small_net.py:Recurrent") for option in options_of(users, "none")]
    assert refusal(main, *options).startswith("--model small_net.py:Recurrent: gru")


def test_fewer_evaluations_than_a_generation_takes_get_one_line(users, refusal):
    pytest.importorskip("cmaes")
    line = refusal(main, *options_of(users, "none"), "--evaluations", 3)
    assert line == "--evaluations 3: --candidates times --networks, 4, are needed"


def test_an_infinite_reward_is_only_a_bad_one(users, monkeypatch):
    pytest.importorskip("cmaes")
    command(monkeypatch, *options_of(users, "infinite", "my_reward.py:infinite"))
    assert (users / "infinite.pth").exists()


def test_a_state_that_is_broken_or_of_other_options_is_not_taken(users, refusal):
    pytest.importorskip("cmaes")
    (users / "x.state.pth").write_bytes(b"not a state")
    assert "x.state.pth: is damaged" in refusal(main, *options_of(users, "x"))
    torch.save({"settings": {"seed": "1"}}, users / "x.state.pth")
    assert "x.state.pth: is of a training with other options" in refusal(main, *options_of(users, "x"))


def test_a_missing_package_is_named(users, refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "cmaes", None)
    assert refusal(main, *options_of(users, "x")) == "needs the package cmaes: pip install cmaes"


def test_the_gain_is_measured_before_and_after(users, monkeypatch, capsys, tunable, digits):
    with torch.no_grad():
        tunable.tuning.offsets[-3:, 0] = -3.0  # large weights are alike: nearly ternary
    save_synthesizer(tunable, users / "after.pth")
    monkeypatch.setattr(evaluate, "NETWORKS", ("TargetCNN", "half width"))
    monkeypatch.setattr(evaluate, "scoring_data", lambda *_: digits[:200])
    options = ["--reward", "ternary", "--improved", "after.pth", "--inits", "1"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *options, "--device", "cpu"])
    evaluate.main()
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in capsys.readouterr().out.splitlines()}
    before, after = (float(cell.split()[0]) for cell in rows["TargetCNN", "ternary"].split("|")[3:5])
    assert after != before > 30
    full = [float(cell.split()[0]) for cell in rows["TargetCNN", "full precision"].split("|")[3:5]]
    assert min(full) > 80
    assert ("half width", "ternary") in rows
