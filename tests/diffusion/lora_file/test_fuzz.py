"""1,000 damaged files: each is read, or refused in one line of a typed error."""

import json
import random
import struct
from collections import Counter

import pytest

from core_gates.errors import GatesError
from diffusion.lora_file import load_lora

CASES = 1_000
VALUES = (
    -1, 0, 1, 2, 7, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 1.5, 1e308, True, None, "", "F32",
    "F16", "BF16", "F8_E4M3", "I64", "BOOL", "\u0000", "\ud800", [], [0], [0, 32], [4, 2], [32, 64],
    [[]], {},    {"dtype": "F32"},
)  # fmt: skip
NAMES = (
    "__metadata__", "", "../a", "a" * 600, "transformer.transformer_blocks.0.attn.to_q.alpha",
    "double_blocks.0.img_attn.qkv.lora_A.weight", "x.lokr_w1", "x.hada_w1_a", "\n",
)  # fmt: skip


@pytest.fixture(scope="module")
def samples(dialects, tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    kinds = (("bfl", "lora_down"), ("diffusers_flux", "lora_A"), ("native_sd3", "loha"))
    files = []
    for number, (names, kind) in enumerate(kinds):
        written = dialects.write(names, kind, layers=2)
        files.append(written.save(folder / f"{number}.safetensors", {"a": "b"}).read_bytes())
    return files


def parts(content):
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def flip(rng, content):
    """Change single bytes of the header."""
    damaged = bytearray(content)
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(rng.choice((1, 1, 2, 8))):
        damaged[rng.randrange(8 + length)] = rng.randrange(256)
    return bytes(damaged)


def cut(rng, content):
    return content[: rng.randrange(len(content))]


def entry(rng, content):
    """Give an entry, or one of its fields, another value."""
    header, data = parts(content)
    of = rng.choice((header, *(one for one in header.values() if "dtype" in one)))
    of[rng.choice((*of, *NAMES))] = rng.choice(VALUES)
    return joined(header, data)


def renamed(rng, content):
    header, data = parts(content)
    key = rng.choice(sorted(header))
    header[rng.choice((*NAMES, key[::-1], key[1:], key + ".weight"))] = header.pop(key)
    return joined(header, data)


def noise(rng, content):
    """Other values of the tensors, among them NaN."""
    header, data = parts(content)
    return joined(header, rng.randbytes(len(data)))


DAMAGES = (flip, cut, entry, renamed, noise)


def read(path, strict):
    try:
        load_lora(path, strict=strict).norms()
    except GatesError as error:
        return type(error).__name__, str(error)
    return "read", ""


def test_damaged_files(samples, tmp_path):
    rng = random.Random(13)
    outcomes = Counter()
    for case in range(CASES):
        damage = DAMAGES[case % len(DAMAGES)]
        path = tmp_path / f"{case}.safetensors"  # a new file takes a tenth of the time
        path.write_bytes(damage(rng, rng.choice(samples)))
        outcome, message = read(path, strict=bool(case % 3))
        assert message.isprintable(), case
        outcomes[outcome] += 1
    assert outcomes["ContainerError"] > 500
    assert outcomes["MappingError"] > 50
    assert 50 < outcomes["read"] < 300
