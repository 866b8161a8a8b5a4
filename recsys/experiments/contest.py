"""Which networks and baselines are compared, what each may choose, on which splits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from difflib import get_close_matches
from inspect import signature
from typing import Any, NamedTuple

from core_gates.errors import GatesError, check_at_least, check_option
from harness.evidence import Row
from recsys.baselines import KINDS
from recsys.data.datamodule import TableDataModule
from recsys.data.tables import table_digest
from recsys.experiments.from_settings import (
    BASELINE,
    INTERCEPTS,
    MODEL,
    baseline_of,
    check_axes,
    check_axis,
    class_of,
    data_of,
    mapping_in,
    module_of,
)
from recsys.experiments.predictions import (
    During,
    Each,
    Probabilities,
    contest_rows,
    oracle_of,
    slice_rows,
    slices_of,
)
from recsys.inputs import Batch
from recsys.models import num_weights, sized
from recsys.ranker import input_width
from recsys.schema import FeatureSchema

ENTRIES = ("net", "options", "settings", "sized", "start")
GROUPS = (MODEL, "data.", "trainer.")
Places = Mapping[str, str]
"""Where files are on this machine, by dotted name: no part of what decides a result."""

ARGUMENTS = "data.source.init_args."
SINGLE, TRIAL_SEEDS, START = "SingleTask", "trial_seeds", "start"
STARTED = ("Linear", "WideAndDeep")
OF_START = tuple(
    f"{MODEL}{name}"
    for name in ("learning_rate", "embedding_learning_rate", "embedding_l2", "weight_decay", "ema")
)


@dataclass(frozen=True)
class Contest:
    """Networks of one size on the same rows, tuned by equally many trials.

    Attributes:
        methods: Name of a network in the tables -> its ``net`` and ``options`` (see
            `recsys.models.build`), further ``settings`` that differ from those of the
            configuration by their dotted names, and ``sized: false`` to keep its width. With
            ``start``, rates and penalties by dotted name, a ``Linear`` with these is trained first,
            from which ``Linear`` or ``WideAndDeep`` starts. Without any, the network of the
            configuration alone takes part, named as the reference.
        reference: Method that all others are compared with, and whose size they have.
        space: What is tuned for every method, by dotted name: the ends of a box with logarithmic
            axes. What a method sets by itself is not tuned for it.
        trials: Trials of every method.
        configured_first: Whether the first trial has the values of the configuration, and that of a
            baseline those given next to its box.
        patience: Validations without improvement after which a training ends.
        trial_seeds: Training runs of a trial of a network, whose validation losses are averaged.
        baselines: Name in the tables -> ``kind`` and its options.

    Raises:
        ValueError: A number is too small, an entry or a setting is unknown, a box has no two ends,
            the reference is no method, or a baseline has no kind or the name of a method.
    """

    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    reference: str = "home"
    space: dict[str, list[float]] = field(default_factory=dict)
    trials: int = 5
    configured_first: bool = False
    patience: int = 2
    trial_seeds: int = 1
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check all entries."""
        check_at_least(1, trials=self.trials, patience=self.patience, trial_seeds=self.trial_seeds)
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
                if self.configured_first and option not in entry:
                    raise ValueError(
                        f"the baseline {name!r} has a box of {option} and no value to try first: "
                        f"give it {option}: NUMBER, or leave configured_first out"
                    )
        if self.methods and self.reference not in self.methods:
            raise ValueError(
                f"reference is {self.reference!r}; choose one of {', '.join(self.methods)}"
            )
        for name, entry in self.methods.items():
            if strangers := sorted(set(entry) - set(ENTRIES)):
                raise ValueError(
                    f"method {name!r} has {', '.join(strangers)}; known are {', '.join(ENTRIES)}"
                )
            for part in ("options", "settings", "start"):
                if not isinstance(entry.get(part, {}), Mapping):
                    raise ValueError(
                        f"{part} of method {name!r} are {entry[part]!r}, expected names with values"
                    )
            if START in entry:
                check_option(f"net of {name!r}, which has a start", entry.get("net", ""), STARTED)
            for setting in entry.get("settings", {}):
                _check_name(f"method {name!r} sets", setting)
            if wrong := sorted(set(entry.get(START, {})) - set(OF_START)):
                raise ValueError(
                    f"start of method {name!r} sets {wrong[0]}; known are {', '.join(OF_START)}"
                )

    def own_data(self, method: str) -> dict[str, Any]:
        """Return the settings of the data that a method has for itself, by dotted name."""
        entry_settings = self.entries[method].get("settings", {})
        return {name: value for name, value in entry_settings.items() if name.startswith("data.")}

    @property
    def entries(self) -> Mapping[str, dict[str, Any]]:
        """Options of the methods by name; the configured network alone if no methods are given."""
        return self.methods or {self.reference: {}}

    def boxes(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Return the box of every method that is tuned by itself."""
        boxes = {
            method: {
                n: (low, high) for n, (low, high) in self.space.items() if n not in entry_settings
            }
            for method in self.entries
            for entry_settings in [self.entries[method].get("settings", {})]
        }
        return {method: box for method, box in boxes.items() if box}

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
        entry_settings = entry.get("settings", {})
        replaced = (f"{MODEL}options", *(f"{name}." for name in entry_settings))
        gone = dict.fromkeys(n for n in common if n.startswith(replaced))
        made = {**gone, **entry_settings, "patience": self.patience}
        if START in entry:
            made[START] = {"model.net": "Linear", "model.options": {}, **entry[START]}
        if self.trial_seeds > 1:
            made[TRIAL_SEEDS] = self.trial_seeds
        net, options = self._net(method, common), self._options(method, common)
        if method != self.reference and entry.get("sized", True):
            of, first = reference or schema, self.reference
            first_options = self._options(first, common)
            target = num_weights(self._net(first, common), first_options, input_width(of), of.heads)
            options = sized(net, options, input_width(schema), schema.heads, target)
        return made | {"model.net": net, "model.options": options}

    def _options(self, method: str, common: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of a method; those of the configuration belong to its network."""
        same = self._net(method, common) == common.get("model.net")
        entry_options = self.entries[method].get("options", {})
        return {**(mapping_in(common, f"{MODEL}options") if same else {}), **entry_options}

    def _net(self, method: str, common: Mapping[str, Any]) -> str:
        """Return the network of a method, that of the configuration if it names none."""
        return str(self.entries[method].get("net", common.get(f"{MODEL}net")))


def _check_name(who: str, name: str) -> None:
    if not name.startswith(GROUPS) or name == "model.start":
        raise ValueError(f"{who} {name!r}, expected a name that begins with {' or '.join(GROUPS)}")


def _check_ends(name: str, ends: Any) -> None:
    pair = isinstance(ends, list | tuple) and len(ends) == 2
    if not pair or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in ends):
        raise ValueError(f"space of {name} is {ends!r}, expected two numbers, the ends of a box")


