"""Where labelled images come from, and `python -m universal --data`."""

import contextlib
import gzip
import io
import json
import pickle
import re
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, assert_png, printed
from conftest import command as started
from PIL import Image
from torch import nn

from scripting import UserError
from target_cnn import load_mnist
from universal import __main__ as command
from universal.data.fitting import fit
from universal.data.images import load_images
from universal.data.pictures import read_picture
from universal.data.splits import split_images
from universal.evaluation.comparison import CLEARLY, compare

NETS = """
from torch import nn

def linear(classes=3, pixels=12 * 12 * 3):
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))

def hidden(classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(12 * 12 * 3, 24), nn.ReLU(), nn.Linear(24, classes))

def convolutional(channels=3, classes=3):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)
    )

def half():
    return hidden().half()

def flat():
    return nn.Linear(12 * 12 * 3, 3)

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12 * 12, 3)
    def forward(self, images):
        count, _, _ = images.shape
        return {"logits": self.layer(images.reshape(count, 144))}

def named():
    return Named()

def failing():
    return nn.Sequential(nn.Unflatten(0, (7, 11)))
"""
COLOURS = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (220, 40, 30)}


def picture(colour, seed: int, size=(20, 16)) -> Image.Image:
    """A picture of about this colour, with noise, size (width, height)."""
    noise = np.random.default_rng(seed).normal(0, 25, (size[1], size[0], 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


def make_folder(path: Path, each: int, first: int = 0) -> Path:
    for name, colour in COLOURS.items():
        (path / name).mkdir(parents=True)
        for seed in range(first, first + each):
            picture(colour, seed, (20 + seed % 3, 16 + seed % 4)).save(path / name / f"{seed:03}.png")
    return path


@pytest.fixture
def nets(tmp_path, monkeypatch) -> str:
    path = tmp_path / "nets.py"
    path.write_text(NETS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return str(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_folder(tmp_path / "pictures", 12)


def written(nets: str, data: Path, *options, model: str = "linear(3)") -> str:
    """What the command prints when it writes a network from `data`."""
    out = Path(nets).with_name("w.pth")
    return printed(command.main, "--model", f"{nets}:{model}", "--data", data, "--out", out, *options)


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_a_folder_of_pictures_gives_classes_by_name_and_standardised_images(folder):
    found = load_images(folder, size=(10, 14), channels=3)
    assert found.classes == ["blue", "green", "red"] and found.test is None and not found.broken
    assert found.train.pixels.shape == (36, 3, 10, 14) and found.train.pixels.dtype == torch.uint8
    assert found.train.labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    images, labels = found.train[torch.arange(36)]
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.square().mean((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    expected = read_picture(folder / "green" / "003.png", (10, 14), 3)
    assert torch.equal(found.train.pixels[15], expected)
    torch.testing.assert_close(found.train.mean, found.train.pixels.float().mean((0, 2, 3)) / 255)
    batches = list(found.train.loader())
    assert torch.equal(torch.cat([batch[0] for batch in batches]), images)
    assert torch.equal(torch.cat([batch[1] for batch in batches]), labels)


MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LA", "I;16", "I", "F"]


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_any_mode_become_what_they_look_like(tmp_path, mode):
    gradient = Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1)))
    if mode == "I;16":
        shown = Image.fromarray(np.asarray(gradient).astype(np.uint16) * 257)
    elif mode == "I":
        shown = Image.fromarray(np.asarray(gradient).astype(np.int32) * 257)
    elif mode == "F":
        shown = Image.fromarray(np.asarray(gradient).astype(np.float32) / 255)
    else:
        shown = gradient.convert("RGB").quantize(256) if mode == "P" else gradient.convert("RGB").convert(mode)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "F", "I") else "a.jpg" if mode == "YCbCr" else "a.png")
    shown.save(path)
    for channels in (1, 3):
        pixels = read_picture(path, (32, 32), channels).float()
        assert pixels.shape == (channels, 32, 32)
        off = (pixels.mean((0, 1)) - torch.arange(0, 256, 8)).abs()
        assert off.max() < (140 if mode == "1" else 4)  # of one bit, black or white
        assert pixels[:, :, 28:].mean() > 200 and pixels[:, :, :4].mean() < 60


def test_what_is_transparent_is_white_and_rotated_pictures_are_upright(tmp_path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 4, 8))
    clear.save(tmp_path / "clear.png")
    pixels = read_picture(tmp_path / "clear.png", (8, 8), 3)
    assert pixels[:, :, 0].tolist() == [[0] * 8, [0] * 8, [255] * 8] and (pixels[:, :, 7] == 255).all()
    upright = Image.fromarray(np.repeat(np.repeat(np.eye(2, dtype=np.uint8) * 200, 8, 0), 16, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    upright.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    assert torch.allclose(
        read_picture(tmp_path / "turned.jpg", (16, 32), 1).float(), torch.tensor(np.array(upright)).float(), atol=40
    )


def test_ctrl_c_ends_the_decoding(folder, monkeypatch):
    decoded = []

    def slowly(*_):
        time.sleep(0.02)
        decoded.append(1)
        return 0

    def interrupted(lines, **_):
        next(lines)
        raise KeyboardInterrupt

    monkeypatch.setattr("universal.data.pictures.read_picture", slowly)
    monkeypatch.setattr("universal.data.pictures.tqdm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_images(folder, size=(8, 8))
    assert len(decoded) < 36


def test_code_in_a_picture_is_not_run(tmp_path, folder):
    (folder / "red" / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n")
    found = load_images(folder, size=(8, 8))
    (line,) = found.broken
    assert "eps.png" in line and "UnidentifiedImageError" in line


@pytest.mark.parametrize("name", ["test", "val"])
def test_folders_of_train_and_test_are_two_parts(tmp_path, name):
    make_folder(tmp_path / "set" / "train", 3)
    make_folder(tmp_path / "set" / name, 2, first=50)
    (tmp_path / "set" / "train" / ".hidden").mkdir()
    found = load_images(tmp_path / "set", size=(8, 8))
    assert found.classes == [*COLOURS] and len(found.train) == 9 and len(found.test) == 6
    assert torch.equal(found.test.mean, found.train.mean)
    assert torch.equal(found.test.pixels[1], read_picture(tmp_path / "set" / name / "blue" / "051.png", (8, 8), 3))


def test_pictures_to_test_on_that_are_of_no_class_are_none(tmp_path):
    make_folder(tmp_path / "set" / "train", 2)
    (tmp_path / "set" / "test").mkdir()
    picture(COLOURS["red"], 0).save(tmp_path / "set" / "test" / "1.png")
    assert load_images(tmp_path / "set", size=(8, 8)).test is None
    make_folder(tmp_path / "set" / "val", 1)
    assert len(load_images(tmp_path / "set", size=(8, 8)).test) == 3


def test_pictures_that_are_left_out_are_said(folder, capsys):
    (folder / "red" / "000.png").write_bytes(b"no")
    train, test = split_images(folder, 0, torch.device("cpu"), size=(8, 8))
    assert len(train.labels) + len(test.labels) == 35
    assert re.match(r"1 pictures left out; the first: \S+000.png: cannot be decoded", capsys.readouterr().err)


def test_a_limit_draws_from_all_classes_and_processes_share_what_it_draws(folder, monkeypatch):
    whole = load_images(folder, size=(8, 8), limit=20)
    assert len(whole.train) == 20 and whole.train.labels.unique().tolist() == [0, 1, 2]
    shares, sums = [], []
    monkeypatch.setattr("universal.data.images.gathered", lambda value: sums.append(value) or [value])
    shares = [load_images(folder, size=(8, 8), limit=20, rank=rank, processes=2) for rank in (0, 1)]
    assert [len(share.train) for share in shares] == [10, 10]
    both = torch.cat([share.train.pixels for share in shares])
    assert sorted(map(bytes, both.numpy())) == sorted(map(bytes, whole.train.pixels.numpy()))
    total = sum(part[0][0] for part in sums if isinstance(part, tuple)) / (20 * 64)
    torch.testing.assert_close(total.float(), whole.train.mean)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: [child.rename(path / f"{child.parent.name}{child.name}") for child in path.glob("*/*")]
            and [child.rmdir() for child in path.iterdir() if child.is_dir()], "holds no folders: put the pictures"),
        (lambda path: (path / "yellow").mkdir(), "yellow: holds no pictures (.jpg, "),
        (lambda path: [child.rename(child.with_suffix(".txt")) for child in path.glob("red/*")], "red: holds no pict"),
        (lambda path: [child.write_bytes(b"no") for child in path.glob("*/*")], "none of its pictures can be decoded"),
        (lambda path: path.rename(path.with_name("elsewhere")), "no such file or directory"),
        (lambda path: [child.unlink() for child in path.glob("[br]*/*")]
            and [child.rmdir() for child in path.glob("[br]*")], "the class green alone: give images of two or more"),
        (lambda path: [(path / name).rename((path / "all").mkdir(exist_ok=True) or path / "all" / name)
            for name in COLOURS],
            "holds the class all alone: give images of two or more, such as those in "),
    ],
    ids=["no folders", "empty class", "no pictures in a class", "all broken", "missing", "one class", "classes within"],
)  # fmt: skip
def test_a_folder_that_cannot_be_used_gets_one_line(folder, spoil, reason):
    spoil(folder)
    with pytest.raises(UserError) as caught:
        load_images(folder, size=(8, 8))
    assert reason in str(caught.value) and str(folder) in str(caught.value)


def test_a_class_that_is_only_tested_is_refused(tmp_path):
    make_folder(tmp_path / "set" / "train", 1)
    make_folder(tmp_path / "set" / "test", 1)
    (tmp_path / "set" / "test" / "black").mkdir()
    with pytest.raises(UserError, match="black: is of a class that the training pictures do not have"):
        load_images(tmp_path / "set", size=(8, 8))


# ---- arrays ---------------------------------------------------------------------------------------------------------


def arrays(classes: int = 3, shape=(12, 12), each: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """Images that are lighter the higher their class is, one class after another."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    light = 250 * (labels + 0.5) / classes
    images = light.reshape(-1, *[1] * len(shape)) + rng.normal(0, 9, (len(labels), *shape))
    return {"images": images.clip(0, 255).astype(np.uint8), "labels": labels}


def saved(path: Path, content: dict) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **content)
    elif path.suffix == ".pt":
        torch.save({name: torch.as_tensor(value) for name, value in content.items()}, path)
    else:
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file({name: torch.as_tensor(value).contiguous() for name, value in content.items()}, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
@pytest.mark.parametrize("shape", [(12, 14), (3, 12, 14), (12, 14, 3), (1, 12, 14), (12, 14, 1), (5, 12, 14)])
def test_arrays_of_any_layout_are_read(tmp_path, suffix, shape):
    content = arrays(shape=shape)
    content |= {f"test_{name}": value[::2] for name, value in content.items()}
    found = load_images(saved(tmp_path / f"a{suffix}", content))
    images = torch.tensor(content["images"])
    images = images.unsqueeze(1) if len(shape) == 2 else images.permute(0, 3, 1, 2) if shape[0] == 12 else images
    assert torch.equal(found.train.pixels, images) and torch.equal(found.test.pixels, images[::2])
    assert found.train.labels.dtype == torch.int64 and found.test.labels.tolist() == content["labels"][::2].tolist()
    assert found.classes == ["0", "1", "2"]
    standard = (images / 255 - images.float().mean((0, 2, 3)).view(-1, 1, 1) / 255) / found.train.deviation.view(
        -1, 1, 1
    )
    torch.testing.assert_close(found.train[:][0], standard, atol=1e-3, rtol=1e-3)


def test_numbers_that_are_pixels_are_kept_as_bytes_and_others_as_they_are(tmp_path):
    content = arrays()
    pixels = content["images"]
    for values in (pixels.astype(np.float64), pixels.astype(np.int32), pixels.astype(np.uint16)):
        found = load_images(saved(tmp_path / "a.npz", content | {"images": values}))
        assert found.train.pixels.dtype == torch.uint8 and torch.equal(found.train.pixels[:, 0], torch.tensor(pixels))
    found = load_images(saved(tmp_path / "a.npz", content | {"images": pixels / 300 - 0.5}))
    assert found.train.pixels.dtype == torch.float32
    torch.testing.assert_close(found.train.mean, torch.tensor([pixels.mean() / 300 - 0.5], dtype=torch.float32))


@pytest.mark.parametrize("change", [lambda pixels: pixels * 0.999, lambda pixels: pixels > 0])
def test_images_to_test_on_are_in_the_units_of_those_to_learn_from(tmp_path, change):
    content = arrays()
    pixels = content["images"]
    for first, second in ((pixels, change(pixels)), (change(pixels), pixels)):
        given = {"images": first, "test_images": second, "test_labels": content["labels"]}
        found = load_images(saved(tmp_path / "a.npz", content | {**given, "labels": content["labels"]}))
        for part, values in ((found.train, first), (found.test, second)):
            assert part.pixels.dtype == found.train.pixels.dtype
            torch.testing.assert_close(part.pixels[:, 0].float(), torch.tensor(values).float())


def test_one_hot_labels_and_names_of_classes_are_read(tmp_path):
    content = arrays()
    names = np.array(["dark", "middle", "light", "none"])
    found = load_images(saved(tmp_path / "a.npz", content | {"labels": np.eye(3)[content["labels"]], "classes": names}))
    assert found.classes == [*names] and found.train.labels.tolist() == content["labels"].tolist()


class Code:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": None}, "but no images: it needs images and labels"),
        ({"labels": None}, "but no labels: it needs"),
        ({"test_images": np.zeros((2, 12, 12))}, "holds only one of test_images and test_labels"),
        ({"images": np.zeros((24, 9))}, "images have the shape [24, 9]: give [N, H, W]"),
        ({"images": np.zeros((0, 9, 9))}, "images have the shape [0, 9, 9]: give"),
        ({"labels": np.zeros(23, int)}, "24 images and 23 labels"),
        ({"labels": np.zeros(24)}, "the labels are torch.float64: give whole numbers"),
        ({"labels": np.arange(24) - 1}, "a label is -1"),
        ({"labels": np.zeros(24, int)}, "holds the class 0 alone"),
        ({"labels": np.array(["a"] * 24)}, "labels are no numbers"),
        ({"classes": np.array(["a", "b"])}, "holds 2 names of classes, but labels up to 2"),
        ({"images": np.array([Code()] * 24)}, "holds Python objects, which are unsafe and never executed"),
        ({"test_images": np.zeros((2, 3, 12, 12)), "test_labels": np.zeros(2, int)}, "have other channels"),
    ],
)
def test_arrays_that_cannot_be_used_get_one_line(tmp_path, monkeypatch, change, reason):
    monkeypatch.chdir(tmp_path)
    content = {name: value for name, value in (arrays() | change).items() if value is not None}
    with pytest.raises(UserError) as caught:
        load_images(saved(tmp_path / "a.npz", content))
    assert reason in str(caught.value) and str(tmp_path) in str(caught.value)
    assert not Path("executed").exists()


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".pth", ".safetensors"])
def test_code_in_a_file_is_not_run_and_broken_files_are_named(tmp_path, monkeypatch, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"a{suffix}"
    for content in (pickle.dumps({"images": Code()}), b"nothing", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.\w+: .*(damaged|never executed)"):
            load_images(path)
    assert not Path("executed").exists()
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds no arrays, but no images and no labels"):
        load_images(tmp_path / "list.pt")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"a\.txt: is no kind of labelled images"):
        load_images(tmp_path / "a.txt")


# ---- files as MNIST's -----------------------------------------------------------------------------------------------


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def idx_files(path: Path, prefix: str = "", test: str = "t10k", packed: bool = False) -> Path:
    path.mkdir(parents=True)
    for part, seed in (("train", 0), (test, 1)):
        for name, values in arrays(shape=(9, 11), seed=seed).items():
            file = path / f"{prefix}{part}-{name}-idx{values.ndim}-ubyte"
            (file.with_name(f"{file.name}.gz") if packed else file).write_bytes(
                gzip.compress(idx(values)) if packed else idx(values)
            )
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("inner", "prefix", "test"), [("", "", "t10k"), ("MNIST/raw", "emnist-x-", "test")])
def test_a_directory_of_files_as_mnist_s_is_read(tmp_path, packed, inner, prefix, test):
    idx_files(tmp_path / "set" / inner, prefix, test, packed)
    found = load_images(tmp_path / "set")
    for part, seed in ((found.train, 0), (found.test, 1)):
        expected = arrays(shape=(9, 11), seed=seed)
        assert torch.equal(part.pixels[:, 0], torch.tensor(expected["images"]))
        assert part.labels.tolist() == expected["labels"].tolist()


def test_mnist_itself_is_read_like_any_other():
    found = load_images(REPOSITORY / "data", limit=500)
    assert len(found.train) == 500 and len(found.test) == 10_000 and found.classes == [*map(str, range(10))]
    published = load_mnist("test", REPOSITORY / "data")
    assert torch.equal(found.test.labels, published.labels)
    assert torch.equal(found.test.pixels, ((published.images * 0.3081 + 0.1307) * 255).round().to(torch.uint8))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda file: file.unlink(), "holds no train-images-*-ubyte"),
        (lambda file: file.write_bytes(file.read_bytes()[:-5]), "train-images-idx3-ubyte: is damaged"),
        (lambda file: file.write_bytes(b""), "train-images-idx3-ubyte: is damaged"),
        (lambda file: file.write_bytes(b"\0\0\x08\xff"), "train-images-idx3-ubyte: is damaged"),
        (lambda file: file.write_bytes(gzip.compress(bytes(99))[:-4]), "train-images-idx3-ubyte: is damaged"),
        (lambda file: file.with_name("other-train-images-idx3-ubyte").write_bytes(b""), "holds more than one train-im"),
    ],
)
def test_broken_files_as_mnist_s_get_one_line_and_no_download(tmp_path, monkeypatch, spoil, reason):
    def urlopen(*_, **__):
        raise AssertionError("downloads")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    spoil(idx_files(tmp_path / "set") / "train-images-idx3-ubyte")
    with pytest.raises(UserError) as caught:
        load_images(tmp_path / "set")
    assert reason in str(caught.value)
    assert len(list((tmp_path / "set").iterdir())) <= 5


# ---- what a module takes --------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """Takes [N, 18, 18]."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(18 * 18, 5)

    def forward(self, images):
        count, _, _ = images.shape
        return {"logits": self.layer(images.reshape(count, 18 * 18))}


@pytest.mark.parametrize(
    ("module", "own", "expected"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 5)), (3, (64, 64)), (1, (28, 28), (1, 28, 28), 5)),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 40 * 40, 5)), (1, (64, 64)), (3, (40, 40), (3, 40, 40), 5)),
        (nn.Linear(784, 5), (3, (64, 64)), (1, (28, 28), (784,), 5)),
        (nn.Linear(3 * 20 * 20, 5), (3, (20, 20)), (3, (20, 20), (1200,), 5)),
        (Rows(), (3, (30, 30)), (1, (18, 18), (18, 18), 5)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (1, (33, 20)),
            (3, (33, 20), (3, 33, 20), 4)),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).half(), (3, (9, 9)),
            (1, (9, 9), (1, 9, 9), 4)),
        (nn.Sequential(nn.Conv2d(5, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (5, (9, 9)),
            (5, (9, 9), (5, 9, 9), 4)),
    ],
)  # fmt: skip
def test_what_a_module_takes_is_found_by_trying(module, own, expected):
    module.train()
    state = torch.get_rng_state()
    assert fit(module, *own) == expected
    assert module.training and torch.equal(state, torch.get_rng_state())


