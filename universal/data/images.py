"""Labelled images from files, as a module takes them: found, fitted, decoded and standardised."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from scripting import UserError
from universal.data.fitting import Fit, fit
from universal.data.labelled import MOST_IMAGES, gathered
from universal.data.sources import open_source

BATCH = 256  # images that are handed on together


class LabelledPixels(Dataset):
    """Images that are kept as they were decoded, and standardised when they are indexed, by one number or many.

    `pixels` are uint8 or float32, [N, C, H, W]; `mean` and `deviation` [C], of bytes from 0 to 1; `shape` is that of an
    image as a module takes it.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, mean: Tensor, deviation: Tensor, shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        self.pixels, self.labels, self.mean, self.deviation = pixels, labels, mean, deviation
        self.shape, self.dtype = shape, dtype

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> tuple[Tensor, Tensor]:
        images = in_units(self.pixels[index])
        images = (images - self.mean.view(-1, 1, 1)) / self.deviation.view(-1, 1, 1)
        return images.reshape(*images.shape[:-3], *self.shape).to(self.dtype), self.labels[index]

    def at(self, index: Tensor | slice) -> "LabelledPixels":
        """Some of them."""
        return self._replaced(self.pixels[index], self.labels[index])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "LabelledPixels":
        """The same on another device, handed on in this precision."""
        moved = self._replaced(self.pixels.to(device), self.labels.to(device))
        moved.mean, moved.deviation = self.mean.to(device), self.deviation.to(device)
        moved.dtype = dtype or self.dtype
        return moved

    def _replaced(self, pixels: Tensor, labels: Tensor) -> "LabelledPixels":
        return LabelledPixels(pixels, labels, self.mean, self.deviation, self.shape, self.dtype)

    def loader(self) -> DataLoader:
        """All of them once, in batches: [n, *shape] and [n]."""
        return DataLoader(self, batch_size=None, sampler=BatchSampler(SequentialSampler(self), BATCH, drop_last=False))


class ImageSet(NamedTuple):
    """A data set of labelled images."""

    train: LabelledPixels
    test: LabelledPixels | None
    classes: list[str]  # names, in the order of labels
    fit: Fit  # channels, size, and the shape that a module takes
    broken: list[str]  # a line for each picture that could not be decoded

    def record(self) -> dict:
        """What it takes, beside the weights, to classify another picture."""
        return {
            "classes": self.classes,
            "size": [*self.fit.size],  # height, width
            "channels": self.fit.channels,
            "mean": self.train.mean.tolist(),  # of each channel, of bytes as numbers from 0 to 1
            "deviation": self.train.deviation.tolist(),
            "shape": [*self.fit.shape],  # of one image, as the network takes it
        }


def load_images(
    path: Path, module: nn.Module | None = None, size: tuple[int, int] | None = None, channels: int | None = None,
    limit: int = MOST_IMAGES, rank: int = 0, processes: int = 1,
) -> ImageSet:  # fmt: skip
    """The labelled images at `path`, in one of the formats of `sources.py`, as `module` takes them.

    Without a `size` (height, width) or `channels` (1 or 3) they are the first that it takes, as `fit` says; and without
    a module, the images' own. Of more than `limit` training images so many are drawn, always the same. Of several
    processes, each has its share of them, and the first the test images. Raises UserError, in one line, if that cannot
    be.
    """
    source = open_source(path)
    own_channels, own_size = source.train.look()
    if channels and own_channels not in (1, 3, channels):
        raise UserError(f"{path}: its images have {own_channels} channels, which cannot be made {channels}")
    fitted = fitted_to(module, path, own_channels, own_size, channels, size)
    if module is not None and fitted.outputs < len(source.classes):
        raise UserError(
            f"{path}: holds {len(source.classes)} classes, but the network has {fitted.outputs} outputs: build it with "
            f"{len(source.classes)} or more"
        )
    count = len(source.train.labels)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit]
    share = chosen.sort().values[rank::processes]
    pixels, labels, broken = source.train.read(share, fitted.size, fitted.channels)
    mean, deviation = moments(pixels, processes)
    train = LabelledPixels(pixels, labels, mean, deviation, fitted.shape)
    test = None
    if source.test is not None and rank == 0:
        every = torch.arange(len(source.test.labels))
        pixels, labels, more = source.test.read(every, fitted.size, fitted.channels)
        test, broken = LabelledPixels(pixels, labels, mean, deviation, fitted.shape), broken + more
    if processes > 1:
        broken = [line for lines in gathered(broken) for line in lines]
    if any(part is not None and not len(part) for part in (train, test)):
        if not broken:
            raise UserError(f"{path}: holds {count} images for {processes} processes: use fewer")
        raise UserError(f"{path}: none of its pictures can be decoded; {broken[0]}")
    return ImageSet(train, test, source.classes, fitted, broken)


def fitted_to(
    module: nn.Module | None, path: Path, own_channels: int, own_size: tuple[int, int], channels: int | None,
    size: tuple[int, int] | None,
) -> Fit:  # fmt: skip
    """How a module takes the images at `path`; without one, as they are or as they are to be."""
    if module is None:
        channels, size = channels or own_channels, size or own_size
        return Fit(channels, size, (channels, *size), 0)
    try:
        return fit(module, own_channels, own_size, channels, size)
    except ValueError as error:
        raise UserError(f"{path}: {type(module).__name__} {error}") from error


def in_units(pixels: Tensor) -> Tensor:
    """Pixels as numbers of floating point: bytes from 0 to 1."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def moments(pixels: Tensor, processes: int) -> tuple[Tensor, Tensor]:
    """The mean and deviation of each channel of the images of all processes, [C], float32; 1 where all are alike."""
    sums = torch.zeros(2, pixels.shape[1], dtype=torch.float64)
    for part in pixels.split(BATCH):
        values = in_units(part).double()
        sums += torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))])
    count = pixels.numel() // max(pixels.shape[1], 1)
    if processes > 1:
        parts = gathered((sums, count))
        sums, count = sum(part[0] for part in parts), sum(part[1] for part in parts)
    mean, square = sums / max(count, 1)
    deviation = (square - mean.square()).clamp_min(0).sqrt()
    return rounded(mean), rounded(torch.where(deviation > 1e-6, deviation, 1.0))


def rounded(values: Tensor) -> Tensor:
    """Values to six digits, so that they are the same in whatever order they were summed up."""
    return torch.tensor([float(f"{value:.6g}") for value in values.tolist()])
