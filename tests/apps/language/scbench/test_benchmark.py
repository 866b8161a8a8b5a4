"""``gates language scbench``: what it writes, resumes, ranks and refuses."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from apps.language.scbench.asking import Questions
from language.scbench.retriever import retriever_tokenizer
from language.scbench.row_files import read_rows, write_rows
from language.scbench.tasks import generate
from tests.fixtures.gates_in_folder import GatesInFolder

SMALL = ("--length", 200, "--rows", 3, "--policy", "streaming")
RETRIEVER = ("language", "scbench", "--model", "retriever", *SMALL)
PREDICTIONS, TURNS = "predictions.jsonl", "kv (same form, other text), turns"


@pytest.fixture(scope="module")
def gates(tmp_path_factory):
    """Commands in a folder in which the retriever was asked, and where a random model is."""
    gates = GatesInFolder(tmp_path_factory.mktemp("scbench"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8193, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=2048, eos_token_id=8192, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(gates.folder / "random")
    retriever_tokenizer().save_pretrained(gates.folder / "random")
    rows = generate("kv", 3, 200, 5, retriever_tokenizer(), "symbols")
    write_rows(gates.folder / "data/scbench_kv.jsonl", rows)
    gates.said = gates.succeed(*RETRIEVER).out
    gates.run = gates.folder / "runs/language/retriever-scbench"
    return gates


def rows_of(folder):
    rows = json.loads((folder / "scores.json").read_text())["rows"]
    return {(r["task"], r["method"], r["metric"], r["versus"]): r for r in rows}


def answers(folder):
    return [json.loads(line) for line in (folder / PREDICTIONS).read_text().splitlines()]


def test_every_answer_is_written_once_in_order(gates):
    found = answers(gates.run)
    places = [[one[key] for key in ("task", "mode", "policy", "row", "turn")] for one in found]
    assert places == sorted(places)
    assert len({*map(tuple, places)}) == len(places) == 2 * 2 * 3 * 5
    for one in found:
        assert one["score"] == float(one["answer"] in one["prediction"])
    (rows,) = gates.run.glob("rows/kv-*.jsonl")
    assert [row.id for row in read_rows(rows, "kv")] == [0, 1, 2]


def test_timings_are_by_stage_and_apart(gates):
    lines = (gates.run / "timings.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 2 * 2 * 3
    assert set(first["seconds"]) == {"prefill", "compression", "question", "decoding"}
    assert (
        first["held_bytes"] == first["full_bytes"] == first["tokens"]["prefill"] * 2 * 2 * 128 * 4
    )
    assert "seconds" not in (gates.run / PREDICTIONS).read_text()


def test_full_stands_in_every_table_and_differences_are_paired_by_row(gates):
    rows = rows_of(gates.run)
    tasks = {task for task, *_ in rows}
    assert len(tasks) == 2 * 4
    assert {task for task, method, *_ in rows if method == "full"} == tasks
    gap = rows[TURNS, "streaming:keep=0.5", "accuracy", "full"]
    by_policy = {}
    for one in answers(gates.run):
        if one["mode"] == "turns":
            by_policy.setdefault(one["policy"], []).append(one["score"])
    means = [sum(scores) / len(scores) for scores in by_policy.values()]
    assert gap["value"] == pytest.approx(means[1] - means[0])
    assert gap["n"] == 3
    turns = [r["value"] for (task, method, *_), r in rows.items()
             if (task, method) == (f"{TURNS}: by turn", "streaming:keep=0.5")]  # fmt: skip
    assert sum(turns) / 5 == pytest.approx(means[1])
    assert rows[f"{TURNS}: cost", "streaming:keep=0.5", "MB held", None]["value"] < 0.5


def test_a_report_shows_accuracy_over_bytes(gates):
    table = (gates.run / "figures/accuracy-over-bytes.csv").read_text().splitlines()
    assert table[0].startswith("task,policy,bytes held of full,accuracy")
    cells = [line.rsplit(",", 6) for line in table[1:]]
    assert {cell[1]: round(float(cell[2]), 2) for cell in cells} == {
        "full": 1.0,
        "streaming:keep=0.5": 0.5,
    }
    assert (gates.run / "figures/accuracy-over-bytes.png").is_file()
    assert "Accuracy over bytes" in (gates.run / "report.html").read_text()


def test_order_changes_nothing(gates):
    few = (*RETRIEVER, "--rows", 1)
    gates.succeed(*few, "--name", "one", "--policy", "streaming,streaming:sinks=9")
    gates.succeed(*few, "--name", "two", "--policy", "streaming:sinks=9,full,streaming",
                  "--mode", "requests,turns,turns", "--task", "kv,kv")  # fmt: skip
    one, two = (gates.run.with_name(name) / PREDICTIONS for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    policies = {"full", "streaming:keep=0.5", "streaming:keep=0.5:sinks=9"}
    assert {answer["policy"] for answer in answers(one.parent)} == policies


def test_rows_of_files_may_have_any_order(gates):
    rows = generate("kv", 3, 200, 0, retriever_tokenizer(), "symbols")
    write_rows(gates.folder / "turned/scbench_kv.jsonl", rows[::-1])
    gates.succeed(*RETRIEVER, "--data", "turned", "--length", "2k", "--name", "turned")
    assert answers(gates.run.with_name("turned")) == answers(gates.run)


def test_more_rows_and_policies_keep_the_answers(gates):
    few = (*RETRIEVER, "--mode", "turns", "--name", "more", "--rows")
    gates.succeed(*few, 1)
    folder = gates.run.with_name("more")
    times = {path: path.stat().st_mtime_ns for path in folder.glob("answers/*/result.json")}
    said = gates.succeed(*few, 2, "--policy", "streaming,streaming:sinks=9").out
    assert "making 4 missing answers of 6" in said
    assert len(times) == 2
    assert times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.costly("three processes, two of them killed")
def test_killed_runs_end_with_the_same_predictions(kill_and_resume):
    words = ("--length", "3k", "--rows", "2", "--policy", "streaming", "--mode", "requests")
    kill_and_resume(
        ["language", "scbench", "--model", "retriever", *words],
        app="language",
        compare=(PREDICTIONS, "answers/*/result.json", "rows/*.jsonl"),
    )


def test_a_model_that_does_not_answer_is_not_ranked(gates):
    said = gates.succeed("language", "scbench", "--model", "random", "--data", "data", *SMALL,
                         "--length", "2k", "--mode", "turns", "--own_answers").out  # fmt: skip
    told = " ".join(said.split())
    said = f"{TURNS}: nothing is ranked, as full has 0.00 [0.00, 0.00], which reaches down to 0.25"
    assert said in told
    rows = rows_of(gates.run.with_name("random-scbench"))
    assert not any(versus for *_, versus in rows)
    assert (TURNS, "full", "score", None) in rows
    assert not any(metric == "accuracy" for _, _, metric, _ in rows)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--task", "vta"), "vta"),
        (("--policy", "snap"), "snap"),
        (("--policy", "streaming:sink=3"), "has no option 'sink'"),
        (("--keep", "0"), "above 0 and at most 1"),
        (("--keep", "1.5"), "above 0 and at most 1"),
        (("--policy", "full", "--keep", "0.5"), "--keep is given"),
        (("--length", "20k"), "reads at most 16384"),
        (("--length", "2.5k"), "tokens such as 300 or 2k"),
        (("--policy", "kivi:bits=3"), "bits"),
        (("--new_tokens", 2), "answers of 3 tokens at least"),
        (("--new_tokens", 0), "answers of 3 tokens at least"),
        (("--policy", "kivi:bits=4:bits=2"), "occurs twice"),
        (("--data", "nowhere"), "nowhere"),
        (("--data", "data", "--words"), "--words is of generated contexts"),
        (("--data", "data", "--rows", 9), "has 3 rows of kv, --rows is 9"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(gates, words, said):
    assert said in gates.refuse(*RETRIEVER, *words)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("streaming:sinks=101", "sinks of 'streaming' is 101, more than the 100 of 200 tokens"),
        ("snapkv:window=201", "window of 'snapkv' is 201, the prompt has 200 tokens"),
        ("a-shape:keep=0.5:sinks=100", "sinks of 'a-shape' is 100, expected fewer than the 100"),
        ("kivi:group=24", "group=24 of 'kivi' does not divide the 128 features"),
        ("seer", "has no block gates"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_answered(gates, policy, said):
    assert said in gates.refuse(*RETRIEVER, "--policy", policy, "--name", "unfit")
    assert not [*gates.run.with_name("unfit").glob("answers/*")]


def test_a_path_may_have_colons():
    _, policy = Questions(policy=(r"seer:gates=C:\g.safetensors:sinks=2",)).policies().values()
    assert (policy.gates, policy.sinks) == (r"C:\g.safetensors", 2)


def test_policies_of_the_same_settings_are_one():
    policy = ("kivi", "kivi:bits=4", "kivi:bits=4:group=32", "full", "kivi:bits=2")
    assert [*Questions(policy=policy).policies()] == ["full", "kivi", "kivi:bits=2"]


def test_a_tokenizer_of_another_model_is_refused_in_one_line(gates):
    config = LlamaConfig.from_pretrained(gates.folder / "random")
    config.vocab_size, config.eos_token_id = 100, None
    LlamaForCausalLM(config).save_pretrained(gates.folder / "narrow")
    retriever_tokenizer().save_pretrained(gates.folder / "narrow")
    command = ("language", "scbench", "--model", "narrow", "--data", "data", "--length", "2k")
    assert "the model has 100" in gates.refuse(*command, *SMALL[2:])


def test_another_model_or_other_data_is_not_mixed_in(gates):
    same = ("--name", "retriever-scbench")
    before = (gates.run / PREDICTIONS).read_bytes()
    line = gates.refuse("language", "scbench", "--model", "random", *SMALL, *same)
    assert "was made with other settings (" in line
    assert "weights" in line
    assert "(content " in gates.refuse(*RETRIEVER, "--seed", 1, *same)
    assert "content " in gates.refuse(*RETRIEVER, "--data", "data", "--length", "2k", *same)
    assert (gates.run / PREDICTIONS).read_bytes() == before
    gates.succeed(*RETRIEVER)
