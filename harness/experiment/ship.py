"""``python -m harness.experiment.ship RUN_FOLDER``: put results of a run into its package."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from core_gates.errors import GatesError
from harness.experiment.store import Arrays, cast
from harness.files import replacing, write_json
from harness.files.piece import RECORD, Record, digests, read_record, refuse_changed
from harness.files.rounding import in_8_bits

MODEL = "model.safetensors"  # of a folder that other libraries open
NEVER = ("trials",)  # the choice holds them
ROUNDED = "rounded"
"""Fact of a record: the types to which its tensors were rounded."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Copy every result of a run folder to ``<package>/weights/<configuration>/<kind>/<piece>``.

    Args:
        arguments: Command line; that of the process when None.

    Returns:
        0; 2 if there is nothing to be shipped.
    """
    parser = argparse.ArgumentParser("python -m harness.experiment.ship", description=__doc__)
    parser.add_argument("run_folder", type=Path, help="Folder of the run.")
    parser.add_argument("--kinds", nargs="+", help="Kinds of results; all but trials if not given.")
    parser.add_argument(
        "--package", type=Path, help="Folder of the package; by default the recorded one."
    )
    parser.add_argument("--bfloat16", action="store_true", help="Round tensors to bfloat16.")
    parser.add_argument(
        "--int8", action="store_true", help="Round rows of matrices to 8 bits with a scale each."
    )
    parser.add_argument("--methods", nargs="+", help="Methods whose results ship; all by default.")
    parser.add_argument("--scores", nargs="+", help="Ship the scores instead, of these metrics.")
    options = parser.parse_args(arguments)
    try:
        shipped = (
            [ship_scores(options.run_folder, options.scores, options.package)]
            if options.scores
            else ship(
                options.run_folder,
                kinds=options.kinds,
                package=options.package,
                dtype=torch.bfloat16 if options.bfloat16 else None,
                int8=options.int8,
                methods=options.methods,
            )
        )
    except GatesError as error:
        print(f"ship: error: {error}", file=sys.stderr)
        return 2
    for path in shipped:
        print(path)
    return 0


def ship(
    run_folder: Path,
    *,
    kinds: Sequence[str] | None = None,
    package: Path | None = None,
    dtype: torch.dtype | None = None,
    int8: bool = False,
    methods: Sequence[str] | None = None,
) -> list[Path]:
    """Copy results of a run folder into the package that their records name.

    Args:
        run_folder: Folder of the run.
        kinds: Kinds of results; all but trials when None.
        package: Folder of the package, in place of the one in the records.
        dtype: Floating-point type of tensors.
        int8: Whether rows of matrices become 8-bit integers with a scale each.
        methods: Methods whose results are shipped; all when None.

    Returns:
        Folders of what was shipped.

    Raises:
        GatesError: There is nothing, or a record names no package.
    """
    records = sorted(run_folder.glob(f"*/*/{RECORD}"))
    shipped = []
    for path in records:
        folder, kind = path.parent, path.parents[1].name
        if folder.name.startswith(".") or kind in NEVER or (kinds and kind not in kinds):
            continue
        record = read_record(folder)
        if record is None or not (record.package or package):
            raise GatesError(f"{path} names no package: give --package")
        if methods and record.identity["method"] not in methods:
            continue
        home = package or Path(str(files(record.package)))
        target = home / "weights" / record.configuration / kind / folder.name
        with replacing(target) as temporary:
            refuse_changed(folder, record)
            shutil.copytree(folder, temporary)
            record = _rounded(temporary, record, dtype, int8=int8)
            record = record._replace(command=portable(record.command))
            record._replace(files=digests(temporary)).write(temporary)
        shipped.append(target)
    if not shipped:
        raise GatesError(
            f"{run_folder} holds no results to ship: give the folder of a run after `evaluate` or "
            "`tune`"
        )
    return shipped


def ship_scores(run_folder: Path, metrics: Sequence[str], package: Path | None = None) -> Path:
    """Copy ``scores.json`` of a full evaluation to ``<package>/weights/<configuration>``.

    Args:
        run_folder: Folder of the run.
        metrics: Of the rows that ship, but for differences of methods.
        package: Folder of the package, in place of the one in the records.

    Raises:
        GatesError: There is no full evaluation, or no record.
    """
    path = run_folder / "scores.json"
    record = next(
        (r for p in run_folder.glob(f"*/*/{RECORD}") if (r := read_record(p.parent))), None
    )
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if record is None or content.get("only", True) or content["quick"]:
        raise GatesError(
            f"{run_folder} holds no full evaluation: run `evaluate` for all methods first"
        )
    home = (package or Path(str(files(record.package)))) / "weights" / record.configuration
    content["rows"] = [r for r in content["rows"] if r["metric"] in metrics and not r["versus"]]
    return write_json(home / path.name, content)


def _rounded(folder: Path, record: Record, dtype: torch.dtype | None, *, int8: bool) -> Record:
    """Round the tensors of a result, or of the model of other libraries that it is."""
    arrays, kind = Arrays(), str(dtype).removeprefix("torch.")
    if (folder / Arrays.FILE).is_file() and (dtype is not None or int8):
        result = cast(arrays.load(folder), dtype)
        arrays.save(folder, in_8_bits(result) if int8 else result)
        types = ("int8",) * int8 + (kind,) * bool(dtype)
    elif (folder / MODEL).is_file() and dtype is not None:
        state = {name: value.clone() for name, value in load_file(folder / MODEL).items()}
        save_file(cast(state, dtype), folder / MODEL, metadata={"format": "pt"})
        path, types = folder / "config.json", (kind,)
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if "dtype" in config:
            write_json(path, {**config, "dtype": kind})
    else:
        return record
    return record._replace(facts={**record.facts, ROUNDED: ", ".join(types)})


def portable(command: str) -> str:
    """Return a command without the options of one machine or call, such as ``--root``."""
    words, kept = iter(shlex.split(command)), []
    for word in words:
        name = word.partition("=")[0]
        if name in ("--root", "--name", "--only"):
            if name == word:
                next(words, None)
        elif name not in ("--overwrite", "--resume"):
            kept.append(word)
    return shlex.join(kept)


if __name__ == "__main__":
    sys.exit(main())
