"""Which of the weights in anyone's files were trained? A row for each tensor, a line for each file.

python -m universal.signatures model.safetensors
python -m universal.signatures directory --json signatures.json --plot signatures.png
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from scripting import UserError, new_figure, option_parser, output_file, run_script, save_figure, save_json, table
from universal.signatures.files import OUTPUTS_FIRST, NoWeights, files_below, read_weights
from universal.signatures.scorer import SCORER, Scorer, load_scorer
from universal.signatures.statistics import alignment, bulk, matrix_of, normalised, signature

COLUMNS = {  # of the table: header, key and format
    "Stable Rank": ("stable_rank", "{:.1f}"), "Tail Exponent": ("tail_exponent", "{:.2f}"),
    "Outside Bulk": ("outside_bulk", "{:.3f}"), "Kurtosis": ("kurtosis", "{:.2f}"),
    "Sparsity": ("sparsity", "{:.3f}"), "Alignment": ("alignment", "{:.2f}"), "Score": ("score", "{:.3f}"),
    "Spread": ("spread", "{:.3f}"), "Certainty": ("certainty", "{:.2f}"),
}  # fmt: skip
SPECTRA = 6  # that are plotted
MOST_ALIGNED = 4096  # inputs of a layer whose alignment is computed


def parse_options() -> argparse.Namespace:
    parser = option_parser("Tell trained weights from untrained ones, in anyone's files.", seed=0)
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE_OR_DIRECTORY", help="weights to read")
    parser.add_argument("--scorer", type=Path, default=SCORER, help="file of the trained scorer")
    parser.add_argument("--json", type=output_file(".json"), help="file to save everything in")
    parser.add_argument("--plot", type=output_file(".png", ".pdf", ".svg"), help="picture to save")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    scorer = load_scorer(options.scorer).to(options.device)
    files = list(dict.fromkeys(file for path in options.paths for file in files_below(path)))
    tensors, summaries, failures, spectra = [], [], [], []
    empty: list[UserError] = []  # of files that can be read but hold no weights, as directories of models have them
    for file in files:
        try:
            weights, left_out = read_weights(file)
            rows = judged(weights, left_out, scorer, options.device, file.suffix.lower() in OUTPUTS_FIRST)
            if not rows:
                raise NoWeights(f"{file}: holds no matrix of at least 2 x 2: give a file with weights of layers")
        except UserError as error:
            (empty if isinstance(error, NoWeights) else failures).append(error)
            if len(files) > 1:
                print(f"left out: {error}", file=sys.stderr)
            continue
        print(tensors_table(rows))
        for name, reason in left_out.items():
            print(f"left out: {file}: {name}: {reason}", file=sys.stderr)
        summaries.append(summary(file, rows, left_out))
        print(f"{line_of(summaries[-1])}\n", flush=True)
        tensors += [{"file": str(file)} | row for row in rows]
        if options.plot:
            spectra += [(f"{file.name}: {row['name']}", weights[row["name"]]) for row in rows]
            spectra = sorted(spectra, key=lambda item: -item[1].numel())[:SPECTRA]
    if not summaries:
        raise (
            [*failures, *empty][0]
            if len(files) == 1
            else UserError(f"none of {len(files)} files has weights, see above")
        )
    if options.json:
        save_json(options.json, {"tensors": tensors, "files": summaries, "errors": [str(error) for error in failures]})
        print(f"Signatures saved to {options.json}")
    if options.plot:
        plot(tensors, spectra, options.plot)
        print(f"Plot saved to {options.plot}")
    if failures:
        raise UserError(f"{len(failures)} of {len(files)} files cannot be read, the rest is above")


def judged(
    weights: dict[str, Tensor], left_out: dict[str, str], scorer: Scorer, device: torch.device, outputs_first: bool
) -> list[dict]:
    """A row for each tensor, in the order of the file; those that have no signature are added to `left_out`.

    Which layers are aligned can be said if weights are [outputs, inputs].
    """
    rows: list[dict] = []
    before: Tensor | None = None
    for name, tensor in tqdm(weights.items(), "signatures", leave=False, disable=None):
        tensor = tensor.to(device)
        matrix = matrix_of(tensor)
        try:
            found = signature(matrix)
        except (ValueError, torch.linalg.LinAlgError) as error:
            left_out[name] = str(error)
            continue
        aligned = alignment_of(tensor, before) if outputs_first and before is not None else None
        values = found | {"alignment": aligned} | scorer.judge(found)
        rows.append({"name": name, "shape": list(tensor.shape)} | {
            key: value if value is not None and math.isfinite(value) else None for key, value in values.items()
        })  # fmt: skip
        before = tensor
    return rows


def alignment_of(tensor: Tensor, before: Tensor) -> float | None:
    """The alignment of a weight [outputs, inputs, ...] with the layer before it in the file, if their shapes fit.

    A linear layer may read the flattened maps of a convolution.
    """
    inputs, outputs = tensor.shape[1], before.shape[0]
    flattened = tensor.dim() == 2 and before.dim() > 2 and inputs % outputs == 0
    if outputs > MOST_ALIGNED or not (inputs == outputs or flattened):
        return None
    rows = tensor.reshape(tensor.shape[0], outputs, -1).movedim(1, -1).flatten(0, 1)
    return alignment(rows, before.flatten(1))


def summary(file: Path, rows: list[dict], left_out: dict[str, str]) -> dict:
    """What a file's tensors come to: `score` is the mean over all its weights that were read."""
    sizes = [math.prod(row["shape"]) for row in rows]
    total = sum(row["score"] * size for row, size in zip(rows, sizes, strict=True))
    return {
        "file": str(file), "tensors": len(rows), "weights": sum(sizes), "score": total / sum(sizes),
        "left_out": left_out,
    }  # fmt: skip


