"""Reading by position, writing of bytes, and text for one line."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion.lora_file import ContainerError, Limits, SafetensorsFile, load_lora
from diffusion.lora_file.container import DTYPES, clean, serialize


@pytest.fixture
def tensors():
    values = torch.arange(6).reshape(2, 3)
    return {name: values.to(dtype) for name, dtype in DTYPES.items()} | {
        "scalar": torch.tensor(2.0),
        "empty": torch.ones(0, 3),
    }


def same(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    raw = [t.reshape(-1).view(torch.uint8) for t in (found, expected)]
    assert torch.equal(*raw)


def test_every_dtype_is_read_and_written(tensors, tmp_path):
    theirs, ours = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors, theirs, {"a": "b"})
    ours.write_bytes(serialize(tensors, {"a": "b"}))
    for path in (theirs, ours):
        file = SafetensorsFile(path)
        assert set(file.tensors) == set(tensors)
        assert file.metadata == {"a": "b"}
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
    assert clean("abcdef", 4) == "abc…"
    assert clean("abcd", 4) == "abcd"
