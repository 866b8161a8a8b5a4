"""The refusal of unknown options."""


def check_option(name: str, found: str, known: tuple[str, ...]) -> None:
    """Refuse an option that is not known.

    Raises:
        ValueError: ``found`` is not one of ``known``.
    """
    if found not in known:
        raise ValueError(f"{name} is {found!r}; choose one of {', '.join(known)}")
