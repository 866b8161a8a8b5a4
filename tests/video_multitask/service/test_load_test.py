import json
import os
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest

from core_gates.errors import GatesError
from harness.system import descendants
from video_multitask.service.load_test import READY_S, Load, LoadTest, attack, running

PAUSE = 0.03
BODIES = [json.dumps({"items": [{"x": 100 + n}, {"x": -n}]}).encode() for n in range(7)]


@pytest.fixture
def command(toy, toy_command, tmp_path):
    """The command of a service with a model that takes 30 ms a batch, most of the time."""
    folder = toy.write_model(tmp_path / "model", 2.0, PAUSE)

    def build(batching, **limits):
        limits |= {} if batching else {"max_batch_requests": 1}
        return toy_command(folder, json.dumps(limits))

    build.folder = folder
    return build


def difference(place, version, content):
    factor = float(version.split()[1])
    offline = [factor * row["x"] for row in json.loads(BODIES[place])["items"]]
    return float(np.abs(np.array(json.loads(content)["y"]) - offline).max())


def test_a_load_with_a_swap_has_no_errors_and_shows_the_gain_of_batching(command, toy):
    test = LoadTest(
        command,
        BODIES,
        swap=lambda: toy.write_model(command.folder, 3.0, PAUSE),
        difference=difference,
        clients=8,
        seconds=1.5,
        slice_s=0.3,
        slices=2,
    )
    found = test.run()
    assert (found.errors, found.first_error) == (0, "")
    assert (found.versions, found.difference) == (2, 0)
    assert found.batching_gain > 1.5  # a batch of one takes 30 ms as well
    assert found.p50_ms >= 1000 * PAUSE
    assert found.p99_ms >= found.p50_ms
    assert found.requests > 0
    assert abs(found.growth) < 0.2


def test_a_wrong_result_and_a_refusal_are_seen(command):
    with running(command(True)) as service:
        load = attack(service.url, BODIES, clients=4, seconds=0.3)
        off = {key: difference(key[0], "times 2.001", body) for key, body in load.kept.items()}
        assert min(off.values()) > 0.09
        bad = attack(service.url, [BODIES[0], b'{"items": [{"x": "a"}]}'], clients=2, seconds=0.3)
        assert bad.errors
        assert bad.latencies
        assert bad.errors[0].startswith("422 ")
        assert "expected a finite number" in bad.errors[0]
        assert service.metric('gates_requests_total{status="422"}') == len(bad.errors)
    gone = attack(service.url, BODIES, clients=2, seconds=0.1)
    assert not gone.latencies
    assert gone.errors[0].startswith("0 ConnectionRefusedError")


def test_quantiles_and_throughput():
    load = Load(2.0, [0.001 * n for n in range(1, 101)], [], {}, {})
    assert (load.throughput, load.latency_ms(0.5)) == (50, pytest.approx(50.5))
    assert load.latency_ms(0.99) == pytest.approx(99.01)
    assert np.isnan(Load(1.0, [], [], {}, {}).latency_ms(0.5))


@pytest.mark.fault("video H9")
def test_a_load_of_which_nothing_is_answered_is_told_in_one_line(command, monkeypatch):
    failed = Load(1.0, [], ["400: no such column"], {}, {})
    monkeypatch.setattr("video_multitask.service.load_test.attack", lambda *_, **__: failed)
    test = LoadTest(command, [b"{}"], swap=lambda: None, difference=lambda *_: 0.0)
    with pytest.raises(GatesError, match=r"^all requests failed: 400: no such column$"):
        test.run()


def test_a_service_that_does_not_start_is_told_in_one_line():
    begin = time.monotonic()
    line = "import sys; print('http://127.0.0.1:1', flush=True); sys.exit('no model')"
    with (
        pytest.raises(GatesError, match="did not get ready: no model"),
        running([sys.executable, "-c", line]),
    ):
        pass
    assert time.monotonic() - begin < READY_S  # it was not waited for any longer


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is of Linux")
def test_a_service_does_not_outlive_a_load_test_that_is_killed(command):
    code = (
        "import json, sys, time; from video_multitask.service.load_test import running\n"
        "with running(json.loads(sys.argv[1])) as service: print(service.url, flush=True); "
        "time.sleep(60)"
    )
    words = [sys.executable, "-c", code, json.dumps(command(True))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as tester:
        url = tester.stdout.readline().strip()
        (service,) = descendants(tester.pid)
        assert httpx.get(f"{url}/healthz").status_code == 200
        tester.kill()
    end = time.monotonic() + 20
    while (answers := _answers(url)) and time.monotonic() < end:
        time.sleep(0.05)
    if answers:
        os.kill(service, signal.SIGKILL)
    assert not answers


def _answers(url):
    try:
        return httpx.get(f"{url}/healthz").status_code == 200
    except httpx.TransportError:
        return False
