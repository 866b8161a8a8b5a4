"""A contest in a run: what is tuned, trained, scored and compared, piece by piece."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import process_time
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor

from core_gates.errors import GatesError
from harness.evidence import Bar, Row
from harness.experiment import ROUNDED, Arrays, Choice, Job, Piece, Run, Setting
from harness.runs.terminal import quiet_lightning, stepping, working
from recsys.data.datamodule import TableDataModule
from recsys.data.doubts import of_hierarchy, of_loss, of_rates
from recsys.data.tables import table_digest
from recsys.diagnosis.expert_report import ExpertReport
from recsys.experiments import (
    AVERAGED,
    CLAIMED,
    SLICES,
    START,
    SUMMED,
    TRIAL_SEEDS,
    Claims,
    Contest,
    Fold,
    Places,
    Probabilities,
    Splits,
    baseline_of,
    check_finite,
    claim_bars,
    data_of,
    epoch_seconds,
    fault_bars,
    fault_rows,
    gap_of,
    margin_bars,
    module_of,
    probabilities,
    ranker_of,
    regression_rows,
    report_of,
    require_tables,
    summed_log_loss_of,
)
from recsys.ranker import Ranker
from recsys.ranker_module import MultiTaskModule

WEIGHTS, BASELINES = "weights", "baselines"
BASE = "base_rates"
SHOWN = (SUMMED,)
RANDOM = "is_rand"  # column of rows whose video was drawn at random
UNTUNED = "@untuned"
EPOCHS, CPU = "epochs", "CPU seconds of training"
MONITOR = "val/loss"
TRAINER = "trainer."
UNVALIDATED = "Early stopping conditioned on metric"  # Lightning's error


def train(piece: Piece, job: Job, places: Places) -> dict[str, Tensor]:
    """Train one network until its validation loss no longer falls; return its best weights."""
    begin = process_time()
    module, data = _trained(piece, job, places)
    trainer = getattr(module, "_trainer", None)  # None if it was trained before
    job.note(**_cost(begin), **({EPOCHS: trainer.current_epoch} if trainer else {}))
    rows = data.batch("validation")
    ranker = module.served(rows)
    check_finite(ranker, rows)
    return dict(ranker.state_dict())


def trial(piece: Piece, job: Job, places: Places) -> dict[str, float]:
    """Return the validation loss of a setting, summed over tasks; NaN if it diverges.

    It is the mean over as many training runs as the contest has ``trial_seeds``.
    """
    losses = []
    for number in range(piece.get(TRIAL_SEEDS) or 1):
        module, data = _trained(piece, job, places, (piece.seed or 0) + number)
        rows = data.batch("validation")
        guess = probabilities(module.served(rows), rows)
        losses.append(summed_log_loss_of(rows, guess) if np.isfinite(guess).all() else np.nan)
    return {"score": float(np.mean(losses))}


def fit_baseline(piece: Piece, job: Job, places: Places) -> dict[str, Tensor]:
    """Fit a baseline and return its probabilities of the test rows."""
    data = data_of({**piece.settings, **places})
    job.note(objects=data.training_objects())
    begin = process_time()
    predicted = _fitted(piece, data, "test")
    job.note(**_cost(begin))
    return {"probabilities": torch.from_numpy(predicted).float()}


def try_baseline(piece: Piece, job: Job, places: Places) -> dict[str, float]:
    """Return the validation loss of a setting of a baseline."""
    del job
    data = data_of({**piece.settings, **places})
    predicted = _fitted(piece, data, "validation")
    return {"score": summed_log_loss_of(data.batch("validation"), predicted)}


def _cost(begin: float) -> dict[str, Any]:
    return {CPU: round(process_time() - begin, 1)}


def trainer_options(piece: Piece) -> dict[str, Any]:
    """Return the options of Lightning's Trainer that a piece sets."""
    named = {n: value for n, value in piece.settings.items() if n.startswith(TRAINER)}
    return {n.removeprefix(TRAINER): value for n, value in named.items()}


def _fitted(piece: Piece, data: TableDataModule, part: Any) -> Probabilities:
    predictor = baseline_of(piece.settings, data.transform)
    predictor.fit(data.batch("train"), data.batch("validation"))
    return predictor.predict(data.batch(part))


def _trained(
    piece: Piece, job: Job, places: Places, seed: int | None = None
) -> tuple[MultiTaskModule, TableDataModule]:
    seed = piece.seed if seed is None else seed
    data = data_of({**piece.settings, **places}, seed or 0)
    job.note(objects=data.training_objects())
    first = None
    if (start := piece.get(START)) is not None:
        linear = _fitted_module(piece, job, data, {**piece.settings, **start}, seed)
        first = linear.served(intercepts=False)
    return _fitted_module(piece, job, data, piece.settings, seed, first), data


def _fitted_module(
    piece: Piece,
    job: Job,
    data: TableDataModule,
    settings: Mapping[str, Any],
    seed: int | None,
    first: Ranker | None = None,
) -> MultiTaskModule:
    L.seed_everything(seed, verbose=False)
    module = module_of(settings)
    module.build(data.transform, first)  # here, since what is trained already is not built by fit
    options = trainer_options(piece)
    try:
        job.fit(module, data, monitor=MONITOR, patience=piece.get("patience"), **options)
    except RuntimeError as error:
        if UNVALIDATED not in str(error):
            raise
        raise GatesError(
            "the training ends before its first validation, which chooses the weights: raise "
            "trainer.max_steps, or lower trainer.val_check_interval"
        ) from error
    return module


class Study(ABC):
    """A question with its own pieces, rows and bars; named by its class in a configuration."""

    @abstractmethod
    def finish(
        self, run: Run, contest: Contest, seeds: Sequence[int], places: Mapping[str, str]
    ) -> None:
        """Make what is missing, and write ``scores.json``.

        Args:
            run: Keeps pieces and scores.
            contest: Networks of the configuration.
            seeds: Of every network.
            places: Where files are, by dotted name of the setting.
        """


class Findings(NamedTuple):
    """What is found besides the contest: rows, bars, notes, and the metrics that tables show."""

    rows: Sequence[Row] = ()
    bars: Sequence[Bar] = ()
    notes: Sequence[str] = ()
    shown: Sequence[str] = ()


class Comparison(Splits):
    """A contest in a run.

    Args:
        run: Keeps pieces and scores.
        contest: Who takes part.
        seeds: Of every network.
        folds: Splits whose test rows are pooled, see `recsys.experiments.contest.folds_of`.
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
        super().__init__(contest, run.settings, folds, places=places, during=working)
        self.run, self.seeds = run, tuple(dict.fromkeys(seeds))
        self.exact_auc, self.averaged = exact_auc, averaged
        self._notes: dict[str, None] = {}
        self._told = False
        self._measured: list[Row] = []
        names = [*contest.entries, *contest.baselines]
        if strangers := [name for name in run.only if name not in names]:
            raise GatesError(f"--only names {strangers[0]!r}; known are {', '.join(names)}")

    def chosen(self) -> dict[str, Choice]:
        """Tune networks and baselines, on the first fold, each by equally many trials.

        Raises:
            GatesError: A network or a baseline has a setting that does not exist.
        """
        self.check()
        own_settings, boxes = self.own_of_all(), self.contest.boxes()
        choices = self.run.tune(
            boxes,
            self._work(trial),
            trials=self.contest.trials,
            own=own_settings,
            plain=self._configured(boxes, own_settings),
            ticks=self._epochs() * self.contest.trial_seeds,
            unit=EPOCHS,
            prepare=self._print_cost,
        )
        every = {name: self.baseline(name)[1] for name in self.contest.baselines}
        boxes = {name: box for name, box in every.items() if box}
        choices |= self.run.tune(
            boxes,
            self._work(try_baseline),
            trials=self.contest.trials,
            own=own_settings,
            plain=self._configured(boxes, own_settings),
        )
        return choices

    def known(self) -> dict[str, Choice]:
        """Return the settings tuned before, by variant; nothing is computed."""
        choices: dict[str, Choice] = {}
        for name, method_settings in self.own(self.folds[0]).items():
            settings = {**method_settings, "space": self.contest.boxes().get(name)}
            choices |= self.run.chosen(
                [name], budget=["plain"], **settings, trials=self.contest.trials
            )
        return choices

    def _configured(self, boxes: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Setting]:
        """Return the values of the configuration on the axes of boxes, if they are tried first."""
        if not self.contest.configured_first:
            return {}
        return {
            name: {axis: base[name].get(axis, self.run.settings.get(axis)) for axis in box}
            for name, box in boxes.items()
        }

    def pieces(self, chosen: Mapping[str, Choice]) -> list[list[Piece]]:
        """Describe the networks of each fold, one for each method and seed; nothing is trained."""
        return [
            [
                self.run.piece(m, s, fold.keys, **{**method_settings, **_setting(chosen, m)})
                for m, method_settings in self.own(fold).items()
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
        work, cost = self._work(train), self._print_cost
        kept = set(self.run.obtain(store, every, work, ticks=ticks, unit=EPOCHS, prepare=cost))
        return [[piece for piece in some if piece in kept] for some in pieces]

    def predictions(self, chosen: Mapping[str, Choice]) -> dict[str, list[Probabilities]]:
        """Return test predictions (N, T) by method and seed; missing networks are trained first."""
        store = self.run.store(WEIGHTS, Arrays())
        predictions: dict[str, dict[int | None, list[Probabilities]]] = {}
        made = self.networks(chosen)
        names = [{(piece.method, piece.seed) for piece in some} for some in made]
        everywhere = set.intersection(*names)  # a quick run may lack a network on some folds
        kept = [p for some in made for p in some if (p.method, p.seed) in everywhere]
        for piece in stepping("scoring", kept):
            data = self.data_of(piece.settings)
            tested = [table_digest(data.table("test"))[:12]]
            weights, record = store.load(piece, tested=tested), store.record(piece)
            self._note_training(piece, record.facts)
            if rounded := record.facts.get(ROUNDED):
                self._notes[f"networks are scored as they ship, rounded to {rounded}"] = None
            if set(record.objects) != set(data.training_objects()):
                self._notes[
                    "networks were trained on rows with another hash than those here: what reads "
                    "or simulates them has changed, or rounds otherwise on this processor"
                ] = None
            ranker = ranker_of(piece.settings, weights, data)
            predicted = probabilities(ranker, data.batch("test"))
            self._measured += regression_rows(piece.method, ranker, data.batch("test"))
            predictions.setdefault(piece.method, {}).setdefault(piece.seed, []).append(predicted)
        pooled = {m: [np.concatenate(p) for p in s.values()] for m, s in predictions.items()}
        if self.averaged and len(self.seeds) > 1:
            pooled |= {f"{m}{AVERAGED}": [np.mean(p, 0)] for m, p in pooled.items()}
        return pooled | self._baselines(chosen) | ({} if self.run.only else self.oracle())

    def _note_training(self, piece: Piece, facts: Mapping[str, Any]) -> None:
        """Keep what a training took, and note where the cap of epochs has ended it."""
        if CPU in facts:
            method = piece.method.removesuffix(UNTUNED)
            self._measured.append(Row(method, "test", CPU, facts[CPU]))
        if EPOCHS in facts and facts[EPOCHS] == piece.get("trainer.max_epochs"):
            self._notes[f"{piece.name} was ended by the cap of epochs"] = None

    def faults(self, chosen: Mapping[str, Choice]) -> list[Row]:
        """Return rows on collapsed and badly scaled experts of every network, on the first fold."""
        store = self.run.store(WEIGHTS, Arrays())
        reports: dict[str, list[ExpertReport]] = {}
        for piece in stepping("measuring experts", self.networks(chosen)[0]):
            data = self.data_of(piece.settings)
            if data.schema.regressions:  # labels that are thresholds have no gate
                continue
            ranker = ranker_of(piece.settings, store.load(piece), data)
            reports.setdefault(piece.method, []).append(report_of(ranker, data.batch("test")))
        return fault_rows(reports)

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
        self.refuse_equal_folds()
        claims.check([*self.contest.entries, *self.contest.baselines])
        further = further or Findings()
        chosen = self.chosen()
        predictions = self.predictions(chosen)
        made = self.rows(predictions, exact_auc=self.exact_auc, each=stepping)
        with working("scoring slices"):
            sliced = self.slices(predictions, RANDOM) if slices else []
        faults = self.faults(chosen) if experts else []
        doubts = self._doubts(made, predictions)
        data = self.data(self.folds[0])
        self.run.finish(
            [*made, *_averaged(self._measured), *sliced, *faults, *further.rows],
            [*self._bars(claims, made, predictions, faults), *further.bars],
            seeds=self.seeds,
            data=data.digest(),
            metrics=(
                *SHOWN,
                *dict.fromkeys(row.metric for row in self._measured),
                *(f"{m} {c}" for m in ("auc", "gauc") for c in data.schema.categories),
                *dict.fromkeys(row.metric for row in sliced),
                *(CLAIMED if claims.collapsed or claims.healthy else ()),
                *further.shown,
            ),
            unprinted=(SLICES,),
            notes=[*data.notes, *further.notes, *self._notes, *doubts],
            **facts,
        )
        for line in doubts:
            print(line)

    def _bars(
        self,
        claims: Claims,
        rows: Sequence[Row],
        predictions: Mapping[str, list[Probabilities]],
        faults: Sequence[Row],
    ) -> list[Bar]:
        """Return the bars of the claims."""
        test, reference = self.test(), self.contest.reference
        predicted = predictions.get(reference, [])
        return [
            *claim_bars(claims, rows, reference, test=test, tasks=self.tasks(), found=predicted),
            *margin_bars(
                claims.margins,
                predictions,
                [m for m, entry in self.contest.entries.items() if entry.get("net") != "Linear"],
                test,
            ),
            *fault_bars(faults, claims.collapsed, claims.healthy),
        ]

    def _baselines(self, chosen: Mapping[str, Choice]) -> dict[str, list[Probabilities]]:
        store, baselines = self.run.store(BASELINES, Arrays()), {}
        for name in self.contest.baselines:
            if self.run.only and name not in self.run.only:
                continue
            options, _ = self.baseline(name)
            # A quick run may know no setting of a box yet: what it fits is not the method's result.
            method = f"{name}{UNTUNED}" if name in chosen and not chosen[name].trials else name
            pieces = [
                self.run.piece(
                    method, None, f.keys, **{**options, **f.settings, **_setting(chosen, name)}
                )
                for f in self.folds
            ]
            made = self.run.obtain(store, pieces, self._work(fit_baseline), scoring=True)
            for piece in made:
                self._note_training(piece, store.record(piece).facts)
            parts = [store.load(piece)["probabilities"].double().numpy() for piece in made]
            baselines[name] = [np.concatenate(parts)]
        return baselines

    def _doubts(
        self, rows: Sequence[Row], guesses: Mapping[str, Sequence[Probabilities]]
    ) -> list[str]:
        """Return rates, which networks do not beat base rates, whether HoME has no hierarchy."""
        test, summed = self.test(), [r for r in rows if r.metric == SUMMED and not r.versus]
        losses = {row.method: row.value for row in summed}
        bases = [n for n, e in self.contest.baselines.items() if e["kind"] == BASE and n in losses]
        entries = {n: e for n, e in self.contest.entries.items() if n in losses}
        nets = [str(e.get("net", self.settings.get("model.net"))) for e in entries.values()]
        beaten = [
            line
            for name in entries
            for base in bases[:1]
            for line in of_loss(name, losses[name], gap_of(guesses[name], guesses[base], test))
        ]
        means = {name: np.mean(guesses[name], 0) for name in entries}
        rates = [
            line for n, mean in means.items() for line in of_rates(n, self.tasks(), test, mean)
        ]
        return [*rates, *beaten, *of_hierarchy(nets, self.data(self.folds[0]).schema)]

    def _print_cost(self) -> None:
        """Print once what all training runs may cost, by a few steps of each network."""
        if self._told:
            return
        quiet_lightning()
        self._told, own_settings, runs, seconds = True, self.own(self.folds[0]), 0, 0.0
        for name in [name for name in own_settings if not self.run.only or name in self.run.only]:
            settings = {**self.run.piece(name, **own_settings[name]).settings, **self.places}
            data = self.data_of(settings)
            tried = self.contest.trials * self.contest.trial_seeds
            count = tried * (name in self.contest.boxes()) + len(self.seeds) * len(self.folds)
            runs += count
            seconds += count * self._epochs() * epoch_seconds(settings, data)
        print(
            f"at most {runs} training runs of {self._epochs()} epochs, about {seconds / 60:.3g} "
            "CPU minutes if none ends earlier; what is kept is not trained again"
        )

    def _epochs(self) -> int:
        """Return the epochs of a training, for its progress; 1 where only steps end it."""
        return max(1, self.settings.get("trainer.max_epochs") or 1)

    def _work(self, function: Callable[..., Any]) -> Callable[[Piece, Job], Any]:
        return partial(function, places=self.places)


def _averaged(rows: Sequence[Row]) -> list[Row]:
    """Return the means of figures over seeds and folds."""
    values_of: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        values_of.setdefault((row.method, row.task, row.metric), []).append(row.value)
    return [Row(*key, float(np.mean(values)), n=len(values)) for key, values in values_of.items()]


def _setting(chosen: Mapping[str, Choice], name: str) -> Mapping[str, Any]:
    return chosen[name].setting if name in chosen else {}
