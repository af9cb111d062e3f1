"""Step 3, the key experiment: take a TargetCNN with a new, unseen random initialisation through generative steps.

    python evaluate_generalization.py

prints the score of every generated state beside the recorded training run (design document, sections 2.3 and 3.1) and
saves the plot of both.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from diffusion_model import load_diffusion, rollout
from target_cnn import (
    CHECKPOINTS,
    Score,
    TargetCNN,
    UserError,
    add_data_options,
    checkpoint_path,
    find_runs,
    flatten_weights,
    load_run,
    number,
    option_parser,
    output_file,
    run_script,
    save_file,
    score_weights,
    scoring_data,
)


def parse_options() -> argparse.Namespace:
    parser = evaluation_parser(
        "Take an unseen random TargetCNN through generative steps.", "diffusion_evaluation_plot.png"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    print("Starting evaluation of diffusion-generated checkpoints...")
    print(f"Using device: {options.device}")
    torch.manual_seed(options.seed)
    init = flatten_weights(TargetCNN())
    print(f"Target CNN: flat dimension = {len(init)}")
    runs = {directory: load_run(directory) for directory in find_runs(options.checkpoints)}
    refuse_recorded(init, runs, options.seed)
    model = load_diffusion(options.model, len(init), options.device)
    print(f"Diffusion model loaded from {options.model}")
    data = scoring_data(options.data, options.validation, options.device)

    print(f"Will generate a checkpoints of {options.steps} steps.")
    print(f"Generating checkpoints with diffusion model for {options.steps} steps...")
    generated = rollout(model, init.to(options.device), options.steps)
    del model  # 1.7 GB that nothing needs any more
    print(f"Generated step {options.steps}/{options.steps}")

    print("Evaluating performance along the generated checkpoints...")
    generated_scores = score_weights(generated, data)
    for step, result in enumerate(generated_scores):
        name = f"Generated Step {step}/{options.steps}" if step else "Step 0 (Initial Random Weights)"
        print(f"{name}: {describe(result)}")

    directory, run = next(iter(runs.items()))
    print("Evaluating performance along the original CNN training checkpoints...")
    original_scores = score_weights(run[: options.steps + 1].to(options.device), data)
    for epoch, result in enumerate(original_scores):
        print(f"Original CNN Epoch {epoch}: {describe(result)}")
    for epoch in range(len(run), options.steps + 1):
        print(f"Warning: Original weight file {checkpoint_path(directory, epoch)} not found. Skipping.")

    print(steps_table(generated_scores))
    print("Plotting results...")
    plot(generated_scores, original_scores, options.plot)
    print(f"Plot saved to {options.plot}")
    print("Evaluation finished.")


def evaluation_parser(description: str, plot_name: str) -> argparse.ArgumentParser:
    """The options that both evaluations take. The seed is none that training uses by default."""
    parser = option_parser(description, seed=1000)
    parser.add_argument(
        "--model", type=Path, default=Path("diffusion_optimizer.pth"), help="the diffusion model to evaluate"
    )
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="directory of the recorded weights")
    parser.add_argument("--steps", type=number(int, 1, 1000), default=6, help="generative steps")
    parser.add_argument(
        "--plot", type=output_file(".png", ".pdf", ".svg"), default=Path(plot_name), help="plot to save"
    )
    add_data_options(parser)
    return parser


def refuse_recorded(init: Tensor, runs: dict[Path, Tensor], seed: int) -> None:
    """Raise UserError if `init`, [421642], is one of the recorded checkpoints."""
    for directory, run in runs.items():
        for epoch, weights in enumerate(run):
            if torch.equal(init, weights):
                path = checkpoint_path(directory, epoch)
                raise UserError(f"{path}: equals the init of --seed {seed}, which is not unseen: choose another --seed")


def describe(result: Score) -> str:
    """A score in the document's words."""
    return f"Accuracy = {result.accuracy_percent:.2f}%, Avg Loss = {result.average_loss:.4f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """An aligned Markdown table."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def steps_table(scores: list[Score]) -> str:
    """The table of design document section 3.1, and the mean cross-entropy per image."""
    header = ["Generative Step", "Model Accuracy (%)", "Average Loss", "Cross-Entropy per Image"]
    rows = [
        [
            str(step) if step else "0 (Initial Random Weights)",
            f"{result.accuracy_percent:.2f}%",
            f"{result.average_loss:.4f}",
            f"{result.cross_entropy:.4f}",
        ]
        for step, result in enumerate(scores)
    ]
    return table(header, rows)


def plot(generated: list[Score], original: list[Score], path: Path) -> None:
    """Save two panels, accuracy and loss over step or epoch, generated against original.

    Both axes show the trained range; the random start, far outside it, is named in the margin.
    """
    import matplotlib  # imported here: training and the tables do not need it

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    curves = {"generated": (generated, "#0072B2", "o-"), "original training": (original, "#D55E00", "s--")}
    figure, (accuracy_panel, loss_panel) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for panel, field in ((accuracy_panel, "accuracy_percent"), (loss_panel, "average_loss")):
        trained = []
        for name, (scores, colour, style) in curves.items():
            values = [getattr(result, field) for result in scores]
            panel.plot(range(len(values)), values, style, color=colour, label=name, markersize=5)
            trained += values[1:]
        margin = 0.08 * (max(trained) - min(trained)) or 0.1
        panel.set_ylim(min(trained) - margin, max(trained) + margin)
        panel.set_xlim(-0.3, max(len(generated), len(original)) - 0.7)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_xlabel("generative step / training epoch")
        panel.grid(alpha=0.3)
    start = generated[0]
    accuracy_panel.set(title="Accuracy", ylabel="accuracy (%)")
    accuracy_panel.legend(loc="lower right")
    accuracy_panel.annotate(
        f"step 0:\n{start.accuracy_percent:.1f} %", (0.02, 0.02), xycoords="axes fraction", color="#444444"
    )
    loss_panel.set(title="Loss", ylabel="average loss (sum over a batch of 256)")
    loss_panel.legend(loc="upper right")
    loss_panel.annotate(f"step 0:\n{start.average_loss:.0f}", (0.02, 0.91), xycoords="axes fraction", color="#444444")
    save_file(path, lambda temporary: figure.savefig(temporary, dpi=150))
    plt.close(figure)


if __name__ == "__main__":
    run_script(main)