def test_what_no_module_takes_is_refused_with_its_own_error(folder, monkeypatch):
    monkeypatch.setattr("universal.data.fitting.SIDES", {28: None, 32: None})  # a hundred others take seconds
    with pytest.raises(UserError) as caught:
        load_images(folder, nn.Sequential(nn.Unflatten(1, (7, 11))))
    line = str(caught.value)
    assert "Sequential takes no images [N, 3, 1" in line and "RuntimeError" in line and "with --size" in line
    with pytest.raises(UserError, match=r"takes no images \[N, 1, 9, 8\] \(of the first it says"):
        load_images(folder, nn.Sequential(nn.Flatten(), nn.Linear(784, 5)), size=(9, 8), channels=1)


def test_images_are_made_what_the_module_takes(tmp_path):
    grey = load_images(
        saved(tmp_path / "a.npz", arrays()), nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 3))
    )
    assert grey.fit.shape == (3, 12, 12) and len(grey.record()["mean"]) == 3
    assert torch.equal(grey.train.pixels[:, 0], grey.train.pixels[:, 2])
    colours = load_images(saved(tmp_path / "b.npz", arrays(shape=(3, 12, 12))), nn.Linear(81, 3), size=(9, 9))
    assert colours.train[:][0].shape == (24, 81) and colours.train[5][0].shape == (81,)
    assert colours.train.pixels.shape == (24, 1, 9, 9) and colours.train.pixels.dtype == torch.uint8
    plain = arrays()["images"].reshape(24, -1).mean(1)
    torch.testing.assert_close(
        grey.train.pixels.float().mean((1, 2, 3)), torch.tensor(plain, dtype=torch.float32), atol=1, rtol=0
    )


