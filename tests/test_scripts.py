"""The four scripts as a user runs them: what they print and save, and how they refuse bad input."""

import contextlib
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import benchmark
import pytest
import torch
from conftest import REPOSITORY, assert_png, printed, run

import evaluate_diffusion
import evaluate_generalization
import train_diffusion
import train_target_model
from diffusion_model import SpanDiffusion, save_diffusion
from scripting import UserError, option_parser, run_script, table
from target_cnn import (
    Dataset,
    TargetCNN,
    checkpoint_path,
    load_log,
    load_mnist,
    load_run,
    train_with_adam,
)
from universal import roads, train

SCORE = r"Accuracy = \d+\.\d\d%, Avg Loss = \d+\.\d{4}"
SCRIPTS_IN = {
    ".": "", "universal": "universal.", "universal/reinforce": "universal.reinforce.",
    "universal/signatures": "universal.signatures.", "tests": "",
}  # fmt: skip
COMMANDS = [  # the module names of all files that can be run; pytest imports from tests/ itself
    f"{package}{path.stem}"
    for directory, package in SCRIPTS_IN.items()
    for path in sorted((REPOSITORY / directory).glob("*.py"))
    if '\nif __name__ == "__main__":' in path.read_text()
]


@pytest.fixture
def checkpoints(tmp_path, experiment):
    """A copy of the recorded checkpoints that a test may damage."""
    return shutil.copytree(experiment / "checkpoints_weights_cnn", tmp_path / "checkpoints_weights_cnn")


# ---- the experiment -------------------------------------------------------------------------------------------------


def test_training_records_every_epoch(experiment):
    lines = (experiment / "train_target_model.out").read_text().splitlines()
    epochs = [line for line in lines if re.match(r"Epoch  \d: Training Loss = .*Test Accuracy = .*Time = ", line)]
    weights = load_run(experiment / "checkpoints_weights_cnn")
    assert len(epochs) == len(weights) == 3 and weights.shape[1] == 421_642
    torch.manual_seed(0)
    fresh = torch.nn.utils.parameters_to_vector(TargetCNN().parameters())
    assert torch.equal(weights[0], fresh.detach())  # epoch 0 is the initialisation itself
    accuracies = [float(number) for number in re.findall(r"Accuracy =\s+([\d.]+)%", "\n".join(epochs))]
    assert accuracies[0] < 30 and min(accuracies[1:]) > 90


def test_the_diffusion_loss_falls(experiment):
    lines = (experiment / "train_diffusion.out").read_text()
    losses = [float(number) for number in re.findall(r"Loss = ([\d.]+)", lines)]
    assert len(losses) >= 10
    assert losses[-1] < 0.7 * losses[0]


