"""Which networks and baselines are compared, and what each may choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core_gates.errors import GatesError, check_at_least, check_option
from recsys.baselines import KINDS
from recsys.experiments.mappings import mapping_in
from recsys.models.sizing import num_weights, sized
from recsys.ranker import input_width
from recsys.schema import FeatureSchema

MODEL = "model."
ENTRIES = ("net", "options", "settings", "sized")
GROUPS = (MODEL, "data.", "trainer.")


@dataclass(frozen=True)
class Contest:
    """Networks of one size on the same rows, tuned by equally many trials.

    Attributes:
        methods: Name of a network in the tables -> its ``net`` and ``options`` (see
            :func:`recsys.models.build`), further ``settings`` that differ from those of the
            configuration by their dotted names, and ``sized: false`` to keep its width. Without
            any, the network of the configuration alone takes part, named as the reference.
        reference: Method that all others are compared with, and whose size they have.
        space: What is tuned for every method, by dotted name: the ends of a box with logarithmic
            axes.
        trials: Trials of every method.
        patience: Validations without improvement after which a training ends.
        baselines: Name in the tables -> ``kind`` and its options.

    Raises:
        ValueError: A number is too small, an entry or a setting is unknown, a box has no two ends,
            the reference is no method, or a baseline has no kind or the name of a method.
    """

    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    reference: str = "home"
    space: dict[str, list[float]] = field(default_factory=dict)
    trials: int = 5
    patience: int = 2
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check all entries."""
        check_at_least(1, trials=self.trials, patience=self.patience)
        for name, ends in self.space.items():
            _check_name("space has", name)
            _check_ends(name, ends)
        for name, entry in self.baselines.items():
            if name in self.methods:
                raise ValueError(f"{name!r} is a method and a baseline: rename one of them")
            check_option(f"kind of the baseline {name!r}", entry.get("kind", ""), KINDS)
            if not isinstance(box := entry.get("space", {}), Mapping):
                raise ValueError(
                    f"space of the baseline {name!r} is {box!r}, expected names with two numbers "
                    "each, the ends of a box"
                )
            for option, ends in box.items():
                _check_ends(f"{option} of the baseline {name!r}", ends)
        if self.methods and self.reference not in self.methods:
            raise ValueError(
                f"reference is {self.reference!r}; choose one of {', '.join(self.methods)}"
            )
        for name, entry in self.methods.items():
            if strangers := sorted(set(entry) - set(ENTRIES)):
                raise ValueError(
                    f"method {name!r} has {', '.join(strangers)}; known are {', '.join(ENTRIES)}"
                )
            for part in ("options", "settings"):
                if not isinstance(entry.get(part, {}), Mapping):
                    raise ValueError(
                        f"{part} of method {name!r} are {entry[part]!r}, expected names with values"
                    )
            for setting in entry.get("settings", {}):
                _check_name(f"method {name!r} sets", setting)

    def own_data(self, method: str) -> dict[str, Any]:
        """Return the settings of the data that a method has for itself, by dotted name."""
        own = self.entries[method].get("settings", {})
        return {name: value for name, value in own.items() if name.startswith("data.")}

    @property
    def entries(self) -> Mapping[str, dict[str, Any]]:
        """Return the methods, or the network of the configuration under the reference's name."""
        return self.methods or {self.reference: {}}

    def boxes(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Return the box of every method that is tuned by itself."""
        box = {name: (low, high) for name, (low, high) in self.space.items()}
        return dict.fromkeys(self.entries, box) if box else {}

    def settings(
        self,
        method: str,
        common: Mapping[str, Any],
        schema: FeatureSchema,
        reference: FeatureSchema | None = None,
    ) -> dict[str, Any]:
        """Return the settings of a method that differ from those of the configuration.

        Args:
            method: Name of the method.
            common: Settings of the configuration, by dotted name.
            schema: Of the data of the method.
            reference: Of the data of the reference; None where it is the same.

        Raises:
            GatesError: The method, its network or an option is unknown, or it cannot have the size
                of the reference.
        """
        if method not in self.entries:
            raise GatesError(f"there is no method {method!r}; known are {', '.join(self.entries)}")
        entry = self.entries[method]
        own = entry.get("settings", {})
        replaced = (f"{MODEL}options", *(f"{name}." for name in own))
        gone = dict.fromkeys(n for n in common if n.startswith(replaced))
        made = {**gone, **own, "patience": self.patience}
        net, options = self._net(method, common), self._options(method, common)
        if method != self.reference and entry.get("sized", True):
            target = self._target(common, reference or schema)
            options = sized(net, options, input_width(schema), schema.tasks, target)
        return made | {"model.net": net, "model.options": options}

    def _target(self, common: Mapping[str, Any], schema: FeatureSchema) -> int:
        """Return the number of weights of the reference."""
        first = self._net(self.reference, common), self._options(self.reference, common)
        return num_weights(*first, input_width(schema), schema.tasks)

    def _options(self, method: str, common: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of a method; those of the configuration belong to its network."""
        same = self._net(method, common) == common.get("model.net")
        own = self.entries[method].get("options", {})
        return {**(mapping_in(common, f"{MODEL}options") if same else {}), **own}

    def _net(self, method: str, common: Mapping[str, Any]) -> str:
        """Return the network of a method, that of the configuration if it names none."""
        return str(self.entries[method].get("net", common.get(f"{MODEL}net")))


def _check_name(who: str, name: str) -> None:
    if not name.startswith(GROUPS):
        raise ValueError(f"{who} {name!r}, expected a name that begins with {' or '.join(GROUPS)}")


def _check_ends(name: str, ends: Any) -> None:
    pair = isinstance(ends, list | tuple) and len(ends) == 2
    if not pair or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in ends):
        raise ValueError(f"space of {name} is {ends!r}, expected two numbers, the ends of a box")
