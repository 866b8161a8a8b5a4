import contextlib
import json
import shutil
import time
from pathlib import Path

import pytest

from apps.video.commands import main
from benchmarks.recsys import streaming
from benchmarks.recsys.streaming import ChildFit, Ended, StreamStudy
from core_gates.errors import GatesError
from harness.experiment import Run
from harness.runs.loops import ResumableCSVLogger
from recsys.experiments.contest import Contest
from video_multitask.stream.loader import StreamLoader

SOURCE = "data.source.init_args."
FEED = {
    "data.source.class_path": "video_multitask.sources.simulated.SimulatedStream",
    f"{SOURCE}rows": 2000, f"{SOURCE}users": 60, f"{SOURCE}videos": 60, f"{SOURCE}days": 4,
    f"{SOURCE}row_group": 128, f"{SOURCE}window": 256, "data.batch_size": 64, "data.order": "given",
    "trainer.max_epochs": 1,
}  # fmt: skip
MODEL = {
    "model.net": "HoME", "model.options.dim": 4, "model.options.hidden_dims": [8],
    "model.options.rank": [2, 2], "model.options.tower_dims": [4],
    "model.learning_rate": 0.01, "model.embedding_learning_rate": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def settings():
    """Settings of a tiny network; rows of a source are added."""
    return {"seed": 0, **MODEL}


class Killed(BaseException):
    """What takes the place of SIGKILL within this process."""


class InProcess(ChildFit):
    """A child that trains in this process, and is killed after a line of its log."""

    def run(self, stop=lambda: False):
        words = ["fit", "--config", str(self.config), "--root", str(self.config.parent)]
        words += ["--name", self.folder.name]
        words += ["--resume"] if self.folder.exists() else []
        write, killed = ResumableCSVLogger.log_metrics, []

        def log_metrics(logger, metrics, step=None):
            write(logger, metrics, step)
            if stop():
                killed.append(True)
                raise Killed

        begin = time.monotonic()
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(ResumableCSVLogger, "log_metrics", log_metrics)
            main(words)
        return Ended(time.monotonic() - begin, 10**9, bool(killed))


@pytest.fixture
def study(settings, tmp_path, monkeypatch):
    """The study in a run folder, finished, with children in this process."""
    monkeypatch.setattr(streaming, "ChildFit", InProcess)

    def finish(**options):
        run = Run(tmp_path / "run", app="video", settings=settings | FEED)
        made = StreamStudy(**{"prefix_steps": 12, "kills": 2, "saved_every": 2} | options)
        made.finish(run, Contest(), (0,), {})
        return json.loads(run.scores.read_text())

    return finish


def figures(scores):
    return {(row["method"], row["metric"]): row["value"] for row in scores["rows"]}


@pytest.mark.slow
def test_killed_trainings_end_as_one_that_was_left_alone(study, tmp_path, capsys):
    scores = study()
    found = figures(scores)
    assert (found["writing", "rows"], found["writing", "training_rows"]) == (2000, 1000)
    assert (found["one_pass", "steps"], found["kills", "kills"]) == (1000 // 64, 2)
    assert found["kills", "losses_compared"] == 12
    assert found["kills", "losses_that_differ"] == found["kills", "tensors_that_differ"] == 0
    assert found["kills", "tensors_compared"] > 50
    first, second = (found["kills", f"kill_{k}_after_batch"] for k in (1, 2))
    assert 1 < first < second < 12
    for number, after in ((1, first), (2, second)):
        resumed = found["kills", f"kill_{number}_resumed_after"]
        assert resumed % 2 == 0
        assert after - 2 <= resumed <= after
    bars = {bar["name"]: bar["value"] for bar in scores["bars"]}
    assert (bars["memory of training"], bars["kills that were resumed"]) == (1000, 2)
    assert (len(bars), [d["role"] for d in scores["data"]]) == (7, ["train", "validation", "test"])
    capsys.readouterr()
    study()
    assert "missing" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_resume_at_another_batch_is_seen(study, monkeypatch):
    def skip(loader, state):
        loader.epoch = state["epoch"]
        loader.position = loader._start = (state["position"] + 1) % len(loader)

    monkeypatch.setattr(StreamLoader, "load_state_dict", skip)
    found = figures(study(kills=1))
    assert found["kills", "losses_that_differ"] > 0
    assert found["kills", "tensors_that_differ"] > 10


def test_other_sources_and_small_numbers_are_refused(refuses, settings, tmp_path):
    feed = "video_multitask.sources.simulated.SimulatedFeed"
    run = Run(tmp_path / "run", app="video", settings=settings | {"data.source.class_path": feed})
    with pytest.raises(GatesError, match=r"this study simulates its rows: set data\.source"):
        StreamStudy().finish(run, Contest(), (0,), {})
    refuses(ValueError, ("prefix_steps must be at least 16", lambda: StreamStudy(prefix_steps=10)))


def test_a_child_that_fails_says_why(refuses, settings, tmp_path, monkeypatch):
    code = "import sys; sys.exit(' '.join(sys.argv[1:4]) + ': error: no net HoMME')"
    monkeypatch.setattr(streaming, "PROGRAM", ("-c", code))
    child = ChildFit(settings | FEED, {"model.net": "HoMME"}, tmp_path, "child")
    assert "net: HoMME" in child.config.read_text()
    line = r"the training of .*child.yaml failed: video fit --config: error: no net HoMME; see"
    refuses(GatesError, (line, lambda: child.run()))


@pytest.mark.fault("video V6")
def test_seconds_and_memory_are_those_of_all_attempts(settings, tmp_path, monkeypatch):
    """Also of one whose watcher was killed with it, and so could not end; not of a removed run."""
    code = (
        "import pathlib, sys, time; folder = pathlib.Path(sys.argv[4]).parent / 'video/child'; "
        "first = not folder.exists(); folder.mkdir(parents=True, exist_ok=True); "
        "(folder / 'config.yaml').touch(); held = bytearray(80 * 10**6) if first else b''; "
        "time.sleep(60 if first else 1)"
    )
    monkeypatch.setattr(streaming, "PROGRAM", ("-c", code))
    monkeypatch.setattr(streaming, "SAMPLED", 0.05)

    def made():
        return ChildFit(settings, {}, tmp_path, "child")

    begin = time.monotonic()

    def interrupt():
        if time.monotonic() - begin > 2:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        made().run(interrupt)
    ended = made().run()
    assert 2.9 < ended.seconds < time.monotonic() - begin + 0.1
    assert ended.peak > 80 * 10**6
    shutil.rmtree(tmp_path / "video")
    assert made().run(lambda: made().folder.exists()).seconds < ended.seconds - 1


def test_a_child_is_killed_with_all_that_it_has_started(settings, tmp_path, monkeypatch):
    code = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', "
        "'import time; time.sleep(60)']); open(sys.argv[4] + '.pid', 'w').write(str(p.pid)); "
        "time.sleep(60)"
    )
    monkeypatch.setattr(streaming, "PROGRAM", ("-c", code))
    child = ChildFit(settings, {}, tmp_path, "child")
    pid = tmp_path / "child.yaml.pid"
    assert child.run(lambda: pid.is_file() and pid.read_text() != "").killed
    for _ in range(100):
        state = Path("/proc", pid.read_text(), "stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("what it had started is alive")
