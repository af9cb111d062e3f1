"""Step 3, the key experiment: take a TargetCNN with a new, unseen random initialisation through generative steps.

    python evaluate_generalization.py

prints the score of every generated state beside the recorded training run (design document, sections 2.3 and 3.1). Then
it asks what these figures cannot tell, whether the model generalises or recalls: from many inits and from starts that
hold nothing to generalise from, against the recorded checkpoints and against trivial methods. It saves the plot and, as
generalization_results.json, everything it found.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from diffusion_model import rollout
from scripting import (
    UserError,
    add_data_options,
    number,
    option_parser,
    output_file,
    run_script,
    save_file,
    save_json,
    table,
)
from target_cnn import (
    CHECKPOINTS,
    Score,
    TargetCNN,
    checkpoint_path,
    fast_bf16,
    find_runs,
    flatten_weights,
    load_log,
    load_run,
    load_weights,
    random_init,
    recorded_files,
    score_weights,
    scoring_data,
    train_epoch,
    training_data,
)
from universal.flat import load_generator
from universal.generalization import assess, cost, report, starting_points


def parse_options() -> argparse.Namespace:
    parser = evaluation_parser(
        "Take unseen random TargetCNNs through generative steps, and tell generalisation from recall.",
        "diffusion_evaluation_plot.png",
    )
    parser.add_argument("--inits", type=number(int, 1, 1000), default=5, help="unseen inits, from seeds SEED on")
    parser.add_argument("--reference", type=Path, help="directory of a run recorded from another seed, to compare with")
    parser.add_argument(
        "--reference-epochs",
        type=number(int, 0, 1000),
        default=1,
        help="without --reference, train a CNN from another seed for so many epochs to compare with; 0 for none",
    )
    parser.add_argument(
        "--results", type=output_file(".json"), default=Path("generalization_results.json"), help="record to save"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    print("Starting evaluation of diffusion-generated checkpoints...")
    print(f"Using device: {options.device}")
    inits = [random_init(options.seed + index) for index in range(options.inits)]
    print(f"Target CNN: flat dimension = {len(inits[0])}")
    runs = {directory: load_run(directory) for directory in find_runs(options.checkpoints)}
    recorded = {
        str(path): weights
        for directory, run in runs.items()
        for path, weights in zip(recorded_files(directory), run, strict=True)
    }
    for index, init in enumerate(inits):
        refuse_recorded(init, recorded, options.seed + index)
    directory, run = next(iter(runs.items()))
    log = load_log(directory)
    reference = load_run(find_runs(options.reference)[0])[-1] if options.reference else None
    model = load_generator(options.model, len(inits[0]), options.device)
    print(f"Diffusion model loaded from {options.model}")
    data = scoring_data(options.data, options.validation, options.device)

    print(f"Will generate a checkpoints of {options.steps} steps.")
    print(f"Generating checkpoints with diffusion model for {options.steps} steps...")
    starts = starting_points(inits, run[0], options.seed)
    begin = time.perf_counter()
    states = rollout(model, torch.stack(list(starts.values())).to(options.device), options.steps).cpu()
    seconds_to_generate = (time.perf_counter() - begin) / len(starts)
    generator_seconds = model.seconds
    del model  # 1.7 GB that nothing needs any more
    print(f"Generated step {options.steps}/{options.steps}")

    print("Evaluating performance along the generated checkpoints...")
    generated_scores = score_weights(states[:, 0], data)
    for step, result in enumerate(generated_scores):
        name = f"Generated Step {step}/{options.steps}" if step else "Step 0 (Initial Random Weights)"
        print(f"{name}: {describe(result)}", flush=True)

    print("Evaluating performance along the original CNN training checkpoints...")
    original_scores = score_weights(run, data)
    for epoch, result in enumerate(original_scores[: options.steps + 1]):
        print(f"Original CNN Epoch {epoch}: {describe(result)}")
    for epoch in range(len(run), options.steps + 1):
        print(f"Warning: Original weight file {checkpoint_path(directory, epoch)} not found. Skipping.")
    print(steps_table(generated_scores), flush=True)

    if reference is None and options.reference_epochs:
        reference = train_reference(options)
    record = assess(
        starts,
        states,
        options.inits,
        generated_scores,
        recorded=recorded,
        recorded_scores=original_scores,
        reference=reference,
        data=data,
        seed=options.seed,
    )
    record["cost"] = cost(generator_seconds, seconds_to_generate, log, record["over_inits"][-1]["mean"])
    print(report(record))
    save_json(options.results, {"model": str(options.model), "seed": options.seed, "inits": options.inits} | record)
    print(f"Results saved to {options.results}")

    print("Plotting results...")
    plot(generated_scores, original_scores[: options.steps + 1], options.plot, record["networks"])
    print(f"Plot saved to {options.plot}")
    print("Evaluation finished.")


def train_reference(options: argparse.Namespace) -> Tensor:
    """The weights, [421642], of a TargetCNN trained for `--reference-epochs` from the first seed after the inits'."""
    init = random_init(options.seed + options.inits)
    model = load_weights(TargetCNN(), init).to(options.device, memory_format=torch.channels_last)
    adam = torch.optim.Adam(model.parameters(), fused=True)
    data = training_data(options.data, options.validation, options.device)
    for epoch in range(1, options.reference_epochs + 1):
        train_epoch(model, adam, data, 128, fast_bf16(options.device), f"Reference CNN, epoch {epoch}")
    return flatten_weights(model).cpu()


