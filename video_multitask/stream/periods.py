"""Which days train, validate and test."""

from __future__ import annotations

from typing import NamedTuple

from core_gates.errors import GatesError, check_at_least
from video_multitask.stream.shards import Shards


class Period(NamedTuple):
    """Days of a log.

    Attributes:
        first: First date, such as 20220408.
        last: Last date.
        random: Rows of random or of recommended videos alone; both if None.
    """

    first: int
    last: int
    random: bool | None = None

    def of(self, shards: Shards) -> Shards:
        """Return the shards of these days.

        Raises:
            GatesError: There are none.
        """
        return shards.select(self.first, self.last, self.random)


class Periods(NamedTuple):
    """Days for training, validation and test."""

    train: Period
    validation: Period
    test: Period


def last_days(
    shards: Shards, validation: int = 2, test: int = 2, random: bool | None = None
) -> Periods:
    """Return periods that validate and test on the last days.

    Args:
        shards: Of the whole log.
        validation: Days for validation.
        test: Days for the test, after those for validation.
        random: Rows of random or of recommended videos alone; both if None.

    Raises:
        GatesError: No day is left for training.
        ValueError: A number is below 1.
    """
    check_at_least(1, validation=validation, test=test)
    days = sorted({file.date for file in shards.files})
    if len(days) <= validation + test:
        raise GatesError(
            f"{shards.folder} has {len(days)} days, of which {validation + test} validate and "
            "test; none is left for training"
        )
    train, rest = days[: -validation - test], days[-validation - test :]
    return Periods(
        Period(train[0], train[-1], random),
        Period(rest[0], rest[validation - 1], random),
        Period(rest[validation], rest[-1], random),
    )
