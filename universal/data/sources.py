"""The files that labelled images may lie in: one entry of FORMATS a kind."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scripting import UserError, in_short, load_file, refused_as
from target_cnn import unpack_idx
from universal.data.labelled import checked
from universal.data.pictures import MODES, PictureFiles, picture_classes, picture_files

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, as Pillow has it (ITU-R 601)
PART = 1024  # images that are resized together
DATA_HELP = (
    "labelled images: a folder with a folder of pictures for each class, a directory of *-ubyte files as MNIST's, or "
    "an .npz, .pt or .safetensors file with images and labels (default: MNIST)"
)
ARRAYS = "images and labels, and maybe test_images, test_labels and classes"


class PixelArray:
    """Images in memory, [N, C, H, W], uint8 or float32, with the number of each one's class, [N]."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def look(self) -> tuple[int, tuple[int, int]]:
        """How many channels the images have, and their size."""
        channels, *size = self.images.shape[1:]
        return channels, tuple(size)

    def read(self, index: Tensor, size: tuple[int, int], channels: int) -> tuple[Tensor, Tensor, list[str]]:
        """The images of this `index`, [n, channels, *size], their labels [n], and an empty list: none is broken."""
        parts = [converted(self.images[part], size, channels) for part in index.split(PART)]
        return torch.cat(parts), self.labels[index], []


class Source(NamedTuple):
    """Labelled images that are found but not yet decoded."""

    train: PictureFiles | PixelArray
    test: PictureFiles | PixelArray | None
    classes: list[str]  # names, in the order of labels


