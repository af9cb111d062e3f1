"""Training the model: what is drawn, what is learned, and how a training goes on."""

import itertools
import random
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, command, small_synthesizer
from torch import nn

from target_cnn import TargetCNN, score
from universal import GraphWeightSynthesizer, load_synthesizer, train
from universal.evaluation.networks import EVALUATED_SHAPES, cnn, mlp
from universal.model.synthesizer import random_weights, save_synthesizer
from universal.reading.graph import ComputationGraph
from universal.training.architectures import (
    ACTIVATIONS,
    FAMILIES,
    MOST_MULTIPLICATIONS,
    draw_architecture,
    parameter_shapes,
)
from universal.training.blocks import BLOCKS, Maps

TRAINING = ["-m", "universal.train", "--probes", "20", "--batch-size", "32", "--validation", "500", "--device", "cpu"]
PROBES = "experts.0.task.probes"
CLASSES = (nn.AdaptiveAvgPool2d(1), nn.Flatten())  # what makes logits of a convolution's outputs


# ---- what is drawn --------------------------------------------------------------------------------------------------


def test_drawn_architectures_cover_what_people_build():
    draw, seen = random.Random(3), set()
    networks = [draw_architecture(draw, refused=EVALUATED_SHAPES, colour=True) for _ in range(250)]
    assert not any(parameter_shapes(network) in EVALUATED_SHAPES for network in networks)
    for network in networks:
        modules = list(network.modules())
        convolutions = [module for module in modules if isinstance(module, nn.Conv1d | nn.Conv2d)]
        seen |= {type(module).__name__ for module in modules}
        seen |= {f"{min(len(convolutions), 10)} convolutions"}
        seen |= {f"kernel {convolution.kernel_size[0]}" for convolution in convolutions}
        seen |= {"stride" for convolution in convolutions if convolution.stride == (2, 2)}
        seen |= {"depthwise" for convolution in convolutions if convolution.groups > 1}
        seen |= {"3 channels" for convolution in convolutions[:1] if convolution.in_channels == 3}
    activations = {activation.__name__ for activation in ACTIVATIONS}
    norms = {"BatchNorm2d", "BatchNorm1d", "GroupNorm", "InstanceNorm2d", "LayerNorm"}
    modules = {
        "Conv1d", "Gain", "Shuffled", "Sum", "Concatenation", "Gate", "Tokens", "TransformerEncoderLayer", "Transposed",
        "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d",
    }  # fmt: skip
    options = {"stride", "depthwise", "3 channels", *(f"{n} convolutions" for n in (0, 1, 2, 3, 4, 6, 8, 10))}
    assert activations | norms | modules | options | {f"kernel {n}" for n in (1, 3, 5, 7)} <= seen


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_family_is_drawn_and_can_be_read(family):
    draw = random.Random(0)
    networks = [draw_architecture(draw, families=[family], colour=True) for _ in range(8)]
    for network in networks:
        graph = ComputationGraph(network)
        assert graph.classes == 10
        assert set(graph.left) <= {"first"}  # the class token
        assert graph.convolutional == (family != "mlp")
    types = [{type(module).__name__ for module in network.modules()} for network in networks]
    assert all(("Tokens" in seen) == (family == "tokens") for seen in types)
    others = {"AdaptiveAvgPool2d", "GELU", "BatchNorm2d", "Concatenation"} & set().union(*types)
    assert family != "ordinary" or not others
    assert family != "convolutions" or len(others) > 2


@pytest.mark.parametrize("inputs, classes", [((3, 32, 32), 2), ((1, 64, 64), 7), ((3, 48, 64), 100), ((4, 16, 17), 5)])
def test_networks_are_drawn_for_any_images_and_classes(inputs, classes):
    draw = random.Random(0)
    images = torch.randn(2, *inputs)
    for family in FAMILIES:
        for _ in range(5):
            network = draw_architecture(draw, inputs, classes, families=[family]).eval()
            assert network(images).shape == (2, classes)
            assert sum(parameter.numel() for parameter in network.parameters()) <= MOST_MULTIPLICATIONS


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.add.__name__)
@pytest.mark.parametrize("deep", [False, True])
def test_a_block_gives_the_maps_that_it_says(block, deep):
    draw = random.Random(0)
    for norm, stride, width in itertools.product((None, "batch", "group"), (1, 2), (8, 16)):
        maps = Maps(draw, (8, 12, 20), nn.ReLU, norm, deep)
        block.add(maps, width, stride)
        shape = nn.Sequential(*maps.layers)(torch.randn(2, 8, 12, 20)).shape
        assert shape == (2, maps.channels, *maps.size)
        assert maps.multiplications > 0


