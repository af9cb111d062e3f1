"""Labelled images in memory, MNIST's or anyone's: those that are learned from, and those that score."""

import sys
from pathlib import Path

import torch
from torch import nn

from scripting import MNIST, UserError
from target_cnn import Dataset, scoring_data, training_data
from universal.data.images import load_images
from universal.data.labelled import FOLDS


def split_images(
    path: Path | None, validation: int, device: torch.device, module: nn.Module | None = None,
    size: tuple[int, int] | None = None, channels: int | None = None,
) -> tuple[Dataset, Dataset]:  # fmt: skip
    """The images that are learned from, and those that score: MNIST's, or those at a `path`, as `load_images` reads
    them.

    Test images score. With `validation` so many training images do, and without test images a fifth of them; of one's
    own images at most a fifth. Raises UserError if they cannot be read, or are too few.
    """
    if path is None:
        return training_data(MNIST, validation, device), scoring_data(MNIST, validation, device)
    found = load_images(path, module, size, channels, limit=sys.maxsize)
    if found.broken:
        print(f"{len(found.broken)} pictures left out; the first: {found.broken[0]}", file=sys.stderr)
    train, test = (part and in_memory(part, device) for part in (found.train, found.test))
    if test is not None and not validation:
        return train, test
    fifth = len(train.labels) // FOLDS
    if not fifth:
        raise UserError(f"{path}: holds {len(train.labels)} training images, too few to keep some apart")
    return cut(train, min(validation or fifth, fifth))


def in_memory(images, device: torch.device) -> Dataset:
    pixels, labels = images[:]
    return Dataset(pixels.to(device), labels.to(device))


def cut(data: Dataset, count: int) -> tuple[Dataset, Dataset]:
    """The images in random order, which is always the same: all but the last `count`, and these."""
    data = shuffled(data)
    return data[:-count], data[-count:]


def shuffled(data: Dataset, seed: int = 0) -> Dataset:
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))
    return data[order.to(data.labels.device)]