# ---- the command ----------------------------------------------------------------------------------------------------


def test_a_network_is_written_from_pictures_and_the_readme_s_lines_classify_one(nets, folder, tmp_path, monkeypatch):
    """The lines of the README, as they stand there."""
    output = written(nets, folder, "--evaluate", "--seed", 3)
    assert "pictures: 36 images of 3 classes: blue, green, red" in output
    assert "Images are 12 x 12, 3 channels, which the network takes, as [3, 12, 12]; mean 0." in output
    assert float(re.search(r"Accuracy = ([\d.]+)% on \d+ images held out", output)[1]) > 80
    record = json.loads((tmp_path / "w.json").read_text())
    assert record["classes"] == [*COLOURS] and record["size"] == [12, 12] and record["channels"] == 3
    assert record["shape"] == [3, 12, 12] and len(record["mean"]) == len(record["deviation"]) == 3

    for suffix in ("pth", "json"):
        (tmp_path / f"w.{suffix}").rename(tmp_path / f"weights.{suffix}")
    (tmp_path / "my_net.py").write_text("from nets import linear as Net\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("my_net", "nets"):  # other tests have files of these names
        monkeypatch.delitem(sys.modules, module, raising=False)
    (lines,) = [
        block for block in re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
        if "weights.json" in block
    ]  # fmt: skip
    for name, colour in COLOURS.items():
        picture(colour, 99, (31, 47)).save("picture.jpg")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(lines, "README.md", "exec"), {})
        assert said.getvalue() == f"{name}\n"


