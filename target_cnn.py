"""The target system: the CNN whose weights are synthesised, its task (MNIST), its training, its score, and its weights.

Design document, section 2.1.
"""

import contextlib
import functools
import gzip
import itertools
import json
import math
import re
import struct
import time
import urllib.request
import zlib
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from scripting import UserError, leaves, load_file, refused_as, save_file, save_tensors

MNIST_MEAN, MNIST_STD = 0.1307, 0.3081
MNIST_MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
CHECKPOINTS = Path("checkpoints_weights_cnn")


# ---- the network ----------------------------------------------------------------------------------------------------


class TargetCNN(nn.Module):
    """The CNN of design document section 2.1.1, with 421,642 parameters: images [N, 1, 28, 28] -> logits [N, 10]."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(64 * 7 * 7, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        # Pooling before ReLU gives the same values and gradients as after it, on a quarter of the elements.
        x = F.relu(F.max_pool2d(self.conv1(images), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


# ---- its weights as a vector, and as files --------------------------------------------------------------------------


def flatten_weights(model: nn.Module) -> Tensor:
    """A copy of all parameters of `model` as one vector, [parameters], in the order of `model.parameters()`.

    `torch.nn.utils.parameters_to_vector` does the same but refuses channels-last parameters.
    """
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def load_weights(model: nn.Module, weights: Tensor) -> nn.Module:
    """Write a flat vector, [parameters], into `model` and return it. Raises ValueError for another length."""
    expected = sum(parameter.numel() for parameter in model.parameters())
    if weights.shape != (expected,):
        raise ValueError(f"expected weights of shape [{expected}], got {list(weights.shape)}")
    with torch.no_grad():
        parts = weights.split([parameter.numel() for parameter in model.parameters()])
        for parameter, part in zip(model.parameters(), parts, strict=True):
            # A copy, where `torch.nn.utils.vector_to_parameters` would alias the vector and undo channels-last.
            parameter.copy_(part.view_as(parameter))
    return model


def random_init(seed: int) -> Tensor:
    """The random initial weights of a TargetCNN, [421642]."""
    torch.manual_seed(seed)
    return flatten_weights(TargetCNN())


def checkpoint_path(directory: Path, epoch: int) -> Path:
    """Where the weights after `epoch` epochs of a training run are saved; other programs may save `.safetensors`."""
    return directory / f"weights_epoch_{epoch}.pth"


def save_checkpoint(model: TargetCNN, directory: Path, epoch: int) -> None:
    """Save `model`'s state_dict as the weights after `epoch`. Raises UserError if they are not finite."""
    path = checkpoint_path(directory, epoch)
    state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UserError(f"{path}: not saved, training diverged to NaN or infinite weights: lower --lr")
    save_tensors(path, state)


def load_checkpoint(path: Path) -> Tensor:
    """The weights of one recorded epoch, [421642], as this or another program saved them.

    The file is a finite `state_dict` of TargetCNN, or holds exactly one among other things, with or without the prefix
    of a wrapper. Raises UserError otherwise.
    """
    content = load_file(path, maker="train_target_model.py")
    model = TargetCNN()
    states = find_state_dicts(content, shapes(model.state_dict()))
    if len(states) > 1:
        names = " and ".join(name for name, _ in states)
        raise UserError(f"{path}: holds more than one state_dict of TargetCNN, {names}: save only one of them")
    if not states:
        raise UserError(
            f"{path}: not a state_dict of TargetCNN (its layers are conv1, conv2, fc1, fc2), nor does it hold one: "
            "run train_target_model.py to record one"
        )
    model.load_state_dict(states[0][1])
    weights = flatten_weights(model)
    if not weights.isfinite().all():
        raise UserError(f"{path}: holds NaN or infinite weights: record this run again with train_target_model.py")
    return weights


