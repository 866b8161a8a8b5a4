"""What can be tuned: numbers with fractions, each between two ends of a box."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import lightning as L

from core_gates.errors import GatesError
from recsys.data.datamodule import TableDataModule
from recsys.experiments.building import class_of
from recsys.experiments.contest import MODEL
from recsys.module import MultiTaskModule

FRACTION = re.compile(r"\bfloat\b")
OWNERS: tuple[tuple[str, Callable[..., Any]], ...] = (
    (MODEL, MultiTaskModule),
    ("data.", TableDataModule),
    ("trainer.", L.Trainer),
)


def check_axes(axes: Mapping[str, object], settings: Mapping[str, Any]) -> None:
    """Refuse to tune settings that cannot take whatever number lies in a box.

    Args:
        axes: Dotted names, with ends.
        settings: Of the configuration, which name the source of the data.

    Raises:
        GatesError: A name is that of a whole number, of a word, of an option of the network, which
            every method has for itself, or of nothing.
    """
    for name in axes:
        if name.startswith(f"{MODEL}options."):
            raise GatesError(
                f"contest.space names {name}, but every method has its own options: tune "
                "settings of the model, such as model.learning_rate"
            )
        prefix, owner = _owner(name, settings)
        check_axis("contest.space", name, owner, name.removeprefix(prefix))


def check_axis(who: str, name: str, owner: Callable[..., Any], argument: str) -> None:
    """Refuse to tune an argument that is no number with fractions.

    Args:
        who: Part of the configuration that names it.
        name: Its name there.
        owner: What takes the argument.
        argument: Its name in the signature.

    Raises:
        GatesError: There is no such argument, or it is a whole number or a word.
    """
    known = signature(owner).parameters
    if argument not in known:
        numbers = [n for n, one in known.items() if FRACTION.search(str(one.annotation))]
        raise GatesError(
            f"{who} names {name}, which does not exist; what can be tuned there: "
            f"{', '.join(numbers) or 'nothing'}"
        )
    if not FRACTION.search(str(known[argument].annotation)):
        raise GatesError(
            f"{who} names {name}, which takes no numbers with fractions, but a box is full of "
            "them: give it one value"
        )


def _owner(name: str, settings: Mapping[str, Any]) -> tuple[str, Callable[..., Any]]:
    source = "data.source.init_args."
    if name.startswith(source):
        return source, class_of(settings)
    return next((prefix, owner) for prefix, owner in OWNERS if name.startswith(prefix))
