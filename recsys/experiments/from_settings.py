"""Data, networks and baselines from settings under dotted names, and what of them can be tuned.

``options: {dim: 8}`` is the setting ``model.options.dim``. A setting that is None is as good as
absent, and a dot separates names, so that ``{norm: null}`` or ``{"a.b": 1}`` stay in one piece: the
setting ``model.options``. Otherwise they would be taken for ``{}`` and for ``{a: {b: 1}}``.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from inspect import signature
from pathlib import Path
from time import process_time
from typing import Any, TypeVar, cast

import lightning as L
from torch import Tensor

from core_gates.errors import GatesError, check_option
from recsys.baselines import (
    KINDS,
    BaseRates,
    Biases,
    Factorization,
    OneColumn,
    Predictor,
    Trees,
    WithIntercepts,
)
from recsys.data.datamodule import TableDataModule, data_module
from recsys.data.tables import RankingTables, StreamSource, TableSource
from recsys.ranker import Ranker
from recsys.ranker_module import MultiTaskModule
from recsys.regression import LogNormalHeads
from recsys.transform import FeatureTransform

MODEL = "model."
DATA = "data."
Made = TypeVar("Made")
CACHED = 2  # tables that a process keeps: those of two data sets
NUMBERS = {"int": "a whole number", "float": "a number"}
STEPS = 2, 12  # of a training, between which it is timed
BASELINE = "baseline."
INTERCEPTS = "model.intercepts"
"""The one setting of networks that baselines have, too: all are calibrated, or none."""

FRACTION = re.compile(r"\bfloat\b")
OWNERS: tuple[tuple[str, Callable[..., Any]], ...] = (
    (MODEL, MultiTaskModule),
    ("data.", TableDataModule),
    ("trainer.", L.Trainer),
)


def with_whole_mappings(
    settings: Mapping[str, Any], prefix: str, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return settings in which a mapping that dotted names cannot tell is one setting.

    Args:
        settings: Under dotted names.
        prefix: Of the names of the arguments, such as ``model.``.
        arguments: By name, as they were given.
    """
    flat = dict(settings)
    for name, value in arguments.items():
        if isinstance(value, Mapping) and not _has_plain_names(value):
            flat = {n: v for n, v in flat.items() if not n.startswith(f"{prefix}{name}.")}
            flat[f"{prefix}{name}"] = dict(value)
    return flat


