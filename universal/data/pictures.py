"""Pictures as people have them: of any size, mode and orientation, some of them broken."""

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from scripting import UserError, in_short

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
# Whatever a file's name says, it is decoded as one of these: Pillow would have Ghostscript run the code in an EPS.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
MODES = {1: "L", 3: "RGB"}  # by channels
LOOKED_AT = 64  # pictures, to learn what size and how many channels all have
MOST_PIXELS = 64  # a side, of pictures for a network that takes any size


class PictureFiles:
    """Pictures in files, with the number of each one's class."""

    def __init__(self, paths: Sequence[Path], labels: Tensor):
        self.paths, self.labels = list(paths), labels

    def look(self) -> tuple[int, tuple[int, int]]:
        """How many channels the pictures have, 1 if all are grey, and their size: squares, as high as most are."""
        modes, sides = set(), []
        for index in evenly(len(self.paths), LOOKED_AT):
            try:
                with opened(self.paths[index]) as picture:
                    modes.add(picture.mode)
                    sides.append(min(picture.size))
            except Exception:  # broken pictures are named where they are decoded
                continue
        grey = all(mode[0] in "1LIF" and mode != "LAB" for mode in modes)
        side = min(round(median(sides)), MOST_PIXELS) if sides else MOST_PIXELS
        return 1 if grey else 3, (side, side)

    def read(self, index: Tensor, size: tuple[int, int], channels: int) -> tuple[Tensor, Tensor, list[str]]:
        """The pictures of this `index`, uint8 [n, channels, *size], and their labels [n], without those that cannot be
        decoded; and a line for each of these."""
        chosen = [self.paths[one] for one in index]
        pixels = torch.empty((len(chosen), channels, *size), dtype=torch.uint8)
        kept, broken = [], []

        def decode(place: int) -> str | None:
            try:
                pixels[place] = read_picture(chosen[place], size, channels)
            except Exception as error:  # whatever broken bytes lead to
                return f"{chosen[place]}: cannot be decoded ({in_short(error)})"
            return None

        # Closed first, so that nothing goes on after Ctrl-C. Ignored are warnings of sizes, and of broken metadata.
        with (
            warnings.catch_warnings(action="ignore"),
            ThreadPoolExecutor() as pool,
            closing(pool.map(decode, range(len(chosen)))) as lines,
        ):
            bar = tqdm(lines, desc="Decoding pictures", total=len(chosen), delay=2, leave=False, disable=None)
            for place, line in enumerate(bar):
                (kept if line is None else broken).append(place if line is None else line)
        if broken:
            pixels = pixels[kept]
        return pixels, self.labels[index[kept]], broken


def read_picture(path: Path | str, size: Sequence[int], channels: int) -> Tensor:
    """A picture as uint8 [channels, *size]: upright, what is transparent white, grey or in colours.

    `size` is (height, width). Raises OSError, or what else Pillow does, if it cannot be decoded.
    """
    height, width = size
    with opened(path) as picture:
        picture.draft(None, (2 * width, 2 * height))  # of a large JPEG only as much as is needed
        picture = ImageOps.exif_transpose(picture)
        if picture.mode[0] in "IF":
            picture = in_bytes(picture)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert(MODES[channels]).resize((width, height))
        return torch.from_numpy(np.array(picture)).view(height, width, channels).permute(2, 0, 1)


def opened(path: Path | str) -> Image.Image:
    return Image.open(path, formats=FORMATS)


def in_bytes(picture: Image.Image) -> Image.Image:
    """A grey picture of 8 bits from one of 16 or 32, which Pillow would cut off at 255, or of numbers up to 1."""
    values = np.asarray(picture).astype(np.float32)
    if picture.mode[0] == "I":
        values = values / 257 if values.max() > 255 else values
    elif values.max() <= 1:
        values = values * 255
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def evenly(count: int, most: int) -> range:
    """At most so many of `count` places, evenly spread."""
    return range(0, count, -(-count // most) or 1)


def picture_classes(path: Path) -> list[Path]:
    """The folders in a folder, by name, without hidden ones."""
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def picture_files(path: Path, classes: Sequence[str]) -> PictureFiles:
    """The pictures in a folder that has a folder for each of the `classes`. Raises UserError if one is empty."""
    from torchvision.datasets.folder import make_dataset  # takes a second to import

    numbers = {name: number for number, name in enumerate(classes)}
    pairs = make_dataset(path, numbers, extensions=SUFFIXES, allow_empty=True)
    labels = torch.tensor([label for _, label in pairs], dtype=torch.long)
    for folder in picture_classes(path):
        if folder.name not in numbers:
            raise UserError(f"{folder}: is of a class that the training pictures do not have: remove it")
        if not (labels == numbers[folder.name]).any():
            raise UserError(f"{folder}: holds no pictures ({', '.join(SUFFIXES)}): put some in it, or remove it")
    return PictureFiles([Path(name) for name, _ in pairs], labels)
