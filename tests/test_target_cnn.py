"""The target system: the network, its weights as a vector and as files, MNIST, the score."""

import argparse
import errno
import functools
import gzip
import io
import pickle
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from torch import nn
from torch.optim.swa_utils import AveragedModel

import target_cnn
from scripting import UserError, save_file
from target_cnn import (
    Dataset,
    TargetCNN,
    checkpoint_path,
    fast_bf16,
    find_runs,
    flatten_weights,
    load_checkpoint,
    load_mnist,
    load_run,
    load_weights,
    score,
    score_weights,
    scoring_data,
    train_with_adam,
    training_data,
)

RAW = REPOSITORY / "data" / "MNIST" / "raw"


@pytest.fixture(scope="module")
def few_images() -> Dataset:
    return load_mnist("test", REPOSITORY / "data")[:600]


def test_the_network_is_the_documents():
    model = TargetCNN()
    assert sum(parameter.numel() for parameter in model.parameters()) == 421_642
    assert {name.split(".")[0] for name in model.state_dict()} == {"conv1", "conv2", "fc1", "fc2"}
    layers = nn.Sequential(
        *(model.conv1, nn.ReLU(), nn.MaxPool2d(2), model.conv2, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(model.fc1, nn.ReLU(), model.fc2),
    )
    images = torch.randn(3, 1, 28, 28)
    assert torch.equal(model(images), layers(images))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_weights_survive_the_way_to_a_vector_and_back(memory_format):
    model = TargetCNN().to(memory_format=memory_format)
    copy = load_weights(TargetCNN().to(memory_format=memory_format), flatten_weights(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(copy.state_dict()[name], tensor)
    contiguous = model.to(memory_format=torch.contiguous_format)
    assert torch.equal(flatten_weights(copy), nn.utils.parameters_to_vector(contiguous.parameters()))


def test_a_vector_of_another_length_is_refused():
    with pytest.raises(ValueError, match="421642"):
        load_weights(TargetCNN(), torch.zeros(421_641))


def test_loading_a_vector_does_not_alias_it():
    vector = torch.zeros(421_642)
    model = load_weights(TargetCNN(), vector)
    with torch.no_grad():
        model.fc2.bias.add_(1)
    assert not vector.any()


def test_mnist_is_whole_and_normalised():
    for split, images in {"train": 60_000, "test": 10_000}.items():
        data = load_mnist(split, REPOSITORY / "data")
        assert data.images.shape == (images, 1, 28, 28)
        assert data.labels.shape == (images,) and data.labels.unique().tolist() == list(range(10))
        assert data.images.mean().abs() < 0.02 and (data.images.std() - 1).abs() < 0.02


def test_validation_images_are_held_out_of_training():
    train = training_data(REPOSITORY / "data", 1000)
    validation = scoring_data(REPOSITORY / "data", 1000)
    assert len(train.labels) == 59_000
    assert len(scoring_data(REPOSITORY / "data", 0).labels) == 10_000
    whole = load_mnist("train", REPOSITORY / "data")
    assert torch.equal(torch.cat([train.images, validation.images]), whole.images)


@pytest.fixture
def archives(tmp_path, monkeypatch) -> Path:
    """A copy of the test images' archives, and nowhere to download from."""
    monkeypatch.setattr(target_cnn, "MNIST_MIRROR", "file:///nowhere/")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in RAW.glob("t10k-*.gz"):
        shutil.copy(archive, raw)
    return raw


@pytest.mark.parametrize("damage", ["truncated", "cut short", "scrambled", "empty", "of another data set", "missing"])
def test_a_broken_archive_is_named(tmp_path, archives, damage):
    archive = archives / "t10k-images-idx3-ubyte.gz"
    content = archive.read_bytes()
    archive.unlink()
    if damage != "missing":
        scrambled = content[:1000] + bytes(100) + content[1100:]
        other = (archives / "t10k-labels-idx1-ubyte.gz").read_bytes()
        contents = {
            "truncated": content[:1000],
            "cut short": bytes([0, 0, 8]),
            "scrambled": scrambled,
            "empty": b"",
            "of another data set": other,
        }
        archive.write_bytes(contents[damage])
    line = (
        r"t10k-images-idx3-ubyte\.gz: is (damaged|missing) and could not be downloaded: give .* with --data, or restore"
    )
    with pytest.raises(UserError, match=line) as caught:
        load_mnist("test", tmp_path)
    assert ("missing" in str(caught.value)) == (damage == "missing")


def test_mnist_is_read_where_nothing_can_be_written(tmp_path, archives):
    before = set(tmp_path.rglob("*"))
    published = load_mnist("test", tmp_path)
    assert set(tmp_path.rglob("*")) == before  # nothing was unpacked
    for archive in archives.glob("*.gz"):  # as somebody else may have unpacked it
        archive.with_suffix("").write_bytes(gzip.decompress(archive.read_bytes()))
        archive.unlink()
    load_mnist.cache_clear()
    unpacked = load_mnist("test", tmp_path)
    assert torch.equal(unpacked.images, published.images) and torch.equal(unpacked.labels, published.labels)


def test_what_is_missing_is_downloaded_and_nothing_else_touched(tmp_path, archives, monkeypatch):
    monkeypatch.setattr(target_cnn, "MNIST_MIRROR", f"{RAW.as_uri()}/")
    (archives / "t10k-images-idx3-ubyte.gz").write_bytes(b"damaged")
    labels = archives / "t10k-labels-idx1-ubyte.gz"
    written = labels.stat().st_mtime_ns
    assert torch.equal(load_mnist("test", tmp_path).images, load_mnist("test", RAW.parents[1]).images)
    assert labels.stat().st_mtime_ns == written
    (elsewhere := tmp_path / "new").mkdir()
    load_mnist("test", elsewhere)
    assert {path.name for path in elsewhere.rglob("*.gz")} == {path.name for path in archives.iterdir()}


def test_a_wrong_directory_of_data_is_not_made(tmp_path, archives, monkeypatch):
    monkeypatch.setattr(target_cnn, "MNIST_MIRROR", f"{RAW.as_uri()}/")
    with pytest.raises(UserError, match="is missing and could not be downloaded"):
        load_mnist("train", tmp_path / "no" / "such")
    assert not (tmp_path / "no").exists()


def test_the_score_is_in_the_documents_unit(few_images):
    model = TargetCNN()
    result = score(model, few_images, batch_size=77)
    with torch.no_grad():
        logits = model(few_images.images)
    losses = F.cross_entropy(logits, few_images.labels, reduction="none")
    summed = sum(len(batch) * batch.sum() for batch in losses.split(256)) / 600
    assert result.average_loss == pytest.approx(summed.item(), rel=1e-4)
    assert result.cross_entropy == pytest.approx(losses.mean().item(), rel=1e-5)
    assert result.accuracy_percent == pytest.approx(100 * (logits.argmax(1) == few_images.labels).float().mean().item())
    assert torch.equal(result.wrong, logits.argmax(1) != few_images.labels)


def test_equal_states_are_scored_once(few_images, monkeypatch):
    calls = []
    monkeypatch.setattr(target_cnn, "score", lambda model, data: calls.append(1) or score(model, data))
    first, second = flatten_weights(TargetCNN()), flatten_weights(TargetCNN())
    scores = score_weights([first, second, first.clone()], few_images)
    assert len(calls) == 2
    assert scores[0] is scores[2]
    alone = score(load_weights(TargetCNN(), second), few_images)
    assert scores[1].cross_entropy == pytest.approx(alone.cross_entropy, rel=1e-5)
    assert torch.equal(scores[1].wrong, alone.wrong)


def test_bf16_is_for_processors_that_say_they_have_it(monkeypatch):
    cpu = torch.device("cpu")
    for capabilities, fast in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_f": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert fast_bf16(cpu) == fast
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in the oldest PyTorch that is supported
    assert not fast_bf16(cpu)


def linear_with_dropout() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 10))


def test_a_training_pauses_where_it_is_asked_to_and_goes_on_as_if_it_had_not(few_images):
    whole, paused = linear_with_dropout(), linear_with_dropout()
    torch.manual_seed(1)
    assert [progress.step for progress in train_with_adam(whole, few_images, 2, batch_size=128)] == [5, 10]
    torch.manual_seed(1)
    points = []
    for progress in train_with_adam(paused, few_images, 2, batch_size=128, pauses=(2, 7)):
        points.append((progress.epoch, progress.step))
        score(paused, few_images)  # which turns dropout off
    assert points == [(1, 2), (1, 5), (2, 7), (2, 10)]
    assert torch.equal(flatten_weights(whole), flatten_weights(paused))
    assert not torch.equal(flatten_weights(whole), flatten_weights(linear_with_dropout()))


def test_a_single_image_that_is_left_over_is_no_batch_of_a_norm(few_images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.BatchNorm1d(10))
    assert [progress.step for progress in train_with_adam(model, few_images[:257], 1, batch_size=128)] == [2]
    assert [progress.step for progress in train_with_adam(linear_with_dropout(), few_images[:1], 1)] == [1]


def test_the_loss_and_the_seconds_of_a_training_are_of_the_epoch_so_far(few_images, monkeypatch):
    seconds = 0.0
    monkeypatch.setattr(target_cnn.time, "perf_counter", lambda: seconds)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

    def pass_a_second(*_):
        nonlocal seconds
        seconds += 1

    model.register_forward_hook(pass_a_second)
    expected = score(model, few_images).cross_entropy
    found = []
    options = {"lr": 1e-9, "batch_size": 128, "use_bf16": False}
    for progress in train_with_adam(model, few_images, 2, pauses=(2,), moments=(0.5, 0.9, 6.5), **options):
        found.append((progress.seconds, progress.all_seconds))
        seconds += 100  # what the caller does does not count
        if progress.step == 5:
            assert progress.loss == pytest.approx(expected, rel=1e-4)
    assert found == [(1, 1), (2, 2), (5, 5), (2, 7), (5, 10)]  # a moment passes within a step, which is finished


def write_run(directory, epochs):
    directory.mkdir(exist_ok=True)
    for epoch in epochs:
        torch.save(TargetCNN().state_dict(), checkpoint_path(directory, epoch))


def test_runs_are_read_in_the_order_of_epochs(tmp_path):
    write_run(tmp_path, range(12))
    assert find_runs(tmp_path) == [tmp_path]
    run = load_run(tmp_path)
    assert run.shape == (12, 421_642)
    assert torch.equal(run[10], load_checkpoint(checkpoint_path(tmp_path, 10)))


def test_several_runs_are_found(tmp_path):
    for name in ("run_0002", "run_0001"):
        write_run(tmp_path / name, range(2))
    assert [path.name for path in find_runs(tmp_path)] == ["run_0001", "run_0002"]
    write_run(tmp_path, [0])
    with pytest.raises(UserError, match="both"):
        find_runs(tmp_path)


def test_a_gap_in_the_epochs_is_named(tmp_path):
    write_run(tmp_path, [0, 1, 3])
    with pytest.raises(UserError, match=r"weights_epoch_2\.pth"):
        load_run(tmp_path)


def test_safetensors_are_read_as_checkpoints_of_the_same_names(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    models = [TargetCNN() for _ in range(3)]
    torch.save(models[0].state_dict(), checkpoint_path(tmp_path, 0))
    for epoch, wrapper in ((1, models[1]), (2, nn.DataParallel(models[2]))):
        safetensors.save_file(wrapper.state_dict(), tmp_path / f"weights_epoch_{epoch}.safetensors")
    assert find_runs(tmp_path) == [tmp_path]
    run = load_run(tmp_path)
    assert all(torch.equal(weights, flatten_weights(model)) for weights, model in zip(run, models, strict=True))
    path = tmp_path / "weights_epoch_1.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"weights_epoch_1\.safetensors: is damaged, .*with train_target_model\.py"):
        load_run(tmp_path)


def test_without_the_safetensors_package_its_name_is_given(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    path = tmp_path / "weights_epoch_0.safetensors"
    path.touch()
    with pytest.raises(UserError, match=r"weights_epoch_0\.safetensors: .*: pip install safetensors"):
        load_run(tmp_path)


@pytest.mark.parametrize("name", ["weights_epoch_1.safetensors", "weights_epoch_01.pth"])
def test_an_epoch_recorded_twice_is_refused(tmp_path, name):
    write_run(tmp_path, range(3))
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"weights_epoch_0?1\.\w+: .*epoch is in weights_epoch_0?1\.\w+ too") as caught:
        load_run(tmp_path)
    assert name in str(caught.value)
    assert "weights_epoch_1.pth" in str(caught.value)


class Malicious:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path):
    path = checkpoint_path(tmp_path, 0)
    torch.save({"conv1.weight": Malicious(tmp_path / "executed")}, path)
    with pytest.raises(UserError, match=r"Python objects \(_?io\.open\), which are unsafe and never executed"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def save_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("save", "name"),
    [
        (torch.save, r" \(target_cnn\.TargetCNN\)"),
        (functools.partial(torch.save, _use_new_zipfile_serialization=False), r" \(target_cnn\.TargetCNN\)"),
        (lambda model, path: torch.save({"model": model}, path, pickle_protocol=5), ""),
        (lambda model, path: torch.save([model.state_dict(), Path()], path), r" \(pathlib\.PosixPath\)"),
        (save_pickle, ""),
        (lambda model, path: torch.jit.trace(model, torch.zeros(1, 1, 28, 28)).save(path), ""),
    ],
    ids=["whole", "old format", "new protocol", "beside a path", "by pickle", "TorchScript"],
)
def test_a_whole_module_is_named_for_what_it_is(tmp_path, save, name):
    path = checkpoint_path(tmp_path, 0)
    save(TargetCNN(), path)
    line = rf"_0\.pth: holds a whole pickled module or other Python objects{name}, .*: save .*model\.state_dict\(\)"
    with warnings.catch_warnings(action="error"), pytest.raises(UserError, match=line):  # a warning is another line
        load_checkpoint(path)


def test_broken_and_foreign_checkpoints_are_refused(tmp_path):
    path = checkpoint_path(tmp_path, 0)
    torch.save(TargetCNN().state_dict(), path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"is damaged, .*: make it again with train_target_model\.py"):
        load_checkpoint(path)
    for text in ("not a checkpoint", "column,other\n1,2\n", ""):
        path.write_text(text)
        with pytest.raises(UserError, match="damaged"):
            load_checkpoint(path)
    wrong_shape = TargetCNN().state_dict() | {"fc2.bias": torch.zeros(11)}
    for foreign in (nn.Linear(2, 2).state_dict(), wrong_shape, [1, 2], torch.zeros(3)):
        torch.save(foreign, path)
        with pytest.raises(UserError, match="not a state_dict of TargetCNN"):
            load_checkpoint(path)


def test_prefixes_that_wrappers_add_are_taken_off(tmp_path):
    path = checkpoint_path(tmp_path, 0)
    model = TargetCNN()
    wrapped = [nn.DataParallel(model), torch.compile(model), nn.DataParallel(torch.compile(model))]
    wrapped += [AveragedModel(model), nn.DataParallel(AveragedModel(torch.compile(model)))]  # which count updates too
    states = [wrapper.state_dict() for wrapper in wrapped]
    assert "module._orig_mod.conv1.weight" in states[2] and "n_averaged" in states[3]
    for prefix in ("_module.", "_orig_mod.module.", "model."):
        states.append({prefix + name: tensor for name, tensor in model.state_dict().items()})
    states.append(states[-1] | {"criterion.weight": torch.ones(10)})  # of a module that holds the loss as well
    for state in states:
        torch.save(state, path)
        assert torch.equal(load_checkpoint(path), flatten_weights(model))


def test_a_prefix_of_some_keys_or_of_no_wrapper_stays(tmp_path):
    path = checkpoint_path(tmp_path, 0)
    state = TargetCNN().state_dict()
    some = {name if "bias" in name else f"module.{name}": tensor for name, tensor in state.items()}
    more = {f"module.{name}": tensor for name, tensor in state.items()} | {"module.fc3.bias": torch.zeros(10)}
    fewer = {f"module.{name}": tensor for name, tensor in state.items() if name != "fc2.bias"}
    without_dot = {f"my{name}": tensor for name, tensor in state.items()}
    for foreign in (some, more, fewer, without_dot):
        torch.save(foreign, path)
        with pytest.raises(UserError, match="not a state_dict of TargetCNN"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    "place", [["state_dict"], ["model_state_dict"], ["model"], ["net", 0], ["a", "b", "c"]], ids=str
)
def test_the_one_state_dict_among_other_things_is_taken(tmp_path, place):
    path = checkpoint_path(tmp_path, 0)
    model = TargetCNN()
    adam = torch.optim.Adam(model.parameters())
    model(torch.zeros(1, 1, 28, 28)).sum().backward()
    adam.step()
    other = nn.Linear(2, 2).state_dict()
    for state in (model.state_dict(), torch.compile(model).state_dict()):
        content = state
        for key in reversed(place):
            content = {"epoch": 3, "optimizer": adam.state_dict(), "critic": other, "loss": [0.1], key: content}
        torch.save(content, path)
        assert torch.equal(load_checkpoint(path), flatten_weights(model))


def test_what_is_no_tensor_may_lie_beside_the_state_dict(tmp_path):
    path = checkpoint_path(tmp_path, 0)
    model = TargetCNN()
    beside = {
        "accuracy": np.float64(98.5), "epoch": np.int64(3), "finished": np.bool_(True), "data": np.str_("MNIST"),
        "curve": np.linspace(0, 1, 5), "confusion": np.eye(10, dtype=np.int32), "classes": np.array(["zero", "one"]),
        "random": [np.random.get_state(), torch.get_rng_state()], "args": argparse.Namespace(lr=np.float32(0.1)),
    }  # fmt: skip
    for content in (beside | {"model": model.state_dict()}, model.state_dict() | {"epoch": 3, "loss": np.float32(0.1)}):
        torch.save(content, path)
        assert torch.equal(load_checkpoint(path), flatten_weights(model))
    torch.save(content, path, _use_new_zipfile_serialization=False)
    old, new = b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"  # before version 2 of NumPy, and since
    for name, other in ((old, new), (new, old)):
        path.write_bytes(path.read_bytes().replace(name, other))
        assert other in path.read_bytes()
        assert torch.equal(load_checkpoint(path), flatten_weights(model))
    torch.save(beside | {"objects": np.array([Path()])}, path)
    with pytest.raises(UserError, match=r"Python objects \(numpy\.dtypes\.ObjectDType\), which are unsafe"):
        load_checkpoint(path)


def test_two_state_dicts_in_one_file_are_both_named(tmp_path):
    path = checkpoint_path(tmp_path, 0)
    state = TargetCNN().state_dict()
    averages = {f"{wrapper}.{name}": tensor for name, tensor in state.items() for wrapper in ("online", "averaged")}
    for content, names in (
        ({"model": state, "averaged": {"ema": nn.DataParallel(TargetCNN()).state_dict()}}, r"model and averaged\.ema"),
        (averages | {"step": torch.tensor(3)}, "online and averaged"),
        ([TargetCNN().state_dict(), state], "0 and 1"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=rf"_0\.pth: holds more than one state_dict of TargetCNN, {names}"):
            load_checkpoint(path)


@pytest.mark.parametrize("spoil", [torch.Tensor.bool, torch.Tensor.to_sparse, lambda tensor: tensor.to("meta")])
def test_what_cannot_be_weights_is_refused(tmp_path, spoil):
    path = checkpoint_path(tmp_path, 0)
    model = TargetCNN()
    spoilt = {name: spoil(tensor) for name, tensor in model.state_dict().items()}
    torch.save(spoilt, path)
    with pytest.raises(UserError, match="not a state_dict of TargetCNN"):
        load_checkpoint(path)
    torch.save({"mask": spoilt, "model": model.half().state_dict()}, path)
    assert torch.equal(load_checkpoint(path), flatten_weights(model).float())


def test_a_dictionary_within_itself_is_refused(tmp_path):
    path = checkpoint_path(tmp_path, 0)
    content = {"epoch": 3}
    content["self"] = content
    torch.save(content, path)
    with pytest.raises(UserError, match="not a state_dict of TargetCNN"):
        load_checkpoint(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    state = TargetCNN().state_dict()
    state["fc1.weight"][3, 5] = value
    torch.save(state, checkpoint_path(tmp_path, 0))
    with pytest.raises(UserError, match="NaN or infinite"):
        load_checkpoint(checkpoint_path(tmp_path, 0))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "kept.txt"
    save_file(path, lambda temporary: temporary.write_text("first"))

    def fail_half_way(temporary):
        temporary.write_text("sec")
        raise OSError(5, "Input/output error")

    with pytest.raises(UserError, match=r"kept\.txt: cannot be written \(Input/output error\): free some space or"):
        save_file(path, fail_half_way)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


class FullDisk(io.BytesIO):
    """A disk with room for 10,000 bytes."""

    def write(self, data) -> int:
        if self.tell() + len(data) > 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_full_disk_is_called_full(tmp_path):
    for write in (
        lambda _: torch.save(torch.zeros(100_000), FullDisk()),  # which ends in a RuntimeError of torch's own
        lambda _: FullDisk().write(bytes(100_000)),
    ):
        with pytest.raises(UserError, match=r"w\.pth: cannot be written \(the disk is full\): free some space"):
            save_file(tmp_path / "w.pth", write)


def test_files_have_the_usual_mode_and_the_directories_they_need(tmp_path):
    usual = tmp_path / "usual"
    usual.touch()
    path = tmp_path / "new" / "w.txt"
    save_file(path, lambda temporary: temporary.write_text("written"))
    assert path.stat().st_mode == usual.stat().st_mode
    with pytest.raises(UserError, match=r"usual/w\.txt: cannot be written \((File exists|Not a directory)\)"):
        save_file(usual / "w.txt", lambda temporary: temporary.write_text("written"))
