"""A simulated log with its tables and true probabilities, in memory."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from video_multitask.simulator.settings import WorldSettings
from video_multitask.simulator.side_tables import user_table, video_table
from video_multitask.simulator.world import Policy, World


class Simulated(NamedTuple):
    """A log and what belongs to it.

    Attributes:
        log: Rows in time order: KuaiRand's 19 columns and those of :func:`.columns.log_columns`.
        users: KuaiRand's user table (31 columns).
        videos: KuaiRand's table of basic video features (12 columns).
        truth: True probabilities (n, 14), in the order of
            :func:`video_multitask.tasks.simulated_tasks`.
        world: What they were drawn from; ``world.oracle`` knows the probabilities of other rows.
    """

    log: pl.DataFrame
    users: pl.DataFrame
    videos: pl.DataFrame
    truth: NDArray[np.float32]
    world: World


def simulate(
    rows: int = 200_000,
    users: int = 2_000,
    videos: int = 4_000,
    days: int = 14,
    seed: int = 0,
    *,
    draw: int = 0,
    policy: Policy = "logged",
    groups: bool = False,
    heavy_counts: bool = False,
) -> Simulated:
    """Simulate a feed; the same arguments give the same bytes.

    Logs that need not be in memory come from :meth:`.World.stream`.

    Args:
        rows: Rows of the log, spread evenly over the days.
        users: Number of users.
        videos: Number of videos.
        days: Days of the log, from 8 April 2022.
        seed: Of users, videos and tastes.
        draw: Number of the log among those of the same world.
        policy: What chooses the videos: ``logged`` or ``uniform``, over the same candidates.
        groups: Let interactions depend on other factors and fields than watching does.
        heavy_counts: Add four raw heavy-tailed counts, for the stress setting.

    Raises:
        GatesError: The policy is unknown.
        ValueError: A number is too small.
    """
    world = World(WorldSettings(users, videos, days, seed, groups, heavy_counts))
    chunks = list(world.stream(rows, draw=draw, policy=policy))
    return Simulated(
        log=pl.concat([chunk.log for chunk in chunks], rechunk=True),
        users=user_table(world.hidden, np.random.default_rng([seed, 4])),
        videos=video_table(world.hidden, np.random.default_rng([seed, 5])),
        truth=np.concatenate([chunk.truth for chunk in chunks]),
        world=world,
    )
