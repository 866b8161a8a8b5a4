"""The run of a study: its options, its folder, and how long it takes."""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from core_gates.errors import GatesError, check_option
from harness.command.verbs import Place
from harness.evidence import Row
from harness.experiment import Piece, Run
from harness.experiment.scores import read_scores
from harness.files import write_json

FILE = "study.json"


class StudyRun(Run):
    """A run whose folder tells the name of its study, which is the verb, from its first result."""

    @property
    def rows(self) -> Sequence[Row]:
        """Rows of its scores.

        Raises:
            GatesError: There are none yet.
        """
        return read_scores(self.scores, self.app, self.verb).rows

    def obtain(self, *args: Any, **options: Any) -> list[Piece]:
        """Compute what is missing, see `harness.experiment.run.Run.obtain`."""
        options["prepare"] = partial(write_json, self.folder / FILE, {"study": self.verb})
        return super().obtain(*args, **options)


@dataclass(frozen=True)
class Flags:
    """What takes part, and what becomes of earlier results.

    Args:
        only: Methods that take part; all when empty. Bars need all.
        quick: Score what was trained before and train nothing, without bars; only gaussian-rates
            fits a few small samples.
        overwrite: Replace what was made with other settings.
    """

    only: tuple[str, ...] = ()
    quick: bool = False
    overwrite: bool = False


def open_study(
    place: Place,
    study: str,
    flags: Flags,
    *,
    methods: Collection[str],
    seeds: Sequence[int],
    settings: dict[str, Any],
    minutes: float,
) -> StudyRun:
    """Return the run of a study, after its options were checked and its time was told.

    Args:
        place: Where it is kept.
        study: Its name, which is that of the verb.
        flags: Options that all studies have.
        methods: All that could take part.
        seeds: Of what is trained.
        settings: All that decides its results.
        minutes: Minutes of one idle core that all of it takes.

    Raises:
        GatesError: A method does not exist, there is no seed or a negative one, or the folder is
            that of another study.
    """
    for method in flags.only:
        check_option("--only", method, methods, GatesError)
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise GatesError(
            f"--seeds is {list(seeds)}, expected a number from 0, or several different ones"
        )
    folder = place.run_folder.path
    if (other_study := study_of(folder)) not in (None, study):
        raise GatesError(f"{folder} is a run of the study {other_study}: give --name NEW")
    run = StudyRun(
        folder, app="study", verb=study, config_path=place.config_path, settings=settings,
        overwrite=flags.overwrite, quick=flags.quick, only=flags.only, seeds=seeds,
        command=place.command,
    )  # fmt: skip
    if not flags.quick:
        cores, part = torch.get_num_threads(), len(set(flags.only)) / len(methods) or 1.0
        wall = math.ceil(minutes / cores * part)
        print(f"at most about {wall} minutes on {cores} idle cores, where nothing is there yet")
    return run


def study_of(folder: Path) -> str | None:
    """Return the study that a folder is a run of; None for a folder without one.

    Raises:
        GatesError: The file that tells is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["study"])
    except (ValueError, KeyError, TypeError) as error:
        raise GatesError(
            f"{path} is damaged ({error!r}): delete it and run the study again"
        ) from error
