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
from conftest import REPOSITORY
from torch import nn

import scripting
from target_cnn import Dataset, TargetCNN, score, train_with_adam
from universal import GraphWeightSynthesizer, load_synthesizer
from universal.data.splits import split_images
from universal.evaluation.from_data import DataSet
from universal.evaluation.networks import mlp
from universal.model.synthesizer import save_synthesizer
from universal.model.tuning import NUMBERS, SLOPES, Tuning
from universal.reading.graph import ComputationGraph, Logits
from universal.reinforce import candidates, evaluate, reinforcement
from universal.reinforce.__main__ import main, parse_options
from universal.reinforce.candidates import draw_trials, try_candidate, with_tuning, written
from universal.reinforce.rewards import REWARDS, ROUNDINGS, Reward, round_weights, score_after
from universal.reinforce.search import CovarianceSearch, ranks
from universal.roads import TERNARY
from universal.rules.synthesis import write
from universal.training.architectures import parameter_shapes

NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(784, 12), nn.ReLU(), nn.Linear(12, 10))

class Few(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(784, 5))

class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(784, 10)

    def forward(self, images):
        return self.out(images.flatten(1) / (len(images) == 2))

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
    torch.manual_seed(0)
    save_synthesizer(GraphWeightSynthesizer(dimension=16, concepts=16, rank=4, hidden=32), path)
    return path


@pytest.fixture
def users(tmp_path, monkeypatch, digits, small_file) -> Path:
    """A directory with a user's network, rewards and synthesiser, in which the command runs, on few images."""
    shutil.copy(small_file, tmp_path / "small.pth")
    (tmp_path / "small_net.py").write_text(NET)
    (tmp_path / "my_reward.py").write_text(REWARDS_OF_A_USER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reinforcement, "split_images", lambda *_: (digits[200:], digits[:200]))
    monkeypatch.setattr(reinforcement, "REPORTED_INITS", 1)
    return tmp_path


@pytest.fixture
def tunable(synthesizer):
    """The committed synthesiser, with the numbers that a search sets. To be changed."""
    return with_tuning(synthesizer).eval()


@pytest.fixture
def tuning() -> Tuning:
    """The numbers that a search sets, alone and without gradients. To be changed."""
    return Tuning().requires_grad_(False)


def small_network(groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, groups=groups), nn.ReLU(),
                         nn.Flatten(), nn.Linear(288, 20), nn.ReLU(), nn.Linear(20, 10))  # fmt: skip


def weights_by(synthesizer: GraphWeightSynthesizer, network: nn.Module, data: Dataset) -> dict[str, torch.Tensor]:
    """What is written from a few of the images, by name."""
    write(network, *data[:200], seed=1, synthesizer=synthesizer)
    return copy.deepcopy(network.state_dict())


def set_offset(tuning: Tuning, name: str, value: float, kind: int = 0) -> None:
    with torch.no_grad():
        tuning.offsets[NUMBERS.index(name), kind] = value


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


def test_without_offsets_nothing_changes(synthesizer, tunable, digits):
    network = small_network()
    expected = weights_by(synthesizer, network, digits)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_by(tunable, network, digits).items())


def test_a_frozen_layer_is_not_tuned(tunable, digits):
    network = small_network()
    network[0].weight.requires_grad_(False)
    before = weights_by(tunable, network, digits)
    set_offset(tunable.tuning, "slope_from_0.5", 2.0, kind=2)  # of the first layer
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_by(tunable, network, digits).items())


@pytest.mark.parametrize("flat", [0, 3])
def test_a_compander_is_odd_and_monotone_and_flat_where_its_slope_is_small(tuning, flat):
    layer = ComputationGraph(mlp([4])).layers[0]
    weight, inputs = torch.linspace(-3, 3, 4 * 784).view(4, 784), torch.randn(5, 784)
    assert torch.allclose(tuning.spread(layer, weight, inputs), weight, rtol=1e-4)
    set_offset(tuning, SLOPES[flat], -5)
    companded = tuning.spread(layer, weight, inputs)
    assert torch.allclose(tuning.spread(layer, -weight, inputs), -companded)
    order = weight.flatten(1).argsort(1)
    steps = companded.gather(1, order).diff()
    assert (steps >= 0).all()
    assert 0.005 < steps.min() / steps.max() < 0.01  # e ** -5


def near_three_values(tuning: Tuning) -> None:
    with torch.no_grad():
        tuning.offsets[-len(SLOPES) :, 0] = -5.0
    set_offset(tuning, "slope_from_0.5", 2.0)


