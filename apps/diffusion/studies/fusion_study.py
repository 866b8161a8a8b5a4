"""Do gates help? Fused adapters on combinations that no gate was trained on."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from apps.diffusion.embedded_world import World
from apps.diffusion.studies.base_study import Asked, Method, encoder_of, world_data
from apps.diffusion.studies.fused_views import (
    BOTH,
    KINDS,
    PAIRS,
    RETENTION,
    SEEING,
    cost_rows,
    crossed,
    losses_of_seeing,
    pictured,
    retained_of,
    retention_rows,
    stored,
)
from core_gates.errors import GatesError, check_option
from diffusion.data.concepts import concepts
from diffusion.experiments.combined_losses import (
    EVERY,
    FIRST,
    MANY,
    MOST,
    OTHERS,
    TIMES,
    losses,
    trial,
)
from diffusion.experiments.trained_gates import (
    as_used,
    combinations,
)
from harness.evidence import Bar, Row, compare, moments
from harness.experiment import Arrays, Choice, Piece, Run
from harness.experiment.tuning import Box
from harness.files import content_digest

TRIALS = 12
GATES: dict[str, Any] = {
    "variant": "full",
    "steps": 400,
    "batch_size": 8,
    "caption_dropout": 0.1,
    "factors": True,
    "learning_rate": 2.5e-2,
}  # how gates are trained, those that ship among them: the best of as many trials of their rate

PUBLISHED_GATES: dict[str, Any] = GATES | {
    "factors": None,
    "variant": "no_base",
    "initialization": "published",
    "global_rank": 2,
    "contrast": True,
    "margin": 0.5,
}  # as in AutoLoRA (2025), all together

LIKE_GATES = {
    name: GATES[name] for name in ("steps", "batch_size", "caption_dropout", "learning_rate")
}
"""How rivals are trained that have parameters."""

LAYERWISE = "x_lora layerwise"
"""The rival that looks at the input as gates do; it serves pairs alone."""

STRENGTHS_OF_LAYERS: dict[str, Any] = LIKE_GATES | {"mode": "strengths"}

VARIANTS: dict[str, dict[str, Any]] = {
    "gates": GATES,
    "gates + role": GATES | {"told": 1.0},
    "gates + switch": GATES | {"switch": True, "group": "train_useless"},
    "gates as published": PUBLISHED_GATES,
    LAYERWISE: LIKE_GATES | {"group": "train2", "rival": "x_lora", "layerwise": True},
    "adapter_strengths": LIKE_GATES
    | {"rival": "adapter_strengths", "names": [concept.name for concept in concepts()]},
    "layer_strengths": STRENGTHS_OF_LAYERS,
    "layer_strengths + role": STRENGTHS_OF_LAYERS | {"told": 1.0},
}  # what is trained on the training combinations

BLIND = "layer_strengths"
"""The rival that is trained on all that gates are trained on, but does not look at the input."""

FEWER = " (fewer adapters)"
VARIANTS |= {
    f"{name}{FEWER}": VARIANTS[name] | {"group": "train_fewer"}
    for name in ("gates", "gates + role", BLIND, f"{BLIND} + role")
}
"""Those that have not seen the adapters of ``new2`` are compared on it, under the plain names."""

LEARNED = (LAYERWISE, BLIND, "adapter_strengths")
"""Whose learning rates have trials, as that of the gates that ship had; variants share a rate."""

RATE, TRIED_STEPS = "learning_rate", 100
RATES = {RATE: (2e-3, 6e-2)}

PLAIN: dict[str, dict[str, Any]] = {
    "none": {},
    "alone0": {},
    "alone1": {},
    "sum": {},
    "mean": {},
}  # the base, each adapter of a pair alone, and rivals without settings

PUBLISHED: dict[str, dict[str, Any]] = {
    "ties": {"weight": 1.0, "density": 0.2},
    "dare_linear": {"weight": 1.0, "density": 0.5},
    "switch": {"tau": 5},
    "k_lora": {"alpha": 1.5, "beta": 1.275},
}  # settings of rivals

LOWEST = "sum without the lowest cosine"
"""The rival of a switch: the encoder, which tells both how well adapters suit a prompt, tells a sum
what to do without; it knows that one of three is useless."""

STRENGTHS = {FIRST: (0.4, 1.6), OTHERS: (0.4, 1.6)}
WEIGHT, DENSITY = {"weight": (0.3, 1.6)}, {"density": (0.1, 0.9)}
ONE_NUMBER = "sum times one number"
SPACES: dict[str, Box] = {
    "sum": STRENGTHS | {MANY: (0.4, 1.6)},
    ONE_NUMBER: {EVERY: (0.4, 1.6), MANY: (0.4, 1.6)},
    "ties": WEIGHT | DENSITY,
    "dare_linear": WEIGHT | {"density": (0.1, 1.0, 1.0)},
    "switch": STRENGTHS | {"tau": (1.0, 6.0)},
    "composite": STRENGTHS,
    "k_lora": STRENGTHS | {"alpha": (0.5, 3.0), "beta": (0.1, 1.5)},
}  # what is tuned of rivals; `sum` with tuned strengths is their plainest

FIRST_TRIALS = {
    name: {axis: PUBLISHED.get(name, {}).get(axis, 1.0) for axis in box}
    for name, box in SPACES.items()
}
"""What is tried first of each: what is published, at full strength."""

SCHEDULED = ("switch", "k_lora")
"""Rivals that follow the steps of a run: they are tuned at all times that they are tested at.