def line_of(summary: dict) -> str:
    return (
        f"{summary['file']}: {summary['tensors']} tensors, {summary['weights']:,} weights, score {summary['score']:.3f}"
    )


def tensors_table(rows: list[dict]) -> str:
    return table(["Tensor", "Shape", *COLUMNS], [
        [row["name"], " x ".join(map(str, row["shape"])),
         *("-" if row[key] is None else form.format(row[key]) for key, form in COLUMNS.values())]
        for row in rows
    ])  # fmt: skip


def plot(tensors: list[dict], spectra: list[tuple[str, Tensor]], path: Path) -> None:
    """Save the spectra of the largest tensors against the Marchenko-Pastur law, and the scores along depth."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(13, 9)
    grid = figure.add_gridspec(3, 3)
    for place, (name, tensor) in enumerate(spectra):
        panel = figure.add_subplot(grid[place // 3, place % 3])
        w = normalised(matrix_of(tensor))
        eigenvalues = torch.linalg.eigvalsh(w @ w.T / w.shape[1]).clamp(min=1e-4).double()
        draw_spectrum(panel, eigenvalues, *w.shape)
        panel.set_title((name if len(name) < 40 else f"...{name[-37:]}").replace("$", r"\$"), fontsize=9)
    panel = figure.add_subplot(grid[2, :])
    for file in dict.fromkeys(row["file"] for row in tensors):
        rows = [row for row in tensors if row["file"] == file]
        scores = torch.tensor([[row["score"], row["spread"]] for row in rows])
        depth = range(1, len(rows) + 1)
        (line,) = panel.plot(depth, scores[:, 0], "o-", markersize=3, label=Path(file).name.replace("$", r"\$"))
        panel.fill_between(
            depth, (scores[:, 0] - scores[:, 1]).clamp(min=0), (scores[:, 0] + scores[:, 1]).clamp(max=1),
            color=line.get_color(), alpha=0.2,
        )  # fmt: skip
    panel.set(title="scores along depth (band: spread)", xlabel="tensor", ylabel="probability of being trained")
    panel.set_ylim(-0.02, 1.02)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.3)
    if len({row["file"] for row in tensors}) <= 8:
        panel.legend(loc="lower right", fontsize=8)
    save_figure(figure, path)


def draw_spectrum(panel, eigenvalues: Tensor, rows: int, columns: int) -> None:
    """The distribution of the logarithm of the eigenvalues, and that of random entries."""
    from matplotlib.ticker import NullFormatter

    low, high = bulk(rows, columns)
    low = max(low, 1e-3)
    ends = [min(eigenvalues.min().item(), low) * 0.8, max(eigenvalues.max().item(), high) * 1.25]
    bins = torch.logspace(*torch.tensor(ends).log10().tolist(), 50, dtype=torch.float64)
    width = (bins[1] / bins[0]).log()
    counts = torch.histogram(eigenvalues.cpu(), bins).hist / (len(eigenvalues) * width)
    panel.stairs(counts, bins, fill=True, color="#0072B2", alpha=0.6, label="weights")
    x = torch.logspace(*torch.tensor([low, high]).double().log10().tolist(), 200, dtype=torch.float64)
    density = ((high - x) * (x - low)).clamp(min=0).sqrt() / (2 * torch.pi * rows / columns)  # times x / x
    panel.plot(x, density, color="#D55E00", label="random entries")
    panel.set_xscale("log")
    panel.xaxis.set_minor_formatter(NullFormatter())  # labels between powers of ten run into each other
    panel.set(xlabel="eigenvalue of W W' / columns", ylabel="density of its logarithm")
    panel.legend(fontsize=7)


if __name__ == "__main__":
    run_script(main)
