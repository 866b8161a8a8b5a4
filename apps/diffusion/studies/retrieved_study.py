"""Which of six retrieved adapters does a caption need? A gate next to rules that are tuned."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from apps.diffusion.embedded_world import World
from apps.diffusion.studies.base_study import SAMPLER, Asked, encoder_of, world_data
from apps.diffusion.studies.fusion_study import FEWER, GATES, best_score, value_in
from core_gates.errors import GatesError
from diffusion.experiments.retrieved_sets import (
    CONSTANT,
    GATE,
    NEEDED,
    TOLD,
    retrieved_images,
    retrieved_losses,
    trial,
)
from diffusion.experiments.trained_gates import (
    OTHER_WORDS,
    GatesForm,
    combinations,
    train_gates,
)
from diffusion.retrieval import load_encoder
from diffusion.rivals.opening import LESS_SIMILARITY
from harness.evidence import Bar, Resamples, Row, compare, moments
from harness.experiment import Arrays, Choice, Piece
from harness.experiment.tuning import Box

TRAINING: dict[str, Any] = {
    "mode": "relevance",
    "steps": 520,
    "batch_size": 8,
    "caption_dropout": 0.0,
    "learning_rate": 1e-2,
    "relative": True,
    "precision": "32-true",
}  # how a relevance gate is trained, from the tuned rule on whose form it has

TRIALS = 8
BASE = "base alone"
STRENGTH: Box = {"strength": (0.5, 1.3)}
WEIGHT: Box = {"weight": (0.05, 1.3)}
SPACES: dict[str, Box] = {
    "largest gap": {"least": [1, 2], "most": [2, 3, 4], **STRENGTH},
    "soft threshold": {"threshold": (0.08, 0.4), "width": (0.01, 0.12), **STRENGTH},
    LESS_SIMILARITY: {
        "less": (0.05, 1.0),
        "threshold": (0.04, 0.4),
        "width": (0.01, 0.12),
        **STRENGTH,
    },
    "absolute threshold": {"threshold": (0.08, 0.4), **STRENGTH},
    "relative threshold": {"share": (0.2, 0.9), **STRENGTH},
    "top-2": STRENGTH,
    "top-3": STRENGTH,
    "sum": {"strength": (0.05, 1.2)},
    "mean": {"strength": (0.3, 6.0)},
    "ties": {**WEIGHT, "density": (0.05, 0.9)},
    "dare_linear": {**WEIGHT, "density": (0.1, 1.0, 1.0)},
    "svd": {**WEIGHT, "rank": [4, 8, 16]},
    CONSTANT: {"strength": (0.05, 1.2)},
}  # what is tuned of the rivals

PLAIN = {"least": 2, "most": 3, "threshold": 0.2, "width": 0.03, "less": 0.3, "share": 0.5,
         "density": 0.5, "rank": 4}  # fmt: skip
FIRST = {n: {axis: PLAIN.get(axis, 1.0) for axis in box} for n, box in SPACES.items()}
"""What is tried first; what is not named is 1."""

FIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "top-2": ("top", {"count": 2}),
    "top-3": ("top", {"count": 3}),
    "sum": ("all", {}),
    BASE: ("all", {"strength": 0.0}),
}  # rivals that are a rule of another name, or with a setting

FLOOR = " above the least cosine"  # after what opens nothing where the best cosine is lower

NEW = "new2"
TASKS = {
    "test2": "48 unseen pairs",
    "test3": "48 unseen triples",
    "one": "24 captions that need one",
    "none": "24 captions that need none",
    OTHER_WORDS: "48 unseen pairs in other words",
}
COMBINED = ["test2", "test3"]
BOTH, UNSEEN = "pairs and triples", "24 pairs of adapters unseen by gate and thresholds"
LOSS, RIGHT = "log_loss_over_needed", "both_right"
OPENNESS = ("needed_open", "useless_open", "any_open")
Found = Mapping[str, Sequence[Mapping[str, np.ndarray]]]


class Comparison:
    """What is tuned, trained and measured on one part of the adapters.

    Args:
        asked: Options of the study.
        world: Base and zoo.
        fewer: Whether gate and thresholds see no adapter of the pairs they are tested on.
    """

    def __init__(self, asked: Asked, world: World, *, fewer: bool) -> None:
        folder = encoder_of(world)
        if folder is None:
            raise GatesError("there is no encoder of adapters: run `evaluate retrieval` first")
        self.run, self.world, self.seeds = asked.run, world, asked.seeds
        self.suffix = FEWER if fewer else ""
        self.tried, self.train = (
            ("tried_retrieved_fewer", "retrieved_fewer")
            if fewer
            else ("tried_retrieved", "retrieved")
        )
        encoder = load_encoder(folder).fingerprint
        self.common: dict[str, Any] = {"start": world.zoo_digest, "encoder": encoder}
        self.gates = self.run.store("gates", GatesForm())
        self.places: dict[str, Any] = {
            "base_folder": world.base_folder, "files": world.zoo(0), "encoder": folder
        }  # fmt: skip
        constant = self.run.piece(CONSTANT, 0, start=world.zoo_digest, **GATES)
        shipped = self.gates.find(self.run.piece("gates", 0, **constant.settings))
        self.constant = {} if shipped is None else {CONSTANT: shipped}

    def chosen(self) -> dict[str, Choice]:
        """Return the settings of rivals, by equally many trials on training sets."""
        spaces = {n: s for n, s in SPACES.items() if n != CONSTANT or self.constant}
        own = {
            f"{name}{self.suffix}": {
                "rule": FIXED.get(name, (name, {}))[0],
                "fixed": FIXED.get(name, (name, {}))[1],
                "tuned": list(box),
                "group": self.tried,
            }
            for name, box in spaces.items()
        }
        tuned = self.run.tune(
            {f"{name}{self.suffix}": box for name, box in spaces.items()},
            partial(trial, trained=self.constant, **self.places),
            trials=TRIALS,
            own=own,
            plain={f"{name}{self.suffix}": FIRST[name] for name in spaces},
            **self.common,
        )
        return {name.removesuffix(self.suffix): choice for name, choice in tuned.items()}

    def trained(self, start: Mapping[str, Any]) -> dict[int, Piece]:
        """Return the pieces that train the gate from a tuned rule on, by seed."""
        settings = TRAINING | {"group": self.train} | dict(start) | self.common
        return {s: self.run.piece(f"{GATE}{self.suffix}", s, **settings) for s in self.seeds}

    def found(
        self, kind: str, names: Sequence[str], chosen: Mapping[str, Choice], **own: Any
    ) -> Found:
        """Return method -> what is measured, one a seed of what is trained.

        Args:
            kind: ``losses``, or ``pictures`` for images that are judged.
            names: Of the methods.
            chosen: See `chosen`.
            own: Settings of the pieces.
        """
        trained, pieces = (
            self.trained(chosen[LESS_SIMILARITY].setting),
            dict[Piece, tuple[str, Piece | None]](),
        )
        for name in names:
            way = name.removesuffix(FLOOR)
            rule, fixed = FIXED.get(way, (way, {}))
            settings = fixed | dict(chosen[way].setting if way in chosen else {})
            settings |= {"floor": True} if way != name else {}
            for seed in self.seeds if way == GATE else (None,):
                gate = None if seed is None else trained[seed]
                piece = self.run.piece(
                    f"{name}{self.suffix}", seed, rule=rule, own=settings,
                    gate=None if gate is None else gate.fingerprint, **own, **self.common,
                )  # fmt: skip
                pieces[piece] = name, gate
        store = self.run.store(kind, Arrays())
        missing = store.missing(list(pieces))
        gates = [gate for _, gate in map(pieces.__getitem__, missing) if gate is not None]
        train = partial(train_gates, **self.places)
        self.run.obtain(self.gates, gates, train, ticks=TRAINING["steps"])
        folders = {p.name: self.gates.find(gate) for p, (_, gate) in pieces.items() if gate}
        folders |= {
            p.name: self.constant[CONSTANT] for p, (name, _) in pieces.items() if name == CONSTANT
        }
        work: Any = retrieved_losses
        if kind == "pictures":
            work = partial(retrieved_images, judge=self.world.judge() if missing else {})
        ready = [piece for piece in missing if folders.get(piece.name, piece) is not None]
        work = partial(work, trained=folders, **self.places)
        self.run.obtain(store, ready, work, ticks=len(own["groups"]), scoring=True)
        found: dict[str, list[Mapping[str, np.ndarray]]] = {}
        for piece, (name, _) in pieces.items():
            if store.find(piece):
                arrays = {key: value.numpy() for key, value in store.load(piece).items()}
                found.setdefault(name, []).append(arrays)
        return found


def rows_of(found: Found, groups: Sequence[str], task: str) -> list[Row]:
    """Return the rows of a task: losses over those of the needed alone, openness, images.

    Args:
        found: Method -> what was measured, by seed.
        groups: Of combinations, taken together.
        task: Name of the rows.
    """
    subjects = np.array([pair.subject for group in groups for pair in combinations(group)])

    def joined(run: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        return np.concatenate([run[f"{group}.{name}"] for group in groups])

    measured, rows = dict[str, dict[str, list[np.ndarray]]](), list[Row]()
    if NEEDED in found:
        base = np.log(joined(found[NEEDED][0], "losses"))
        measured[LOSS] = {
            name: [np.log(joined(run, "losses")) - base for run in runs]
            for name, runs in found.items()
        }
    for metric in (*OPENNESS, RIGHT):
        measured[metric] = {
            name: [joined(run, metric) for run in runs]
            for name, runs in found.items()
            if all(f"{group}.{metric}" in runs[0] for group in groups)
        }
    for metric, values in measured.items():
        every = [value for runs in values.values() for value in runs]
        if not every or not (whole := np.isfinite(every).all(0)).any():
            continue  # such as needed adapters where none is
        scores = {n: [moments(v[whole], name=metric) for v in runs] for n, runs in values.items()}
        reference = GATE if metric in (LOSS, RIGHT) and GATE in scores else None
        draws = Resamples.clusters(subjects[whole].tolist())
        rows += compare(scores, draws, task=task, reference=reference)
    return rows


def best_rule(chosen: Mapping[str, Choice]) -> str:
    """Return the rival with the best trial."""
    return min(chosen, key=lambda name: best_score(chosen[name]))


def bars_of(rows: Sequence[Row], best: str, best_new: str) -> list[Bar]:
    """Return the bars: what the gate gains over the best rules, and what it opens."""
    row = partial(value_in, rows)
    ahead, fresh = row(best, BOTH, LOSS, GATE), row(best_new, UNSEEN, LOSS, GATE)
    none = row(f"{GATE}{FLOOR}", TASKS["none"], "any_open").value
    return [
        Bar(f"{BOTH}: {best} over the gate", ahead.value, ">=", math.log(1.2)),
        Bar(f"{BOTH}: {best} over the gate, lower end", ahead.low, ">=", math.log(1.1)),
        Bar(f"{UNSEEN}: {best_new} over the gate, lower end", fresh.low, ">=", 0.0),
        Bar(f"{BOTH}: {TOLD} under the gate", row(TOLD, BOTH, LOSS, GATE).value, ">=",
            math.log(0.88)),
        Bar(f"captions that need none: nothing opened{FLOOR}", 1 - none, ">=", 0.9),
        Bar("openness of useless adapters", row(GATE, BOTH, "useless_open").value, "<=", 0.1),
        Bar("openness of needed adapters", row(GATE, BOTH, "needed_open").value, ">=", 0.8),
    ]  # fmt: skip


def retrieved_study(asked: Asked, world: World) -> None:
    """Compare a relevance gate with tuned rules on sets of six retrieved adapters."""
    rows, best = list[Row](), dict[bool, str]()
    for fewer in (False, True):
        comparison = Comparison(asked, world, fewer=fewer)
        chosen, groups = comparison.chosen(), [NEW] if fewer else list(TASKS)
        best[fewer] = best_rule(chosen)
        names = (NEEDED, TOLD, GATE, BASE, *chosen)
        names += () if fewer else (f"{GATE}{FLOOR}", f"{best[fewer]}{FLOOR}")
        found = comparison.found("losses", names, chosen, groups=groups)
        if fewer:
            rows += rows_of(found, [NEW], UNSEEN)
            continue
        rows += rows_of(found, COMBINED, BOTH)
        rows += [row for group, task in TASKS.items() for row in rows_of(found, [group], task)]
    if not asked.run.quick:  # which has neither a gate nor a judge
        comparison = Comparison(asked, world, fewer=False)
        shown, chosen = (GATE, best[False], TOLD), comparison.chosen()
        pictures = comparison.found("pictures", shown, chosen, groups=COMBINED, sampler=SAMPLER)
        rows += rows_of(pictures, COMBINED, f"images of {BOTH}")
    row = value_in(rows, best[False], BOTH, LOSS, GATE)
    asked.run.finish(
        rows,
        bars_of(rows, best[False], best[True]),
        seeds=asked.seeds,
        data=[world_data()],
        headline=(
            f"Of six retrieved adapters the gate opens those that captions need: the loss of the"
            f" best tuned rule, {best[False]}, is {math.expm1(row.value):+.1%}"
            f" [{math.expm1(row.low):+.1%}, {math.expm1(row.high):+.1%}] over its own."
        ),
    )
