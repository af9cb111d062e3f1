"""Data sets that are drawn at random, as `architectures.py` draws networks: labelled images of a few classes.

The repository's MNIST, the glyphs of the fonts that come with matplotlib, and what a few lines make: leaves that hide
each other, whose statistics are those of photographs, waves, textures and outlines.
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from scripting import MNIST
from target_cnn import Dataset, load_mnist

FONTS = "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono"
SCRIPTS = (
    (0x21, 0x7E), (0xC0, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x531, 0x586), (0x10D0, 0x10FF), (0x5D0, 0x5EA),
    (0x1401, 0x1500), (0x2200, 0x22FF), (0x2190, 0x21FF),
)  # fmt: skip
HELD_OUT_FONTS = "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"
SCRIPTS_OF_HELD_OUT_FONTS = ((0x21, 0x7E), (0x391, 0x3C9), (0x410, 0x44F), (0x2200, 0x22FF), (0x2190, 0x21FF))
GLYPH = 36  # pixels along a side of a glyph, before it is warped
SIDES = (16, 32)  # of images, pixels
LAST_DIGITS = 5000  # of MNIST's training images, that no task has
LEAVES = 30  # in an image
MOST_CLASSES = 20


class Task(NamedTuple):
    """A data set: what networks are written from, and what scores them, standardised by the former."""

    kind: str
    classes: int
    train: Dataset
    test: Dataset

    def to(self, device: torch.device) -> "Task":
        parts = (Dataset(*(values.to(device) for values in part)) for part in (self.train, self.test))
        return Task(self.kind, self.classes, *parts)


# ---- kinds: [N] labels below a number of classes -> images [N, 1 or 3, side, side] within [0, 1] ---------------------


class Apart(NamedTuple):
    """Labelled images, by class."""

    images: Tensor  # [N, 1 or 3, height, width], within [0, 1]
    where: list[Tensor]  # the images of each class


def apart(data: Dataset) -> Apart:
    images = data.images - data.images.min()
    return Apart(images / images.max(), [(data.labels == label).nonzero()[:, 0] for label in data.labels.unique()])


@cache
def digits() -> Apart:
    return apart(load_mnist("train", MNIST)[:-LAST_DIGITS])


def of_labelled(draw: random.Random, labels: Tensor, classes: int, side: int, made: Callable[[], Apart]) -> Tensor:
    """Images of classes that there are, or of unions of them, more or less distorted."""
    images, where = made()
    order = draw.sample(range(len(where)), len(where))
    size = draw.randint(1, len(where) // classes)
    found = labels.new_empty(len(labels))
    for label in range(classes):
        own = torch.cat([where[each] for each in order[label * size : (label + 1) * size]])
        mine = labels == label
        found[mine] = own[torch.randint(len(own), (int(mine.sum()),))]
    return warped(images[found], side, draw.random() * (draw.random() < 0.5))


@cache
def glyph(font: str, code: int) -> Tensor | None:
    """A letter as a picture [1, GLYPH, GLYPH] within [0, 1]; None if the font has none."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    face = ImageFont.truetype(str(path), 28)
    if face.getmask(chr(code)).getbbox() is None or bytes(face.getmask(chr(code))) == bytes(face.getmask("\uffff")):
        return None
    picture = Image.new("L", (GLYPH, GLYPH))
    ImageDraw.Draw(picture).text((GLYPH / 2, GLYPH / 2), chr(code), 255, face, "mm")
    return pil_to_tensor(picture) / 255


def glyphs(
    draw: random.Random, labels: Tensor, classes: int, side: int, fonts: Sequence[str] = FONTS,
    scripts: Sequence[tuple[int, int]] = SCRIPTS,
) -> Tensor:  # fmt: skip
    """Letters of one script in several fonts, distorted."""
    found: list[list[Tensor]] = []
    while len(found) < classes:
        first, last = draw.choice(scripts)
        codes = draw.sample(range(first, last + 1), last + 1 - first)
        letters = ([picture for font in fonts if (picture := glyph(font, code)) is not None] for code in codes)
        found = list(islice(filter(None, letters), classes))
    images = torch.stack([draw.choice(found[label]) for label in labels.tolist()])
    return warped(images, side, draw.random())