def test_a_compander_can_bring_every_layer_near_three_values(tunable, digits):
    network = small_network()

    def errors():
        weights = [weight for weight in weights_by(tunable, network, digits).values() if weight.dim() > 1]
        return [((ROUNDINGS["ternary"](weight) - weight).norm() / weight.norm()).item() for weight in weights]

    before = errors()
    near_three_values(tunable.tuning)
    after = errors()
    assert max(after) < 0.25
    assert all(error < 0.7 * old for error, old in zip(after, before, strict=True))


def test_what_is_written_afterwards_makes_up_for_a_tuned_layer(tunable, digits):
    """Rounded afterwards, the same hidden layers, of few neurons, spoil the classes."""
    network, data = mlp([16, 16]), digits[:500]

    def right(network):
        return (network(data.images).argmax(1) == data.labels).float().mean().item()

    write(network, *data, seed=1, synthesizer=tunable)
    rounded = copy.deepcopy(network)
    for place in (1, 3):
        rounded[place].weight.data.copy_(ROUNDINGS["ternary"](rounded[place].weight.data))
    before, spoiled = right(network), right(rounded)
    near_three_values(tunable.tuning)
    tunable.tuning.offsets.data[:, 3] = -tunable.tuning.offsets.data[:, 0]  # but of the last layer
    write(network, *data, seed=1, synthesizer=tunable)
    assert right(network) > (before + spoiled) / 2


def test_a_norm_is_written_for_what_the_tuned_layer_gives(tunable, digits):
    network = nn.Sequential(nn.Conv2d(1, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, 2), nn.ReLU(),
                            nn.Flatten(), nn.Linear(144, 10))  # fmt: skip
    set_offset(tunable.tuning, "evenness", -4.0)
    weights_by(tunable, network, digits)
    first, outputs = (part.eval()(digits[:200].images) for part in (network[0], network[:2]))
    spreads = [values.movedim(1, 0).flatten(1).std(1) for values in (first, outputs)]
    assert spreads[0].max() > 1.5 * spreads[0].min() and spreads[1].max() < 1.2 * spreads[1].min()


def responses_of(layer, inputs, weight, bias) -> torch.Tensor:
    return layer(inputs, weight, bias).movedim(layer.axis, -1).flatten(0, -2)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize("evenness", [0.0, 2.0])
def test_responses_keep_their_means_and_deviations(tuning, digits, place, evenness):
    graph = ComputationGraph(small_network(2))
    layer, images = graph.layers[place], digits[:100].images
    inputs = graph.inputs_of(layer, images, graph.weights())
    weight, bias = (part.of(graph.weights()) for part in (layer.weight, layer.bias))
    weight = weight * torch.arange(1, 1 + len(weight)).view(-1, *[1] * (weight.dim() - 1))
    for number, value in (("relevance", 1.0), (SLOPES[2], 2.0), (SLOPES[5], -2.0), ("evenness", evenness)):
        set_offset(tuning, number, value)
    before = responses_of(layer, inputs, weight, bias)
    after = responses_of(layer, inputs, *tuning.tuned(layer, inputs, weight, bias))
    alone = responses_of(layer, inputs, tuning.tuned(layer, inputs, weight, None)[0], None)
    assert not torch.allclose(after, before, rtol=0.1, atol=0.1 * before.std().item())
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(alone.std(0), after.std(0), **close)
    if layer.last:
        torch.testing.assert_close(after.mean(0), before.mean(0), **close)
        torch.testing.assert_close(after.var(0).mean(), before.var(0).mean(), **close)
        ratio = after.std(0) / before.std(0)
        assert ratio.max() > 1.05 * ratio.min()
        return
    torch.testing.assert_close(after.mean(0) / after.std(0), before.mean(0) / before.std(0), **close)
    ratio = after.std(0) / before.std(0)
    assert ratio.max() > 2 * ratio.min() if evenness else torch.allclose(ratio, torch.ones(()), atol=1e-3)


def sizes_of(weight: torch.Tensor) -> torch.Tensor:
    return weight.flatten(1).abs().mean(1)


@pytest.mark.parametrize("groups", [1, 2])
def test_evenness_makes_the_neurons_of_hidden_layers_equally_large(tunable, digits, groups):
    network = small_network(groups)
    spreads = []
    for evenness in (-1.0, 0.0, 1.0):
        set_offset(tunable.tuning, "evenness", evenness)
        sizes = [sizes_of(weight) for weight in weights_by(tunable, network, digits).values() if weight.dim() > 1]
        spreads.append([(size.std() / size.mean()).item() for size in sizes[:-1]])
    further, before, equal = spreads
    assert max(equal) < 1e-3 < min(before)
    assert all(far > 1.5 * near for far, near in zip(further, before, strict=True))


