"""``gates video simulate``: a simulated feed as files."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from core_gates.errors import GatesError
from harness.command.verbs import Place, refuse_existing, refuse_strangers
from harness.files import replacing
from harness.runs.ticker import working
from video_multitask.simulator.export import export_kuairand
from video_multitask.simulator.log import simulate as simulate_feed
from video_multitask.tasks import LABELS

TRUTH = "truth.parquet"


def simulate(
    place: Place,
    rows: int = 200_000,
    users: int = 2_000,
    videos: int = 3_000,
    days: int = 14,
    seed: int = 0,
    groups: bool = False,
    heavy_counts: bool = False,
    output: str | None = None,
    overwrite_output: bool = False,
) -> None:
    """Write a simulated feed in KuaiRand's format, and the true probability of every label.

    Args:
        place: Filled in by the command line.
        rows: Rows of the log, spread evenly over the days.
        users: Number of users.
        videos: Number of videos.
        days: Days of the log, at most 31.
        seed: Seed of the world and of the log.
        groups: Let interactions depend on other fields than watching does.
        heavy_counts: Add four raw heavy-tailed counts to each row.
        output: Folder that is written; the folder ``simulated`` of the run if null.
        overwrite_output: Replace the folder if it exists and holds an older output, nothing else.
    """
    folder = Path(output) if output else place.run_folder.path / "simulated"
    refuse_existing(folder, overwrite=overwrite_output)
    refuse_strangers(folder, (TRUTH, "data"))
    try:
        with working(f"simulating {rows:,} rows"):
            found = simulate_feed(
                rows, users, videos, days, seed, groups=groups, heavy_counts=heavy_counts
            )
    except ValueError as error:
        raise GatesError(str(error)) from error
    with working("writing files"), replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        export_kuairand(found, temporary)
        truth = pl.DataFrame(found.truth, schema=list(LABELS))
        truth.write_parquet(temporary / TRUTH)
    rates = dict(zip(LABELS, found.truth.mean(0), strict=True))
    print(f"{len(found.log):,} rows; mean true probabilities:")
    print("  " + "  ".join(f"{task} {rate:.3g}" for task, rate in rates.items()))
    print(folder)
