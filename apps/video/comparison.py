"""Networks of a contest on the same test rows: tuned alike, trained, scored, compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import numpy as np

from apps.video.training import (
    BASELINE,
    INTERCEPTS,
    Places,
    baseline_of,
    fit_baseline,
    ranker_of,
    train,
    trial,
    try_baseline,
)
from core_gates.errors import GatesError
from harness.evidence import Bar, Row, Scores, compare
from harness.experiment import Arrays, Choice, Job, Piece, Run
from harness.experiment.record import Record
from harness.experiment.ship import ROUNDED
from harness.runs.ticker import stepping, working
from recsys.baselines import KINDS
from recsys.batch import Batch
from recsys.data.datamodule import TableDataModule
from recsys.data.digest import table_digest
from recsys.diagnosis.expert_report import ExpertReport
from recsys.experiments.axes import check_axes, check_axis
from recsys.experiments.building import class_of, data_of, module_of, require_tables
from recsys.experiments.category_losses import category_rows
from recsys.experiments.claims import (
    AUC,
    AVERAGED,
    SUMMED,
    Claims,
    claim_bars,
    gain_rows,
    summary_rows,
)
from recsys.experiments.contest import Contest
from recsys.experiments.faults import CLAIMED, fault_bars, fault_rows, report_of
from recsys.experiments.predictions import (
    Probabilities,
    mean_auc,
    probabilities,
    scores_of,
)
from recsys.experiments.slices import SLICES, slice_rows, slices_of
from recsys.metrics.resampled import user_resamples
from recsys.schema import FeatureSchema

WEIGHTS, BASELINES = "weights", "baselines"
TRUTH = "truth_"
ORACLE = "oracle"
SINGLE = "SingleTask"
SHOWN = (SUMMED,)
RANDOM = "is_rand"  # column of rows whose video was drawn at random
RESAMPLES = 1000
UNTUNED = "@untuned"
EPOCHS = "epochs"
ARGUMENTS = "data.source.init_args."


class Fold(NamedTuple):
    """One split of the data: the settings that differ, and a key for the names of its pieces."""

    settings: Mapping[str, Any] = {}
    keys: Mapping[str, int] = {}


class Findings(NamedTuple):
    """What is found besides the contest: rows, bars, notes, and the metrics that tables show."""

    rows: Sequence[Row] = ()
    bars: Sequence[Bar] = ()
    notes: Sequence[str] = ()
    shown: Sequence[str] = ()


class Comparison:
    """A contest in a run.

    Args:
        run: Keeps pieces and scores.
        contest: Who takes part.
        seeds: Of every network.
        folds: Splits whose test rows are pooled, see :func:`folds_of`.
        exact_auc: Whether AUC gets intervals.
        averaged: Whether the mean of the seeds' predictions is a method, too.
        places: Where files are, by dotted name of the setting.

    Raises:
        GatesError: ``only`` of the run names no method.
    """

    def __init__(
        self,
        run: Run,
        contest: Contest,
        seeds: Sequence[int],
        folds: Sequence[Fold] = (Fold(),),
        *,
        exact_auc: bool = False,
        averaged: bool = False,
        places: Places | None = None,
    ) -> None:
        self.places = dict(places or {})
        self.run, self.contest, self.folds = run, contest, tuple(folds)
        self.seeds = tuple(dict.fromkeys(seeds))
        self.exact_auc, self.averaged = exact_auc, averaged
        self._known: dict[str, TableDataModule] = {}
        self._prepared: list[TableDataModule] = []
        self._notes: dict[str, None] = {}
        names = [*contest.entries, *contest.baselines]
        if strangers := [name for name in run.only if name not in names]:
            raise GatesError(f"--only names {strangers[0]!r}; known are {', '.join(names)}")

    def data(self, fold: Fold) -> TableDataModule:
        """Return the data of a fold."""
        found = self.data_of({**self.run.settings, **fold.settings})
        if found not in self._prepared:
            with working("preparing rows"):
                found.transform  # noqa: B018  (reads and fits)
            self._prepared.append(found)
        return found

    def own(self, fold: Fold) -> dict[str, dict[str, Any]]:
        """Return the settings of every network on a fold; sizes are those for its own columns."""
        schemas = {method: self._schema(method, fold) for method in self.contest.entries}
        common, first = self.run.settings, schemas[self.contest.reference]
        return {
            method: {**self.contest.settings(method, common, schema, first), **fold.settings}
            for method, schema in schemas.items()
        }

    def own_of_all(self) -> dict[str, dict[str, Any]]:
        """Return the settings of every network and baseline on the first fold."""
        first = self.folds[0]
        baselines = {
            name: {**self._baseline(name)[0], **first.settings} for name in self.contest.baselines
        }
        return self.own(first) | baselines

    def chosen(self) -> dict[str, Choice]:
        """Tune networks and baselines, on the first fold, each by equally many trials.

        Raises:
            GatesError: A network or a baseline has a setting that does not exist.
        """
        self._check_settings()
        first = self.folds[0]
        found = self.run.tune(
            self.contest.boxes(),
            self._work(trial),
            trials=self.contest.trials,
            own=self.own(first),
            ticks=self._epochs(),
            unit=EPOCHS,
        )
        boxes = {name: self._baseline(name)[1] for name in self.contest.baselines}
        found |= self.run.tune(
            {name: box for name, box in boxes.items() if box},
            self._work(try_baseline),
            trials=self.contest.trials,
            own=self.own_of_all(),
        )
        return found

    def known(self) -> dict[str, Choice]:
        """Return what was tuned before; nothing is computed."""
        found: dict[str, Choice] = {}
        for name, own in self.own(self.folds[0]).items():
            settings = {**own, "space": self.contest.boxes().get(name)}
            found |= self.run.chosen([name], **settings, trials=self.contest.trials)
        return found

    def pieces(self, chosen: Mapping[str, Choice]) -> list[list[Piece]]:
        """Return the networks of each fold, trained or not."""
        return [
            [
                self.run.piece(m, s, fold.keys, **{**own, **_setting(chosen, m)})
                for m, own in self.own(fold).items()
                for s in self.seeds
            ]
            for fold in self.folds
        ]

    def networks(self, chosen: Mapping[str, Choice]) -> list[list[Piece]]:
        """Return the trained networks of each fold; those that are missing are trained."""
        pieces = self.pieces(chosen)
        every = [piece for some in pieces for piece in some]
        store = self.run.store(WEIGHTS, Arrays())
        ticks = self._epochs()
        kept = set(self.run.obtain(store, every, self._work(train), ticks=ticks, unit=EPOCHS))
        return [[piece for piece in some if piece in kept] for some in pieces]

    def predictions(self, chosen: Mapping[str, Choice]) -> dict[str, list[Probabilities]]:
        """Return the predictions (N, T) of all test rows, method by method, one for each seed."""
        store = self.run.store(WEIGHTS, Arrays())
        found: dict[str, dict[int | None, list[Probabilities]]] = {}
        trained = _on_every_fold(self.networks(chosen))
        for piece in stepping("scoring", [piece for pieces in trained for piece in pieces]):
            data = self.data_of(piece.settings)
            tested = [table_digest(data.table("test"))[:12]]
            weights = store.load(piece, tested=tested)
            self._observe(store.record(piece), data)
            one = probabilities(ranker_of(piece, weights, data), data.batch("test"))
            found.setdefault(piece.method, {}).setdefault(piece.seed, []).append(one)
        pooled = {m: [np.concatenate(p) for p in s.values()] for m, s in found.items()}
        if self.averaged and len(self.seeds) > 1:
            pooled |= {f"{m}{AVERAGED}": [np.mean(p, 0)] for m, p in pooled.items()}
        return pooled | self._baselines(chosen) | self._oracle()

    def rows(self, found: Mapping[str, list[Probabilities]]) -> list[Row]:
        """Return the rows of all methods: summed log-loss with differences, then every task."""
        test, tasks = self.test(), self.tasks()
        reference = self.contest.reference if self.contest.reference in found else None
        draws = user_resamples(test.user.numpy(), resamples=RESAMPLES)
        scores = {
            m: [scores_of(test, one, tasks, exact_auc=self.exact_auc) for one in found[m]]
            for m in stepping("summing over users", found)
        }
        summed = {m: [_renamed(one[""], SUMMED) for one in own] for m, own in scores.items()}
        with working("resampling users"):
            rows = compare(summed, draws, task="test", reference=reference)
            schema = self.data(self.folds[0]).schema
            rows += category_rows(test, found, schema, draws, reference=reference)
        against = reference if self.exact_auc else None
        per_task: list[Row] = []
        for number, task in enumerate(stepping("resampling users", tasks)):
            of_task = {m: [one[task] for one in own] for m, own in scores.items()}
            per_task += compare(of_task, draws, task=task, reference=against)
            if not self.exact_auc:
                per_task += [
                    Row(m, task, AUC, mean_auc(test, own, number)) for m, own in found.items()
                ]
        categories = {t.name: t.category for t in schema.tasks}
        singles = [m for m, entry in self.contest.entries.items() if entry.get("net") == SINGLE]
        gains = [row for single in singles[:1] for row in gain_rows(per_task, single)]
        return [*rows, *summary_rows(per_task, categories), *gains, *per_task]

    def faults(self, chosen: Mapping[str, Choice]) -> list[Row]:
        """Return what the experts of every network show, on the first fold."""
        store = self.run.store(WEIGHTS, Arrays())
        reports: dict[str, list[ExpertReport]] = {}
        for piece in stepping("measuring experts", self.networks(chosen)[0]):
            data = self.data_of(piece.settings)
            ranker = ranker_of(piece, store.load(piece), data)
            reports.setdefault(piece.method, []).append(report_of(ranker, data.batch("test")))
        return fault_rows(reports)

    def slices(self, found: Mapping[str, list[Probabilities]]) -> list[Row]:
        """Return the rows of all methods on parts of the test rows: new users, new items, …."""
        parts = slices_of([self.data(fold).tables for fold in self.folds], random=RANDOM)
        reference = self.contest.reference if self.contest.reference in found else None
        return slice_rows(self.test(), parts, found, reference=reference)

    def finish(
        self,
        claims: Claims,
        *,
        experts: bool = False,
        slices: bool = False,
        further: Findings | None = None,
        **facts: Any,
    ) -> None:
        """Score all methods, check the claims and write ``scores.json``.

        Args:
            claims: What is claimed.
            experts: Whether the faults of experts are measured.
            slices: Whether parts of the test rows are scored.
            further: What controls have found.
            facts: Headline.

        Raises:
            GatesError: There is no seed, a claim names no method, two folds have the same test
                rows, or slices are asked for of a stream.
        """
        if not self.seeds:
            raise GatesError("--seeds names none: give one at least")
        if slices:
            require_tables(self.data(self.folds[0]), "--slices needs", "leave out --slices")
        self._refuse_equal_folds()
        claims.check([*self.contest.entries, *self.contest.baselines])
        further = further or Findings()
        chosen = self.chosen()
        found = self.predictions(chosen)
        made = self.rows(found)
        with working("scoring slices"):
            sliced = self.slices(found) if slices else []
        faults = self.faults(chosen) if experts else []
        reference = self.contest.reference
        test = self.test()
        checked = claim_bars(
            claims, made, reference, test=test, tasks=self.tasks(), found=found.get(reference, [])
        )
        data = self.data(self.folds[0])
        self.run.finish(
            [*made, *sliced, *faults, *further.rows],
            [*checked, *fault_bars(faults, claims.collapsed, claims.healthy), *further.bars],
            seeds=self.seeds,
            data=data.digest(),
            metrics=(
                *SHOWN,
                *(f"{m} {c}" for m in ("auc", "gauc") for c in data.schema.categories),
                *dict.fromkeys(row.metric for row in sliced),
                *(CLAIMED if claims.collapsed or claims.healthy else ()),
                *further.shown,
            ),
            unprinted=(SLICES,),
            notes=[*data.notes, *further.notes, *self._notes],
            **facts,
        )

    def test(self) -> Batch:
        """Return the test rows of all folds; users whom two folds share have one number."""
        parts = [self.data(fold).batch("test") for fold in self.folds]
        return Batch.cat(parts if self._share_users() else _apart(parts))

    def _share_users(self) -> bool:
        """Return whether a number of a user means the same user in all folds."""
        source = class_of(self.run.settings)
        worlds = [f"{ARGUMENTS}{name}" for name in getattr(source, "OF_WORLD", ())]
        changed = {name for fold in self.folds for name in fold.settings}
        return bool(self.data(self.folds[0]).schema.user) and changed.isdisjoint(worlds)

    def _refuse_equal_folds(self) -> None:
        found: dict[str, Fold] = {}
        for fold in self.folds if len(self.folds) > 1 else ():
            other = found.setdefault(table_digest(self.data(fold).table("test")), fold)
            if other is not fold:
                raise GatesError(
                    f"--folds {other.keys['f']} and {fold.keys['f']} have the same test rows: "
                    "give a --fold_setting that moves them"
                )

    def tasks(self) -> tuple[str, ...]:
        """Return the names of the tasks."""
        return self.data(self.folds[0]).schema.task_names

    def _observe(self, record: Record, data: TableDataModule) -> None:
        """Note what a reader of the scores must know of the weights that are scored."""
        if rounded := record.facts.get(ROUNDED):
            self._notes[f"networks are scored as they ship, rounded to {rounded}"] = None
        if set(record.objects) != set(data.training_objects()):
            self._notes[
                "networks were trained on rows with another hash than those here: what reads or "
                "simulates them has changed, or rounds otherwise on this processor"
            ] = None

    def _epochs(self) -> int:
        """Return the epochs of a training, for its progress; 1 where only steps end it."""
        return max(1, self.run.settings.get("trainer.max_epochs") or 1)

    def _check_settings(self) -> None:
        """Refuse settings that do not exist before anything is trained."""
        first, boxes = self.folds[0], self.contest.boxes()
        check_axes(self.contest.space, self.run.settings)
        if self.run.settings.get("trainer.max_epochs") == 0:
            raise GatesError("trainer.max_epochs is 0, which trains nothing: give 1 or more")
        for name, own in self.own(first).items():
            ends = {axis: low for axis, (low, _) in boxes.get(name, {}).items()}
            self._named(name, module_of, self.run.piece(name, **{**own, **ends}).settings)
        for name in self.contest.baselines:
            options, box = self._baseline(name)
            for axis in box:
                kind, argument = options[f"{BASELINE}kind"], axis.removeprefix(BASELINE)
                check_axis(f"space of the baseline {name!r}", argument, KINDS[kind], argument)
            ends = {axis: low for axis, (low, _) in box.items()}
            self._named(name, baseline_of, {**options, **ends}, self.data(first).transform)

    @staticmethod
    def _named(name: str, make: Callable[..., object], *given: Any) -> None:
        try:
            make(*given)
        except GatesError as error:
            raise GatesError(f"{name}: {error}") from error

    def _schema(self, method: str, fold: Fold) -> FeatureSchema:
        """Return the schema of the data of a network, which may differ from the others'."""
        if own := self.contest.own_data(method):
            return self.data_of({**self.run.settings, **own, **fold.settings}).schema
        return self.data(fold).schema

    def _baselines(self, chosen: Mapping[str, Choice]) -> dict[str, list[Probabilities]]:
        store, found = self.run.store(BASELINES, Arrays()), {}
        for name in self.contest.baselines:
            if self.run.only and name not in self.run.only:
                continue
            options, _ = self._baseline(name)
            # A quick run may know no setting of a box yet: what it fits is not the method's result.
            method = f"{name}{UNTUNED}" if name in chosen and not chosen[name].trials else name
            pieces = [
                self.run.piece(
                    method, None, f.keys, **{**options, **f.settings, **_setting(chosen, name)}
                )
                for f in self.folds
            ]
            made = self.run.obtain(store, pieces, self._work(fit_baseline), scoring=True)
            parts = [store.load(piece)["probabilities"].double().numpy() for piece in made]
            found[name] = [np.concatenate(parts)]
        return found

    def _baseline(self, name: str) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
        """Return the settings of a baseline, and the box in which it is tuned, if any."""
        options = dict(self.contest.baselines[name])
        box = options.pop("space", {})
        model = {n: None for n in self.run.settings if n.startswith(("model.", "trainer."))}
        model.pop(INTERCEPTS, None)
        model |= dict.fromkeys(("checkpoint.monitor", "checkpoint.mode"))
        named = {f"{BASELINE}{option}": value for option, value in options.items()}
        return {**model, **named}, {f"{BASELINE}{n}": (lo, hi) for n, (lo, hi) in box.items()}

    def _oracle(self) -> dict[str, list[Probabilities]]:
        tables = [self.data(fold).table("test") for fold in self.folds]
        columns = [f"{TRUTH}{task}" for task in self.tasks()]
        if not all(column in tables[0].columns for column in columns) or self.run.only:
            return {}
        return {ORACLE: [np.concatenate([t.select(columns).to_numpy() for t in tables])]}

    def data_of(self, settings: Mapping[str, Any]) -> TableDataModule:
        """Return the data of a piece or a fold, read once."""
        wanted = {**settings, **self.places}
        own = {n: v for n, v in wanted.items() if n.startswith("data.") and v is not None}
        key = json.dumps(own, sort_keys=True)
        if key not in self._known:
            self._known[key] = data_of(own)
        return self._known[key]

    def _work(self, function: Callable[..., Any]) -> Callable[[Piece, Job], Any]:
        return partial(function, places=self.places)