def find_state_dicts(content, expected: dict) -> list[tuple[str, dict[str, Tensor]]]:
    """Each `state_dict` of the `expected` shapes in nested dictionaries and lists, and the name under which it lies.

    It is what begins with one prefix, as DataParallel adds "module.", `torch.compile` "_orig_mod.", Opacus "_module."
    and the entries of a dictionary their keys. What lies beside it, such as the "n_averaged" of AveragedModel, does not
    matter; under the same prefix nothing else may lie, or it would be another network's.
    """
    tensors = {name: value for name, value in leaves(content) if isinstance(value, Tensor)}
    first = next(iter(expected))
    prefixes = [name.removesuffix(first) for name in tensors if f".{name}".endswith(f".{first}")]
    states = {
        prefix: {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in prefixes
    }
    return [(prefix.rstrip("."), state) for prefix, state in states.items() if shapes(state) == expected]


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...] | None]:
    """The shapes of the tensors in `state` that can be weights; None for masks, sparse tensors and their like."""
    dense = (one.is_floating_point() and one.layout is torch.strided and not one.is_meta for one in state.values())
    return {name: tuple(one.shape) if kept else None for (name, one), kept in zip(state.items(), dense, strict=True)}


def find_runs(directory: Path) -> list[Path]:
    """The directories of the training runs under `directory`: itself, or its `run_0001`, `run_0002` and so on.

    Raises UserError if there is no run, or if both layouts are mixed.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory: run train_target_model.py first")
    runs = recorded_runs(directory)
    if recorded_files(directory):
        if runs:
            raise UserError(f"{directory}: holds both weights_epoch_* files and {runs[0].name}: keep only one of them")
        return [directory]
    if not runs:
        raise UserError(f"{directory}: holds no weights_epoch_*.pth or .safetensors: run train_target_model.py first")
    return runs


def recorded_runs(directory: Path) -> list[Path]:
    """The directories `run_0001`, `run_0002` and so on in `directory`."""
    return sorted(path for path in directory.iterdir() if path.is_dir() and re.fullmatch(r"run_\d+", path.name))


def recorded_files(directory: Path) -> list[Path]:
    """The files in `directory` that are the weights of an epoch, `.pth` or `.safetensors`, in the order of epochs."""
    return sorted((path for path in directory.iterdir() if epoch_of(path) is not None), key=epoch_of)


def epoch_of(path: Path) -> int | None:
    """The epoch whose weights a file is, by its name; None for other files."""
    match = re.fullmatch(r"weights_epoch_(\d+)\.(pth|safetensors)", path.name)
    return int(match[1]) if match else None


def load_run(directory: Path) -> Tensor:
    """All checkpoints of one training run, [epochs + 1, 421642], in the order of `recorded_files`.

    Raises UserError if one is missing, broken, or there twice.
    """
    files = recorded_files(directory)
    for first, second in itertools.pairwise(files):
        if epoch_of(first) == epoch_of(second):
            raise UserError(f"{first}: the same epoch is in {second.name} too: keep only one of them")
    missing = min(set(range(len(files) + 1)) - {epoch_of(path) for path in files})
    if missing < max(len(files), 1):
        path = checkpoint_path(directory, missing)
        raise UserError(f"{path}: is missing from the recorded epochs: record the run again with train_target_model.py")
    return torch.stack([load_checkpoint(path) for path in files])


def load_log(directory: Path) -> list[dict] | None:
    """What train_target_model.py noted of each epoch of a run; None if another program recorded it.

    Each has `epoch`, `training_loss` (nats per image, None for epoch 0), `accuracy_percent` and `seconds`. Raises
    UserError if the file is broken.
    """
    path = directory / "training_log.json"
    if not path.exists():
        return None
    with refused_as(f"{path}: is damaged: delete it, or record the run again with train_target_model.py"):
        epochs = json.loads(path.read_text())["epochs"]
        keys = ("epoch", "accuracy_percent", "seconds")
        if not all(isinstance(epoch[key], int | float) for epoch in epochs for key in keys):
            raise ValueError("not numbers")
        return epochs


# ---- the task -------------------------------------------------------------------------------------------------------


class Dataset(NamedTuple):
    """A split of MNIST, whole, on one device."""

    images: Tensor  # [N, 1, 28, 28], normalised, float32
    labels: Tensor  # [N], int64

    def __getitem__(self, index) -> "Dataset":
        return Dataset(self.images[index], self.labels[index])


@functools.cache
def load_mnist(split: str, root: Path, device: torch.device | str = "cpu") -> Dataset:
    """The "train" (60,000) or "test" (10,000) images of MNIST, from `root`/MNIST/raw or downloaded to it.

    They are read once and shared: change none in place. Raises UserError if the files are missing or broken and cannot
    be downloaded.
    """
    name, count = {"train": ("train", 60_000), "test": ("t10k", 10_000)}[split]
    raw = root / "MNIST" / "raw"
    images = read_idx(raw / f"{name}-images-idx3-ubyte.gz", (count, 28, 28))
    labels = read_idx(raw / f"{name}-labels-idx1-ubyte.gz", (count,))
    images = images.unsqueeze(1).float().div_(255).sub_(MNIST_MEAN).div_(MNIST_STD)
    return Dataset(images.to(device), labels.long().to(device))


def read_idx(archive: Path, shape: tuple[int, ...]) -> Tensor:
    """The bytes in one of MNIST's files, uint8 of this `shape`: of an archive, or of what it was unpacked to.

    If neither can be read the archive is downloaded, unless the root that it is to be under is missing: a mistyped one
    is not made. Raises UserError if that fails.
    """
    for path in (archive, archive.with_suffix("")):
        with contextlib.suppress(OSError, EOFError, ValueError, zlib.error):
            return unpack_idx(path.read_bytes(), shape)
    with refused_as(
        f"{archive}: is {'damaged' if archive.exists() else 'missing'} and could not be downloaded: "
        "give the directory that holds MNIST/raw with --data, or restore data/ from git"
    ):
        if not archive.parents[2].is_dir():
            raise FileNotFoundError(archive.parents[2])
        with urllib.request.urlopen(MNIST_MIRROR + archive.name, timeout=60) as response:
            content = response.read()
        downloaded = unpack_idx(content, shape)
    save_file(archive, lambda temporary: temporary.write_bytes(content))
    return downloaded


def unpack_idx(content: bytes, shape: tuple[int, ...] | None = None) -> Tensor:
    """What a file in MNIST's format holds, uint8, compressed or not: of this `shape`, or that which its header gives.

    Raises EOFError, ValueError or zlib.error if it does not.
    """
    if content.startswith(b"\x1f\x8b"):
        content = gzip.decompress(content)
    if content[:3] != b"\x00\x00\x08" or len(content) < 4:
        raise ValueError("it does not begin as files of bytes in MNIST's format do")
    sizes = struct.unpack_from(f">{content[3]}I", content.ljust(4 + 4 * content[3]), 4)
    values = torch.tensor([], dtype=torch.uint8)
    if len(content) > 4 + 4 * len(sizes):
        values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * len(sizes))
    if len(values) != math.prod(sizes) or (shape is not None and sizes != shape):
        raise ValueError(f"it holds {len(values):,} bytes of shape {[*sizes]}")
    return values.view(sizes)


def training_data(root: Path, validation: int, device: torch.device | str = "cpu") -> Dataset:
    """The training images; to tune on, all but the last `validation` of them."""
    data = load_mnist("train", root, device)
    return data[: len(data.labels) - validation]


def scoring_data(root: Path, validation: int, device: torch.device | str = "cpu") -> Dataset:
    """The images that score: the test images; to tune on, the last `validation` training images in their place."""
    return load_mnist("train", root, device)[-validation:] if validation else load_mnist("test", root, device)


# ---- training --------------------------------------------------------------------------------------------------------


def fast_bf16(device: torch.device) -> bool:
    """Whether the hardware is known to compute in bf16 faster than in fp32."""
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.9 cannot be asked
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


class Progress(NamedTuple):
    """How far a training has come."""

    epoch: int  # the one that it is in or at the end of, from 1 on
    step: int  # batches so far, of all epochs
    loss: float  # mean of this epoch so far, nats per image
    seconds: float  # of this epoch so far, without what the caller does in between
    all_seconds: float  # likewise, of all epochs so far


def train_with_adam(
    model: nn.Module, data: Dataset, epochs: int, lr: float = 1e-3, batch_size: int = 128,
    use_bf16: bool | None = None, pauses: Container[int] = (), moments: Iterable[float] = (), label: str = "Training",
) -> Iterator[Progress]:  # fmt: skip
    """Train `model` in place, and pause at the end of every epoch, after so many steps as `pauses` hold, and once so
    many seconds of training have passed as the `moments` say, in rising order.

    An epoch is one pass over `data` in random order; one image that would be a batch by itself, of which a norm has no
    statistics, is left out. It computes in bf16 if `use_bf16`, by default where that is fast.
    """
    device = data.labels.device
    use_bf16 = fast_bf16(device) if use_bf16 is None else use_bf16
    adam = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    step, earlier = 0, 0.0  # seconds of the epochs before this one
    moments = iter(moments)
    moment = next(moments, math.inf)
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        model.train()
        total, seen = torch.zeros((), device=device), 0
        order = torch.randperm(len(data.labels)).to(device)  # drawn on the CPU: the same on every device
        if len(order) % batch_size == 1 < len(order):
            order = order[:-1]
        bar = tqdm(order.split(batch_size), desc=f"{label}, epoch {epoch}", leave=False, disable=None)
        for batch in bar:
            images, labels = data[batch]
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=use_bf16):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels)
            adam.zero_grad()
            loss.backward()
            adam.step()
            total += loss.detach() * len(labels)
            step, seen = step + 1, seen + len(labels)
            if seen == len(order):
                bar.close()
            if seen == len(order) or step in pauses or earlier + time.perf_counter() - start >= moment:
                mean_loss = (total / seen).item()  # waits for the device, so that the clock is right
                seconds = time.perf_counter() - start
                yield Progress(epoch, step, mean_loss, seconds, earlier + seconds)
                while moment <= earlier + seconds:
                    moment = next(moments, math.inf)
                start = time.perf_counter() - seconds
                model.train()  # scoring it has changed that
        earlier += seconds


# ---- the score ------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """How well one set of weights classifies a data set."""

    accuracy_percent: float
    average_loss: float  # the document's unit: cross-entropy summed over a batch of 256, averaged over images
    cross_entropy: float  # mean per image, nats
    wrong: Tensor  # [N], bool: the misclassified images


@torch.inference_mode()
def score(model: nn.Module, data: Dataset, batch_size: int = 250) -> Score:
    """Score `model` on all of `data`, the losses in float32. `batch_size` changes the speed, not the result."""
    model.eval()
    parts = (data[start : start + batch_size] for start in range(0, len(data.labels), batch_size))
    logits = torch.cat([model(images) for images, _ in parts]).float()
    losses = F.cross_entropy(logits, data.labels, reduction="none")
    wrong = logits.argmax(1) != data.labels
    summed_over_batches = sum(len(batch) * batch.double().sum().item() for batch in losses.split(256))
    accuracy_percent = 100 * (1 - wrong.double().mean().item())
    return Score(accuracy_percent, summed_over_batches / len(losses), losses.double().mean().item(), wrong.cpu())


def score_weights(states: Iterable[Tensor], data: Dataset) -> list[Score]:
    """Score each of `states`, [421642] each, as the weights of a TargetCNN. Equal states are scored once."""
    states = list(states)
    model = TargetCNN().to(data.images.device, memory_format=torch.channels_last)
    on_cpu = data.images.device.type == "cpu" and torch.backends.mkldnn.is_available()
    scores: list[Score] = []
    for index, weights in enumerate(tqdm(states, desc="Scoring", leave=False, disable=None)):
        twin = next((i for i in range(index) if torch.equal(states[i], weights)), None)
        if twin is None:
            load_weights(model, weights)
            scores.append(score(OneDnnLayout(model) if on_cpu else model, data))
        else:
            scores.append(scores[twin])
    return scores


class OneDnnLayout(nn.Module):
    """A TargetCNN for inference with images and weights in the layout of oneDNN, a sixth faster than channels-last."""

    def __init__(self, model: TargetCNN):
        super().__init__()
        self.forward_of = functools.partial(functional_call, model)
        self.weights = {name: tensor.detach().contiguous().to_mkldnn() for name, tensor in model.named_parameters()}

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_of(self.weights, (images.to_mkldnn(),)).to_dense()
