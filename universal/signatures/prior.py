"""Is a generative model of weights any good? Denoising, generating and initial weights.

    python -m universal.signatures.prior

holds the denoiser against classical methods on families that it has not seen, its matrices against real ones, its
initial weights against those of the field. It saves the picture
assets/generated_weights.png and everything it found as signature_prior.json.
"""

import argparse
import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, pstdev

import torch
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
from target_cnn import Dataset, TargetCNN, scoring_data, train_with_adam, training_data
from target_cnn import score as accuracy_of
from universal.evaluation.networks import conv, mlp
from universal.signatures.denoising import (
    CLASSICAL,
    EVALUATED_SIGMAS,
    Denoiser,
    against_best,
    held_out_errors,
    load_denoiser,
)
from universal.signatures.detection import LabelledSignatures, area, trained_scorer
from universal.signatures.matrices import CORPUS, batch_of, load_split
from universal.signatures.nulls import same_spectrum
from universal.signatures.sampling import generate, initialise
from universal.signatures.scorer import as_tensor, load_scorer
from universal.signatures.statistics import signature

AFTER = (50, 100, 469)  # steps of Adam
GENERATED_SIDE = 96  # rows and columns of the matrices that are held against real ones
DETECTOR_STEPS = 500


def parse_options() -> argparse.Namespace:
    parser = option_parser("Try the generative model of weights.", seed=0)
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="the corpus of trained weights")
    parser.add_argument("--matrices", type=number(int, 2, 10_000), default=20, help="of each family; generated twice")
    parser.add_argument("--seeds", type=number(int, 1, 100), default=5, help="networks trained from each init")
    add_output_options(parser, plot="assets/generated_weights.png", results="signature_prior.json")
    add_data_options(parser)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    seen, unseen = load_split(options.corpus)
    denoiser = load_denoiser().to(options.device)
    train = training_data(options.data, options.validation, options.device)
    test = scoring_data(options.data, options.validation, options.device)

    denoised = denoising(denoiser, unseen, options)
    print("Mean squared error in families never seen (entries have a mean square of 1):")
    print(denoising_table(denoised), flush=True)

    generated = generate(denoiser, GENERATED_SIDE, GENERATED_SIDE, 2 * options.matrices, options.seed).cpu()
    detected = detection(generated, seen, unseen, options)
    print("\nHow well a detector tells real matrices of families never seen from others (0.5 if it cannot):")
    print(table(["Detector", "Generated", "Gaussian"], [
        [row["detector"], f"{row['generated']:.3f}", f"{row['Gaussian']:.3f}"] for row in detected
    ]), flush=True)  # fmt: skip
    novelty = distances_to_training(generated, seen, unseen, options)
    print("\nDistance of the singular values from the nearest matrix that was learned from, relative to their norm: "
          + ", ".join(f"{value:.3f} ({name})" for name, value in novelty.items()), flush=True)  # fmt: skip

    inits = compare_inits(denoiser, train, test, options)
    print(f"\nAccuracy (%) after steps of Adam, mean and deviation over {options.seeds} seeds:")
    print(inits_table(inits), flush=True)

    record = {"denoising": denoised, "detection": detected, "distance_to_training": novelty, "inits": inits}
    save_json(options.results, record)
    print(f"\nResults saved to {options.results}")
    plot(generated, unseen, inits, options.plot)
    print(f"Plot saved to {options.plot}")


Families = dict[str, list[Tensor]]  # the matrices of each


# ---- denoising and generating ---------------------------------------------------------------------------------------


def denoising(denoiser: Denoiser, unseen: Families, options: argparse.Namespace) -> list[dict]:
    """For each family and deviation of the noise, the error of every method."""
    return [
        {"family": family, "sigma": sigma} | {"errors": held_out_errors(denoiser, matrices, sigma, options.matrices)}
        for sigma in EVALUATED_SIGMAS
        for family, matrices in unseen.items()
    ]


def denoising_table(rows: list[dict]) -> str:
    def gain(row: dict) -> float:
        return 100 * (against_best(row["errors"]) - 1)

    lines = [
        [f"{row['sigma']:g}", row["family"], *(f"{error:.4f}" for error in row["errors"].values()), f"{gain(row):+.1f}"]
        for row in rows
    ]
    for sigma in EVALUATED_SIGMAS:
        gains = [gain(row) for row in rows if row["sigma"] == sigma]
        lines.append([f"{sigma:g}", "(mean)", *["-"] * (len(CLASSICAL) + 1), f"{fmean(gains):+.1f}"])
    return table(["Deviation", "Family", *CLASSICAL, "Learned", "Against the Best (%)"], lines)