def test_several_networks_have_a_json_each_and_the_same_seed_gives_the_same(nets, tmp_path):
    data = saved(tmp_path / "a.npz", arrays(shape=(3, 12, 12), each=20))
    written(nets, data, "--count", 2, model="hidden")
    states = [torch.load(tmp_path / f"w_{index}.pth", weights_only=True) for index in (1, 2)]
    assert not torch.equal(states[0]["1.weight"], states[1]["1.weight"])
    assert (tmp_path / "w_1.json").read_text() == (tmp_path / "w_2.json").read_text()
    written(nets, data, "--seed", 1, model="hidden")
    again = torch.load(tmp_path / "w.pth", weights_only=True)
    assert all(torch.equal(again[name], states[1][name]) for name in again)


def test_test_images_score_and_adam_runs_beside_it(nets, tmp_path):
    content = arrays(shape=(3, 12, 12), each=50)
    content |= {f"test_{name}": value for name, value in arrays(shape=(3, 12, 12), each=10, seed=5).items()}
    plot = tmp_path / "adam.png"
    output = written(
        nets, saved(tmp_path / "a.npz", content), "--evaluate", "--compare", "--plot", plot, model="hidden"
    )
    accuracy = float(re.search(r"Accuracy = ([\d.]+)% on 30 test images", output)[1])
    assert accuracy > 80
    assert f"| {accuracy:.2f} " in re.search(r"\| written .*", output)[0]
    assert len(re.findall(r"\| Adam at 0\.\d+ ", output)) == 3 and "level with the written network" in output
    assert_png(plot, 1200, 750)


