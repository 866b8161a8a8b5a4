"""Windows of a packed corpus: order, ranks, resumption, the cache, and what is refused."""

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from threading import Event

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn
from torch.testing import assert_close

from core_gates.errors import GatesError
from harness.runs.callbacks import RunCheckpoint
from harness.runs.loops import ExactTrainer
from harness.runs.terminal import quiet_lightning
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
    assert found.shape == (windows, context + 1)
    assert found.dtype == torch.int64
    assert_close((found[:, 1:] - found[:, :-1]) % 101, torch.ones(windows, context).long())
    assert len(set(found[:, 1:].flatten().tolist())) == windows * context


def test_given_windows_are_those_from_the_first_token_on():
    loader = WindowLoader(TOKENS, 30, 2)
    found = [batch.tolist() for batch in batches(loader)]
    windows = [TOKENS[start : start + 31].tolist() for start in (0, 30, 60)]
    assert found == [windows[:2]]
    assert len(loader) == 1


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
    assert len(whole) == 4
    assert {len(part) for part in parts} == {4}
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


class Toy(L.LightningModule):
    """Records the windows that it sees, and learns from their order."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen, self.validated = [], 0

    def training_step(self, batch, index):
        self.seen.append(batch.tolist())
        return self.layer(batch[:, :1] / 100).square().mean()

    def validation_step(self, batch, index):
        self.validated += len(batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


def test_a_fit_of_seven_steps_that_is_killed_sees_the_same_batches(folder, tmp_path):
    quiet_lightning()

    def fit(name, steps):
        seed_everything(1)
        place, module = tmp_path / name, Toy()
        last = place / "checkpoints" / "last.ckpt"
        trainer = ExactTrainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=place,
            callbacks=[RunCheckpoint(every_n_steps=1)],
        )
        data = LanguageDataModule((str(folder),), context=100, batch_size=100, seed=3)
        assert len(data.train_dataloader()) == 3  # the steps span three epochs
        resume = str(last) if last.is_file() else None
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        return module

    whole = fit("whole", 7)
    assert len(whole.seen) == 7
    assert whole.validated
    parts = [fit("broken", stop) for stop in (2, 3, 5, 7)]
    assert list(chain(*(part.seen for part in parts))) == whole.seen
    assert_close(parts[-1].state_dict(), whole.state_dict(), rtol=0, atol=0)


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


def test_data_are_described_by_their_content(folder):
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
    with pytest.raises(GatesError, match=line):
        module.held_out("test")


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
    assert prepare().digest == first.digest
    assert len(packed) == 1
    (folder / "0.txt").write_text("now something else")
    second = prepare()
    assert second.digest != first.digest
    assert len(packed) == 2
    os.utime(folder / "0.txt")
    assert prepare().digest == second.digest  # only its time has changed
    assert first.folder.parent == second.folder.parent == tmp_path / "cache"


def test_who_comes_while_a_corpus_is_packed_waits_for_its_shards(folder, tmp_path, monkeypatch):
    cache, begun, packed = tmp_path / "cache", Event(), []

    def slow(*arguments, write=data_file.write_shards):
        begun.set()
        time.sleep(0.3)  # time for the other one to come
        packed.append(write(*arguments))
        return packed[-1]

    def prepare():
        module = LanguageDataModule((str(folder),), cache_folder=str(cache))
        module.prepare_data()
        return module.shards.folder

    monkeypatch.setattr(data_file, "write_shards", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(prepare)
        assert begun.wait(20)
        second = pool.submit(prepare)
        assert first.result() == second.result() == packed[0].folder
    assert len(packed) == 1
    assert [*cache.iterdir()] == [packed[0].folder]


def test_folders_that_look_alike_do_not_share_shards(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    for path in folder.iterdir():
        (other / path.name).write_text(path.read_text().replace("file", "line"))
        for one in (path, other / path.name):
            os.utime(one, (1, 1))

    def digest(place):
        module = LanguageDataModule((str(place),), cache_folder=str(tmp_path / "cache"))
        return module.shards.corpus_digest

    assert digest(folder) != digest(other)
    assert digest(folder) == digest(f"{folder}/../texts") == read_corpus([folder]).digest
    assert len(list((tmp_path / "cache").iterdir())) == 2


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
