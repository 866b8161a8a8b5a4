"""Configurations of real data, on stand-ins of the same format: one step, and equal sizes."""

import json
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from apps.main import main
from harness.files.piece import flatten
from recsys.experiments import Claims, Contest, data_of
from recsys.models import num_weights
from recsys.ranker import input_width
from video_multitask import KuaiRand
from video_multitask.history import UserHistory
from video_multitask.kuairand.prepare import prepare
from video_multitask.simulator.log import export_kuairand, simulate
from video_multitask.stream.shards import open_shards

ROOT = Path(__file__).parents[2]
CONFIGS = {"stream": str(ROOT / "benchmarks/recsys/stream.yaml")}
SHARED = Path(os.environ.get("GATES_SHARED", ROOT.parent / "shared")) / "data" / "recsys"
SOURCE = "data.source.init_args."
PACKAGED = {path.stem: path for path in (ROOT / "apps" / "video" / "configs").glob("*.yaml")}
NAMES = [
    *sorted(name for name, path in PACKAGED.items() if "source:" in path.read_text()),
    "stream",
]


def content_of(name):
    return yaml.safe_load(Path(CONFIGS.get(name) or PACKAGED[name]).read_text())


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


FEED = {"rows": 3000, "users": 60, "videos": 80, "days": 6, "validation_days": 1, "test_days": 2}


@pytest.fixture
def stand_in(release, country, log, tmp_path):
    """``stand_in(name)``: options of a configuration that stand in for its data."""
    stream = {"folder": tmp_path / "feed", "row_group": 256, "workers": 0}
    own = {
        "kuairand_pure": {"path": release}, "kuairand_1k": {"path": release},
        "kuairand_27k": {"folder": release, "workers": 0, "scored": 0.5},
        "aliexpress": {"path": country}, "table": {"path": log},
        "stream": {n: v for n, v in FEED.items() if "_days" not in n} | stream,
    }  # fmt: skip

    def options(name):
        init = content_of(name)["data"]["source"]["init_args"]
        shipped = {n: SHARED / Path(init[n]).name for n in ("path", "users_path") if n in init}
        found = own.get(name) or shipped or FEED
        if not all(place.exists() for place in shipped.values() if name not in own):
            pytest.skip("its data are absent")
        return {f"{SOURCE}{n}": str(v) if isinstance(v, Path) else v for n, v in found.items()}

    return options


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_trains_a_step(name, stand_in, tmp_path, capsys):
    words = ["video", "fit", "--config", CONFIGS.get(name, name), "--root", str(tmp_path)]
    options = {"data.batch_size": 64, "trainer.max_steps": 2, "trainer.limit_val_batches": 1,
               "trainer.val_check_interval": 1.0, **stand_in(name)}  # fmt: skip
    assert main([*words, *(f"--{n}={value}" for n, value in options.items())]) == 0
    assert (tmp_path / "video" / name / "model" / "config.json").is_file()
    assert "model" in capsys.readouterr().out


COARSE = {"play_time": 0.051}  # a network of one head whose nearest whole width is 5.06 % off


@pytest.mark.parametrize("name", NAMES)
def test_every_contest_can_be_held(name, stand_in):
    """All methods have the size of the reference, and claims are about them."""
    content = content_of(name)
    contest = Contest(**content.get("contest", {}))
    claims = content.get("evaluate", {}).get("claims", {})
    Claims(**claims).check([*contest.entries, *contest.baselines])
    settings = {**flatten(content["data"], "data."), **stand_in(name)}
    first = data_of(settings).schema
    common = {"model.net": content["model"]["net"]}
    common |= flatten(content["model"]["options"], "model.options.")
    sizes = {}
    for method, entry in contest.entries.items():
        schema = data_of({**settings, **contest.own_data(method)}).schema
        made = contest.settings(method, common, schema, first)
        width = input_width(schema)
        sizes[method] = num_weights(made["model.net"], made["model.options"], width, schema.heads)
        if entry.get("sized", True):
            off = abs(sizes[method] / sizes[contest.reference] - 1)
            assert off <= COARSE.get(name, 0.05), method


@pytest.mark.slow
def test_a_stream_is_evaluated_and_reported_like_a_table(stand_in, tmp_path):
    words = ["video", "evaluate", "--config", "kuairand_27k", "--root", str(tmp_path)]
    options = {"data.batch_size": 128, "trainer.val_check_interval": 1.0, "trainer.max_epochs": 1,
               "contest.trials": 1, **stand_in("kuairand_27k")}  # fmt: skip
    small = content_of("unit")
    options["model.options"] = json.dumps(small["model"]["options"])
    options["contest.methods"] = json.dumps(small["contest"]["methods"])
    given = [f"--{name}={value}" for name, value in options.items()]
    assert main([*words, *given]) == 0
    scores = json.loads((tmp_path / "video" / "kuairand_27k" / "scores.json").read_text())
    rows = {(r["method"], r["task"], r["metric"]): r for r in scores["rows"] if not r["versus"]}
    assert {m for m, _, _ in rows} == {"home", "mmoe"}
    tested = {d["role"]: d["size"] for d in scores["data"]}
    shards = open_shards(stand_in("kuairand_27k")[f"{SOURCE}folder"])
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
def test_what_needs_tables_refuses_a_stream_before_it_trains(
    words, line, stand_in, tmp_path, capsys
):
    options = {"trainer.max_epochs": 1, **stand_in("kuairand_27k")}
    given = [f"--{name}={value}" for name, value in options.items()]
    begin = ["video", "evaluate", "--config", "kuairand_27k", "--root", str(tmp_path)]
    assert main([*begin, *given, *words]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
    assert not list(tmp_path.rglob("record.json"))