def test_generalization_prints_the_documents_lines(experiment, tmp_path, monkeypatch, digits):
    monkeypatch.setattr(evaluate_generalization, "scoring_data", lambda *_: digits[:500])
    monkeypatch.setattr(evaluate_generalization, "training_data", lambda *_: digits[500:])
    outputs = ["--plot", tmp_path / "plot.png", "--results", tmp_path / "results.json"]
    options = ["--steps", 3, "--inits", 2, "--reference-epochs", 2]
    output = printed(evaluate_generalization.main, *outputs, *options, cwd=experiment)
    expected = [
        r"Starting evaluation of diffusion-generated checkpoints\.\.\.",
        r"Using device: cpu",
        r"Target CNN: flat dimension = 421642",
        r"Diffusion model loaded from diffusion_optimizer\.pth",
        r"Will generate a checkpoints of 3 steps\.",
        r"Generating checkpoints with diffusion model for 3 steps\.\.\.",
        r"Generated step 3/3",
        r"Evaluating performance along the generated checkpoints\.\.\.",
        rf"Step 0 \(Initial Random Weights\): {SCORE}",
        *(rf"Generated Step {step}/3: {SCORE}" for step in (1, 2, 3)),
        r"Evaluating performance along the original CNN training checkpoints\.\.\.",
        *(rf"Original CNN Epoch {epoch}: {SCORE}" for epoch in (0, 1, 2)),
        r"Warning: Original weight file checkpoints_weights_cnn/weights_epoch_3\.pth not found\. Skipping\.",
        r"\| Generative Step +\| Model Accuracy \(%\) \| Average Loss \| Cross-Entropy per Image \|",
        r"\| -+ \| -+ \| -+ \| -+ \|",
        r"\| 0 \(Initial Random Weights\) \| [\d.]+% +\| [\d.]+ +\| [\d.]+ +\|",
        *(rf"\| {step} +\| [\d.]+% +\| [\d.]+ +\| [\d.]+ +\|" for step in (1, 2, 3)),
        r"Over 2 unseen inits:",
        r"Does the output depend on the input\?",
        r"Is it a copy\?",
        *(
            rf"\| generated, step {step} +\| [\d.]+ +\| 0\.\d+ +\| 0\.\d+ +\| 0\.\d+ +\| \S+_[12]\.pth +\|"
            for step in (1, 3)  # one row for both inits, which end in the same network
        ),
        r"Verdict: recalls the recorded run \(input dependence 0\.0\d\d; closeness .*, cosine 0\.\d{3}\)",
        r"Generating a network takes [\d.]+ s\.",
        r"The generator took [\d.]+ s for its data and [\d.]+ s for its training\.",
        r"Training with Adam .* in [\d.]+ s\.",
        rf"Results saved to {tmp_path}/results\.json",
        r"Plotting results\.\.\.",
        rf"Plot saved to {tmp_path}/plot\.png",
        r"Evaluation finished\.",
    ]
    lines = output.splitlines()
    positions = [next((i for i, line in enumerate(lines) if re.fullmatch(form, line)), form) for form in expected]
    assert positions == sorted(positions, key=lambda position: (isinstance(position, str), position))
    assert not [form for form in positions if isinstance(form, str)]
    accuracies = [float(number) for number in re.findall(r"Generated Step .*Accuracy = ([\d.]+)%", output)]
    assert min(accuracies) > 90
    assert_png(tmp_path / "plot.png", 2700, 1080)
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["verdict"]["verdict"] == "recalls the recorded run"
    assert [round(row["mean"]) for row in record["over_inits"][1:]] == [round(value) for value in accuracies]
    assert len(record["input_dependence"]) == 6
    methods = [network["method"] for network in record["networks"]]
    assert methods.count("generated, step 1") == methods.count("generated, step 3") == 2
    assert methods[-1] == "CNN trained from another seed"
    assert record["networks"][-1]["accuracy_percent"] > 50


def test_comparison_with_the_recorded_run(experiment, tmp_path, monkeypatch, digits):
    monkeypatch.setattr(evaluate_diffusion, "scoring_data", lambda *_: digits[:500])
    output = printed(evaluate_diffusion.main, "--plot", tmp_path / "plot.png", "--steps", 3, cwd=experiment)
    assert re.search(r"\| Step / Epoch \| Diffusion Model Accuracy \(%\) \| Original CNN Accuracy \(%\) \|", output)
    start = re.search(r"\| 0 \(Initial\)  \| ([\d.]+%) +\| ([\d.]+%) +\|", output)
    assert start[1] == start[2]  # generated from the recorded epoch 0
    assert len(re.findall(r"\| 3 +\| [\d.]+%? +\| - +\|", output)) == 2  # three steps, but two epochs
    assert_png(tmp_path / "plot.png", 1800, 720)


def test_the_same_seed_trains_the_same_weights():
    data = load_mnist("train", REPOSITORY / "data")[:1000]

    def train(seed):
        torch.manual_seed(seed)
        model = TargetCNN().to(memory_format=torch.channels_last)
        list(train_with_adam(model, data, 1, batch_size=100))
        return torch.cat([parameter.reshape(-1) for parameter in model.parameters()])

    first = train(1)
    assert torch.equal(first, train(1))
    assert not torch.equal(first, train(2))


