"""The side-by-side comparison of design document section 3.3: generating from the recorded epoch 0 against training.

    python evaluate_diffusion.py

For an initialisation that the diffusion model never saw, run evaluate_generalization.py.
"""

import argparse
from itertools import zip_longest

from diffusion_model import rollout
from scripting import run_script, table
from target_cnn import Score, find_runs, load_run, score_weights, scoring_data
from universal.experiment.generators import evaluation_parser, load_generator
from universal.experiment.pictures import plot_comparison


def parse_options() -> argparse.Namespace:
    return evaluation_parser(
        "Compare generation from the recorded epoch 0 with the recorded training.", "diffusion_comparison_plot.png"
    ).parse_args()


def main() -> None:
    options = parse_options()
    print(f"Using device: {options.device}")
    directory = find_runs(options.checkpoints)[0]
    run = load_run(directory).to(options.device)
    model = load_generator(options.model, run.shape[1], options)
    data = scoring_data(options.data, options.validation, options.device)

    print(f"Generating {options.steps} steps with {options.model} from epoch 0 of {directory}...")
    states = rollout(model, run[0], options.steps)
    scores = score_weights([*states, *run], data)
    generated, original = scores[: len(states)], scores[len(states) :]

    print(comparison_table("Accuracy (%)", "{0.accuracy_percent:.2f}%", generated, original))
    print()
    print(comparison_table("Average Loss", "{0.average_loss:.4f}", generated, original))
    plot_comparison(generated, original, options.plot)
    print(f"Plot saved to {options.plot}")


def comparison_table(quantity: str, form: str, generated: list[Score], original: list[Score]) -> str:
    """The table of design document section 3.3 for one quantity, a dash where one side has no value."""
    header = ["Step / Epoch", f"Diffusion Model {quantity}", f"Original CNN {quantity}"]
    rows = [
        [f"{step}" if step else "0 (Initial)", *(form.format(result) if result else "-" for result in pair)]
        for step, pair in enumerate(zip_longest(generated, original))
    ]
    return table(header, rows)


if __name__ == "__main__":
    run_script(main)
