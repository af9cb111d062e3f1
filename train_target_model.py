"""Step 1: train the TargetCNN on MNIST and record its weights after every epoch (design document, section 2.1.3).

    python train_target_model.py

writes checkpoints_weights_cnn/weights_epoch_0.pth (before training) up to weights_epoch_5.pth, and training_log.json:
what it prints of each epoch. With --runs K it records K trainings from K seeds instead, as
checkpoints_weights_cnn/run_0001/weights_epoch_*.pth and so on.
"""

import argparse
import itertools
from pathlib import Path

import torch

from scripting import (
    UserError,
    add_data_options,
    number,
    option_parser,
    output_directory,
    run_script,
    save_json,
)
from target_cnn import (
    CHECKPOINTS,
    TargetCNN,
    checkpoint_path,
    fast_bf16,
    recorded_files,
    recorded_runs,
    save_checkpoint,
    score,
    scoring_data,
    train_with_adam,
    training_data,
)


def parse_options() -> argparse.Namespace:
    parser = option_parser("Train the TargetCNN on MNIST and record its weights after every epoch.", seed=0)
    parser.add_argument("--epochs", type=number(int, 1, 10_000), default=5, help="passes over the training images")
    parser.add_argument("--batch-size", type=number(int, 1, 60_000), default=128, help="images per step of Adam")
    parser.add_argument("--lr", type=number(float, 1e-9, 1e3), default=1e-3, help="learning rate of Adam")
    parser.add_argument("--runs", type=number(int, 1, 9999), default=1, help="trainings to record, from seeds SEED on")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: the faster here")
    parser.add_argument("--checkpoints", type=output_directory, default=str(CHECKPOINTS), help="directory to record in")
    add_data_options(parser)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    directories = run_directories(options.checkpoints, options.runs)
    train = training_data(options.data, options.validation, options.device)
    scored = scoring_data(options.data, options.validation, options.device)
    use_bf16 = options.precision == "bf16" or (options.precision == "auto" and fast_bf16(options.device))
    print(f"Using device: {options.device}, precision: {'bf16' if use_bf16 else 'fp32'}")

    for run, directory in enumerate(directories):
        if options.runs > 1:
            print(f"Run {run + 1}/{options.runs}, seed {options.seed + run}")
        torch.manual_seed(options.seed + run)
        model = TargetCNN().to(options.device, memory_format=torch.channels_last)
        save_checkpoint(model, directory, 0)
        for stale in filter(Path.is_dir, directories[run:]):  # of earlier runs, which must not mix with this
            for path in {*recorded_files(stale), stale / "training_log.json"} - {checkpoint_path(directory, 0)}:
                path.unlink(missing_ok=True)
        log = []
        training = train_with_adam(model, train, options.epochs, options.lr, options.batch_size, use_bf16)
        for epoch, _, loss, seconds, _ in itertools.chain([(0, 0, None, 0.0, 0.0)], training):
            if epoch:
                save_checkpoint(model, directory, epoch)
            accuracy_percent = score(model, scored).accuracy_percent
            log.append(
                {"epoch": epoch, "training_loss": loss, "accuracy_percent": accuracy_percent, "seconds": seconds}
            )
            save_json(directory / "training_log.json", {"seed": options.seed + run, "epochs": log})
            print_epoch(epoch, loss, accuracy_percent, seconds, options.validation)
    print(f"Weights saved to {options.checkpoints}")


def run_directories(directory: Path, runs: int) -> list[Path]:
    """Where each run is recorded. Raises UserError where the other layout lies, which may be hours of work."""
    directories = [directory] if runs == 1 else [directory / f"run_{run:04d}" for run in range(1, runs + 1)]
    if directory.is_dir():
        recorded = {*recorded_runs(directory), *([directory] if recorded_files(directory) else [])}
        if not recorded <= {*directories}:
            raise UserError(f"{directory}: holds other recorded runs: delete them or choose another --checkpoints")
    return directories


def print_epoch(epoch: int, loss: float | None, accuracy_percent: float, seconds: float, validation: int) -> None:
    """One line of the training's table."""
    shown = "   --   " if loss is None else f"{loss:8.4f}"
    accuracy = f"{'Validation' if validation else 'Test'} Accuracy = {accuracy_percent:5.2f}%"
    print(f"Epoch {epoch:2d}: Training Loss = {shown}, {accuracy}, Time = {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    run_script(main)
