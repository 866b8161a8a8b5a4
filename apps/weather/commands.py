"""``gates weather``: assimilate observations into weather fields, next to the classical methods."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from apps.weather.command_line import ForecastCLI, WeatherCLI
from apps.weather.networks import (
    Networks,
    Training,
    complete,
    form_of,
    optimizers_of,
    pinned_network,
    untrained_rows,
)
from apps.weather.scoring import (
    Budget,
    KeptByRun,
    Tuning,
    add_to_page,
    borrowed_settings,
    check_densities,
    check_evaluation,
    check_only,
    check_tuning,
    edge_notes,
    score,
    settings_of,
)
from apps.weather.verbs import TRAIN_FORECAST
from core_gates.errors import GatesError
from harness.command import GatesRunTrainer
from harness.experiment import Run
from harness.experiment.run import CHOICES
from harness.files import require_free
from harness.report.sections import run_page
from harness.runs.folder import made_by
from harness.runs.terminal import ticking
from weather.assimilation import ObservedBy
from weather.experiments.experiment import Experiment, experiment_of
from weather.operations.analyses import DEFAULT_METHOD, AnalysisOptions, Assimilation
from weather.operations.long_cycle import LongCycle, cycle_summary
from weather.operations.report_tables import simulate_reports
from weather.training.adas_module import AdasModule
from weather.training.forecast_module import FengWuModule
from weather.training.stream import AssimilationDataModule, ForecastDataModule

DEFAULT_BUDGET = Budget()
say = partial(print, flush=True)


def analysis_options(given: Mapping[str, Any]) -> AnalysisOptions:
    """Return those of the arguments of a verb that describe its analyses."""
    return AnalysisOptions(**{field.name: given[field.name] for field in fields(AnalysisOptions)})


class WeatherTrainer(GatesRunTrainer):
    """The verbs of ``gates weather``; ``fit`` is Lightning's own."""

    def prepare(self, model: AdasModule, datamodule: AssimilationDataModule) -> None:
        """Write the nature run and the recorded backgrounds, or unpack the ERA5 sample.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
        """
        del model
        for path in experiment_of(datamodule.source).make(self.run_folder.path, ticking):
            print(path)

    def observe(
        self,
        model: AdasModule,
        datamodule: AssimilationDataModule,
        truth: str | None = None,
        stations: int = 500,
        member: int = 1,
        time: int = -1,
        times: int = 1,
        observation_seed: int = 0,
        output: str = "observations.parquet",
        overwrite_output: bool = False,
    ) -> None:
        """Simulate stations over a truth and write their noisy reports as a table.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            truth: WeatherBench-2 store; that of ``prepare`` if not given.
            stations: Number of stations, twelve times denser over land.
            member: Member of the store that is the truth.
            time: Index of the first time; negative counts from the end.
            times: Successive times to observe.
            observation_seed: Seed of stations and errors.
            output: Table to write, ``.parquet`` or ``.csv``.
            overwrite_output: Replace an existing table.
        """
        del model
        source = experiment_of(datamodule.source)
        stored = source.store(self.run_folder.path)
        if not truth and not stored.exists():
            raise GatesError(
                f"{stored} does not exist: run `gates weather prepare`, or give --truth"
            )
        table = simulate_reports(
            source,
            truth or stored,
            Path(output),
            stations=stations,
            member=member,
            start=time,
            times=times,
            seed=observation_seed,
            overwrite=overwrite_output,
        )
        print(f"{len(table)} reports of {stations} stations at {times} times")
        print(output)

    def tune(
        self,
        model: AdasModule,
        datamodule: AssimilationDataModule,
        trials: int = 8,
        densities: tuple[float, ...] = (0.1, 0.01),
        cycles: int = 160,
        trial_steps: int = 300,
        only: tuple[str, ...] = (),
    ) -> None:
        """Choose the settings of every method with one budget of trials, and keep them.

        Existing choices and trials are used; a tuning that was stopped continues.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            trials: Trials of every method.
            densities: Fractions of grid points observed.
            cycles: Cycles of a trial in a twin world.
            trial_steps: Training steps of a trial of a network.
            only: Methods and forms that are tuned; all when empty.
        """
        experiment = experiment_of(datamodule.source)
        check_densities(densities)
        check_only(experiment, densities, only)
        budget = Budget(trials, densities, cycles, trial_steps)
        check_tuning(experiment, budget)
        run = self._begin(datamodule, only=(*only, *experiment.base) if only else ())
        experiment.make_truth(ticking)
        tuning = Tuning(experiment, Training(model, datamodule), densities, budget)
        choices = tuning.classical(run) | tuning.networks(run, experiment.forms, ())
        for name, choice in choices.items():
            setting = "  ".join(f"{key} {value:.3g}" for key, value in choice.setting.items())
            print(f"{name}  {setting}")
        print(run.folder / CHOICES)

    def assimilate(
        self,
        model: AdasModule,
        datamodule: AssimilationDataModule,
        observations: str,
        background: str | None = None,
        method: str = DEFAULT_METHOD,
        task: str | None = None,
        weights: str | None = None,
        forecast: str | None = None,
        cycles: int = 1,
        gross_check: float = 5.0,
        representativeness: dict[str, float] | None = None,
        background_error: dict[str, float] | None = None,
        observation_operator: ObservedBy = "nearest_cell",
        output: str = "analysis.zarr",
        overwrite_output: bool = False,
    ) -> None:
        """Assimilate a table of observations into a background and write the analyses.

        Without a forecast model every time of the background store is analyzed independently;
        with one, the last time of the store starts a cycle.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            observations: Table of observations, Parquet or CSV.
            background: WeatherBench-2 store with the channels and the grid of the configuration; of
                `reanalysis`, that of its `data.background` if not given.
            method: ``oi`` errs least on held-out real fields; or ``adas_increment`` for the
                network, ``inverse_distance`` or another.
            task: Task whose stored settings and background error are used; by default the one
                whose background error fits the reports best, of several the first.
            weights: Weights or checkpoint of the network; if not given those of the run folder,
                else the shipped ones.
            forecast: ``model`` for that of the configuration, ``shallow_water``, ``held_suarez``, a
                file or run folder of ``train-forecast``, an ONNX file of FengWu, or any callable
                ``(states, hours) -> states`` as ``package.module.Model`` or ``my_model.py:Model``.
            cycles: Analyses in a cycle, six hours apart.
            gross_check: Departure from the background, in standard deviations, beyond which an
                observation is rejected.
            representativeness: What a cell cannot resolve, as a standard deviation by variable
                that is added to the errors of its observations, ``{"temperature": 0.5}``.
            background_error: Standard deviation of the background error by variable, in place of
                that of the task, for the gross check and the networks.
            observation_operator: ``nearest_cell`` compares a report with the cell and level that it
                lies in, ``interpolation`` with the background interpolated to its place and
                pressure, ``interpolation_in_time`` also to its time, between the times of the
                background store or along the forecast.
            output: Store to write.
            overwrite_output: Replace an existing store.
        """
        options = analysis_options(locals())
        require_free(Path(output), overwrite=overwrite_output)
        job = Assimilation(model, *self._found(datamodule), options, progress=ticking, say=say)
        analyses = job.analyze(cycles)
        print(job.write(analyses, Path(output), overwrite=overwrite_output, made_by=made_by()))

    def cycle(
        self,
        model: AdasModule,
        datamodule: AssimilationDataModule,
        background: str,
        observations: str,
        forecast: str = "model",
        method: str = DEFAULT_METHOD,
        task: str | None = None,
        weights: str | None = None,
        start: str = "last",
        cycles: int | None = None,
        gross_check: float = 5.0,
        representativeness: dict[str, float] | None = None,
        background_error: dict[str, float] | None = None,
        observation_operator: ObservedBy = "nearest_cell",
        divergence_limit: float = 3.0,
        output: str = "cycle",
        overwrite_output: bool = False,
    ) -> None:
        """Cycle a forecast model with observations of a long period, resumable at any moment.

        Writes a folder of analyses.zarr, backgrounds.zarr and departures.csv. A call that is killed
        is continued by the same call, to the same bits. Without observations a background stays.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            background: WeatherBench-2 store with the channels and the grid of the configuration.
            observations: Table of observations, Parquet or CSV, or a folder of such tables.
            forecast: As for ``assimilate``.
            method: As for ``assimilate``, such as ``oi`` or ``free_run``.
            task: As for ``assimilate``.
            weights: As for ``assimilate``.
            start: Time of the background that the cycle starts from, or first or last.
            cycles: Number of analyses, up to the last report if null; may differ when continued.
            gross_check: As for ``assimilate``.
            representativeness: As for ``assimilate``.
            background_error: As for ``assimilate``.
            observation_operator: As for ``assimilate``.
            divergence_limit: Root mean square departure from the climatological mean, in standard
                deviations, beyond which the cycle has diverged and ends.
            output: Folder to write.
            overwrite_output: Replace an existing folder.
        """
        options = analysis_options(locals())
        require_free(Path(output), overwrite=overwrite_output)
        job = LongCycle(model, *self._found(datamodule), options, progress=ticking, say=say)
        reports = job.run(
            Path(output),
            start=start,
            cycles=cycles,
            limit=divergence_limit,
            overwrite=overwrite_output,
            made_by=made_by(),
        )
        for line in cycle_summary(Path(output), reports):
            print(line)
        print(output)

    def evaluate(
        self,
        model: AdasModule,
        datamodule: AssimilationDataModule,
        seeds: tuple[int, ...] = (0, 1, 2),
        densities: tuple[float, ...] = (0.1, 0.01),
        quick: bool = False,
        only: tuple[str, ...] = (),
        tuning: Budget = DEFAULT_BUDGET,
        ckpt_path: str | None = None,
        train: bool = False,
    ) -> None:
        """Score every method and write scores.json; tune first what is missing.

        A network that is missing is left out, and the scores say how to train it.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            seeds: Seeds of networks.
            densities: Fractions of grid points observed.
            quick: A quick run of two minutes: few cycles or cases, no bars, nothing is trained.
            only: Methods and forms that take part, all when empty; bars need all of them.
            tuning: Budget of the tuning of methods that were not tuned.
            ckpt_path: A checkpoint or weights file to score next to the classical methods, in place
                of the networks of all forms and seeds; no bars.
            train: Train the networks that are missing, and tune their optimizers before.
        """
        experiment = experiment_of(datamodule.source)
        full = not quick and ckpt_path is None
        check_evaluation(experiment, seeds, densities, only, tuning if full else None, train)
        part = (*only, *experiment.base) if only else ()
        run = self._begin(datamodule, quick=not full, only=part, seeds=seeds)
        forms = tuple(form for form in experiment.forms if not only or form in only)
        pinned = None
        if ckpt_path:
            form = form_of(run.settings)
            pinned = pinned_network(Path(ckpt_path), model, form, experiment.test_objects())
            forms = (str(form),)
        experiment.make_truth(ticking)
        training = Training(model, datamodule)
        search = Tuning(experiment, training, densities, tuning)
        choices = search.classical(run)
        settings = borrowed_settings(run, experiment, densities) | settings_of(choices)
        chosen = {} if ckpt_path else search.networks(run, forms, seeds, train=train and not quick)
        optimizers = optimizers_of(run, forms, seeds, chosen)
        networks = Networks(run, optimizers, seeds, experiment.test_objects(), pinned)
        there = networks.obtain(run, training, train=train and not quick)
        untrained = untrained_rows(run, networks, experiment, densities)
        seeds, forms = complete(there, seeds, forms)
        networks = Networks(run, {f: optimizers[f] for f in forms}, seeds, networks.tested, pinned)
        scores = experiment.scores(densities, networks.load, seeds, forms, settings, quick=quick)
        score(run, experiment, scores, networks, settings, untrained, edge_notes(choices))

    def report(self, model: AdasModule, datamodule: AssimilationDataModule) -> None:
        """Write the report of a run as one HTML page.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
        """
        del model
        experiment = experiment_of(datamodule.source)
        draw = partial(add_to_page, folder=self.run_folder.path, experiment=experiment)
        print(run_page(self.run(), draw, metrics=experiment.headline).write(self.run_folder.report))

    def _begin(
        self,
        datamodule: AssimilationDataModule,
        *,
        quick: bool = False,
        only: tuple[str, ...] = (),
        seeds: tuple[int, ...] | None = None,
    ) -> Run:
        """Return the run, in whose settings data enter by content and seeds by piece."""
        run = self.run(quick=quick, only=only, seeds=seeds)
        run.settings.pop("seed", None)
        run.settings["data.digest"] = [file.sha256 for file in datamodule.digest()] or None
        return run

    def _found(self, datamodule: AssimilationDataModule) -> tuple[Experiment, KeptByRun]:
        """Return the experiment of the data, and what training and tuning left for it."""
        experiment = experiment_of(datamodule.source)
        return experiment, KeptByRun(self._begin(datamodule), experiment)


def run(arguments: Sequence[str]) -> None:
    """Run one verb that has a Trainer."""
    defaults = {"enable_model_summary": False}
    if arguments[0] == TRAIN_FORECAST:
        ForecastCLI(
            FengWuModule,
            ForecastDataModule,
            WeatherTrainer,
            list(arguments),
            trainer_defaults=defaults,
        )
        return
    WeatherCLI(
        AdasModule,
        AssimilationDataModule,
        WeatherTrainer,
        list(arguments),
        trainer_defaults=defaults,
    )
