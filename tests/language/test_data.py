"""Windows of a packed corpus: order, ranks, resumption, the cache, and what is refused."""

import json
import os
from itertools import islice

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from core_gates.errors import GatesError
from language import data as data_file
from language.corpus import read_corpus
from language.data import LanguageDataModule, TrainingLoader, WindowLoader

TOKENS = np.arange(1000, 1101, dtype=np.uint16)  # (101,)


@pytest.fixture
def folder(tmp_path):
    """A corpus of 60 files."""
    place = tmp_path / "texts"
    place.mkdir()
    for number in range(60):
        (place / f"{number}.txt").write_text(f"file {number}: " + f"{number * 7} " * 150)
    return place


def batches(loader, epoch=0):
    if epoch:
        loader.set_epoch(epoch)
    return list(loader)


@pytest.mark.parametrize("context", [1, 7, 10, 33, 100])
def test_a_pass_predicts_every_token_once_on_the_circle(context):
    loader = TrainingLoader(TOKENS, context, 1)
    found = torch.cat(batches(loader, epoch=3))
    windows = 100 // context
    assert (found.shape, found.dtype) == ((windows, context + 1), torch.int64)
    assert_close((found[:, 1:] - found[:, :-1]) % 101, torch.ones(windows, context).long())
    assert len(set(found[:, 1:].flatten().tolist())) == windows * context


def test_given_windows_are_those_from_the_first_token_on():
    loader = WindowLoader(TOKENS, 30, 2)
    found = [batch.tolist() for batch in batches(loader)]
    windows = [TOKENS[start : start + 31].tolist() for start in (0, 30, 60)]
    assert (found, len(loader)) == ([windows[:2]], 1)


def test_order_and_offset_depend_on_seed_and_epoch_alone():
    def order(seed, epoch):
        return torch.cat(batches(TrainingLoader(TOKENS, 10, 2, seed=seed), epoch))

    assert_close(order(0, 0), order(0, 0))
    firsts = [order(seed, epoch)[:, 0] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(first.tolist()) for first in firsts}) == 3
    assert len({int(first.min()) for first in firsts}) == 3  # not always at the same borders


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("kind", "epoch"), [(TrainingLoader, 2), (WindowLoader, 0)])
def test_ranks_together_see_the_batches_of_one_process(world, kind, epoch):
    def seen(rank, world):
        return batches(kind(TOKENS, 3, 8, rank=rank, world=world), epoch)

    whole, parts = seen(0, 1), [seen(rank, world) for rank in range(world)]
    assert (len(whole), {len(part) for part in parts}) == (4, {4})
    assert [len(*batches(WindowLoader(TOKENS, 30, 8, rank=r, world=2))) for r in (0, 1)] == [1, 1]
    for batch, *own in zip(whole, *parts, strict=True):
        assert {len(one) for one in own} == {8 // world}
        assert_close(torch.stack(own, 1).flatten(0, 1), batch)


@pytest.mark.parametrize(("epoch", "stop"), [(0, 1), (1, 2), (1, 5)])
def test_a_loader_continues_where_its_state_was_taken(epoch, stop):
    first, again = TrainingLoader(TOKENS, 10, 2), TrainingLoader(TOKENS, 10, 2)
    first.set_epoch(epoch)
    assert len([*islice(first, stop)]) == stop
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    whole = batches(TrainingLoader(TOKENS, 10, 2), epoch)
    assert_close(list(again), whole[stop % 5 :])


def test_batches_are_windows_of_the_split(folder):
    module = LanguageDataModule((str(folder),), context=40, batch_size=4)
    module.setup("fit")
    loaders = {
        "train": module.train_dataloader(),
        "validation": module.val_dataloader(),
        "test": module.test_dataloader(),
    }
    for split, loader in loaders.items():
        texts = "".join(one.text for one in module.held_out(split)).replace(" ", "")
        first = bytes(token for token in next(iter(loader))[0].tolist() if token < 256)
        assert first.decode().replace(" ", "").split("file")[0] in texts
    assert module.val_dataloader().tokens[1:5].tobytes()[::2] == b"file"
    assert module.held_out("test") == read_corpus([folder]).part("test")


def test_data_are_described_by_their_content(refuses, folder):
    module = LanguageDataModule((str(folder),))
    found = module.digest()
    assert [(one.name, one.role, one.unit) for one in found] == [
        ("texts", "train", "bytes"),
        ("texts", "validation", "bytes"),
        ("texts", "test", "bytes"),
        ("tokens", "tokenizer", "tokens"),
    ]
    parts = [read_corpus([folder]).part(split) for split in ("train", "validation", "test")]
    assert [one.size for one in found[:3]] == [sum(len(d.text) for d in part) for part in parts]
    assert len(set(module.training_objects())) == len(parts[0])
    (folder / f"{parts[2][0].name}").write_text("another one")
    changed = LanguageDataModule((str(folder),)).digest()
    same = [one == other for one, other in zip(found, changed, strict=True)]
    assert same == [True, True, False, True]
    line = f"is not the one that was packed into {module.shards.folder}: remove that folder"
    refuses(GatesError, (line, lambda: module.held_out("test")))


def test_a_corpus_is_packed_once_for_each_state_of_its_files(folder, tmp_path, monkeypatch):
    packed = []

    def counted(*arguments, write=data_file.write_shards):
        packed.append(1)
        return write(*arguments)

    monkeypatch.setattr(data_file, "write_shards", counted)

    def prepare():
        module = LanguageDataModule((str(folder),), cache_folder=str(tmp_path / "cache"))
        module.prepare_data()
        module.setup("fit")
        return module.shards

    first = prepare()
    assert (prepare().digest, len(packed)) == (first.digest, 1)
    (folder / "0.txt").write_text("now something else")
    second = prepare()
    assert second.digest != first.digest
    assert len(packed) == 2
    os.utime(folder / "0.txt")
    assert prepare().digest == second.digest  # only its time has changed
    assert first.folder.parent == second.folder.parent == tmp_path / "cache"


def test_a_temporary_folder_goes_with_its_module(folder):
    module = LanguageDataModule((str(folder),))
    module.prepare_data()
    place = module.shards.folder
    assert place.is_dir()
    del module
    assert not place.parent.exists()


def test_what_cannot_be_trained_on_is_refused(folder, tmp_path, refuses):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "os.py").write_text("import abc")

    def shards(place=folder, **options):
        return lambda: LanguageDataModule((str(place),), **options).shards

    def loader(batch_size, world, context=10):
        return lambda: WindowLoader(TOKENS, context, batch_size, world=world)

    refuses(
        GatesError,
        ("one has 1 documents and none for validation, which the hash", shards(tmp_path / "one")),
        ("the train part of .* has .* tokens, a window has 100001", shards(context=100_000)),
        ("missing does not exist", shards(tmp_path / "missing")),
        ("tokenizer nothing is not found", shards(tokenizer="nothing")),
        ("batch_size 3 cannot be split evenly by 2 processes", loader(3, 2)),
        ("101 tokens have 1 windows of context 99 for 2 processes", loader(2, 2, 99)),
    )
    refuses(
        ValueError,
        ("context must be at least 1, got 0", lambda: LanguageDataModule(context=0)),
        ("batch_size must be at least 1, got 0", lambda: LanguageDataModule(batch_size=0)),
        ("seed must not be negative, got -1", lambda: LanguageDataModule(seed=-1)),
        ("corpus names nothing", lambda: LanguageDataModule(corpus=())),
    )
