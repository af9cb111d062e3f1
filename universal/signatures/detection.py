"""Teaching a scorer to tell trained matrices from others, and how well it does in families that it has not seen."""

import math
import random
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import mannwhitneyu
from torch import Tensor
from tqdm import tqdm

from scripting import UserError, load_file, refused_as
from universal.signatures.matrices import cropped
from universal.signatures.nulls import UNTRAINED
from universal.signatures.scorer import MAKER, Scorer, as_tensor
from universal.signatures.statistics import SCORED, signature

SIGNATURES = Path("signature_table.pth")
MATRIX_KINDS = ["trained", *UNTRAINED]
BATCH_SIZE = 512
BLUR = 0.7  # deviations of noise on what a scorer is taught with
SMALLEST_CROP = 6  # rows or columns


class LabelledSignatures(NamedTuple):
    """Signatures [n, statistics] of matrices, with what each is: an index into `families` and into `MATRIX_KINDS`, and
    whether it is a `whole` matrix of the corpus or a smaller piece of one."""

    signatures: Tensor
    family: Tensor
    kind: Tensor
    whole: Tensor
    families: list[str]

    @property
    def trained(self) -> Tensor:
        return self.kind == 0

    @property
    def log2_entries(self) -> Tensor:
        sides = [SCORED.index(name) for name in ("log_rows", "log_columns")]
        return self.signatures[:, sides].sum(1) / math.log(2)


def labelled_signatures(
    corpus: dict[str, list[Tensor]], matrices: int, seed: int, device: torch.device
) -> LabelledSignatures:
    """Signatures of the matrices of every family, of a random piece of each, and of what resembles these."""
    rows: list[dict[str, float]] = []
    indices: list[tuple[int, int, bool]] = []
    torch.manual_seed(seed)
    draw = random.Random(seed)
    chosen = [(number, matrix) for number, family in enumerate(corpus) for matrix in corpus[family][:matrices]]
    for family, matrix in tqdm(chosen, "signatures", leave=False, disable=None):
        sides = [
            round(math.exp(draw.uniform(math.log(SMALLEST_CROP), math.log(side)))) for side in sorted(matrix.shape)
        ]
        for piece in (matrix, cropped(matrix, draw, *sides)):
            kinds = [(0, piece), *((kind, null(piece)) for kind, null in enumerate(UNTRAINED.values(), start=1))]
            for kind, one in kinds:
                try:
                    rows.append(signature(one.to(device)))
                except ValueError:  # all entries of a small piece may be the same
                    continue
                indices.append((family, kind, piece is matrix))
    if not rows:
        raise UserError("no matrix of the corpus has a signature: make it again")
    family, kind, whole = (torch.tensor(column) for column in zip(*indices, strict=True))
    return LabelledSignatures(as_tensor(rows), family, kind, whole, list(corpus))


def load_signatures(path: Path) -> LabelledSignatures:
    """The signatures saved at `path`. Raises UserError if the file is missing or of other statistics."""
    content = load_file(path, maker=MAKER)
    with refused_as(f"{path}: not the signatures of a corpus, or others: make them again with {MAKER}"):
        labelled = LabelledSignatures(**content)
        if labelled.signatures.shape[1] != len(SCORED) or labelled.kind.max() >= len(MATRIX_KINDS):
            raise ValueError
    return labelled


def trained_scorer(
    labelled: LabelledSignatures, steps: int, seed: int, device: torch.device, read: list[int] | None = None
) -> Scorer:
    """A scorer whose member i has learned from all families but family i, from the statistics `read` (default: all).

    Families count alike, and so do trained and untrained matrices, and all kinds of the latter.
    """
    torch.manual_seed(seed)
    scorer = Scorer(labelled.families)
    scorer.mean.copy_(labelled.signatures.mean(0))
    scorer.deviation.copy_(labelled.signatures.std(0) + 1e-6)
    unread = torch.ones(len(SCORED), dtype=torch.bool)
    unread[slice(None) if read is None else read] = False
    scorer.deviation[unread] = math.inf  # nothing is left of them
    scorer.to(device)
    groups = labelled.family * len(MATRIX_KINDS) + labelled.kind
    weights = 1 / torch.bincount(groups)[groups].double()
    weights[~labelled.trained] /= len(labelled.kind[~labelled.trained].unique())
    optimizer = torch.optim.AdamW(scorer.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(steps, 4))
    members = torch.arange(len(labelled.families))
    spread = labelled.signatures.std(0)
    for _ in tqdm(range(steps), "scorer", leave=False, disable=None):
        batch = torch.multinomial(weights, BATCH_SIZE, replacement=True)
        seen = (labelled.family[batch] != members[:, None]).to(device)
        wanted = labelled.trained[batch].float().to(device).expand(seen.shape)
        # A family never seen differs from all others: members must not rely on exact values.
        blurred = labelled.signatures[batch] + BLUR * spread * torch.randn(BATCH_SIZE, len(SCORED))
        losses = F.binary_cross_entropy_with_logits(scorer(blurred.to(device)), wanted, reduction="none")
        optimizer.zero_grad()
        (losses * seen).mean(1).sum().backward()
        optimizer.step()
        schedule.step()
    return scorer.eval()


def area(positive: Tensor, negative: Tensor) -> float:
    """The area under the ROC curve: how often a positive value is larger than a negative one."""
    statistic = mannwhitneyu(positive.double().numpy(), negative.double().numpy()).statistic.item()
    return statistic / (len(positive) * len(negative))


@torch.no_grad()
def held_out_logits(scorer: Scorer, labelled: LabelledSignatures) -> Tensor:
    """Of each signature [n], what the member says that has not seen its family.

    Raises UserError if the scorer was taught with other families.
    """
    if scorer.families != labelled.families:
        raise UserError(f"the scorer and the signatures are of different families: make both again with {MAKER}")
    logits = scorer(labelled.signatures.to(scorer.mean)).cpu()
    return logits.gather(0, labelled.family[None])[0]


def areas_of(values: Tensor, labelled: LabelledSignatures) -> Tensor:
    """The areas under the curve of whole matrices against each kind of untrained ones, [kinds - 1, families], of
    `values` [n] that are larger for trained matrices."""
    areas = torch.full((len(UNTRAINED), len(labelled.families)), math.nan, dtype=torch.float64)
    for family in range(len(labelled.families)):
        ours = labelled.whole & (labelled.family == family)
        trained = values[ours & labelled.trained]
        for kind in range(1, len(MATRIX_KINDS)):
            others = values[ours & (labelled.kind == kind)]
            if len(trained) and len(others):
                areas[kind - 1, family] = area(trained, others)
    return areas


def certainty_by_size(scorer: Scorer, labelled: LabelledSignatures, fewest: int = 50) -> Tensor:
    """How often a member is right about matrices of the family that it has not seen, trained or not, [sizes].

    Size k is of 2^(k + 2) entries, from half to twice as many. Where there are too few, that of the size before.
    """
    right = (held_out_logits(scorer, labelled) > 0) == labelled.trained
    found = torch.full_like(scorer.certainty, 0.5)
    for size in range(len(found)):
        near = (labelled.log2_entries - 2 - size).abs() <= 1
        if (near & labelled.trained).sum() >= fewest:
            shares = [right[near & part].float().mean() for part in (labelled.trained, ~labelled.trained)]
            found[size] = sum(shares) / 2
        elif size:
            found[size] = found[size - 1]
    return found.clamp(min=0.5)
