"""Train the generative model of weights: a denoiser of matrices, on unlabelled tensors alone.

    python -m universal.signatures.diffusion

draws at every step a few matrices of the corpus, crops them to one random shape, adds noise of a random deviation, and
learns to undo it (design document, section 4.1.2; Ho et al. 2020). No label, task or accuracy is seen, and nothing of
the families in `HELD_OUT`, on which progress is measured. Killed, the same command goes on from its last checkpoint.
"""

import argparse
import math
import random
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scripting import UserError, add_training_options, number, option_parser, run_script, run_to_end, save_tensors
from universal.signatures.denoising import (
    CLASSICAL,
    DENOISER,
    EVALUATED_SIGMAS,
    MAKER,
    Denoiser,
    against_best,
    errors,
    held_out_errors,
)
from universal.signatures.matrices import CORPUS, batch_of, load_split

SIGMAS = (0.1, 5.0)  # least and largest deviation of the noise; entries have 1
SIDES = (12, 160)  # least and most rows and columns
BATCH_SIZE = 6


def parse_options() -> argparse.Namespace:
    parser = option_parser("Train a denoiser of weights on unlabelled tensors.", seed=0)
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="the corpus of trained weights")
    parser.add_argument(
        "--steps", type=number(int, 1, 10**8), default=20_000, help="batches of noisy matrices to learn from"
    )
    parser.add_argument("--lr", type=number(float, 1e-9, 1e3), default=2e-3, help="highest learning rate of AdamW")
    add_training_options(parser, report_every=1000, checkpoint="denoiser_training.pth", out=DENOISER)
    return parser.parse_args()


class Training:
    """The state of a training, for `run_to_end`. Raises UserError if the corpus cannot be read."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.steps = options, options.steps
        self.seen, self.unseen = load_split(options.corpus)
        torch.manual_seed(options.seed)
        self.denoiser = Denoiser().to(options.device)
        self.average = AveragedModel(self.denoiser, multi_avg_fn=get_ema_multi_avg_fn(0.998))
        self.adam = torch.optim.AdamW(self.denoiser.parameters(), weight_decay=1e-4, betas=(0.9, 0.99))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.adam, options.lr, total_steps=max(options.steps, 20), pct_start=0.1
        )
        self.step, self.seconds, self.loss = 0, 0.0, float("nan")

    def run(self, until: int) -> None:
        """Train up to step `until`. Raises UserError if a loss is not finite."""
        losses = []
        while self.step < until:
            losses.append(self.one_step())
            self.step += 1
        self.loss = torch.stack(losses).mean().item()
        if not math.isfinite(self.loss):
            raise UserError(f"diverged by step {self.step}: lower --lr, and delete {self.options.checkpoint}")

    def one_step(self) -> Tensor:
        """Learn from a few noisy matrices; the loss is the error over that of the best classical method."""
        draw = random.Random(f"{self.options.seed} {self.step}")  # of every step its own: a resumed training draws it
        torch.manual_seed(draw.getrandbits(31))
        families = list(self.seen)
        matrices = [draw.choice(self.seen[draw.choice(families)]) for _ in range(BATCH_SIZE)]
        matrices = [matrix.T if draw.random() < 0.5 else matrix for matrix in matrices]
        rows, columns = (round(math.exp(draw.uniform(*map(math.log, SIDES)))) for _ in range(2))
        clean = batch_of(matrices, rows, columns, draw).to(self.options.device)
        sigma = math.exp(draw.uniform(*map(math.log, SIGMAS)))
        noisy = clean + sigma * torch.randn_like(clean)
        with torch.no_grad():
            best = torch.stack([errors(method(noisy, sigma), clean) for method in CLASSICAL.values()]).amin(0)
        loss = (errors(self.denoiser(noisy, sigma), clean) / best.clamp(min=1e-3)).clamp(max=3).mean()
        self.adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        self.adam.step()
        self.schedule.step()
        self.average.update_parameters(self.denoiser)
        return loss.detach()

    def report(self, minutes_left: float) -> None:
        """Print the progress, with the error in families that are not learned from, at each level of noise."""
        families, denoiser = self.unseen.values(), self.average.module
        held_out = (
            (fmean(against_best(held_out_errors(denoiser, matrices, sigma, 6)) for matrices in families), sigma)
            for sigma in EVALUATED_SIGMAS
        )
        print(
            f"Step {self.step:{len(str(self.steps))}d}/{self.steps}: Loss = {self.loss:.4f}, "
            f"Held-Out Error / Best Classical = {', '.join(f'{ratio:.4f} ({sigma:g})' for ratio, sigma in held_out)}, "
            f"Time Left = {minutes_left:.1f} min",
            flush=True,
        )

    def settings(self) -> dict:
        """What a training that goes on must share with the one that was interrupted."""
        return {name: getattr(self.options, name) for name in ("seed", "steps", "lr")} | {"families": list(self.seen)}

    def parts(self) -> dict:
        """What has a state_dict."""
        return {"denoiser": self.denoiser, "average": self.average, "adam": self.adam, "schedule": self.schedule}


def main() -> None:
    options = parse_options()
    training = Training(options)
    size, families = sum(parameter.numel() for parameter in training.denoiser.parameters()), len(training.seen)
    print(f"Using device: {options.device}")
    print(f"Training a denoiser of {size:,} parameters on {families} families for {options.steps} steps", flush=True)
    run_to_end(training, MAKER)
    state = {name: tensor.cpu() for name, tensor in training.average.module.state_dict().items()}
    save_tensors(options.out, {"settings": training.denoiser.settings, "state_dict": state})
    options.checkpoint.unlink(missing_ok=True)
    print(f"Trained in {training.seconds / 60:.1f} min\nDenoiser saved to {options.out}")


if __name__ == "__main__":
    run_script(main)
