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
    number,
    run_script,
    save_json,
    table,
)
from target_cnn import (
    Score,
    TargetCNN,
    checkpoint_path,
    find_runs,
    flatten_weights,
    load_log,
    load_run,
    load_weights,
    random_init,
    recorded_files,
    score_weights,
    scoring_data,
    train_with_adam,
    training_data,
)
from universal.experiment.generators import evaluation_parser, load_generator
from universal.experiment.pictures import plot_evaluation
from universal.experiment.verdict import assess, cost, match_neurons, report, starting_points


def parse_options() -> argparse.Namespace:
    parser = evaluation_parser(
        "Take unseen random TargetCNNs through generative steps, and tell generalisation from recall.",
        plot="diffusion_evaluation_plot.png",
        results="generalization_results.json",
    )
    parser.add_argument("--inits", type=number(int, 1, 1000), default=5, help="unseen inits, from seeds SEED on")
    parser.add_argument(
        "--reference-epochs",
        type=number(int, 0, 1000),
        default=1,
        help="train a CNN from another seed for so many epochs, to compare with; 0 for none",
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
    for seed in range(options.seed, options.seed + options.inits + bool(options.reference_epochs)):
        refuse_recorded(random_init(seed), recorded, seed)
    directory, run = next(iter(runs.items()))
    log = load_log(directory)
    model = load_generator(options.model, len(inits[0]), options)
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

    reference = train_reference(options) if options.reference_epochs else None
    record = assess(
        starts, states, options.inits, generated_scores, recorded, original_scores, reference, data, options.seed
    )
    record["cost"] = cost(generator_seconds, seconds_to_generate, log, record["over_inits"][-1]["mean"])
    print(report(record))
    save_json(options.results, {"model": str(options.model), "seed": options.seed, "inits": options.inits} | record)
    print(f"Results saved to {options.results}")

    print("Plotting results...")
    shown = networks_to_show(states[:, : options.inits], recorded, record["networks"])
    plot_evaluation(generated_scores, original_scores[: options.steps + 1], record["networks"], shown, options.plot)
    print(f"Plot saved to {options.plot}")
    print("Evaluation finished.")


def train_reference(options: argparse.Namespace) -> Tensor:
    """The weights, [421642], of a TargetCNN trained for `--reference-epochs` from the first seed after the inits'."""
    init = random_init(options.seed + options.inits)
    model = load_weights(TargetCNN(), init).to(options.device, memory_format=torch.channels_last)
    data = training_data(options.data, options.validation, options.device)
    for _ in train_with_adam(model, data, options.reference_epochs, label="Reference CNN"):
        pass
    return flatten_weights(model).cpu()


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
        [str(step) if step else "0 (Initial Random Weights)", f"{result.accuracy_percent:.2f}%",
         f"{result.average_loss:.4f}", f"{result.cross_entropy:.4f}"]
        for step, result in enumerate(scores)
    ]  # fmt: skip
    return table(header, rows)


def networks_to_show(states: Tensor, recorded: dict[str, Tensor], networks: list[dict]) -> dict[str, Tensor]:
    """The networks whose weights the plot shows, [421642] each, by title.

    `states` are those of the unseen inits, [steps + 1, inits, 421642], `recorded` the checkpoints by file name, and
    `networks` those of `assess`. The neurons of the nearest checkpoint and of what a second init ends in are matched to
    those of what the first init ends in, so that the three can be compared filter by filter.
    """
    last = len(states) - 1
    end = states[last, 0]
    nearest = next(network["nearest"] for network in networks if network["method"] == f"generated, step {last}")
    shown = {
        "unseen init": states[0, 0],
        "generated, step 1": states[1, 0],
        f"generated, step {last}": end,
        f"nearest recorded checkpoint\n({Path(nearest).name}, neurons matched)": match_neurons(recorded[nearest], end),
    }
    for other in states[last, 1:2]:
        shown[f"generated, step {last}, from a second unseen init\n(neurons matched)"] = match_neurons(other, end)
    return shown


if __name__ == "__main__":
    run_script(main)
