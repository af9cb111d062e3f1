"""Train the generative model of weights: a denoiser of matrices, on unlabelled tensors alone.

    python -m universal.signatures.diffusion

draws at every step a few matrices of the corpus, crops them to one random shape, adds noise of a random deviation, and
learns to undo it (design document, section 4.1.2; Ho et al. 2020). No label, task or accuracy is seen, and nothing of
the families in `HELD_OUT`, on which progress is measured. Killed, the same command goes on from its last checkpoint.
"""

import argparse
import math
import random
import time
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scripting import (
    UserError,
    add_training_options,
    number,
    option_parser,
    resume_training,
    run_script,
    save_tensors,
    save_training,
)
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


def main() -> None:
    options = parse_options()
    seen, unseen = load_split(options.corpus)
    torch.manual_seed(options.seed)
    denoiser = Denoiser().to(options.device)
    average = AveragedModel(denoiser, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    adam = torch.optim.AdamW(denoiser.parameters(), weight_decay=1e-4, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, options.lr, total_steps=max(options.steps, 20), pct_start=0.1)
    parts = {"denoiser": denoiser, "average": average, "adam": adam, "schedule": schedule}
    settings = {"seed": options.seed, "steps": options.steps, "lr": options.lr, "families": list(seen)}
    step, seconds = resume_training(options.checkpoint, settings, parts, MAKER)
    if step:
        print(f"Going on from step {step}, saved in {options.checkpoint}")
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    print(f"Using device: {options.device}")
    print(
        f"Training a denoiser of {parameters:,} parameters on {len(seen)} families for {options.steps} steps",
        flush=True,
    )
    while step < options.steps:
        start, losses, until = time.perf_counter(), [], min(step + options.report_every, options.steps)
        while step < until:
            losses.append(one_step(denoiser, seen, adam, options, step))
            schedule.step()
            average.update_parameters(denoiser)
            step += 1
        seconds += time.perf_counter() - start
        if not math.isfinite(loss := torch.stack(losses).mean().item()):
            raise UserError(f"the loss is not finite after {step} steps, nothing saved: lower --lr")
        ratios = (
            fmean(against_best(held_out_errors(average.module, matrices, sigma, 6)) for matrices in unseen.values())
            for sigma in EVALUATED_SIGMAS
        )
        held_out = ", ".join(f"{ratio:.4f} ({sigma:g})" for ratio, sigma in zip(ratios, EVALUATED_SIGMAS, strict=True))
        minutes = seconds / step * (options.steps - step) / 60
        print(
            f"Step {step:{len(str(options.steps))}d}/{options.steps}: Loss = {loss:.4f}, "
            f"Held-Out Error / Best Classical = {held_out}, Time Left = {minutes:.1f} min",
            flush=True,
        )
        if step < options.steps:
            save_training(options.checkpoint, settings, step, seconds, parts)
    state = {name: tensor.cpu() for name, tensor in average.module.state_dict().items()}
    save_tensors(options.out, {"settings": denoiser.settings, "state_dict": state})
    options.checkpoint.unlink(missing_ok=True)
    print(f"Trained in {seconds / 60:.1f} min\nDenoiser saved to {options.out}")


def one_step(
    denoiser: Denoiser,
    corpus: dict[str, list[Tensor]],
    adam: torch.optim.Optimizer,
    options: argparse.Namespace,
    step: int,
) -> Tensor:
    """Learn from a few noisy matrices; the loss is the error over that of the best classical method."""
    draw = random.Random(f"{options.seed} {step}")  # of every step its own: a resumed training draws the same
    torch.manual_seed(draw.getrandbits(31))
    families = list(corpus)
    matrices = [draw.choice(corpus[draw.choice(families)]) for _ in range(BATCH_SIZE)]
    matrices = [matrix.T if draw.random() < 0.5 else matrix for matrix in matrices]
    rows, columns = (round(math.exp(draw.uniform(*map(math.log, SIDES)))) for _ in range(2))
    clean = batch_of(matrices, rows, columns, draw).to(options.device)
    sigma = math.exp(draw.uniform(*map(math.log, SIGMAS)))
    noisy = clean + sigma * torch.randn_like(clean)
    with torch.no_grad():
        best = torch.stack([errors(method(noisy, sigma), clean) for method in CLASSICAL.values()]).amin(0)
    loss = (errors(denoiser(noisy, sigma), clean) / best.clamp(min=1e-3)).clamp(max=3).mean()
    adam.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
    adam.step()
    return loss.detach()


if __name__ == "__main__":
    run_script(main)
