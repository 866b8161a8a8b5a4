"""``gates language adapt``, ``predict``, ``export``, and the study of SoRA, on a tiny BERT."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close

from apps.language.adapter_study import headline
from harness.experiment import read_scores
from language.adapt.adapter_training import AdapterModule, outputs_of
from language.hf.classifier import encode_texts, open_classifier
from tests.fixtures.gates_in_folder import GatesInFolder

TINY = Path(__file__).parents[2] / "fixtures" / "tiny_bert.py"
SHORT = ("--model", "bert", "--rank", "3", "--steps", "12", "--batch_size", "8", "--context", "16",
         "--learning_rate", "0.02", "--gate_rate", "0.2")  # fmt: skip
CALL = ("language", "adapt", "--data", "texts", *SHORT)
SORA = "runs/language/bert/adapters/sora-r3-s0"
STUDY = {
    "study": "adapters",
    "tasks": ["texts"], "data": ".", "model": "bert", "ranks": [2], "seeds": [0], "rank": 3,
    "steps": 12, "batch_size": 8, "context": 16, "learning_rate": 0.02, "gate_rate": 0.2,
    "most_below": 0.5, "most_kept": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Commands in a folder with a model, texts, pairs, and a SoRA that was trained on texts."""
    folder, tiny = tmp_path_factory.mktemp("adapt"), runpy.run_path(str(TINY))
    tiny["write_bert"](folder / "bert")
    tiny["write_texts"](folder / "texts")
    tiny["write_pairs"](folder / "pairs")
    (folder / "study.yaml").write_text(yaml.safe_dump({"evaluate": STUDY}))
    gates = GatesInFolder(folder)
    gates.said = gates.succeed(*CALL).out
    return gates


def test_an_adapter_is_trained_kept_and_applied(place):
    assert "20 held-out rows occur in training" in place.said
    assert place.said.splitlines()[-1] == SORA
    record = json.loads((place.folder / SORA / "record.json").read_text())
    facts, rank = record["facts"], record["settings"]["rank"]
    assert record["settings"]["alpha"] == 2.0 * rank
    assert f"{facts['kept']} of 36 components, {facts['size']:,} parameters" in place.said
    assert f"{facts['drawn']:.0%} of them are among as many whose gates" in place.said
    assert "accuracy 1.0000 [" in place.said or "accuracy 0." in place.said
    assert "of 20 held-out rows, always the same 0.5000" in place.said
    assert place.succeed(*CALL).out.count("making") == 0  # nothing is trained again
    (place.folder / "new.txt").write_text("a fine film\n\nthe grim story\n")
    words = ("language", "predict", "--adapter", SORA, "--model", "bert", "--input")
    lines = place.succeed(*words, "new.txt").out.splitlines()
    assert [line.split("\t")[2] for line in lines] == ["a fine film", "the grim story"]
    assert {line.split("\t")[0] for line in lines} <= {"good", "bad"}
    table = place.succeed(*words, "texts/dev.tsv").out.splitlines()
    assert len(table) == 20


@pytest.mark.fault("46 S3")
def test_what_is_kept_is_what_was_asked_for(place):
    words = (*CALL, "--gate_rate", "0.4", "--kept", "0.3", "--name")
    said = place.succeed(*words, "third").out
    assert "11 of 36 components" in said
    assert "where --kept" not in said
    said = place.succeed(*words, "few", "--rank", "1").out
    assert "4 of 12 components" in said
    assert "33% of them are kept, where --kept is 0.3: no number of them is nearer" in said


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_peft_opens_what_is_exported(place):
    words = ("language", "export", "--adapter", SORA, "--model", "bert", "--output", "lora")
    assert place.succeed(*words).out.splitlines()[-1] == "lora"
    folder = place.folder / "lora"
    assert json.loads((folder / "labels.json").read_text()) == {"labels": ["bad", "good"]}
    base = open_classifier(place.folder / "bert", 2, seed=5)
    inputs = encode_texts(place.folder / "bert", [("a fine film",), ("the grim story",)], 16)
    opened = PeftModel.from_pretrained(base, folder).eval()
    chances = outputs_of(opened, inputs).softmax(1).max(1).values
    (place.folder / "two.txt").write_text("a fine film\nthe grim story\n")
    said = place.succeed("language", "predict", "--adapter", SORA, "--model", "bert", "--input",
                         "two.txt").out  # fmt: skip
    found = [float(line.split("\t")[1]) for line in said.splitlines()]
    torch.testing.assert_close(torch.tensor(found), chances, atol=1e-4, rtol=0)
    again = place(*words)
    assert (again.code, "lora exists: choose another --output" in again.err) == (2, True)


