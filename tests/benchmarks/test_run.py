import csv
import io
import json
import re
import subprocess
import time
from pathlib import Path

import jsonschema
import pytest
import torch
from rich.console import Console

import benchmarks.comparison
import benchmarks.run
from benchmarks.comparison import Comparison, Timing, Work, mixed
from benchmarks.run import main, measure, tables
from benchmarks.suites import SUITES, Suite, find_op, load_suite
from core_gates.errors import GatesError

ROOT = Path(__file__).parents[2]


SCHEMA = json.loads((ROOT / "docs/reference/benchmark.schema.json").read_text())


def sums(load):
    small, large = torch.rand(1000), torch.rand(1000, 200)
    return {"small": lambda: small.cumsum(0), "large": lambda: large.cumsum(0)}


def comparison(**options):
    return Comparison("sums", "cumsum", sums, "small", work=Work(bytes=8000.0), **options)


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr(benchmarks.run, "SAMPLE_SECONDS", 0.002)


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """Replace every suite by one comparison; results go to a temporary folder."""

    def replace(*comparisons, tests=("tests/none.py",)):
        only = Suite("toy", tests, lambda: comparisons)
        monkeypatch.setattr(benchmarks.run, "load_suite", lambda name: only)
        monkeypatch.setattr(benchmarks.run, "ROOT", tmp_path / "benchmarks")

    return replace


def test_rows_hold_ratio_limit_and_verdict():
    small, large = measure(comparison(bars={"large": 1.0, "small": 1.0}), rounds=3)
    assert (small["name"], (small["ratio"], small["met"])) == ("sums · small", (1.0, True))
    assert large["ratio"] > 5
    assert large["met"] is False
    assert large["baseline"] == "small"
    assert small["share_of_limit"] == pytest.approx(small["limit"] / small["value"])


def test_times_are_for_one_unit_of_work():
    rows = measure(comparison(units={"large": 200.0}, unit="column"), rounds=3)
    plain = measure(comparison(), rounds=3)
    assert rows[1]["unit"] == "ms/column"
    assert rows[1]["ratio"] < plain[1]["ratio"] / 20
    assert rows[0]["ratio"] == 1.0


def test_single_calls_in_turn_and_mixtures_of_them():
    order = []

    def build(load):
        return {name: (lambda name=name: order.append(name)) for name in ("a", "b")}

    mixtures = {"both": {"a": 0.75, "b": 0.25}}
    one = Comparison("x", "x", build, "a", bars={"both": 1e9}, single_calls=5, mixtures=mixtures)
    rows = {row["name"]: row for row in measure(one, rounds=3)}
    assert "".join(order) == "aabb" + "abba" * 7 + "ab"
    assert list(rows) == ["x · a", "x · b", "x · both"]
    assert rows["x · both"]["met"] is True
    timings = {"a": Timing([4.0, 8.0], 1.0), "b@old": Timing([8.0, 4.0], 3.0)}
    timings["a@old"] = timings["a"]
    assert mixed(timings, mixtures["both"], "old") == Timing([5.0, 7.0], 1.5)


def test_an_absent_baseline_leaves_bars_unmeasured():
    one = Comparison("sums", "x", sums, "x", bars={"small": 1.0}, absent={"x": "buy it"})
    small, large, absent = measure(one, rounds=2)
    assert (small["baseline"], small["ratio"], small["bar"], small["met"]) == (
        None,
        None,
        1.0,
        None,
    )
    assert small["value"] > 0
    assert large["bar"] is None
    assert absent["name"] == "sums · x: buy it"
    assert {absent[key] for key in ("value", "baseline", "ratio", "bar", "met")} == {None}
    console = Console(file=io.StringIO(), width=80)
    console.print(tables("x", {"device": "d", "rows": [small, absent]}))
    assert re.search(r"small .* <= 1 not measured *\n", console.file.getvalue())


def test_rates_are_units_of_work_in_a_second():
    rows = measure(comparison(units={"large": 200.0}, rate="columns/s"), rounds=3)
    assert [row["name"].partition(" · ")[2] for row in rows] == [
        "small",
        "small, rate",
        "large",
        "large, rate",
    ]
    assert rows[3]["unit"] == "columns/s"
    assert rows[3]["value"] == pytest.approx(1e3 / rows[2]["value"])


@pytest.mark.parametrize(("threads", "clock"), [(1, time.process_time), (2, time.perf_counter)])
def test_one_thread_is_timed_by_its_own_seconds(threads, clock, monkeypatch):
    """Others on the machine take wall time from a thread, but no CPU time."""
    taken = {}

    def interleave(calls, **options):
        taken.update(options)
        return benchmarks.comparison.interleave(calls, rounds=2)

    monkeypatch.setattr(benchmarks.run, "interleave", interleave)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    measure(comparison(), device=torch.device("cpu"))
    assert taken["clock"] is clock
    assert taken["first_clock"] is time.perf_counter


