"""How long work reports its progress, without knowledge of terminals."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Tick = Callable[[], None]
"""Called after each piece of long work."""

Progress = Callable[[str, int], AbstractContextManager[Tick]]
"""Called with what is done and the number of ticks that there will be."""


Say = Callable[[str], None]
"""Called with a line for the user."""


def no_tick() -> None:
    """Report nothing."""


def unsaid(line: str) -> None:
    """Keep a line from the user."""


@contextmanager
def silent(label: str, total: int) -> Iterator[Tick]:  # noqa: ARG001
    """Progress that is not shown."""
    yield no_tick
