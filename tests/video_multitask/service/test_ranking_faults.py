"""The service of a ranking model under requests that are wrong: one line each, and it lives on."""

import asyncio
import json

import httpx
import numpy as np
import pytest

from video_multitask.service.contract import Limits
from video_multitask.service.ranking_scorer import loader
from video_multitask.service.server import Service, build_app

NAN, MANY = float("nan"), 10**6


def content(shop, rows=3):
    return json.loads(json.dumps(shop.request(shop.rows(500)[:rows])))  # seen in training


def body(good, **parts):
    return json.dumps(good | parts).encode()


def user(**fields):
    return lambda good: body(good, user=good["user"] | fields)


def candidate(**fields):
    """Another first candidate."""

    def made(good):
        first, *others = good["candidates"]
        return body(good, candidates=[first | fields, *others])

    return made


def part(**parts):
    return lambda good: body(good, **parts)


FAULTS = {
    # No JSON.
    "nothing": (lambda good: b"", 400, "the body is no JSON"),
    "cut": (lambda good: body(good)[:-9], 400, "the body is no JSON: EOF"),
    "two documents": (lambda good: body(good) * 2, 400, "trailing characters"),
    "single quotes": (lambda good: str(good).encode(), 400, "the body is no JSON"),
    "Latin-1": (lambda good: '{"user": "ü"}'.encode("latin-1"), 400, "the body is no JSON"),
    "UTF-16": (lambda good: body(good).decode().encode("utf-16"), 400, "the body is no JSON"),
    "nested too deeply": (lambda good: b"[" * 10**5 + b"]" * 10**5, 400, "recursion limit"),
    "half a character": (user(city="\ud800"), 400, "the body is no JSON"),
    "NaN": (user(age=NAN), 400, "the body is no JSON: expected value at line 1 column"),
    "infinity": (candidate(price=-np.inf), 400, "the body is no JSON"),
    "digits without end": (
        lambda good: body(good).replace(b'"age": ', b'"age": ' + b"9" * 5000, 1),
        400, "number out of range",
    ),
    # No request.
    "a list": (lambda good: b"[]", 422, "the request is a list: expected a mapping"),
    "null": (lambda good: b"null", 422, "the request is null: expected a mapping"),
    "no candidates": (part(candidates=[]), 422, "expected a list of one mapping or more"),
    "candidates in a mapping": (part(candidates={}), 422, "expected a list of one mapping"),
    "candidate of another type": (part(candidates=[3]), 422, "candidates[0] is a number"),
    "no user": (part(user=None), 422, "user is null: expected a mapping"),
    "another word": (part(cands=[]), 422, "unknown field 'cands'"),
    "a word of a million letters": (part(**{"x" * MANY: 1}), 422, "unknown field 'xxx"),
    "unknown task": (part(tasks=["like"]), 422, "no task 'like'; it has view, buy, return"),
    "order without score": (part(best_first=True), 422, "the service has no fused score"),
    # Wrong types and values.
    "text for an id": (user(reader="7"), 422, "user.reader is '7': expected an integer"),
    "fraction for an id": (candidate(book=1.5), 422, "candidates[0].book is 1.5: expected an"),
    "boolean for an id": (candidate(book=True), 422, "candidates[0].book is True: expected an"),
    "an id beyond 64 bits": (user(reader=2**63), 422, "expected an integer or null"),
    "number for text": (user(city=5), 422, "user.city is 5: expected a string"),
    "list for a number": (user(age=[30]), 422, "user.age is [30]: expected a finite number"),
    "text for a number": (candidate(price="9"), 422, "candidates[0].price is '9': expected a"),
    "number for a history": (user(last=5), 422, "user.last is 5: expected a list of"),
    "text in a history": (user(last=[1, "x"]), 422, "user.last is [1, 'x']: expected a list"),
    "a text of a million letters": (user(city="x" * MANY), 422, "expected a string of at most"),
    "field too few": (part(context={}), 422, "lacks 'hour', and so do user and context"),
    "field too many": (user(years=3), 422, "user.years is no field of the model"),
    "field of some candidates": (candidate(hour=3), 422, "candidates[1] lacks 'hour'"),
    # Unknown ids and values.
    "unknown user": (user(reader=10**9), 422, "user.reader has a value that training"),
    "unknown item": (
        lambda good: body(good, candidates=[*good["candidates"], good["candidates"][0]
                                            | {"book": 10**9}]),
        422, "candidates[3].book has a value that training has not seen: correct it",
    ),
    "unknown category": (user(city="Rom"), 422, "user.city has a value that training"),
    # Too much.
    "a million candidates": (
        lambda good: body(good, candidates=[{}]).replace(b"{}", b"{}," * (MANY - 1) + b"{}"),
        413, "the body has 1,000,005 lists and mappings, at most 131,072 are taken",
    ),
    "a million whole candidates": (
        lambda good: body(good, candidates=good["candidates"][:1] * MANY),
        413, "at most 4,194,304 are taken: send fewer rows",
    ),
}  # fmt: skip