def mapping_in(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the mapping of this name, whole or under dotted names; empty if there is none."""
    return dict(settings.get(name) or nested(settings, f"{name}."))


def nested(settings: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the settings below a prefix as nested mappings, such as options of a network.

    Where one is whole and has dotted names, too, these replace its values.
    """
    tree: dict[str, Any] = {}
    for name in sorted(name for name in settings if name.startswith(prefix)):
        *path, last = name.removeprefix(prefix).split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = deepcopy(settings[name])
    return tree


def _has_plain_names(value: Any) -> bool:
    """Return whether a value is the same after it was put under dotted names and nested again."""
    if isinstance(value, Mapping):
        return all(
            isinstance(name, str) and name and "." not in name and _has_plain_names(inner)
            for name, inner in value.items()
        )
    return value is not None


def class_of(settings: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the class of the source of the rows.

    Args:
        settings: With ``data.source.class_path``.

    Raises:
        GatesError: No class is named, or there is none.
    """
    path = str(settings.get("data.source.class_path") or "")
    module, _, name = path.rpartition(".")
    if not module:
        raise GatesError(
            f"data.source.class_path is {path or 'missing'}, expected a class with its package, "
            "such as recsys.data.readers.own_table.OwnTable"
        )
    try:
        return cast(Callable[..., Any], getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError) as error:
        raise GatesError(f"data.source {path}: {error}") from error


def source_of(settings: Mapping[str, Any]) -> TableSource | StreamSource:
    """Return the source of the rows.

    Args:
        settings: With ``data.source.class_path`` and ``data.source.init_args.…``.

    Raises:
        GatesError: No class is named, there is none, or it refuses an argument.
    """
    kind = class_of(settings)
    try:
        return cast(TableSource | StreamSource, kind(**nested(settings, "data.source.init_args.")))
    except (TypeError, ValueError) as error:
        raise GatesError(f"data.source {settings['data.source.class_path']}: {error}") from error


def data_of(settings: Mapping[str, Any], seed: int = 0) -> TableDataModule:
    """Return the data that settings name; a process reads tables again only if files change.

    Args:
        settings: With names that begin by ``data.``.
        seed: Of the order of training rows.

    Raises:
        GatesError: A setting is unknown or wrong, or the tables cannot be read.
    """
    source = {n: v for n, v in settings.items() if n.startswith("data.source.")}
    options = {
        n.removeprefix(DATA): v
        for n, v in settings.items()
        if n.startswith(DATA) and n not in source and n != "data.seed"
    }
    source_read = _read(json.dumps(source, sort_keys=True), _state(source.values()))
    return _made(DATA, data_module, source_read, seed=seed, **options)


def require_tables(data: object, needs: str, fix: str) -> None:
    """Refuse data that are read part by part, where all rows are needed at once.

    Args:
        data: A data module.
        needs: Who needs the rows, such as ``--slices needs``.
        fix: What to do.

    Raises:
        GatesError: The data are a stream.
    """
    if not isinstance(data, TableDataModule):
        raise GatesError(
            f"{needs} all rows in memory, but data.source is a stream, which reads them part by "
            f"part: {fix}"
        )


def module_of(settings: Mapping[str, Any]) -> MultiTaskModule:
    """Return the untrained module that settings name.

    Raises:
        GatesError: A setting is unknown or wrong.
    """
    chosen = mapping_in(settings, f"{MODEL}options")
    others = {n: v for n, v in settings.items() if not n.startswith(f"{MODEL}options")}
    return _made(MODEL, MultiTaskModule, **nested(others, MODEL), options=chosen)


def _made(group: str, kind: Callable[..., Made], *args: Any, **options: Any) -> Made:
    try:
        return kind(*args, **options)
    except (TypeError, ValueError) as error:
        raise GatesError(f"{group.rstrip('.')}: {error}") from error


def _state(values: Iterable[Any]) -> tuple[tuple[str, int, int], ...]:
    """Return what tells whether files among the values of settings have changed."""
    paths = [Path(value).absolute() for value in values if isinstance(value, str) and value]
    stats = [(str(path), path.stat()) for path in paths if path.exists()]
    return tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats)


@lru_cache(maxsize=CACHED)
def _read(source: str, state: object) -> RankingTables | StreamSource:
    del state
    opened = source_of(json.loads(source))
    return (
        cast(StreamSource, opened)
        if hasattr(opened, "stream")
        else cast(TableSource, opened).read()
    )


def baseline(options: Mapping[str, Any], transform: FeatureTransform) -> Predictor:
    """Return an unfitted baseline.

    Args:
        options: Its ``kind``, ``column`` (one, or a mapping from task to column) or ``columns`` by
            name, ``numbers`` of trees that predict numbers instead of their thresholds, and
            further arguments.
        transform: Which knows the places of columns.

    Raises:
        GatesError: The kind, a column or an argument is unknown, or an argument is wrong.
    """
    rest = dict(options)
    kind = str(rest.pop("kind", ""))
    check_option("kind of a baseline", kind, KINDS, GatesError)
    parameters = signature(KINDS[kind]).parameters
    for name, value in rest.items():
        if name in parameters and parameters[name].annotation in NUMBERS:
            _check_number(f"{name} of the baseline {kind}", value, str(parameters[name].annotation))
    try:
        return _baseline(kind, rest, transform)
    except (TypeError, ValueError) as error:
        raise GatesError(f"baseline {kind}: {error}") from error


def _baseline(kind: str, rest: dict[str, Any], transform: FeatureTransform) -> Predictor:
    sparse, dense = list(transform.sparse_tables), list(transform.dense_names)
    if kind == "base_rates":
        return BaseRates(**rest)
    if kind == "one_column":
        column, tasks = rest.pop("column", ""), transform.schema.task_names
        if isinstance(column, Mapping):
            if strangers := sorted(set(column) ^ set(tasks)):
                raise ValueError(f"column must name one for each task, see {strangers[0]!r}")
            return OneColumn([_place(column[task], dense) for task in tasks], **rest)
        return OneColumn(_place(column, dense), **rest)
    if kind == "biases":
        names = rest.pop("columns", sparse)
        places = [_place(name, sparse) for name in names]
        sizes = [transform.sizes[transform.sparse_tables[name]] for name in names]
        return Biases(places, sizes, **rest)
    if kind == "factorization":
        tables = transform.sparse_tables
        sides = {f.name: f.side for f in transform.schema.sparse}
        user, item = (
            [k for k, name in enumerate(sparse) if sides.get(name) == side]
            for side in ("user", "item")
        )
        return Factorization([transform.sizes[tables[n]] for n in sparse], user, item, **rest)
    names = rest.pop("columns", None)
    columns = None if names is None else [_place(name, sparse) for name in names]
    if not rest.pop("numbers", False):
        return Trees(columns, **rest)
    if not all(task.threshold for task in transform.schema.tasks):
        raise ValueError("numbers needs tasks that are thresholds of numbers, all of them")
    heads = LogNormalHeads(transform.schema, dense)
    heads.take_scalers(transform.scalers)
    return Trees(columns, heads=heads, **rest)


def _check_number(name: str, value: Any, annotation: str) -> None:
    right = int if annotation == "int" else int | float
    if isinstance(value, bool) or not isinstance(value, right):
        raise GatesError(f"{name} is {value!r}: expected {NUMBERS[annotation]}")


def _place(name: str, names: Sequence[str]) -> int:
    check_option("column of a baseline", name, names, GatesError)
    return list(names).index(name)


def ranker_of(
    settings: Mapping[str, Any], weights: Mapping[str, Tensor], data: TableDataModule
) -> Ranker:
    """Return the network that settings name with its weights, in evaluation mode."""
    ranker = module_of(settings).build(data.transform)
    ranker.load_state_dict(dict(weights))
    return ranker.eval()


def baseline_of(settings: Mapping[str, Any], transform: FeatureTransform) -> Predictor:
    """Return the unfitted baseline that settings name, with intercepts where networks have them.

    Raises:
        GatesError: The kind, a column or an argument is unknown, or an argument is wrong.
    """
    options = {
        name.removeprefix(BASELINE): value
        for name, value in settings.items()
        if name.startswith(BASELINE)
    }
    built = baseline(options, transform)
    return WithIntercepts(built) if settings.get(INTERCEPTS) else built


def epoch_seconds(settings: Mapping[str, Any], data: TableDataModule) -> float:
    """Return the CPU seconds of an epoch of a training, by a few steps and one validation."""
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options: dict[str, Any] = dict.fromkeys(off, False)
    module, clock = module_of(settings), StepClock()
    trainer = L.Trainer(max_steps=STEPS[1], limit_val_batches=0, callbacks=[clock], **options)
    trainer.fit(module, data)
    step = (clock.ends[-1] - clock.ends[STEPS[0] - 1]) / (STEPS[1] - STEPS[0])
    begin = process_time()
    L.Trainer(**options).validate(module, data, verbose=False)
    return step * len(data.train_dataloader()) + process_time() - begin


class StepClock(L.Callback):
    """Keeps the CPU time at the end of each step: the first ones are dearer than all others."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Keep the time."""
        self.ends.append(process_time())


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
    parameters = signature(owner).parameters
    if argument not in parameters:
        numbers = [
            n for n, parameter in parameters.items() if FRACTION.search(str(parameter.annotation))
        ]
        raise GatesError(
            f"{who} names {name}, which does not exist; what can be tuned there: "
            f"{', '.join(numbers) or 'nothing'}"
        )
    if not FRACTION.search(str(parameters[argument].annotation)):
        raise GatesError(
            f"{who} names {name}, which takes no numbers with fractions, but a box is full of "
            "them: give it one value"
        )


def _owner(name: str, settings: Mapping[str, Any]) -> tuple[str, Callable[..., Any]]:
    source = "data.source.init_args."
    if name.startswith(source):
        return source, class_of(settings)
    return next((prefix, owner) for prefix, owner in OWNERS if name.startswith(prefix))
