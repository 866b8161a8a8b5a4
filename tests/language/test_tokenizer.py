"""Bytes and files of tokenizers: tokens, their bytes, and the packages that open them."""

import json
from hashlib import sha256
from itertools import pairwise

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from core_gates.errors import GatesError
from language.tokenizer import ByteTokenizer, FileTokenizer, faithful_tokens, load_tokenizer

TEXT = "def f(x):\n\treturn 'é漢🙂'  # <|endoftext|> x\r\n"
WORDS = ["the cat sat on the mat, naïve 漢字 🙂", "def f(cat): return cat.the(mat)\n"] * 4


def saved(tokenizer, folder, **config):
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """Trained pairs of bytes, those of GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    return FileTokenizer(saved(tokenizer, tmp_path_factory.mktemp("level")) / "tokenizer.json")


@pytest.fixture(scope="module")
def fallback(tmp_path_factory):
    """Characters, and bytes of those that it does not know, as Llama has them."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdeft", "at"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, [("a", "t")], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return load_tokenizer(saved(tokenizer, tmp_path_factory.mktemp("llama")))


def lossy():
    """Words in lower case, with limits of their lengths."""
    names = ["[UNK]", "[SEP]", "[PAD]", "the", "cat"]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=2, pad_id=2)
    return tokenizer


def test_bytes_are_the_bytes_of_the_text():
    tokenizer = ByteTokenizer()
    assert_array_equal(tokenizer.encode("é\n\0"), [195, 169, 10, 0])
    assert tokenizer.encode("").dtype == np.int64
    assert tokenizer.decode([256, 195, 169, 256]) == "é".encode()
    assert (tokenizer.decode([195]), (tokenizer.vocab_size, tokenizer.end)) == (b"\xc3", (257, 256))


@pytest.mark.parametrize("name", ["bytes", "byte_level", "fallback"])
def test_tokens_stand_for_all_bytes_of_a_text(name, request):
    tokenizer = ByteTokenizer() if name == "bytes" else request.getfixturevalue(name)

    @given(st.text())
    def check(text):
        tokens, counts = tokenizer.encode(text), tokenizer.byte_counts(text)
        assert (tokens.shape, counts.sum()) == (counts.shape, len(text.encode()))
        assert tokenizer.decode(tokens) == text.encode()
        assert tokenizer.end not in tokens

    check()


def test_a_token_has_the_bytes_that_it_is_decoded_to(byte_level):
    tokens, counts = byte_level.encode(TEXT), byte_level.byte_counts(TEXT)
    assert len(tokens) < len(TEXT.encode())
    assert_array_equal(counts, [len(byte_level.decode([token])) for token in tokens])


def test_bytes_within_a_character_count_with_its_last_token(fallback):
    assert_array_equal(fallback.byte_counts("at é"), [0, 2, 1, 0, 2])


def test_what_is_decoded_early_is_a_beginning_of_the_whole(fallback, byte_level):
    for tokenizer in (fallback, byte_level):
        tokens = tokenizer.encode("at 漢🙂 cat")
        parts = [tokenizer.decode(tokens[:end]) for end in range(len(tokens) + 1)]
        assert all(whole.startswith(part) for part, whole in pairwise(parts))
        assert "at 漢".encode()[:-1] in parts


def test_what_changes_a_text_still_counts_its_bytes(tmp_path):
    tokenizer = load_tokenizer(saved(lossy(), tmp_path / "words"))
    text = "  The CAT é the"
    assert_array_equal(tokenizer.encode(text), [3, 4, 0, 3])  # neither cut nor filled up
    assert_array_equal(tokenizer.byte_counts(text), [6, 4, 3, 3])
    assert tokenizer.end == 1
    for text, place in (("the CAT", 4), ("cat the é", 8), ("  the cat", 0)):
        with pytest.raises(
            GatesError, match=f"loses text: x.md comes .* at byte {place}, expected"
        ):
            faithful_tokens(tokenizer, "x.md", text)