def test_two_texts_and_a_number(place):
    said = place.succeed("language", "adapt", "--data", "pairs", "--name", "pairs", "--method",
                         "head", *SHORT).out  # fmt: skip
    assert "pearson correlation" in said
    folder = place.folder / "runs/language/pairs/adapters/head-s0"
    assert set(load_file(folder / "adapter.safetensors")) == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"
    }  # fmt: skip
    said = place.succeed("language", "predict", "--adapter", folder, "--model", "bert", "--input",
                         "pairs/val.jsonl").out  # fmt: skip
    assert all(len(line.split("\t")) == 4 for line in said.splitlines())


def test_what_is_cut_off_ends_with_the_same_bits(refuses, place, cut_off):
    def adapter(name):
        folder = place.succeed(*CALL, "--name", name).out.splitlines()[-1]
        return load_file(place.folder / folder / "adapter.safetensors")

    calls = cut_off(AdapterModule, "training_step", 7)
    refuses(RuntimeError, ("cut off", lambda: adapter("cut")))
    found, number = adapter("cut"), len(calls)
    assert number == 12 + 1
    assert_close(adapter("whole"), found, rtol=0, atol=0)


def test_the_study_compares_equal_sizes(place):
    said = place.succeed("language", "evaluate", "--config", "study").out
    scores = read_scores(place.folder / "runs/language/study/scores.json", "language")
    found = {(r.method, r.metric): r.value for r in scores.rows if not r.versus}
    names = {"always the same", "head", "lora r2", "lora r3", "sora", "magnitude", "draw"}
    assert {r.method for r in scores.rows if r.metric == "accuracy" and not r.versus} == names
    size = found["sora", "parameters"]
    for name in ("magnitude", "draw"):
        assert size - 40 < found[name, "parameters"] <= size
    assert found["lora r2", "kept fraction"] == pytest.approx(2 / 3)
    assert 0 <= found["sora", "also kept by the draw"] <= 1
    versus = {r.method for r in scores.rows if r.versus == "sora" and r.metric == "accuracy"}
    assert versus == names - {"sora"}
    assert [bar.name for bar in scores.bars] == [
        "texts: accuracy of lora r3 less SoRA", "texts: kept fraction of parameters"
    ]  # fmt: skip
    assert "texts: SoRA keeps" in scores.headline
    assert "so that the gate selects is not shown" in scores.headline or (
        "so the gate selects" in scores.headline
    )
    assert found["always the same", "accuracy"] == 0.5
    assert "always the same 0.500; of rivals" in scores.headline
    for ratio, told in ((0.74, ""), (0.75, ", lora r2 with 75% of its parameters"), (1.26, "")):
        sizes = {"lora r2": ratio * size, "lora r3": 9 * size}
        rows = [r._replace(value=sizes.get(r.method, r.value)) if r.metric == "parameters" else r
                for r in scores.rows]  # fmt: skip
        assert f"size (draw, magnitude{told}) it is" in headline(rows, "texts", "lora r3")
    assert "also kept by the draw" in said
    record = place.folder / "runs/language/study/adapters/draw-task-texts-r3-s0/record.json"
    before = record.stat().st_mtime_ns
    place.succeed("language", "evaluate", "--config", "study")
    assert record.stat().st_mtime_ns == before


