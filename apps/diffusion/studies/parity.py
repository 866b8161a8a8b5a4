"""Does this installation compute what published code and PEFT computed: golden vectors."""

from apps.diffusion.embedded_world import World
from apps.diffusion.studies.base_study import Asked
from core_gates.errors import GatesError
from diffusion.evaluation.parity import ADVICE, COMPARISONS, TOLERANCE
from harness.evidence import Bar, Row
from harness.files import Data


def parity_study(asked: Asked, _: World) -> None:
    """Score the worst relative error of each comparison, and note where it is too large.

    Raises:
        GatesError: No folder of golden vectors is given, or a file of it is missing or damaged.
    """
    if asked.vectors is None:
        raise GatesError(f"parity compares with golden vectors: {ADVICE}, as --vectors")
    run, rows, notes = asked.run, [], []
    for name in (name for name in COMPARISONS if not run.only or name in run.only):
        errors = dict(COMPARISONS[name](asked.vectors))
        at = max(errors, key=errors.__getitem__)
        rows.append(Row(name, "golden vectors", "worst", errors[at], n=len(errors)))
        notes += [f"{name}: worst at {at}"] * (errors[at] > TOLERANCE)
    run.finish(
        rows,
        [Bar(row.method, row.value, "<=", TOLERANCE) for row in rows],
        seeds=[0],
        data=[Data.of("golden vectors", "all", asked.vectors)],
        headline=f"{len(rows) - len(notes)} of {len(rows)} figures of "
        f"{sum(row.n for row in rows):,} comparisons agree.",
        notes=notes,
    )
