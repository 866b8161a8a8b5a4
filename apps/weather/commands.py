"""``gates weather``: assimilate observations into weather fields, next to the classical methods."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from apps.weather.assimilation import Assimilation, Inputs
from apps.weather.checks import (
    check_densities,
    check_prepared,
    check_seeds,
    check_tuning,
    truth_store,
)
from apps.weather.observing import observe_store
from apps.weather.report import weather_report
from apps.weather.training import Networks, keep_weights
from apps.weather.tuning import Tuner, read_settings, say_untuned
from core_gates.errors import GatesError
from core_gates.monitor.hooks import GateMonitor
from harness.command import GatesRunCLI, GatesRunTrainer
from harness.experiment.markdown import write_markdown
from harness.experiment.printing import print_scores
from harness.experiment.scores import Scores, read_scores, write_scores
from harness.files.atomic import require_free
from harness.report.gates import save_gates
from harness.runs.processes import in_processes
from harness.runs.ticker import ticking
from weather.experiments.experiment import Example, Experiment, Load, experiment_of
from weather.experiments.method import Settings
from weather.experiments.pictures import save_pictures
from weather.experiments.method import Setting
from weather.models.adas.analysis import AdasAnalysis
from weather.models.adas.forms import COMPARED
from weather.training.module import AdasModule
from weather.training.stream import AssimilationDataModule

SETTINGS = "settings.json"


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
        table = observe_store(
            source,
            truth or truth_store(source, self.run_folder.path),
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
    ) -> None:
        """Choose the settings of every method with one budget of trials, and store them.

        An interrupted tuning goes on with ``--resume``.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            trials: Trials of every method.
            densities: Shares of grid points observed.
            cycles: Cycles of a trial in a twin world.
            trial_steps: Training steps of a trial of a network.
        """
        experiment = experiment_of(datamodule.source)
        check_densities(densities)
        check_tuning(experiment, trials, cycles, trial_steps)
        networks = self._networks(model, datamodule, {})
        tuner = Tuner(self.run_folder.path / SETTINGS, trials, resume=self.run_folder.resume)
        experiment.prepare(ticking)

        def fit(form: str, setting: Setting) -> AdasAnalysis:
            return networks.fit(form, 0, setting, trial_steps)

        for name, (box, score) in experiment.trials(densities, fit, cycles=cycles).items():
            tuner.tune(name, box, score)
        print(tuner.finish())

    def assimilate(
        self,
        model: AdasModule,
        datamodule: AssimilationDataModule,
        background: str,
        observations: str,
        method: str = "adas_increment",
        task: str | None = None,
        weights: str | None = None,
        forecast: str | None = None,
        cycles: int = 1,
        gross_check: float = 5.0,
        representativeness: dict[str, float] | None = None,
        background_error: dict[str, float] | None = None,
        output: str = "analysis.zarr",
        overwrite_output: bool = False,
    ) -> None:
        """Assimilate a table of observations into a background and write the analyses.

        Without a forecast model every time of the background store is analyzed for itself; with
        one, the last time of the store starts a cycle.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            background: WeatherBench-2 store with the channels and the grid of the configuration.
            observations: Table of observations, Parquet or CSV.
            method: ``adas_increment``, ``adas_official``, ``oi``, ``inverse_distance`` or another.
            task: Task whose stored settings and background error are used; by default the first.
            weights: Weights or checkpoint of the network; if not given those of the run folder,
                else the shipped ones.
            forecast: ``model`` for the forecast model of the configuration, or any callable
                ``(states, hours) -> states`` as ``package.module.Model`` or ``my_model.py:Model``.
            cycles: Analyses in a cycle, six hours apart.
            gross_check: Departure from the background, in standard deviations, beyond which an
                observation is rejected.
            representativeness: What a cell cannot resolve, as a standard deviation by variable
                that is added to the errors of its observations, ``{"temperature": 0.5}``.
            background_error: Standard deviation of the background error by variable, in place of
                that of the task, for the gross check and the networks.
            output: Store to write.
            overwrite_output: Replace an existing store.
        """
        require_free(Path(output), overwrite=overwrite_output)
        settings = self._settings()
        networks = self._networks(model, datamodule, settings)
        experiment = experiment_of(datamodule.source)
        inputs = Inputs(
            background,
            observations,
            method,
            weights,
            gross_check,
            representativeness,
            background_error,
        )
        job = Assimilation(model, experiment, networks, settings, inputs, task)
        job.attributes["configuration"] = networks.config
        analyses = job.run(forecast, cycles)
        print(job.write(analyses, Path(output), overwrite=overwrite_output))

    def evaluate(
        self,
        model: AdasModule,
        datamodule: AssimilationDataModule,
        seeds: tuple[int, ...] = (0, 1, 2),
        densities: tuple[float, ...] = (0.1, 0.01),
        quick: bool = False,
        open_gate: bool = False,
        ckpt_path: str | None = None,
    ) -> None:
        """Score every method, train the networks that are missing first, and write scores.json.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
            seeds: Seeds of networks, and of test timelines in a twin world.
            densities: Shares of grid points observed.
            quick: A short look in two minutes: few cycles or cases, no bars, nothing is trained.
            open_gate: Score networks with all gates open, too. None is shipped: they are trained
                with the settings of ``adas_increment``.
            ckpt_path: A checkpoint or weights file to score next to the classical methods, in place
                of the networks of all forms and seeds; no bars.
        """
        experiment = experiment_of(datamodule.source)
        check_seeds(experiment, seeds)
        check_densities(densities)
        settings = self._settings()
        networks = self._networks(model, datamodule, settings)
        forms: tuple[str, ...] = (*COMPARED, "open_gate") if open_gate else COMPARED
        full = not quick and ckpt_path is None
        if not full:
            self._keep_full_scores()
        if ckpt_path:
            forms = (networks.pin(Path(ckpt_path)),)
            networks.load(forms[0], seeds[0])  # refused now, if it must be
        missing = networks.missing(forms, seeds)
        if missing:
            names = ", ".join(f"{form} seed {seed}" for form, seed in missing)
            print(f"weights missing: {names}; {'left out' if quick else 'training them now'}")
        if quick:
            seeds = tuple(s for s in seeds if any(networks.path(f, s) for f in forms))
            forms = tuple(f for f in forms if seeds and not networks.missing((f,), seeds))
        experiment.make_truth(ticking)
        for form, seed in networks.missing(forms, seeds):
            networks.train(form, seed)
        for task in experiment.tasks(densities):
            say_untuned(settings, experiment.methods(task.name), [task.name])
        self._score(experiment, networks.load, settings, seeds, forms, densities, quick, full)
        written = read_scores(self.run_folder.scores, "weather")
        print_scores(self.run_folder.scores, written, metrics=experiment.headline)

    def _keep_full_scores(self) -> None:
        """Refuse to replace the scores of a full evaluation by those of a short look.

        Raises:
            GatesError: The run folder holds scores with bars.
        """
        path = self.run_folder.scores
        try:
            full = bool(read_scores(path, "weather").bars)
        except GatesError:  # there are none, or what is there is worth nothing
            full = False
        if full:
            raise GatesError(
                f"{path} holds a full evaluation, which --quick and --ckpt_path would replace: add "
                "--name NEW, or delete it"
            )

    def _score(
        self,
        experiment: Experiment,
        load: Load,
        settings: Settings,
        seeds: tuple[int, ...],
        forms: tuple[str, ...],
        densities: tuple[float, ...],
        quick: bool,
        full: bool,
    ) -> None:
        """Run everything on all cores, keep what figures are drawn from, and write the scores.

        Bars and checks only if ``full``.
        """
        scores = experiment.scores(densities, load, seeds, forms, settings, quick=quick)
        scores.run(in_processes, ticking)
        save_pictures(self.run_folder.path / experiment.pictures_file, scores.pictures())
        rows, bars = scores.rows(), scores.bars() if full else []
        for check in experiment.checks(scores) if full else ():
            check.run(in_processes, ticking)
            rows, bars = rows + check.rows(), bars + check.bars()
        if scores.forms:
            _watch_gates(scores.example(), self.run_folder.path)
        shown = [row for row in rows if row.metric in experiment.headline]
        heading = [f"# Weather: {self.run_folder.name}", *experiment.notes]
        write_markdown(self.run_folder.scores.with_suffix(".md"), heading, shown, bars)
        found = Scores(rows, bars, scores.seeds, notes=experiment.notes, quick=not full)
        write_scores(self.run_folder.scores, found, app="weather", config_path=self.config_path)

    def report(self, model: AdasModule, datamodule: AssimilationDataModule) -> None:
        """Write the report of a run as one HTML page.

        Args:
            model: Filled in by the command line.
            datamodule: Filled in by the command line.
        """
        del model
        print(weather_report(self.run_folder, experiment_of(datamodule.source)))

    def _networks(
        self, model: AdasModule, datamodule: AssimilationDataModule, settings: Settings
    ) -> Networks:
        config = self.config_path.stem if self.config_path else "default"
        return Networks(self.run_folder, config, model, datamodule, settings)

    def _settings(self) -> Settings:
        """Return the settings of the run folder, else those shipped with the configuration."""
        stem = self.config_path.stem if self.config_path else "default"
        shipped = Path(str(files("apps.weather"))) / "configs" / f"{stem}.settings.json"
        for path in (self.run_folder.path / SETTINGS, shipped):
            if path.is_file():
                return read_settings(path)
        return {}


def _watch_gates(example: Example, folder: Path) -> None:
    """Keep the gate values of one analysis."""
    network, background, observations, background_sd = example
    with GateMonitor(network) as monitor:
        network.analyse(background, observations, background_sd)
        save_gates(monitor, folder)


class WeatherCLI(GatesRunCLI):
    """The command line of ``gates weather``."""

    app = "weather"
    verbs = ("prepare", "observe", "tune", "fit", "assimilate", "evaluate", "report")

    def after_instantiate_classes(self) -> None:
        """Refuse data that is damaged, or not that of the model, before a run folder is claimed."""
        if self.subcommand == "fit":
            self.model.check_source(self.datamodule.source)
            check_prepared(self.datamodule.source)
            self.datamodule.progress = ticking
        super().after_instantiate_classes()

    def after_fit(self) -> None:
        """Keep the trained weights where ``evaluate`` and ``assimilate`` find them."""
        if not self.trainer.is_global_zero:
            return
        path = keep_weights(self.run_folder, self.model, self.datamodule, self.config_path)
        if path is not None:
            print(path)


def main(arguments: Sequence[str]) -> None:
    """Run one verb."""
    WeatherCLI(
        AdasModule,
        AssimilationDataModule,
        WeatherTrainer,
        list(arguments),
        trainer_defaults={"enable_model_summary": False},
    )
