"""A ranker that is trained further: what grows, what stays bit-equal, what is saved."""

import numpy as np
import polars as pl
import pytest
import torch

from core_gates.errors import GatesError
from recsys.daily import DailyState, continue_from, restore
from recsys.embedding.row_wise_adagrad import RowWiseAdagrad
from recsys.ranker_module import MultiTaskModule
from recsys.schema import Dense, FeatureSchema, Sparse, Task
from recsys.transform import FeatureTransform

SCHEMA = FeatureSchema(
    tasks=(Task("click"), Task("like")),
    sparse=(Sparse("user", side="user"), Sparse("item", dim=3, side="item"), Sparse("hour")),
    dense=(Dense("length"),),
    dim=4,
    user="user",
)
OPTIONS = {"dim": 6, "hidden_dims": [8], "rank": [2, 2], "tower_dims": [4]}


def rows(number, seed, users=(0, 30), items=(0, 40)):
    draw = np.random.default_rng(seed)
    user, item = draw.integers(*users, number), draw.integers(*items, number)
    labels = draw.random((number, 2)) < 0.3 + 0.1 * (user % 3)[:, None]
    return pl.DataFrame(
        {
            "user": user, "item": item, "hour": draw.integers(0, 24, number),
            "length": draw.gamma(2.0, 10.0, number), "click": labels[:, 0], "like": labels[:, 1],
        }
    )  # fmt: skip


def module(**options):
    return MultiTaskModule(
        "HoME", OPTIONS, learning_rate=0.01, embedding_learning_rate=0.1, **options
    )


def train(made, transform, optimizer, tables):
    made.ranker.train()
    for table in tables:
        batch = transform.batch(table)
        optimizer.zero_grad()
        made.loss(made(batch), batch.labels, batch.mask, batch.weight).sum().backward()
        optimizer.step()


@pytest.fixture
def first():
    """A module after some steps, its optimizer and its transform."""
    torch.manual_seed(0)
    made, transform = module(), FeatureTransform(SCHEMA).fit(rows(400, 0))
    made.build(transform)
    optimizer = made.configure_optimizers()
    train(made, transform, optimizer, [rows(64, seed) for seed in range(4)])
    return made, optimizer, transform


def state_of(first):
    made, optimizer, transform = first
    return DailyState.of(made, optimizer.state_dict(), transform)


def test_known_rows_and_accumulators_keep_their_bits(first):
    made, _, old = first
    torch.manual_seed(5)
    grown = module()
    transform = continue_from(grown, state_of(first), rows(300, 9, (20, 50), (30, 70)))
    assert transform.sizes["user"] > old.sizes["user"]
    assert transform.sizes["hour"] == old.sizes["hour"]
    before, after = (m.ranker.banks[0].named_tables() for m in (made, grown))
    sums_before, sums_after = (sums_of(m, o) for m, o in ((made, first[1]), (grown, None)))
    for name, table in before.items():
        assert len(after[name]) == transform.sizes[name]
        assert torch.equal(after[name][: len(table)], table)
        assert torch.equal(sums_after[name][: len(table)], sums_before[name])
        assert (sums_after[name][len(table) :] == 0).all()
        assert sums_before[name].max() > 0
    values = pl.Series(range(30))
    table = old.tables["user"].lookup(values)
    assert (transform.tables["user"].lookup(values)[table >= 2] == table[table >= 2]).all()


def sums_of(made, optimizer):
    """The accumulators of each table by its name."""
    optimizer = optimizer or made.configure_optimizers()
    adagrad = next(o for o in optimizer.optimizers if isinstance(o, RowWiseAdagrad))
    bank = made.ranker.banks[0]
    found = {}
    for block in bank._blocks.values():
        sums = adagrad.state[bank.stacks[str(block.dim)].weight]["sum"]
        found[block.name] = sums[block.start : block.start + block.rows]
    return found


def test_a_day_without_new_values_is_as_if_training_had_gone_on(first, tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    state_of(first).save(folder)
    grown = module()
    transform = continue_from(grown, DailyState.load(folder), rows(200, 0))
    assert transform.sizes == first[2].sizes
    more = [rows(64, seed) for seed in (11, 12)]
    train(first[0], first[2], first[1], more)
    train(grown, transform, grown.configure_optimizers(), more)
    expected = first[0].state_dict()
    assert all(torch.equal(expected[name], t) for name, t in grown.state_dict().items())


def test_new_values_are_learned(first):
    new = rows(64, 3, (100, 130), (100, 130))
    grown = module()
    transform = continue_from(grown, state_of(first), new)
    start = {name: t.clone() for name, t in grown.ranker.banks[0].named_tables().items()}
    train(grown, transform, grown.configure_optimizers(), [new] * 3)
    moved = grown.ranker.banks[0].named_tables()["user"] - start["user"]
    old = first[2].sizes["user"]
    assert (moved[2:old] == 0).all()
    assert (moved[old:].abs().sum(1) > 0).all()


def test_saved_states_predict_alike(first, tmp_path):
    state = state_of(first)
    tmp_path.joinpath("state").mkdir()
    state.save(tmp_path / "state")
    loaded = DailyState.load(tmp_path / "state")
    assert loaded.optimizer.keys() == state.optimizer.keys()
    assert all(torch.equal(loaded.optimizer[n], t) for n, t in state.optimizer.items())
    batch = first[2].batch(rows(50, 21))
    found = [restore(module(), one).eval()(batch) for one in (state, loaded)]
    assert torch.equal(*found)
    with pytest.raises(GatesError, match=r"state.safetensors is missing or damaged"):
        DailyState.load(tmp_path)


def test_averages_of_weights_continue(first):
    torch.manual_seed(0)
    made, transform = module(ema=0.9), first[2]
    made.build(transform)
    made.average.steps += 7
    grown = module(ema=0.9)
    state = DailyState.of(made, made.configure_optimizers().state_dict(), transform)
    continue_from(grown, state, rows(100, 4, (60, 90)))
    assert int(grown.average.steps) == 7