def pieces_of(corpus: Families, most: int | None, seed: int) -> Families:
    """Square pieces, as large as the generated matrices, of at most so many matrices of each family that has any."""
    draw = random.Random(seed)
    large = {name: [one for one in matrices if min(one.shape) >= GENERATED_SIDE] for name, matrices in corpus.items()}
    return {
        name: [batch_of([matrix], GENERATED_SIDE, GENERATED_SIDE, draw)[0] for matrix in matrices[:most]]
        for name, matrices in large.items()
        if matrices
    }


def signatures_of(matrices: list[Tensor]) -> Tensor:
    return as_tensor([signature(matrix) for matrix in matrices])


def detection(generated: Tensor, seen: Families, unseen: Families, options: argparse.Namespace) -> list[dict]:
    """Areas under the curve of real matrices of families never seen against generated and Gaussian ones.

    The first detector is the scorer of signatures, which knows no generated matrices: of each family, the member that
    has not seen it. The second is taught on half of the matrices in question and on the families that the denoiser has
    seen.
    """
    torch.manual_seed(options.seed)
    others = {"generated": signatures_of(list(generated)), "Gaussian": signatures_of(list(torch.randn_like(generated)))}
    real, known_real = (
        {name: signatures_of(pieces) for name, pieces in pieces_of(part, options.matrices, options.seed).items()}
        for part in (unseen, seen)
    )
    taught_with = torch.cat(list(known_real.values()))
    scorer = load_scorer()
    rows = [{"detector": "scorer of signatures"}, {"detector": "taught on such matrices"}]
    with torch.no_grad():
        for name, signatures in others.items():
            rows[0][name] = fmean(
                area(scorer(real[family])[member], scorer(signatures)[member])
                for member, family in enumerate(scorer.families)
                if family in real
            )
    for name, signatures in others.items():
        known, kept = signatures[::2], signatures[1::2]
        kind = torch.cat([torch.zeros(len(taught_with)), torch.ones(len(known))]).long()
        one = torch.ones_like(kind)  # a family that no member is kept from
        everything = LabelledSignatures(torch.cat([taught_with, known]), one, kind, one.bool(), ["(none left out)"])
        detector = trained_scorer(everything, DETECTOR_STEPS, options.seed, torch.device("cpu"))
        with torch.no_grad():
            rows[1][name] = fmean(area(detector(found)[0], detector(kept)[0]) for found in real.values())
    return rows


def distances_to_training(
    generated: Tensor, seen: Families, unseen: Families, options: argparse.Namespace
) -> dict[str, float]:
    """Mean distance of singular values from those of the nearest piece of a matrix that the denoiser has learned from.

    They know nothing of the order of rows and columns, nor of rotations: a copy, however disguised, has the same.
    """

    def spectra(matrices: list[Tensor]) -> Tensor:
        return nn.functional.normalize(torch.linalg.svdvals(torch.stack(matrices)), dim=1)

    known, real = (list(itertools.chain(*pieces_of(part, None, options.seed).values())) for part in (seen, unseen))
    kinds = {
        "generated": list(generated), "real, of families never seen": real,
        "Gaussian": list(torch.randn_like(generated)),
    }  # fmt: skip
    return {name: torch.cdist(spectra(one), spectra(known)).amin(1).mean().item() for name, one in kinds.items() if one}


# ---- initial weights ------------------------------------------------------------------------------------------------


def deep_convolutions() -> nn.Sequential:
    """Ten convolutions without norms, pooled three times, after the first for speed."""
    layers = [conv(1, 16), *(conv(16, 16) for _ in range(9))]
    for place in (9, 5, 1):
        layers.insert(place, nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 9, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "TargetCNN": TargetCNN,
    "MLP of 8 hidden layers": lambda: mlp([128] * 8),
    "10 convolutions without norms": deep_convolutions,
}


def each_weight(module: nn.Module, fill: Callable[[Tensor], Tensor]) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.copy_(fill(parameter))


def spectrum_matched(module: nn.Module, denoiser: Denoiser, seed: int) -> None:
    """The singular values of generated weights with random singular vectors."""
    initialise(module, seed, denoiser)
    each_weight(module, lambda w: same_spectrum(w.flatten(1)).view(w.shape))


