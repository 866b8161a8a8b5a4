"""What every study of ``gates diffusion evaluate`` is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from harness.experiment import Run


class Asked(NamedTuple):
    """Options of ``evaluate``.

    Attributes:
        run: In the run folder of the configuration.
        seeds: Of what is trained for the study.
        vectors: Folder of golden vectors; None for that of the configuration.
    """

    run: Run
    seeds: tuple[int, ...] = (0, 1, 2)
    vectors: Path | None = None
