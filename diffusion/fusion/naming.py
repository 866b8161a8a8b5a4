"""Adapters by name, whether they come in a mapping or in a list."""

from collections.abc import Mapping, Sequence

from core_gates.errors import GatesError
from diffusion.lora_file import LoraBundle
from diffusion.lora_file.inspection import describe

Adapters = Mapping[str, LoraBundle] | Sequence[LoraBundle]
"""Name -> adapter, or adapters that are named by their files."""


def by_name(adapters: Adapters) -> dict[str, LoraBundle]:
    """Return adapters by name, in the order that they are given in.

    An adapter of a list is called like its file, without the suffix; one that was not read from a
    file like its title, else ``adapter``. A name that is taken is numbered: ``style``, ``style-2``.

    Args:
        adapters: A mapping is copied as it is.

    Raises:
        GatesError: Something else than an adapter is given, such as the path of its file, or one
            adapter twice.
    """
    if isinstance(adapters, LoraBundle | str):
        raise GatesError(f"{_seen(adapters)} is given, expected a list or a mapping of adapters")
    if isinstance(adapters, Mapping):
        given = dict(adapters)
    else:
        bundles = list(adapters)
        if len({id(one) for one in bundles}) < len(bundles):
            raise GatesError(
                "an adapter is given twice: give it once, and weigh it by its strength"
            )
        given = {}
        for one in bundles:
            given[_free(_called(one), given)] = one
    for name, one in given.items():
        if not isinstance(one, LoraBundle):
            raise GatesError(f"adapter {name!r} is {_seen(one)}: read its file by load_lora first")
    return given


def _called(one: object) -> str:
    title = describe(one.metadata).title if isinstance(one, LoraBundle) and not one.name else ""
    return getattr(one, "name", "") or title or "adapter"


def _free(name: str, taken: Mapping[str, LoraBundle]) -> str:
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found


def _seen(given: object) -> str:
    return repr(given) if isinstance(given, str) else f"a {type(given).__name__}"
