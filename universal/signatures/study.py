"""Does the thesis hold? How well the signature of trained weights is known in families of networks never seen.

    python -m universal.signatures.study

prints, one family held out at a time, how well the scorer tells trained matrices from null models and inits; which
statistics carry that; and whether the score says how good a network is. It saves the picture assets/signatures.png and
everything it found as signature_study.json.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from scripting import (
    add_data_options,
    add_output_options,
    new_figure,
    number,
    option_parser,
    run_script,
    save_figure,
    save_json,
    table,
)
from target_cnn import Dataset, scoring_data, training_data
from target_cnn import score as accuracy_of
from universal.evaluation.networks import EVALUATED
from universal.rules.synthesis import synthesize
from universal.signatures.detection import (
    SIGNATURES,
    LabelledSignatures,
    areas_of,
    held_out_logits,
    load_signatures,
    trained_scorer,
)
from universal.signatures.nulls import UNTRAINED
from universal.signatures.scorer import load_scorer
from universal.signatures.statistics import SCORED
from universal.signatures.trials import network_score, trained_networks

SIZES = [100, 300, 1000, 3000, 10_000, 60_000]  # training images
# What others have used alone, larger for trained matrices: heavy tails (Martin and Mahoney 2021), and spikes.
BASELINES = {"tail exponent, small": ("log_tail_exponent", -1), "share outside the bulk": ("outside_bulk", 1)}
# The shape's logarithms alone say nothing, but the other statistics are read in their light.
SHAPE = ["log_rows", "log_columns"]
WRITTEN = ["TargetCNN", "half width", "5 convolutions", "MLP 784-256-128-10", "8 convolutions, global pooling",
           "residual block, global pooling", "LeNet-5, tanh, average pooling", "conv 4, 8, valid"]  # fmt: skip


def parse_options() -> argparse.Namespace:
    parser = option_parser("Study the signatures of trained weights.", seed=0)
    parser.add_argument("--table", type=Path, default=SIGNATURES, help="signatures of the corpus")
    parser.add_argument(
        "--steps", type=number(int, 0, 10**7), default=600, help="training steps for each set of statistics; 0 for none"
    )
    parser.add_argument(
        "--seeds", type=number(int, 0, 100), default=3, help="TargetCNNs trained a question; 0 to train none"
    )
    add_output_options(parser, plot="assets/signatures.png", results="signature_study.json")
    add_data_options(parser)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    signatures = load_signatures(options.table)
    scorer = load_scorer().to(options.device)
    areas = areas_of(held_out_logits(scorer, signatures), signatures)
    print("Area under the curve in families never seen, trained matrices against:")
    print(areas_table(areas, signatures.families), flush=True)
    counts = signatures.family[signatures.whole & signatures.trained].bincount(minlength=len(signatures.families))
    rows = zip(signatures.families, counts.tolist(), areas.nanmean(0).tolist(), strict=True)
    print("\nBy family, mean over all of these:")
    print(table(["Family", "Matrices", "Area"], [[name, str(count), f"{mean:.3f}"] for name, count, mean in rows]))

    baselines = {}
    for name, (statistic, sign) in BASELINES.items():
        baselines[name] = areas_of(sign * signatures.signatures[:, SCORED.index(statistic)], signatures)
        print(f"\nBy one number alone, {name}:")
        print(areas_table(baselines[name], signatures.families), flush=True)

    carried = what_carries(signatures, options) if options.steps else []
    if carried:
        print("\nMean area with each statistic alone, in the light of the shape, and without it:")
        print(table(["Statistic", "Alone", "Left Out"], [
            [row["statistic"], f"{row['alone']:.3f}", f"{row['left_out']:.3f}"] for row in carried
        ]), flush=True)  # fmt: skip

    quality = {}
    if options.seeds:
        train = training_data(options.data, options.validation, options.device)
        test = scoring_data(options.data, options.validation, options.device)
        for name, question in QUESTIONS.items():
            networks = [
                {"network": label, "score": network_score(scorer, network),
                 "accuracy_percent": accuracy_of(network, test).accuracy_percent}
                for seed in range(options.seed, options.seed + options.seeds)
                for label, network in question(options, seed, train)
            ]  # fmt: skip
            quality[name] = {"rank_correlation": or_none(rank_correlation(networks)), "networks": networks}
            print(f"\n{name}: rank correlation of score and test accuracy {rank_correlation(networks):+.2f}")
            print(table(["Network", "Score", "Accuracy (%)"], [
                [one["network"], f"{one['score']:.3f}", f"{one['accuracy_percent']:.2f}"] for one in networks
            ]), flush=True)  # fmt: skip
    record = {
        "seed": options.seed,
        "areas": by_kind_and_family(areas, signatures.families),
        "baselines": {name: by_kind_and_family(one, signatures.families) for name, one in baselines.items()},
        "statistics": carried,
        "quality": quality,
    }
    save_json(options.results, record)
    print(f"\nResults saved to {options.results}")
    plot(areas, signatures.families, quality, options.plot)
    print(f"Plot saved to {options.plot}")


def by_kind_and_family(areas: Tensor, families: list[str]) -> dict[str, dict[str, float | None]]:
    rows = ([or_none(value) for value in row] for row in areas.tolist())
    return {kind: dict(zip(families, row, strict=True)) for kind, row in zip(UNTRAINED, rows, strict=True)}


def or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def areas_table(areas: Tensor, families: list[str]) -> str:
    """A row for each kind of untrained matrices: mean and lowest area over the families."""
    rows = []
    for kind, row in zip(UNTRAINED, areas, strict=True):
        known = row.nan_to_num(2.0)
        rows.append([kind, f"{row.nanmean():.3f}", f"{known.min():.3f}", families[known.argmin()]])
    return table(["Untrained", "Mean", "Lowest", "Family of the Lowest"], rows)


def what_carries(signatures: LabelledSignatures, options: argparse.Namespace) -> list[dict]:
    """For each statistic, the mean held-out area of scorers that read it alone, and all but it."""

    def area(read: list[int]) -> float:
        scorer = trained_scorer(signatures, options.steps, options.seed, options.device, read)
        return areas_of(held_out_logits(scorer, signatures), signatures).nanmean().item()

    shape = [SCORED.index(name) for name in SHAPE]
    everything = list(range(len(SCORED)))
    rows = [{"statistic": "(all, so many steps)", "alone": area(everything), "left_out": area(shape)}]
    for place, name in enumerate(SCORED):
        if name not in SHAPE:
            left = [other for other in everything if other != place]
            rows.append({"statistic": name, "alone": area([place, *shape]), "left_out": area(left)})
    return rows


# ---- does the score measure quality? --------------------------------------------------------------------------------


def rank_correlation(networks: list[dict]) -> float:
    """Spearman's."""
    columns = ([one[key] for one in networks] for key in ("score", "accuracy_percent"))
    return spearmanr(*columns).statistic.item()