def folds_of(setting: str, values: Sequence[int], settings: Mapping[str, Any]) -> tuple[Fold, ...]:
    """Return folds that differ in one setting; the data of the configuration without values.

    Args:
        setting: Dotted name of a setting of the data.
        values: Its values.
        settings: Those of the configuration.

    Raises:
        GatesError: There is no such setting of the data.
    """
    if not values:
        return (Fold(),)
    known = _known_settings(settings)
    if setting not in known:
        close = get_close_matches(setting, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else f"; known are {', '.join(known)}"
        raise GatesError(f"--fold_setting {setting!r} is no setting of the data{hint}")
    return tuple(Fold({setting: value}, {"f": value}) for value in dict.fromkeys(values))


def _known_settings(settings: Mapping[str, Any]) -> list[str]:
    """Return the dotted names of all that may be set of the data, by a signature or so far."""
    named = settings.get("data.source.class_path")
    arguments = signature(class_of(settings)).parameters if named else {}
    found = [n for n in settings if n.startswith("data.")]
    return list(dict.fromkeys([*found, *(f"{ARGUMENTS}{n}" for n in arguments)]))


def _apart(parts: Sequence[Batch]) -> list[Batch]:
    """Return rows whose users are numbered on from one part to the next."""
    found, first = [], 0
    for part in parts:
        own, number = part.user.unique(return_inverse=True)
        found.append(part.replace(user=number + first))
        first += len(own)
    return found


def _on_every_fold(pieces: Sequence[Sequence[Piece]]) -> list[list[Piece]]:
    """Leave out networks that a quick run has not found on every fold."""
    names = [{(piece.method, piece.seed) for piece in some} for some in pieces]
    everywhere = set.intersection(*names)
    return [[p for p in some if (p.method, p.seed) in everywhere] for some in pieces]


def _setting(chosen: Mapping[str, Choice], name: str) -> Mapping[str, Any]:
    return chosen[name].setting if name in chosen else {}


def _renamed(scores: Scores, name: str) -> Scores:
    return lambda drawn: {name: scores(drawn)["log_loss"]}