def evaluation_parser(description: str, plot_name: str) -> argparse.ArgumentParser:
    """The options that both evaluations take. The seed is none that training uses by default."""
    parser = option_parser(description, seed=1000)
    parser.add_argument("--model", type=Path, default=Path("diffusion_optimizer.pth"), help="the model to evaluate")
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="directory of the recorded weights")
    parser.add_argument("--steps", type=number(int, 1, 1000), default=6, help="generative steps")
    parser.add_argument(
        "--plot", type=output_file(".png", ".pdf", ".svg"), default=Path(plot_name), help="plot to save"
    )
    add_data_options(parser)
    return parser


def refuse_recorded(init: Tensor, recorded: dict[str, Tensor], seed: int) -> None:
    """Raise UserError if `init`, [421642], is one of the recorded checkpoints, [421642] each by the names of files."""
    for path, weights in recorded.items():
        if torch.equal(init, weights):
            raise UserError(f"{path}: equals the init of --seed {seed}, which is not unseen: choose another --seed")


def describe(result: Score) -> str:
    """A score in the document's words."""
    return f"Accuracy = {result.accuracy_percent:.2f}%, Avg Loss = {result.average_loss:.4f}"


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


def plot(generated: list[Score], original: list[Score], path: Path, networks: list[dict] | None = None) -> None:
    """Save two panels, accuracy and loss over step or epoch, generated against original.

    Both show the trained range; the random start, far outside it, is named in the margin. With the `networks` of
    `universal.generalization.assess` a third panel shows accuracy against error overlap with the recorded checkpoints.
    """
    import matplotlib  # imported here: training and the tables do not need it

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    panels = 3 if networks else 2
    figure, axes = plt.subplots(1, panels, figsize=(6 * panels, 4.8), layout="constrained")
    curves = {"generated": (generated, "#0072B2", "o-"), "original training": (original, "#D55E00", "s--")}
    for panel, field in zip(axes, ("accuracy_percent", "average_loss"), strict=False):
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
    start = generated[0]
    margin_note = {"xycoords": "axes fraction", "color": "#444444"}
    axes[0].set(title="Accuracy", ylabel="accuracy (%)")
    axes[0].legend(loc="lower right")
    axes[0].annotate(f"step 0:\n{start.accuracy_percent:.1f} %", (0.02, 0.02), **margin_note)
    axes[1].set(title="Loss", ylabel="average loss (sum over a batch of 256)")
    axes[1].legend(loc="upper right")
    axes[1].annotate(f"step 0:\n{start.average_loss:.0f}", (0.02, 0.91), **margin_note)
    if networks:
        plot_overlaps(axes[2], networks)
    for panel in axes:
        panel.grid(alpha=0.3)
    save_file(path, lambda temporary: figure.savefig(temporary, dpi=150))
    plt.close(figure)


def plot_overlaps(panel, networks: list[dict]) -> None:
    """Draw each network's accuracy over its error overlap with the recorded checkpoints, a colour for each method."""
    colours = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#F0E442", "#000000", "#D55E00")
    methods = list(dict.fromkeys(network["method"] for network in networks))
    for method, colour, marker in zip(methods, colours * 2, "oD^vs<>pP*X" * 2, strict=False):
        points = [network for network in networks if network["method"] == method]
        panel.scatter(
            [network["error_overlap"] for network in points],
            [network["accuracy_percent"] for network in points],
            color=colour, marker=marker, label=method, alpha=0.8, edgecolors="#444444", linewidths=0.5,
        )  # fmt: skip
    panel.set(
        title="Is it a copy?",
        xlabel="error overlap with the nearest recorded checkpoint (IoU)",
        ylabel="accuracy (%)",
        xlim=(-0.03, 1.03),
    )
    panel.legend(loc="best", fontsize="small")


if __name__ == "__main__":
    run_script(main)