def test_the_same_seed_trains_the_same_diffusion_model(experiment, tmp_path):
    states = []
    for seed in (1, 1, 2):
        printed(train_diffusion.main, "--epochs", 5, "--seed", seed, "--out", tmp_path / "model.pth", cwd=experiment)
        states.append(torch.load(tmp_path / "model.pth")["state_dict"])
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("epochs", [1, 40])
def test_checkpoints_of_other_programs_and_lengths_work(tmp_path, epochs):
    directory = tmp_path / "checkpoints_weights_cnn"
    directory.mkdir()
    for epoch in range(epochs + 1):
        torch.save(TargetCNN().state_dict(), checkpoint_path(directory, epoch))
    assert f"from {epochs} pairs" in printed(train_diffusion.main, "--epochs", 2, cwd=tmp_path)


@pytest.fixture
def record(monkeypatch):
    """Run train_target_model.py in this process on a few real images."""
    few = load_mnist("train", REPOSITORY / "data")[:600]

    def run_main(*options, scale=1.0) -> None:
        train = Dataset(few.images[:500] * scale, few.labels[:500])
        monkeypatch.setattr(train_target_model, "training_data", lambda *_: train)
        monkeypatch.setattr(train_target_model, "scoring_data", lambda *_: few[500:])
        printed(train_target_model.main, *options)

    return run_main


def test_several_runs_are_recorded_and_learnt(tmp_path, record):
    directory = tmp_path / "checkpoints_weights_cnn"
    record("--runs", 2, "--epochs", 1, "--checkpoints", directory)
    runs = [load_run(directory / name) for name in ("run_0001", "run_0002")]
    assert not torch.equal(runs[0][0], runs[1][0])
    assert "from 2 pairs" in printed(train_diffusion.main, "--epochs", 2, cwd=tmp_path)


def test_one_of_several_runs_is_the_single_run_of_its_seed(tmp_path, record):
    record("--runs", 2, "--epochs", 1, "--checkpoints", tmp_path / "several")
    record("--seed", 1, "--epochs", 1, "--checkpoints", tmp_path / "single")
    assert torch.equal(load_run(tmp_path / "several" / "run_0002"), load_run(tmp_path / "single"))


def test_recording_again_leaves_nothing_of_the_longer_run_before(tmp_path, record):
    record("--epochs", 3, "--checkpoints", tmp_path)
    record("--epochs", 1, "--checkpoints", tmp_path)
    assert len(load_run(tmp_path)) == 2


def test_a_recording_of_several_runs_that_is_killed_leaves_none_of_those_before(tmp_path, record, monkeypatch, refusal):
    record("--runs", 3, "--epochs", 1, "--checkpoints", tmp_path / "runs")
    seen = []
    monkeypatch.setattr(train_target_model, "print_epoch", lambda *_: seen.append(0) or 1 / (3 - len(seen)))
    with pytest.raises(ZeroDivisionError):
        record("--runs", 3, "--epochs", 1, "--seed", 9, "--checkpoints", tmp_path / "runs")
    assert "run_0003" in refusal(train_diffusion.main, "--checkpoints", tmp_path / "runs")


def test_both_layouts_in_one_directory_are_not_recorded_over(tmp_path, record):
    record("--epochs", 1, "--checkpoints", tmp_path)
    (tmp_path / "run_0001").mkdir()
    before = load_run(tmp_path)
    with pytest.raises(UserError, match="other recorded runs"):
        record("--epochs", 1, "--seed", 5, "--checkpoints", tmp_path)
    assert torch.equal(load_run(tmp_path), before)


def test_recording_leaves_nothing_of_another_program_s_run(tmp_path, record):
    for epoch in (0, 1, 5):
        (tmp_path / f"weights_epoch_{epoch}.safetensors").touch()
    record("--epochs", 1, "--checkpoints", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("weights_*")) == ["weights_epoch_0.pth", "weights_epoch_1.pth"]


