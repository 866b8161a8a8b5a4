"""Which way a metric is better, told by the words of its name."""

import re

SMALLER = {"loss", "error", "rmse", "mae", "mse", "mape", "crps", "brier", "ne"}
LARGER = {"auc", "gauc", "accuracy", "precision", "recall", "sensitivity", "specificity",
          "ndcg", "dice", "iou", "f1"}  # fmt: skip
NEITHER = {"ratio", "bias", "rate", "probability"}  # best at some value, or no matter of quality


def smaller_is_better(metric: str) -> bool | None:
    """Return whether a metric is better when small; None where its name does not tell.

    Args:
        metric: Its name, such as ``summed log_loss`` or ``rmse_z500``.
    """
    words = set(re.split(r"[^a-z0-9]+", metric.lower()))
    small, large = bool(words & SMALLER), bool(words & LARGER)
    return None if small == large or words & NEITHER else small
