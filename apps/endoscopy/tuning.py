"""The setting of each variant of the honest table: the best of equally many trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apps.endoscopy.runs import json_record
from apps.endoscopy.training import Sizers, Training, changed
from core_gates.errors import GatesError
from endoscopy.data.provenance import differences, fingerprint, plain
from endoscopy.training.variants import CONFIGURED
from harness.files.atomic import write_json

TRIALS, SETTINGS = "trials", "settings.json"
Trials = Mapping[str, Sequence[Mapping[str, float]]]


class Tuning:
    """Trials of settings, kept one by one in ``trials/``, and the choice in ``settings.json``.

    Args:
        sizers: Configured network and data.
        trials: Settings of each variant; without any, all are as configured.
        steps: Optimizer steps of a trial.
        objects: Training objects of a trial.
        seed: Of a trial.
    """

    def __init__(self, sizers: Sizers, trials: Trials, steps: int, objects: int, seed: int) -> None:
        self.sizers, self.trials = sizers, dict(trials)
        self.steps, self.objects, self.seed = steps, objects, seed
        self._chosen: dict[str, dict[str, float]] | None = None

    @property
    def path(self) -> Path:
        """Where the choice is kept."""
        return self.sizers.run_folder.path / SETTINGS

    def training(self, variant: str) -> Training:
        """Return the training of a trial."""
        return Training(variant, self.seed, objects=self.objects)

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the choice, by name."""
        found = self.sizers.settings(self.training(CONFIGURED), steps=self.steps)
        return found | {"trials": plain(self.trials)}

    def chosen(self) -> dict[str, dict[str, float]] | None:
        """Return the setting of each variant; None if trials must be run.

        Raises:
            GatesError: The choice or a trial of the run folder has other settings, and may not be
                overwritten.
        """
        if self._chosen is None:
            record = self.record()
            self._chosen = record and record["chosen"]
        return self._chosen

    def record(self) -> dict[str, Any] | None:
        """Return the content of ``settings.json``: that of the run, of its trials, or shipped."""
        if not self.trials:
            return {"settings": {}, "chosen": {}, "errors": {}}
        own, shipped = json_record(self.path), json_record(self.sizers.shipped / SETTINGS)
        if own is not None and own["chosen"]:
            gap = self._gap(own)
            if not gap:
                return self._own_variants(own)
            self._refuse(self.path, gap)
        if shipped is not None and not self._gap(shipped):
            return self._own_variants(shipped)
        return None if self.waiting() else self._choice()

    def reason(self) -> str:
        """Say why the choice of the package does not do; empty if there is none."""
        shipped = json_record(self.sizers.shipped / SETTINGS)
        return "" if shipped is None else f"{SETTINGS} of the package has {self._gap(shipped)}"

    def waiting(self) -> list[tuple[str, int]]:
        """Return variant and number of the trials that must be run."""
        every = [(name, k) for name, tried in self.trials.items() for k in range(len(tried))]
        return [one for one in every if self._error(*one) is None]

    def keep_trial(self, variant: str, number: int, error: float) -> Path:
        """Keep the error of a trial and what it was trained with."""
        settings = self._trial_settings(variant, number)
        content = {"error": error, "fingerprint": fingerprint(settings), "settings": settings}
        return write_json(self._trial_path(variant, number), content)

    def keep(self) -> None:
        """Write ``settings.json`` into the run folder."""
        record = self.record()
        assert record is not None
        if not self.trials and not self.path.is_file():
            return
        write_json(self.path, record)
        self._chosen = record["chosen"]

    def _choice(self) -> dict[str, Any]:
        errors = {
            name: [self._error(name, k) for k in range(len(tried))]
            for name, tried in self.trials.items()
        }
        best = {
            name: dict(tried[int(np.argmin(np.array(errors[name], float)))])
            for name, tried in self.trials.items()
        }
        settings = self.settings()
        return {
            "fingerprint": fingerprint(settings),
            "settings": settings,
            "chosen": best,
            "errors": errors,
        }

    def _error(self, variant: str, number: int) -> float | None:
        path = self._trial_path(variant, number)
        if not path.is_file():
            return None
        found = json_record(path) or {"settings": None, "error": None}
        gap = differences(found["settings"], self._trial_settings(variant, number))
        if gap:
            self._refuse(path, gap)
            return None
        return math.inf if found["error"] is None else float(found["error"])

    def _trial_path(self, variant: str, number: int) -> Path:
        return self.sizers.run_folder.path / TRIALS / f"{variant}-{number}.json"

    def _trial_settings(self, variant: str, number: int) -> dict[str, Any]:
        rates = self.trials[variant][number]
        return self.sizers.settings(self.training(variant), steps=self.steps, **rates)

    def _gap(self, record: Mapping[str, Any]) -> str:
        """Compare as far as these variants are concerned."""
        found, tried = dict(record["settings"]), record["settings"].get("trials", {})
        found["trials"] = {name: tried.get(name) for name in self.trials}
        return differences(found, self.settings())

    def _own_variants(self, record: dict[str, Any]) -> dict[str, Any]:
        parts = ("chosen", "errors")
        return record | {part: {n: record[part][n] for n in self.trials} for part in parts}

    def _refuse(self, path: Path, gap: str) -> None:
        if not self.sizers.run_folder.overwrite:
            raise GatesError(changed(path, gap))