@pytest.fixture
def talk(model_folder):
    """``talk(conversation, unknown)`` runs one with a client of a service in this process."""

    def run(conversation, unknown="refuse"):
        app = build_app(Service(model_folder, loader(None, None, unknown), Limits(), 0.5))

        async def live():
            transport = httpx.ASGITransport(app)
            async with (
                app.router.lifespan_context(app),
                httpx.AsyncClient(transport=transport, base_url="http://here") as client,
            ):
                return await conversation(client)

        return asyncio.run(live())

    return run


def test_every_wrong_request_gets_one_line_and_the_next_right_one_its_answer(shop, talk):
    good = content(shop)

    async def conversation(client):
        right = (await client.post("/score", content=body(good))).json()
        assert len(right["probabilities"]) == 3
        found = {}
        for name, (change, *_) in FAULTS.items():
            found[name] = await client.post("/score", content=change(good))
            assert (await client.post("/score", content=body(good))).json() == right, name
        assert (await client.get("/healthz")).json() == {"status": "alive"}
        assert (await client.get("/readyz")).status_code == 200
        return found

    found = talk(conversation)
    for name, (_, status, words) in FAULTS.items():
        answer = found[name]
        assert answer.status_code == status, (name, answer.text[:300])
        assert list(answer.json()) == ["error"]
        line = answer.json()["error"]
        assert words in line, (name, line[:300])
        assert "\n" not in line, name
        assert len(line) < 250, name


def test_wrong_requests_leave_those_of_their_batch_alone(shop, talk):
    """Unknown ids are seen when the batch is scored: others in it get their probabilities."""
    good = content(shop)
    odd = user(reader=10**9)(good)

    async def conversation(client):
        alone = (await client.post("/score", content=body(good))).json()
        asked = [client.post("/score", content=body(good) if n % 3 else odd) for n in range(30)]
        return alone, await asyncio.gather(*asked)

    alone, answers = talk(conversation)
    assert [a.status_code for a in answers] == [200 if n % 3 else 422 for n in range(30)]
    for answer in answers:
        if answer.status_code == 200:
            np.testing.assert_allclose(
                answer.json()["probabilities"], alone["probabilities"], atol=1e-6
            )


def test_unknown_values_are_scored_where_that_is_wanted(shop, talk):
    good = content(shop)

    async def conversation(client):
        return [await client.post("/score", content=b)
                for b in (body(good), user(reader=10**9, city="Rom")(good))]  # fmt: skip

    known, unknown = (answer.json() for answer in talk(conversation, "score"))
    assert (known["unknown"], unknown["unknown"]) == ({}, {"reader": 3, "city": 3})
    assert not np.allclose(known["probabilities"], unknown["probabilities"], atol=1e-4)
