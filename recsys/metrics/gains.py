"""What sharing gains over one model per task, and what it costs: the seesaw."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from core_gates.errors import GatesError


class Gains(NamedTuple):
    """A multi-task model compared with single-task ones.

    Attributes:
        mean: Mean over tasks of (AUC − ½) / (single-task AUC − ½) − 1; NaN without a task.
        worse: Tasks whose AUC is lower than alone: the seesaw count.
        tasks: Tasks compared.
        left_out: Tasks without an AUC, or whose single-task AUC is not above ½.
    """

    mean: float
    worse: int
    tasks: int
    left_out: int


def gains_over_single(
    model: Mapping[str, float], single: Mapping[str, float], *, margin: float = 0.0
) -> Gains:
    """Return the mean relative gain over single-task models, and the number of tasks that lost.

    Args:
        model: Task to AUC.
        single: Task to the AUC of a model of that task alone.
        margin: Losses up to this do not count as worse.

    Raises:
        GatesError: The tasks differ.
    """
    if model.keys() != single.keys():
        raise GatesError(
            f"tasks differ: {', '.join(model)} and, alone, {', '.join(single)}; expected the same"
        )
    pairs = [(model[task], single[task]) for task in model]
    known = [(own, alone) for own, alone in pairs if np.isfinite(own) and alone > 0.5]
    gains = [(own - 0.5) / (alone - 0.5) - 1 for own, alone in known]
    worse = sum(own < alone - margin for own, alone in known)
    mean = float(np.mean(gains)) if gains else float("nan")
    return Gains(mean, worse, len(known), len(pairs) - len(known))
