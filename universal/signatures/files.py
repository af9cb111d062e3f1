"""The weights in anyone's files: PyTorch's, safetensors, NumPy's and ONNX. Nothing in them is ever executed."""

import hashlib
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scripting import HARMLESS, MissingPackage, UserError, in_short, leaves, load_file, one_line, refused_as
from universal.signatures.parts import dequantised, put_together

MAKER = "the program that wrote it"  # of these files


class NoWeights(UserError):
    """A file can be read, but holds no weights."""


class Contents(NamedTuple):
    """What a file holds: weights by name, floating-point tensors of at least 2 axes, and why others are left out."""

    weights: dict[str, Tensor]
    left_out: dict[str, str]


def files_below(path: Path) -> list[Path]:
    """The file at `path`, or all files of weights in the directory there.

    Raises UserError if there are none.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in READERS and file.is_file())
        if not files:
            raise UserError(f"{path}: no files of weights in this directory ({', '.join(READERS)}): give another one")
        return files
    if not path.exists():
        raise UserError(f"{path}: no such file or directory: give the path of a file of weights")
    if not path.is_file():  # reading a pipe would wait for ever
        raise UserError(f"{path}: not a regular file: give the path of a file of weights")
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path}: not a file of weights ({', '.join(READERS)}): give another one")
    return [path]


def read_weights(path: Path) -> Contents:
    """The weights in a file, in their order.

    Vectors and flags are passed over; what else is no weight is left out by name. Raises UserError if the file cannot
    be read, and NoWeights if it holds none.
    """
    stored: dict[str, Tensor | str] = {}
    left_out: dict[str, str] = {}
    try:
        for name, tensor in READERS[path.suffix.lower()](path, left_out):
            name = one_line("".join(letter for letter in name if letter.isprintable()))
            if any(part.startswith("optimi") for part in name.lower().split(".")) or name.endswith(MOMENTS):
                left_out["(optimiser)"] = "the state of an optimiser"
            else:
                stored[name] = tensor
    except UserError:
        raise
    except Exception as error:  # whatever broken or hostile bytes lead to
        raise UserError(f"{path}: is damaged ({in_short(error)}): make it again with {MAKER}") from error
    weights: dict[str, Tensor] = {}
    names: dict[bytes, str] = {}  # by what the weights are
    for name, tensor in put_together(stored).items():
        weight = weight_of(tensor)
        if isinstance(weight, Tensor):
            same = names.setdefault(hashlib.sha256(weight.contiguous().numpy()).digest(), name)
            weight = f"the same as {same}" if same != name else weight
        if isinstance(weight, Tensor):
            weights[name] = weight
        elif weight:
            left_out[name] = weight
    if not weights:
        why = f" ({'; '.join(f'{name}: {reason}' for name, reason in list(left_out.items())[:3])})" if left_out else ""
        raise NoWeights(f"{path}: holds no weights{why}: give a file with floating-point tensors of 2 axes or more")
    return Contents(weights, left_out)


def weight_of(tensor: Tensor | str) -> Tensor | str:
    """A tensor in single precision, or why it is no weight; empty where that goes without saying."""
    if isinstance(tensor, str):
        return tensor
    if tensor.dim() < 2 or not tensor.numel() or tensor.dtype == torch.bool:
        return ""
    try:
        if tensor.is_complex():
            return "complex numbers"
        values = tensor.float()
        low, high = values.aminmax()
        if not (low.isfinite() and high.isfinite()):  # NaN is the least and the largest of all
            return "holds NaN or infinite weights"
        if low == high:
            return "constant"
        if low == 0 and high == 1 and ((values == 0) | (values == 1)).all():
            return "zeros and ones, as a mask has them"
        return values if tensor.is_floating_point() else "integers, packed or without scales"
    except (RuntimeError, MemoryError) as error:  # of types that torch cannot convert, or too large
        return in_short(error)


# Tensors by name, or why they cannot be used. A reader may also leave out something by itself.
Found = Iterator[tuple[str, Tensor | str]]
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # as optimisers of PyTorch name them
MOST_UNFOLDED = 2**28  # entries of a sparse tensor with all its zeros


# ---- PyTorch --------------------------------------------------------------------------------------------------------


def read_torch(path: Path, left_out: dict[str, str]) -> Found:
    """What `torch.save` wrote: tensors and arrays in dictionaries and lists, however nested."""
    try:
        content = load_file(path, maker=MAKER)
    except UserError:
        content = load_around_objects(path, left_out)
        if content is None:
            raise
    for name, value in leaves(content):
        if isinstance(value, Tensor):
            yield name, plain(value)
        elif isinstance(value, np.ndarray):
            yield name, from_numpy(value)


# What arrays of any kind are made of.
NUMPY_TYPES = [kind for kind in vars(np.dtypes).values() if isinstance(kind, type)]


def load_around_objects(path: Path, left_out: dict[str, str]):
    """The content of a file that holds Python objects beside its tensors, with lifeless ones in their place.

    No class or function that the file names is ever imported or called. None if the file cannot be read so either.
    """
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            torch.serialization.safe_globals([*HARMLESS, *NUMPY_TYPES]),
        ):
            objects = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
            with torch.serialization.safe_globals([(type("Lifeless", (Lifeless,), {}), name) for name in objects]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever broken bytes lead to
        return None
    if objects:
        left_out["(objects)"] = f"Python objects, which are never executed: {', '.join(objects[:3])}"
    return content


class Lifeless:
    """Takes the place of a class or function in a pickle: what it is asked to make is a dictionary."""

    def __new__(cls, *_, **__):
        return OrderedDict()  # to which the state of an object may be added, unlike to other dictionaries


def plain(tensor: Tensor) -> Tensor | str:
    """A tensor of the usual layout, without gradient; or why there is none."""
    if tensor.is_meta:
        return "has no values"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.is_quantized:
        return tensor.dequantize()
    if tensor.layout != torch.strided:
        return tensor.to_dense().detach() if tensor.numel() <= MOST_UNFOLDED else "sparse, and too large without that"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "the same numbers again and again (expanded)"
    return tensor.detach()


def from_numpy(array: np.ndarray) -> Tensor | str:
    """An array as a tensor, or why there is none."""
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), ndmin=1))
    except (ValueError, TypeError) as error:  # objects, or numbers that torch does not have
        return str(error).split(":")[0]


# ---- other formats --------------------------------------------------------------------------------------------------


def read_safetensors(path: Path, _) -> Found:
    yield from load_file(path, maker=MAKER).items()


def read_numpy(path: Path, _) -> Found:
    """Arrays that `numpy.save` and `numpy.savez` wrote; pickled ones are left out."""
    with refused_as(f"{path}: is damaged or not what its name says: make it again with {MAKER}"):
        content = np.load(path, allow_pickle=False)  # whose errors recommend to unpickle it
    if isinstance(content, np.ndarray):
        yield path.stem, from_numpy(content)
        return
    with content as arrays:
        for name in arrays.files:
            try:
                yield name, from_numpy(arrays[name])
            except (ValueError, MemoryError) as error:  # pickled objects, or more than there is room for
                yield name, str(error).split(":")[0]


def read_onnx(path: Path, _) -> Found:
    """Initialisers and Constant nodes, of subgraphs too; what is quantised is multiplied out where scales are known."""
    try:
        import onnx  # an optional package
    except ImportError as error:
        raise MissingPackage(f"{path}: needs the package onnx to be read: pip install onnx") from error
    with refused_as(f"{path}: is damaged or not what its name says: make it again with {MAKER}"):
        model = onnx.load(path, load_external_data=False)
    with refused_as(f"{path}: its weights are in another file, missing or not readable: put it beside this one"):
        onnx.load_external_data_for_model(model, str(path.parent))
    stored: dict[str, Tensor | str] = {}
    scales: dict[str, tuple[str, str, int | None, int]] = {}  # names of scale and zero point; axis, if given; block
    recurrent: set[str] = set()  # weights [directions, gates and units, inputs]
    for graph in graphs_of(model.graph):
        items = [(item.name, item) for item in graph.initializer]
        for node in graph.node:
            attributes = {attribute.name: attribute for attribute in node.attribute}
            inputs = [*node.input, *[""] * 9]
            if node.op_type == "Constant" and "value" in attributes:
                items.append((node.output[0], attributes["value"].t))
            elif node.op_type == "DequantizeLinear":
                axis, block = (attributes[name].i if name in attributes else None for name in ("axis", "block_size"))
                scales[inputs[0]] = (inputs[1], inputs[2], axis, block or 0)
            elif node.op_type in ("QLinearConv", "QLinearMatMul"):
                scales[inputs[3]] = (inputs[4], inputs[5], None, 0)
            elif node.op_type in ("RNN", "GRU", "LSTM"):
                recurrent.update(inputs[1:3])
        for name, item in items:
            name = name if name not in stored else f"{name} (in another branch)"
            try:
                stored[name] = from_numpy(of_usual_type(onnx.numpy_helper.to_array(item)))
            except Exception as error:  # of unknown types, or of fewer bytes than its shape says
                stored[name] = in_short(error)
    parts = {part for scale, zero, *_ in scales.values() for part in (scale, zero)}
    for name, tensor in stored.items():
        scale, zero, axis, block = scales.get(name, ("", "", None, 0))
        if isinstance(tensor, str):
            yield name, tensor
        elif isinstance(stored.get(scale), Tensor) and tensor.dim() >= 2:
            try:
                yield name, dequantised(tensor, stored[scale], stored.get(zero), axis, block)
            except ValueError as error:
                yield name, str(error)
        elif name in recurrent and len(tensor) > 1:
            yield from ((f"{name}[{direction}]", part) for direction, part in enumerate(tensor))
        elif name not in parts:
            yield name, tensor


def of_usual_type(array: np.ndarray) -> np.ndarray:
    """An array of a type that NumPy has itself: integers of a few bits as bytes, other floats in single precision."""
    if array.dtype.kind != "V":
        return array
    return array.astype(re.sub(r"int\d", "int8", array.dtype.name) if "int" in array.dtype.name else np.float32)


def graphs_of(graph) -> Iterator:
    """A graph of ONNX and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from graphs_of(inner)


TORCH = [".pth", ".pt", ".ckpt", ".tar", ".bin", ".pkl"]
# One more format is one more entry here.
READERS: dict[str, Callable[[Path, dict[str, str]], Found]] = {
    **dict.fromkeys(TORCH, read_torch),
    ".safetensors": read_safetensors,
    ".npy": read_numpy,
    ".npz": read_numpy,
    ".onnx": read_onnx,
}
OUTPUTS_FIRST = [*TORCH, ".safetensors"]  # their weights are [outputs, inputs]
