"""Training the model: what is drawn, what is learned, and how a training goes on."""

import functools
import itertools
import math
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

from scripting import UserError, run_to_end
from target_cnn import Dataset
from universal import load_synthesizer, train, write
from universal.evaluation.networks import EVALUATED_SHAPES, mlp
from universal.model.synthesizer import fresh_init, save_synthesizer
from universal.reading.graph import ComputationGraph
from universal.rules import judging
from universal.rules.trunk import Trunk
from universal.training import architectures, specialist, training
from universal.training.architectures import ACTIVATIONS, FAMILIES, draw_architecture, parameter_shapes
from universal.training.blocks import BLOCKS, Maps
from universal.training.specialist import Gain, conclusion_of
from universal.training.tasks import KINDS, draw_task, own_kind

OPTIONS = ["--networks", 1, "--families", "rows", "--tasks", "mnist"]


# ---- what is drawn --------------------------------------------------------------------------------------------------


def test_drawn_architectures_cover_what_people_build():
    draw, seen = random.Random(3), set()
    shapes = [(1, 28, 28), (3, 28, 28)] * 125
    networks = [draw_architecture(draw, shape, refused=EVALUATED_SHAPES) for shape in shapes]
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
    draw = random.Random(1)
    networks = [draw_architecture(draw, families=[family]) for _ in range(8)]
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
    save_synthesizer(small_synthesizer(0), tmp_path / "small.pth")
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


@pytest.fixture
def state(tmp_path, start, monkeypatch):
    """A training of a small synthesiser that has not begun, with further options."""

    def make(*options) -> training.Training:
        monkeypatch.setattr(sys, "argv", arguments(tmp_path, "run", *start, *options))
        return training.Training(train.parse_options(), 0, 1)

    return make


def test_steps_on_the_same_draws_learn_these(state):
    learning = state("--steps", 10, "--lr", 4e-3, "--networks", 2)
    losses = [learning.one_step().item() for _ in range(10)]  # all of them are step 0, so that nothing else is drawn
    assert losses[-1] < losses[0] - 0.2
    averaged, earlier = (dict(part.named_parameters()) for part in (learning.average.module, state().synthesizer))
    assert sum(not torch.equal(tensor, earlier[name]) for name, tensor in averaged.items()) > len(earlier) / 2