def test_training_that_diverges_keeps_the_epochs_before(tmp_path, record):
    with pytest.raises(UserError, match=r"weights_epoch_1\.pth: not saved.*lower --lr"):
        record("--epochs", 1, "--checkpoints", tmp_path, scale=float("nan"))
    assert len(load_run(tmp_path)) == 1


def test_fp32_and_bf16_train_alike(tmp_path, record):
    for precision in ("fp32", "bf16"):
        record("--epochs", 1, "--precision", precision, "--checkpoints", tmp_path / precision)
    fp32, bf16 = (load_run(tmp_path / precision) for precision in ("fp32", "bf16"))
    assert torch.equal(fp32[0], bf16[0])
    moved = (fp32[1] - fp32[0]).norm()
    assert 0 < (fp32[1] - bf16[1]).norm() < 0.5 * moved


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_states_its_meaning_and_default(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(command).parse_options()
    assert caught.value.code == 0
    _, *options = re.split(r"\n  (?=--)", capsys.readouterr().out)
    assert options
    for option in options:
        form = r"--(\S+)(?: [A-Z_]+| {\S+})? (?P<meaning>.+) \((required|default: (?!None|False)\S.*)\)"
        match = re.fullmatch(form, " ".join(option.split()))
        assert match, option
        assert len(set(match["meaning"].lower().split()) - set(match[1].split("-"))) > 1, option


@pytest.mark.parametrize(("path", "name"), [("universal/signatures/__main__.py", "signatures"), ("a/b.py", "b.py")])
def test_errors_name_what_the_user_runs(path, name, monkeypatch, capsys):
    def fail():
        raise UserError("reason")

    monkeypatch.setattr(sys, "argv", [path])
    with pytest.raises(SystemExit):
        run_script(fail)
    assert capsys.readouterr().err == f"{name}: error: reason\n"


def print_and_fail():
    print("a line")
    raise UserError("reason")


@pytest.mark.parametrize("main", [lambda: print("a line"), lambda: option_parser("", 0).parse_args(), print_and_fail])
def test_output_that_nobody_reads_ends_a_script_without_a_word(main, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as caught:
            run_script(main)
    assert caught.value.code == 141
    assert capsys.readouterr().err in ("", "script.py: error: reason\n")


def test_tables_hold_whatever_is_in_their_cells():
    lines = table(["Name", "a|b"], [["x", "1"], ["y|z", "2"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [len(re.split(r"(?<!\\)\|", line)) for line in lines] == [4] * 4 and r"| y\|z |" in lines[3]


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [train_diffusion, evaluate_generalization, evaluate_diffusion])
def test_missing_and_empty_checkpoints_name_the_script_to_run(script, tmp_path, refusal):
    for directory in (tmp_path / "none", tmp_path):
        line = refusal(script.main, "--checkpoints", directory)
        assert str(directory) in line and "run train_target_model.py first" in line


def test_a_script_ends_with_its_exit_code_and_what_it_printed(checkpoints, tmp_path):
    result = run("train_diffusion.py", "--epochs", 2, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("Diffusion model saved to diffusion_optimizer.pth\n")
    result = run("train_diffusion.py", "--checkpoints", "none", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == ("train_diffusion.py: error: none: no such directory: run train_target_model.py first\n")


def test_errors_are_one_line_even_if_what_they_name_has_several(tmp_path, refusal):
    directory = tmp_path / "two\nlines"
    assert "two lines: no such directory" in refusal(train_diffusion.main, "--checkpoints", directory)
    assert "--lr: 'a\\nb' is not a number" in refusal(train_diffusion.main, "--lr", "a\nb")
    assert "unrecognized arguments: --two lines" in refusal(train_diffusion.main, "--two\nlines")


def test_a_single_checkpoint_makes_no_pair(checkpoints, refusal):
    for epoch in (1, 2):
        checkpoint_path(checkpoints, epoch).unlink()
    assert "no pair" in refusal(train_diffusion.main, "--checkpoints", checkpoints)


def test_a_gap_names_the_missing_file(checkpoints, refusal):
    checkpoint_path(checkpoints, 1).unlink()
    for script in (train_diffusion, evaluate_generalization, evaluate_diffusion):
        assert "weights_epoch_1.pth" in refusal(script.main, "--checkpoints", checkpoints)


def test_a_truncated_checkpoint_is_named(checkpoints, refusal):
    path = checkpoint_path(checkpoints, 1)
    path.write_bytes(path.read_bytes()[:1000])
    assert f"{path}: is damaged" in refusal(train_diffusion.main, "--checkpoints", checkpoints)


def test_a_missing_diffusion_model_names_the_script_to_run(checkpoints, tmp_path, refusal):
    for script in (evaluate_generalization, evaluate_diffusion):
        line = refusal(script.main, "--checkpoints", checkpoints, "--model", tmp_path / "none.pth")
        assert "none.pth" in line and "run train_diffusion.py first" in line


def test_a_diffusion_model_of_another_dimension_is_refused(checkpoints, tmp_path, refusal):
    path = tmp_path / "small.pth"
    save_diffusion(SpanDiffusion.of_runs([torch.randn(3, 10)]), path)
    line = refusal(evaluate_generalization.main, "--checkpoints", checkpoints, "--model", path)
    assert "networks of 10 weights, not 421642" in line


def test_a_recorded_init_is_not_unseen(checkpoints, refusal, monkeypatch):
    line = refusal(evaluate_generalization.main, "--checkpoints", checkpoints, "--seed", 0)
    assert "weights_epoch_0.pth" in line and "choose another --seed" in line
    of_seed = evaluate_generalization.random_init
    monkeypatch.setattr(evaluate_generalization, "random_init", lambda seed: of_seed(seed - 1001))  # the reference's
    line = refusal(evaluate_generalization.main, "--checkpoints", checkpoints, "--inits", 1)
    assert "weights_epoch_0.pth: equals the init of --seed 1001" in line


@pytest.mark.parametrize("script", [evaluate_generalization, evaluate_diffusion])
def test_a_model_that_generates_no_weights_is_refused(checkpoints, experiment, tmp_path, refusal, script):
    content = torch.load(experiment / "diffusion_optimizer.pth", weights_only=True)
    content["state_dict"]["output_scale"] *= 1e18
    torch.save(content, tmp_path / "wild.pth")
    options = ["--checkpoints", checkpoints, "--model", tmp_path / "wild.pth", "--plot", tmp_path / "p.png"]
    assert "generates NaN, or weights beyond all measure" in refusal(script.main, *options)


def test_a_damaged_training_log_is_named(checkpoints, refusal):
    (checkpoints / "training_log.json").write_text('{"epochs": [{"epoch": 0}]}')
    for script in (train_diffusion, evaluate_generalization):
        assert "training_log.json: is damaged" in refusal(script.main, "--checkpoints", checkpoints)


@pytest.mark.parametrize(
    ("script", "options"),
    [
        (train_target_model, ["--epochs", "-1"]),
        (train_target_model, ["--epochs", "1000000000"]),
        (train_target_model, ["--epochs", "two"]),
        (train_target_model, ["--lr", "nan"]),
        (train_target_model, ["--lr", "0"]),
        (train_target_model, ["--batch-size", "0"]),
        (train_target_model, ["--seed", "-1"]),
        (train_target_model, ["--seed", str(2**32)]),  # to PyTorch's CPU generator, seed 0 again
        (train_target_model, ["--runs", "0"]),
        (train_target_model, ["--checkpoints", "/dev/null"]),
        (train_diffusion, ["--epochs", "0"]),
        (train_diffusion, ["--out", "/dev/null/model.pth"]),
        (train_diffusion, ["--out", "model.txt"]),
        (evaluate_generalization, ["--steps", "0"]),
        (evaluate_generalization, ["--plot", "plot.exe"]),
        (evaluate_generalization, ["--inits", "0"]),
        (evaluate_generalization, ["--reference-epochs", "-1"]),
        (evaluate_generalization, ["--results", "results.txt"]),
        (evaluate_diffusion, ["--plot", "."]),
        (evaluate_diffusion, ["--colour", "red"]),
        (benchmark, ["--dense-steps", "1"]),
    ],
)
def test_bad_options_are_refused_before_any_work(script, options, refusal):
    assert options[0].lstrip("-") in refusal(script.main, *options)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", ""])
def test_unknown_devices_are_refused(device, refusal):
    assert f"{device!r} is not a device of this machine" in refusal(train_diffusion.main, "--device", device)


def test_an_accelerator_without_double_precision_is_not_the_default(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for name, default in (("mps", "cpu"), ("cuda", "cuda")):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda name=name: torch.device(name))
        assert option_parser("", 0).get_default("device") == default


def test_what_the_system_refuses_gets_one_line(monkeypatch, refusal):
    def closed(*_):
        raise PermissionError(13, "Permission denied", "/closed/to/us")

    monkeypatch.setattr(train_diffusion, "find_runs", closed)
    line = refusal(lambda: run_script(train_diffusion.main))
    assert line.endswith("error: /closed/to/us: Permission denied: choose another path")


def test_training_that_diverges_saves_nothing_broken(checkpoints, tmp_path, refusal):
    line = refusal(train_diffusion.main, "--checkpoints", checkpoints, "--lr", 1000, "--out", tmp_path / "model.pth")
    assert "lower --lr" in line
    assert not (tmp_path / "model.pth").exists()


@pytest.fixture
def files_of_a_megabyte():
    """Larger files fail half-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_earlier_files(checkpoints, tmp_path, refusal, record, files_of_a_megabyte):
    model = tmp_path / "diffusion_optimizer.pth"
    model.write_text("earlier")
    weights = load_run(checkpoints)
    line = "cannot be written (File too large): free some space"
    assert f"{model.name}: {line}" in refusal(train_diffusion.main, cwd=tmp_path)
    with pytest.raises(UserError, match=re.escape(f"weights_epoch_0.pth: {line}")):
        record("--checkpoints", checkpoints)
    assert model.read_text() == "earlier"
    assert torch.equal(load_run(checkpoints), weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoints.name, model.name]


def test_other_recorded_runs_are_not_mixed_with(tmp_path, checkpoints, refusal):
    assert "other recorded runs" in refusal(train_target_model.main, "--runs", 2, "--checkpoints", checkpoints)


def test_ctrl_c_leaves_only_complete_files(tmp_path):
    script = """
import signal
import train_target_model as script

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what it runs in the background
scoring_data = script.scoring_data
script.training_data = script.scoring_data = lambda *options: scoring_data(*options)[:500]
script.run_script(script.main)
"""
    options = ["--epochs", "1000", "--device", "cpu", "--checkpoints", tmp_path]
    command = [sys.executable, "-c", script, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=REPOSITORY, **pipes) as process:
        for line in process.stdout:
            if line.startswith("Epoch  1"):
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines() == ["interrupted"]
    epochs = len(load_run(tmp_path))
    assert epochs >= 2 and len(load_log(tmp_path)) in (epochs, epochs - 1)  # the log is written after the weights
    assert len(list(tmp_path.iterdir())) == epochs + 1


@pytest.mark.parametrize(
    ("main", "name", "option"),
    [
        (train_diffusion.main, "diffusion_optimizer.pth", "--out"),
        (train.main, "universal_training.pth", "--checkpoint"),
        (roads.main, "assets/roads.png", "--plot"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused_before_work_by_default_too(main, name, option, tmp_path, refusal):
    (tmp_path / name).mkdir(parents=True)
    assert f"argument {option}: '{name}' is a directory" in refusal(main, cwd=tmp_path)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="Linux")
def test_directories_that_only_seem_to_be_writable_are_refused(refusal):
    assert "argument --plot: cannot write to '/proc'" in refusal(roads.main, "--plot", "/proc/roads.png")
