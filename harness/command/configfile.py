"""Where ``--config NAME`` is looked up, which sections a verb reads, and what decides a result."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, get_loader

from core_gates.errors import GatesError
from harness.files import sha256
from harness.files.piece import flatten


def find_config(name: str, app: str) -> Path:
    """Find a configuration file in the working folder, then among the packaged ones.

    Args:
        name: Path or bare name, with or without ``.yaml``.
        app: Application whose packaged configurations (``apps/<app>/configs``) are searched.

    Raises:
        GatesError: Nothing is found; the message lists the packaged names.
    """
    packaged = _packaged(app)
    names = [name] if name.endswith((".yaml", ".yml", ".json")) else [name, f"{name}.yaml"]
    places = [Path(n) for n in names] + [packaged / n for n in names]
    config = next((place for place in places if place.is_file()), None)
    if config is not None:
        return config
    choices = packaged_configs(app)
    raise GatesError(
        f"configuration {name!r} found neither in {Path.cwd()} nor among the packaged ones: "
        f"give a path or one of {', '.join(choices) or '(none)'}"
    )


def packaged_configs(app: str) -> list[str]:
    """Return the names of the packaged configurations of an application."""
    return sorted(path.stem for path in _packaged(app).glob("*.yaml"))


def _packaged(app: str) -> Path:
    return Path(str(files("apps"))) / app / "configs"


EXTENDS = "extends"


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML mapping, on top of the configuration that it extends.

    ``extends: NAME`` at the top names a file of the same folder, whose keys hold unless they are
    given again.

    Raises:
        GatesError: The file is not text, not YAML or not a mapping, or extends what is not there.
    """
    merged: dict[str, Any] = {}
    for file in reversed(chain(path)):
        merged = _merge(merged, _read_mapping(file))
    merged.pop(EXTENDS, None)
    return merged


def chain(path: Path) -> list[Path]:
    """Return a configuration file and those that it extends, the nearest first.

    Raises:
        GatesError: One of them is missing or not readable, or extends itself.
    """
    files = [path]
    while (name := _read_mapping(files[-1]).get(EXTENDS)) is not None:
        base = files[-1].with_name(f"{str(name).removesuffix('.yaml')}.yaml")
        if not base.is_file() or base in files:
            reason = "which extends it" if base in files else "which is not there"
            raise GatesError(
                f"{files[-1]} extends {base}, {reason}: name another configuration of that folder"
            )
        files.append(base)
    return files


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = get_loader("yaml")(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise GatesError(f"{path} is not a text file: --config expects YAML") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise GatesError(f"{path}{place} is not valid YAML: {reason}") from error
    if not isinstance(content, dict):
        kind = "nothing" if content is None else type(content).__name__
        raise GatesError(f"{path} holds {kind}, but a configuration is a mapping 'key: value'")
    return content


def select_verb(content: dict[str, Any], verb: str, verbs: tuple[str, ...]) -> dict[str, Any]:
    """Keep what one verb reads: the shared keys, and on top of them its own section.

    A top-level key that is the name of a verb is that verb's section, so that one file serves
    every verb of an application::

        model: {dim: 32}
        tune: {trials: 40}
        evaluate: {seeds: [0, 1, 2]}

    Raises:
        GatesError: The section is not a mapping.
    """
    shared = {key: value for key, value in content.items() if key not in verbs}
    section = content.get(verb) or {}
    if not isinstance(section, dict):
        raise GatesError(
            f"the section {verb!r} of the configuration must be a mapping, found {section!r}"
        )
    return _merge(shared, section)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        nested = isinstance(old, dict) and isinstance(value, dict) and "class_path" not in value
        merged[key] = _merge(old, value) if nested else value  # type: ignore[arg-type]
    return merged


class ConfigFile(ActionConfigFile):
    """The ``--config`` option of every verb: looked up, checked, selected."""

    def __call__(
        self, parser: Any, cfg: Any, values: Any, option_string: str | None = None
    ) -> None:
        """Merge the selected part of the file into the namespace.

        Raises:
            GatesError: See `find_config` and `read_config`; or a group of options, such
                as ``model``, is a number or a list.
        """
        path = find_config(str(values), parser.app)
        content = select_verb(read_config(path), parser.verb, parser.verbs)
        groups = {option.split(".")[0] for option in parser._option_string_actions if "." in option}
        for key, value in content.items():
            if f"--{key}" in groups and not isinstance(value, dict | str | None):
                raise GatesError(f"{path}: {key} is {value!r}, expected a mapping 'key: value'")
        parser.config_path = path
        self.apply_config(parser, cfg, self.dest, yaml.safe_dump(content, sort_keys=False))


TRAINER = (
    "max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "limit_train_batches",
    "limit_val_batches", "overfit_batches", "val_check_interval", "check_val_every_n_epoch",
    "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision",
    "reload_dataloaders_every_n_epochs", "callbacks", "plugins", "sync_batchnorm",
)  # fmt: skip
"""Options of the Trainer that change what is trained; devices, processes and logs do not."""

IF_GIVEN = ("callbacks", "plugins", "sync_batchnorm")
"""Those that count only where they are given: without them, settings are as they always were."""

WATCHING = (
    "DeviceStatsMonitor", "LearningRateMonitor", "ModelSummary", "RichModelSummary",
    "RichProgressBar", "ThroughputMonitor", "TQDMProgressBar",
)  # fmt: skip
"""Callbacks of Lightning that change nothing."""

CHECKPOINT = ("monitor", "mode")


def decisive_settings(options: Mapping[str, Any], neutral: Collection[str] = ()) -> dict[str, Any]:
    """Return the settings of model, data and training under dotted names.

    Args:
        options: The parsed configuration of a verb, nested.
        neutral: Dotted names, or beginnings of them, of options that decide nothing: folders,
            processes, logs.
    """
    settings = {
        "seed": options.get("seed_everything"),
        **_of_trainer(options.get("trainer") or {}),
        **{
            f"checkpoint.{name}": (options.get("checkpoint") or {}).get(name) for name in CHECKPOINT
        },
    }
    for group in ("model", "data"):
        value = options.get(group)
        settings |= flatten(value, f"{group}.") if isinstance(value, Mapping) else {group: value}
    return {
        name: value
        for name, value in settings.items()
        if value is not None
        and not any(name == prefix or name.startswith(f"{prefix}.") for prefix in neutral)
    }


def _of_trainer(options: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: options.get(name) for name in TRAINER}
    given = kept["callbacks"] or []
    kept["callbacks"] = [
        callback
        for callback in (given if isinstance(given, list) else [given])
        if not _watches(callback)
    ]
    return {f"trainer.{n}": (v or None) if n in IF_GIVEN else v for n, v in kept.items()}


def _watches(callback: Any) -> bool:
    path = callback.get("class_path") if isinstance(callback, Mapping) else callback
    package, _, name = str(path).rpartition(".")
    return name in WATCHING and package.startswith("lightning.pytorch.callbacks")


def start_of(path: str | None) -> str | None:
    """Return a short hash of the checkpoint that a training run starts from; None for none."""
    return None if path is None else sha256(Path(path))[:16]
