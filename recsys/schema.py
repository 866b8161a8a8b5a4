"""What the columns of a table are: features of four kinds, tasks, user, weight and time."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from core_gates.errors import GatesError, check_at_least, check_option

Side = Literal["user", "item", "context"]
"""Whom a feature describes: what is of the user is computed once for all candidates."""

Scaling = Literal["log_standardize", "standardize", "buckets", "none"]
Encoder = Literal["mean", "target_attention", "transformer"]
ENCODERS: tuple[Encoder, ...] = get_args(Encoder)
Storage = Literal["plain", "hash", "quotient_remainder"]
Part = Literal["", "hour", "weekday"]
VALUES: Mapping[Part, range] = {"hour": range(24), "weekday": range(1, 8)}
"""Of the parts of times; 1 is Monday."""


@dataclass(frozen=True)
class Sparse:
    """A categorical column, strings or integers; its values become rows of an embedding table.

    Attributes:
        name: Column.
        dim: Features of its embedding; that of the schema if None.
        side: Whom it describes.
        min_count: Values seen less often in training become *unknown*.
        storage: ``plain``: one row per value of a vocabulary; ``hash``: ``buckets`` rows and no
            vocabulary; ``quotient_remainder``: two small tables in place of one (Shi et al., 2020).
        buckets: Rows of a hashed table; rows of the remainder table.
        table: Name of the embedding table, shared by all features that name it; own if empty.
        column: Column of times that it is a part of; that named like the feature if empty.
        part: ``hour`` or ``weekday`` of these times, see `recsys.columns.canonical.part_of`.
    """

    name: str
    dim: int | None = None
    side: Side = "context"
    min_count: int = 1
    storage: Storage = "plain"
    buckets: int = 0
    table: str = ""
    column: str = ""
    part: Part = ""

    def __post_init__(self) -> None:
        """Refuse sizes below 1, a storage without buckets and a part of no column."""
        check_at_least(1, dim=self.dim, min_count=self.min_count)
        check_option("storage", self.storage, ("plain", "hash", "quotient_remainder"))
        check_option("side", self.side, ("user", "item", "context"))
        check_option("part", self.part, ("", *VALUES))
        if bool(self.column) != bool(self.part):
            raise ValueError(f"feature {self.name!r}: give it both a column of times and a part")
        if (self.storage != "plain") != (self.buckets > 0):
            raise ValueError(
                f"feature {self.name!r}: buckets are the rows of a hash or quotient_remainder "
                f"table, got storage {self.storage} with buckets {self.buckets}"
            )

    @property
    def table_name(self) -> str:
        """Name of its embedding table."""
        return self.table or self.name


@dataclass(frozen=True)
class Dense:
    """A numeric column; it becomes a scaled number and an indicator that it was missing.

    Attributes:
        name: Column.
        scaling: ``log_standardize``: sign(x) log(1 + |x|), then mean 0 and variance 1 over the
            training rows; ``standardize``; ``buckets``: the embedding of its quantile;
            ``none``: raw.
        buckets: Number of quantiles.
        side: Whom it describes.
    """

    name: str
    scaling: Scaling = "log_standardize"
    buckets: int = 16
    side: Side = "context"

    def __post_init__(self) -> None:
        """Refuse an unknown scaling."""
        check_option("scaling", self.scaling, ("log_standardize", "standardize", "buckets", "none"))
        check_option("side", self.side, ("user", "item", "context"))
        check_at_least(2, buckets=self.buckets)


@dataclass(frozen=True)
class History:
    """A list column: what the user did before, newest last, in values of a sparse feature.

    Attributes:
        name: Column.
        of: Sparse feature whose vocabulary and table its values share.
        max_length: Newest events kept.
        encoder: How they become one vector.
        side: Whom it describes.
    """

    name: str
    of: str
    max_length: int = 50
    encoder: Encoder = "mean"
    side: Side = "user"

    def __post_init__(self) -> None:
        """Refuse an unknown encoder or side."""
        check_at_least(1, max_length=self.max_length)
        check_option("side", self.side, ("user", "item", "context"))
        check_option("encoder", self.encoder, ENCODERS)


@dataclass(frozen=True)
class Crossed:
    """The combination of sparse columns, hashed.

    Attributes:
        of: Columns, each a sparse feature of the schema.
        buckets: Rows of the table.
        dim: Features of its embedding; that of the schema if None.
        side: Whom it describes.
    """

    of: tuple[str, ...]
    buckets: int = 2**16
    dim: int | None = None
    side: Side = "context"

    def __post_init__(self) -> None:
        """Refuse fewer than two columns and an unknown side."""
        object.__setattr__(self, "of", tuple(self.of))
        check_option("side", self.side, ("user", "item", "context"))
        check_at_least(1, buckets=self.buckets, dim=self.dim)
        if len(self.of) < 2:
            raise ValueError(f"a crossed feature needs two columns or more, got {self.of}")

    @property
    def name(self) -> str:
        """Name of the feature: its columns, joined by an ``x``."""
        return " x ".join(self.of)


@dataclass(frozen=True)
class Product:
    """The product, element by element, of two sums of embeddings: those of users and of items, say.

    What depends on how well two things fit, as in a factorization machine (Rendle, 2010), a
    perceptron on their concatenated embeddings has to find by itself.

    Attributes:
        left: Sparse features, all of one width.
        right: Others of the same width.
    """

    left: tuple[str, ...]
    right: tuple[str, ...]

    def __post_init__(self) -> None:
        """Take one name as a side of one feature, and refuse an empty side."""
        for side in ("left", "right"):
            names = getattr(self, side)
            object.__setattr__(self, side, (names,) if isinstance(names, str) else tuple(names))
        if not self.left or not self.right:
            raise ValueError(f"a product needs features on both sides, got {self.name!r}")

    @property
    def of(self) -> tuple[str, ...]:
        """The features of both sides."""
        return (*self.left, *self.right)

    @property
    def name(self) -> str:
        """Name of the input, such as ``(user) * (video + author)``."""
        return " * ".join(f"({' + '.join(side)})" for side in (self.left, self.right))


@dataclass(frozen=True)
class Threshold:
    """What makes a label of a number: whether it reaches min(factor · scale, most).

    Attributes:
        of: Name of the regression.
        factor: In units of its scale; None for none.
        most: In units of the number; None for none.
        below: Whether the label is 1 where the number stays below.
    """

    of: str
    factor: float | None = None
    most: float | None = None
    below: bool = False

    def __post_init__(self) -> None:
        """Refuse a threshold that nothing reaches."""
        if not 0 < min(self.ends) < math.inf:
            raise ValueError(f"a threshold of {self.of!r} needs a positive factor or most")

    @property
    def ends(self) -> tuple[float, float]:
        """Factor and most, infinite for none."""
        return (self.factor or math.inf, self.most or math.inf)


@dataclass(frozen=True)
class Task:
    """A behaviour to be predicted: whether it happens, or how much there is of it.

    Attributes:
        name: Name of the task.
        label: Column with 0 and 1, or of numbers; that named like the task if empty.
        category: Group of similar behaviours, such as ``watch``.
        mask: Column; the task counts only in rows where it is true. All rows if empty.
        weight: Of its loss.
        kind: ``binary``, or ``regression``: the logarithm of a positive number, below 1 as 1, is
            predicted, such as that of a play time.
        scale: Dense feature by which the number is divided, such as the duration; none if empty.
        threshold: Of a binary task whose label is whether a number reaches a threshold: the label
            has no column, and the task no output of the network.
    """

    name: str
    label: str = ""
    category: str = "all"
    mask: str = ""
    weight: float = 1.0
    kind: Literal["binary", "regression"] = "binary"
    scale: str = ""
    threshold: Threshold | None = None

    def __post_init__(self) -> None:
        """Refuse a negative weight, an unknown kind, and what the kind does not have."""
        check_at_least(0, weight=self.weight)
        check_option("kind", self.kind, ("binary", "regression"))
        if isinstance(self.threshold, Mapping):
            object.__setattr__(self, "threshold", Threshold(**self.threshold))
        if (self.kind == "binary" and self.scale) or (self.kind != "binary" and self.threshold):
            raise ValueError(f"task {self.name!r}: a regression has a scale, a binary task none")

    @property
    def column(self) -> str:
        """Column of its label; empty if that is a threshold."""
        return "" if self.threshold else self.label or self.name


Labels = Sequence[str] | Mapping[str, str] | Sequence[Task]


def tasks_of(labels: Labels) -> tuple[Task, ...]:
    """Return tasks as given; of names of columns; or of a mapping of names to categories."""
    if isinstance(labels, str):
        labels = [labels]
    if isinstance(labels, Mapping):
        return tuple(Task(name, category=category) for name, category in labels.items())
    return tuple(task if isinstance(task, Task) else Task(task) for task in labels)


@dataclass(frozen=True)
class FeatureSchema:
    """The features, tasks and keys of a table.

    Attributes:
        tasks: What is predicted, in the order of the outputs; names, and a mapping of names to
            categories, are tasks, too. Regressions among them are kept in
            ``regressions``.
        sparse: Categorical columns.
        dense: Numeric columns.
        sequences: List columns.
        crossed: Combinations of sparse columns.
        products: Products of embeddings, further inputs of the network.
        dim: Features of an embedding where a feature names none.
        user: Column of the user, for grouped metrics and intervals; each row its own if empty.
        item: Column of what is ranked; unknown if empty.
        weight: Column of sample weights; 1 if empty.
        time: Column that orders the rows; as they come if empty.
        regressions: Numbers that are predicted, of which tasks may be thresholds.

    Raises:
        ValueError: Names repeat, a feature is called like the indicator of a dense one, a column is
            both label and feature or key, or a sequence, cross or product names no sparse feature.
    """

    tasks: tuple[Task, ...]
    sparse: tuple[Sparse, ...] = ()
    dense: tuple[Dense, ...] = ()
    sequences: tuple[History, ...] = ()
    crossed: tuple[Crossed, ...] = ()
    products: tuple[Product, ...] = ()
    dim: int = 8
    user: str = ""
    item: str = ""
    weight: str = ""
    time: str = ""
    regressions: tuple[Task, ...] = ()

    def __post_init__(self) -> None:
        """Check that names are distinct and that no label is a feature."""
        self._part_regressions()
        for name in ("tasks", "sparse", "dense", "sequences", "crossed", "products"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_at_least(1, dim=self.dim)
        if not self.tasks:
            raise ValueError("the schema has no task: name a label column at least")
        _refuse_repeated("tasks", [task.name for task in self.tasks])
        of_columns: list[Sparse | Dense | History] = [*self.sparse, *self.dense, *self.sequences]
        features = [feature.name for feature in (*of_columns, *self.crossed, *self.products)]
        _refuse_repeated("features", features)
        scaled = [feature.name for feature in self.dense if feature.scaling != "buckets"]
        if clash := [name for name in scaled if indicator_of(name) in features]:
            raise ValueError(
                f"the feature {indicator_of(clash[0])!r} is called like the indicator that "
                f"{clash[0]!r} is missing: rename the column or leave it out"
            )
        labels = set(self.labels)
        if both := sorted(labels & {*features, *self.features}):
            raise ValueError(
                f"columns {', '.join(both)} are both label and feature: a label among the features "
                "gives a perfect score that means nothing; drop them from the features"
            )
        for kind in ("user", "item", "weight", "time"):
            if (name := getattr(self, kind)) and name in {head.column for head in self.heads}:
                raise ValueError(f"the {kind} {name!r} is a label: name another column")
        _refuse_repeated("columns of user, item, weight and time", self.keys)
        feature_names = {feature.name for feature in self.sparse}
        for kind, owner, names in [
            *(("sequence", s.name, (s.of,)) for s in self.sequences),
            *(("cross", c.name, c.of) for c in self.crossed),
            *(("product", p.name, p.of) for p in self.products),
        ]:
            if strangers := [n for n in names if n not in feature_names]:
                raise ValueError(
                    f"the {kind} {owner!r} is made of {', '.join(strangers)}, no sparse feature of "
                    "the schema"
                )
        dims = {feature.name: feature.dim or self.dim for feature in self.sparse}
        for product in self.products:
            _refuse_repeated(f"features of the product {product.name!r}", product.of)
            if len({dims[name] for name in product.of}) > 1:
                raise ValueError(
                    f"the product {product.name!r} is of embeddings of different widths: "
                    f"{', '.join(f'{name} {dims[name]}' for name in product.of)}; give them the "
                    "same dim"
                )

    def _part_regressions(self) -> None:
        """Part regressions from tasks, and check that thresholds and scales are of something."""
        given = (*tasks_of(self.tasks), *self.regressions)
        for name, kind in (("tasks", "binary"), ("regressions", "regression")):
            object.__setattr__(self, name, tuple(head for head in given if head.kind == kind))
        targets = [regression.name for regression in self.regressions]
        scales = {f.name for f in self.dense if f.scaling != "buckets" and f.side != "user"}
        for head in given:
            if head.threshold and head.threshold.of not in targets:
                raise ValueError(
                    f"task {head.name!r} is a threshold of {head.threshold.of!r}, no regression of "
                    f"the schema; known are {', '.join(targets) or 'none'}"
                )
            if head.scale and head.scale not in scales:
                raise ValueError(
                    f"the scale {head.scale!r} of {head.name!r} is no dense feature of items or "
                    "context that is scaled"
                )

    @property
    def heads(self) -> tuple[Task, ...]:
        """What a network has an output for: regressions, then tasks without a threshold."""
        return (*self.regressions, *(task for task in self.tasks if task.threshold is None))

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(task.name for task in self.tasks)

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories of the tasks, in order of appearance."""
        return tuple(dict.fromkeys(task.category for task in self.tasks))

    @property
    def features(self) -> tuple[str, ...]:
        """Columns that are read as features."""
        columns: tuple[Sparse | Dense | History, ...]
        columns = (*self.sparse, *self.dense, *self.sequences)
        return tuple(dict.fromkeys(map(source_of, columns)))

    @property
    def labels(self) -> tuple[str, ...]:
        """Columns that are read as labels or masks."""
        targets = (*self.tasks, *self.regressions)
        return tuple(dict.fromkeys(c for t in targets for c in (t.column, t.mask) if c))

    @property
    def keys(self) -> tuple[str, ...]:
        """Columns of user, item, weight and time, where they are named."""
        return tuple(n for n in (self.user, self.item, self.weight, self.time) if n)

    def check_columns(self, columns: Iterable[str], *, labels: bool = True) -> None:
        """Refuse a table that lacks columns; further ones, and any order, are fine.

        Args:
            columns: Those of the table.
            labels: Whether labels and weight are needed, too.

        Raises:
            GatesError: Columns are missing; similar ones are named.
        """
        column_names = list(columns)
        wanted = [*self.features, *(self.labels if labels else ())]
        wanted += [self.weight] if labels and self.weight else []
        missing = [name for name in wanted if name not in column_names]
        if not missing:
            return
        similar = difflib.get_close_matches(missing[0], column_names, 1)
        hint = f" (did you mean {similar[0]!r}?)" if similar else ""
        raise GatesError(
            f"the table lacks {', '.join(map(repr, missing[:5]))}{hint}; it has "
            f"{', '.join(column_names[:12])}{' …' if len(column_names) > 12 else ''}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the schema as plain values of JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FeatureSchema:
        """Return the schema of `to_dict`.

        Raises:
            ValueError: An entry is unknown or wrong.
        """
        kinds = {
            "tasks": Task,
            "sparse": Sparse,
            "dense": Dense,
            "sequences": History,
            "crossed": Crossed,
            "products": Product,
            "regressions": Task,
        }
        made = dict(values)
        try:
            for name, kind in kinds.items():
                if name in made:
                    made[name] = tuple(kind(**entry) for entry in made[name])
            return cls(**made)
        except TypeError as error:
            raise ValueError(f"the schema has an entry that is not known: {error}") from error


def source_of(feature: Sparse | Dense | History) -> str:
    """Return the column that a feature is read from."""
    return getattr(feature, "column", "") or feature.name


def indicator_of(name: str) -> str:
    """Return the name of the input that tells where a dense feature is missing."""
    return f"{name} missing"


def _refuse_repeated(what: str, names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{what} are named twice: {', '.join(repeated)}")
