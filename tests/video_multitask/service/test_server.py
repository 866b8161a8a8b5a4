import asyncio
import gzip
import json
import signal
import socket
import subprocess
import threading
import time
import tracemalloc
from types import SimpleNamespace
from urllib.parse import unquote

import httpx
import polars as pl
import pytest
from prometheus_client.parser import text_string_to_metric_families

from core_gates.errors import GatesError
from video_multitask.service.contract import Limits, RefusedError
from video_multitask.service.load_test import Running
from video_multitask.service.ranking_scorer import loader
from video_multitask.service.server import Service, bind, build_app, parse


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


def test_what_is_no_http_harms_nothing(running):
    service = running()
    address = ("127.0.0.1", int(service.url.rpartition(":")[2]))
    for rubbish in (b"\x00\xff" * 500, b"POST /score HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b""):
        with socket.create_connection(address) as connection:
            connection.sendall(rubbish)
    with socket.create_connection(address) as connection:  # and one that leaves half-way
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
    assert httpx.post(service.score, json={"items": [{"x": 3}]}).json()["y"] == [6]
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(60) == 0
    assert "Traceback" not in service.process.stderr.read()


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


def test_a_port_is_free_or_refused(refuses):
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(GatesError, match=f"port {port}: Address already in use; give another"):
            bind("127.0.0.1", port)
    refuses(
        GatesError,
        ("between 0 and 65535, found 70000", lambda: bind("127.0.0.1", 70_000)),
        (r"cannot serve at 192\.0\.2\.1", lambda: bind("192.0.2.1", 0)),
    )


class Client:
    """Requests to a service in this process."""

    def __init__(self, service):
        self.service, self.app = service, build_app(service)

    def run(self, talk):
        """Run ``talk(client)`` within the life of the application."""

        async def live():
            transport = httpx.ASGITransport(self.app)
            async with (
                self.app.router.lifespan_context(self.app),
                httpx.AsyncClient(transport=transport, base_url="http://here") as client,
            ):
                return await talk(client)

        return asyncio.run(live())

    def post(self, content, **headers):
        async def talk(client):
            return await client.post("/score", content=content, headers=headers)

        return self.run(talk)


@pytest.fixture
def client_of(toy, tmp_path):
    def build(factor=2.0, pause=0.0, **limits):
        folder = toy.write_model(tmp_path / "model", factor, pause)
        return Client(Service(folder, toy.Multiplier.load, Limits(**limits), poll_s=0.02))

    return build


def items(*values):
    return json.dumps({"items": [{"x": value} for value in values]}).encode()


def samples(text):
    return {
        (s.name, *s.labels.values()): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_rows_are_scored_in_order(client_of):
    answer = client_of().post(items(1, 2.5, -3))
    assert (answer.status_code, answer.json()) == (200, {"model": "times 2.0", "y": [2, 5, -6]})
    assert answer.headers["x-model-version"] == "times 2.0"


FAULTS = {
    "malformed": (b'{"items": [', 400, "the body is no JSON: EOF"),
    "empty": (b"", 400, "the body is no JSON"),
    "no UTF-8": (b'{"items": "\xff"}', 400, "the body is no JSON"),
    "NaN": (b'{"items": [{"x": NaN}]}', 400, "line 1 column 18"),
    "infinity": (b'{"items": [{"x": -Infinity}]}', 400, "the body is no JSON"),
    "beyond floats": (b'{"items": [{"x": 1}, {"x": 1e999}]}', 422, "items[1].x is inf"),
    "huge integer": (b'{"items": [{"x": 1, "ids": [%d]}]}' % 2**64, 422, "items[0].ids is [1844"),
    "endless digits": (b'{"items": [{"x": 1%s}]}' % (b"0" * 400), 422, "items[0].x is 1000"),
    "deep": (b"[" * 100_000, 400, "recursion limit"),
    "a list": (b"[]", 422, "the request is a list: expected a mapping"),
    "null": (b"null", 422, "the request is null"),
    "unknown key": (b'{"item": []}', 422, "unknown field 'item': did you mean 'items'?"),
    "no rows": (b'{"items": []}', 422, "expected a list of rows"),
    "row of another type": (b'{"items": [{"x": 1}, 5]}', 422, "items[1] is a number"),
    "text for a number": (b'{"items": [{"x": 1}, {"x": "2"}]}', 422, "items[1].x is '2': expe"),
    "boolean": (b'{"items": [{"x": 1, "name": true}]}', 422, "items[0].name is True: expected a"),
    "number for text": (b'{"items": [{"x": 1, "name": 2}]}', 422, "items[0].name is 2: expected a"),
    "number for a list": (b'{"items": [{"x": 1, "ids": 2}]}', 422, "expected a list of integers"),
    "wrong item": (b'{"items": [{"x": 1, "ids": [1.5]}]}', 422, "items[0].ids is [1.5]: expe"),
    "missing": (b'{"items": [{"name": "a"}]}', 422, "items[0] lacks 'x': it is needed"),
    "missing later": (b'{"items": [{"x": 1}, {}]}', 422, "items[1] lacks 'x', unlike items[0]"),
    "unknown column": (b'{"items": [{"x": 1, "namee": "a"}]}', 422, "did you mean 'name'?"),
    "unknown later": (b'{"items": [{"x": 1}, {"x": 1, "z": 2}]}', 422, "items[1] has 'z'"),
    "a name twice": (b'{"items": [{"x": 1, "x": 2}]}', 422, "the name 'x' is given twice in one"),
    "a name twice, escaped": (b'{"items": [{"x": 1, "\\u0078": 2}]}', 422, "'x' is given twice"),
    "rows twice": (b'{"items": [], "items": [{"x": 1}]}', 422, "the name 'items' is given twice"),
    "a million lists": (b"[" + b",".join([b"[]"] * 10**6) + b"]", 413, "has 1,000,001 lists and"),
    "too many rows": (items(*[1] * 2001), 422, "items has 2001 rows, at most 2000 are taken"),
    "a million rows": (items(*[1] * 10**6), 413, "the body has 10,000,011 bytes or more"),
}  # fmt: skip


def test_every_fault_is_one_line_and_the_service_lives(client_of):
    client = client_of()

    async def talk(http):
        found = {}
        for name, (content, *_) in FAULTS.items():
            found[name] = await http.post("/score", content=content)
            assert (await http.post("/score", content=items(4))).json()["y"] == [8], name
            assert (await http.get("/healthz")).status_code == 200
        return found, samples((await http.get("/metrics")).text)

    found, metrics = client.run(talk)
    for name, (_, status, words) in FAULTS.items():
        answer = found[name]
        assert answer.status_code == status, (name, answer.text)
        assert list(answer.json()) == ["error"]
        assert words in answer.json()["error"], (name, answer.text)
        assert "\n" not in answer.json()["error"]
        assert len(answer.json()["error"]) < 250, name
    assert metrics["gates_requests_total", "200"] == len(FAULTS)
    assert metrics["gates_requests_total", "413"] == 2


def test_a_long_body_without_announced_length_is_refused(client_of):
    async def chunks():
        for _ in range(50):
            yield b" " * 100_000

    answer = client_of(max_body_bytes=10**6).post(chunks())
    assert answer.status_code == 413
    assert "at most 1,000,000 are taken" in answer.json()["error"]


def test_a_compressed_body_is_refused(client_of):
    answer = client_of().post(gzip.compress(items(1)), **{"content-encoding": "gzip"})
    assert answer.status_code == 415
    assert "content-encoding 'gzip': send it as plain JSON" in answer.json()["error"]
    assert client_of().post(items(1), **{"content-encoding": "identity"}).json()["y"] == [2]


def test_a_refused_body_stalls_no_other_for_long():
    """A million lists would be tracked one by one; a count of bytes refuses them before."""
    body = b'{"items": [' + b",".join([b"[]"] * 10**6) + b"]}"
    tracemalloc.start()
    with pytest.raises(RefusedError, match="at most 131,072 are taken"):
        parse(body, 2000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(body) / 10  # a million empty lists take 56 bytes each
    with pytest.raises(RefusedError, match="at most 192,000 are taken"):
        parse(body, 3000)


def test_a_body_that_does_not_come_times_out(client_of):
    async def chunks():
        yield b"{"
        await asyncio.sleep(1)

    answer = client_of(timeout_s=0.05).post(chunks())
    assert answer.status_code == 408
    assert answer.json() == {"error": "the body did not arrive within 0.05 s"}


def test_a_full_queue_and_a_slow_model_are_told(client_of):
    client = client_of(pause=1.0, max_queue=2, max_wait_ms=0, max_batch_requests=1, timeout_s=1.4)

    async def talk(http):
        first = asyncio.create_task(http.post("/score", content=items(1)))
        await asyncio.sleep(0.1)
        others = [asyncio.create_task(http.post("/score", content=items(1))) for _ in range(5)]
        return [await one for one in (first, *others)]

    answers = client.run(talk)
    assert [a.status_code for a in answers] == [200, 503, 503, 429, 429, 429]
    assert "not scored within 1.4 s" in answers[1].json()["error"]
    assert "2 requests are waiting" in answers[3].json()["error"]
    assert answers[3].headers["retry-after"] == "1"


def test_bodies_under_way_are_limited(client_of):
    client = client_of(max_queue=3, max_batch_requests=1)

    async def slow():
        yield b"{"
        await asyncio.sleep(0.3)
        yield b"}"

    async def talk(http):
        asked = [asyncio.create_task(http.post("/score", content=slow())) for _ in range(8)]
        return [(await one).status_code for one in asked], await http.post("/score", content=b"{}")

    codes, later = client.run(talk)
    assert (codes, later.status_code) == ([422] * 5 + [429] * 3, 422)


def test_a_version_may_have_any_name(toy, tmp_path):
    class Named(toy.Multiplier):
        version = "Köln\n模型 1"

    folder = toy.write_model(tmp_path / "model", 2.0)
    service = Service(folder, lambda path: Named(toy.Multiplier.load(path).factor))
    answer = Client(service).post(items(1))
    assert (answer.status_code, unquote(answer.headers["x-model-version"])) == (200, Named.version)


def test_a_model_that_fails_is_a_500_for_its_request_only(client_of, caplog):
    client = client_of(max_wait_ms=2000, max_batch_requests=4)

    async def talk(http):
        return await asyncio.gather(
            *(http.post("/score", content=items(x)) for x in (1, 13, 14, 2))
        )

    answers = client.run(talk)
    assert [a.status_code for a in answers] == [200, 500, 500, 200]
    assert "RuntimeError" in answers[1].json()["error"]
    assert "ValueError" in answers[2].json()["error"]
    assert "cannot stand 13" in caplog.text
    assert "y is not finite" in caplog.text


def test_health_readiness_and_unknown_pages(client_of):
    client = client_of()

    async def talk(http):
        ready = await http.get("/readyz")
        client.service.batcher.close()
        late = await http.post("/score", content=items(1))
        return ready, late, [await http.get(p) for p in ("/readyz", "/healthz", "/none", "/score")]

    ready, late, others = client.run(talk)
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "model": "times 2.0"})
    assert (late.status_code, [a.status_code for a in others]) == (503, [503, 200, 404, 405])
    assert others[2].json() == {"error": "Not Found"}


def test_metrics_count_requests_batches_rows_and_the_model(client_of):
    client = client_of(max_wait_ms=2000, max_batch_requests=4, pause=0.05)

    async def talk(http):
        await asyncio.gather(*(http.post("/score", content=items(1, 2, 3)) for _ in range(4)))
        await http.post("/score", content=b"x")
        return samples((await http.get("/metrics")).text)

    found = client.run(talk)
    assert (found["gates_requests_total", "200"], found["gates_requests_total", "400"]) == (4, 1)
    assert found["gates_request_seconds_count",] == 4
    assert found["gates_request_seconds_sum",] >= 4 * 0.05
    assert (found["gates_batch_requests_sum",], found["gates_batch_rows_sum",]) == (4, 12)
    assert (found["gates_batch_rows_count",], found["gates_queue_requests",]) == (1, 0)
    assert found["gates_model_info", "times 2.0"] == 1
    assert found["process_resident_memory_bytes",] > 1e6


@pytest.mark.fault("46 R4")
def test_metrics_count_numbers_outside_those_of_training(shop, model_folder):
    service = Service(model_folder, loader(unknown="score"))
    content = json.dumps(shop.request(shop.rows(30).with_columns(price=pl.lit(9e6)))).encode()

    async def talk():
        transport = httpx.ASGITransport(app=build_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            answers = [await http.post("/score", content=content) for _ in range(2)]
            return answers, samples((await http.get("/metrics")).text)

    try:
        answers, found = asyncio.run(talk())
    finally:
        service.close()
    assert [one.json()["numbers"]["price"]["outside"] for one in answers] == [30, 30]
    assert found["gates_numbers_total", "price", "outside"] == 60
    assert found["gates_numbers_total", "price", "shifted"] == 2


async def refused(http):
    """The counters as soon as a model has been refused, or after 30 seconds."""
    for _ in range(600):
        counted = samples((await http.get("/metrics")).text)
        if counted["gates_swaps_total", "refused"]:
            break
        await asyncio.sleep(0.05)
    return counted


def test_the_model_is_swapped_while_requests_are_answered(client_of, toy):
    client = client_of()
    folder = client.service.models.place

    async def talk(http):
        values = []

        async def ask():
            while not values or values[-1] == 2.0 or len(values) < 50:
                answer = await http.post("/score", content=items(1))
                assert answer.status_code == 200
                values.append(answer.json()["y"][0])

        asked = asyncio.create_task(ask())
        await asyncio.sleep(0.1)
        toy.write_model(folder, 5.0)
        await asyncio.wait_for(asked, 60)
        toy.write_model(folder, float("nan"))
        counted = await refused(http)
        assert (await http.post("/score", content=items(1))).json()["y"] == [5.0]
        return values, counted

    values, metrics = client.run(talk)
    assert (sorted(values), {2.0, 5.0}) == (values, set(values))
    assert metrics["gates_swaps_total", "swapped"] == 1
    assert metrics["gates_swaps_total", "refused"] == 1
    assert metrics["gates_model_info", "times 5.0"] == 1
    assert ("gates_model_info", "times 2.0") not in metrics