def test_what_is_learned_has_a_gradient(state):
    learning = state("--families", *training.LEARNED)
    synthesizer, families = learning.synthesizer, ["convolutions", "deep"]
    nn.init.ones_(synthesizer.seen.weight)  # zero at first
    nn.init.ones_(synthesizer.writer.patch_share.weight)
    reached = set()
    for index in range(6):
        draw = random.Random(index)
        task, graph = learning.drawn(draw, learning.kinds, families)
        loss, _ = training.reward(learning.synthesizer, graph, fresh_init(graph, 0, torch.device("cpu")), task, 60)
        names, parameters = zip(*synthesizer.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        reached |= {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    assert set(names) - reached == {"place_key.weight", "writer.maps.weight"}  # which few networks need


def test_a_seed_gives_the_same_training_again_and_another_another(trained, start):
    one, again, other = (
        trained(name, *start, "--steps", 2, "--seed", seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_gradient_that_is_not_finite_is_left_out(state, monkeypatch):
    learning = state("--networks", 2)
    before = [parameter.clone() for parameter in learning.synthesizer.parameters()]
    grad, spoil = torch.autograd.grad, iter([True, True, True, False])

    def spoiled(*arguments, **options):
        found = grad(*arguments, **options)
        return [None if each is None else each * torch.nan for each in found] if next(spoil) else found

    monkeypatch.setattr(torch.autograd, "grad", spoiled)
    with pytest.raises(UserError, match=r"diverged at step 0: lower --lr, and delete .*training\.pth if it is there"):
        learning.run(1)
    assert all(map(torch.equal, before, learning.synthesizer.parameters()))
    learning.run(1)
    assert math.isfinite(learning.loss)
    assert not all(map(torch.equal, before, learning.synthesizer.parameters()))
    assert all(parameter.isfinite().all() for parameter in learning.synthesizer.parameters())


def test_processes_that_would_go_on_from_different_steps_are_refused(state, monkeypatch):
    def gather(steps, step):
        steps[:] = [step, 5]

    for name, value in {
        "is_initialized": lambda: True,
        "get_world_size": lambda: 2,
        "all_gather_object": gather,
    }.items():
        monkeypatch.setattr(dist, name, value)
    with pytest.raises(UserError, match="not the same on all machines: copy it to each, or delete it"):
        run_to_end(state("--steps", 1), "the command")


def test_a_killed_training_goes_on_bit_for_bit(tmp_path, trained, start, refusal, capsys):
    options = [*start, "--steps", 3, "--report-every", 1]
    expected = trained("whole", *options)
    with process(tmp_path, "killed", *options) as killed:
        for line in killed.stdout:
            if line.startswith("Step 2/3"):  # the state of step 1 is saved, that of step 2 may be
                killed.send_signal(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed.pth").exists()
    others = arguments(tmp_path, "killed", *options, "--networks", 2)[1:-2]
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
    assert not re.sub(r"\[Gloo\] Rank 1 is connected.*\n", "", printed)  # by PyTorch 2.9; one process reports
    reported = capsys.readouterr().out
    assert "processes: 2" in reported
    assert reported.count("Step 2/2") == 1
    key = "writer.kernels.weight"
    assert not torch.equal(both[key], alone[key])  # the other process's gradients are in it
    assert (both[key] - alone[key]).abs().max() < 0.01  # from the same start


def test_training_goes_on_from_an_earlier_synthesiser(tmp_path, trained, refusal):
    synthesizer, path = small_synthesizer(0), tmp_path / "earlier.pth"
    synthesizer.seconds = {"recording": 0.0, "training": 1000.0}
    save_synthesizer(synthesizer, path)
    later = trained("later", "--start-from", path, "--steps", 1, "--lr", 1e-9)
    earlier = load_synthesizer(path)
    torch.testing.assert_close(later, dict(earlier.state_dict()), rtol=0, atol=1e-6)
    assert 1000 < load_synthesizer(tmp_path / "later.pth").seconds["training"] < 1100  # what it took is not forgotten
    missing = arguments(tmp_path, "other", "--start-from", tmp_path / "none.pth")[1:-2]
    assert "none.pth: no such file" in refusal(train.main, *missing)


def test_processes_average_their_gradients_and_leave_what_none_has_any_of(state, monkeypatch):
    learning = state()
    learning.processes = 2
    of_both, of_other, of_none, *others = learning.synthesizer.parameters()
    theirs = {id(of_both): 3.0, id(of_other): 3.0}  # what the other process has

    def all_reduce(tensor):
        owners = [each for each in learning.synthesizer.parameters() if each.grad is tensor]
        if owners:
            tensor += theirs[id(owners[0])]
        else:  # how many processes have a gradient of each
            tensor[:2] += 1

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    of_both.grad = torch.ones_like(of_both)
    learning.average_gradients()
    assert (of_both.grad == 2).all() and (of_other.grad == 1.5).all()
    assert of_none.grad is None and all(other.grad is None for other in others)


def test_a_training_that_diverges_gets_one_line(tmp_path, start, refusal):
    options = arguments(tmp_path, "diverged", *start, "--steps", 10, "--lr", 1000)[1:-2]
    assert "lower --lr" in refusal(train.main, *options)
    assert not (tmp_path / "diverged.pth").exists()


def test_a_broken_training_state_is_refused_and_kept(tmp_path, start, refusal):
    path = tmp_path / "run_training.pth"
    torch.save({"settings": 1}, path)
    assert f"{path}: " in refusal(train.main, *arguments(tmp_path, "run", *start, "--steps", 2)[1:-2])
    assert path.exists()


@pytest.mark.parametrize(("classes", "width"), [(3, 6), (5, 200)])  # more images than features, and fewer
def test_the_judge_is_the_best_of_its_ridge_regressions(classes, width):
    torch.manual_seed(0)
    labels = torch.arange(90) % classes
    features = torch.randn(classes, width)[labels] + 2 * torch.randn(90, width)
    one_hot = F.one_hot(labels, classes).float()
    loss, share = judging.judged(features[:60], one_hot[:60], features[60:], labels[60:])
    mean, deviation = features[:60].mean(0), features[:60].std(0) + 0.5 * features[:60].std() + 1e-6
    x = ((features - mean) / deviation).double()
    targets, offset = one_hot.double()[:60], one_hot.double()[:60].mean(0)
    found = []
    for strength in judging.STRENGTHS:
        ridge = strength * (x[:60].square().sum() / width + 1e-6) * torch.eye(width)
        weight = torch.linalg.solve(x[:60].T @ x[:60] + ridge, x[:60].T @ (targets - offset))
        logits = x[60:] @ weight + offset
        right = (logits.argmax(1) == labels[60:]).double().mean().item()
        found += [(F.cross_entropy(sharp * logits, labels[60:]).item(), right) for sharp in judging.SHARPNESSES]
    assert (loss.item(), share.item()) == pytest.approx(min(found), abs=1e-4)


def test_the_reward_is_that_of_what_the_written_layers_make_of_other_images(synthesizer):
    task = draw_task(random.Random(0), 120, 60)
    channels = task.train.images.shape[1]
    graph = ComputationGraph(
        nn.Sequential(nn.Conv2d(channels, 6, 3, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(task.classes)),
        task.train.images[:2],
    )
    init = fresh_init(graph, 0, torch.device("cpu"))
    one_hot = F.one_hot(task.train.labels, task.classes).float()
    with torch.no_grad():
        loss, share = training.reward(synthesizer, graph, init, task, 100)
        written = Trunk(graph, init, task.train.images, one_hot, synthesizer, 100).write_up_to(graph.last)
        assert set(written) == {"0.weight", "0.bias"}
        both = (F.conv2d(part.images, *written.values(), stride=2).relu().flatten(1) for part in task[2:])
        expected = judging.judged(next(both), one_hot, next(both), task.test.labels)
    assert (loss.item(), share.item()) == pytest.approx([value.item() for value in expected], rel=1e-3)


def test_what_is_no_task_or_family_is_refused(refusal, tmp_path):
    for option, value in (("--tasks", "cats"), ("--families", "mlp"), ("--networks", 0), ("--steps", 0)):
        assert option in refusal(train.main, *arguments(tmp_path, "run", option, value)[1:-2])


def test_digits_are_drawn_by_default_or_all_kinds_or_those_that_are_named(tmp_path, monkeypatch):
    for given, kinds in (((), {"mnist"}), (("all", "mnist"), KINDS), (("mnist", "waves"), {"mnist", "waves"})):
        options = ["--steps", "2", "--device", "cpu", *(["--tasks", *given] if given else [])]
        monkeypatch.setattr("sys.argv", ["train", *options, "--out", str(tmp_path / "s.pth")])
        assert set(training.Training(train.parse_options(), 0, 1).kinds) == set(kinds)


@pytest.fixture
def own(tmp_path) -> Path:
    """A file of small images in colour, of three classes, bright in three places."""
    labels = torch.arange(3).repeat(60)
    images = torch.rand(180, 3, 16, 16) / 2
    for label in range(3):
        images[labels == label, :, :, 5 * label : 5 * label + 5] += 0.5
    torch.save({"images": images, "labels": labels}, tmp_path / "own.pt")
    return tmp_path / "own.pt"


def test_a_specialist_learns_from_ones_own_images_and_says_what_it_gains(trained, start, own, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(training, "draw_task", lambda *given: drawn.append(draw_task(*given)) or drawn[-1])
    monkeypatch.setattr(train, "NETWORKS", 1)
    trained("special", *start, "--data", own, "--steps", 1)
    learned = [task for task in drawn if task.kind == "own"]
    assert learned and all(task.classes <= 3 and task.train.images.shape[1] == 3 for task in learned)
    assert "1 random networks: " in capsys.readouterr().out.splitlines()[-2]


def test_a_specialist_begins_with_the_general_one_and_does_not_replace_it(own, tmp_path, refusal, monkeypatch):
    assert "would replace synthesizer.pth" in refusal(train.main, "--data", own)
    torch.save({"images": torch.zeros(30, 1, 16, 16), "labels": torch.arange(30) % 3}, tmp_path / "black.pt")
    said = refusal(train.main, "--data", tmp_path / "black.pt", "--out", tmp_path / "s.pth")
    assert "black.pt: all pixels are of one value" in said
    monkeypatch.setattr(sys, "argv", ["train", "--data", str(own), "--out", str(tmp_path / "s.pth")])
    assert train.parse_options().start_from == train.SYNTHESIZER


def test_many_classes_of_ones_own_are_drawn_some_at_a_time():
    images, labels = torch.rand(800, 1, 8, 8), torch.arange(400).repeat(2)
    kind = own_kind(Dataset(images, labels))
    for seed in range(3):
        task = draw_task(random.Random(seed), 192, 128, {"own": kind})
        assert task.classes <= 20 and {*task.train.labels.tolist()} == {*range(task.classes)}


def test_one_class_to_learn_from_is_refused(tmp_path, refusal):
    labels = torch.tensor([0] * 30 + [1])
    order = torch.randperm(31, generator=torch.Generator().manual_seed(0))  # as they are split
    labels = labels[torch.argsort(order)]
    torch.save({"images": torch.rand(31, 1, 16, 16), "labels": labels}, tmp_path / "one.pt")
    said = refusal(train.main, "--data", tmp_path / "one.pt", "--out", tmp_path / "s.pth")
    assert "one.pt: one class alone has images to learn from" in said


def test_a_gain_is_what_adam_needs_at_its_best_rate(monkeypatch, train_digits):
    class AtRate:
        def __init__(self, network, train, noted, lr, seed, seconds, most_steps):
            self.lr, self.curve = lr, [(0.0, 10.0), (9.0, 50.0)]

        def run(self, marks):
            pass

        def matched(self, accuracy):
            return None if self.lr == 0.0003 else 1000 * self.lr

    def written(network, *data, synthesizer, **options):
        if synthesizer == "good":
            write(network, *data, **options)

    monkeypatch.setattr(specialist, "write", written)
    monkeypatch.setattr(specialist, "Training", AtRate)
    found = specialist.gain("none", "good", train_digits[:400], train_digits[400:800], 0)
    assert found.before < 40 < found.after and found.level and found.seconds == 1
    monkeypatch.setattr(AtRate, "matched", lambda *_: None)
    assert specialist.gain("none", "good", train_digits[:400], train_digits[400:800], 0)[2:] == (9, False)
    assert specialist.gain("good", "none", train_digits[:400], train_digits[400:800], 0)[2:] == (0, True)


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        (
            [Gain(90, 92, 10.0, True), Gain(90, 91, 20.0, True)],
            "takes 15.0 s from the former to the latter: it pays from 7",
        ),
        ([Gain(90, 92, 10.0, True), Gain(90, 91, 20.0, False)], "takes at least 15.0 s"),
        ([Gain(90, 89, 0.0, True), Gain(90, 90, 0.0, True)], "It does not pay"),
    ],
)
def test_a_training_pays_for_itself_where_adam_takes_longer(gains, said):
    assert said in conclusion_of(gains, seconds=100.0)


def test_a_training_begins_with_plain_networks_for_digits_and_ends_with_all(state, monkeypatch):
    learning, seen = state("--steps", 100, "--networks", 8), []
    learning.from_nothing = True
    monkeypatch.setattr(training, "reward", lambda synthesizer, *_: (synthesizer.image_keys.exp().mean(), None))
    drawn = learning.drawn
    monkeypatch.setattr(learning, "drawn", lambda draw, *given: seen.append(given) or drawn(draw, *given))
    for learning.step in (0, 20, 40):
        learning.one_step()
    first, between, later = ([given == training.FIRST for given in seen[at : at + 8]] for at in (0, 8, 16))
    assert all(first) and any(between) and not all(between) and not any(later)
    seen.clear()
    learning.step, learning.from_nothing = 0, False
    learning.one_step()
    assert training.FIRST not in seen