def test_the_sampler_never_returns_what_is_evaluated(monkeypatch):
    evaluated, allowed = mlp([200, 200]), mlp([21])
    draws = iter([evaluated, evaluated, allowed])
    monkeypatch.setitem(FAMILIES, "mlp", (1, lambda *_: next(draws)))
    assert draw_architecture(random.Random(0), refused=EVALUATED_SHAPES, families=["mlp"]) is allowed


# ---- training -------------------------------------------------------------------------------------------------------


def files(directory: Path, name: str) -> list:
    return ["--out", directory / f"{name}.pth", "--checkpoint", directory / f"{name}_training.pth"]


def state(directory: Path, name: str) -> dict:
    return load_synthesizer(directory / f"{name}.pth").state_dict()


def test_training_improves(tmp_path, monkeypatch, capsys):
    options = [*TRAINING[2:], "--kinds", "mlp", "--probes", 60, "--steps", 60, "--report-every", 20, "--lr", 2e-3]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*options, *files(tmp_path, "run")])])
    train.main()
    printed = capsys.readouterr().out
    accuracies = [float(accuracy) for accuracy in re.findall(r"(\d+\.\d+)% \(MLP\)", printed)]
    losses = [float(loss) for loss in re.findall(r"Loss = (\d+\.\d+)", printed)]
    assert len(accuracies) == len(losses) == 3
    assert accuracies[-1] > accuracies[0] + 10
    assert losses[-1] < 0.85 * losses[0]
    assert len(re.findall(r"Validation Accuracy = +\d+\.\d+% \(TargetCNN\).*Time Left = \d", printed)) == 3


@pytest.mark.parametrize("share, written", [(0, {2}), (0.5, {1, 2}), (1, {1})])
def test_networks_are_written_in_pairs_from_a_share_of_the_steps_on(tmp_path, monkeypatch, share, written):
    options = [*TRAINING[2:], "--steps", 4, "--kinds", "ordinary", "--pairs-from", share, *files(tmp_path, "run")]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    monkeypatch.setattr(train, "EARLIER_STEPS", {0: 1})
    training, counts = train.Training(train.parse_options(), 0, 1), []
    reward = training.parallel
    training.parallel = lambda graph, inits, *others: counts.append(len(inits)) or reward(graph, inits, *others)
    training.run(4)
    assert set(counts) == written and counts == sorted(counts)


