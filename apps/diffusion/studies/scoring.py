"""How combinations are scored: which of them are independent, and with which weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion.data.pairs import Combination
from harness.evidence import Resamples
from harness.experiment import Piece, Run
from harness.experiment.record import read_record
from harness.experiment.store import SettingsDiffer, Store
from harness.experiment.work import Work
from harness.files import remove


def crossed(combinations: Sequence[Combination]) -> Resamples:
    """Return resamples of combinations, by their subjects and by their first styles.

    Combinations of one subject have its adapter and its drawings in common, those of one style its
    adapter: both are drawn.

    Args:
        combinations: Of each sample.
    """
    return Resamples.crossed(
        [one.subject for one in combinations], [one.styles[0] for one in combinations]
    )


def score(
    run: Run,
    store: Store[Any],
    pieces: Sequence[Piece],
    work: Work[Any],
    *,
    trained: Mapping[str, Path],
    ticks: int,
) -> None:
    """Compute what is missing, after what was made with other weights was refused or removed.

    Works note the fingerprint of what was trained; a result without a note is taken as it is.

    Args:
        run: In whose folder results are.
        store: Of the results.
        pieces: All that are wanted.
        work: Makes one.
        trained: Name of a piece -> folder of what was trained for it.
        ticks: Of a piece.

    Raises:
        SettingsDiffer: A result was made with other weights, and may not be replaced.
    """
    for piece in pieces:
        path = store.find(piece)
        if path is None or piece.name not in trained:
            continue
        record, now = read_record(path), read_record(trained[piece.name])
        known = None if record is None else record.facts.get("trained")
        if known is None or now is None or known == now.fingerprint:
            continue
        if not run.overwrite:
            raise SettingsDiffer(
                f"{path} was made with {trained[piece.name].name} of other settings ({known}, now "
                f"{now.fingerprint}): give --name NEW for another run, or --overwrite to replace it"
            )
        remove(path)
    run.obtain(store, pieces, work, ticks=ticks, scoring=True)
