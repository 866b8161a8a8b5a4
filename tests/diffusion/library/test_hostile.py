"""Names, links, files and metadata that try to break a scan, an index or a terminal."""

import json
import os
import re
import struct

import pytest
import torch
from safetensors.torch import save_file

from diffusion.library import LibraryError, LoraLibrary
from diffusion.lora_file import LoraFileError

NAMES = [
    "'; DROP TABLE adapter; --",
    '" OR "1"="1',
    "a\x1b[31mred\x07\nline",
    "..evil",
    "ünïcödé 名前",
    "名前",
    "<script>alert(1)</script>",
    "%00%2e%2e",
    "x" * 200,
    "--option",
    "$(reboot)`id`",
    "\u202egnp.exe",
]
SAFE = re.compile(r"[\w-][\w.-]{0,127}")


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_names(library, root, put):
    for seed, name in enumerate(NAMES):
        put(root / f"{name}.safetensors", seed)
    undecodable = root / os.fsdecode(b"\xff\xfe.safetensors")
    put(root / "plain.safetensors", 99).rename(undecodable)
    report = library.scan()
    assert report.added == report.encoded == len(NAMES)  # one name is hidden
    adapters = library.adapters()
    assert len({a.name for a in adapters}) == len(NAMES)
    for adapter in adapters:
        assert SAFE.fullmatch(adapter.name)
        assert adapter.path.isprintable()
        assert (adapter.title, library.find(adapter.name)) == (adapter.name, adapter)
        assert library.load(adapter.name).family == "flux"
    assert any("\\xff\\xfe" in a.path for a in adapters)
    assert {m.name for m in library.search("anything", 99)} == {a.name for a in adapters}
    assert library.scan().unchanged == len(NAMES)
    library.remove("'; DROP TABLE adapter; --.safetensors")
    assert len(library.adapters()) == len(NAMES) - 1


def test_files_with_one_stem_have_different_names(library, root, put):
    for number, folder in enumerate(("a", "b", "c-d", "c/d", "名", "前")):
        put(root / folder / "x.safetensors", number)
    library.scan()
    names = {adapter.name for adapter in library.adapters()}
    assert names == {"a-x", "b-x", "c-d-x", "d-x", "名-x", "前-x"}


def test_links(library, root, put, tmp_path):
    outside = tmp_path / "outside"
    put(outside / "secret.safetensors", 1)
    put(root / "good.safetensors", 2)
    put(root / "folder/other.safetensors", 3)
    links = {
        "alias.safetensors": root / "good.safetensors",
        "secret.safetensors": outside / "secret.safetensors",
        "relative.safetensors": "../outside/secret.safetensors",
        "self.safetensors": "self.safetensors",
        "nothing.safetensors": "missing.safetensors",
        "away": outside,
        "inside": root / "folder",
        "loop": root,
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe.safetensors")
    (root / "dir.safetensors").mkdir()
    report = library.scan()
    assert [a.path for a in library.adapters()] == [
        "alias.safetensors",
        "folder/other.safetensors",
        "good.safetensors",
    ]
    reasons = dict(report.refused)
    out = {"secret.safetensors", "relative.safetensors", "away"}
    assert {path for path, why in reasons.items() if why == "it leads out of the library"} == out
    assert set(reasons) - out == {"self.safetensors", "nothing.safetensors", "pipe.safetensors"}
    for name in ("secret.safetensors", "relative.safetensors", "away/secret.safetensors"):
        with pytest.raises(LibraryError, match=r"out of the library|outside"):
            library.add(root / name)
    with pytest.raises(LibraryError, match="outside"):
        library.add("../outside/secret.safetensors")


def test_a_file_that_becomes_a_link_is_not_read(library, root, put, tmp_path):
    put(root / "a/x.safetensors", 1)
    put(tmp_path / "outside/x.safetensors", 1)
    library.scan()
    (root / "a/x.safetensors").unlink()
    (root / "a").rmdir()
    (root / "a").symlink_to(tmp_path / "outside")
    with pytest.raises(LibraryError, match="leads out"):
        library.load("x")
    assert (library.scan().removed, library.adapters()) == (1, [])


def bad_files():
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    name = "transformer.transformer_blocks.0.attn.to_q"
    wide = {"dtype": "F32", "shape": [1, 2**62], "data_offsets": [0, 4]}
    return {
        "empty": b"",
        "huge header": struct.pack("<Q", 2**63) + b"{}",
        "pickle": b"\x80\x02" + b"x" * 50,
        "zip": b"PK\x03\x04" + b"x" * 50,
        "no json": raw(b"{nonsense"),
        "list": raw([1]),
        "twice": raw(b'{"a": {}, "a": {}}'),
        "deep": raw(b'{"a": ' * 50_000),
        "overlap": raw({"a": tensor, "b": tensor}, bytes(4)),
        "gap": raw({"a": tensor | {"data_offsets": [4, 8]}}, bytes(8)),
        "overflow": raw({f"{name}.lora_A.weight": wide}, bytes(4)),
        "control": raw({"a\x00\x1b": tensor}, bytes(4)),
        "metadata": raw({"__metadata__": {"a": [1]}, "b": tensor}, bytes(4)),
        "binary": os.urandom(500),
    }


def test_broken_files(library, root, put):
    put(root / "good.safetensors", 1)
    bad = bad_files()
    for name, content in bad.items():
        (root / f"{name}.safetensors").write_bytes(content)
    report = library.scan()
    assert {path for path, _ in report.refused} == {f"{name}.safetensors" for name in bad}
    for _, reason in report.refused:
        assert reason
        assert reason.isprintable()
        assert len(reason) <= 300
        assert str(root) not in reason
    assert [m.name for m in library.search("anything", 99)] == ["good"]
    assert len(library.search("good", 99, "metadata")) == 1
    for adapter in library.adapters():
        if adapter.error:
            with pytest.raises(LoraFileError):
                library.load(adapter.name)


def test_files_of_no_use(library, root, put):
    """They are kept by their metadata, none of them is found by its weights."""
    q = "transformer.transformer_blocks.0.attn.to_q"
    te = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    pair = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2)}
    files = {
        "unknown": {"some.weight": torch.ones(3)},
        "nothing": {"alpha": torch.ones(1)},
        "text encoder": {f"{te}.{k}": t for k, t in pair.items()},
        "alpha": {f"{q}.{k}": t for k, t in pair.items()} | {f"{q}.alpha": torch.tensor(0.0)},
        "negative": {f"{q}.{k}": t for k, t in pair.items()} | {f"{q}.alpha": torch.tensor(-1.0)},
        "infinite": {f"{q}.{k}": t / 0 for k, t in pair.items()},
        "misfit": {f"{q}.lora_A.weight": torch.ones(2, 8), f"{q}.lora_B.weight": torch.ones(8, 3)},
        "rank": {
            f"{q}.lora_A.weight": torch.ones(1500, 8),
            f"{q}.lora_B.weight": torch.ones(8, 1500),
        },
    }
    told = {"ss_base_model_version": "flux1", "modelspec.title": "useless"}
    for name, tensors in files.items():
        save_file(tensors, root / f"{name}.safetensors", told)
    put(root / "good.safetensors", 1)
    report = library.scan()
    assert report.refused == ()
    assert {path for path, _ in report.unencoded} == {f"{name}.safetensors" for name in files}
    assert all(reason.isprintable() and reason for _, reason in report.unencoded)
    assert [m.name for m in library.search("anything", 99)] == ["good"]
    assert len(library.search("useless", 99, "metadata")) == len(files)
    flags = {a.path.removesuffix(".safetensors"): a.flags for a in library.adapters()}
    assert "no transformer" in flags["text encoder"]
    assert "text encoder" in flags["text encoder"]
    assert "nonfinite" in flags["infinite"]
    assert "zero" in flags["alpha"]