def leaves(draw: random.Random, labels: Tensor, classes: int, side: int) -> Tensor:
    """Shapes that hide each other, of sizes, slants and colours that depend on the class (dead leaves: Lee, Mumford and
    Huang 2001)."""
    channels = draw.choice([1, 3])
    size, slant, long = torch.rand(classes) * 0.25 + 0.04, torch.rand(classes) * math.pi, torch.rand(classes)
    palette = torch.rand(classes, 4, channels)
    spread, alike = draw.uniform(0.2, 1), draw.random()
    palette = alike * palette.mean(0) + (1 - alike) * palette
    y, x = grid(side)
    images = torch.zeros(len(labels), channels, side, side)
    for _ in range(LEAVES):
        angle = slant[labels] + spread * torch.randn(len(labels))
        extent = size[labels] * (spread * torch.randn(len(labels))).exp()
        a, b = (values[:, None, None] for values in (extent * (1 + 2 * long[labels]), extent / (1 + 2 * long[labels])))
        dx, dy = x - torch.rand(len(labels), 1, 1), y - torch.rand(len(labels), 1, 1)
        c, s = angle.cos()[:, None, None], angle.sin()[:, None, None]
        inside = ((c * dx + s * dy) / a) ** 2 + ((c * dy - s * dx) / b) ** 2 < 1
        colour = palette[labels, torch.randint(4, (len(labels),))] + 0.1 * torch.randn(len(labels), channels)
        images = torch.where(inside[:, None], colour[:, :, None, None], images)
    return images.clamp(0, 1)


def waves(draw: random.Random, labels: Tensor, classes: int, side: int) -> Tensor:
    """Sums of two waves, of a length and a direction that depend on the class."""
    length, slant = 2 + torch.rand(classes, 2) * side / 2, torch.rand(classes, 2) * math.pi
    spread = draw.uniform(0.05, 0.3)
    y, x = (side * values for values in grid(side))
    images = torch.zeros(len(labels), side, side)
    for each in range(2):
        angle = slant[labels, each] + spread * torch.randn(len(labels))
        pitch = 2 * math.pi / (length[labels, each] * (spread * torch.randn(len(labels))).exp())
        phase = 2 * math.pi * torch.rand(len(labels), 1, 1)
        along = angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y
        images += (pitch[:, None, None] * along + phase).sin()
    return 0.5 + 0.25 * images[:, None]


def textures(draw: random.Random, labels: Tensor, classes: int, side: int) -> Tensor:
    """Noise through a filter of the class."""
    channels, kernel = draw.choice([1, 3]), draw.choice([3, 5, 7])
    filters = torch.randn(classes, channels, 1, kernel, kernel)
    alike = draw.random()
    filters = alike * filters.mean(0) + (1 - alike) * filters
    noise = torch.randn(len(labels), 1, side + kernel - 1, side + kernel - 1)
    images = torch.empty(len(labels), channels, side, side)
    for label in range(classes):
        images[labels == label] = F.conv2d(noise[labels == label], filters[label])
    return (0.5 + 0.25 * images / images.std()).clamp(0, 1)


def outlines(draw: random.Random, labels: Tensor, classes: int, side: int) -> Tensor:
    """Closed curves of a form that depends on the class, at any place, filled or as lines, distorted."""
    forms = 0.25 * torch.randn(classes, 2, 6) / torch.arange(1, 7)
    filled, turn = draw.random() < 0.6, draw.choice([0.2, 0.5, 3.2])
    y, x = grid(side)
    n = len(labels)
    dx = x - 0.5 - 0.15 * (torch.rand(n, 1, 1) - 0.5)
    dy = y - 0.5 - 0.15 * (torch.rand(n, 1, 1) - 0.5)
    angle = torch.atan2(dy, dx) + turn * torch.randn(n, 1, 1)
    form = forms[labels] + 0.02 * torch.randn(n, 2, 6)
    radius = 0.25 + 0.1 * torch.rand(n, 1, 1)
    bend = sum(
        form[:, 0, k, None, None] * ((k + 1) * angle).sin() + form[:, 1, k, None, None] * ((k + 1) * angle).cos()
        for k in range(6)
    )
    distance = (dx**2 + dy**2).sqrt() - radius * (1 + bend)
    sharp = side * (distance if filled else distance.abs() - 0.03)
    return torch.sigmoid(-2 * sharp)[:, None]


