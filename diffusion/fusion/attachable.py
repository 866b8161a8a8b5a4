"""What can be attached to a model and detached from it, as a context manager."""

from types import TracebackType
from typing import Self


class Attachable:
    """In force within a ``with`` block, and gone after it, whatever happened in it."""

    def attach(self) -> Self:
        """Put it in force."""
        raise NotImplementedError

    def detach(self) -> None:
        """Leave the model as it was."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Attach."""
        return self.attach()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Detach."""
        self.detach()
