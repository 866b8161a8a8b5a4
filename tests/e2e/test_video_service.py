"""``gates video serve`` and ``loadtest`` in separate processes, on loopback."""

import json
import signal
import sys

import httpx
import numpy as np
import pytest

from harness.experiment.scores import read_scores
from recsys.table_scorer import read_model
from video_multitask.service.load_test import running


@pytest.fixture
def models(shop, tmp_path):
    """Two models of the same schema."""
    return [shop.write_model(tmp_path / f"day{n}", seed=n) for n in (1, 2)]


def serve(*words):
    return [sys.executable, "-m", "apps.main", "video", "serve", "--port", "0", *map(str, words)]


@pytest.mark.costly("a service in a separate process")
def test_the_service_answers_what_the_model_says_refuses_and_swaps(shop, models, tmp_path):
    place = tmp_path / "current.json"
    place.write_text(json.dumps({"folder": "day1"}))
    table = shop.rows(500)[:9]  # of values that training has seen
    body = shop.request(table, best_first=True)
    options = ["--model", place, "--poll_s", "0.1", "--fused", '{"buy": 2}']
    with running(serve(*options)) as service, httpx.Client(base_url=service.url) as client:
        versions = []
        for number in (1, 2):
            scorer = read_model(models[number - 1]).scorer
            expected = scorer.score(shop.as_table(table)).probabilities
            found = client.post("/score", json=body).json()
            versions.append(found["model"])
            np.testing.assert_allclose(
                found["probabilities"], expected[found["candidates"]], atol=1e-6
            )
            assert found["scores"] == sorted(found["scores"], reverse=True)
            for reader, said in (
                ("x", "user.reader is 'x'"),
                (10**9, "has a value that traini"),
            ):
                user = body["user"] | {"reader": reader}
                refused = client.post("/score", json=body | {"user": user})
                assert refused.status_code == 422
                assert said in refused.json()["error"]
            if number == 1:
                place.write_text(json.dumps({"folder": "day2"}))
                while client.get("/readyz").json()["model"] == versions[0]:
                    pass
        assert [version.split()[0] for version in versions] == ["day1", "day2"]
        place.write_text(json.dumps({"folder": "day3"}))  # there is none
        (models[1] / "model.safetensors").write_bytes(b"broken")
        place.write_text(json.dumps({"folder": "day2"}))
        while service.metric('gates_swaps_total{outcome="refused"}') == 0:
            assert client.post("/score", json=body).json()["model"] == versions[1]
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(20) == 0


@pytest.mark.slow
def test_a_short_load_test_is_clean(gates_in, shop, models, tmp_path):
    shop.rows(400, 1).write_parquet(tmp_path / "rows.parquet")
    load = {"clients": 4, "seconds": 2.5, "slice_s": 0.3, "slices": 1}
    options = [word for name, value in load.items() for word in (f"--load.{name}", value)]
    words = ["--model", models[0], "--swap_to", models[1], "--rows", "rows.parquet", *options]
    out = gates_in(tmp_path).succeed("video", "loadtest", *words).out
    scores = read_scores(tmp_path / "runs/video/day1/loadtest/scores.json", "video")
    bars = {bar.name: bar for bar in scores.bars}
    assert bars["requests without a proper answer"].value == 0
    assert bars["models that answered"].value == 2
    assert bars["difference from score"].met
    assert bars["throughput with batching over without"].value > 0  # noisy where cores are shared
    assert "p99 ms" in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--model", "none"], "there is no model at none: check the path"),
        ([], "run `gates video fit` first, or name one by --model"),
        (["--model", "MODEL", "--fused", '{"like": 1}'], "names like; the tasks are view, buy"),
        (["--model", "MODEL", "--port", "70000"], "--port must lie between 0 and 65535"),
        (["--model", "MODEL", "--threads", "0"], "--threads and --poll_s must be positive"),
        (["--model", "MODEL", "--limits.max_rows", "0"], "max_rows must be at least 1, got 0"),
    ],
)
def test_a_service_that_cannot_start_ends_with_one_line(gates_in, models, tmp_path, words, line):
    words = [str(models[0]) if word == "MODEL" else word for word in words]
    assert line in gates_in(tmp_path).refuse("video", "serve", *words)
