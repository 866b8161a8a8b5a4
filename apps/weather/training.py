"""Networks that an evaluation needs: found in the run folder or the package, or trained."""

from __future__ import annotations

import copy
from importlib.resources import files
from pathlib import Path

import lightning as L

from core_gates.errors import GatesError
from harness.runs.checkpoint import load_weights as load_checkpoint
from harness.runs.folder import RunFolder
from harness.runs.progress import progress_bar
from weather.experiments.method import Settings
from weather.experiments.method import Setting
from weather.models.adas.analysis import AdasAnalysis, load_weights, save_weights, take_weights
from weather.models.adas.forms import FORMS
from weather.training.module import AdasModule
from weather.training.stream import AssimilationDataModule


class Networks:
    """The networks of a configuration, one for each form and seed.

    Args:
        run_folder: Trained weights are kept in its ``weights/``.
        config: Name of the configuration, whose shipped weights are in ``weather/weights``.
        model: The module of the configuration.
        datamodule: Its data; the seed of the source is replaced.
        settings: Tuned settings of the training, by form.
    """

    def __init__(
        self,
        run_folder: RunFolder,
        config: str,
        model: AdasModule,
        datamodule: AssimilationDataModule,
        settings: Settings,
    ) -> None:
        self.run_folder, self.config = run_folder, config
        self.model, self.datamodule, self.settings = model, datamodule, settings
        self.pinned: Path | None = None

    def pin(self, path: Path) -> str:
        """Take one checkpoint or weights file for every seed and return the form that it has.

        Raises:
            GatesError: The configured network is of no form that is compared.
        """
        form = form_of(self.model.analysis)
        if form is None:
            raise GatesError(
                f"the configured network is none of {', '.join(FORMS)}: set model.network.output "
                "and model.network.gated as one of them has it"
            )
        self.pinned = path
        return form

    def path(self, form: str, seed: int) -> Path | None:
        """Return the weights of a form and seed, or None if they must be trained."""
        if self.pinned is not None:
            return self.pinned
        name = f"{form}-s{seed}.safetensors"
        shipped = Path(str(files("weather"))) / "weights" / self.config / name
        places = (self.run_folder.path / "weights" / name, shipped)
        return next((place for place in places if place.is_file()), None)

    def missing(self, forms: tuple[str, ...], seeds: tuple[int, ...]) -> list[tuple[str, int]]:
        """Return what has to be trained."""
        return [(f, s) for f in forms for s in seeds if self.path(f, s) is None]

    def load(self, form: str, seed: int) -> AdasAnalysis:
        """Return a network in evaluation mode, trained first where it is missing."""
        path = self.path(form, seed)
        if path is None:
            path = self.train(form, seed)
        analysis = self.model.variant(form).analysis
        load_trained(path, analysis)
        return analysis.eval()

    def train(self, form: str, seed: int) -> Path:
        """Train one network with the configured data and keep its weights."""
        tuned = "adas_increment" if form == "open_gate" else form
        setting = dict(self.settings.get(tuned, {}))
        analysis = self.fit(form, seed, setting, self.datamodule.steps)
        path = self.run_folder.path / "weights" / f"{form}-s{seed}.safetensors"
        save_weights(path, analysis, form=form, seed=seed, config=self.config)
        return path

    def fit(self, form: str, seed: int, setting: Setting, steps: int) -> AdasAnalysis:
        """Return the analysis after ``steps`` steps with a setting of the optimizer."""
        L.seed_everything(seed, verbose=False)
        module = self.model.variant(form, **setting)
        source = copy.copy(self.datamodule.source)
        source.seed = seed
        data = AssimilationDataModule(
            source,
            steps=steps,
            timelines=self.datamodule.timelines,
            validation_steps=self.datamodule.validation_steps,
            validation_timelines=self.datamodule.validation_timelines,
        )
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="auto",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            val_check_interval=max(steps // 4, 1),
            callbacks=[progress_bar()],
            default_root_dir=self.run_folder.path,
        )
        print(f"training {form}, seed {seed}: {steps} steps", flush=True)
        trainer.fit(module, data)
        return module.analysis.eval()


def form_of(analysis: AdasAnalysis) -> str | None:
    """Return the form of a network, None if it is none of those that are compared."""
    arguments = analysis.network.arguments
    return next(
        (form for form, changes in FORMS.items() if changes.items() <= arguments.items()), None
    )


def keep_weights(
    run_folder: RunFolder,
    module: AdasModule,
    datamodule: AssimilationDataModule,
    config_path: Path | None,
) -> Path | None:
    """Write what ``fit`` trained as the weights of its form and seed; the best, where one is kept.

    Returns:
        The file, or None if the network is of no form that ``evaluate`` compares.
    """
    form = form_of(module.analysis)
    if form is None:
        return None
    if run_folder.best_checkpoint is not None:
        load_trained(run_folder.best_checkpoint, module.analysis)
    config = config_path.stem if config_path else run_folder.name
    seed = datamodule.source.seed
    path = run_folder.path / "weights" / f"{form}-s{seed}.safetensors"
    save_weights(path, module.analysis, form=form, seed=seed, config=config)
    return path


def load_trained(path: Path, analysis: AdasAnalysis) -> None:
    """Read weights, or those of a checkpoint (``.ckpt``), into ``analysis``.

    Raises:
        GatesError: The file is missing, damaged, or belongs to another configuration.
    """
    if path.suffix != ".ckpt":
        load_weights(path, analysis)
        return
    prefix = "analysis."
    state = load_checkpoint(path).get("state_dict")
    if not isinstance(state, dict):
        raise GatesError(
            f"{path} is no checkpoint of a training: give checkpoints/last.ckpt or best.ckpt of a "
            "run, or a file of its weights/"
        )
    own = {str(n).removeprefix(prefix): v for n, v in state.items() if str(n).startswith(prefix)}
    take_weights(path, own, analysis)
