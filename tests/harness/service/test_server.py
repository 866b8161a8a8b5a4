import asyncio
import json
import signal
import socket
import subprocess
import threading
import time
from types import SimpleNamespace

import httpx
import pytest

from core_gates.errors import GatesError
from harness.service.client import Running
from harness.service.server import bind


@pytest.fixture
def running(toy, toy_command, tmp_path):
    """``running(pause=0, **limits)`` starts a service on loopback."""
    started = []

    def start(pause=0.0, **limits):
        folder = toy.write_model(tmp_path / "model", 2.0, pause)
        process = subprocess.Popen(
            toy_command(folder, json.dumps(limits)), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        url = process.stdout.readline().strip()
        return SimpleNamespace(process=process, url=url, folder=folder, score=f"{url}/score")

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_requests_under_way_are_answered_when_it_is_told_to_end(running):
    service = running(pause=2.0, max_wait_ms=0)
    found = {}

    def ask(x):
        found[x] = httpx.post(service.score, json={"items": [{"x": x}]}, timeout=60)

    threads = [threading.Thread(target=ask, args=(x,)) for x in (1, 2)]
    for thread in threads:
        thread.start()
    asked = Running(service.url, service.process)
    while asked.metric("gates_batch_requests_sum") + asked.metric("gates_queue_requests") < 2:
        time.sleep(0.01)
    service.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert {x: a.json()["y"] for x, a in found.items()} == {1: [2], 2: [4]}
    assert service.process.wait(60) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{service.url}/healthz")
    assert "Traceback" not in service.process.stderr.read()


def test_a_client_sees_why_its_large_body_is_refused_and_others_are_served(running):
    service = running(max_body_bytes=10**5)
    body = json.dumps({"items": [{"x": 1}] * 10**6}).encode()
    answer = httpx.post(service.score, content=body, timeout=60)
    assert answer.status_code == 413
    assert "10,000,011 bytes" in answer.json()["error"]
    assert httpx.post(service.score, json={"items": [{"x": 1}]}).json()["y"] == [2]


def test_a_body_of_a_hundred_megabytes_is_refused_by_an_answer(running):
    service = running()
    answer = httpx.post(service.score, content=b" " * 10**8, timeout=60)
    assert answer.status_code == 413
    assert "100,000,000 bytes" in answer.json()["error"]


def test_what_is_no_http_harms_nothing(running):
    service = running()
    address = ("127.0.0.1", int(service.url.rpartition(":")[2]))
    for rubbish in (b"\x00\xff" * 500, b"POST /score HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b""):
        with socket.create_connection(address) as connection:
            connection.sendall(rubbish)
    with socket.create_connection(address) as connection:  # and one that leaves half-way
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
    answer = httpx.post(service.score, json={"items": [{"x": 3}]})
    assert answer.json()["y"] == [6]
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(60) == 0
    assert "Traceback" not in service.process.stderr.read()


def test_the_log_tells_of_a_swap_in_one_line(running, toy):
    service = running()
    toy.write_model(service.folder, 9.0)
    end = time.monotonic() + 10
    with httpx.Client() as client:
        while time.monotonic() < end:
            answer = client.post(service.score, json={"items": [{"x": 1}]})
            if answer.json()["y"] == [9.0]:
                break
        assert answer.headers["x-model-version"] == "times 9.0"
    service.process.send_signal(signal.SIGTERM)
    service.process.wait(60)
    (line,) = service.process.stderr.read().splitlines()
    assert line.endswith("INFO times 9.0 is in service instead of times 2.0")


def test_small_answers_leave_at_once():
    """Without TCP_NODELAY each answer waits 40 ms for an acknowledgment."""

    async def accepted():
        found = asyncio.get_running_loop().create_future()

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport):
                connection = transport.get_extra_info("socket")
                found.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                transport.close()

        bound = bind("127.0.0.1", 0)
        port = bound.getsockname()[1]
        async with await asyncio.get_running_loop().create_server(Protocol, sock=bound):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                return await found
            finally:
                writer.close()

    assert asyncio.run(accepted())


def test_a_port_is_free_or_refused():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(GatesError, match=f"port {port}: Address already in use; give another"):
            bind("127.0.0.1", port)
    with pytest.raises(GatesError, match="between 0 and 65535, found 70000"):
        bind("127.0.0.1", 70_000)
    with pytest.raises(GatesError, match=r"cannot serve at 192\.0\.2\.1"):
        bind("192.0.2.1", 0)
