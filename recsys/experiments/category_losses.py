"""Log-loss by category of tasks: a sum over all tasks may hide that one category loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.evidence import Resamples, Row, Scores, compare
from recsys.batch import Batch
from recsys.experiments.claims import SUMMED
from recsys.experiments.predictions import Probabilities
from recsys.metrics.resampled import summed_log_loss
from recsys.schema import FeatureSchema


def category_rows(
    rows: Batch,
    found: Mapping[str, Sequence[Probabilities]],
    schema: FeatureSchema,
    draws: Resamples,
    *,
    reference: str | None = None,
) -> list[Row]:
    """Return the log-loss of all methods summed over the tasks of each category.

    Args:
        rows: The N test rows.
        found: Method -> probabilities (N, T) of each seed.
        schema: Whose tasks have categories.
        draws: Resamples of users.
        reference: Method that is subtracted from all others.

    Returns:
        Rows of the task ``test``, with the metric ``summed log_loss CATEGORY``; none where there
        is one category only.
    """
    labels, mask = rows.labels.numpy(), rows.mask.numpy()
    users, weights = rows.user.numpy(), rows.weight.numpy()
    made: list[Row] = []
    for category in schema.categories if len(schema.categories) > 1 else ():
        places = [k for k, task in enumerate(schema.tasks) if task.category == category]
        if not mask[:, places].any():
            continue

        def scores_of(
            one: Probabilities, places: list[int] = places, name: str = f"{SUMMED} {category}"
        ) -> Scores:
            truth, counted = labels[:, places], mask[:, places]
            own = summed_log_loss(truth, one[:, places], users, mask=counted, weights=weights)
            return lambda drawn: {name: own(drawn)["log_loss"]}

        scores = {method: [scores_of(one) for one in own] for method, own in found.items()}
        made += compare(scores, draws, task="test", reference=reference)
    return made
