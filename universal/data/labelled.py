"""Labelled images, however they are given: checked once, split, and passed over as often as need be.

Which images are used, held out, or in the sample depends on what they hold, not on their order: each has a key, a hash
of its pixels. So a loader may shuffle, and processes may each have a share, without changing what is written. The
sample is those of the smallest keys (bottom-k sampling: Cohen and Kaplan 2007).
"""

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

MOST_IMAGES = 20_000  # by default: from 55,000 of MNIST accuracy is half a point higher, for twice the seconds
SAMPLE, OF_ALL, LARGEST_SAMPLE = 6000, 0.25, 15_000  # images that all layers but the last are written from
RESIDENT = 2**28  # elements of images that may be in memory, one GiB; of larger sets, only the sample
PART = 4096  # images of a tensor that are looked at together
HASHED = 4096  # elements of an image that its key depends on
LARGEST = 10**9  # value of an image: sums of squares of features of such are finite
FOLDS = 5
HELD_OUT, JUDGING = 0, (1, 2)  # the fold that nothing is made from; those by which one chooses among what others made


class Batch(NamedTuple):
    """Some images, with their classes in canonical order and the folds that they are in."""

    images: Tensor  # [n, ...], float32
    labels: Tensor  # [n], int64
    folds: Tensor  # [n], int64


class Keyed(NamedTuple):
    """Images with their keys, and their labels as given."""

    keys: Tensor  # [n], int64
    images: Tensor
    labels: Tensor

    def at(self, index: Tensor | slice) -> "Keyed":
        return Keyed(*(values[index] for values in self))

    def least(self, count: int) -> "Keyed":
        """Those of the `count` smallest keys, in their order."""
        return self.at(self.keys.argsort(stable=True)[:count])

    def copied(self, device: torch.device | str) -> "Keyed":
        """Copies on a device: a part of a tensor would be sent as the whole of it."""
        return Keyed(*(values.to(device, copy=True) for values in self))