@pytest.mark.parametrize("groups", [1, 2])
def test_relevance_gives_large_inputs_large_weights(tuning, groups):
    layer = ComputationGraph(small_network(groups)).layers[1]
    inputs = torch.randn(50, 6, 9, 9) * torch.arange(1, 7).view(6, 1, 1)
    weight = torch.ones(8, 6 // groups, 3, 3)
    set_offset(tuning, "relevance", 1.0, kind=1)  # of convolutions
    spread = tuning.spread(layer, weight, inputs)
    for neuron in range(8):
        first = 0 if groups == 1 or neuron < 4 else 3  # what each half of the neurons reads
        read = torch.arange(1.0, 7.0)[first : first + 6 // groups]
        torch.testing.assert_close(sizes_of(spread[neuron]), read / 3.5, rtol=0.1, atol=0.01)


def test_an_offset_is_for_its_kind_of_layer_alone(tunable, digits):
    network = mlp([9, 8])
    before = weights_by(tunable, network, digits)
    set_offset(tunable.tuning, "slope_from_1.0", 2.0, kind=3)
    after = weights_by(tunable, network, digits)
    ratio = {name: (after[name] / before[name])[before[name] != 0] for name in before}
    *_, last, _ = before
    assert ratio["1.weight"].std() < 1e-3 < ratio[last].std()  # other layers are only rescaled


# ---- trials ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_is_a_number_of_a_small_network(tunable, digits, name):
    trials = draw_trials(random.Random(0), lambda: mlp([16]), digits[:200], digits[200:], networks=2, images=200)
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
    trials = draw_trials(random.Random(0), lambda: mlp([16]), digits[:50], digits[50:], networks=1, images=20)
    offsets = torch.zeros_like(tunable.tuning.offsets)
    offsets[NUMBERS.index("slope_from_0.0")] = 1e3  # whose exponential is infinite
    never = Reward(lambda network, images: pytest.fail("rewarded"))
    assert try_candidate(tunable, offsets, trials, never) == [-float("inf")]


@pytest.mark.parametrize(("limit", "count"), [(300, 300), (5000, 900)])
def test_networks_are_written_from_other_images_than_reward_them(users, monkeypatch, limit, count):
    pytest.importorskip("cmaes")

    def sums(data):
        return set(data.images.double().sum((1, 2, 3)).tolist())

    found = []
    for seed in (0, 0, 1):
        monkeypatch.setattr(
            sys, "argv", ["reinforce", *options_of(users, "x"), "--limit", str(limit), "--seed", str(seed)]
        )
        found.append(reinforcement.Reinforcement(parse_options(), load_synthesizer(users / "small.pth")))
    first, again, other = found
    assert len(first.known.labels) == count
    assert not sums(first.known) & sums(first.data) and not sums(first.data) & sums(first.validation)
    assert torch.equal(first.known.images, again.known.images)
    assert not torch.equal(first.known.images, other.known.images)


def test_ones_own_images_are_searched_for(users, monkeypatch, digits, capsys, refusal):
    pytest.importorskip("cmaes")
    monkeypatch.setattr(reinforcement, "split_images", split_images)
    pixels = torch.rand(120, 1, 18, 20) + torch.arange(3).repeat(40).view(-1, 1, 1, 1)
    labels = torch.arange(3).repeat(40)
    torch.save({"images": pixels, "labels": labels}, users / "own.pt")
    (users / "own_net.py").write_text(
        "from torch import nn\n\n\ndef net():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 3))\n"
    )
    options = [*options_of(users, "own", "accuracy"), "--data", "own.pt", "--evaluations", "4"]
    command(monkeypatch, *options, "--model", "own_net.py:net")
    assert "Validation Accuracy = " in capsys.readouterr().out
    without_model = [each for each in options if each not in ("--model", "small_net.py:Net")]
    command(monkeypatch, *without_model, "--out", str(users / "any.pth"))  # random architectures
    torch.save({"images": pixels[:, :, :8], "labels": labels}, users / "own.pt")
    assert refusal(main, *without_model).endswith("too small or large for random networks: give --model")
    torch.save({"images": pixels[:3], "labels": labels[:3]}, users / "own.pt")
    assert "too few to keep some apart" in refusal(main, *without_model)


def test_with_validation_training_images_score_in_the_place_of_test_images(tmp_path):
    images = torch.arange(60.0).view(-1, 1, 1, 1).expand(-1, 1, 16, 16).contiguous()
    parts = {"images": images[:50], "test_images": images[50:], "labels": torch.arange(50) % 2}
    torch.save(parts | {"test_labels": torch.arange(10) % 2}, tmp_path / "own.pt")

    def split(validation: int) -> list[int]:
        return [len(part.labels) for part in split_images(tmp_path / "own.pt", validation, torch.device("cpu"))]

    assert [split(validation) for validation in (0, 5, 500)] == [[50, 10], [45, 5], [40, 10]]
    known, scoring = (part.images[:, 0, 0, 0].tolist() for part in split_images(tmp_path / "own.pt", 5, "cpu"))
    assert len({*known, *scoring}) == 50


def test_random_architectures_are_none_of_those_that_are_evaluated(digits, monkeypatch):
    def shapes():
        drawn = draw_trials(random.Random(1), None, digits[:50], digits, networks=3, images=5)
        return [parameter_shapes(trial.graph.module) for trial in drawn]

    first, *others = shapes()
    assert first not in others
    monkeypatch.setattr(candidates, "EVALUATED_SHAPES", [first])
    assert first not in shapes()


def test_a_reward_cannot_spoil_what_is_left_at_its_init(tunable, digits):
    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act, self.out = nn.Linear(784, 8), nn.PReLU(8), nn.Linear(8, 10)

        def forward(self, images):
            return self.out(self.act(self.fc(images.flatten(1))))

    graph = ComputationGraph(Slope())
    network = written(tunable, graph, 0, digits[:50])
    with torch.no_grad():
        network.module.act.weight.zero_()
    assert (graph.module.act.weight == 0.25).all()


# ---- searches --------------------------------------------------------------------------------------------------------


def test_the_search_finds_a_known_best():
    pytest.importorskip("cmaes")
    search, best = CovarianceSearch(6, 12, deviation=0.5, seed=0), torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0, -0.5])
    for _ in range(150):
        search.tell(-(search.ask() - best).square().sum(1)[:, None].double())
    assert (search.found - best).norm() < 0.3