@cache
def photograph() -> Tensor:
    """The photograph that comes with matplotlib, [3, height, width] within [0, 1]."""
    return pil_to_tensor(Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")) / 255


def places(draw: random.Random, labels: Tensor, classes: int, side: int) -> Tensor:
    """Pieces of a photograph, around a place and of a size and a slant that depend on the class."""
    picture = photograph() if draw.random() < 0.6 else photograph().mean(0, keepdim=True)
    n, (height, width) = len(labels), picture.shape[1:]
    spread = draw.uniform(0.02, 0.3)
    size = (0.05 + 0.2 * torch.rand(classes))[labels] * (spread * torch.randn(n)).exp()
    angle = (math.pi * (2 * torch.rand(classes) - 1))[labels] + spread * torch.randn(n)
    centre = (1.4 * torch.rand(classes, 2) - 0.7)[labels] + spread * (2 * torch.rand(n, 2) - 1)
    c, s = size * angle.cos(), size * angle.sin()
    across = height / width  # so that pieces are square
    maps = torch.stack([
        torch.stack([c * across, -s * across, centre[:, 0]], 1), torch.stack([s, c, centre[:, 1]], 1)
    ], 1)  # fmt: skip
    grids = F.affine_grid(maps, [n, 1, side, side], align_corners=False)
    picture = F.avg_pool2d(picture, 2) if side < 24 else picture
    return (
        F.grid_sample(picture[None], grids.flatten(0, 1)[None], padding_mode="reflection", align_corners=False)[0]
        .unflatten(1, (n, side))
        .movedim(1, 0)
    )


class Kind(NamedTuple):
    """One kind of data sets."""

    share: float  # of those that are drawn
    make: Callable[[random.Random, Tensor, int, int], Tensor]
    classes: int = MOST_CLASSES  # at most


KINDS: dict[str, Kind] = {
    "mnist": Kind(3, partial(of_labelled, made=digits), 10), "glyphs": Kind(3, glyphs), "leaves": Kind(2, leaves),
    "waves": Kind(0.5, waves), "textures": Kind(1, textures), "places": Kind(1.5, places),
}  # fmt: skip
HELD_OUT_KINDS: dict[str, Kind] = {
    "held-out glyphs": Kind(1, partial(glyphs, fonts=HELD_OUT_FONTS, scripts=SCRIPTS_OF_HELD_OUT_FONTS)),
    "outlines": Kind(1, outlines),
}


def own_kind(data: Dataset) -> Kind:
    """That of data sets of some classes of one's own images."""
    found = apart(data)
    return Kind(1, partial(of_labelled, made=lambda: found), min(len(found.where), MOST_CLASSES))


# ---- what is done to all of them -------------------------------------------------------------------------------------


def grid(side: int) -> tuple[Tensor, Tensor]:
    """The rows and columns of pixels, within (0, 1), [side, side] each."""
    along = (torch.arange(side) + 0.5) / side
    return torch.meshgrid(along, along, indexing="ij")


def warped(images: Tensor, side: int, amount: float) -> Tensor:
    """Images turned, scaled, sheared and moved, each its own way, and brought to a size."""
    n = len(images)
    turn, shear = (amount * size * (2 * torch.rand(n) - 1) for size in (0.5, 0.4))
    scale = (amount * 0.3 * (2 * torch.rand(n, 2) - 1)).exp()
    moved = amount * 0.25 * (2 * torch.rand(n, 2) - 1)
    c, s = turn.cos(), turn.sin()
    rows = [
        torch.stack([c * scale[:, 0], -s * scale[:, 1] + shear, moved[:, 0]], 1),
        torch.stack([s * scale[:, 0], c * scale[:, 1], moved[:, 1]], 1),
    ]
    places = F.affine_grid(torch.stack(rows, 1), [n, 1, side, side], align_corners=False)
    return F.grid_sample(images, places, align_corners=False)


def dressed(draw: random.Random, images: Tensor) -> Tensor:
    """Images with other contrasts, colours, backgrounds and noise, the same way in all of a task."""
    n, channels, side, _ = images.shape
    if channels == 1 and draw.random() < 0.3:
        ink, paper = torch.rand(2, n, 3, 1, 1)
        same = draw.random()
        ink, paper = (same * each[:1] + (1 - same) * each for each in (ink, paper))
        images = paper + images * (ink - paper)
    if draw.random() < 0.2:
        smooth = F.interpolate(torch.rand(n, 1, 4, 4), (side, side), mode="bicubic", align_corners=False)
        images = images + draw.uniform(0.2, 0.8) * (1 - images) * smooth
    if draw.random() < 0.2:
        images = images.clamp(0, 1) ** draw.choice([0.5, 2])
    if draw.random() < 0.2:
        images = 1 - images
    if draw.random() < 0.3:
        images = images + draw.uniform(0.02, 0.3) * torch.randn_like(images)
    return images


def draw_task(
    draw: random.Random, count: int, held_out: int, kinds: dict[str, Kind] = KINDS
) -> Task:  # fmt: skip
    """A random data set of `count` images and so many `held_out`.

    What is random in images comes from the global generator of torch, which is seeded by `draw`.
    """
    torch.manual_seed(draw.getrandbits(60))
    ((name, kind),) = draw.choices(list(kinds.items()), [kind.share for kind in kinds.values()])
    classes = min(10, kind.classes) if draw.random() < 0.4 else draw.randint(2, kind.classes)
    side = 28 if draw.random() < 0.4 else 4 * draw.randint(SIDES[0] // 4, SIDES[1] // 4)
    balance = torch.ones(classes) if draw.random() < 0.7 else 0.3 + torch.rand(classes)
    labels = torch.multinomial(balance, count + held_out, replacement=True)
    labels[:classes] = torch.arange(classes)
    images = dressed(draw, kind.make(draw, labels, classes, side))
    mean, deviation = images[:count].mean(), images[:count].std() + 1e-3
    images = (images - mean) / deviation
    return Task(name, classes, Dataset(images[:count], labels[:count]), Dataset(images[count:], labels[count:]))