def test_what_holds_out_a_fifth_lets_neither_side_see_it(nets, folder, monkeypatch):
    seen = {}

    def compare(build, write, train, scored, seed):
        seen["train"], seen["scored"] = train, scored
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "compare", compare)
    with pytest.raises(KeyboardInterrupt):
        written(nets, folder, "--compare")
    train, scored = ({*map(bytes, part.pixels.numpy())} for part in seen.values())
    assert len(train) == 29 and len(scored) == 7 and not train & scored
    assert Path(nets).with_name("w.pth").exists()  # saved before


def test_a_broken_picture_is_named_and_the_rest_is_used(nets, folder, tmp_path, capsys):
    whole = (folder / "red" / "004.png").read_bytes()
    (folder / "red" / "004.png").write_bytes(whole[:300])
    with pytest.raises(
        UserError, match="pictures: 1 of its pictures are broken, named above; what is saved was written without them"
    ):
        written(nets, folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert "red/004.png: cannot be decoded (" in line
    assert (tmp_path / "w.pth").exists() and (tmp_path / "w.json").exists()
    assert "35 images" in written(nets, folder, "--skip-broken")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--steps", 2), "unrecognized arguments: --steps 2"),
        (("--validation", 9), "unrecognized arguments: --validation 9"),
        (("--synthesizer", "none.pth"), "none.pth: no such file: run python -m universal.train first"),
        (("--plot", "p.png"), "--plot needs --compare"),
        (("--size", 0), "'0' is no size in pixels: give one such as 64 or 48x64"),
        (("--size", "9x"), "'9x' is no size in pixels"),
        (("--channels", 2), "--channels: invalid choice"),
        (("--search", 0), "--search: '0' is not a number from 0.001 to"),
        (("--limit", 1), "'1' is not a whole number from 2"),
        (("--size", 13), "takes no images [N, 3, 13, 13]"),
        (("--model", "{nets}:linear(2)"), "holds 3 classes, but the network has 2 outputs"),
        (("--model", "{nets}:failing"), "(of the first it says RuntimeError: "),
        (("--data", "nowhere"), "--data nowhere: no such file or directory"),
    ],
)
def test_options_that_do_not_go_together_get_one_line_and_nothing_is_written(
    nets, folder, tmp_path, refusal, monkeypatch, options, reason
):
    monkeypatch.setattr("universal.data.fitting.SIDES", {12: None})
    options = [str(option).replace("{nets}", nets) for option in options]
    line = refusal(
        command.main, "--model", f"{nets}:linear", "--data", folder, "--out", tmp_path / "w.pth", *options,
    )  # fmt: skip
    assert reason in line
    assert not (tmp_path / "w.pth").exists() and not (tmp_path / "w.json").exists()


