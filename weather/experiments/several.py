"""Several scores of the same samples as one, so that rows of all are computed together."""

from collections.abc import Iterable

import numpy as np

from harness.evidence import Scores


def joined(parts: Iterable[Scores]) -> Scores:
    """Return the scores of all parts, which differ in their names, as one function of weights."""
    known = list(parts)

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {name: value for part in known for name, value in part(weights).items()}

    return scores