def test_a_killed_training_goes_on_bit_for_bit(tmp_path, refusal):
    options = [*TRAINING, "--steps", 6, "--report-every", 2]
    whole = command(*options, *files(tmp_path, "whole"))
    assert whole.returncode == 0, whole.stderr

    killed = [sys.executable, *map(str, [*options, *files(tmp_path, "killed")])]
    with subprocess.Popen(killed, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("Step 4/6"):  # the state of step 2 is saved, that of step 4 may be
                process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed.pth").exists()
    other = refusal(train.main, *options[2:-6], *options[-4:], *files(tmp_path, "killed"), "--batch-size", 16)
    assert "other options" in other
    resumed = command(*options, *files(tmp_path, "killed"))
    assert re.search(r"Going on from step (2|4)", resumed.stdout)
    expected, found = state(tmp_path, "whole"), state(tmp_path, "killed")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    assert not (tmp_path / "killed_training.pth").exists()


def test_a_pair_is_rewarded_for_its_mean_probabilities(synthesizer, digits):
    graph = ComputationGraph(mlp([20]))
    inits = [random_weights(graph, seed) for seed in (0, 1)]
    images, labels = digits[:200]
    with torch.inference_mode():
        reward = train.Reward(synthesizer)(graph, inits, 0, images, labels)
        mean = sum(graph.run(images, synthesizer(graph, init)).softmax(1) for init in inits) / 2
        alone = [train.Reward(synthesizer)(graph, [init], 0, images, labels) for init in inits]
    torch.testing.assert_close(reward, F.nll_loss(mean.log(), labels))
    assert reward < sum(alone) / 2


def test_three_quarters_of_the_images_are_distorted_and_stay_readable(synthesizer, digits):
    torch.manual_seed(0)
    moved = train.distorted(digits.images, 1.5)
    changed = (moved != digits.images).flatten(1).any(1)
    assert changed[:1500].all()
    assert not changed[1500:].any()
    corners = moved[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]  # background, also where they come from outside the image
    assert ((corners - digits.images.min()).abs() < 1e-4).float().mean() > 0.99
    assert (moved >= digits.images.min() - 1e-5).all()
    assert (moved <= digits.images.max() + 1e-5).all()
    network = synthesizer.synthesize(TargetCNN(), seed=0)
    assert score(network, digits._replace(images=moved)).accuracy_percent > 95


def test_a_training_that_diverges_gets_one_line(tmp_path, refusal):
    options = [*TRAINING[2:-2], "--steps", 10, "--lr", 1000, *files(tmp_path, "diverged")]
    assert "lower --lr" in refusal(train.main, *options)
    assert not (tmp_path / "diverged.pth").exists()


def test_a_broken_training_state_is_refused_and_kept(tmp_path, refusal):
    path = tmp_path / "run_training.pth"
    torch.save({"settings": 1}, path)
    line = refusal(train.main, *TRAINING[2:-2], "--steps", 2, *files(tmp_path, "run"))
    assert f"{path}: " in line
    assert path.exists()


def test_training_goes_on_from_an_earlier_synthesiser(tmp_path, monkeypatch, refusal):
    path = tmp_path / "earlier.pth"
    save_synthesizer(GraphWeightSynthesizer(probes=20), path)
    options = [*TRAINING[2:], "--steps", 1, "--start-from", path, "--lr", 1e-9, *files(tmp_path, "later")]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    train.main()
    earlier, later = state(tmp_path, "earlier"), state(tmp_path, "later")
    assert all(torch.allclose(tensor, later[name], atol=1e-6) for name, tensor in earlier.items())
    missing = ("--start-from", tmp_path / "none.pth", *files(tmp_path, "other"))
    assert "none.pth: no such file" in refusal(train.main, *TRAINING[2:-2], *missing)


def test_experts_are_merged_as_the_router_says():
    mixed = train.mixture([small_synthesizer(seed) for seed in (0, 1, 2)])
    graph = ComputationGraph(cnn([4, 6], 8))
    torch.testing.assert_close(mixed.shares(graph), torch.full((3,), 1 / 3))
    with torch.no_grad():
        mixed.router.bias.copy_(torch.tensor([0.5, 0.3, 0.2]).log())
        merged = mixed.merged(mixed.shares(graph))
    for name, parameter in merged.items():
        parts = [expert.get_parameter(name) for expert in mixed.experts]
        torch.testing.assert_close(parameter, 0.5 * parts[0] + 0.3 * parts[1] + 0.2 * parts[2])
    # What the router learns from is what the merged expert is worth, and networks of different kinds can be told apart.
    weights = mixed(graph, random_weights(graph, 0))
    sum(weight.square().sum() for weight in weights.values()).backward()
    assert mixed.router.weight.grad.abs().max() > 0 and mixed.experts[2].task.probes.grad.abs().max() > 0
    with torch.no_grad():
        mixed.router.weight.normal_()
    assert not torch.allclose(mixed.shares(graph), mixed.shares(ComputationGraph(mlp([20]))), atol=1e-3)


def test_a_router_that_is_sure_takes_that_expert_alone():
    one, other = small_synthesizer(0), small_synthesizer(1)
    mixed = train.mixture([one, one, other])
    with torch.no_grad():
        mixed.router.bias.copy_(torch.tensor([-200.0, -200.0, 0.0]))
        graph = ComputationGraph(cnn([4, 6], 8))
        expected, found = (synthesizer(graph, random_weights(graph, 0)) for synthesizer in (other, mixed))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_training_starts_from_the_experts_of_several_files(tmp_path, monkeypatch, refusal):
    for seed, name in enumerate(("a.pth", "b.pth")):
        synthesizer = small_synthesizer(seed, hidden=512)
        synthesizer.seconds = {"recording": 0.0, "training": 1000.0}
        save_synthesizer(synthesizer, tmp_path / name)
    save_synthesizer(small_synthesizer(0, hidden=512, dimension=32), tmp_path / "smaller.pth")
    options = [*TRAINING[2:], "--steps", 1, "--lr", 1e-9, *files(tmp_path, "both"), "--start-from"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*options, tmp_path / "a.pth", tmp_path / "b.pth"])])
    monkeypatch.setattr(train, "start_router", partial(train.start_router, networks=3, images=20))
    train.main()
    both = load_synthesizer(tmp_path / "both.pth")
    assert 2000 < both.seconds["training"] < 2100  # what its experts took is not forgotten
    for expert, name in zip(both.experts, ("a.pth", "b.pth"), strict=True):
        (earlier,) = load_synthesizer(tmp_path / name).experts
        torch.testing.assert_close(expert.state_dict(), earlier.state_dict(), rtol=0, atol=1e-6)
    different = ("--start-from", tmp_path / "a.pth", tmp_path / "smaller.pth", *files(tmp_path, "other"))
    assert "experts of different sizes" in refusal(train.main, *TRAINING[2:-2], *different)