class Fold(NamedTuple):
    """One split of the data: the settings that differ, and a key for the names of its pieces."""

    settings: Mapping[str, Any] = {}
    keys: Mapping[str, int] = {}


class Splits:
    """A contest on splits of its data: rows, the settings of every method, tables of scores.

    Args:
        contest: Who takes part.
        settings: Of the configuration, by dotted name.
        folds: Splits whose test rows are pooled, see `folds_of`.
        places: Where files are, by dotted name of the setting.
        during: Shows that a long step is at work.
    """

    def __init__(
        self,
        contest: Contest,
        settings: Mapping[str, Any],
        folds: Sequence[Fold] = (Fold(),),
        *,
        places: Places | None = None,
        during: During = nullcontext,
    ) -> None:
        self.contest, self.settings = contest, settings
        self.folds, self.places = tuple(folds), dict(places or {})
        self._during = during
        self._known: dict[str, TableDataModule] = {}
        self._prepared: list[TableDataModule] = []

    def data_of(self, settings: Mapping[str, Any]) -> TableDataModule:
        """Return the data of a method or a fold, read once."""
        wanted = {**settings, **self.places}
        data_settings = {n: v for n, v in wanted.items() if n.startswith("data.") and v is not None}
        key = json.dumps(data_settings, sort_keys=True)
        if key not in self._known:
            self._known[key] = data_of(data_settings)
        return self._known[key]

    def data(self, fold: Fold) -> TableDataModule:
        """Return the data of a fold."""
        data = self.data_of({**self.settings, **fold.settings})
        if data not in self._prepared:
            with self._during("preparing rows"):
                data.transform  # noqa: B018  (reads and fits)
            self._prepared.append(data)
        return data

    def test(self) -> Batch:
        """Return the test rows of all folds; users whom two folds share have one number."""
        parts = [self.data(fold).batch("test") for fold in self.folds]
        worlds = [f"{ARGUMENTS}{name}" for name in getattr(class_of(self.settings), "OF_WORLD", ())]
        changed = {name for fold in self.folds for name in fold.settings}
        if not self.data(self.folds[0]).schema.user or not changed.isdisjoint(worlds):
            first = 0
            for number, part in enumerate(parts):  # a number means another user in each fold
                users, index = part.user.unique(return_inverse=True)
                parts[number] = part.replace(user=index + first)
                first += len(users)
        return Batch.cat(parts)

    def tasks(self) -> tuple[str, ...]:
        """Return the names of the tasks."""
        return self.data(self.folds[0]).schema.task_names

    def oracle(self) -> dict[str, list[Probabilities]]:
        """Return the true probabilities (N, T) of all test rows, where they are known."""
        return oracle_of([self.data(fold).table("test") for fold in self.folds], self.tasks())

    def own(self, fold: Fold) -> dict[str, dict[str, Any]]:
        """Return the settings of every network on a fold; sizes are those for its own columns."""
        schemas = {method: self._schema(method, fold) for method in self.contest.entries}
        common, first = self.settings, schemas[self.contest.reference]
        return {
            method: {**self.contest.settings(method, common, schema, first), **fold.settings}
            for method, schema in schemas.items()
        }

    def own_of_all(self) -> dict[str, dict[str, Any]]:
        """Return the settings of every network and baseline on the first fold."""
        first = self.folds[0]
        baselines = {
            name: {**self.baseline(name)[0], **first.settings} for name in self.contest.baselines
        }
        return self.own(first) | baselines

    def baseline(self, name: str) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
        """Return the settings of a baseline, and the box in which it is tuned, if any."""
        options = dict(self.contest.baselines[name])
        box = options.pop("space", {})
        model = {n: None for n in self.settings if n.startswith(("model.", "trainer."))}
        model.pop(INTERCEPTS, None)
        model |= dict.fromkeys(("checkpoint.monitor", "checkpoint.mode"))
        named = {f"{BASELINE}{option}": value for option, value in options.items()}
        return {**model, **named}, {f"{BASELINE}{n}": (lo, hi) for n, (lo, hi) in box.items()}

    def check(self) -> None:
        """Refuse settings that do not exist before anything is trained.

        Raises:
            GatesError: A network or a baseline has one.
        """
        first, boxes = self.folds[0], self.contest.boxes()
        check_axes(self.contest.space, self.settings)
        if self.settings.get("trainer.max_epochs") == 0:
            raise GatesError("trainer.max_epochs is 0, which trains nothing: give 1 or more")
        for name, method_settings in self.own(first).items():
            ends = {axis: low for axis, (low, _) in boxes.get(name, {}).items()}
            given = {**self.settings, **method_settings, **ends}
            for start in (dict[str, Any](), method_settings.get(START, {})):
                some = {n: v for n, v in {**given, **start}.items() if v is not None}
                _named(name, module_of, some)
        for name in self.contest.baselines:
            options, box = self.baseline(name)
            for axis in box:
                kind, argument = options[f"{BASELINE}kind"], axis.removeprefix(BASELINE)
                check_axis(f"space of the baseline {name!r}", argument, KINDS[kind], argument)
            ends = {axis: low for axis, (low, _) in box.items()}
            _named(name, baseline_of, {**options, **ends}, self.data(first).transform)

    def refuse_equal_folds(self) -> None:
        """Refuse folds that a setting does not move.

        Raises:
            GatesError: Two have the same test rows.
        """
        fold_of_digest: dict[str, Fold] = {}
        for fold in self.folds if len(self.folds) > 1 else ():
            other = fold_of_digest.setdefault(table_digest(self.data(fold).table("test")), fold)
            if other is not fold:
                raise GatesError(
                    f"--folds {other.keys['f']} and {fold.keys['f']} have the same test rows: "
                    "give a --fold_setting that moves them"
                )

    def rows(
        self,
        found: Mapping[str, list[Probabilities]],
        *,
        exact_auc: bool = False,
        each: Each = lambda _, items: items,
    ) -> list[Row]:
        """Return the rows of all methods: summed log-loss with differences, then every task.

        Args:
            found: Method -> predictions (N, T) of all test rows, one for each seed.
            exact_auc: Whether AUC gets intervals and differences, which cost rows × resamples.
            each: Shows which method or task is at work.
        """
        singles = [m for m, entry in self.contest.entries.items() if entry.get("net") == SINGLE]
        return contest_rows(
            self.test(),
            self.data(self.folds[0]).schema,
            found,
            reference=self._reference(found),
            single=next(iter(singles), ""),
            exact_auc=exact_auc,
            during=self._during,
            each=each,
        )

    def slices(self, found: Mapping[str, list[Probabilities]], random: str = "") -> list[Row]:
        """Return the rows of all methods on parts of the test rows: new users, new items, ….

        Args:
            found: Method -> predictions (N, T) of all test rows, one for each seed.
            random: Column of rows whose item was drawn at random; none if it is absent.
        """
        parts = slices_of([self.data(fold).tables for fold in self.folds], random=random)
        return slice_rows(self.test(), parts, found, reference=self._reference(found))

    def _reference(self, methods: Mapping[str, object]) -> str | None:
        """Return the reference, if it is among what was found."""
        return self.contest.reference if self.contest.reference in methods else None

    def _schema(self, method: str, fold: Fold) -> FeatureSchema:
        """Return the schema of the data of a network, which may differ from the others'."""
        if own_data := self.contest.own_data(method):
            return self.data_of({**self.settings, **own_data, **fold.settings}).schema
        return self.data(fold).schema


