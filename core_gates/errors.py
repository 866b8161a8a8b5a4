"""Errors that a user can mend: one line that says what was found, what was expected, what to do."""


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
