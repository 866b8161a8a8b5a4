"""A first schema of any table, with the reason for every column."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from core_gates.errors import GatesError
from recsys.columns.canonical import (
    EVENTS,
    UNREADABLE,
    canonical,
    holds_times,
    kind_of,
    numbers_of,
    part_of,
    split_events,
)
from recsys.columns.column_auc import STRONG, SUSPICIOUS, column_aucs
from recsys.schema import (
    Dense,
    FeatureSchema,
    History,
    Labels,
    Part,
    Product,
    Side,
    Sparse,
    Task,
    tasks_of,
)
from recsys.transform.targets import read_targets

MOST_ROWS = 200_000  # that are looked at
FEW = 50  # values of a number that is taken as a category
MANY = 1000  # values from which rare ones become unknown
LONGEST = 50  # events of a history
LARGEST = 1e150  # number whose square is in the range of floats
SPREAD = 10.0  # standard deviations from the mean, from which a tail is heavy
REPEATED = 5  # rows per whole number, from which it may be an identifier
SPARSEST = 2.0  # rows of the log for each training row, up to which its row numbers are known
LISTS = ("of", "left", "right")  # fields of crosses and products
ROWS_PER_KEY = 1.5  # of a user, from which it can be seen what is a property of the user

_ID = re.compile(
    r"(^|_)(id|ids|uid|code|key|cat|category|class|type|kind|tag|brand|zip|zipcode|postcode|region"
    r"|country|city|device|author|genre|hash)(\d*)(_|$)|(?<=[a-z])I[Dd]$",
    re.IGNORECASE,
)
_COMMA = r"^[-+]?\d{1,3}([. ]?\d{3})*,\d+$"  # a number with a decimal comma
_VARIED: Mapping[Part, int] = {"hour": 2, "weekday": 7}  # values, from which a part is a feature


class Note(NamedTuple):
    """Why a column became what it is.

    Attributes:
        column: The column.
        decision: ``sparse``, ``dense``, ``history``, ``product``, ``left out`` or ``key``.
        reason: Why.
    """

    column: str
    decision: str
    reason: str

    def __str__(self) -> str:
        return f"{self.column}: {self.decision}, {self.reason}"


class InferredSchema(NamedTuple):
    """A drafted schema.

    Attributes:
        schema: Ready to be used, or to be edited.
        notes: One for each column, in the order of the table, then for each product.
    """

    schema: FeatureSchema
    notes: tuple[Note, ...]


def infer_schema(
    table: pl.DataFrame,
    labels: Labels,
    *,
    user: str = "",
    item: str = "",
    time: str = "",
    weight: str = "",
    drop: Iterable[str] = (),
    dim: int = 8,
) -> InferredSchema:
    """Draft the schema of a table of training rows.

    Text, few-valued numbers and whole numbers that are named like an identifier become sparse
    features, other numbers dense ones, lists the history of the sparse feature whose values they
    hold; dates, and whole numbers that are times, become their hour and, of seven days at least,
    their weekday. Where user and item are named, the product of what describes users and what
    describes items is an input, too. Left out are constant columns, numbers of rows, text that is
    different in nearly every row, and columns that are or predict a label: by AUC above 0.95 alone.

    Args:
        table: Training rows; a part of many.
        labels: Columns with 0 and 1, or tasks; one of numbers is a regression, see `stated_tasks`.
        user: Column of the user, also a feature.
        item: Column of what is ranked, also a feature.
        time: Column that orders the rows; of times its hour and weekday are features.
        weight: Column of sample weights, no feature.
        drop: Columns that must not be features.
        dim: Features of an embedding.

    Raises:
        GatesError: A column that is named is absent, one has numbers with decimal commas, no
            feature is left, or one is called like the indicator of another.
        RowError: A label is neither 0 nor 1.
    """
    tasks = stated_tasks(labels, table)
    bare = FeatureSchema(tasks=tasks, user=user, item=item, time=time, weight=weight, dim=dim)
    named = [*bare.labels, *bare.keys, *drop]
    _check_named(table, named)
    draft = _Draft(table, bare, set(drop))
    features = draft.features()
    if not features:
        raise GatesError(
            "no column is left that could be a feature: "
            + "; ".join(map(str, draft.notes.values()))[:300]
        )
    try:
        schema = dataclasses.replace(
            bare,
            sparse=tuple(f for f in features if isinstance(f, Sparse)),
            dense=tuple(f for f in features if isinstance(f, Dense)),
            sequences=tuple(f for f in features if isinstance(f, History)),
            products=_products(bare, features),
        )
    except ValueError as error:
        raise GatesError(str(error)) from error
    notes = [draft.notes[n] for n in draft.table.columns if n in draft.notes]
    why = "how well a user and an item fit, as in a factorization machine"
    notes += [Note(product.name, "product", why) for product in schema.products]
    return InferredSchema(schema, tuple(notes))


def _products(
    schema: FeatureSchema, features: Sequence[Sparse | Dense | History]
) -> tuple[Product, ...]:
    """Return the product of the sparse features of users and of items, where both are named."""
    sparse = [f for f in features if isinstance(f, Sparse)]
    user, item = (tuple(f.name for f in sparse if f.side == side) for side in ("user", "item"))
    return (Product(user, item),) if schema.user and schema.item and user and item else ()


def stated_tasks(labels: Labels, table: pl.DataFrame) -> tuple[Task, ...]:
    """Return tasks, those whose labels are numbers as regressions.

    Numbers are more than two values that are more than a category has, not whole, or never 0; a
    single 2 among 0 and 1 is none, and refused where labels are read.

    Raises:
        GatesError: All labels are numbers.
    """
    tasks = []
    for task in tasks_of(labels):
        column = table.get_column(task.column, default=pl.Series()).drop_nulls()
        column = column.drop_nans() if column.dtype.is_float() else column
        number = (
            column.dtype.is_numeric()
            and (count := column.n_unique()) > 2
            and (count > FEW or bool((column != 0).all() or (column % 1 != 0).any()))
        )
        tasks.append(dataclasses.replace(task, kind="regression") if number else task)
    if tasks and all(task.kind == "regression" for task in tasks):
        raise GatesError(
            f"all labels are numbers, as {tasks[0].column!r}: name one with 0 and 1, too, or state "
            "tasks that are thresholds of a number in a schema"
        )
    return tuple(tasks)


def _check_named(table: pl.DataFrame, named: Sequence[str]) -> None:
    if lacking := [name for name in named if name not in table.columns]:
        raise GatesError(
            f"the table lacks {', '.join(map(repr, lacking))}; it has "
            f"{', '.join(table.columns[:12])}{' …' if len(table.columns) > 12 else ''}"
        )
    if not len(table):
        raise GatesError("the table has no rows a schema could be drafted from")


class _Draft:
    """Decides on one column after another, and notes why."""

    def __init__(self, table: pl.DataFrame, schema: FeatureSchema, drop: set[str]) -> None:
        self.schema, self.drop = schema, drop
        self.targets, self.count = read_targets(table, schema), len(table)
        every = -(-len(table) // MOST_ROWS)
        self.rows = np.arange(0, len(table), every)
        some = table if every == 1 else table[self.rows]
        self.table = some.with_columns(c.cast(pl.Float64) for c in some if c.dtype.is_decimal())
        self.notes: dict[str, Note] = {}
        self.whole = {"user": schema.user, "item": schema.item}
        others = {*schema.labels, schema.user, schema.item, *drop}
        self.times = {
            c.name: self._parts(c)
            for c in self.table
            if not (c.name in others or (c.dtype.is_numeric() and _ID.search(c.name)))
            and holds_times(c)
        }
        derived = list(chain(*self.times.values()))
        if clash := [feature for feature in derived if feature.name in self.table.columns]:
            raise GatesError(
                f"the column {clash[0].name!r} is called like the {clash[0].part} of"
                f" {clash[0].column!r}, which is drafted: rename the column, or leave out"
                f" {clash[0].column!r} by --table.drop"
            )
        self.table = self.table.with_columns(
            part_of(self.table[feature.column], feature.part).alias(feature.name)
            for feature in derived
        )

    def _parts(self, column: pl.Series) -> list[Sparse]:
        """Return hour and weekday of times, where they vary."""
        name, side = column.name, self._side(column.name)
        return [
            Sparse(f"{part} of {name}", side=side, column=name, part=part)
            for part, fewest in _VARIED.items()
            if part_of(column, part).drop_nulls().n_unique() >= fewest
        ]

    def features(self) -> list[Sparse | Dense | History]:
        """Return the features, in the order of the table; histories last."""
        features: list[Sparse | Dense | History] = []
        lists, texts = [], []
        for column in self.table:
            if column.name in self.schema.labels or self._is_key(column.name):
                continue
            if isinstance(column.dtype, pl.List | pl.Array):
                lists.append(column)
                continue
            _refuse_commas(column)
            if column.dtype == pl.String and column.str.contains(EVENTS, literal=True).any():
                texts.append(column)
                continue
            feature = self._flat(column)
            if feature is not None:
                features.append(feature)
        sparse = [feature for feature in features if isinstance(feature, Sparse)]
        for column in texts:
            if (history := self._history(split_events(column), sparse)) is not None:
                features.append(history)
            elif (feature := self._flat(column)) is not None:
                features.append(feature)
        features += [h for column in lists if (h := self._history(column, sparse)) is not None]
        order = {name: place for place, name in enumerate(self.table.columns)}
        return sorted(features, key=lambda f: (isinstance(f, History), order[f.name]))

    def _is_key(self, name: str) -> bool:
        if name in self.drop:
            self._leave_out(name, "as told")
        elif name in (self.schema.time, self.schema.weight):
            what = "it orders the rows" if name == self.schema.time else "it weighs the rows"
            self.notes[name] = Note(name, "key", what)
        else:
            return False
        return True

    def _leave_out(self, name: str, reason: str) -> None:
        self.notes[name] = Note(name, "left out", reason)

    def _flat(self, column: pl.Series) -> Sparse | Dense | None:
        """Return the feature of a column without lists; None if it is left out."""
        name, reason = column.name, self._useless(column)
        if reason := reason or self._equals_label(column):
            self._leave_out(name, reason)
            return None
        feature, why = self._drafted(column)
        task, area = self._strongest(column)
        if area > SUSPICIOUS:
            part = "sparse" if isinstance(feature, Sparse) else "dense"
            self._leave_out(
                name,
                f"it predicts the label {task!r} alone, with AUC {area:.3f}; if it is known "
                f"before, put it back: add {_changed(feature)} to `{part}` of the schema",
            )
            return None
        if area > STRONG:
            why += f"; AUC {area:.2f} alone for {task!r}: is it known before?"
        self.notes[name] = Note(name, "sparse" if isinstance(feature, Sparse) else "dense", why)
        return feature

    def _drafted(self, column: pl.Series) -> tuple[Sparse | Dense, str]:
        """Return the feature that a column may be, and why."""
        name, distinct = column.name, column.n_unique()
        if made := [part for part in chain(*self.times.values()) if part.name == name]:
            return made[0], f"{distinct} values, in UTC, side {made[0].side}"
        side = self._side(name)
        if why := self._as_category(column, distinct):
            min_count = 2 if distinct > MANY else 1
            rare = ", rare ones unknown" if min_count > 1 else ""
            return Sparse(name, side=side, min_count=min_count), f"{why}{rare}, side {side}"
        heavy = _heavy_tailed(column)
        why = f"{distinct} numbers{', heavy-tailed' if heavy else ''}, side {side}"
        if not heavy and column.dtype.is_integer() and distinct * REPEATED <= len(column):
            why += "; each occurs often: an identifier should be named as item, or be sparse"
        return Dense(name, "log_standardize" if heavy else "standardize", side=side), why

    def _as_category(self, column: pl.Series, distinct: int) -> str:
        """Return why a column is a category; empty if it is a number."""
        dtype, values = column.dtype, f"{distinct} values"
        for side, key in self.whole.items():
            if column.name == key:
                return f"{values} of the {side}{_negative_ids(column)}"
        if dtype == pl.Boolean or not dtype.is_numeric():
            return values
        whole = canonical(column, "integer")
        if (whole == UNREADABLE).any():
            return ""
        negative = column.filter(column < 0).unique()
        if len(negative) > 1:
            return ""
        code = f", {negative[0]:g} as missing" if len(negative) else ""
        if distinct <= FEW:
            return f"{values}, few{code}"
        return f"{values}, named like an identifier{code}" if _ID.search(column.name) else ""

    def _useless(self, column: pl.Series) -> str:
        """Return why a column cannot be a feature; empty if it can."""
        dtype = column.dtype
        if column.name in self.times:
            made = " and ".join(part.part for part in self.times[column.name])
            return f"times, {f'whose {made} is a feature' if made else 'with few hours and days'}"
        if dtype.is_nested() or dtype.is_temporal() or dtype in (pl.Binary, pl.Object):
            return f"type {dtype}"
        present = column.drop_nulls()
        if dtype.is_float():
            present = present.drop_nans()
        if present.n_unique() <= 1 and (not len(present) or len(present) == len(column)):
            return "constant" if len(present) else "all missing"
        if column.name in self.whole.values():
            return ""
        unique = present.n_unique() > 0.95 * len(column) and len(column) >= 100
        if unique and not dtype.is_numeric():
            return "text that is different in nearly every row"
        if unique and dtype.is_integer() and _numbers_rows(present, self.count):
            return "it numbers the rows"
        return ""

    def _equals_label(self, column: pl.Series) -> str:
        """Return which label a column is, or is the opposite of; empty if none."""
        if not (column.dtype.is_numeric() or column.dtype == pl.Boolean):
            return ""
        numbers = numbers_of(column)
        for number, task in enumerate(self.schema.tasks):
            counted = self.targets.mask[self.rows, number]
            label, value = self.targets.labels[self.rows, number][counted], numbers[counted]
            if label.size and ((value == label).all() or (value == 1 - label).all()):
                return f"it is the label {task.name!r}, or its opposite"
        return ""

    def _strongest(self, column: pl.Series) -> tuple[str, float]:
        """Return the label that a column predicts best alone, and its AUC."""
        if kind_of(column.name, column.dtype) is None:
            return "", 0.5
        labels, mask = self.targets.labels[self.rows], self.targets.mask[self.rows]
        areas = np.nan_to_num(column_aucs(column, labels, mask), nan=0.5)
        best = int(areas.argmax())
        return self.schema.tasks[best].name, float(areas[best])

    def _side(self, name: str) -> Side:
        """Return whom a column describes: the user or the item if it depends on it alone."""
        sides: tuple[Side, ...] = ("user", "item")
        for side in sides:
            key = self.whole[side]
            if not key:
                continue
            if name == key:
                return side
            pairs = self.table.select(pl.struct(key, name).n_unique()).item()
            keys = self.table[key].n_unique()
            if pairs == keys and len(self.table) >= ROWS_PER_KEY * keys:
                return side
        return "context"

    def _history(self, column: pl.Series, sparse: Sequence[Sparse]) -> History | None:
        """Return the history of a list column: of the feature that has most of its values."""
        name = column.name
        if isinstance(column.dtype, pl.Array):
            column = column.arr.to_list()
        events = column.filter(column.list.len() > 0).explode().drop_nulls()
        if not len(events):
            self._leave_out(name, "all lists are empty")
            return None
        overlaps = [_overlap(events, self.table[feature.name]) for feature in sparse]
        best = int(np.argmax(overlaps)) if overlaps else 0
        if not overlaps or overlaps[best] < 0.5:
            self._leave_out(name, "its lists hold the values of no sparse feature")
            return None
        length = min(LONGEST, int(column.list.len().max() or 1))  # type: ignore[arg-type]
        of = sparse[best].name
        reason = f"lists with the values of {of!r}, the newest {length}"
        self.notes[name] = Note(name, "history", reason)
        return History(name, of, max_length=length)


def _refuse_commas(column: pl.Series) -> None:
    """Refuse text of numbers with decimal commas, which would become a category for each number."""
    if column.dtype != pl.String:
        return
    texts = column.drop_nulls().unique()
    commas = texts.str.contains(_COMMA)
    if commas.any() and (commas | texts.cast(pl.Float64, strict=False).is_not_null()).all():
        shown = texts.filter(commas)[0]
        raise GatesError(
            f"column {column.name!r} has numbers with a comma, such as {shown!r}: "
            "write them with a point, as 8.57; or drop the column, or write a schema with it as a "
            "sparse feature if they are categories"
        )


def _negative_ids(column: pl.Series) -> str:
    """Return a warning where ids are negative, and so missing."""
    kind = kind_of(column.name, column.dtype)
    if kind != "integer":
        return ""
    integers = canonical(column, kind)
    count = int(((integers < 0) & column.is_not_null()).sum())
    if not count:
        return ""
    share = count / len(column)
    return (
        f"; WARNING: {share:.0%} of the rows have a negative one, which counts as missing: number "
        "from 0, or make them text, if they are ids"
    )


def _overlap(events: pl.Series, column: pl.Series) -> float:
    """Return the fraction of events that are values of a column."""
    try:
        kind = kind_of(column.name, column.dtype) or "integer"
        values, ids = canonical(events, kind), canonical(column, kind).unique()
    except GatesError:
        return 0.0
    return float(values.is_in(ids.implode()).mean() or 0.0)  # type: ignore[arg-type]


def _numbers_rows(numbers: pl.Series, count: int) -> bool:
    """Return whether integers count rows of which some may be in another part of the split."""
    steps = numbers.cast(pl.Float64).diff().drop_nulls()
    if steps.n_unique() == 1:
        return True
    one_way = bool((steps > 0).all() or (steps < 0).all())
    return one_way and abs(float(steps.sum())) < SPARSEST * count


def _heavy_tailed(column: pl.Series) -> bool:
    numbers = numbers_of(column)
    finite = numbers[~np.isnan(numbers)]
    if (largest := np.abs(finite).max(initial=0)) > LARGEST:
        finite = finite / largest
    return bool(np.abs(finite - finite.mean()).max(initial=0) > SPREAD * finite.std())


def plain(schema: FeatureSchema) -> dict[str, Any]:
    """Return a schema as plain values, without those that are as by default."""
    return {
        name: [_changed(entry) for entry in value] if isinstance(value, tuple) else value
        for name, value in _changed(schema).items()
    }


def _changed(entry: Any) -> dict[str, Any]:
    values: Iterable[tuple[str, Any, Any]] = (
        (field.name, getattr(entry, field.name), field.default)
        for field in dataclasses.fields(entry)
    )
    return {
        name: list(value) if name in LISTS and isinstance(value, tuple) else value
        for name, value, default in values
        if value != default
    }