def test_metadata(library, root, put):
    evil = "<b>\x1b[2J'\"; DROP TABLE words; --\u202e" + "y" * 10_000
    told = {f"key {number}": "value" for number in range(10_000)}
    told |= {"modelspec.title": evil, "modelspec.description": evil, "modelspec.license": evil}
    told |= {"modelspec.tags": ",".join(f"{evil[:30]} {n}" for n in range(5_000))}
    told |= {"modelspec.trigger_phrase": ", ,\x00,\x00 zebra style,Zebra Style"}
    told |= {"ss_tag_frequency": json.dumps({"10_sks dog": {"dog": 12, "cat": 40, "x": "no"}})}
    put(root / "a.safetensors", 1, told)
    for number, text in enumerate(("{", "[]", '{"a": 1}', '{"a": {"b": NaN}}', "[" * 99_999)):
        put(root / f"b{number}.safetensors", 2 + number, {"ss_tag_frequency": text})
    assert library.scan().encoded == 6
    adapter = library.find("a")
    assert adapter.title.startswith("<b>[2J'\"; DROP TABLE words; --yyy")
    assert len(adapter.title) == 200
    assert len(adapter.text) <= 2_000
    assert (len(adapter.tags), adapter.triggers) == (64, ("zebra style",))
    for text in (adapter.title, adapter.text, adapter.license, *adapter.tags, *adapter.triggers):
        assert text.isprintable()
    assert [m.name for m in library.search("zebra", 9, "metadata")] == ["a"]
    assert [m.name for m in library.search("drop table", 9, "metadata")] == ["a"]
    assert [m.name for m in library.search("x", 9, license=adapter.license)] == ["a"]


def test_tags_by_frequency(library, root, put):
    tags = {"3_sks heart": {"red": 3, " heart ": 9, "blue": 3}, "img": {"red": 4}}
    put(root / "a.safetensors", 1, {"ss_tag_frequency": json.dumps(tags), "ss_output_name": "t"})
    library.scan()
    adapter = library.find("a")
    assert (adapter.tags, adapter.triggers) == (("heart", "red", "blue"), ("heart",))
    assert adapter.title == "t"


def test_an_index_that_may_not_be_written_can_be_searched(
    library, root, put, encoders, monkeypatch
):
    put(root / "a.safetensors", 1)
    library.scan()
    expected = list(library.search("anything"))
    library.close()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with LoraLibrary(root, encoders.Probes(), encoders.Words(), least=-1) as reader:
        assert list(reader.search("anything")) == expected
        database = reader._catalog().database
        with pytest.raises(LibraryError, match="cannot be written"), database.writing():
            pytest.fail("the block is entered")


@pytest.mark.parametrize(
    "text", ["\udcff", "\ud800 x", "x" * 5_000, "a\x00b", "", "~nobody/x", "../.."]
)
def test_words_that_name_nothing(text, library, root, put, one_line):
    put(root / "a.safetensors", 1)
    library.scan()
    for option in ("family", "license", "tag"):
        found = library.search("fox", 9, **{option: text})
        assert len(found) == (option == "license" and text == "")
        assert found.notice.isprintable()
    for method in (library.find, library.remove, library.load, library.like, library.add):
        one_line((LibraryError, LoraFileError), method, text)
    assert len(library.adapters()) == 1


def test_a_home_of_no_user(one_line):
    assert "home of no user" in one_line(LibraryError, LoraLibrary, "~nobody-at-all/x")
