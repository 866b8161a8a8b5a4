"""ListOps from the command line: trees that are made, learned and refused."""

import json
import re

import numpy as np
import pytest
import yaml

from apps.language.seqboat.listops_study import depth
from tests.apps.language.seqboat.conftest import CONFIG

FRONT = {
    "class_path": "language.seqboat.front_ends.SymbolEmbedding",
    "init_args": {"dim": 8, "vocab_size": 16},
}
DATA = {
    "class_path": "language.seqboat.listops.ListOpsData",
    "init_args": {"folder": "trees", "batch_size": 8},
}
PREPARE = {"lengths": [8, 40], "sizes": [40, 8, 8], "max_depth": 4}


@pytest.fixture
def listops(gates):
    """``gates`` in a folder with the configuration ``trees``, and no trees yet."""
    content = json.loads(json.dumps({**CONFIG, "data": DATA, "prepare": PREPARE}))
    content["model"]["model"]["init_args"] |= {"front": FRONT, "outputs": 10}
    del content["evaluate"]
    (gates.folder / "trees.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return gates


def test_prepared_trees_are_learned(listops):
    words = ("--config", "trees")
    assert "make it by gates language prepare" in listops.refuse("language", "fit", *words)
    out = listops.succeed("language", "prepare", *words).out
    assert re.search(r"^train +40 trees +[\d,]+ tokens$", out, re.MULTILINE)
    assert len(re.findall(r"^accuracy of the most frequent label.*: [01]\.\d{3}$", out, re.M)) == 2
    assert {p.name for p in (listops.folder / "trees").iterdir()} == {
        "basic_train.tsv", "basic_val.tsv", "basic_test.tsv",
    }  # fmt: skip
    kept = (listops.folder / "trees/basic_test.tsv").read_bytes()
    listops.succeed("language", "prepare", *words, "--overwrite_output", "--seed_everything", "5")
    assert (listops.folder / "trees/basic_test.tsv").read_bytes() == kept
    out = listops.succeed("language", "fit", *words).out
    assert out.splitlines()[-1] == "runs/language/trees/weights/configured-s0"


def test_evaluate_compares_with_what_the_root_tells(listops):
    words = ("--config", "trees", "--study", "listops", "--seeds", "0,1")
    listops.succeed("language", "prepare", "--config", "trees")
    out = listops.succeed("language", "evaluate", *words).out
    rows = json.loads((listops.folder / "runs/language/trees/scores.json").read_text())["rows"]
    plain = {(r["task"], r["method"]): r["value"] for r in rows if not r["versus"]}
    assert {method for task, method in plain if task == "test"} == {
        "majority", "majority by operator", "operator on its digits", "seqboat",
    }  # fmt: skip
    trees = (listops.folder / "trees/basic_test.tsv").read_text().splitlines()[1:]
    held = {name for name in ("MAX", "MIN", "MED", "SM") if any(f"[{name}" in t[:8] for t in trees)}
    assert {task for task, _ in plain if task.startswith("root")} == {f"root {n}" for n in held}
    assert any(task.startswith("depth") for task, _ in plain)
    assert plain["test", "seqboat"] <= 1
    assert "of the trees, " in out
    assert depth(np.array([1, 6, 7, 2, 8, 9, 5, 5])) == 2  # [MAX 0 1 [MIN 2 3 ] ]
    assert 0 <= plain["activation", "seqboat"] <= 1
    listops.succeed("language", "report", "--config", "trees")
    drawn = listops.folder / "runs/language/trees/figures"
    header, *rows = (drawn / "tree.csv").read_text().splitlines()
    assert header == "symbol,layer1,layer2"
    shown = " ".join(row.partition(",")[0] for row in rows)
    assert shown == min((tree.partition("\t")[0] for tree in trees), key=lambda t: t.count(" "))
    assert {row.partition(",")[2] for row in rows} <= {"0,0", "0,1", "1,0", "1,1"}
    assert (drawn / "tree.png").stat().st_size > 2_000  # as coarse as tests draw


def test_what_activation_earns_on_trees(listops):
    words = ("--config", "trees", "--study", "activation", "--seeds", "0")
    listops.succeed("language", "prepare", "--config", "trees")
    out = listops.succeed("language", "evaluate", *words).out
    assert "Learned gates have accuracy" in out
    listops.succeed("language", "report", "--config", "trees")
    assert not (listops.folder / "runs/language/trees/figures/tree.png").exists()


def test_faulty_calls_are_refused_in_one_line(listops, faulty_inputs):
    listops.succeed("language", "prepare", "--config", "trees")
    (listops.folder / "other").mkdir()
    (listops.folder / "other/letter.txt").write_text("dear")
    fit, prepare = (["language", verb, "--config", "trees"] for verb in ("fit", "prepare"))
    new, model = [*prepare, "--data.init_args.folder", "new"], "--model.model.init_args."
    faulty_inputs(
        {
            "arguments": ([*new, "--max_args", "0"], "max_args must be at least 2, got 0"),
            "lengths": ([*new, "--lengths", "[900,990]"], "none of 20,000 random trees has 900"),
            "order": ([*new, "--lengths", "[30,20]"], "max_length must be at least min_length"),
            "seed": ([*new, "--seed", "-1"], "seed must not be negative"),
            "taken": (prepare, "trees exists: choose another --data.init_args.folder"),
            "strangers": (
                [*prepare, "--data.init_args.folder", "other", "--overwrite_output"],
                "other holds 'letter.txt', which is no older output",
            ),
            "speech": (["language", "prepare", "--config", "small"], "found SpeechData: give"),
            "symbols": (
                [*fit, f"{model}front.init_args.vocab_size", "12"],
                "the data have 16 symbols, but the model 12: set",
            ),
            "front": (
                [*fit, f"{model}front", "language.seqboat.front_ends.FrameProjection",
                 f"{model}front.init_args.dim", "8"],
                "the data are symbols, but the front end is a FrameProjection: set",
            ),
        },
        folder=listops.folder,
    )  # fmt: skip


def test_faulty_lines_are_refused_in_one_line(listops, faulty_inputs):
    content = yaml.safe_load((listops.folder / "trees.yaml").read_text())
    content["data"] = {
        "class_path": "language.seqboat.lra_files.LraData",
        "init_args": {"folder": "lra", "kind": "trees", "batch_size": 2},
    }
    (listops.folder / "lra.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def fault(words, tree, labels="2\n", kind="trees"):
        files = {f"lra/{s}.{e}": "1\n" for s in ("valid", "test") for e in ("src", "label")}
        files |= {"lra/train.src": f"{tree}\n", "lra/train.label": labels}
        words_ = ["language", "fit", "--config", "lra", "--data.init_args.kind", kind]
        return (words_, words, files)

    faulty_inputs(
        {
            "open": fault("train.src, line 1: 1 operators are not closed", "[MAX 1 2"),
            "closed": fault("token 5 is a ], but no operator is open", "[MAX 1 2 ] ]"),
            "operator": fault("token 1 is '[AVG', expected a digit", "[AVG 1 2 ]"),
            "digit": fault("token 3 is '10', expected a digit from 0 to 9", "[MAX 1 10 ]"),
            "arguments": fault("the [MAX that ends at token 2 has no arguments", "[MAX ]"),
            "short": fault("train.label has 1 lines, but train.src 2", "[MAX 1 2 ]\n1"),
            "one class": fault("the data have the class '1' alone", "1\n2", "1\n1\n", "bytes"),
        },
        folder=listops.folder,
    )