def test_for_so_many_seconds_others_are_tried(nets, tmp_path):
    content = arrays(shape=(3, 12, 12), each=50)
    data = saved(tmp_path / "a.npz", content | {"labels": np.roll(content["labels"], 25)})  # half of them wrong
    output = written(nets, data, "--evaluate", "--search", 0.7)
    found = re.search(r"the best of (\d+) tries, Accuracy = [\d.]+% on (\d+) images held out, which chose it", output)
    assert int(found[1]) > 1 and 15 < int(found[2]) < 45
    assert "tries" not in written(nets, data, "--evaluate", "--search", 0.001)


@pytest.mark.parametrize("option", [("--search", 1), ("--compare",)])
def test_what_takes_its_time_runs_in_one_process(nets, folder, tmp_path, refusal, monkeypatch, option):
    monkeypatch.setattr(command, "start_processes", lambda _: (0, 2))
    given = ("--model", f"{nets}:linear", "--data", folder, "--out", tmp_path / "w.pth")
    assert f"{option[0]}: runs in one process alone" in refusal(command.main, *given, *option)


def test_networks_of_every_kind_are_written_scored_and_compared(nets, tmp_path):
    data = saved(tmp_path / "a.npz", arrays(shape=(3, 12, 12), each=50))
    for model in ("half", "flat", "named"):
        output = written(nets, data, "--evaluate", "--compare", model=model)
        assert float(re.search(r"Accuracy = ([\d.]+)%", output)[1]) > 80
        assert "level with the written network" in output
    assert "as [12, 12]" in written(nets, data, model="named")


