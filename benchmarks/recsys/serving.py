"""Scoring of many candidates of one user, and training steps with reports of the experts."""

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.comparison import Call, Comparison, Load
from benchmarks.recsys.home import SIZES, home_of

CANDIDATES, FEATURES, DIM, EVENTS, ROWS = 500, 29, 16, 50, 10_000
WATCH, INTERACTION = 5, 7  # tasks
HOME = {
    "dim": 128,
    "hidden_dims": [256],
    "meta_experts": 2,
    "task_experts": 1,
    "rank": 32,
    "tower_dims": [64],
}
TRANSFORMER: dict[str, Any] = {"layers": 2, "heads": 2, "width": 32}
CACHING_BAR, TAIL_BAR = 1 / 1.3, 1.5
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "a 50-event transformer": ("transformer", TRANSFORMER),
    "a 50-event transformer that attends to the candidate": (
        "transformer",
        TRANSFORMER | {"pool": "target"},
    ),
    "50-event target attention": ("target_attention", {}),
    "no history": ("", {}),
}


def comparisons() -> Iterator[Comparison]:
    """Scoring, and what watching the networks costs; on one CPU thread."""
    for encoder in ENCODERS:
        yield caching(encoder)
    yield tail()
    yield from map(reported, SIZES)


def caching(encoder: str) -> Comparison:
    """Return scoring of complete rows, and with the part of the user computed once."""

    def build(load: Load) -> Mapping[str, Call]:
        ranker = _ranker(load, *ENCODERS[encoder])
        user, rows = _rows(load, ranker, 1), _rows(load, ranker, CANDIDATES)
        histories = tuple(history.expand(CANDIDATES, -1) for history in user.sequences)
        complete = rows._replace(sequences=histories)

        def whole() -> object:
            with torch.no_grad():
                return ranker(*complete)

        def once() -> object:
            with torch.no_grad():
                return ranker.score_candidates(user, rows)

        return {"complete rows": whole, "user part once": once}

    bar = {"user part once": CACHING_BAR} if encoder == "a 50-event transformer" else {}
    return Comparison(
        name=f"{CANDIDATES} candidates of a user with {encoder}",
        op="candidates",
        build=build,
        baseline="complete rows",
        bars=bar,
        single_calls=5,
    )


def tail() -> Comparison:
    """Return single calls of a scorer, whose slowest hundredth is compared with their median."""

    def build(load: Load) -> Mapping[str, Call]:
        ranker = _ranker(load, *ENCODERS["a 50-event transformer"])
        user, rows = _rows(load, ranker, 1), _rows(load, ranker, CANDIDATES)

        def score() -> object:
            with torch.no_grad():
                return ranker.score_candidates(user, rows)

        return {"HoME": score}

    return Comparison(
        name=f"{CANDIDATES} candidates x {WATCH + INTERACTION} tasks",
        op="candidates",
        build=build,
        baseline="HoME",
        single_calls=30,
        tails={"HoME": TAIL_BAR},
    )


def _ranker(load: Load, encoder: str, options: Mapping[str, Any]) -> Any:
    """Return a ranker for inference."""
    schema = load("recsys.schema")
    sides: Sequence[str] = ["user"] * 12 + ["item"] * 12 + ["context"] * (FEATURES - 24)
    history = [schema.History("watched", of="f12", max_length=EVENTS, encoder=encoder or "mean")]
    groups = ["watch"] * WATCH + ["interaction"] * INTERACTION
    features = schema.FeatureSchema(
        tasks=tuple(schema.Task(f"t{i}", category=group) for i, group in enumerate(groups)),
        sparse=tuple(schema.Sparse(f"f{i}", side=side) for i, side in enumerate(sides)),
        sequences=tuple(history if encoder else ()),
        dim=DIM,
    )
    torch.manual_seed(0)
    encoders = {"watched": options} if encoder else {}
    sizes = {f"f{i}": ROWS for i in range(FEATURES)}
    made = load("recsys.ranker").Ranker.build(features, sizes, 0, "HoME", HOME, encoders=encoders)
    return made.folded()


def _rows(load: Load, ranker: Any, number: int) -> Any:
    draw = torch.Generator().manual_seed(number)
    sparse = torch.randint(ROWS, (number, FEATURES), generator=draw)
    events = torch.randint(2, ROWS, (number, EVENTS), generator=draw)
    histories = tuple(events for _ in ranker.schema.sequences)
    return load("recsys.inputs").Rows(sparse, torch.empty(number, 0), histories)


EVERY = 100
BAR = 1.05
SINGLE_CALLS = {"3.2 M weights": 1, "tiny": 8}


def reported(size: str) -> Comparison:
    """Return a step of HoME alone, and with a report of its experts in one of a hundred.

    Args:
        size: Name of the sizes.
    """
    sizes = SIZES[size]

    def build(load: Load) -> Mapping[str, Call]:
        home = home_of(load, sizes).train()
        draw = torch.Generator().manual_seed(1)
        shape = sizes.rows, sizes.tasks
        batch = load("recsys.diagnosis.diagnose").Rows(
            torch.randn(sizes.rows, sizes.inputs, generator=draw),
            torch.randint(2, shape, generator=draw).float(),
            torch.ones(shape, dtype=torch.bool),
            torch.ones(sizes.rows),
        )
        adam = torch.optim.Adam(home.parameters(), fused=True)
        kind = load("recsys.diagnosis.diagnose").ExpertReportCallback
        report = kind(EVERY, forward=lambda rows: home(rows.v))
        trainer = SimpleNamespace(global_step=0, loggers=[], is_global_zero=True)
        home.device = torch.device("cpu")  # of a Lightning module

        def step() -> None:
            loss = F.binary_cross_entropy_with_logits(home(batch.v), batch.labels)
            adam.zero_grad()
            loss.backward()
            adam.step()

        def step_of(number: int) -> object:
            step()
            trainer.global_step += number
            report.on_train_batch_end(trainer, home, None, batch, 0)
            return report.report

        def passed_over() -> object:
            return step_of(0)  # that of the last report

        def measured() -> object:
            return step_of(1 if report.report is None else EVERY)

        return {"alone": step, "step passed over": passed_over, "step reported": measured}

    return Comparison(
        name=f"training step of HoME of {size}, one in {EVERY} reported",
        op="expert_report",
        build=build,
        baseline="alone",
        bars={"ExpertReport": BAR},
        mixtures={"ExpertReport": {"step passed over": 1 - 1 / EVERY, "step reported": 1 / EVERY}},
        single_calls=SINGLE_CALLS[size],
        unit="step",
        memory=2.0e9,
    )
