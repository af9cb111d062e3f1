"""Training the model: what is drawn, what is learned, and how a training goes on."""

import functools
import itertools
import os
import random
import re
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import REPOSITORY, small_synthesizer
from torch import nn

from target_cnn import TargetCNN, score
from universal import load_synthesizer, train
from universal.evaluation.networks import EVALUATED_SHAPES, cnn, mlp
from universal.model.synthesizer import random_weights, save_synthesizer
from universal.reading.graph import ComputationGraph
from universal.training import architectures, training
from universal.training.architectures import ACTIVATIONS, FAMILIES, draw_architecture, parameter_shapes
from universal.training.blocks import BLOCKS, Maps

OPTIONS = ["--batch-size", 8, "--validation", 100, "--families", "mlp"]
SMALL = {"dimension": 32, "concepts": 32, "rank": 8}  # of a synthesiser of which a step is cheap


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


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.add.__name__)
@pytest.mark.parametrize("deep", [False, True])
def test_a_block_gives_the_maps_that_it_says(block, deep):
    draw = random.Random(0)
    for norm, stride, width in itertools.product((None, "batch", "group"), (1, 2), (8, 16)):
        maps = Maps(draw, (8, 13, 20), nn.ReLU, norm, deep)
        block.add(maps, width, stride)
        shape = nn.Sequential(*maps.layers)(torch.randn(2, 8, 13, 20)).shape
        assert shape == (2, maps.channels, *maps.size)
        assert maps.multiplications > 0


def test_pooling_leaves_more_than_a_pixel():
    for seed in range(30):
        maps = Maps(random.Random(seed), (8, 4, 7), nn.ReLU, "instance", deep=True)
        BLOCKS[0].add(maps, 8, 1)
        maps.add_pooling(nn.MaxPool2d)
        assert nn.Sequential(*maps.layers)(torch.randn(2, 8, 4, 7)).shape == (2, 8, *maps.size)
        assert maps.side > 1


def test_the_sampler_never_returns_what_is_evaluated(monkeypatch):
    evaluated, allowed = mlp([200, 200]), mlp([21])
    draws = iter([evaluated, evaluated, allowed])
    monkeypatch.setitem(FAMILIES, "mlp", (1, lambda *_: next(draws)))
    assert draw_architecture(random.Random(0), refused=EVALUATED_SHAPES, families=["mlp"]) is allowed