def test_adam_stops_where_it_has_clearly_passed_what_was_written(tmp_path):
    train = load_images(saved(tmp_path / "a.npz", arrays(shape=(3, 12, 12), each=200))).train
    found = compare(lambda: nn.Sequential(nn.Flatten(), nn.Linear(432, 3)), lambda *_: None, train, train, seed=0)
    for points in found.adam.values():
        enough = found.written.accuracy_percent + CLEARLY
        assert all(point.accuracy_percent < enough for point in points[:-1])
        assert points[-1].accuracy_percent >= enough


def test_images_that_nothing_can_be_learned_from_get_one_line_that_names_the_file(nets, tmp_path, refusal):
    content = arrays(shape=(3, 12, 12))
    for change, reason in (
        ({"images": np.where(content["images"] > 200, np.nan, 0.5)}, "the images hold NaN"),
        ({"images": np.full((24, 3, 12, 12), 7)}, "all images are the same"),
        ({"labels": np.array([1] * 24), "classes": np.arange(3)}, "all 24 labels are 1"),
    ):
        data = saved(tmp_path / "a.npz", content | change)
        line = refusal(command.main, "--model", f"{nets}:linear", "--data", data, "--out", tmp_path / "w.pth")
        assert reason in line and "a.npz: " in line and not (tmp_path / "w.pth").exists()


