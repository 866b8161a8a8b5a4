"""Which fields a model needs."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from harness.figures import Estimate, Panel, forest_figure
from harness.figures.forest import decimals_of
from harness.figures.style import BLUE, MUTED
from recsys.diagnosis.importance import Importance

MOST = 30


def importance_figure(
    found: Sequence[Importance],
    *,
    tasks: Sequence[str] = (),
    title: str = "Permutation importance of fields",
    units: str = "users",
) -> Figure:
    """Draw what the log-loss gains if a field is permuted, the most important first.

    Fields whose importance is written as zero are counted, not drawn.

    Args:
        found: By :func:`recsys.diagnosis.importance.permutation_importance`; the first 30 are
            shown.
        tasks: Tasks with a separate panel, next to that of their sum.
        title: Heading.
        units: What intervals are drawn from.

    Raises:
        ValueError: There is no field, or a task is unknown.
    """
    if not found:
        raise ValueError("no field was permuted, expected at least one")
    if unknown := [task for task in tasks if task not in found[0].tasks]:
        raise ValueError(f"no importance for {', '.join(unknown)}")
    decimals = decimals_of([x for one in found for x in (one.total.value, one.total.high)])
    least = 0.5 * 10**-decimals
    shown = [one for one in found if abs(one.total.value) >= least][:MOST] or found[:1]
    columns = {"summed log-loss": [one.total for one in shown]}
    columns |= {f"log-loss of {task}": [one.tasks[task] for one in shown] for task in tasks}
    panels = [
        Panel(
            [
                Estimate(one.field, gap.value, gap.low, gap.high,
                         BLUE if gap.low > 0 else MUTED, hollow=not gap.low > 0)
                for one, gap in zip(shown, gaps, strict=True)
            ],
            name,
            zero=0.0,
            signed=True,
        )
        for name, gaps in columns.items()
    ]  # fmt: skip
    more = len(found) - len(shown)
    left_out = f"; {more} more near 0 or below" if more else ""
    note = f"increase when permuted over rows; intervals over {units}; hollow: may be 0{left_out}"
    return forest_figure(panels, title=title, note=note)
