"""``gates video score``: files of rows to Parquet files of probabilities, resumable."""

from __future__ import annotations

from pathlib import Path

import torch

from apps.video.serving.fusion import fusion_of
from apps.video.serving.model import Model, chosen_tasks, place_of, read_model
from apps.video.serving.shards import Shards, ShardWriter
from core_gates.errors import GatesError
from harness.command.verbs import Place
from harness.runs.ticker import counting
from recsys.parts import Part, find_parts


def score(
    place: Place,
    sources: list[str],
    model: str | None = None,
    output: str | None = None,
    key_columns: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    fused: dict[str, float] | None = None,
    offsets: dict[str, float] | None = None,
    int8: bool = False,
    threads: int = 1,
    overwrite_output: bool = False,
) -> None:
    """Score SOURCES, Parquet or CSV files or folders of them: one file of probabilities per file.

    Files are read block by block. Those that are complete stay when the command is killed or called
    again; only the others are made. A file that was made with another model or other options is
    refused.

    Args:
        place: Filled in by the command line.
        sources: Filled in by the command line.
        model: Folder of the model; by default that of the run.
        output: Folder of the predictions; that of the run by default.
        key_columns: Columns that are copied; by default user, item and time of the model's
            schema, where the files have them.
        tasks: Tasks whose probabilities are written; all by default.
        fused: Exponents of tasks; adds the fused score, the product of (offset + p) ^ exponent.
        offsets: Numbers by task that the fused score adds to its probability.
        int8: Keep embedding tables as 8-bit integers in memory.
        threads: Threads of the network.
        overwrite_output: Replace predictions of another model, with other options or of other
            content.
    """
    if threads < 1:
        raise GatesError(f"--threads must be at least 1, found {threads}")
    _refuse_twice("--tasks", tasks)
    _refuse_twice("--key_columns", key_columns)
    torch.set_num_threads(threads)
    parts = find_parts(sources)
    found = read_model(place_of(place, model), int8=int8)
    chosen = chosen_tasks(found.scorer.task_names, tasks)
    fusion = fusion_of(found.scorer.task_names, fused, offsets)
    root = Path(output) if output else place.run_folder.path / "predictions"
    written = [found.scorer.task_names[task] for task in chosen]
    options = {
        "key_columns": list(key_columns),
        "tasks": written,
        "fused": fusion.settings if fusion else None,
    }
    shards = Shards(root, found.version, options)
    shards.refuse_inside(parts)
    made = [f"p_{task}" for task in written] + (["score"] if fusion else [])
    copied = _check_columns(parts, found, key_columns, made)
    missing = shards.claim(parts, overwrite=overwrite_output)
    if kept := len(parts) - len(missing):
        print(f"{kept} of {len(parts)} files are complete already")
    writer = ShardWriter(found, chosen, fusion)
    _score_all(missing, shards, writer, copied)
    print(root)


def _refuse_twice(option: str, names: tuple[str, ...]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise GatesError(f"{option} names {twice[0]!r} twice: name it once")


def _score_all(
    parts: list[Part], shards: Shards, writer: ShardWriter, copied: dict[Part, list[str]]
) -> None:
    counts = [part.num_rows() for part in parts]
    total = sum(n for n in counts if n is not None) if None not in counts else None
    done = 0
    with counting("scoring rows") as count:
        for part in parts:
            with shards.writing(part) as path:
                for rows in writer.write(part, path, copied[part], shards.footer(part)):
                    done += rows
                    count(done, total)


def _check_columns(
    parts: list[Part], model: Model, keys: tuple[str, ...], made: list[str]
) -> dict[Part, list[str]]:
    """Return the columns that are copied from each file, after checking that all can be scored.

    None of them may have the name of a column that is ``made``.
    """
    schema = model.scorer.schema
    copied = {}
    for part in parts:
        names = part.columns()
        try:
            schema.check_columns(names, labels=False)
        except GatesError as error:
            raise GatesError(f"{part.path}: {error}") from error
        if absent := [name for name in keys if name not in names]:
            raise GatesError(f"{part.path} has no column {absent[0]!r}: correct --key_columns")
        default = [n for n in (schema.user, schema.item, schema.time) if n and n in names]
        copied[part] = list(keys) or list(dict.fromkeys(default))
        if taken := [name for name in copied[part] if name in made]:
            raise GatesError(
                f"{part.path}: the column {taken[0]!r} has the name of a prediction: rename it, or "
                "name other --key_columns"
            )
    return copied