def test_a_class_without_an_image_is_named(nets, tmp_path, capsys):
    content = arrays(shape=(3, 12, 12)) | {"classes": np.array(["dark", "middle", "light", "lost"])}
    written(nets, saved(tmp_path / "a.npz", content), model="linear(6)")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("a.npz: none of the images used is of lost")


def test_a_single_image_to_test_on_is_scored(nets, tmp_path):
    content = arrays(shape=(3, 12, 12))
    content |= {f"test_{name}": value[:1] for name, value in content.items()}
    assert "00% on 1 test images" in written(nets, saved(tmp_path / "a.npz", content), "--evaluate")


def test_too_few_images_to_compare_on_get_one_line(nets, tmp_path, refusal):
    data = saved(tmp_path / "a.npz", arrays(shape=(3, 12, 12), each=1))
    given = ("--model", f"{nets}:linear", "--data", data, "--out", tmp_path / "w.pth", "--compare")
    assert "holds 3 images, too few to keep some apart" in refusal(command.main, *given)


def test_what_is_written_before_one_fails_is_kept(nets, folder, tmp_path, refusal, monkeypatch):
    write, seeds = command.write, []

    def failing(*given, seed, **options):
        seeds.append(seed)
        if seed == 2:
            raise ValueError("no more")
        return write(*given, seed=seed, **options)

    monkeypatch.setattr(command, "write", failing)
    given = ("--model", f"{nets}:linear", "--data", folder, "--out", tmp_path / "w.pth", "--count", 4)
    assert "no more" in refusal(command.main, *given)
    assert seeds == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.glob("w*")) == ["w_1.json", "w_1.pth", "w_2.json", "w_2.pth"]


def test_more_outputs_than_classes_are_fine(nets, folder, tmp_path):
    written(nets, folder, model="linear(5)")
    assert torch.load(tmp_path / "w.pth", weights_only=True)["1.bias"].shape == (5,)


def test_weights_and_json_are_written_both_or_neither(nets, folder, tmp_path, refusal, monkeypatch):
    written(nets, folder)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("w.*")}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    options = ("--model", f"{nets}:linear", "--data", folder, "--out", tmp_path / "w.pth", "--seed", 5)
    assert "the disk is full" in refusal(command.main, *options)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*w*") if path.name[0] != "n"} == before
    (tmp_path / "x.json").mkdir()
    assert "x.json is a directory" in refusal(command.main, *options[:-4], "--out", tmp_path / "x.pth")


def test_two_processes_write_what_one_does_and_speak_once(nets, tmp_path):
    data = saved(tmp_path / "a.npz", arrays(each=200))
    written(nets, data, model="linear(3, 144)")
    options = ("-m", "universal", "--model", f"{nets}:linear(3, 144)", "--data", data, "--out", tmp_path / "two.pth")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    result = started(*options, "--device", "cpu", launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("wrote") == 1
    one, two = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("w", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-3, rtol=1e-3)
    alone, shared = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("w", "two"))
    assert shared["mean"] == pytest.approx(alone["mean"]) and shared["classes"] == alone["classes"]
