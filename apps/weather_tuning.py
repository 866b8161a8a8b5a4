"""What tuning has in common: the budget, the box of the networks, and a line for each trial."""

from __future__ import annotations

from collections.abc import Callable

from weather.experiments.tuning import Box, Setting, search

OPTIMIZER_BOX: Box = {"learning_rate": (5e-4, 1e-2), "weight_decay": (1e-3, 1e-1)}


def tune_method(label: str, box: Box, score: Callable[[Setting], float], trials: int) -> Setting:
    """Return the best setting of ``trials`` and print a line for each."""

    def report(trial: int, setting: Setting, value: float) -> None:
        shown = "  ".join(f"{name} {v:.3g}" for name, v in setting.items())
        print(f"{label}  trial {trial + 1} of {trials}  {shown}  score {value:.4g}", flush=True)

    best, value = search(box, score, trials=trials, report=report)
    print(f"{label}  best score {value:.4g}", flush=True)
    return best
