"""A baseline whose mean predictions are the rates of the validation rows, as those of networks."""

from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from recsys.baselines.predictor import Predictor
from recsys.batch import Batch
from recsys.calibration import intercepts_of

CLOSEST = 1e-12
"""Distance of a probability from 0 and 1 at which its logit is taken."""


class WithIntercepts:
    """Add one number for each task to the logits of a baseline, see :mod:`recsys.calibration`.

    Args:
        predictor: The baseline, not yet fitted.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def fit(self, rows: Batch, validation: Batch) -> Self:
        """Fit the baseline, then its intercepts on the validation rows."""
        self.predictor.fit(rows, validation)
        self.intercepts = intercepts_of(
            self._logits(validation), validation.labels, validation.mask, validation.weight
        )
        return self

    def predict(self, rows: Batch) -> NDArray[np.float64]:
        """Return probabilities (N, T)."""
        return (self._logits(rows) + self.intercepts).sigmoid().numpy()

    def _logits(self, rows: Batch) -> torch.Tensor:
        return torch.from_numpy(self.predictor.predict(rows)).double().logit(eps=CLOSEST)