def test_the_sampler_never_returns_what_costs_too_much(monkeypatch):
    large, small = mlp([200]), mlp([20])
    draws = iter([large, small])
    monkeypatch.setitem(FAMILIES, "mlp", (1, lambda *_: next(draws)))
    monkeypatch.setattr(architectures, "MOST_MULTIPLICATIONS", 100_000)
    assert draw_architecture(random.Random(0), families=["mlp"]) is small


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path) -> list:
    """The option that starts from a small synthesiser."""
    save_synthesizer(small_synthesizer(0, **SMALL), tmp_path / "small.pth")
    return ["--start-from", tmp_path / "small.pth"]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Run the command in this process, with what else it needs, and return the state of what it makes."""

    def run(name: str, *options) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(sys, "argv", arguments(tmp_path, name, *options))
        train.main()
        return load_synthesizer(tmp_path / f"{name}.pth").state_dict()

    return run


def arguments(directory: Path, name: str, *options) -> list[str]:
    files = ["--out", directory / f"{name}.pth", "--checkpoint", directory / f"{name}_training.pth"]
    return ["train.py", *map(str, [*OPTIONS, *options, *files, "--device", "cpu"])]


def process(directory: Path, name: str, *options, **environment: str) -> subprocess.Popen:
    """Start the command in a process of its own, with the threads of this one."""
    return subprocess.Popen(
        [sys.executable, "-m", "universal.train", *arguments(directory, name, *options)[1:]], cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_training_improves(trained, capsys):
    options = ["--batch-size", 32, "--validation", 500, "--probes", 40, "--lr", 4e-3]
    trained("run", *options, "--steps", 24, "--report-every", 8)
    printed = capsys.readouterr().out
    accuracies = [
        float(accuracy) for accuracy in re.findall(r"Accuracy = +(\d+\.\d+)% \(mlp\), Time Left = \d", printed)
    ]
    losses = [float(loss) for loss in re.findall(r"Loss = (\d+\.\d+)", printed)]
    assert len(accuracies) == len(losses) == 3
    assert accuracies[-1] > accuracies[0] + 10
    assert losses[-1] < 0.85 * losses[0]


def test_a_killed_training_goes_on_bit_for_bit(tmp_path, trained, start, refusal, capsys):
    options = [*start, "--steps", 3, "--report-every", 1]
    expected = trained("whole", *options)
    with process(tmp_path, "killed", *options) as killed:
        for line in killed.stdout:
            if line.startswith("Step 2/3"):  # the state of step 1 is saved, that of step 2 may be
                killed.send_signal(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed.pth").exists()
    others = arguments(tmp_path, "killed", *options, "--batch-size", 16)[1:-2]
    assert "other options" in refusal(train.main, *others)
    capsys.readouterr()
    found = trained("killed", *options)
    assert re.search(r"Going on from step (1|2), saved in", capsys.readouterr().out)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    assert not (tmp_path / "killed_training.pth").exists()


def test_two_processes_train_together(tmp_path, trained, start, monkeypatch, capsys):
    options = [*start, "--steps", 2, "--report-every", 2]
    alone = trained("alone", *options)
    capsys.readouterr()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    with process(tmp_path, "both", *options, RANK="1", LOCAL_RANK="1", **place) as second:
        for name, value in {**place, "RANK": "0", "LOCAL_RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        waiting = functools.partial(dist.init_process_group, timeout=timedelta(seconds=60))
        monkeypatch.setattr(dist, "init_process_group", waiting)
        both = trained("both", *options)
        printed, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert not printed  # one process reports
    reported = capsys.readouterr().out
    assert "processes: 2" in reported
    assert reported.count("Step 2/2") == 1
    probes = "experts.0.task.probes"
    assert not torch.equal(both[probes], alone[probes])  # the other process's gradients are in it
    assert (both[probes] - alone[probes]).abs().max() < 1  # from the same start


def test_training_goes_on_from_an_earlier_synthesiser(tmp_path, trained, refusal):
    synthesizer, path = small_synthesizer(0, experts=2, **SMALL), tmp_path / "earlier.pth"
    synthesizer.seconds = {"recording": 0.0, "training": 1000.0}
    save_synthesizer(synthesizer, path)
    later = trained("later", "--start-from", path, "--steps", 1, "--lr", 1e-9)
    earlier = load_synthesizer(path)
    torch.testing.assert_close(later, dict(earlier.state_dict()), rtol=0, atol=1e-6)
    assert 1000 < load_synthesizer(tmp_path / "later.pth").seconds["training"] < 1100  # what it took is not forgotten
    missing = arguments(tmp_path, "other", "--start-from", tmp_path / "none.pth")[1:-2]
    assert "none.pth: no such file" in refusal(train.main, *missing)


def test_what_no_network_can_be_written_with_is_reported(tmp_path, start, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", arguments(tmp_path, "run", *start))
    state = training.Training(train.parse_options(), 0, 1)
    with torch.no_grad():
        state.average.module.experts[0].task.probes.fill_(torch.nan)
    state.report(minutes_left=0)
    assert "nan% (mlp)" in capsys.readouterr().out


def test_a_training_that_diverges_gets_one_line(tmp_path, start, refusal):
    options = arguments(tmp_path, "diverged", *start, "--steps", 10, "--lr", 1000)[1:-2]
    assert "lower --lr" in refusal(train.main, *options)
    assert not (tmp_path / "diverged.pth").exists()


def test_a_broken_training_state_is_refused_and_kept(tmp_path, start, refusal):
    path = tmp_path / "run_training.pth"
    torch.save({"settings": 1}, path)
    assert f"{path}: " in refusal(train.main, *arguments(tmp_path, "run", *start, "--steps", 2)[1:-2])
    assert path.exists()


def test_the_reward_is_that_of_the_written_network(synthesizer, digits):
    graph = ComputationGraph(nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.BatchNorm1d(20), nn.Linear(20, 10)))
    init, (images, labels) = random_weights(graph, 0), digits[:200]
    reward = training.Reward(synthesizer)
    with torch.inference_mode():
        logits = graph.run(images, synthesizer(graph, init))
        torch.testing.assert_close(reward(graph, init, images, labels), F.cross_entropy(logits, labels))
        assert reward(graph, init, images, labels, batch_statistics=True) != reward(graph, init, images, labels)


def test_three_quarters_of_the_images_are_distorted_and_stay_readable(synthesizer, digits):
    few = digits[:1000]
    torch.manual_seed(0)
    moved = training.distorted(few.images, 1.5)
    changed = (moved != few.images).flatten(1).any(1)
    assert changed[:750].all()
    assert not changed[750:].any()
    corners = moved[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]  # background, also where they come from outside the image
    assert ((corners - few.images.min()).abs() < 1e-4).float().mean() > 0.99
    assert (moved >= few.images.min() - 1e-5).all()
    assert (moved <= few.images.max() + 1e-5).all()
    network = synthesizer.synthesize(TargetCNN(), seed=0)
    assert score(network, few._replace(images=moved)).accuracy_percent > 95


def test_images_of_any_size_are_distorted_by_pixels(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.tensor([[0.5, 0.5, 1.0], [0.5, 0.5, 0.0]]).expand(shape))
    images = torch.randn(4, 3, 16, 40)
    moved = training.distorted(images, 1.0)  # by a pixel to the left and one down
    torch.testing.assert_close(moved[:3, :, 1:, :-1], images[:3, :, :-1, 1:], rtol=0, atol=1e-4)


# ---- a synthesiser of several experts -------------------------------------------------------------------------------


def test_experts_are_merged_as_the_router_says():
    mixed = small_synthesizer(0, experts=3)
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
    one, mixed = small_synthesizer(1), small_synthesizer(0, experts=3)
    mixed.experts[2].load_state_dict(one.experts[0].state_dict())
    with torch.no_grad():
        mixed.router.bias.copy_(torch.tensor([-200.0, -200.0, 0.0]))
        graph = ComputationGraph(cnn([4, 6], 8))
        expected, found = (synthesizer(graph, random_weights(graph, 0)) for synthesizer in (one, mixed))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
