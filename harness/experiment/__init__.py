"""Experiments: pieces of work, their results, tuning, scores; see ``harness.experiment.run``."""

from harness.experiment.forms import Arrays, Figures, Form, Table
from harness.experiment.job import Job
from harness.experiment.piece import Piece, Setting
from harness.experiment.run import Run
from harness.experiment.store import SettingsDiffer, Store
from harness.experiment.tuning import Choice, Space, lowest
from harness.experiment.work import Work

__all__ = [
    "Arrays",
    "Choice",
    "Figures",
    "Form",
    "Job",
    "Piece",
    "Run",
    "Setting",
    "SettingsDiffer",
    "Space",
    "Store",
    "Table",
    "Work",
    "lowest",
]