At half as many times, a period of steps is only seen where it happens to be seen.
"""

GROUPS = {
    "test2": "48 unseen pairs",
    "test3": "48 unseen triples",
    "useless3": "48 unseen pairs and a useless adapter",
    "new2": "24 pairs of adapters that no gate has seen",
}
PAIRS_TASK = GROUPS[PAIRS]
METRIC, USELESS, OPENING = "log_loss_ratio", "log_loss_over_pair", "needed_over_useless"
SHOWN = ("none", "sum", "mean", "gates", BLIND)
"""Methods whose images, retention and cost are shown, with the best rivals."""

NO_TRIPLES = ("alone0", "alone1", "x_lora")  # methods for two adapters


class Fused:
    """The comparison in a run folder.

    Args:
        run: Of the comparison.
        world: Base and zoo.
        seeds: Of what is trained.
    """

    def __init__(self, run: Run, world: World, seeds: Sequence[int]) -> None:
        self.run, self.world, self.seeds = run, world, tuple(seeds)
        self.files = world.zoo(0)
        self.start = world.zoo_digest
        self.places: dict[str, Any] = {
            "base_folder": world.base_folder,
            "files": self.files,
        }

    @cached_property
    def encoder(self) -> Path | None:
        """Folder of the encoder of adapters; None if it is missing."""
        return encoder_of(self.world)

    def chosen(self) -> dict[str, Choice]:
        """Return the settings of rivals, rates of training among them, by equally many trials."""
        rates = self.run.tune(
            dict.fromkeys(LEARNED, RATES),
            partial(trial, **self.places),
            trials=TRIALS,
            ticks=TRIED_STEPS + len(combinations("tried")),
            own={name: VARIANTS[name] | {"steps": TRIED_STEPS} for name in LEARNED},
            plain={name: {RATE: GATES[RATE]} for name in LEARNED},
            start=self.start,
        )
        return rates | self.run.tune(
            SPACES,
            partial(trial, **self.places),
            trials=TRIALS,
            ticks=len(combinations("tried")),
            own={
                name: {"tuned": list(box), "times": TIMES if name in SCHEDULED else None}
                | ({"rival": "sum"} if name == ONE_NUMBER else {})
                for name, box in SPACES.items()
            },
            plain=FIRST_TRIALS,
            start=self.start,
        )

    def methods(self) -> list[Method]:
        """Return all methods, after rivals were tuned."""
        chosen = self.chosen()
        listed = [Method(name, name, setting) for name, setting in PLAIN.items()]
        if self.encoder is not None:
            listed.append(Method(LOWEST, "sum", self.known({"leave": "lowest"})))
        listed += [
            Method(f"{name} tuned", "sum" if name == ONE_NUMBER else name, {**chosen[name].setting})
            for name in SPACES
            if name in chosen
        ]
        for name, variant in VARIANTS.items():
            like = next((tuned for tuned in LEARNED if name.startswith(tuned)), "")
            if like and like not in chosen:
                continue
            settings = self.known(variant) | dict(chosen[like].setting if like else {})
            pieces = {s: self.run.piece(name, s, start=self.start, **settings) for s in self.seeds}
            rival = settings.get("rival", name)
            settings = as_used(settings)
            listed.append(Method(name, rival, settings, pieces))
        only = self.run.only
        return [method for method in listed if not only or method.name in only]

    def known(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings with the encoder, where a method takes scores from it."""
        if not settings.keys() & {"switch", "leave"}:
            return dict(settings)
        if self.encoder is None:
            raise GatesError("there is no encoder of adapters: run `evaluate retrieval` first")
        return {**settings, "encoder": content_digest(self.encoder).sha256[:16]}

    def losses(self, methods: Sequence[Method], group: str) -> dict[str, list[np.ndarray]]:
        """Return method -> mean losses (P,) of combinations, one array a seed."""
        loaded = stored(self, suiting(methods, group), "losses", losses, group)
        return {
            name: [np.nanmean(run["losses"].numpy(), axis=1) for run in runs]
            for name, runs in loaded.items()
        }

    def piece(self, method: Method, group: str, seed: int | None, **changes: Any) -> Piece:
        """Return the piece that a figure of a method on the test drawings of a group is."""
        return self.run.piece(
            method.name,
            seed,
            {"of": group},
            rival=method.rival,
            settings=dict(method.settings),
            group=group,
            start=self.start,
            trained=None if seed is None else method.trained[seed].name,
            **{"part": "test", "times": TIMES, "most": MOST, **changes},
        )