def test_files_of_bytes_open_in_tokenizers_and_transformers(tmp_path):
    ByteTokenizer().save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    text = TEXT.replace("<|endoftext|>", "")
    expected = ByteTokenizer().encode(text).tolist()
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids == expected
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (other(text)["input_ids"], other.decode(expected)) == (expected, text)
    assert (other.eos_token_id, other.bos_token_id, len(other)) == (256, 256, 257)


def test_what_is_saved_is_the_same_tokenizer(byte_level, tmp_path):
    for tokenizer in (ByteTokenizer(), byte_level):
        tokenizer.save(tmp_path)
        again = load_tokenizer(tmp_path)
        assert type(again) is type(tokenizer)
        assert again.digest == tokenizer.digest
        assert_array_equal(again.encode(TEXT), tokenizer.encode(TEXT))
        other = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert other.eos_token_id == tokenizer.end


@pytest.mark.parametrize("name", ["[PAD]", {"content": "[PAD]", "lstrip": False}])
def test_the_configuration_names_the_end(tmp_path, name):
    found = load_tokenizer(saved(lossy(), tmp_path / "named", eos_token=name))
    assert found.end == 2
    own, same = saved(lossy(), tmp_path / "own"), saved(lossy(), tmp_path / "s", eos_token="[SEP]")
    plain = sha256((own / "tokenizer.json").read_bytes()).hexdigest()
    assert load_tokenizer(own).digest == load_tokenizer(same).digest == plain
    assert found.digest != plain  # the end belongs to what was trained on


def test_what_is_no_tokenizer_is_refused(tmp_path, refuses):
    ByteTokenizer().save(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_bytes()
    faults = {
        "half": whole[: len(whole) // 2],
        "other": b'{"version": "1.0"}',
        "list": b"[]",
        "deep": b"[" * 100_000,
        "binary": b"\xff\xfe\x00",
        "empty": b"",
        "large": whole.replace(b'"id": 256', b'"id": 4000000000').replace(
            b": 255", b": 4000000000"
        ),
        "hostile": whole.replace(b'"BPE"', b'"PBE"'),
    }
    for name, content in faults.items():
        (tmp_path / f"{name}.json").write_bytes(content)
        line = rf"^[^\n]*{name}.json cannot be read as a tokenizer \([^\n]+: name a tokenizer.json"
        refuses(GatesError, (line, lambda name=name: load_tokenizer(tmp_path / f"{name}.json")))
    bare = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    few = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="?"))
    known = load_tokenizer(saved(few, tmp_path / "few"))
    ended = saved(lossy(), tmp_path / "damaged")
    (ended / "tokenizer_config.json").write_text('{"eos_token"')
    refuses(
        GatesError,
        ("nothing is not found: name 'bytes', a tokenizer", lambda: load_tokenizer("nothing")),
        ("has no token that ends", lambda: load_tokenizer(saved(bare, tmp_path / "bare"))),
        ("damaged/tokenizer_config.json cannot be read as JSON", lambda: load_tokenizer(ended)),
        ("few/tokenizer.json cannot encode a text .*: name another", lambda: known.encode("b")),
        ("half a character: give valid", lambda: ByteTokenizer().encode("a\ud800")),
        ("half a character: give valid", lambda: load_tokenizer(tmp_path).byte_counts("\udc80")),
    )
    folder = tmp_path / "without"
    folder.mkdir()
    refuses(GatesError, ("without has no tokenizer.json: put", lambda: load_tokenizer(folder)))


def test_a_tokenizer_at_which_the_package_panics_is_refused(refuses, tmp_path, capfd):
    ByteTokenizer().save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    refuses(GatesError, ("cannot be read as a tokenizer", lambda: load_tokenizer(tmp_path)))
    assert "panicked" in capfd.readouterr().err


def test_unknown_tokens_are_refused(byte_level, refuses):
    refuses(
        ValueError,
        ("in 0..256, got 257", lambda: ByteTokenizer().decode([257])),
        ("in 0..294, got -1..3", lambda: byte_level.decode([3, -1])),
    )
