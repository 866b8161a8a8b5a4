"""Experts in few bits: golden codes, the file, and models that read it."""

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from core_gates.errors import GatesError
from language.offload import quantization
from language.offload.loading import load_offloaded
from language.offload.quantization import dequantize, quantize
from language.offload.setup import Setup

E, K, LAYERS = 6, 2, 3
GOLDEN = Path(__file__).parents[2] / "golden" / "moe_inference_sora"
IDS = torch.randint(64, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("name", ["fate_small", "fate_wide"])
def test_golden_codes(name, bits):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        golden = {
            key[3:]: torch.from_numpy(arrays[key]) for key in arrays if key[:3] == f"q{bits}_"
        }
    packed = quantize(golden["in"], bits, group=16)
    assert_close((packed.codes, packed.scale), (golden["packed"], golden["scale"]), rtol=0, atol=0)
    assert torch.equal(packed.zero, golden["zero"])
    assert_close(dequantize(packed, bits), golden["deq"], rtol=0, atol=1e-15)
    codes = dequantize(packed._replace(zero=packed.zero * 0, scale=packed.scale * 0 + 1), bits)
    assert torch.equal(codes.to(torch.uint8), golden["codes"])


@pytest.mark.fault("46 O3")
@pytest.mark.parametrize("bits", [4, 2])
def test_groups_of_one_sign_survive(bits):
    biases = 0.3 + 0.05 * torch.randn(8, 640, generator=torch.Generator().manual_seed(0))
    span = torch.linspace(0.5, 0.6, 64)
    for x, most in (
        (biases, {4: 0.04, 2: 0.08}[bits]),
        (span, 0.5 / (2**bits - 1) / 5),
        (1e-20 * span, 0.04),
    ):
        for signed in (x, -x):
            found = dequantize(quantize(signed, bits), bits)
            assert (found - signed).norm() <= most * signed.norm()
    for constant in (0.0, 0.3, -0.3, 7.0, -1e-4):
        x = torch.full((64,), constant)
        assert torch.equal(dequantize(quantize(x, bits), bits), x)
    step = quantize(span, bits).scale
    assert (dequantize(quantize(span, bits), bits) - span).abs().max() <= 0.51 * step


@pytest.mark.fault("46 O3")
@pytest.mark.parametrize("transfer", ["int4", "int2"])
def test_biases_of_experts_stay_as_they_are(transfer, checkpoint, offloaded, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("GptOss"), folder)
    for path in folder.glob("*.safetensors"):
        content = load_file(path)
        for name in content:
            if "experts" in name and name.endswith("bias"):
                content[name] = 30.0 + torch.randn_like(content[name])  # far from the weights
        save_file(content, path, metadata={"format": "pt"})
    stored, packed = (
        offloaded(folder, budget=1.0, transfer=one, cache=tmp_path).offload
        for one in ("stored", transfer)
    )
    slabs = [torch.zeros(one.store.slab_bytes, dtype=torch.uint8) for one in (stored, packed)]
    for layer in range(LAYERS):
        for expert in (0, packed.store.num_experts - 1):
            for one, slab in zip((stored, packed), slabs, strict=True):
                one.store.read_into(layer, expert, slab.numpy().data)
            for name, tensor in packed.store.tensors[layer].items():
                own, found = map(tensor.of, slabs)
                assert torch.equal(own, found) == name.endswith("bias")
                assert (own - found).norm() <= {"int4": 0.2, "int2": 0.7}[transfer] * own.norm()


@pytest.fixture
def load(checkpoint, offloaded, tmp_path):
    """``load(transfer, slots, **options)``: a tiny model whose experts travel so."""

    def call(transfer, slots=4, **options):
        options = {"predictor": "cross-layer", "transfer": transfer, "cache": tmp_path} | options
        return offloaded(checkpoint(), budget=(slots * LAYERS + K) * 9216, **options)

    return call


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def quantized(model, bits):
    """Put experts that were in so many bits into a whole model."""
    for layer in model.model.layers:
        experts = layer.mlp.experts
        slabs = torch.cat([experts.gate_up_proj.flatten(1), experts.down_proj.flatten(1)], 1)
        rounded = dequantize(quantize(slabs, bits), bits)
        first, second = rounded.split(
            [experts.gate_up_proj[0].numel(), experts.down_proj[0].numel()], 1
        )
        experts.gate_up_proj.data = first.reshape_as(experts.gate_up_proj).clone()
        experts.down_proj.data = second.reshape_as(experts.down_proj).clone()
    return model


@pytest.mark.parametrize(("transfer", "bits"), [("int4", 4), ("int2", 2)])
def test_a_model_equals_one_with_rounded_experts_in_memory(
    transfer, bits, load, resident, checkpoint, monkeypatch
):
    monkeypatch.setattr(quantization, "PART", 8)  # of 36 groups
    model = load(transfer)
    whole = quantized(resident(checkpoint()), bits)
    for _ in range(2):
        assert torch.equal(logits_of(model), logits_of(whole))
    counts, record = model.offload.counts, 36 * (6 + 8 * bits)
    assert counts.bytes == (counts.loads + counts.guesses) * record
    assert 9216 / record > {4: 6.5, 2: 10}[bits]


def test_hybrid_results_do_not_depend_on_what_was_there(load):
    fresh, warm = load("hybrid"), load("hybrid", slots=6)
    expected = [logits_of(fresh), logits_of(fresh, IDS[:, :1])]
    four, two = logits_of(load("int4")), logits_of(load("int2"))
    assert not torch.equal(expected[0], four)
    assert not torch.equal(expected[0], two)
    assert torch.equal(expected[1], logits_of(load("int4"), IDS[:, :1]))  # one token: all in 4 bits
    for _ in range(3):
        assert torch.equal(logits_of(warm, IDS[:, :1]), expected[1])
        assert torch.equal(logits_of(warm), expected[0])
    keys = {key for layer in warm.offload.layers for key in layer.loads}
    assert any(key >= E for key in keys)
    assert torch.equal(logits_of(load("hybrid", predictor="none")), four)  # nothing is guessed


@pytest.mark.fault("46 O1")
def test_where_tokens_are_not_distinguished_no_expert_is_the_least_popular(load):
    """All experts of a prompt are fetched by their numbers, which say nothing of their use."""
    hybrid = logits_of(load("hybrid", predictor="all", slots=E))
    assert torch.equal(hybrid, logits_of(load("int4")))


def test_the_file_is_written_once(load, tmp_path):
    load("int4")
    (path,) = tmp_path.glob("experts-*.int4")
    written = path.stat().st_mtime_ns
    assert path.stat().st_size == LAYERS * E * 36 * 38
    load("int4")
    assert path.stat().st_mtime_ns == written
    assert not list(tmp_path.glob(".*partial*"))


def test_a_file_that_is_not_as_written_is_refused_when_it_is_opened(load, tmp_path, refuses):
    load("int4")
    (path,) = tmp_path.glob("experts-*.int4")
    content = path.read_bytes()
    flipped = content[:200] + bytes([content[200] ^ 255]) + content[201:]
    for damaged in (content[:-100], flipped):
        path.write_bytes(damaged)
        refuses(GatesError, (f"^{path} is not as it was .* delete it", lambda: load("int4")))
    path.unlink()
    load("int4")
    assert path.read_bytes() == content


def test_checkpoints_whose_files_look_alike_have_their_own(checkpoint, tmp_path):
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        shutil.copytree(checkpoint(), folder)
    for path in folders[1].glob("*.safetensors"):
        content = load_file(path)
        save_file({name: -one for name, one in content.items()}, path, metadata={"format": "pt"})
    for path in sorted(tmp_path.rglob("*.safetensors")):
        os.utime(path, (0, 0))
    setup = Setup(transfer="int4")
    for folder in folders:
        load_offloaded(folder, budget=1.0, setup=setup, cache=tmp_path).offload.close()
    assert len(list(tmp_path.glob("experts-*.int4"))) == 2


def test_bad_inputs_are_one_line(load, checkpoint, refuses, tmp_path):
    (tmp_path / "file").write_text("no folder")
    packed = partial(load_offloaded, checkpoint(), budget=1.0, setup=Setup(transfer="int4"))
    refuses(
        GatesError,
        (r"\.int4 cannot be written: Not a directory", lambda: packed(cache=tmp_path / "file")),
        ("stay in .*: copy this folder", lambda: load("int4").save_pretrained(tmp_path / "new")),
        ("transfer is 'int8'; choose one of stored, int4", lambda: load("int8")),
    )
    assert not (tmp_path / "new").exists()