def suiting(methods: Sequence[Method], group: str) -> list[Method]:
    """Return the methods that are compared on a group, under the names of its rows."""
    fresh = [method for method in methods if method.name.endswith(FEWER)]
    if group != "useless3":
        methods = [method for method in methods if method.name != LOWEST]
    if group == "new2":
        plain = [m for m in methods if not m.trained]
        return plain + [method._replace(name=method.name.removesuffix(FEWER)) for method in fresh]
    triples = group in ("test3", "useless3")
    return [m for m in methods if m not in fresh and not (triples and m.rival in NO_TRIPLES)]


def costs_of_useless(
    alone: Mapping[str, list[np.ndarray]], joined: Mapping[str, list[np.ndarray]]
) -> list[Row]:
    """Return logarithms of losses of pairs with a useless adapter over those of the pairs alone.

    The sum without the lowest cosine is compared with the sum, which it is for pairs.
    """
    alone = dict(alone) | ({LOWEST: alone["sum"]} if "sum" in alone else {})
    scores = {
        name: [
            moments(np.log(more) - np.log(fewer), name=USELESS)
            for fewer, more in zip(alone[name], runs, strict=True)
        ]
        for name, runs in joined.items()
        if name in alone and name != "none"
    }
    return compare(scores, crossed(combinations("useless3")), task=GROUPS["useless3"])


def openings(fused: Fused, methods: Sequence[Method]) -> list[Row]:
    """Return by how much more a switch lets needed adapters through than a useless one."""
    scores, store = {}, fused.run.store("losses", Arrays())
    for method in methods:
        pieces = [fused.piece(method, "useless3", seed) for seed in method.trained]
        gates = [
            o for p in pieces if store.find(p) and (o := store.load(p).get("openings")) is not None
        ]
        if gates:
            opened = [(gate[:, :-1].mean(1) - gate[:, -1]).numpy() for gate in gates]
            scores[method.name] = [moments(values, name=OPENING) for values in opened]
    return compare(scores, crossed(combinations("useless3")), task=GROUPS["useless3"])


KNOWN = (*PLAIN, LOWEST, *SPACES, *(f"{name} tuned" for name in SPACES), *VARIANTS, *SEEING)


def fusion_study(asked: Asked, world: World) -> None:
    """Compare gates with all rivals on unseen pairs, and triples, with useless and new adapters."""
    fused = comparison(asked, world)
    chosen, methods = fused.chosen(), fused.methods()
    rows: list[Row] = []
    every = {group: fused.losses(methods, group) for group in GROUPS}
    every[PAIRS] |= losses_of_seeing(fused)
    for group, task in GROUPS.items():
        rows += compared(every[group], group, task)
    rows += costs_of_useless(every[PAIRS], every["useless3"])
    rows += openings(fused, methods)
    best = best_rival(chosen)
    asked.run.finish(
        rows,
        bars_of(rows, best),
        seeds=asked.seeds,
        data=[world_data()],
        headline=f"{headline_of(rows, best)} {HOW_TO_READ}".strip(),
    )


def images_study(asked: Asked, world: World) -> None:
    """Judge images of some methods, what is left of each adapter in them, and what they cost."""
    fused = comparison(asked, world)
    best = best_rival(fused.chosen())
    shown = [method for method in fused.methods() if method.name in {*SHOWN, best}]
    drawn = [method for method in shown if method.name != "none"]
    rows = [
        *pictured(fused, drawn, "test2", GROUPS["test2"]),
        *pictured(fused, [m for m in drawn if m.rival not in NO_TRIPLES], "test3", GROUPS["test3"]),
        *retention_rows(fused, drawn),
        *cost_rows(fused, shown),
    ]
    asked.run.finish(rows, bars_of_images(rows), seeds=asked.seeds, data=[world_data()])


def comparison(asked: Asked, world: World) -> Fused:
    """Return the methods and tasks that the study compares, after checking ``only``.

    Raises:
        GatesError: ``only`` names no method, or leaves out what others are compared with.
    """
    for name in asked.run.only:
        check_option("--only", name, KNOWN, GatesError)
    if asked.run.only and not {"none", "gates"} <= {*asked.run.only}:
        raise GatesError(
            f"--only is {', '.join(asked.run.only)}, without none or gates: name both, since "
            "losses are compared with those of the base and of gates"
        )
    return Fused(asked.run, world, asked.seeds)


