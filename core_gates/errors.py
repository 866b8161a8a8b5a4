"""Errors that a user can fix: one line with what was found, what was expected, what to do."""

from collections.abc import Iterable


class GatesError(Exception):
    """An expected failure; commands print it as one line and exit with code 2."""


class MissingExtraError(GatesError):
    """A package of an optional extra is not installed.

    Args:
        app: Name of the application, also the name of its extra.
        package: The distribution that is missing.
    """

    def __init__(self, app: str, package: str) -> None:
        super().__init__(f"{app} needs {package}: pip install '.[{app}]'")


def check_option(
    name: str, found: object, known: Iterable[str], error: type[Exception] = ValueError
) -> None:
    """Refuse a value of an option that is none of those known.

    Args:
        name: Name of the option.
        found: The value given.
        known: The values that it may have.
        error: What is raised; :class:`GatesError` outside of constructors.

    Raises:
        ValueError: ``found`` is none of ``known``.
    """
    if found not in (options := tuple(known)):
        raise error(f"{name} is {found!r}; choose one of {', '.join(options)}")