def test_the_router_starts_with_what_each_expert_is_worth(synthesizer, digits):
    torch.manual_seed(0)
    mixed = train.mixture([GraphWeightSynthesizer(**synthesizer.settings | {"experts": 1}), synthesizer]).eval()
    train.start_router(mixed, digits, seed=0, networks=8, images=50)
    for network in (TargetCNN(), mlp([20])):
        assert mixed.shares(ComputationGraph(network))[0] < 0.1  # the expert that knows nothing yet


def test_the_router_is_as_sharp_as_is_best(digits, monkeypatch):
    def fitted(sharpest: int) -> GraphWeightSynthesizer:
        def tried(writers, synthesizer, data, seed, purpose, networks, images):
            draws = torch.Generator().manual_seed(0)
            losses = torch.rand(networks, len(writers), generator=draws)
            if purpose == "sharpness":
                losses[:, train.SHARPNESSES.index(sharpest)] = -1.0
            return torch.randn(networks, synthesizer.router.in_features, generator=draws), losses

        monkeypatch.setattr(train, "tried", tried)
        mixed = small_synthesizer(0, experts=3)
        train.start_router(mixed, digits, seed=0, networks=200)
        return mixed.router

    plain, sharp = fitted(1), fitted(4)
    assert plain.weight.abs().max() > 0
    torch.testing.assert_close(sharp.weight, 4 * plain.weight)
    torch.testing.assert_close(sharp.bias, 4 * plain.bias)


def test_the_state_of_a_training_keeps_its_experts(tmp_path, monkeypatch):
    save_synthesizer(small_synthesizer(0, experts=2, hidden=512), tmp_path / "two.pth")
    options = [*TRAINING[2:], "--start-from", tmp_path / "two.pth", *files(tmp_path, "run")]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    training = train.Training(train.parse_options(), 0, 1)
    assert any(parameter is training.synthesizer.router.weight for parameter in training.groups[1])  # the faster group
    training.seconds = 1000.0
    training.save()
    earlier = train.earlier_synthesizer(tmp_path / "run_training.pth")
    assert earlier.seconds["training"] == 1000
    expected = load_synthesizer(tmp_path / "two.pth").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in earlier.state_dict().items())


def test_the_router_of_a_training_that_goes_on_is_not_fitted_again(tmp_path, monkeypatch):
    save_synthesizer(small_synthesizer(0, hidden=512), tmp_path / "a.pth")
    options = [*TRAINING[2:], *files(tmp_path, "run"), "--start-from", tmp_path / "a.pth", tmp_path / "a.pth"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    fitted = []
    monkeypatch.setattr(train, "start_router", lambda *_: fitted.append(True))
    for resumed in (False, True):
        training = train.Training(train.parse_options(), 0, 1)
        training.resume()
        assert training.step == resumed and fitted == [True]
        training.step = 1
        training.save()


def test_two_processes_train_together(tmp_path):
    options = [*TRAINING, "--steps", 4, "--report-every", 4]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    both = command(*options, *files(tmp_path, "both"), launcher=launcher)
    assert both.returncode == 0, both.stderr
    assert "processes: 2" in both.stdout
    assert both.stdout.count("Step 4/4") == 1  # one process reports
    alone = command(*options, *files(tmp_path, "alone"))
    assert alone.returncode == 0, alone.stderr
    found, expected = state(tmp_path, "both"), state(tmp_path, "alone")
    assert not torch.equal(found[PROBES], expected[PROBES])  # the other process's gradients are in it
    assert (found[PROBES] - expected[PROBES]).abs().max() < 1  # from the same start


def test_a_widened_synthesiser_writes_the_same():
    torch.manual_seed(0)
    narrow = GraphWeightSynthesizer(probes=20, convolution_probes=20, hidden=64).eval()
    wide = train.widened(narrow)
    assert wide.settings["hidden"] == GraphWeightSynthesizer(probes=20).settings["hidden"] > 64
    assert train.widened(wide) is wide
    graph = ComputationGraph(cnn([4, 6], 8))
    with torch.no_grad():
        expected, found = (one(graph, random_weights(graph, 0)) for one in (narrow, wide))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)