def compared(found: Mapping[str, list[np.ndarray]], group: str, task: str) -> list[Row]:
    """Return mean logarithms of losses over that of the base, and differences from the gates."""
    scores = {
        name: [moments(np.log(run / found["none"][0]), name=METRIC) for run in runs]
        for name, runs in found.items()
        if name != "none"
    }
    reference = "gates" if "gates" in scores else None  # a quick run may have none
    return compare(scores, crossed(combinations(group)), task=task, reference=reference)


def best_score(choice: Choice) -> float:
    """Return the best score of the trials."""
    scores = [trial["score"] for trial in choice.trials if trial.get("score") is not None]
    return min((float(score) for score in scores if not math.isnan(score)), default=math.inf)


def best_rival(chosen: Mapping[str, Choice]) -> str:
    """Return the rival with the best trial on training combinations; empty if none was tuned."""
    names = [name for name in SPACES if name in chosen and chosen[name].trials]
    best = min(names, key=lambda name: best_score(chosen[name]), default="")
    return f"{best} tuned" if best else ""


def value_in(rows: Sequence[Row], method: str, task: str, metric: str, versus: str = "") -> Row:
    """Return a row; one of NaN where it is missing."""
    wanted = (method, task, metric, versus)
    matching = (row for row in rows if (row.method, row.task, row.metric, row.versus) == wanted)
    return next(matching, Row(*wanted[:3], math.nan, math.nan, math.nan))


def bars_of(rows: Sequence[Row], tuned: str) -> list[Bar]:
    """Return the bars on losses of the fusion study.

    Rivals see no drawing of a test combination. Strengths by layer and X-LoRA, which serves pairs
    alone, are told no roles, as gates are not; tuned strengths of a rival know which adapter is
    the subject.

    Args:
        rows: All that was found.
        tuned: The rival with the best trial among those that are not trained.
    """
    row, useless = partial(value_in, rows, "gates + switch"), GROUPS["useless3"]
    limits = {BLIND: math.log(0.98)} | dict.fromkeys((tuned, LAYERWISE), 0.0)
    bars = [
        Bar(f"{task}: gates / {name}, upper end",
            -value_in(rows, name, task, METRIC, "gates").low, "<=", limit)
        for task in (PAIRS_TASK, GROUPS["test3"])
        for name, limit in limits.items()
        if name != LAYERWISE or task == PAIRS_TASK
    ]  # fmt: skip
    return [
        *bars,
        Bar("a useless adapter: gates + switch", row(useless, USELESS).value, "<=", math.log(1.08)),
        Bar("a switch where none is useless: over gates", row(PAIRS_TASK, METRIC, "gates").value,
            "<=", math.log(1.01)),
        Bar("switch, needed - useless", row(useless, OPENING).value, ">=", 0.2),
    ]  # fmt: skip


def bars_of_images(rows: Sequence[Row]) -> list[Bar]:
    """Return the bars on images, and on the part of each adapter that is left in them."""
    row, shown = partial(value_in, rows), f"images of {PAIRS_TASK}"
    return [
        Bar("images: gates - sum, both right, lower end", -row("sum", shown, BOTH, "gates").high,
            ">=", 0.0),
        *(
            Bar(f"{kind} kept by gates", row("gates", RETENTION, retained_of(kind)).value, "<=",
                math.log(1.4))
            for kind in KINDS
        ),
    ]  # fmt: skip


HOW_TO_READ = (
    "Scores are natural logarithms of losses over that of the base alone: 0 is the base, less is "
    "better, and a difference from gates of 0.1 is a loss about 10 % higher. The adapter of the "
    "subject alone is alone0, that of the style alone1; tuned is a rival with the settings of its "
    "best trial, layer_strengths has one trained number a layer."
)


def headline_of(rows: Sequence[Row], best: str) -> str:
    """Return the verdict in one sentence, whichever way it goes; empty without the best rival."""
    row = value_in(rows, best, PAIRS_TASK, METRIC, "gates")
    if math.isnan(row.value):
        return ""
    if row.significant:
        word = "lower" if row.value > 0 else "higher"
        return (
            f"On unseen pairs the loss of gates is {abs(math.expm1(-row.value)):.1%} {word} than "
            f"that of the best rival, {best}."
        )
    return (
        f"On unseen pairs gates are level with the best rival, {best}: its loss is "
        f"{math.expm1(row.value):+.1%} [{math.expm1(row.low):+.1%}, {math.expm1(row.high):+.1%}]."
    )