def test_misuse_is_one_line(place, faulty_inputs):
    shutil.copytree(place.folder / "texts", place.folder / "odd")
    broken = {"odd/train.tsv": "a\t1\nb\n", "odd/dev.tsv": "a\t1\n"}
    (place.folder / "odd/train.tsv").unlink()
    (place.folder / "odd/dev.tsv").unlink()

    def other(path):
        runpy.run_path(str(TINY))["write_bert"](path, seed=1)

    def begun(path):
        shutil.copytree(place.folder / SORA, path)

    left = "runs/language/new/adapters/.sora-r3-s0.partial"
    apply = ("language", "predict", "--input", "texts/dev.tsv", "--adapter")
    at = ("--name", "new")
    faulty_inputs(
        {
            "columns": (("language", "adapt", "--data", "odd", *SHORT, *at),
                        "line 2 has 1 columns, expected 2", broken),
            "rank 0": ((*CALL, *at, "--rank", "0"), "rank must be at least 1, got 0"),
            "threshold": ((*CALL, *at, "--threshold=-0.1"), "threshold must not be negative"),
            "a fixed target": ((*CALL, *at, "--kept", "0.3", "--threshold", "0.1"),
                               "--threshold 0.1 is fixed and --kept 0.3 moves it: set one of"),
            "nothing kept": ((*CALL, *at, "--kept", "0"), "kept must lie between 0 and 1, got 0.0"),
            "kept": ((*CALL, *at, "--kept", "1"), "kept must lie between 0 and 1, got 1.0"),
            "stages": ((*CALL, *at, "--stages", "5"), "--steps 12 is not a multiple of --stages 5"),
            "rate": ((*CALL, *at, "--gate_rate", "0"), "gate_rate must be positive, got 0.0"),
            "method": ((*CALL, *at, "--method", "full"), "method: expected"),
            "ranks": ((*CALL, *at, "--method", "draw", "--processes", "2"), "is made from others"),
            "batches": ((*CALL, *at, "--processes", "3"),
                        "--batch_size 8 is not a multiple of --processes 3"),
            "seed": ((*CALL, *at, "--seed=-1"), "--seed -1, expected 1 and 0 on"),
            "no model": ((*CALL, *at, "--model", "none"), "none holds no config.json"),
            "no data": ((*CALL, *at, "--data", "none"), "none is not a folder"),
            "other data": (("language", "adapt", "--data", "pairs", *SHORT),
                           "sora-r3-s0 was made with other settings (data"),
            "resumed with other data": (
                ("language", "adapt", "--data", "pairs", *SHORT, *at),
                "was begun with other settings (data", {left: begun}),
            "resumed by other processes": (
                (*CALL, *at, "--processes", "2"),
                "was begun with other settings (processes", {left: begun}),
            "other base": ((*apply, SORA, "--model", "cousin"),
                           "holds adapters of the base model", {"cousin": other}),
            "pairs": (("language", "predict", "--input", "pairs/val.jsonl", "--adapter", SORA,
                       "--model", "bert"), "has rows of 2 texts, the adapter was trained on rows"),
            "no adapter": ((*apply, "texts", "--model", "bert"), "texts has no record.json of an"),
            "no tasks": (("language", "evaluate", "--config", "study", "--tasks", "[]", *at),
                         "--tasks is [], --seeds [0]"),
            "a task twice": (("language", "evaluate", "--config", "study", "--tasks",
                              "[texts,texts]", *at), "--tasks is ['texts', 'texts'], --seeds [0]"),
            "nothing trained": (
                ("language", "evaluate", "--config", "study", "--quick", *at),
                "nothing was trained yet"),
        },
        folder=place.folder,
    )  # fmt: skip
