"""ListOps: values of trees, what is drawn, how it is split, and what is refused."""

import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from core_gates.errors import GatesError
from language.seqboat.listops import (
    FILES,
    NUMBERS,
    PRESETS,
    SYMBOLS,
    ListOpsData,
    TreeSettings,
    draw_rows,
    draw_splits,
    majority,
    majority_by_root,
    read_tsv,
    root_on_digits,
    trees_of,
    value_of,
    write_splits,
)
from language.seqboat.sequences import Part

SMALL = TreeSettings(10, 40, (900, 60, 40), max_args=4, max_depth=4)


def in_order(work, calls):
    return [work(*call) for call in calls]


def backwards_in_two_processes(work, calls):
    """As another machine may do it: the last piece first."""
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        waiting = [pool.submit(work, *call) for call in [*calls][::-1]]
        return [one.result() for one in waiting][::-1]


def by_a_stack_machine(text):
    """Read from the last token to the first; operands are then on the stack."""
    stack = []
    for token in reversed(text.split()):
        if not token.startswith("["):
            stack.append(token)
            continue
        values = []
        while (top := stack.pop()) != "]":
            values.append(int(top))
        if token == "[SM":
            result = int(str(sum(values))[-1])
        elif token == "[MED":
            result = int(statistics.median(values))
        else:
            result = sorted(values)[-1 if token == "[MAX" else 0]
        stack.append(str(result))
    (value,) = stack
    return int(value)


def test_2500_trees_agree_with_a_stack_machine():
    narrow = TreeSettings(5, 300, (1, 1, 1), max_args=5, seed=7)
    rows = [row for n in range(8) for row in draw_rows(PRESETS["tiny"], n)]
    rows += [row for n in range(2) for row in draw_rows(narrow, n)]
    assert len(rows) == 2500
    for row in rows:
        tree, value = row.split("\t")
        assert by_a_stack_machine(tree) == int(value)
    assert all(50 <= len(row.split()) - 1 <= 200 for row in rows[:2000])
    roots = [row.split()[0] for row in rows]
    assert all(550 < roots.count(operator) < 700 for operator in SYMBOLS[:4])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[MED 1 8 2 5 ]", 3),
        ("[MED 9 1 4 ]", 4),
        ("[SM 9 8 [SM 5 5 ] ]", 7),
        ("[MIN 3 ]", 3),
        ("6", 6),
    ],
)
def test_values_of_trees(text, value):
    assert value_of(text.split()) == value


def test_trees_keep_to_arguments_and_levels():
    for row in draw_rows(SMALL, 0):
        arguments, levels = [], []
        for token in row.split("\t")[0].split():
            if token == "]":
                arguments.append(levels.pop())
                continue
            if levels:
                levels[-1] += 1
            assert len(levels) + 1 <= (3 if token.startswith("[") else 4)
            if token.startswith("["):
                levels.append(0)
        assert {*arguments} <= {2, 3, 4}


def test_lengths_are_those_of_rejection():
    """The draw that gives up early draws from the same distribution as one that never does."""
    random = np.random.default_rng(0)

    def length(depth):
        if depth == 4 or (depth > 1 and random.random() > 0.25):
            return 1
        return 2 + sum(length(depth + 1) for _ in range(random.integers(2, 5)))

    wanted = [n for n in (length(1) for _ in range(9000)) if 10 <= n <= 40]
    drawn = [len(row.split()) - 1 for n in range(8) for row in draw_rows(SMALL, n)]
    assert np.mean(drawn) == pytest.approx(np.mean(wanted), abs=0.6)
    assert np.std(drawn) == pytest.approx(np.std(wanted), abs=0.6)