# What fills a (module, denoiser, seed) in place, and the colour of its line; one more init is one more entry.
INITS: dict[str, tuple[Callable[[nn.Module, Denoiser, int], None], str]] = {
    "PyTorch's default": (lambda module, denoiser, seed: None, "#000000"),
    "Kaiming normal": (lambda module, denoiser, seed: each_weight(module, nn.init.kaiming_normal_), "#E69F00"),
    "orthogonal": (
        lambda module, denoiser, seed: each_weight(module, lambda w: nn.init.orthogonal_(w, math.sqrt(2))), "#009E73"
    ),
    "spectrum of generated": (spectrum_matched, "#CC79A7"),
    "generated": (lambda module, denoiser, seed: initialise(module, seed, denoiser), "#0072B2"),
}  # fmt: skip


def compare_inits(denoiser: Denoiser, train: Dataset, test: Dataset, options: argparse.Namespace) -> list[dict]:
    """Accuracies in percent after steps of Adam, for each network and init, over seeds."""
    rows = []
    for name, build in NETWORKS.items():
        for init, (fill, _) in INITS.items():
            accuracies = []
            for seed in range(options.seed, options.seed + options.seeds):
                torch.manual_seed(seed)
                network = build().to(options.device)
                fill(network, denoiser, seed)
                network.to(memory_format=torch.channels_last)
                accuracies.append(over_steps(network, train, test, seed, f"{name}, {init}"))
            rows.append({"network": name, "init": init, "accuracy_percent": accuracies})
    return rows


def over_steps(network: nn.Module, train: Dataset, test: Dataset, seed: int, label: str) -> list[float]:
    """Accuracies in percent after so many steps of Adam as `AFTER` says."""
    torch.manual_seed(seed)
    training = train_with_adam(network, train, AFTER[-1], pauses=AFTER, label=label)
    found = (accuracy_of(network, test).accuracy_percent for progress in training if progress.step in AFTER)
    return list(itertools.islice(found, len(AFTER)))


def inits_table(rows: list[dict]) -> str:
    return table(["Network", "Init", *(f"{steps} Steps" for steps in AFTER)], [
        [row["network"], row["init"],
         *(f"{fmean(column):.2f} +- {pstdev(column):.2f}" for column in zip(*row["accuracy_percent"], strict=True))]
        for row in rows
    ])  # fmt: skip


def plot(generated: Tensor, unseen: Families, inits: list[dict], path: Path) -> None:
    """Save the spectra of generated and real matrices, and the accuracies from each init."""
    figure = new_figure(19, 4.8)
    networks = list(dict.fromkeys(row["network"] for row in inits))
    panels = figure.subplots(1, 1 + len(networks))
    real = list(itertools.chain(*pieces_of(unseen, 8, 0).values()))
    kinds = {"real, families never seen": (real, "#000000"), "generated": (list(generated), "#0072B2"),
             "Gaussian": ([torch.randn_like(generated[0]) for _ in range(len(generated))], "#D55E00")}  # fmt: skip
    for name, (matrices, colour) in kinds.items():
        if matrices:
            values = torch.stack([torch.linalg.svdvals(matrix) for matrix in matrices]) / math.sqrt(GENERATED_SIDE)
            low, middle, high = values.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=0)
            places = range(1, GENERATED_SIDE + 1)
            panels[0].loglog(places, middle, color=colour, label=name)
            panels[0].fill_between(places, low.clamp(min=1e-4), high, color=colour, alpha=0.15)
    panels[0].set(title="spectra (band: 10 to 90 %)", xlabel="place", ylabel="singular value / root of the side")
    panels[0].set_ylim(bottom=1e-3)
    panels[0].legend(fontsize=8)
    for panel, network in zip(panels[1:], networks, strict=True):
        for row in inits:
            if row["network"] == network:
                errors = 100 - torch.tensor(row["accuracy_percent"])
                spread = errors.std(0, correction=0)
                panel.errorbar(
                    AFTER, errors.mean(0), spread, marker="o", capsize=3, label=row["init"], color=INITS[row["init"]][1]
                )
        panel.set_xscale("log")
        panel.set_xticks(AFTER, map(str, AFTER))
        panel.minorticks_off()
        panel.set(title=network, xlabel="steps of Adam", ylabel="test error (%)")
        panel.grid(alpha=0.3)
    panels[1].legend(fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    run_script(main)