class LabelledImages:
    """Images and labels that can be passed over in batches.

    `images` are a tensor [N, ...] of floating point with `labels` [N], whole numbers or one-hot [N, classes]; or a
    Dataset or DataLoader of pairs of an image and its label. Of more than `limit`, so many are used. With several
    processes each gives its own share. `present` are the labels that there are, in canonical order: as they come first
    in the sample. A Batch numbers them so. Raises ValueError, in one line, for what cannot be learned from.
    """

    def __init__(
        self, images, labels: Tensor | None = None, seed: int = 0, limit: int = MOST_IMAGES,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        if limit < 2:
            raise ValueError(f"the limit is {limit}: let two images or more be used")
        self.source, self.device, self.seed = source_of(images, labels), device, seed
        self.multipliers = torch.empty(0, dtype=torch.long)
        total, firsts, kept = self._survey(limit)
        sample, keys, whole = kept.at(slice(LARGEST_SAMPLE)), kept.keys, len(kept.keys) == min(total, limit)
        if is_shared():
            parts = gathered((total, firsts, sample.copied("cpu"), keys.cpu(), whole))
            total, whole = sum(part[0] for part in parts), all(part[4] for part in parts)
            firsts = {
                label: min(part[1].get(label, key) for part in parts)
                for part in parts
                for label, key in part[1].items()
            }
            sample = joined([part[2] for part in parts]).least(LARGEST_SAMPLE).copied(kept.keys.device)
            keys = torch.cat([part[3] for part in parts])
        refuse_unusable(total, firsts, sample.images)
        self.count, self.threshold = min(total, limit), None
        if total > limit:  # without all keys, those of about the right share of all images
            self.threshold = keys.sort().values[limit - 1].item() if whole else int(2**64 * limit / total) - 2**63
        self.present = list(dict.fromkeys([*sample.labels.tolist(), *sorted(firsts)]))
        self.firsts = torch.tensor([firsts[label] for label in self.present], device=device)
        self.numbers = torch.full((max(self.present) + 1,), -1, device=device)
        self.numbers[self.present] = torch.arange(len(self.present), device=device)
        sample = sample.at(slice(sample_size(self.count)))
        self.sample = self._batch(self._used(sample))
        self.resident = self._batch(self._used(kept)) if whole else None
        self.shape = tuple(self.sample.images.shape[1:])

    def batches(self, size: int) -> Iterator[Batch]:
        """All images that are used; those that are in memory always in the same order."""
        if self.resident is not None:
            yield from map(Batch, *(values.split(size) for values in self.resident))
            return
        for images, labels in pairs_of(self.source):
            keyed = self._keyed(*checked(images, labels))
            for part in map(Keyed, *(values.split(size) for values in self._used(keyed))):
                yield self._batch(part)

    def _survey(self, limit: int) -> tuple[int, dict[int, int], Keyed]:
        """How many images there are, the smallest key of each class, and the images that stay in memory: of the
        smallest keys, all that are used or the sample."""
        total, firsts, parts = 0, {}, []
        for images, labels in pairs_of(self.source):
            if not len(images):
                continue
            keyed = self._keyed(*checked(images, labels))
            if parts and keyed.images.shape[1:] != parts[0].images.shape[1:]:
                shapes = " and of ".join(str([*part.images.shape[1:]]) for part in (parts[0], keyed))
                raise ValueError(f"images of {shapes}: give all of one shape")
            total += len(keyed.keys)
            for label in keyed.labels.unique().tolist():
                key = keyed.keys[keyed.labels == label].min().item()
                firsts[label] = min(firsts.get(label, key), key)
            parts.append(keyed)
            most = min(limit, max(sample_size(limit), RESIDENT // max(keyed.images[0].numel(), 1)))
            if sum(len(part.keys) for part in parts) > 2 * most:
                parts = [joined(parts).least(most)]
        if not total:
            raise ValueError("there are no images: give some of two classes or more")
        return total, firsts, joined(parts).least(most if min(total, limit) <= most else sample_size(limit))

    def _keyed(self, images: Tensor, labels: Tensor) -> Keyed:
        """Images with their keys."""
        bits = images.flatten(1)
        bits = bits[:, :: -(-bits.shape[1] // HASHED)].contiguous().view(torch.int32)
        if len(self.multipliers) != bits.shape[1]:
            generator = torch.Generator().manual_seed(self.seed)
            self.multipliers = (torch.randint(2**62, (bits.shape[1],), generator=generator) * 2 + 1).to(bits.device)
        return Keyed((bits * self.multipliers).sum(1), images, labels)

    def _used(self, keyed: Keyed) -> Keyed:
        """Those of them that are used."""
        return keyed if self.threshold is None else keyed.at(keyed.keys <= self.threshold)

    def _batch(self, keyed: Keyed) -> Batch:
        """Images as they are handed on. The first of each class is in the last fold."""
        keys, images, labels = (values.to(self.device) for values in keyed)
        numbers = self.numbers[labels]
        return Batch(images, numbers, ((keys >> 32) % FOLDS).where(keys != self.firsts[numbers], FOLDS - 1))


def sample_size(count: int) -> int:
    """How many of so many images are in the sample."""
    return min(max(SAMPLE, int(OF_ALL * count)), LARGEST_SAMPLE)


def source_of(images, labels: Tensor | None) -> Iterable[tuple]:
    """What can be iterated over again and again, in batches of images and labels."""
    if isinstance(images, Tensor):
        if not isinstance(labels, Tensor):
            raise ValueError(f"the labels are {name_of(labels)}: give a tensor of whole numbers [N]")
        if images.dim() < 2 or images.shape[:1] != labels.shape[:1]:
            raise ValueError(
                f"images of shape {[*images.shape]} and labels of {[*labels.shape]}: give one label an image"
            )
        return list(zip(images.detach().split(PART), labels.detach().split(PART), strict=True))
    if labels is not None and isinstance(images, Dataset | DataLoader):
        raise ValueError(f"labels beside {name_of(images)}: it gives its own, leave them out")
    if isinstance(images, Dataset):
        return DataLoader(images, batch_size=256)
    if isinstance(images, DataLoader):
        return images
    raise ValueError(
        f"the images are {name_of(images)}: give a tensor and its labels, a Dataset or a DataLoader of pairs"
    )


def name_of(value) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def pairs_of(source: Iterable) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a source. Raises ValueError if these are no pairs of tensors."""
    for batch in collated(source):
        if isinstance(batch, tuple | list) and len(batch) == 2 and not isinstance(batch[1], Tensor):
            raise ValueError("the data set gives labels that are no numbers: make it give (image, number of its class)")
        if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[0], Tensor):
            raise ValueError(
                f"the data set gives {name_of(batch)}, not pairs of images and labels: make it give (image, label)"
            )
        yield batch[0], batch[1]


def collated(source: Iterable[tuple]) -> Iterator[tuple]:
    """The batches of a source. Raises ValueError if it gives images, or anything else, that make no batch."""
    try:
        yield from source
    except RuntimeError as error:
        if "stack expects each tensor to be equal size" not in str(error):
            raise
        raise ValueError("the data set gives images of different sizes: give it a transform, such as Resize") from error
    except TypeError as error:
        if "default_collate" not in str(error):
            raise
        raise ValueError(
            "the data set gives what is no tensor or number: give it a transform, such as ToTensor() of torchvision"
        ) from error


def checked(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Images in single precision and labels as whole numbers, [n]. Raises ValueError if they cannot be such."""
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels: give one label an image")
    if not images.is_floating_point():
        raise ValueError(f"the images are {images.dtype}: give numbers of floating point, as the network takes them")
    images = images.detach().float()
    bounds = torch.stack(images.aminmax()) if images.numel() else images.new_zeros(2)
    if not bounds.isfinite().all():
        raise ValueError("the images hold NaN or infinite values: leave such images out")
    if bounds.abs().max() > LARGEST:
        raise ValueError(f"the images hold values beyond {LARGEST:,}: standardise them")
    labels = labels.detach().to(images.device)
    if labels.dim() == 2 and labels.shape[1] > 1:
        if not bool(((labels == 0) | (labels == 1)).all() & (labels.sum(1) == 1).all()):
            raise ValueError(
                f"labels of shape {[*labels.shape]} that are not one-hot: give the number of each image's class"
            )
        labels = labels.argmax(1)
    labels = labels.flatten() if labels.dim() == 2 else labels
    if labels.dim() != 1:
        raise ValueError(f"labels of shape {[*labels.shape]}: give the number of each image's class, [N]")
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"the labels are {labels.dtype}: give whole numbers, one class an image")
    labels = labels.long()
    if len(labels) and labels.min() < 0:
        raise ValueError(f"a label is {labels.min().item()}: classes are numbered from 0 on")
    return images, labels


def refuse_unusable(total: int, firsts: dict[int, int], images: Tensor) -> None:
    """Raises ValueError if there is nothing to tell apart."""
    if total < 2:
        raise ValueError("there is one image: give some of two classes or more")
    if len(firsts) < 2:
        raise ValueError(f"all {total:,} labels are {next(iter(firsts))}: give images of two classes or more")
    if bool((images[1:] == images[0]).all()):
        raise ValueError("all images are the same: give images that differ")


def joined(parts: list[Keyed]) -> Keyed:
    return parts[0] if len(parts) == 1 else Keyed(*map(torch.cat, zip(*parts, strict=True)))


APART: ContextVar[bool] = ContextVar("APART", default=False)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """This process writes networks of its own, from images of its own, whatever other processes do."""
    token = APART.set(True)
    try:
        yield
    finally:
        APART.reset(token)


def is_shared() -> bool:
    """Whether several processes write one network, from their shares of the images."""
    return dist.is_initialized() and not APART.get()


def agreed(value: float) -> float:
    """The value that the first of all processes has, so that rounding never lets them go different ways."""
    return gathered(value)[0] if is_shared() else value


def gathered(value) -> list:
    """What each process has, in their order. Tensors come on the devices that they were on."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts
