"""A configuration in a run folder: what ``tune``, ``evaluate`` and studies share."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from lightning.fabric.utilities.rank_zero import rank_zero_only

from core_gates.errors import GatesError
from harness.evidence import Bar, Row
from harness.experiment import tuning
from harness.experiment.job import Work, compute, sweep, take_part
from harness.experiment.scores import (
    Scores,
    print_scores,
    read_scores,
    replace_part,
    write_markdown,
    write_scores,
)
from harness.experiment.store import Figures, Form, Store
from harness.experiment.tuning import Choice, Choose, Space, lowest
from harness.files import Data
from harness.files.piece import Piece, Setting, read_record
from harness.runs.folder import RunFolder, git_revision
from harness.runs.processes import Pool
from harness.runs.terminal import release_warnings, ticking

R = TypeVar("R")
TRIALS, CHOICES = "trials", "choices"
WORDS = {
    "weights": ("training", "networks"),
    "trials": ("running", "trials"),
    "baselines": ("fitting", "baselines"),
}
"""Kind of results -> what is done, and with what."""

PARTS = "parts"
LINE = 100  # characters of what is said to be missing


class Run:
    """A configuration in a run folder.

    Args:
        folder: Of the run.
        app: Application.
        config_path: Configuration; None for none.
        settings: All that decides results, by name; pieces add theirs.
        package: Package with shipped results in ``weights/<configuration>``; None for none.
        shipped: Whether results of the package are used.
        extended: Names of the configurations that this one extends, whose results are used where
            their settings agree.
        overwrite: Replace results of the run folder that have other settings, one by one.
        quick: A quick run: nothing is trained but what scores are made of, such as simple
            baselines, and scores have no bars.
        only: Methods that take part; all when empty.
        seeds: Seeds that scores will be based on, where scores are what the run is for.
        command: Command line, for records.
        verb: Verb of the application that writes the scores, for messages.

    Raises:
        GatesError: Scores of a full evaluation exist, which a quick run, or one with fewer methods
            or seeds, would replace.
    """

    def __init__(
        self,
        folder: Path,
        *,
        app: str,
        config_path: Path | None = None,
        settings: Setting | None = None,
        package: str | None = None,
        shipped: bool = True,
        extended: Sequence[str] = (),
        overwrite: bool = False,
        quick: bool = False,
        only: Collection[str] = (),
        seeds: Collection[int] | None = None,
        command: str = "",
        verb: str = "evaluate",
    ) -> None:
        self.folder, self.app, self.config_path = folder, app, config_path
        self.verb = verb
        self.config = config_path.stem if config_path else "default"
        self.settings = dict(settings or {})
        self.package, self.shipped, self.overwrite = package, shipped, overwrite
        self.quick, self.only, self.command = quick, tuple(only), command
        self.extended = tuple(extended)
        self._pool = Pool()
        weakref.finalize(self, self._pool.close)
        if quick or seeds is not None:
            self._keep_full_scores(seeds)

    @classmethod
    def of(cls, run_folder: RunFolder, **options: Any) -> Run:
        """Return the run of a run folder."""
        return cls(run_folder.path, app=run_folder.app, overwrite=run_folder.overwrite, **options)

    @property
    def scores(self) -> Path:
        """The file ``scores.json``."""
        return self.folder / "scores.json"

    def piece(
        self,
        method: str,
        seed: int | None = None,
        keys: Mapping[str, str | int | float] | None = None,
        **settings: Any,
    ) -> Piece:
        """Return a piece with the settings of the configuration and its own.

        Args:
            method: What is trained or computed.
            seed: Of everything random.
            keys: What else tells it from others.
            settings: Added to those of the configuration; None takes one away.
        """
        return Piece(method, seed, keys, {**self.settings, **settings})

    def store(self, kind: str, form: Form[R]) -> Store[R]:
        """Return the results of one kind, of the run folder and the package."""
        shipped, others = None, [self.folder.with_name(name) for name in self.extended]
        if self.package is not None and self.shipped:
            packaged = Path(str(files(self.package))) / "weights"
            shipped = packaged / self.config
            others += [packaged / name for name in self.extended]
        origin = {
            "package": self.package or "",
            "configuration": self.config,
            "command": self.command,
        }
        return Store(
            kind,
            form,
            self.folder,
            shipped,
            others=others,
            overwrite=self.overwrite,
            origin=origin,
        )

    def obtain(
        self,
        store: Store[R],
        pieces: Iterable[Piece],
        work: Work[R],
        *,
        ticks: int | Callable[[Piece], int] = 1,
        unit: str = "",
        prepare: Callable[[], object] | None = None,
        scoring: bool = False,
        leave_out: bool = False,
    ) -> list[Piece]:
        """Compute and store the pieces whose results are missing; return all that have a result.

        It first prints what is missing, and why a result with other settings is not taken. Every
        result is kept as soon as it is there, so that a kill costs no more than the pieces under
        way; of those, what they keep in their folder is resumed. Nothing is computed in a quick
        run.

        Where a training has several ranks, which all call this, the first one claims, keeps and
        prints; the others take part in it and have no results.

        Args:
            store: Where results are kept.
            pieces: All that are wanted; those of other methods than ``only`` are left out.
            work: An importable function that seeds itself.
            ticks: Ticks of a piece; the longest pieces are begun first.
            unit: What ticks count, in the plural, such as epochs; parts of pieces when empty.
            prepare: Called once in this process if anything is missing, before the work begins,
                such as to build caches that the pieces share.
            scoring: The work is no training but what scores are made of: a quick run computes it.
            leave_out: Compute nothing, as in a quick run: what is missing is left out.

        Raises:
            SettingsDiffer: A result of the run folder has other settings.
            GatesError: Another process is at work on a piece; or what the work raises.
        """
        wanted = [p for p in dict.fromkeys(pieces) if not self.only or p.method in self.only]
        missing = store.missing(wanted)
        leave_out |= self.quick and not scoring
        if rank_zero_only.rank:  # type: ignore[attr-defined]
            return [] if leave_out else take_part(store, missing, work)
        for piece in set(wanted) - set(missing):
            sweep(store.folder, piece)
        if missing:
            _print_missing(store, missing, len(wanted), left_out=leave_out)
        if leave_out:
            return [piece for piece in wanted if piece not in set(missing)]
        if missing and prepare is not None:
            prepare()
        lengths = {piece: ticks(piece) if callable(ticks) else ticks for piece in missing}
        missing.sort(key=lengths.__getitem__, reverse=True)
        if missing:
            revision = git_revision()
            computed = partial(compute, store, work, revision)
            label, total = " ".join(_words(store.kind)), sum(lengths.values())
            of = unit or PARTS if total > len(missing) else ""
            with ticking(label, total, unit=of) as tick, self._pooled():
                self._pool.run(computed, [(piece, lengths[piece]) for piece in missing], tick)
        return wanted

    def tune(
        self,
        spaces: Mapping[str, Space],
        work: Work[dict[str, float]],
        *,
        trials: int,
        seed: int = 100,
        choose: Choose = lowest,
        ticks: int | Callable[[Piece], int] = 1,
        unit: str = "",
        prepare: Callable[[], object] | None = None,
        own: Mapping[str, Setting] | None = None,
        plain: Mapping[str, Setting] | None = None,
        **settings: Any,
    ) -> dict[str, Choice]:
        """Give every method its trials and return the setting of each.

        A name such as ``oi@0.1/error`` is a choice of ``oi`` for a task, the key of its trials.

        Args:
            spaces: What is searched, by method.
            work: Returns figures of a trial, among them ``score``.
            trials: Of every method.
            seed: Of trials and of the points in a box.
            choose: Returns the place of the best figures.
            ticks: Ticks of a trial.
            unit: What ticks count, see `obtain`.
            prepare: See `obtain`.
            own: Settings of the trials of a method, by its name, such as its network.
            plain: What is tried first of a method, by its name, and taken untuned in a quick run.
            settings: Of every trial.

        Raises:
            GatesError: A space cannot be searched with that many trials, or no trial has a score.
        """
        only = self.only
        spaces = {n: s for n, s in spaces.items() if not only or n.partition("@")[0] in only}
        for name, space in spaces.items():
            tuning.check_space(name, space, trials)
        choices = self.store(CHOICES, Figures())
        of_method = {name: {**settings, **(own or {}).get(name, {})} for name in spaces}
        named = {
            name: self._trial(name, None, space=space, trials=trials, seed=seed,
                              plain=(plain or {}).get(name), **of_method[name])
            for name, space in spaces.items()
        }  # fmt: skip
        unknown = {p.name: name for name, p in named.items() if choices.find(p) is None}
        if unknown and self.quick:
            taken = "what is plain, or else " * bool(plain) + "the middle of what is searched"
            print(f"never tuned: {', '.join(unknown.values())}; {taken}")
        elif unknown:
            self._search({n: spaces[n] for n in unknown.values()}, named, work, trials=trials,
                         seed=seed, choose=choose, ticks=ticks, unit=unit, prepare=prepare,
                         of_method=of_method, plain=plain or {})  # fmt: skip
        chosen = {}
        for name, piece in named.items():
            untuned = Choice((plain or {}).get(name) or tuning.middle(spaces[name]), [], [])
            chosen[name] = untuned if choices.find(piece) is None else Choice(**choices.load(piece))
            _print_edges(name, chosen[name])
        return chosen

    def chosen(
        self,
        names: Iterable[str],
        *,
        seed: int = 100,
        budget: Collection[str] = (),
        **settings: Any,
    ) -> dict[str, Choice]:
        """Return settings tuned before, with any space and budget; nothing is computed.

        Args:
            names: Of choices, see `tune`.
            seed: Of the trials.
            budget: Settings of `tune` that may be any.
            settings: The others.

        Raises:
            SettingsDiffer: A choice of the run folder has other settings.
        """
        store, any_of = self.store(CHOICES, Figures()), {"space", "trials", "plain", *budget}
        stored = {}
        for name in names:
            for folder in (store.folder, *store.read_only):
                wanted = self._trial(name, None, seed=seed, **settings)
                record = read_record(folder / wanted.name)
                if record is not None:
                    free = {n: v for n, v in record.settings.items() if n in any_of}
                    wanted = self._trial(name, None, seed=seed, **{**settings, **free})
                if store.find(wanted) is not None:
                    stored[name] = Choice(**store.load(wanted))
                    break
        return stored

    def finish(
        self,
        rows: Sequence[Row],
        bars: Sequence[Bar] = (),
        *,
        seeds: Iterable[int],
        data: Sequence[Data] = (),
        headline: str = "",
        notes: Sequence[str] = (),
        part: str | tuple[str, ...] = "",
        others: tuple[str, ...] = (),
        metrics: Collection[str] = (),
        unprinted: Collection[str] = (),
    ) -> Path:
        """Write ``scores.json`` and ``scores.md``, print a table a task, and return the former.

        Args:
            rows: Every figure.
            bars: Dropped in a quick run, or where ``only`` leaves methods out.
            seeds: Seeds that the figures are based on.
            data: Data that the figures are based on.
            headline: What they show, in a sentence.
            notes: What a reader must know.
            part: Replace only the tasks and bars whose name begins so.
            others: Beginnings of the tasks and bars of other verbs, which stay as they are.
            metrics: Those that tables show; all when empty.
            unprinted: Tasks that the terminal leaves to the report.

        Raises:
            GatesError: There is not a single figure, or scores of a full evaluation exist, which
                those of fewer methods or seeds would replace.
        """
        if not rows:
            self._refuse_nothing()
        seeds = list(seeds)
        if not part:
            self._keep_full_scores(seeds)
        complete = not self.quick and not self.only
        scores = Scores(list(rows), list(bars) if complete else [], seeds, list(data),
                        headline, list(notes), self.quick, self.only)  # fmt: skip
        if part:
            scores = replace_part(self._old_scores(), scores, part)
        elif others:
            old = self._old_scores()
            scores = scores._replace(
                rows=[*scores.rows, *(row for row in old.rows if row.task.startswith(others))],
                bars=[*scores.bars, *(bar for bar in old.bars if bar.name.startswith(others))],
            )
        write_scores(self.scores, scores, app=self.app, config_path=self.config_path)
        shown = [r for r in scores.rows if not metrics or r.metric in metrics or r.note]
        opening = [f"# {self.app}: {self.folder.name}", scores.headline, *scores.notes]
        write_markdown(
            self.scores.with_suffix(".md"), [line for line in opening if line], shown, scores.bars
        )
        print_scores(self.scores, scores, metrics=metrics, tasks=part, unprinted=unprinted)
        return self.scores

    def _trial(self, name: str, number: int | None, **settings: Any) -> Piece:
        method, _, task = name.partition("@")
        keys: dict[str, str | int | float] = {"task-": task} if task else {}
        if number is not None:
            keys["trial"] = number
        seed = settings.pop("seed")
        return self.piece(method, seed, keys, **settings)

    def _search(
        self,
        spaces: Mapping[str, Space],
        named: Mapping[str, Piece],
        work: Work[dict[str, float]],
        *,
        trials: int,
        seed: int,
        choose: Choose,
        ticks: int | Callable[[Piece], int],
        unit: str,
        prepare: Callable[[], object] | None,
        of_method: Mapping[str, Setting],
        plain: Mapping[str, Setting],
    ) -> None:
        """Run the trials of these methods and keep their choices."""
        store = self.store(TRIALS, Figures())
        tried = {
            name: tuning.first_trials(space, trials, seed, plain.get(name))
            for name, space in spaces.items()
        }
        figures: dict[str, list[dict[str, float]]] = {}
        for _ in range(2):
            pieces = {
                name: [
                    self._trial(name, number, seed=seed, **{**of_method[name], **setting})
                    for number, setting in enumerate(points)
                ]
                for name, points in tried.items()
            }
            every = [piece for name in pieces for piece in pieces[name]]
            self.obtain(store, every, work, ticks=ticks, unit=unit, prepare=prepare)
            figures = {name: [store.load(piece) for piece in pieces[name]] for name in pieces}
            for name, space in spaces.items():
                if len(tried[name]) < trials:
                    best = tried[name][choose(figures[name])]
                    tried[name] = tried[name] + tuning.more_trials(space, trials, seed, best)
        choices = self.store(CHOICES, Figures())
        for name, points in tried.items():
            place = choose(figures[name])
            together: list[Setting] = [
                {**p, **f} for p, f in zip(points, figures[name], strict=True)
            ]
            scored = [
                point for point, trial in zip(points, together, strict=True)
                if not math.isnan(trial.get("score", 0.0))
            ]  # fmt: skip
            edges = tuning.edges_of(spaces[name], scored, scored.index(points[place]))
            choice = Choice(points[place], together, edges)
            choices.keep(named[name], choice._asdict(), revision=git_revision())

    @contextmanager
    def _pooled(self) -> Iterator[None]:
        """Keep the processes for the next pieces, but end them after a failure."""
        try:
            yield
        except BaseException:
            self._pool.close()
            raise

    def _old_scores(self) -> Scores:
        try:
            return read_scores(self.scores, self.app, self.verb)
        except GatesError:  # missing, or damaged and about to be replaced
            return Scores()

    def _refuse_nothing(self) -> None:
        what = "nothing was trained yet, and a quick run trains nothing: leave out --quick"
        raise GatesError(what if self.quick else "nothing was scored: check --only and --seeds")

    def _keep_full_scores(self, seeds: Collection[int] | None) -> None:
        """Refuse to replace scores of all methods and seeds by those of some."""
        old = self._old_scores()
        if self.overwrite or not old.rows or old.quick:
            return
        less = ""
        if self.quick:
            less = "a quick run"
        elif self.only and not old.only:
            less = f"one of {', '.join(self.only)} alone"
        elif seeds and len(set(seeds)) < len(set(old.seeds)) and not old.only:
            less = f"one of {len(set(seeds))} instead of {len(set(old.seeds))} seeds"
        if less:
            raise GatesError(
                f"{self.scores} holds a full evaluation, which {less} would replace: add --name "
                "NEW for another run, or --overwrite to replace it"
            )


def _print_edges(name: str, choice: Choice) -> None:
    for edge in choice.edges:
        value = choice.setting[edge]
        print(f"{name}: the best {edge}, {value:.3g}, lies at an edge of what was searched")


def _words(kind: str) -> tuple[str, str]:
    """Return what is done with results of a kind, and what these are called."""
    return WORDS.get(kind, ("making", kind))


def _print_missing(
    store: Store[Any], missing: Sequence[Piece], wanted: int, *, left_out: bool
) -> None:
    """Print warnings, what is missing in 100 characters, and why what exists does not qualify."""
    release_warnings()
    verb, noun = _words(store.kind)
    if len(missing) == 1 and noun.endswith("s"):
        noun = noun[:-1]
    verb = "leaving out" if left_out else verb
    of = f" of {wanted}" if wanted > len(missing) else ""
    line = f"{verb} {len(missing)} missing {noun}{of}: "
    names = [piece.name for piece in missing]
    shown = len(names)
    while shown > 1 and len(line + _listed(names, shown)) > LINE:
        shown -= 1
    print((line + _listed(names, shown))[:LINE], flush=True)
    for reason in store.reasons(missing):
        print(f"  {reason}", flush=True)


def _listed(names: Sequence[str], shown: int) -> str:
    more = [f"{len(names) - shown} more"] if shown < len(names) else []
    return ", ".join([*names[:shown], *more])
