"""Statistics of a weight matrix that change neither with its scale nor with the order of its rows and columns."""

import math

import torch
from torch import Tensor

from universal.signatures.nulls import scales_of

MOST_ROWS, MOST_COLUMNS = 2048, 16_384  # of larger matrices, as many rows and columns are drawn
SMALL = 2**20  # entries up to which statistics are computed in double precision
LEADING = 0.1  # share of the singular vectors that are looked at
# What is compared with the same entries in other places, on so many rows and columns, after so many shuffles.
COMPARED = ("log_top_share", "entropy", "energy_of_top_tenth", "log_row_cosines", "log_column_cosines")
COMPARED_ROWS, COMPARED_COLUMNS, SHUFFLES = 256, 768, 4
FURTHEST = 4.0  # asinh of 27 deviations: one further out says no more

# What a scorer reads, in this order; `signature` says what they are.
SCORED = (
    "log_top_eigenvalue", "log_stable_rank", "spectral_entropy", "outside_bulk", "log_energy_outside_bulk",
    "energy_of_top_tenth", "log_middle_eigenvalue", "log_tail_exponent", "log_kurtosis", "mean_magnitude", "sparsity",
    "skewness", "offset", "log_row_norm_variation", "log_column_norm_variation", "log_row_cosine_deviation",
    "row_cosine_mean", "log_column_cosine_deviation", "column_cosine_mean", "log_row_localisation",
    "log_column_localisation", "log_rows", "log_columns",
    *(f"{name}_beyond_{null}" for null in ("shuffled", "shuffled_within_scales") for name in COMPARED),
)  # fmt: skip


def matrix_of(tensor: Tensor) -> Tensor:
    """A weight [outputs, inputs, ...] as a matrix [outputs, inputs and positions]; leading axes of 1 are dropped."""
    while tensor.dim() > 2 and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor.flatten(1)


def signature(matrix: Tensor) -> dict[str, float]:
    """The statistics of a `matrix` [rows, columns], by name.

    None depends on its scale, its sign, the order of its rows or columns, or on which of the two is which: the shorter
    side counts as rows, of equal sides the one whose norms differ more. Of matrices beyond `MOST_ROWS` or
    `MOST_COLUMNS` so many are drawn, always the same places, so that there the order counts. The spectrum is that of
    W W^T / columns at a variance of 1, where random entries give the Marchenko-Pastur law. Besides those in `SCORED`:

    - `rows`, `columns`; `stable_rank`, |W|_F^2 / |W|_2^2; `kurtosis`, 3 for a Gaussian
    - `tail_exponent`, of the power law that fits the largest eigenvalues best (Clauset et al. 2009; Martin and Mahoney
      2021), from 2 up; NaN where there are fewer than 10
    - `outside_bulk`, the share of the eigenvalues above the edge
    - `sparsity`, the share of entries closer to zero than a twentieth of their deviation (0.04 for a Gaussian)

    Those whose names hold `beyond` say how far a statistic lies from those of the same entries in other places, of all
    entries, or of what is left of them without the scales of rows and columns, which stay: the asinh of the distance in
    deviations, of `COMPARED_ROWS` and `COMPARED_COLUMNS` at most, likewise drawn. For random matrices the first are
    near 0, and the second say that their entries, without scales, are a little more even than shuffled ones.

    Raises ValueError unless it is a finite matrix of at least 2 x 2 whose entries differ.
    """
    w = normalised(matrix)
    rows, columns = sorted(map(float, matrix.shape))
    return {"rows": rows, "columns": columns} | spectrum(w) | entries(w) | directions(w) | beyond_chance(w)


def normalised(matrix: Tensor) -> Tensor:
    """`matrix` at a variance of 1, `reduced`. Raises ValueError as `signature` does."""
    if matrix.dim() != 2 or min(matrix.shape) < 2:
        raise ValueError(f"not a matrix of at least 2 x 2: {list(matrix.shape)}")
    if matrix.is_complex():
        raise ValueError("holds complex numbers")
    w = matrix.detach()
    w = w.cpu() if w.device.type == "mps" else w  # which lacks double precision
    w = w if w.layout == torch.strided else w.to_dense()
    w = reduced(w if w.shape[0] <= w.shape[1] else w.T, MOST_ROWS, MOST_COLUMNS)
    w = w.to(torch.float64 if w.numel() <= SMALL else torch.float32)
    if not w.isfinite().all():
        raise ValueError("holds NaN or infinite weights")
    w = w / w.abs().max().clamp(min=torch.finfo(w.dtype).tiny)  # squares of the smallest or largest floats exist then
    deviation = w.std(correction=0)
    if not deviation > 1e-6 * w.abs().mean():
        raise ValueError("all its entries are the same")
    w = w / deviation
    if w.shape[0] == w.shape[1] and w.norm(dim=0).std() > w.norm(dim=1).std():
        w = w.T
    return w