def test_the_same_seed_writes_the_same_bytes_from_any_number_of_processes(tmp_path):
    for name, run in (("a", in_order), ("b", backwards_in_two_processes)):
        write_splits(tmp_path / name, draw_splits(SMALL, run))
    other = TreeSettings(10, 40, (900, 60, 40), max_args=4, max_depth=4, seed=1)
    write_splits(tmp_path / "c", draw_splits(other, in_order))
    for name in FILES.values():
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes()
        assert content != (tmp_path / "c" / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_no_tree_is_in_two_splits_and_none_twice():
    few = TreeSettings(4, 4, (300, 40, 40), max_depth=2)  # of the 400 that there are
    for settings in (SMALL, few):
        splits = draw_splits(settings, in_order)
        rows = [row for split in splits.values() for row in split]
        assert [len(rows) for rows in splits.values()] == [*settings.sizes]
        assert len({*rows}) == len(rows) == sum(settings.sizes)


def test_files_are_read_as_they_were_written(tmp_path):
    splits = draw_splits(SMALL, in_order)
    write_splits(tmp_path / "trees", splits)
    data = ListOpsData(str(tmp_path / "trees"), batch_size=8)
    data.setup("fit")
    assert (data.symbols, len(data.classes)) == (16, 10)
    for split, rows in splits.items():
        part = data.part(split)
        texts = [" ".join(SYMBOLS[number - 1] for number in x) for x in part.inputs]
        assert [f"{t}\t{y}" for t, y in zip(texts, part.labels, strict=True)] == rows
    batch = next(iter(data.train_dataloader()))
    assert int(batch.x.min()) == 0
    assert bool((batch.x.eq(0) == batch.padding_mask).all())
    assert not {*data.training_objects()} & {*data.test_objects()}


def test_majorities_on_trees_of_the_preset():
    rows = [row for n in range(12) for row in draw_rows(PRESETS["tiny"], n)]
    inputs = [np.array([NUMBERS[token] for token in row.split()[:-1]]) for row in rows]
    labels = np.array([int(row[-1]) for row in rows])
    train, test = (Part(inputs[a::2], labels[a::2], []) for a in (0, 1))
    assert majority(train, test).mean() == pytest.approx(0.16, abs=0.03)
    assert majority_by_root(train, test).mean() == pytest.approx(0.335, abs=0.04)
    label = np.bincount(train.labels).argmax()
    assert majority(train, test).tolist() == [float(y == label) for y in test.labels]


@pytest.mark.fault("48 sceptic")
def test_the_operator_on_its_digits_leaves_deeper_ones_out():
    trees = (
        "[MAX 1 [MIN 9 8 ] 5 ]",
        "[SM [MAX 3 4 ] 6 7 ]",
        "[MIN [MAX 2 1 ] ]",
        "7",
        "[MED 4 2 ]",
    )
    inputs = [np.array([NUMBERS[token] for token in tree.split()]) for tree in trees]
    for labels, right in (([5, 3, 2, 7, 3], [1, 1, 0, 0, 1]), ([8, 7, 0, 0, 4], [0] * 5)):
        assert root_on_digits(Part(inputs, np.array(labels), [])).tolist() == right


def test_what_is_no_tree_is_named_with_its_line(tmp_path, refuses):
    def reading(text, header="Source\tTarget\n"):
        path = tmp_path / "basic_train.tsv"

        def read():
            path.write_text(header + text)
            return trees_of(read_tsv(path))

        return read

    refuses(
        GatesError,
        ("tsv, line 2: 1 operators are not closed by ]", reading("[MAX 1 [MIN 2 3 ]\t3")),
        ("line 3: token 5 is a ], but no operator is", reading("[SM 1 ]\t1\n[MAX 1 2 ] ]\t2")),
        ("token 1 is '.MEAN', expected a digit from 0 to 9", reading("[MEAN 1 2 ]\t1")),
        ("token 3 is '10', expected a digit", reading("[MAX 1 10 ]\t10")),
        ("the .SM that ends at token 3 has no arguments", reading("[MAX [SM ] 1 ]\t1")),
        *(
            ("line 3: parentheses do not match", reading(f"1\t1\n{tree}\t2"))
            for tree in ("( [MAX 1 ) 2 ) ]", "( [MAX ( 1 ) 2 ]", ") [MAX 1 2 ] (")
        ),
        ("2 values in a line, expected one tree", reading("1 2\t1")),
        ("0 values in a line, expected one tree", reading("\t1")),
        ("the tree gives 3, but its label is '4'", reading("[MAX 3 2 ]\t4")),
        ("line 2: expected a tree, a tab and its value", reading("[MAX 3 2 ] 3")),
        ("line 1: it is 'Target.tSource', expected", reading("3\t3", "Target\tSource\n")),
        ("line 1: it is '', expected", reading("", "")),
        ("has no basic_train.tsv: make it by gates", ListOpsData(str(tmp_path / "a")).read),
    )


def test_settings_that_give_no_trees_are_refused(refuses):
    sizes = (1, 1, 1)
    refuses(
        ValueError,
        ("max_args must be at least 2, got 0", lambda: TreeSettings(9, 20, sizes, max_args=0)),
        ("max_depth must be at least 2, got 1", lambda: TreeSettings(9, 20, sizes, max_depth=1)),
        ("min_length must be at least 4, got 3", lambda: TreeSettings(3, 20, sizes)),
        ("max_length must be at least min_length, 9", lambda: TreeSettings(9, 8, sizes)),
        ("validation must be at least 1", lambda: TreeSettings(9, 20, (1, 0, 1))),
        ("seed must not be negative", lambda: TreeSettings(9, 20, sizes, seed=-1)),
    )
    binary = TreeSettings(5, 6, sizes, max_args=2)  # all lengths are 1 more than multiples of 3
    shallow = TreeSettings(13, 50, sizes, max_depth=2)  # 12 tokens at most
    few = TreeSettings(4, 4, (390, 10, 10), max_depth=2)
    refuses(
        GatesError,
        ("none of 20,000 random trees has 5 to 6 tokens", lambda: draw_rows(binary, 0)),
        ("has 13 to 50 tokens, with at most 10 arguments and 2", lambda: draw_rows(shallow, 0)),
        (
            "random trees of 4 to 4 tokens are (399|400) different",
            lambda: draw_splits(few, in_order),
        ),
    )
