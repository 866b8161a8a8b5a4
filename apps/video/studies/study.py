"""What ``evaluate`` can do other than compare networks on one split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from harness.experiment import Run
from recsys.experiments.contest import Contest


class Study(ABC):
    """A question with its own pieces, rows and bars; named by its class in a configuration."""

    @abstractmethod
    def finish(
        self, run: Run, contest: Contest, seeds: Sequence[int], places: Mapping[str, str]
    ) -> None:
        """Make what is missing, and write ``scores.json``.

        Args:
            run: Keeps pieces and scores.
            contest: Networks of the configuration.
            seeds: Of every network.
            places: Where files are, by dotted name of the setting.
        """