def test_output_files_follow_the_schema(suite, tmp_path, capsys):
    suite(comparison(bars={"large": 1e9}, first_calls=("large",)))
    path = tmp_path / "out.json"
    assert main(["--suite", "core", "--force", "--json", str(path), "--rounds", "2"]) == 0
    content = json.loads(path.read_text())
    jsonschema.validate(content, SCHEMA)
    assert [row["name"] for row in content["rows"]] == [
        "sums · small",
        "sums · large",
        "sums · large, first call",
    ]
    (table,) = (tmp_path / "benchmarks" / "results").glob("toy-*.csv")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert (len(rows), rows[0]["device"]) == (3, content["device"])
    assert "met" in capsys.readouterr().out


@pytest.mark.parametrize(("body", "code"), [("assert True", 0), ("assert False", 1)])
def test_red_tests_refuse_unless_forced(suite, tmp_path, capfd, monkeypatch, body, code):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "test_it.py").write_text(f"def test_it():\n    {body}\n")
    suite(comparison(), tests=("test_it.py",))
    assert main(["--suite", "core", "--rounds", "2"]) == code
    assert ("--force" in capfd.readouterr().out) == bool(code)
    assert main(["--suite", "core", "--rounds", "2", "--force"]) == 0


def test_what_does_not_fit_into_memory_is_skipped(suite, capsys):
    def explode(load):
        raise AssertionError("built")

    suite(Comparison("huge", "x", explode, "a", memory=1e15))
    assert main(["--suite", "core", "--force"]) == 0
    assert "huge: skipped" in capsys.readouterr().out


def test_suites_and_ops_are_found_or_named(refuses):
    assert "core" in SUITES
    found = list(find_op("block_max_attention").comparisons())
    assert {c.op for c in found} == {"block_max_attention"}
    assert len({c.name for c in found}) == len(found) == 1  # though in two suites
    parts = ("core_moe", "adapters", "core_attention")
    assert len(list(load_suite("core").comparisons())) == sum(
        len(list(load_suite(part).comparisons())) for part in parts
    )
    refuses(
        GatesError,
        (r"unknown suite 'cor': choose from .*core", lambda: load_suite("cor")),
        (r"no suite compares the op 'x': choose from .*silu_gate", lambda: find_op("x")),
    )


@pytest.mark.parametrize("suite_name", SUITES)
def test_the_tests_of_a_suite_exist(suite_name):
    suite = load_suite(suite_name)
    assert suite.tests
    assert all((ROOT / path).exists() for path in suite.tests)


@pytest.fixture
def repository(tmp_path):
    """A repository whose first revision has another op than its working tree."""
    folder = tmp_path / "repository"
    package = folder / "core_gates" / "ops"
    package.mkdir(parents=True)
    (folder / "core_gates" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("from core_gates.ops.factor import FACTOR\n")
    (package / "factor.py").write_text("import core_gates\nFACTOR = 3\nNAME = 'core_gates::x'\n")
    run = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*run[:3], "init", "-q"], check=True)
    subprocess.run([*run, "add", "."], check=True)
    subprocess.run([*run, "commit", "-qm", "first"], check=True)
    (package / "factor.py").write_text("FACTOR = 4\n")
    return folder


def test_another_revision_lives_beside_this_one(repository, tmp_path):
    tree = benchmarks.comparison.BaseTree("HEAD", tmp_path / "base", repository)
    assert tree("core_gates.ops").FACTOR == 3
    assert tree("core_gates.ops.factor").NAME == "core_gates_base::x"
    assert benchmarks.comparison.load_head("core_gates.ops").__name__ == "core_gates.ops"
    with pytest.raises(GatesError, match="--base 'nothing' cannot be read"):
        benchmarks.comparison.BaseTree("nothing", tmp_path / "other", repository)


def test_base_rows_hold_each_variant_against_its_former_self(repository, tmp_path):
    def build(load):
        factor = load("core_gates.ops").__dict__.get("FACTOR", 1)
        x = torch.rand(1000, 20)
        return {"only": lambda: [x.cumsum(0) for _ in range(factor)]}

    tree = benchmarks.comparison.BaseTree("HEAD", tmp_path / "base", repository)
    head, base = measure(Comparison("sums", "x", build, "only"), tree, "HEAD", rounds=3)
    assert (head["baseline"], base["name"]) == ("only@HEAD", "sums · only@HEAD")
    assert head["ratio"] < 0.7
    assert base["ratio"] == 1.0


def test_the_tail_of_single_calls_has_a_bar(monkeypatch):
    seconds = [0.01] * 98 + [0.02, 0.04]
    timing = {"slow now and then": Timing(seconds, 0.0), "steady": Timing([0.01] * 100, 0.0)}
    monkeypatch.setattr(benchmarks.run, "interleave", lambda *_, **__: timing)
    calls = dict.fromkeys(timing, lambda: None)
    tails = {"slow now and then": 1.5, "steady": 1.0}
    rows = measure(Comparison("tail", "tail", lambda _: calls, "steady", tails=tails), rounds=1)
    late, steady = rows[-2:]
    assert late["name"] == "tail · slow now and then, 99th percentile"
    assert (late["baseline"], late["unit"]) == ("slow now and then", "ms/call")
    assert late["ratio"] == pytest.approx(late["value"] / 10) == pytest.approx(2.02, abs=0.01)
    assert (late["met"], steady["met"], steady["ratio"]) == (False, True, 1.0)
    jsonschema.validate({"device": "cpu", "rows": rows}, SCHEMA)
