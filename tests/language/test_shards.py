"""Packed tokens: what is written is what is read, and what is damaged is refused."""

import json
import shutil

import numpy as np
import pytest
import tokenizers
from numpy.testing import assert_array_equal

from core_gates.errors import GatesError
from harness.files.atomic import locked
from language.corpus import SPLITS, Corpus, Document
from language.shards import ShardSet, write_shards
from language.tokenizer import ByteTokenizer, load_tokenizer

TEXTS = {f"{number}.txt": f"text {number} é" * (number % 4) or "z" for number in range(60)}
CORPUS = Corpus([Document(*one) for one in TEXTS.items()])


class Pairs(ByteTokenizer):
    """Bytes with an end above those of two bytes."""

    vocab_size, end = 70_001, 70_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Shards, not to be changed."""
    return write_shards(CORPUS, ByteTokenizer(), tmp_path_factory.mktemp("shards") / "whole")


def test_every_document_is_in_its_split_between_two_ends(whole):
    opened = ShardSet.open(whole.folder)
    for split in SPLITS:
        tokens, found = opened.tokens(split), {}
        assert isinstance(tokens, np.memmap)
        assert tokens.dtype == np.uint16
        for name, start, stop in opened.documents(split):
            assert tokens[start - 1] == tokens[stop] == 256
            found[name] = opened.tokenizer.decode(tokens[start:stop]).decode()
        assert found == dict(CORPUS.part(split))
        part = opened.part(split)
        assert part.tokens == len(tokens) == part.bytes + len(found) + 1
        assert (part.digest, len(part.objects)) == (Corpus(CORPUS.part(split)).digest, len(found))
    assert opened.corpus_digest == CORPUS.digest


def test_large_vocabularies_have_four_bytes(tmp_path):
    shards = write_shards(CORPUS, Pairs(), tmp_path / "large")
    tokens = shards.tokens("train")
    assert (tokens.dtype, (tokens[0], tokens[-1])) == (np.uint32, (70_000, 70_000))
    _, start, stop = shards.documents("train")[1]
    assert tokens[start - 1] == tokens[stop] == 70_000


def test_the_digest_is_that_of_corpus_and_tokenizer(whole, tmp_path):
    ticks = []
    again = write_shards(CORPUS, ByteTokenizer(), tmp_path / "a", tick=lambda: ticks.append(1))
    assert (again.digest, len(ticks)) == (whole.digest, len(TEXTS))
    shorter = write_shards(Corpus(CORPUS.documents[1:]), ByteTokenizer(), tmp_path / "a")
    other = write_shards(CORPUS, Pairs(), tmp_path / "b")
    assert len({whole.digest, shorter.digest, other.digest}) == 3
    assert ShardSet.open(tmp_path / "a").digest == shorter.digest  # it has replaced the first
    assert_array_equal(again.tokens("test"), whole.tokens("test"))


def change(content, *path, value):
    index = json.loads(content)
    place = index
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(index).encode()


TRAIN = ("splits", "train")
INDICES = {
    "truncated": (lambda whole: whole[: len(whole) // 2], "index.json is damaged"),
    "empty": (lambda whole: b"", "index.json is damaged"),
    "list": (lambda whole: b"[]", "index.json is damaged"),
    "deep": (lambda whole: b"[" * 100_000, "index.json is damaged"),
    "binary": (lambda whole: b"\xff\x00", "index.json is damaged"),
    "later": (lambda whole: change(whole, "version", value=2), "version 2, expected 1"),
    "objects": (lambda whole: change(whole, "dtype", value="O"), "index.json is damaged"),
    "two kinds": (lambda whole: change(whole, "dtype", value=["uint16"]), "index.json is damaged"),
    "no split": (lambda whole: change(whole, *TRAIN, value=None), "KeyError: 'train'"),
    "text": (lambda whole: change(whole, *TRAIN, "tokens", value="9"), "tokens is not int"),
    "huge": (lambda whole: change(whole, *TRAIN, "tokens", value=10**30), "train.bin has"),
    "beyond": (
        lambda whole: change(whole, *TRAIN, "documents", 1, 2, value=10**9),
        "document '.*' has tokens",
    ),
    "before": (lambda whole: change(whole, *TRAIN, "documents", 0, 1, value=-4), "has tokens -4"),
    "overlap": (lambda whole: change(whole, *TRAIN, "documents", 1, 1, value=1), "has tokens 1"),
    "name": (lambda whole: change(whole, *TRAIN, "documents", 0, 0, value=3), "is not a name"),
    "pair": (lambda whole: change(whole, *TRAIN, "documents", 0, value=["a", 1]), "is damaged"),
    "fewer": (lambda whole: change(whole, *TRAIN, "objects", value=[]), "and 0 objects"),
    "unknown": (lambda whole: change(whole, *TRAIN, "more", value=1), "index.json is damaged"),
}


@pytest.mark.parametrize(("damage", "words"), INDICES.values(), ids=INDICES)
def test_a_damaged_index_is_refused(whole, tmp_path, damage, words):
    folder = shutil.copytree(whole.folder, tmp_path / "copy")
    index = folder / "index.json"
    index.write_bytes(damage(index.read_bytes()))
    with pytest.raises(GatesError, match=rf"^[^\n]*{words}[^\n]*prepare the corpus[^\n]*$"):
        ShardSet.open(folder)


def test_damaged_tokens_and_tokenizers_are_refused(whole, tmp_path, refuses):
    def damaged(name, content):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(whole.folder, folder)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        return folder

    maps = (whole.folder / "train.bin").read_bytes()
    vocabulary = (whole.folder / "tokenizer.json").read_bytes()
    other = damaged("tokenizer.json", vocabulary.replace(b'"\xc4\x80"', b'"\xe6\xbc\xa2"'))
    half = damaged("tokenizer.json", vocabulary[:-9])
    cut, flip = damaged("train.bin", maps[:-2]), damaged("train.bin", b"a" + maps[1:])
    gone = damaged("test.bin", None)
    refuses(
        GatesError,
        (f"train.bin has {len(maps) - 2} bytes, expected {len(maps)}", lambda: ShardSet.open(cut)),
        ("train.bin is damaged, its SHA-256", lambda: ShardSet.open(flip)),
        ("test.bin has 0 bytes, expected", lambda: ShardSet.open(gone)),
        ("nothing holds no shards .*: prepare", lambda: ShardSet.open(tmp_path / "nothing")),
        ("tokenizer.json is not that of index.json", lambda: ShardSet.open(other)),
        ("cannot be read as a tokenizer", lambda: ShardSet.open(half)),
    )


def test_a_tokenizer_that_loses_text_packs_nothing(tmp_path, refuses):
    class Unknown(ByteTokenizer):
        def encode(self, text):
            return 0 * super().encode(text)

    class Leading(ByteTokenizer):
        def encode(self, text):
            return super().encode(f" {text}")

    folder = tmp_path / "shards"
    line = (
        r"loses text: \d+.txt comes back with b'(.x00)+' at byte 0, expected b'(z|text.*)'; leave"
    )
    refuses(GatesError, (line, lambda: write_shards(CORPUS, Unknown(), folder)))
    assert not folder.exists()
    assert write_shards(CORPUS, Leading(), folder)  # a space in front is no loss


def test_another_end_is_another_tokenizer(tmp_path, refuses):
    content = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "<eos>": 1, "z": 2}))
    content.save(str(tmp_path / "tokenizer.json"))
    shards = write_shards(
        Corpus([Document("a", "z")]), load_tokenizer(tmp_path), tmp_path / "shards"
    )
    assert ShardSet.open(shards.folder).tokenizer.end == 0
    (shards.folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    refuses(
        GatesError,
        ("is not that of index.json", lambda: ShardSet.open(shards.folder)),
    )


def test_one_process_packs_into_a_folder_at_a_time(tmp_path, refuses):
    folder = tmp_path / "shards"

    def write():
        return write_shards(CORPUS, ByteTokenizer(), folder)

    with locked(tmp_path / ".shards.lock", folder, "wait"):
        refuses(GatesError, ("another process is at work on .*shards: wait", write))
        assert not folder.exists()
    assert write().digest
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_work_that_fails_leaves_nothing(tmp_path, refuses):
    kept = write_shards(CORPUS, ByteTokenizer(), tmp_path / "kept")

    class Failing(ByteTokenizer):
        def encode(self, text):
            if text == TEXTS["50.txt"]:
                raise GatesError("it fails")
            return super().encode(text)

    for name in ("kept", "new"):
        refuses(
            GatesError,
            ("it fails", lambda name=name: write_shards(CORPUS, Failing(), tmp_path / name)),
        )
    assert ShardSet.open(tmp_path / "kept").digest == kept.digest
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_what_holds_something_else_is_not_replaced(tmp_path, refuses):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("all of it")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "bare").mkdir()

    def write(name):
        return lambda: write_shards(CORPUS, ByteTokenizer(), tmp_path / name)

    refuses(
        GatesError,
        ("home exists and holds no shards: choose another folder", write("home")),
        ("file exists and holds no shards: choose another folder", write("file")),
    )
    assert (tmp_path / "home" / "thesis.tex").read_text() == "all of it"
    assert write("bare")().documents("train")
