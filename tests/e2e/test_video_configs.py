"""Configurations of real data, on stand-ins of the same format: one step, and equal sizes."""

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from apps.main import main
from harness.files.piece import flatten
from recsys import OwnTable
from recsys.data.readers import AliExpress
from recsys.experiments import Contest, source_of
from recsys.models import num_weights
from recsys.ranker import input_width
from video_multitask import KuaiRand
from video_multitask.history import UserHistory
from video_multitask.kuairand.prepare import prepare
from video_multitask.simulator.log import export_kuairand, simulate
from video_multitask.stream.shards import open_shards

CONFIGS = {"stream": str(Path(__file__).parents[2] / "benchmarks/recsys/stream.yaml")}
SOURCE = "data.source.init_args."


def content_of(name):
    return yaml.safe_load((files("apps.video") / "configs" / f"{name}.yaml").read_text())


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Shards of a simulated release, with the past of its users."""
    folder = tmp_path_factory.mktemp("release")
    export_kuairand(simulate(rows=4000, users=60, videos=120, days=31, seed=9), folder / "raw")
    return prepare(KuaiRand(folder / "raw"), folder / "shards", history=UserHistory(20)).folder


@pytest.fixture(scope="module")
def country(tmp_path_factory):
    """Files of AliExpress: an index, 16 categories, numbers, click and conversion."""
    folder, draw = tmp_path_factory.mktemp("country"), np.random.default_rng(0)
    for name, number in (("train", 400), ("test", 100)):
        columns = {"": np.arange(number)}
        columns |= {f"categorical_{k}": draw.integers(0, 9, number) for k in range(16)}
        columns |= {f"numerical_{k}": draw.normal(size=number) for k in range(4)}
        click = draw.random(number) < 0.4
        columns |= {"click": click * 1, "conversion": (click & (draw.random(number) < 0.4)) * 1}
        pl.DataFrame(columns).write_csv(folder / f"{name}.csv")
    return folder


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A table that no reader is written for."""
    draw = np.random.default_rng(1)
    rows = pl.DataFrame(
        {
            "reader": draw.integers(0, 30, 500), "book": draw.integers(0, 40, 500),
            "price": draw.gamma(2, 5, 500), "click": draw.integers(0, 2, 500),
        }
    )  # fmt: skip
    path = tmp_path_factory.mktemp("log") / "log.parquet"
    rows.write_parquet(path)
    return path


@pytest.fixture
def places(release, country, log, tmp_path):
    """Options of each configuration that stand in for its data."""
    small = {f"{SOURCE}rows": 3000, f"{SOURCE}users": 60, f"{SOURCE}videos": 80, f"{SOURCE}days": 6}
    feed = {**small, f"{SOURCE}test_days": 2, f"{SOURCE}validation_days": 1}
    return {
        "kuairand_pure": {f"{SOURCE}path": release},
        "kuairand_1k": {f"{SOURCE}path": release},
        "kuairand_27k": {
            f"{SOURCE}folder": release, f"{SOURCE}workers": 0, f"{SOURCE}scored": 0.5,
        },
        "aliexpress": {f"{SOURCE}path": country},
        "table": {f"{SOURCE}path": log},
        "groups": feed,
        "progressive": feed,
        "stream": {
            **small, f"{SOURCE}folder": tmp_path / "feed", f"{SOURCE}row_group": 256,
            f"{SOURCE}workers": 0,
        },
    }  # fmt: skip


NAMES = ("kuairand_pure", "kuairand_1k", "kuairand_27k", "aliexpress", "table", "groups",
         "progressive", "stream")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_trains_a_step(name, places, tmp_path, capsys):
    config = CONFIGS.get(name, name)
    words = ["video", "fit", "--config", config, "--root", str(tmp_path)]
    options = {"data.batch_size": 64, "trainer.max_steps": 2, "trainer.limit_val_batches": 1,
               "trainer.val_check_interval": 1.0, **places[name]}  # fmt: skip
    assert main([*words, *(f"--{n}={value}" for n, value in options.items())]) == 0
    assert (tmp_path / "video" / name / "model" / "config.json").is_file()
    assert "model" in capsys.readouterr().out


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("progressive", "stream")])
def test_rivals_have_the_size_of_the_reference(name, places):
    content = content_of(name)
    settings = {**flatten({"data": content["data"], "model": content["model"]}),
                **{n: str(v) if "path" in n or "folder" in n else v
                   for n, v in places[name].items()}}  # fmt: skip
    source = source_of(settings)
    schema = source.read().schema if isinstance(source, AliExpress | OwnTable) else source.schema()
    contest = Contest(**content["contest"])
    width, sizes = input_width(schema), {}
    for method in contest.methods:
        own = contest.settings(method, settings, schema)
        sizes[method] = num_weights(own["model.net"], own["model.options"], width, schema.tasks)
    for method, weights in sizes.items():
        if contest.methods[method].get("sized", True) and not method.startswith("home_"):
            assert weights == pytest.approx(sizes["home"], rel=0.05), method


@pytest.mark.slow
def test_a_stream_is_evaluated_and_reported_like_a_table(places, tmp_path):
    words = ["video", "evaluate", "--config", "kuairand_27k", "--root", str(tmp_path)]
    options = {"data.batch_size": 128, "trainer.val_check_interval": 1.0, "trainer.max_epochs": 1,
               "contest.trials": 1, **places["kuairand_27k"]}  # fmt: skip
    small = content_of("unit")
    options["model.options"] = json.dumps(small["model"]["options"])
    options["contest.methods"] = json.dumps(small["contest"]["methods"])
    given = [f"--{name}={value}" for name, value in options.items()]
    assert main([*words, *given]) == 0
    scores = json.loads((tmp_path / "video" / "kuairand_27k" / "scores.json").read_text())
    rows = {(r["method"], r["task"], r["metric"]): r for r in scores["rows"] if not r["versus"]}
    assert {m for m, _, _ in rows} == {"home", "mmoe"}
    tested = {d["role"]: d["size"] for d in scores["data"]}
    shards = open_shards(places["kuairand_27k"][f"{SOURCE}folder"])
    assert tested["test"] == shards.select(20220422, 20220508, False).rows
    assert 5 < rows["home", "test", "summed log_loss"]["n"] < 50  # users, about half of 60
    assert "rows of 50% of the users" in scores["notes"][0]
    words[1] = "report"
    assert main([*words, *given]) == 0
    page = (tmp_path / "video" / "kuairand_27k" / "report.html").read_text()
    assert "Calibration" in page
    assert "Fields" in page


@pytest.mark.fault("video V8")
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--slices", "true"], "--slices needs all rows in memory, but data.source is a stream"),
        (
            ["--study", "apps.video.studies.progressive.ProgressiveStudy"],
            "this study needs all rows in memory, but data.source is a stream",
        ),
    ],
    ids=["slices", "progressive"],
)
def test_what_needs_tables_refuses_a_stream_before_it_trains(words, line, places, tmp_path, capsys):
    options = {"trainer.max_epochs": 1, **places["kuairand_27k"]}
    given = [f"--{name}={value}" for name, value in options.items()]
    begin = ["video", "evaluate", "--config", "kuairand_27k", "--root", str(tmp_path)]
    assert main([*begin, *given, *words]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
    assert not list(tmp_path.rglob("record.json"))
