"""Tuning: the budget of trials, and the file of the settings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from core_gates.errors import GatesError
from harness.files.atomic import write_json
from weather.baselines.assimilator import Assimilator
from weather.experiments.method import Method, Settings, built, is_stored
from weather.experiments.method import Box, Setting, search


class Tuner:
    """Tune one method after another; what is done is kept next to the file until all are done.

    Args:
        path: File of the settings, replaced by :meth:`finish`.
        trials: Trials of every method.
        resume: Leave out what an interrupted tuning has done.
    """

    def __init__(self, path: Path, trials: int, *, resume: bool = False) -> None:
        self.path, self.trials = path, trials
        self.partial = path.with_suffix(".partial.json")
        done = read_settings(self.partial) if resume and self.partial.is_file() else {}
        self.settings = {name: dict(setting) for name, setting in done.items()}

    def tune(self, name: str, box: Box, score: Callable[[Setting], float]) -> None:
        """Give a method its trials, print a line for each, and keep the best setting."""
        if name in self.settings:
            print(f"{name}  done before", flush=True)
            return

        def report(trial: int, setting: Setting, value: float) -> None:
            shown = "  ".join(f"{key} {v:.3g}" for key, v in setting.items())
            place = f"trial {trial + 1} of {self.trials}"
            print(f"{name}  {place}  {shown}  score {value:.4g}", flush=True)

        best, value = search(box, score, trials=self.trials, report=report)
        print(f"{name}  best score {value:.4g}", flush=True)
        self.settings[name] = best
        write_json(self.partial, self.settings)

    def finish(self) -> Path:
        """Put the settings in their place."""
        write_json(self.path, self.settings)
        self.partial.unlink(missing_ok=True)
        return self.path


def read_settings(path: Path) -> Settings:
    """Read stored settings.

    Raises:
        GatesError: The file is not JSON, or holds something else than positive numbers by name.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GatesError(f"{path} is not JSON ({error}): run `gates weather tune` again") from error
    again = "run `gates weather tune` again"
    if not (isinstance(found, dict) and all(isinstance(one, dict) for one in found.values())):
        raise GatesError(
            f"{path} holds no settings, expected method/task to numbers by name: {again}"
        )
    for method, setting in found.items():
        for name, value in setting.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 < value < math.inf):
                raise GatesError(
                    f"{path}: {name} of {method} is {value!r}, expected a positive number: {again}"
                )
    settings: Settings = found
    return settings


def tuned(settings: Settings, method: Method, task: str) -> Assimilator:
    """Return a method with its stored setting; say so where the middle of its box stands in.

    Raises:
        GatesError: It refuses the setting.
    """
    say_untuned(settings, [method], [task])
    return built(settings, method, task)


def say_untuned(settings: Settings, methods: Sequence[Method], tasks: Sequence[str]) -> None:
    """Print a line for every method that was never tuned for a task."""
    for task in tasks:
        for method in methods:
            if method.box and not is_stored(settings, method, task):
                print(
                    f"{method.name}/{task} was never tuned: the middle of its box is taken; "
                    "`gates weather tune` finds a better setting",
                    flush=True,
                )