def open_source(path: Path) -> Source:
    """The labelled images at `path`, in whichever of the FORMATS. Raises UserError if they are in none."""
    if not path.exists():
        raise UserError(f"--data {path}: no such file or directory: give one with labelled images")
    for read in FORMATS:
        try:
            source = read(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({in_short(error)}): make it readable") from error
        if source is not None:
            if len(source.classes) < 2:
                (only,) = source.classes
                inner = f", such as those in {path / only}" if any(map(Path.is_dir, path.glob(f"{only}/*"))) else ""
                raise UserError(f"{path}: holds the class {only} alone: give images of two or more{inner}")
            return source
    raise UserError(
        f"{path}: is no kind of labelled images: give a folder with a folder of pictures for each class, a directory "
        f"of *-ubyte files as MNIST's, or an .npz, .pt or .safetensors file with {ARRAYS}"
    )


def idx_directory(path: Path) -> Source | None:
    """MNIST's four files, or others of their format: in a directory, or in its MNIST/raw or raw."""
    directories = [path, path / "MNIST" / "raw", path / "raw"]
    directory = next((one for one in directories if any(one.glob("*-ubyte")) or any(one.glob("*-ubyte.gz"))), None)
    if directory is None:
        return None
    arrays = {"images": idx_file(directory, "train", "images"), "labels": idx_file(directory, "train", "labels")}
    if any(directory.glob("*t10k-*-ubyte*")) or any(directory.glob("*test-*-ubyte*")):
        arrays["test_images"] = idx_file(directory, "t10k", "images", "test")
        arrays["test_labels"] = idx_file(directory, "t10k", "labels", "test")
    return source_of_arrays(directory, arrays)


def idx_file(directory: Path, part: str, content: str, other: str | None = None) -> Tensor:
    """The bytes of a directory's one file that has this part, or the other, and the content in its name."""
    found = [
        file for file in sorted(directory.glob("*-ubyte*"))
        if file.name.endswith(("-ubyte", "-ubyte.gz")) and f"-{content}-" in file.name
        and any(f"{word}-" in file.name for word in (part, other or part))
    ]  # fmt: skip
    names = {file.name.removesuffix(".gz") for file in found}
    if len(names) != 1:
        has = "no" if not names else "more than one"
        raise UserError(f"{directory}: holds {has} {part}-{content}-*-ubyte(.gz): give files as MNIST's")
    with refused_as(f"{found[0]}: is damaged, or not in MNIST's format: restore it"):
        return unpack_idx(found[0].read_bytes())


def picture_folder(path: Path) -> Source | None:
    """A folder with a folder of pictures for each class; or one with `train` and `test` or `val` that are such."""
    if not path.is_dir():
        return None
    folders = {folder.name: folder for folder in picture_classes(path)}
    if not folders:
        raise UserError(f"{path}: holds no folders: put the pictures of each class in one, named after the class")
    train, test = path, None
    if "train" in folders and picture_classes(folders["train"]):
        train = folders["train"]
        tests = (folders[name] for name in ("test", "val") if name in folders)
        test = next(filter(picture_classes, tests), None)
    classes = [folder.name for folder in picture_classes(train)]
    return Source(picture_files(train, classes), test and picture_files(test, classes), classes)


def npz_file(path: Path) -> Source | None:
    """Arrays that `np.savez` wrote."""
    if path.suffix != ".npz":
        return None
    line = f"{path}: is damaged, or holds Python objects, which are unsafe and never executed: save arrays of numbers"
    with refused_as(line), np.load(path, allow_pickle=False) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    return source_of_arrays(path, content)


def tensor_file(path: Path) -> Source | None:
    """A dictionary of tensors that `torch.save` or safetensors wrote."""
    if path.suffix not in (".pt", ".pth", ".safetensors"):
        return None
    content = load_file(path, maker="torch.save({'images': ..., 'labels': ...}, ...)")
    return source_of_arrays(path, content if isinstance(content, Mapping) else {})


FORMATS = (idx_directory, picture_folder, npz_file, tensor_file)


def source_of_arrays(path: Path, arrays: Mapping) -> Source:
    """What arrays or tensors of the names ARRAYS hold, from the file or directory `path`."""
    missing = [name for name in ("images", "labels") if name not in arrays]
    if missing:
        held = ", ".join(map(str, list(arrays)[:6])) or "no arrays"
        raise UserError(f"{path}: holds {held}, but no {' and no '.join(missing)}: it needs {ARRAYS}")
    if ("test_images" in arrays) != ("test_labels" in arrays):
        raise UserError(f"{path}: holds only one of test_images and test_labels: add the other, or leave both out")
    images, labels = zip(
        *(pixels_and_labels(path, arrays, prefix) for prefix in ("", "test_") if f"{prefix}images" in arrays),
        strict=True,
    )
    if len({part.shape[1] for part in images}) > 1:
        raise UserError(f"{path}: images and test_images have other channels: give both alike")
    parts = [PixelArray(*part) for part in zip(in_one_unit(images), labels, strict=True)]
    count = 1 + max(int(part.max()) for part in labels)
    names = arrays.get("classes")
    classes = [*map(str, range(count))] if names is None else [str(name) for name in np.asarray(names).tolist()]
    if len(classes) < count:
        raise UserError(f"{path}: holds {len(classes)} names of classes, but labels up to {count - 1}: name them all")
    return Source(parts[0], parts[1] if len(parts) == 2 else None, classes)


def pixels_and_labels(path: Path, arrays: Mapping, prefix: str) -> tuple[Tensor, Tensor]:
    """The images [N, C, H, W] and labels [N] of these names. Raises UserError if they are none."""
    images, labels = (tensor_of(path, f"{prefix}{name}", arrays[f"{prefix}{name}"]) for name in ("images", "labels"))
    given = f"{path}: {prefix}images have the shape {[*images.shape]}"
    if images.dim() not in (3, 4) or not images.numel():
        raise UserError(f"{given}: give [N, H, W], [N, C, H, W] or [N, H, W, C]")
    if images.dim() == 3:
        images = images.unsqueeze(1)
    elif images.shape[1] not in MODES and images.shape[3] in MODES:
        images = images.permute(0, 3, 1, 2)
    try:
        _, labels = checked(torch.zeros(len(images), 1), labels)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return images, labels


def tensor_of(path: Path, name: str, values) -> Tensor:
    """Numbers as a tensor. Raises UserError if they are none."""
    with refused_as(f"{path}: {name} are no numbers: give an array or tensor of them"):
        if isinstance(values, np.ndarray) and values.dtype.kind == "u" and values.itemsize > 1:
            values = values.astype(np.int64)  # which PyTorch knows little of
        return torch.as_tensor(values)


def in_one_unit(parts: Sequence[Tensor]) -> list[Tensor]:
    """Those to learn from and those to test on, as uint8 if all are whole numbers from 0 to 255, else as float32."""

    def is_whole(images: Tensor) -> bool:
        return bool(images.min() >= 0 and (images == images.round()).all())

    if all(images.dtype == torch.uint8 for images in parts):
        return list(parts)
    numbers = [images.float() for images in parts]
    if 1 < max(images.max() for images in numbers) <= 255 and all(map(is_whole, numbers)):
        return [images.to(torch.uint8) for images in numbers]
    return numbers


def converted(images: Tensor, size: tuple[int, int], channels: int) -> Tensor:
    """Images [n, C, H, W] as [n, channels, *size], of the same dtype."""
    if images.shape[1] == 3 and channels == 1:
        grey = torch.einsum("nchw,c->nhw", images.float(), torch.tensor(LUMA)).unsqueeze(1)
        images = grey.round().to(torch.uint8) if images.dtype == torch.uint8 else grey
    if images.shape[2:] != size:
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    return images.expand(-1, channels, -1, -1)