def reduced(w: Tensor, most_rows: int, most_columns: int) -> Tensor:
    """At most so many rows and columns, in their order."""
    generator = torch.Generator().manual_seed(0)
    for axis, most in enumerate((most_rows, most_columns)):
        if w.shape[axis] > most:
            chosen = torch.randperm(w.shape[axis], generator=generator)[:most].sort().values
            w = w.index_select(axis, chosen.to(w.device))
    return w


def spectrum(w: Tensor) -> dict[str, float]:
    """Statistics of singular values and vectors. `w` [rows, columns] has a variance of 1, and no more rows than
    columns."""
    rows, columns = w.shape
    values, vectors = torch.linalg.eigh(w @ w.T / columns)
    e = values.clamp(min=0).flip(0).double()
    edge = bulk(rows, columns)[1]
    share = e / e.sum()
    outside = e > edge
    stable_rank = (e.sum() / e[0]).item()
    exponent = tail_exponent(e)
    leading = max(1, round(LEADING * rows))
    # Beyond its rank, a matrix has no directions.
    left = vectors[:, -leading:][:, values[-leading:] > 1e-9 * values[-1]]
    right = w.T @ left
    return {
        "stable_rank": stable_rank,
        "tail_exponent": exponent,
        "log_top_eigenvalue": math.log(e[0].item() / edge),
        "log_stable_rank": math.log(stable_rank * edge / rows),
        "spectral_entropy": -torch.special.xlogy(share, share).sum().item() / math.log(rows),
        "outside_bulk": outside.double().mean().item(),
        "log_energy_outside_bulk": math.log(share[outside].sum().item() + 1e-4),
        "energy_of_top_tenth": share[:leading].sum().item(),
        "log_middle_eigenvalue": math.log(e[rows // 2].item() + 1e-4),
        "log_tail_exponent": 0.0 if math.isnan(exponent) else math.log(min(exponent, 100.0)),
        "log_row_localisation": localisation(left),
        "log_column_localisation": localisation(right),
    }


def bulk(rows: int, columns: int) -> tuple[float, float]:
    """The edges of the Marchenko-Pastur law."""
    ratio = math.sqrt(rows / columns)
    return (1 - ratio) ** 2, (1 + ratio) ** 2


def localisation(vectors: Tensor) -> float:
    """The mean logarithm of the inverse participation ratios of the columns, 0 for vectors of equal magnitudes."""
    squares = vectors.square()
    return (len(vectors) * squares.square().sum(0) / squares.sum(0).square()).log().mean().item()


def tail_exponent(eigenvalues: Tensor) -> float:
    """The exponent of the power law that fits the largest of `eigenvalues` (descending) best, by the distance of
    Kolmogorov and Smirnov (Clauset et al. 2009); NaN if fewer than 10 are positive."""
    e = eigenvalues[eigenvalues > 1e-9 * eigenvalues[0]]
    if len(e) < 10:
        return math.nan
    logs = e.log()
    counts = torch.arange(5, len(e) + 1, device=e.device)  # candidates: the tail of the largest so many
    sums = logs.cumsum(0)[counts - 1] - counts * logs[counts - 1]
    exponents = 1 + counts / sums.clamp(min=1e-9)
    if len(counts) > 64:
        kept = torch.linspace(0, len(counts) - 1, 64, device=e.device).long()
        counts, exponents = counts[kept], exponents[kept]
    # Of the tail that starts at x, (x / value)^(exponent - 1) should lie above a value.
    above = ((logs[counts - 1][:, None] - logs[None]) * (exponents - 1)[:, None]).exp()
    empirical = torch.arange(1, len(e) + 1, device=e.device) / counts[:, None]
    distances = (above - empirical).abs().masked_fill(empirical > 1, 0).amax(1)
    return exponents[distances.argmin()].item()


def entries(w: Tensor) -> dict[str, float]:
    """Statistics of the entries, wherever they stand."""
    mean = w.mean()
    z = w - mean
    kurtosis = z.square().square().mean().item()
    return {
        "kurtosis": kurtosis,
        "log_kurtosis": math.log(kurtosis),
        "mean_magnitude": z.abs().mean().item(),
        "sparsity": (w.abs() < 0.05).double().mean().item(),
        "skewness": abs(z.pow(3).mean().item()),
        "offset": math.log1p(abs(mean.item()) * math.sqrt(w.numel())),
        "log_rows": math.log(w.shape[0]),
        "log_columns": math.log(w.shape[1]),
    }


def directions(w: Tensor) -> dict[str, float]:
    """How much the norms of rows and columns differ, and their cosines."""
    rows, columns = w.shape
    row_norms, column_norms = w.norm(dim=1), w.norm(dim=0)
    found = {
        "log_row_norm_variation": variation(row_norms, columns),
        "log_column_norm_variation": variation(column_norms, rows),
    }
    unit_rows, unit_columns = w / row_norms[:, None].clamp(min=1e-12), w / column_norms.clamp(min=1e-12)
    # The Gram matrix of the columns has the squares of that of the rows: the smaller one does for both.
    for name, unit, count, length in (("row", unit_rows, rows, columns), ("column", unit_columns, columns, rows)):
        squares = (unit @ unit.T).square().sum().item()
        mean = (unit.sum(0 if name == "row" else 1).square().sum().item() - count) / (count * (count - 1))
        deviation = math.sqrt(max(0.0, (squares - count) / (count * (count - 1)) - mean**2))
        found[f"log_{name}_cosine_deviation"] = math.log(deviation * math.sqrt(length) + 1e-3)
        found[f"{name}_cosine_mean"] = math.asinh(mean * length)
    return found


def variation(norms: Tensor, length: int) -> float:
    """The logarithm of the coefficient of variation of norms, which is near 0 for those of `length` random entries."""
    return math.log((norms.std(correction=0) / norms.mean()).item() * math.sqrt(2 * length) + 1e-3)


def beyond_chance(w: Tensor) -> dict[str, float]:
    """How far the statistics `COMPARED` lie from those of the entries in other places."""
    w = reduced(w, COMPARED_ROWS, COMPARED_COLUMNS).float()
    rows, columns = scales_of(w)
    # In sorted order the entries, and scales, are the same however rows and columns are permuted.
    within_scales = rows.sort(0).values * columns.sort(1).values
    generator = torch.Generator().manual_seed(0)
    places = torch.stack([torch.randperm(w.numel(), generator=generator) for _ in range(SHUFFLES)]).to(w.device)
    found = {}
    for null, values, scales in (("shuffled", w, 1), ("shuffled_within_scales", w / rows / columns, within_scales)):
        values = values.flatten().sort().values
        values = values if values.pow(3).sum() >= 0 else -values.flip(0)  # whatever the sign of the matrix
        own, others = compared(w), compared(values[places].view(-1, *w.shape) * scales)
        distances = (own - others.mean(0)) / (others.std(0) + 1e-6)
        distances = distances.asinh().clamp(-FURTHEST, FURTHEST).tolist()
        found |= {f"{name}_beyond_{null}": distance for name, distance in zip(COMPARED, distances, strict=True)}
    return found


def compared(w: Tensor) -> Tensor:
    """The statistics `COMPARED` of matrices [..., rows, columns]."""
    e = torch.linalg.eigvalsh(w @ w.mT).clamp(min=0)
    share = e / e.sum(-1, keepdim=True)
    leading = max(1, round(LEADING * w.shape[-2]))
    unit_rows, unit_columns = (w / w.norm(dim=axis, keepdim=True).clamp(min=1e-12) for axis in (-1, -2))
    cosines = [(unit @ unit.mT).square().sum((-1, -2)).log() for unit in (unit_rows, unit_columns)]
    entropy = -torch.special.xlogy(share, share).sum(-1)
    return torch.stack([share[..., -1].log(), entropy, share[..., -leading:].sum(-1), *cosines], -1)


def alignment(matrix: Tensor, before: Tensor) -> float:
    """How far the inputs of a layer that matter most are the outputs of the one `before` that vary most.

    |W P|_F^2 over what random directions would give, for W `matrix` [outputs, inputs] and P `before` [inputs, ...]: 1
    for layers that know nothing of each other. The smaller factors of QR decompositions are enough.
    """
    w, p = matrix.cpu().double(), before.cpu().double()
    if p.shape[1] > p.shape[0]:
        p = torch.linalg.qr(p.T, mode="r").R.T
    if w.shape[0] > w.shape[1]:
        w = torch.linalg.qr(w, mode="r").R
    return ((w @ p).square().sum() * w.shape[1] / (w.square().sum() * p.square().sum())).item()