def folds_of(setting: str, values: Sequence[int], settings: Mapping[str, Any]) -> tuple[Fold, ...]:
    """Return folds that differ in one setting; the data of the configuration without values.

    Args:
        setting: Dotted name of a setting of the data.
        values: Its values.
        settings: Those of the configuration.

    Raises:
        GatesError: There is no such setting of the data.
    """
    if not values:
        return (Fold(),)
    named = settings.get("data.source.class_path")
    arguments = signature(class_of(settings)).parameters if named else {}
    given = [n for n in settings if n.startswith("data.")]  # set so far, or by the signature
    choices = list(dict.fromkeys([*given, *(f"{ARGUMENTS}{n}" for n in arguments)]))
    if setting not in choices:
        close = get_close_matches(setting, choices, n=1)
        hint = f" (did you mean {close[0]}?)" if close else f"; known are {', '.join(choices)}"
        raise GatesError(f"--fold_setting {setting!r} is no setting of the data{hint}")
    return tuple(Fold({setting: value}, {"f": value}) for value in dict.fromkeys(values))


def _named(name: str, make: Callable[..., object], *given: Any) -> None:
    """Make something, whose errors name the method."""
    try:
        make(*given)
    except GatesError as error:
        raise GatesError(f"{name}: {error}") from error