def test_where_rewards_are_noisy_what_is_found_is_nearer_than_the_last_mean():
    pytest.importorskip("cmaes")
    generator, best = torch.Generator().manual_seed(0), torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0, -0.5])
    nearer = []
    for seed in range(5):
        search = CovarianceSearch(6, 12, deviation=0.5, seed=seed)
        for _ in range(100):
            distances = (search.ask() - best).square().sum(1)[:, None].double()
            search.tell(-distances + 3 * torch.randn(distances.shape, dtype=torch.float64, generator=generator))
        nearer.append((search.means[-1] - best).norm() - (search.found - best).norm())
    assert sum(nearer) > 0


def test_ranks_are_shared_by_equals_and_blind_to_scale():
    rewards = torch.tensor([[3.0, -1e9], [1.0, 5.0], [1.0, -1e9]])
    assert ranks(rewards).tolist() == [(0.5 + 2) / 2, (2 + 0.5) / 2, (2 + 2) / 2]
    assert torch.equal(ranks(rewards), ranks(rewards.exp() + 7))
    assert ranks(torch.tensor([[0.0], [-float("inf")]])).tolist() == [0.5, 1.5]


# ---- the command -----------------------------------------------------------------------------------------------------


def options_of(users: Path, name: str, reward: str = "my_reward.py:alike") -> list[str]:
    return [
        "--reward", reward, "--synthesizer", "small.pth", "--model", "small_net.py:Net",
        "--evaluations", "24", "--candidates", "4", "--networks", "1", "--limit", "50", "--images", "50",
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

    further = ["--synthesizer", "whole.pth", "--deviation", "0.003", "--evaluations", "4"]
    command(monkeypatch, *options_of(users, "further"), *further)
    assert 0 < (offsets_in(users / "further.pth") - whole).abs().max() < 0.05


def test_candidates_of_a_generation_share_their_randomness_and_no_two_generations_do(users, monkeypatch):
    pytest.importorskip("cmaes")
    command(monkeypatch, *options_of(users, "noise", "my_reward.py:noise"), "--evaluations", "12")
    values = (users / "noise.txt").read_text().split()
    generations = [values[start : start + 4] for start in range(0, 12, 4)]
    assert len(values) == 12
    assert all(len(set(generation)) == 1 for generation in generations)
    assert len(set(values)) == 3


def test_two_processes_find_what_one_finds(users, monkeypatch):
    pytest.importorskip("cmaes")
    options = [*options_of(users, "both", "ternary"), "--evaluations", "4", "--report-every", "1"]
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
    assert "Evaluation 4/4" in printed[0][0] and not printed[1][0]  # one process reports
    monkeypatch.setattr(reinforcement, "split_images", split_images)  # as the two have them
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        command(monkeypatch, *options_of(users, "alone", "ternary"), "--evaluations", "4", "--report-every", "1")
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


@pytest.mark.parametrize(
    ("model", "line"),
    [("Recurrent", "gru"), ("Few", "a label is 9, but Few has 5 outputs"), ("Broken", "out: NaN or infinite values")],
)
def test_a_model_that_cannot_be_read_or_written_gets_one_line(users, refusal, model, line):
    pytest.importorskip("cmaes")
    options = [option.replace("small_net.py:Net", f"small_net.py:{model}") for option in options_of(users, "none")]
    assert refusal(main, *options).startswith(f"--model small_net.py:{model}: {line}")


def test_fewer_evaluations_than_a_generation_takes_get_one_line(users, refusal):
    pytest.importorskip("cmaes")
    line = refusal(main, *options_of(users, "none"), "--evaluations", 3)
    assert line == "--evaluations 3: --candidates times --networks, 4, are needed"


def test_an_infinite_reward_is_only_a_bad_one(users, monkeypatch):
    pytest.importorskip("cmaes")
    command(monkeypatch, *options_of(users, "infinite", "my_reward.py:infinite"), "--evaluations", "4")
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


def test_straight_through_gradients_train_what_is_rounded(digits):
    data, rounding = DataSet(digits[200:], digits[:200], digits[:200]), ROUNDINGS["binary"]
    (found,) = evaluate.straight_through(lambda: mlp([30]), [0], rounding, data, epochs=8)
    networks = [mlp([30]) for _ in range(2)]
    for network in networks:
        for _ in train_with_adam(network, data.known, 8, 3e-3):
            pass
    rounded = score(round_weights(networks[0], rounding), data.test).accuracy_percent
    assert found > rounded + 5


def test_a_weight_is_rounded_and_its_gradient_goes_straight_through(digits):
    weight = torch.randn(3, 8, requires_grad=True)
    rounded = evaluate.StraightThrough(ROUNDINGS["ternary"])(weight)
    torch.testing.assert_close(rounded, ROUNDINGS["ternary"](weight))
    (2 * rounded).sum().backward()
    assert (weight.grad == 2).all()
    data = DataSet(digits[200:400], digits[:200], digits[:200])
    (found,) = evaluate.straight_through(lambda: mlp([30]), [0], torch.zeros_like, data, epochs=1)
    assert found < 25  # what is scored is rounded too


def test_a_penalty_is_for_the_last_layer_and_makes_its_weights_smaller(tunable, digits):
    network = mlp([16])

    def spread_with(penalty: float, kind: int) -> float:
        set_offset(tunable.tuning, "penalty", penalty, kind)
        weights_by(tunable, network, digits)
        tunable.tuning.offsets.data.zero_()
        return network(digits.images).std().item()

    before = spread_with(0.0, 0)
    assert spread_with(3.0, 2) == pytest.approx(before, rel=1e-5)  # of the first layer
    assert spread_with(3.0, 3) < 0.8 * before
    assert 0 <= spread_with(1e4, 3) < 0.2 * before


def test_the_gain_is_measured_before_and_after(users, monkeypatch, capsys, tunable, digits):
    with torch.no_grad():
        tunable.tuning.offsets[-3:, 0] = -2.0  # large weights are alike: nearly ternary
    save_synthesizer(tunable, users / "after.pth")
    monkeypatch.setattr(evaluate, "NETWORKS", ("TargetCNN", "half width"))
    data = DataSet(digits[200:700], digits[700:], digits[:200])
    monkeypatch.setattr(evaluate, "load_data_set", lambda *_: data)
    options = ["--reward", "ternary", "--improved", "after.pth", "--inits", "1", "--limit", "300"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *options, "--device", "cpu"])
    evaluate.main()
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in capsys.readouterr().out.splitlines()}
    before, after, trained = (float(cell.split()[0]) for cell in rows["TargetCNN", "ternary"].split("|")[3:6])
    assert after != before > 30
    assert 8 < trained < 90  # of 4 steps
    full = [float(cell.split()[0]) for cell in rows["TargetCNN", "full precision"].split("|")[3:5]]
    assert min(full) > 80
    assert ("half width", "ternary") in rows


def test_the_committed_numbers_write_networks_that_stand_rounding(synthesizer, train_digits, digits):
    improved, data = load_synthesizer(TERNARY), digits[:1000]
    graph = ComputationGraph(TargetCNN())
    right = [
        score_after(ROUNDINGS["ternary"], written(one, graph, 7, train_digits[:1000]), data).accuracy_percent
        for one in (synthesizer, improved)
    ]
    assert right[1] > max(90, right[0] + 5)
