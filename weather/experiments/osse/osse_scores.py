"""Scores in a sealed world: every method on every task, ratios to interpolation, bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from harness.evidence import Bar, Resamples, Row, moments
from harness.files import short_digest
from weather.baselines.assimilator import Assimilator, SideBySide
from weather.experiments.experiment import (
    UNMEASURED,
    Method,
    Settings,
    Work,
    built,
    choice_name,
    classical,
    stored,
)
from weather.experiments.osse.osse_cycles import OsseCycles
from weather.experiments.osse.rivals import (
    CORRECTIONS,
    COSTLY,
    DAMPED,
    FEW,
    FEW_CYCLES,
    INTERPOLATION,
    NETWORKS,
    TAPERED,
)
from weather.experiments.twin.scenarios import DAY, OsseTask, gap_of
from weather.experiments.twin.twin_cycles import TIME_RATIO, TIMES, UNGUIDED, settled
from weather.experiments.twin.twin_scores import (
    CycledScores,
    exponential,
    logs,
    paired,
    ratios,
    row_of,
)
from weather.progress import Tick, no_tick

CORRECTED, CONTROL = "adas_oi", "ungated_oi"
SINGLE, TIMELINES = "single_report", f"/{FEW} timelines"
RECOVERY_DAYS = (5, 10)
LIMIT = 1.0  # error over that of damped interpolation, of sparse reports its upper end, too
INDEPENDENT = 1.3  # climatological standard deviations that a free run must err by
SILENT = 1.1  # error after ten silent days, over that of damped interpolation
REPORT_ALONE = 1.02  # error over that of the background with one report alone
NotTrained = Callable[[str, int], str]
"""Returns what is said of a form and seed without weights; empty where there are some."""


class OsseScores(CycledScores):
    """Runs every method on every task and turns the cycles into rows and bars.

    Args:
        cycles: The timelines.
        tasks: The tasks.
        seeds: Seeds of the networks; where reports are dense, the first alone.
        settings: Tuned settings of all methods.
        not_trained: Tells what to do about missing networks.
        identity: Returns what identifies the networks of a form and some seeds.
        pooled: Other tasks over which gated and ungated corrections are compared, too.
        alike: Whether networks of both corrections were trained as such, or neither: only then are
            gated and ungated ones compared.
    """

    forms: tuple[str, ...] = ()

    def __init__(
        self,
        cycles: OsseCycles,
        tasks: Sequence[OsseTask],
        seeds: Sequence[int],
        settings: Settings,
        not_trained: NotTrained,
        identity: Callable[[str, Sequence[int]], str],
        pooled: Sequence[OsseTask] = (),
        *,
        alike: bool = True,
    ) -> None:
        super().__init__(cycles, tasks, settings)
        self.rivals, self.pooled, self.alike = cycles.rivals, list(pooled), alike
        self.not_trained, self.identity = not_trained, identity
        self.seeds = tuple(s for s in seeds if any(not not_trained(n, s) for n in NETWORKS))
        self.asked = tuple(seeds)
        self.single, self.times = cycles.single_reports, cycles.times
        self.reports: dict[str, tuple[Tensor, Tensor]] = {}

    def task(self, name: str) -> OsseTask:
        """Return a task by its name, also of those that are pooled."""
        return next(task for task in (*self.tasks, *self.pooled) if task.name == name)

    def works(self) -> list[Work]:
        """Return every method on every task; the networks of a form share a cycle."""
        jobs = [self._work(task, name) for task in self.tasks for name in self.names(task)]
        pairs = [(task, name) for task in self.pooled for name in CORRECTIONS]
        jobs += [self._work(task, name) for task, name in pairs if self.trained(task, name)]
        first = self.tasks[0]
        if first.reports == "outage":
            names = [name for name in NETWORKS if self.trained(first, name)]
            jobs += [self._work(first, name, SINGLE) for name in (INTERPOLATION, *names)]
        return jobs

    def names(self, task: OsseTask) -> list[str]:
        """Return the methods of a task that can be computed."""
        wanted = [*CORRECTIONS] if task.reports in ("withheld", "denied") else [*NETWORKS]
        wanted += TAPERED if task.reports == "fixed" else []
        networks = [name for name in wanted if self.trained(task, name)]
        return [*(method.name for method in self.rivals.classical(task)), *networks]

    def trained(self, task: OsseTask, name: str) -> list[int]:
        """Return the seeds of a method on a task whose networks exist; none of classical ones."""
        name = TAPERED.get(name, name)
        if name not in NETWORKS:
            return []
        sparse = name in CORRECTIONS and task.reports in ("fixed", "declared")
        alike = [
            similar for similar in (*self.tasks, *self.pooled) if similar.reports == task.reports
        ]
        sparse = sparse and task.density <= min(similar.density for similar in alike)
        wanted = self.asked if sparse else self.asked[:1]
        return [seed for seed in wanted if not self.not_trained(name, seed)]

    def _work(self, task: OsseTask, name: str, part: str = "") -> Work:
        seeds = self.trained(task, name)
        count = FEW if name in COSTLY else self.timelines
        world = self.cycles.world
        scope: list[tuple[str, str | int]] = [("world-", f"{world.seed:016x}")]
        scope.append(("timelines", count))
        if self.cycles.cycles < world.cycles:
            scope.append(("first", self.cycles.cycles))
        if seeds:
            scope.append(("seeds-", "+".join(map(str, seeds))))
            scope.append(("weights-", self.identity(TAPERED.get(name, name), seeds)))
        used = [self.method(task, label) for label in (name, INTERPOLATION)]
        chosen = [stored(self.settings, rival, task.chosen_for) for rival in used]
        scope.append(("settings-", short_digest(chosen, 8)))
        cycles = self.cycles.cycles
        if name in COSTLY:
            cycles = min(cycles, FEW_CYCLES)
            scope.append(("cycles", cycles))
        ticks = cycles * COSTLY.get(name, 1)
        return Work(name, part or task.name, ticks, tuple(scope), task.chosen_for)

    def method(self, task: OsseTask, name: str, seed: int = 0) -> Method:
        """Return a method of a task, with the network of a seed."""
        plain, tapered = TAPERED.get(name, name), name in TAPERED
        if plain in CORRECTIONS:
            return self.rivals.corrected(plain, seed, task, tapered=tapered)
        if plain in NETWORKS:
            return self.rivals.alone(plain, seed, tapered=tapered)
        return classical(self.rivals.classical(task), name)

    def _built(self, task: OsseTask, name: str, seed: int = 0) -> Assimilator:
        return built(self.settings, self.method(task, name, seed), task.chosen_for)

    def compute(self, work: Work, tick: Tick = no_tick) -> dict[str, Tensor]:
        """Return the tensors of a cycle, or the ratios of single reports."""
        task = self.tasks[0] if work.task == SINGLE else self.task(work.task)
        seeds = self.trained(task, work.method)[: None if work.task != SINGLE else 1]
        methods = [self._built(task, work.method, seed) for seed in (seeds or [0])]
        if work.task == SINGLE:
            base = task._replace(name=task.chosen_for, reports="fixed")
            return self.single(base, methods[0], self._built(base, INTERPOLATION), tick)
        rows = list(range(FEW if work.method in COSTLY else self.timelines)) * len(methods)
        method = methods[0] if len(methods) == 1 else SideBySide(methods)
        verify = work.method not in COSTLY and task.reports == "fixed"
        each = COSTLY.get(work.method, 1)

        def cycled() -> None:
            for _ in range(each):
                tick()

        cycles = work.ticks // each
        outputs = self.cycles.run(
            task, work.method, method, rows=rows, cycles=cycles, verify=verify, tick=cycled
        )
        alone = self._built(task, work.method, *seeds[:1])
        return outputs | self.times(task, work.method, alone, self._built(task, INTERPOLATION))

    def take(self, work: Work, found: Mapping[str, Tensor]) -> None:
        """Store the tensors that `compute` returned."""
        if work.task == SINGLE:
            self.reports[work.method] = found["ratios"], found["timelines"]
            return
        self.keep(work.task, work.method, found, FEW if work.method in COSTLY else self.timelines)

    def rows(self) -> list[Row]:
        """Return a row for every score of every method, task and channel."""
        lines = [row for task in self.tasks for row in self._task_rows(task)]
        lines += [row for task in self.tasks for row in self._few_rows(task)]
        lines += self._gate_rows() + self._report_rows()
        return lines + [row for task in self.tasks for row in self._untrained(task)]

    def compared(self, where: str, errors: Mapping[str, Tensor]) -> list[Row]:
        """Return errors, and ratios to interpolation and to damped interpolation."""
        others = [name for name in errors if name != DAMPED and DAMPED in errors]
        return super().compared(where, errors) + [
            paired(name, where, errors[name], errors[DAMPED], DAMPED) for name in others
        ]

    def _task_rows(self, task: OsseTask) -> list[Row]:
        """Return errors, ratios, time and lost timelines of every method on all timelines."""
        names = [name for place, name in self.scores if place == task.name and name not in COSTLY]
        silent = names if task.reports == "outage" else []
        return self.method_rows(task.name, names) + [
            row for name in silent for row in self._outage_rows(task, name)
        ]

    def _few_rows(self, task: OsseTask) -> list[Row]:
        """Return the errors of all methods on the timelines and cycles of those that cost much."""
        names = [name for place, name in self.scores if place == task.name]
        if not {*COSTLY} & {*names}:
            return []
        where, errors = f"{task.name}{TIMELINES}", {}
        for name in names:
            of_method = self.scores[task.name, name]
            short = {"analysis": of_method["analysis"][:FEW_CYCLES], "lost": of_method["lost"]}
            count = self.errors[task.name, name].shape[1]
            errors[name] = settled(short, self.cycles.sd).unflatten(0, (-1, count))[:, :FEW]
        rows = self.compared(where, errors)
        for name in names:
            of_method = self.scores[task.name, name]
            rows += [Row(name, where, metric, float(of_method[metric])) for metric in TIMES]
            if name in COSTLY:
                rows.append(Row(name, where, "lost", float(of_method["lost"].sum()), n=FEW))
        return rows

    def _gate_rows(self) -> list[Row]:
        """Return gated over ungated corrections, for every task and pooled over all of them.

        Not of tasks where one of them is interpolation, without a network.
        """
        pairs = [
            (task.name, self.errors[task.name, CORRECTED], self.errors[task.name, CONTROL])
            for task in (*self.tasks, *self.pooled)
            if {(task.name, CORRECTED), (task.name, CONTROL)} <= self.errors.keys()
            and task.reports in ("fixed", "declared")
            and self.alike
            and all(
                self.settings.get(choice_name(name, task.chosen_for), {}).get("beta", 1.0) > 0
                for name in (CORRECTED, CONTROL)
            )
        ]
        if not pairs:
            return []
        draws = Resamples.clusters(range(self.timelines))
        gates = [
            row
            for name, gated, ungated in pairs
            for row in ratios(CORRECTED, f"gate/{name}", draws, gated, ungated, CONTROL)
        ]
        pooled = torch.stack([logs(gated) - logs(ungated) for _, gated, ungated in pairs]).mean(0)
        score = moments(pooled.numpy(), exponential, f"over_{CONTROL}")
        return [*gates, row_of(CORRECTED, "gate/pooled", draws, score)]

    def _outage_rows(self, task: OsseTask, name: str) -> list[Row]:
        """Return the error after ten silent days and some days after them."""
        analysis = self.scores[task.name, name]["analysis"][..., 0]
        lost = self.scores[task.name, name]["lost"]
        analysis = torch.where(lost, self.cycles.sd[0].to(analysis), analysis)
        changes = [Row(name, task.name, "changed", float(self.scores[task.name, name]["changed"]))]
        for label, after in [("silent_10_days", -1)] + [
            (f"recovered_{days}_days", days * DAY - 1) for days in RECOVERY_DAYS
        ]:
            ends = [gap_of(row % self.timelines).stop + after for row in range(analysis.shape[1])]
            if max(ends) >= len(analysis):
                continue
            error = analysis[ends, range(len(ends))].square().mean().sqrt()
            changes.append(Row(name, task.name, f"rmse_{label}", float(error), n=self.timelines))
        return changes

    def _report_rows(self) -> list[Row]:
        """Return errors over those of the background with one report alone, timelines as units."""
        report_rows = []
        for name, (errors, timelines) in self.reports.items():
            draws = Resamples.clusters(timelines.tolist())
            score = moments(errors.double().log().numpy(), exponential, "over_background")
            report_rows += [
                row_of(name, SINGLE, draws, score),
                Row(name, SINGLE, "worst_over_background", float(errors.max()), n=len(errors)),
            ]
        return report_rows

    def _untrained(self, task: OsseTask) -> list[Row]:
        """Return a row for every method of which networks are missing."""
        lines = []
        for name in NETWORKS:
            seeds = self.asked if name in CORRECTIONS else self.asked[:1]
            reasons = [text for seed in seeds if (text := self.not_trained(name, seed))]
            lines += [Row(name, task.name, "seeds", float(len(seeds) - len(reasons)), note=text)
                      for text in reasons]  # fmt: skip
        return lines

    def pictures(self) -> dict[str, Tensor]:
        """Return the errors of every cycle, but for those of few timelines and cycles."""
        drawn = super().pictures()
        return {key: value for key, value in drawn.items() if key.split("|")[1] not in COSTLY}

    def bars(self) -> list[Bar]:
        """Return the criteria of the protocol that the scores must meet."""
        tasks = [task for task in self.tasks if task.reports in BARS]  # others have none
        return [bar for task in tasks for bar in BARS[task.reports](self, task)]

    def ratio(self, task: str, name: str, other: str) -> Row | None:
        """Return the ratio of two methods with its interval; None where one of them is missing."""
        if not {(task, name), (task, other)} <= self.errors.keys():
            return None
        return paired(name, task, self.errors[task, name], self.errors[task, other], other)

    def lost_alone(self, task: str, name: str) -> float:
        """Count timelines of all seeds where a method is lost and damped interpolation is not."""
        lost = self.scores[task, name]["lost"].unflatten(0, (-1, self.timelines))
        return float((lost & ~self.scores[task, DAMPED]["lost"]).sum())

    def conclusion(self, rows: Sequence[Row]) -> str:
        """Return sentences: Adas against damped interpolation, methods that err less, gates.

        With what an analysis costs, over that of damped interpolation.
        """
        by_key = {(row.method, row.task, row.metric): row for row in rows}
        said, over = [], f"over_{DAMPED}"
        for where in dict.fromkeys(row.task for row in rows):
            entry = by_key.get((CORRECTED, where, over))
            if entry is None:
                continue
            less = [
                f"{name} by {_shown(row)} at {_cost(by_key, name, where)} times"
                for (name, place, metric), row in by_key.items()
                if (place, metric) == (where, over)
                and row.value < entry.value
                and name not in TAPERED
            ]
            few = f" and {FEW_CYCLES} cycles" if where.endswith(TIMELINES) else ""
            tapered = by_key.get((f"{CORRECTED}_tapered", where, over))
            said.append(
                f"On {entry.n} sealed timelines{few} {place_of(where)} the corrected analysis errs "
                f"by {_shown(entry)} of damped optimal interpolation at "
                f"{_cost(by_key, CORRECTED, where)} times its cost"
                + (f" (tapered {_shown(tapered)})" if tapered else "")
                + (f"; less err {', '.join(less)}." if less else ".")
            )
        gate = by_key.get((CORRECTED, "gate/pooled", "over_ungated_oi"))
        if gate is not None:
            helps = "help" if gate.high < 1 else "cost accuracy" if gate.low > 1 else "do not help"
            said.append(f"Gates {helps}: {_shown(gate, 3)}.")
        return " ".join(said)


def _cost(by_key: Mapping[tuple[str, str, str], Row], name: str, where: str) -> str:
    time, other = (by_key[method, where, TIME_RATIO].value for method in (name, DAMPED))
    return f"{float(f'{time / other:.2g}'):g}"


def place_of(task: str) -> str:
    """Return in words where a task is, by its name."""
    density, model, *_ = task.split("/")
    if model not in ("perfect", "error"):
        return f"of {task}"
    model = "a perfect" if model == "perfect" else "an imperfect"
    return f"with {100 * float(density):.3g} % of the points and {model} model"


def _shown(row: Row, digits: int = 2) -> str:
    return f"{row.value:.{digits}f} [{row.low:.{digits}f}, {row.high:.{digits}f}]"


def fixed_bars(scores: OsseScores, task: OsseTask) -> list[Bar]:
    """Return the bars of a task with fixed networks."""
    sparse = task.density <= min(other.density for other in scores.tasks)
    ratio = scores.ratio(task.name, CORRECTED, DAMPED)
    bars = declared_bars(scores, task)
    if sparse:
        bars.append(_bar(f"its upper end, {task.name}", ratio and ratio.high, LIMIT))
    lost = None if ratio is None else scores.lost_alone(task.name, CORRECTED)
    bars.append(_bar(f"timelines lost by {CORRECTED} alone, {task.name}", lost, 0.0))
    if sparse and task.model == "perfect":
        free = scores.errors[task.name, "free_run"][..., 0].square().mean().sqrt()
        bars.append(Bar(f"free run over climatological sd, {task.name}",
                        float(free / scores.climatological_sd[0]), ">=", INDEPENDENT))  # fmt: skip
    return bars


def outage_bars(scores: OsseScores, task: OsseTask) -> list[Bar]:
    """Return the bars of an outage, and those of single reports once."""
    rows = {(row.method, row.metric): row for row in scores.rows() if row.task == task.name}
    changed = rows.get((CORRECTED, "changed"))
    silent = [rows.get((name, "rmse_silent_10_days")) for name in (CORRECTED, DAMPED)]
    over = silent[0] and silent[1] and silent[0].value / silent[1].value
    bars = [
        _bar(f"change without observations, {task.name}", changed and changed.value, 0.0),
        _bar(f"{CORRECTED} over {DAMPED} after ten silent days, {task.name}", over, SILENT),
    ]
    if task == scores.tasks[0]:
        ratios = scores.reports.get(CORRECTED)
        mean = None if ratios is None else float(ratios[0].double().log().mean().exp())
        bars.append(_bar(f"{CORRECTED} over background, one report alone", mean, REPORT_ALONE))
    return bars


def declared_bars(scores: OsseScores, task: OsseTask) -> list[Bar]:
    """Return the bar of reports of mixed quality, whose errors interpolation knows."""
    ratio = scores.ratio(task.name, CORRECTED, DAMPED)
    return [_bar(f"{CORRECTED} over {DAMPED}, {task.name}", ratio and ratio.value, LIMIT)]


BARS = {
    "fixed": fixed_bars,
    "outage": outage_bars,
    "declared": declared_bars,
}


def _bar(name: str, value: float | None, bar: float) -> Bar:
    if value is None:
        return Bar(name, math.nan, "<=", bar, note=UNMEASURED)
    return Bar(name, value, "<=", bar)


def costs(rows: Sequence[Row]) -> dict[str, dict[str, tuple[float, float, float, float]]]:
    """Return cost, error over that of damped interpolation, and its interval, by task and method.

    Only of the task with most methods whose analyses were timed; empty if none were.
    """
    by_task: dict[str, dict[str, tuple[float, float, float, float]]] = {}
    times = {(row.task, row.method): row.value for row in rows if row.metric == TIME_RATIO}
    for row in rows:
        hidden = row.method in (*UNGUIDED, *TAPERED)
        if row.metric == f"over_{DAMPED}" and (row.task, row.method) in times and not hidden:
            of_task = by_task.setdefault(
                row.task, {DAMPED: (times[row.task, DAMPED], 1.0, 1.0, 1.0)}
            )
            of_task[row.method] = times[row.task, row.method], row.value, row.low, row.high
    most = max(by_task, key=lambda task: len(by_task[task]), default="")
    return {most: by_task[most]} if by_task else {}