Networks = Iterator[tuple[str, nn.Module]]  # with what they are


def over_epochs(options: argparse.Namespace, seed: int, train: Dataset) -> Networks:
    """TargetCNNs after every epoch of Adam, as a recorded run has them."""
    for epoch, network in enumerate(trained_networks(options, seed, train, 5, f"seed {seed}")):
        yield f"seed {seed}, epoch {epoch}", network


def over_sizes(options: argparse.Namespace, seed: int, train: Dataset) -> Networks:
    """TargetCNNs trained on so many images, for an epoch's number of batches."""
    for size in SIZES:
        *_, network = trained_networks(options, seed, train[:size], 1, f"{size} images")
        yield f"seed {seed}, {min(size, len(train.labels)):,} images", network


def with_shuffled_labels(options: argparse.Namespace, seed: int, train: Dataset) -> Networks:
    """TargetCNNs trained for two epochs on labels of which some, or all, are those of other images."""
    for share in (0.0, 0.5, 1.0):
        torch.manual_seed(seed)
        wrong = torch.randperm(len(train.labels))[: round(share * len(train.labels))].to(train.labels.device)
        labels = train.labels.clone()
        labels[wrong] = labels[wrong[torch.randperm(len(wrong)).to(wrong.device)]]
        shuffled = Dataset(train.images, labels)
        *_, network = trained_networks(options, seed, shuffled, 2, f"{share:.0%} shuffled")
        yield f"seed {seed}, {share:.0%} of the labels shuffled", network


def as_synthesised(options: argparse.Namespace, seed: int, train: Dataset) -> Networks:
    """Networks that the synthesiser writes."""
    for name in WRITTEN:
        torch.manual_seed(seed)
        yield f"{name}, seed {seed}", synthesize(EVALUATED[name]().to(options.device), *train)


# One more question is one more entry here.
QUESTIONS: dict[str, Callable[[argparse.Namespace, int, Dataset], Networks]] = {
    "Epochs of training": over_epochs,
    "Training images": over_sizes,
    "Shuffled labels": with_shuffled_labels,
    "Synthesised networks": as_synthesised,
}


def plot(areas: Tensor, families: list[str], quality: dict[str, dict], path: Path) -> None:
    """Save the areas of every family against every kind, and score against accuracy for each question."""
    figure = new_figure(15, 10)
    grid = figure.add_gridspec(2, max(1, len(quality)), height_ratios=[1.2, 1])
    panel = figure.add_subplot(grid[0, :])
    image = panel.imshow(areas.numpy(), vmin=0.5, vmax=1, cmap="viridis", aspect="auto")
    panel.set_xticks(range(len(families)), families, rotation=40, ha="right")
    panel.set_yticks(range(len(UNTRAINED)), list(UNTRAINED))
    panel.set_title("trained matrices of a family never seen, against untrained ones")
    figure.colorbar(image, label="area under the ROC curve")
    for place, (name, found) in enumerate(quality.items()):
        panel = figure.add_subplot(grid[1, place])
        errors = [max(100 - one["accuracy_percent"], 1e-2) for one in found["networks"]]
        panel.semilogy([one["score"] for one in found["networks"]], errors, "o", color="#0072B2", alpha=0.7)
        panel.invert_yaxis()
        panel.set(title=f"{name}:\nrank correlation {rank_correlation(found['networks']):+.2f}",
                  xlabel="mean score of the weights", ylabel="test error (%), good ones on top")  # fmt: skip
        panel.grid(alpha=0.3, which="both")
    save_figure(figure, path)


if __name__ == "__main__":
    run_script(main)
