"""Safetensors files: read by position, and hostile ones refused."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion.lora_file import (
    ContainerError,
    FamilyError,
    Limits,
    LoraFileError,
    MappingError,
    SafetensorsFile,
    load_lora,
)
from diffusion.lora_file.container import DTYPES, clean, serialize


@pytest.fixture
def tensors():
    values = torch.arange(6).reshape(2, 3)
    return {name: values.to(dtype) for name, dtype in DTYPES.items()} | {
        "scalar": torch.tensor(2.0),
        "empty": torch.ones(0, 3),
    }


def same(found, expected):
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(*[t.reshape(-1).view(torch.uint8) for t in (found, expected)])


def test_every_dtype_is_read_and_written(tensors, tmp_path):
    theirs, ours = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors, theirs, {"a": "b"})
    ours.write_bytes(serialize(tensors, {"a": "b"}))
    for path in (theirs, ours):
        file = SafetensorsFile(path)
        assert (set(file.tensors), file.metadata) == (set(tensors), {"a": "b"})
        for name, tensor in tensors.items():
            assert file.tensors[name].dtype == tensor.dtype
            assert file.tensors[name].shape == tuple(tensor.shape)
            same(file.tensor(name), tensor)
    for name, tensor in load_file(ours).items():
        same(tensor, tensors[name])


def test_bytes_do_not_depend_on_order(tensors):
    turned = dict(reversed(tensors.items()))
    assert serialize(tensors, {"a": "1", "b": "2"}) == serialize(turned, {"b": "2", "a": "1"})
    assert serialize(tensors, {}) != serialize(tensors, {"a": "1"})


def test_tensors_lie_at_multiples_of_their_item_size(tensors, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(serialize(tensors, {"odd": "x"}))
    file = SafetensorsFile(path)
    (length,) = torch.frombuffer(bytearray(path.read_bytes()[:8]), dtype=torch.int64).tolist()
    assert length % 8 == 0
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in file.tensors.values())


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_file({"big": torch.ones(2**16), "small": torch.ones(3)}, path)
    counts = []
    read = os.preadv

    def counted(descriptor, buffers, offset):
        counts.append(sum(len(buffer) for buffer in buffers))
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    file = SafetensorsFile(path)
    assert sum(counts) < 500
    counts.clear()
    assert torch.equal(file.tensor("small"), torch.ones(3))
    assert counts == [12]


def test_files_are_closed(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1)}, path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(50):
        SafetensorsFile(path)
        with pytest.raises(ContainerError):
            SafetensorsFile(path, Limits(tensors=0))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(file_bytes=100), "more than the limit of 100"),
        (Limits(header_bytes=20), "announces a header"),
        (Limits(tensors=1), "2 tensors"),
        (Limits(rank=1), "its rank is 2, expected 1 to 1"),
        (Limits(metadata_bytes=3), "bytes of metadata"),
        (Limits(value_bytes=1), "bytes of metadata"),
        (Limits(name_chars=10), "no usable name"),
    ],
)
def test_limits_are_arguments(limits, words, tmp_path, one_line):
    stem = "transformer_blocks.0.attn.to_q"
    pair = {f"{stem}.lora_A.weight": torch.ones(2, 4), f"{stem}.lora_B.weight": torch.ones(4, 2)}
    path = tmp_path / "a.safetensors"
    save_file(pair, path, {"ab": "cd"})
    assert load_lora(path).ranks() == {stem: 2}
    assert words in one_line(Exception, load_lora, path, limits=limits)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain é 画 👩‍🎨", "plain é 画 👩‍🎨"),
        ("a\r\n\tb", "a b"),
        ("\x1b[31mred\x1b[0m", "[31mred[0m"),
        ("a\u2028b\u2029c", "a b c"),
        ("\u202egpj.exe\u2066", "gpj.exe"),
        ("\ud83d\x00\x7f\x9b", ""),
        ("<script>", "<script>"),
    ],
)
def test_clean(text, line):
    assert clean(text) == line


def test_clean_shortens():
    assert (clean("abcdef", 4), clean("abcd", 4)) == ("abc…", "abcd")


KEY = "transformer.transformer_blocks.0.attn.to_q.lora_"
A, B = f"{KEY}A.weight", f"{KEY}B.weight"


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start, stop, shape=(2, 4), dtype="F32", **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop], **more}


GOOD = {A: entry(0, 32), B: entry(32, 64, (4, 2))}
ONES = np.arange(1, 17, dtype="<f4").tobytes()
CONTAINERS = {
    "empty file": (b"", "too few"),
    "seven bytes": (b"\x01" * 7, "too few"),
    "header of 2^63 bytes": (struct.pack("<Q", 2**63) + b"{}", "announces a header"),
    "header of 2^64 - 1 bytes": (struct.pack("<Q", 2**64 - 1), "announces a header"),
    "header longer than the file": (raw(GOOD, length=10**6), "announces a header"),
    "truncated header": (raw(GOOD)[:-20] + b"", "announces a header"),
    "truncated data": (raw(GOOD, ONES[:-1]), "the tensors take 64 bytes, but 63 follow"),
    "trailing data": (raw(GOOD, ONES + b"\0"), "but 65 follow"),
    "not JSON": (raw(b"{what}"), "not valid JSON"),
    "a list": (raw(b"[]"), "does not start with"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "nested deeply": (raw(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "nested too deeply"),
    "an integer of 10^5 digits": (
        raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,0]}}'),
        "not valid JSON",
    ),
    "NaN in the header": (
        raw(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}'),
        "not a number of JSON",
    ),
    "duplicate keys": (
        raw(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":1}'),
        "occurs twice",
    ),
    "duplicate fields": (
        raw(b'{"a":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
        "occurs twice",
    ),
    "overlap": (raw({A: entry(0, 32), B: entry(16, 48, (4, 2))}, ONES[:48]), "overlaps another"),
    "gap": (raw({A: entry(0, 32), B: entry(40, 72, (4, 2))}, ONES + b"12345678"), "leaves a gap"),
    "first byte skipped": (raw({A: entry(4, 36)}, ONES[:36]), "leaves a gap"),
    "offset after the end": (raw({A: entry(2**40, 2**40 + 32)}, ONES), "leaves a gap"),
    "negative offset": (raw({A: entry(-32, 0)}, ONES), "offsets"),
    "stop before start": (raw({A: entry(32, 0)}, ONES), "offsets"),
    "offset that is true": (raw({A: entry(False, 32)}, ONES[:32]), "offsets"),
    "fractional offset": (raw({A: entry(0.0, 32)}, ONES[:32]), "offsets"),
    "shape that needs more": (raw({A: entry(0, 32, (3, 4))}, ONES[:32]), "its shape needs 48"),
    "shape that overflows": (raw({A: entry(0, 32, (2**62, 2**62, 16))}, ONES[:32]), "its shape"),
    "negative shape": (raw({A: entry(0, 32, (-2, -4))}, ONES[:32]), "has the shape"),
    "many dimensions": (raw({A: entry(0, 4, (1,) * 9)}, ONES[:4]), "has the shape"),
    "unknown dtype": (raw({A: entry(0, 32, dtype="F128")}, ONES[:32]), "is stored as F128"),
    "boolean dtype": (raw({A: entry(0, 8, dtype="BOOL")}, ONES[:8]), "is stored as BOOL"),
    "dtype that is a list": (raw({A: entry(0, 32, dtype=["F32"])}, ONES[:32]), "is stored as"),
    "unknown field": (raw({A: entry(0, 32, data="x")}, ONES[:32]), "nothing else"),
    "missing field": (raw({A: {"dtype": "F32", "shape": []}}), "must state"),
    "entry that is a number": (raw({A: 3}), "must state"),
    "metadata that is a list": (raw({"__metadata__": []}), "text to text"),
    "metadata with numbers": (raw({"__metadata__": {"a": 1}}), "text to text"),
    "name without characters": (raw({"": entry(0, 32)}, ONES[:32]), "no usable name"),
    "name with an escape": (raw({"\x1b[2J": entry(0, 32)}, ONES[:32]), "no usable name"),
    "name with a surrogate": (raw(b'{"\\ud800": 1}'), "no usable name"),
    "name of 600 characters": (raw({"x" * 600: entry(0, 32)}, ONES[:32]), "no usable name"),
    "zip archive of torch.save": (b"PK\x03\x04" + b"\0" * 60 + b"data.pkl", "is a pickle"),
    "pickle": (b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s.", "is a pickle"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("strict", [True, False])
def test_container(name, strict, tmp_path, one_line):
    content, words = CONTAINERS[name]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert words in one_line(ContainerError, load_lora, path, strict=strict)


def test_the_good_file_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw(GOOD, ONES))
    down, up = np.frombuffer(ONES, "<f4")[:8].reshape(2, 4), np.frombuffer(ONES, "<f4")[8:]
    delta = load_lora(path).delta_weight("transformer_blocks.0.attn.to_q")
    np.testing.assert_array_equal(delta.numpy(), up.reshape(4, 2) @ down)


def test_limits_without_arguments():
    assert Limits() == Limits(4 * 2**30, 10**8, 20_000, 1024, 2**24, 2**23, 512)


def test_file_above_the_limit(tmp_path, one_line):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.truncate(4 * 2**30 + 1)
    assert "more than the limit" in one_line(ContainerError, load_lora, path)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".pth", ".pkl", ".PT"])
def test_pickles_by_name(suffix, tmp_path, one_line):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(raw(GOOD, ONES))
    assert "pickle" in one_line(ContainerError, load_lora, path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.safetensors", "No such file"),
        ("a.gguf", "must end with .safetensors"),
        ("nul\0.safetensors", "cannot be opened"),
        ("new\nline.safetensors", "No such file"),
        ("x" * 300 + ".safetensors", "too long"),
    ],
)
def test_paths(name, words, tmp_path, one_line):
    assert words in one_line(ContainerError, load_lora, tmp_path / name)


def test_folders_and_pipes(tmp_path, one_line):
    (tmp_path / "a.safetensors").mkdir()
    assert "holds no adapter" in one_line(ContainerError, load_lora, tmp_path / "a.safetensors")
    (tmp_path / "adapter_model.bin").touch()
    assert "pickle adapter_model.bin" in one_line(ContainerError, load_lora, tmp_path)
    os.mkfifo(tmp_path / "b.safetensors")
    assert "is not a file" in one_line(ContainerError, load_lora, tmp_path / "b.safetensors")


def pair(rank=2, up_rank=None, d=4, key=KEY, dtype=torch.float32, **more):
    down, up = torch.ones(rank, d, dtype=dtype), torch.ones(d, up_rank or rank, dtype=dtype)
    return {f"{key}A.weight": down, f"{key}B.weight": up, **more}


NAN = {A: torch.tensor([[1.0, float("nan")]]), B: torch.ones(2, 1)}
ALPHA = "transformer.transformer_blocks.0.attn.to_q.alpha"
LAYERS = {
    "NaN": (NAN, "NaN or infinity"),
    "infinity": ({A: torch.ones(1, 2), B: torch.full((2, 1), float("inf"))}, "NaN or infinity"),
    "traversal": (pair(key="../../etc/passwd.lora_"), "no dialect has a layer"),
    "traversal in a block": (pair(key="transformer.transformer_blocks.../0.attn.to_q.lora_"), "no"),
    "rank of 1025": (pair(rank=1025), "its rank is 1025, expected 1 to 1024"),
    "ranks that differ": (pair(rank=257, up_rank=1), "do not fit each other"),
    "rank 0": ({A: torch.ones(0, 4), B: torch.ones(4, 0)}, "expected floating-point"),
    "alpha 0": (pair(**{ALPHA: torch.tensor(0.0)}), "α is 0"),
    "negative alpha": (pair(**{ALPHA: torch.tensor(-4.0)}), "α is -4"),
    "alpha NaN": (pair(**{ALPHA: torch.tensor(float("nan"))}), "α is nan"),
    "alpha of two numbers": (pair(**{ALPHA: torch.ones(2)}), "expected one number"),
    "alpha alone": ({ALPHA: torch.tensor(1.0)}, "no factors with it"),
    "one factor": ({A: torch.ones(1, 4)}, "lacks the factor up"),
    "integers": (pair(dtype=torch.int32), "expected floating-point"),
    "all zero": ({A: torch.ones(1, 4), B: torch.zeros(4, 1)}, "the change of every layer is zero"),
    "text encoder alone": (
        pair(key="text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_"),
        "no layer of the transformer",
    ),
    "zero layers": ({"weight": torch.ones(2)}, "no layer of the transformer"),
    "no tensors": ({}, "no layer of the transformer"),
    "a convolution": ({A: torch.ones(1, 4, 3, 3), B: torch.ones(4, 1, 1, 1)}, "is 1x4x3x3"),
    "a vector": ({A: torch.ones(4), B: torch.ones(4, 1)}, "a factor is 4"),
    "weight difference": (pair(**{f"{KEY[:-6]}.diff": torch.ones(4, 4)}), "weight difference"),
    "bias difference": (pair(**{f"{KEY[:-6]}.diff_b": torch.ones(4)}), "difference of a bias"),
    "bias of a factor": (pair(**{f"{KEY}B.bias": torch.ones(4)}), "bias of a factor"),
    "optimizer state": (pair(**{"step": torch.ones(1)}), "ends with no known factor"),
    "two adapters": (
        pair(key=KEY.replace("to_q", "to_k"))
        | {f"{KEY}A.one.weight": torch.ones(1, 4), f"{KEY}B.two.weight": torch.ones(4, 1)},
        "several adapters: one, two",
    ),
    "a layer twice": (pair() | pair(key=KEY.replace("transformer.", "", 1)), "the same layer"),
    "a factor twice": (pair(**{f"{KEY[:-1]}.down.weight": torch.ones(2, 4)}), "the same factor"),
    "block 00": (pair(key=KEY.replace("blocks.0", "blocks.00")), "no dialect has a layer"),
    "two kinds": (pair(**{f"{KEY[:-6]}.hada_w1_a": torch.ones(4, 2)}), "several kinds"),
    "widths that differ": (
        pair() | pair(key=KEY.replace("to_q", "to_k")) | pair(key=KEY.replace("to_q", "to_v"), d=6),
        "expected 4 → 4 like the others",
    ),
    "expansion to 10^12": (
        {
            f"{KEY[:-6]}.lokr_w1": torch.ones(1000, 1000, dtype=torch.float8_e5m2),
            f"{KEY[:-6]}.lokr_w2": torch.ones(1000, 1000, dtype=torch.float8_e5m2),
        },
        "expand to 1000000000000 numbers",
    ),
    "magnitude of other sizes": (
        pair(**{f"{KEY[:-6]}.dora_scale": torch.ones(5, 1)}), "expected 4x1 or 1x4"),
    "magnitude of a matrix": (
        pair(**{f"{KEY[:-6]}.dora_scale": torch.ones(4, 4)}), "one row or one column"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, tmp_path, one_line):
    tensors, words = LAYERS[name]
    path = tmp_path / "a.safetensors"
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)
    assert words in one_line(MappingError, load_lora, path)
    report = load_lora(path, strict=False).report
    assert words in " ".join([report.summary(), *(fate.reason for fate in report.fates)])


def test_mixed_ranks_are_allowed(tmp_path):
    tensors = pair(rank=257) | pair(rank=1, key=KEY.replace("to_q", "to_k"))
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    assert sorted(load_lora(path).ranks().values()) == [1, 257]


SETTINGS = {
    "not JSON": ("{", "not valid JSON"),
    "a list": ("[]", "expected an object"),
    "rank that differs": ({"transformer.r": 8}, "its rank is 2, but the settings"),
    "rank 0": ({"transformer.r": 0}, "expected a positive integer"),
    "rank true": ({"transformer.r": True}, "expected a positive integer"),
    "alpha text": ({"transformer.r": 2, "transformer.lora_alpha": "2"}, "a finite number"),
    "alpha 10^400": ('{"transformer.r": 2, "transformer.lora_alpha": 1e400}', "a finite number"),
    "regular expression": (
        {"transformer.r": 2, "transformer.rank_pattern": {"(a+)+$": 2}},
        "are not executed",
    ),
    "other kind": ({"transformer.r": 2, "transformer.peft_type": "VERA"}, "expected LORA"),
    "changed base": ({"transformer.r": 2, "transformer.init_lora_weights": "pissa"}, "the base"),
    "transposed": ({"transformer.r": 2, "transformer.fan_in_fan_out": True}, "fan_in_fan_out"),
    "DoRA without magnitude": ({"transformer.r": 2, "transformer.use_dora": True}, "magnitude"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name, tmp_path, one_line):
    stated, words = SETTINGS[name]
    path = tmp_path / "a.safetensors"
    text = stated if isinstance(stated, str) else json.dumps(stated)
    save_file(pair(), path, {"lora_adapter_metadata": text})
    assert words in one_line(LoraFileError, load_lora, path)


def test_other_families_are_refused_with_their_name(tmp_path, one_line):
    path = tmp_path / "a.safetensors"
    save_file(pair(key="lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_"), path)
    assert "an adapter for unet" in one_line(FamilyError, load_lora, path)


def test_control_characters_of_metadata_are_removed(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(pair(), path, {"title\x07": "a\x1b[31m\u202eb\r\nc\ud7ff\u2028d"})
    assert load_lora(path).metadata == {"title": "a[31mb c\ud7ff d"}


def test_a_file_that_shrinks_while_it_is_open(tmp_path, one_line):
    path = tmp_path / "a.safetensors"
    save_file(pair(), path)
    bundle = load_lora(path)
    with path.open("r+b") as file:
        file.truncate(100)
    name = "transformer_blocks.0.attn.to_q"
    assert "became shorter" in one_line(ContainerError, bundle.delta_weight, name)


def test_a_file_that_is_replaced_keeps_its_content(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(pair(), path)
    bundle = load_lora(path)
    save_file(pair(rank=1), tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").replace(path)
    assert bundle.delta_weight("transformer_blocks.0.attn.to_q")[0, 0] == 2
