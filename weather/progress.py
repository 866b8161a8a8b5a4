"""How long work tells its progress and is shared out, without knowing of terminals or processes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

Tick = Callable[[], None]
"""Called after each piece of a long work."""

Progress = Callable[[str, int], AbstractContextManager[Tick]]
"""Called with what is done and the number of ticks that there will be."""

Each = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]], Tick], list[Any]]
"""Returns ``work(*one, tick=tick)`` for each of some arguments, in their order."""


def no_tick() -> None:
    """Tell nobody."""


@contextmanager
def silent(label: str, total: int) -> Iterator[Tick]:  # noqa: ARG001
    """Progress that nobody sees."""
    yield no_tick


def in_turn(
    work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], tick: Tick
) -> list[Any]:
    """Do one piece of work after the other in this process."""
    return [work(*one, tick=tick) for one in arguments]
