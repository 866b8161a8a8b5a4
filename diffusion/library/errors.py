"""Reasons why a library refuses a request."""

from core_gates.errors import GatesError


class LibraryError(GatesError):
    """A library, its index or a search is not as expected."""
