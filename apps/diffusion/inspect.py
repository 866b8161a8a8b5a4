"""``gates diffusion inspect``: what is in a file of adapters, and why it may do nothing."""

import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apps.diffusion.adapter_files import PEFT, SUFFIX, base_of, find_files, range_of
from core_gates.errors import GatesError
from diffusion.lora_file.container import clean
from diffusion.lora_file.family import FAMILIES
from diffusion.lora_file.inspection import LARGEST, Contents, examine
from diffusion.lora_file.mapping_report import Dialect
from diffusion.lora_file.names import UNETS
from diffusion.lora_file.reading import Base
from diffusion.lora_file.writing import text_encoders
from harness.files import require_apart, require_free, write_json
from harness.runs.terminal import counting, readable

WORST = ("error", "nothing", "part", "whole")
SAID = {
    "error": "{} refuses it",
    "nothing": "{} changes no layer and reports no error",
    "part": "{} applies a part of it",
    "whole": "{} applies all of it",
}


class Answer(NamedTuple):
    """What becomes of a file where it is loaded.

    Attributes:
        effect: ``nothing``, ``part``, ``error`` or ``whole`` as in a verdict, ``zero``, ``broken``,
            ``text`` for text encoders alone, ``family`` for one that cannot be read.
        text: One sentence.
        fix: Command that helps; empty if none does.
    """

    effect: str
    text: str
    fix: str = ""


def answer(path: Path, contents: Contents) -> Answer:
    """Return whether a LoRA file can be used here, and the command that helps."""
    layers, named = contents.layers, " and ".join(contents.text_encoders)
    norms = [
        layer.norm
        for component in (layers, *contents.text_encoders.values())
        for layer in component.values()
    ]
    faults = {
        Answer(
            "broken",
            "it holds NaN, infinity or changes beyond float32: images turn black; get the file"
            " again",
        ): not all(norm <= LARGEST for norm in norms),
        Answer("zero", "the change of every layer is zero: there is nothing to apply"): norms
        and not any(norms),
        Answer(
            "family",
            f"it is an adapter for {contents.family}: load it into a model of that family, not into"
            " FLUX.1 or SD3",
        ): contents.family not in (*FAMILIES, "unknown"),
        Answer("text", f"it changes {named} alone: the image model stays as it is"): not layers
        and named,
        Answer(
            "nothing", "none of its tensors has the name of a layer of FLUX.1 or SD3"
        ): not layers or contents.family == "unknown",
    }
    if wrong := [fault for fault, holds in faults.items() if holds]:
        return wrong[0]
    verdicts = contents.verdicts
    worst = min(verdicts, key=lambda verdict: WORST.index(verdict.effect))
    text = SAID[worst.effect].format(worst.loader)
    lost = sorted(set(contents.text_encoders) - text_encoders("diffusers", contents.family))
    aside = f"; it reads no adapters of {' and '.join(lost)}" if lost else ""
    if worst.effect == "whole":
        hint = listed_triggers(contents.description.triggers)
        text = text.replace("all of it", "all layers of the transformer") if lost else text
        return Answer("whole", text + aside + (f"; its prompt needs {hint}" if hint else ""))
    causes = worst.what if len(verdicts) == 1 else ", ".join(
        f"{v.what} ({v.tensors} tensors)" for v in verdicts if v.effect != "whole"
    )  # fmt: skip
    return Answer(
        worst.effect,
        f"{text}: {causes}{aside}",
        fix_of(path, lenient=bool(lost or contents.left_out)),
    )


def listed_triggers(triggers: Sequence[str]) -> str:
    """Return triggers in quotes."""
    return ", ".join(f"'{trigger}'" for trigger in triggers)


def fix_of(path: Path, *, lenient: bool) -> str:
    """Return the command that writes a file so that diffusers applies all of it."""
    output = path.with_name(f"{path.name if path.is_dir() else path.stem}.diffusers.safetensors")
    words = ["gates", "diffusion", "convert", str(path), str(output), "--to", "diffusers"]
    return shlex.join([*words, *(["--lenient"] if lenient else [])])


SHOWN = 8  # tags, tensors left out
COMMENT = 300  # letters
NAME = 120  # letters of a path
BAR = 20  # letters of the longest norm
LEAST_FIRST = ("AutoV3", "triggers", "rank", "‖ΔW‖", "layers", "family")
"""Columns of a summary that are left out where names of files would be broken, in this order."""
WIDE = 1000  # letters that any row of a summary fits into
COLORS = {"whole": "green", "part": "yellow"}


def plain_console() -> Console:
    """Return a console that prints text of unknown origin as it is, ``:smile:`` included."""
    return Console(emoji=False, highlight=False)


def show_contents(console: Console, contents: Contents, said: Answer, *, layers: bool) -> None:
    """Print what a file holds, its blocks or layers, and what becomes of it."""
    table = Table(title=escape(clean(str(contents.path))), title_justify="left", show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("")
    for name, text in facts(contents).items():
        if text:
            table.add_row(escape(name), escape(text))
    console.print(table)
    if contents.layers:
        console.print(_layers(contents) if layers else _blocks(contents))
    show_notes(console, contents.left_out, contents.odd)
    console.print(f"[{COLORS.get(said.effect, 'red')}]answer[/]: {escape(said.text)}")
    if said.fix:  # a command is never broken into lines
        console.print(f"fix: {escape(clean(said.fix))}", soft_wrap=True)


def show_notes(console: Console, left_out: Mapping[str, str], notes: Iterable[str]) -> None:
    """Print the first tensors that are left out, each with the reason, and what is unusual."""
    for name, reason in list(left_out.items())[:SHOWN]:
        console.print(f"left out: {escape(clean(name, 160))}: {escape(reason)}")
    if (more := len(left_out) - SHOWN) > 0:
        console.print(f"left out: {more} more tensors")
    for note in notes:
        console.print(f"[yellow]note[/]: {escape(note)}")


def facts(contents: Contents) -> dict[str, str]:
    """Return a LoRA file's format, base, rank and size as text, by label."""
    described, layers = contents.description, contents.layers.values()
    parts = [f"{len(layers)} of the {'U-Net' if contents.family in UNETS else 'transformer'}"]
    parts += [f"{len(layers)} of {name}" for name, layers in contents.text_encoders.items()]
    dora = sum(layer.dora for layer in layers)
    held = ", ".join(parts) + (f"; {dora} are DoRA" if dora else "")
    folders = f"; folder of training images: {listed_triggers(described.folders)}"
    tags = [
        f"{tag} {count}" if count else tag for tag, count in list(described.tags.items())[:SHOWN]
    ]
    return {
        "family": f"{contents.family} ({contents.evidence})",
        "dialect": "; ".join(dialects(contents.dialects)),
        "layers": held if layers or contents.text_encoders else "",
        "rank": range_of(layer.rank for layer in layers),
        "scale": range_of(layer.scale for layer in layers),
        "‖ΔW‖": f"{contents.norm:.4g}" if layers else "",
        "stored as": f"{contents.storage} {readable(contents.size, 'bytes')}".strip(),
        "title": described.title,
        "author": described.author,
        "triggers": listed_triggers(described.triggers)
        or "none stated" + (folders if described.folders else ""),
        "tags": ", ".join(tags) + (" ..." if len(described.tags) > SHOWN else ""),
        "license": described.license or "none stated",
        "trained on": described.base,
        "comment": clean(described.comment, COMMENT),
        "AutoV2": contents.auto_v2,
        "AutoV3": contents.auto_v3,
    }


def dialects(found: Sequence[Dialect]) -> list[str]:
    """Return each way of naming layers, with the spellings of its factors."""
    groups: dict[tuple[str, str], list[Dialect]] = {}
    for dialect in found:
        groups.setdefault((dialect.prefix, dialect.names), []).append(dialect)
    lines = []
    for (prefix, names), group in groups.items():
        underscored = " with underscores" if any(dialect.underscored for dialect in group) else ""
        spellings = ", ".join(dict.fromkeys(dialect.factors for dialect in group))
        lines.append(f"{prefix or 'no prefix'}, {names} names{underscored} ({spellings})")
    return lines


def _blocks(contents: Contents) -> Table:
    norms = contents.norms()
    table = Table("block", "layers", "rank", "‖ΔW‖", "")
    for block, names in contents.blocks().items():
        rank = range_of(contents.layers[name].rank for name in names)
        bar = _bar(norms[block], norms)
        table.add_row(block, str(len(names)), rank, f"{norms[block]:.4g}", bar)
    return table


def _layers(contents: Contents) -> Table:
    norms = {name: layer.norm for name, layer in contents.layers.items()}
    table = Table()
    table.add_column("layer", overflow="fold")
    for column in ("size", "rank", "scale", "‖ΔW‖", ""):
        table.add_column(column, no_wrap=True)
    for names in contents.blocks().values():
        for name in names:
            layer = contents.layers[name]
            table.add_row(
                escape(name),
                f"{layer.in_features} → {layer.out_features}",
                f"{layer.rank}{' DoRA' if layer.dora else ''}",
                f"{layer.scale:.4g}",
                f"{layer.norm:.4g}",
                _bar(layer.norm, norms),
            )
    return table


def _bar(norm: float, norms: Mapping[str, float]) -> str:
    most = max(norms.values())
    return "█" * round(BAR * norm / most) if norm == norm and 0 < most < math.inf else ""


def show_summary(
    console: Console, rows: Mapping[Path, tuple[Contents, Answer] | str], *, hashes: bool
) -> None:
    """Print one row per file, below the folder that all lie in; what is wrong is told below."""
    common = os.path.commonpath([path.absolute().parent for path in rows])
    names = {path: escape(clean(str(path.absolute().relative_to(common)), NAME)) for path in rows}
    table = Table()
    table.add_column("file", overflow="fold")
    columns = ["family", "layers", "rank", "‖ΔW‖", "triggers", "answer"]
    for column in [*columns, *(["AutoV3"] if hashes else [])]:
        table.add_column(column, no_wrap=column != "triggers")
    for path, result in rows.items():
        name = names[path].removesuffix(SUFFIX)
        if isinstance(result, str):
            table.add_row(name, "[red]refused[/]")
            continue
        contents, said = result
        cells = [
            name,
            escape(contents.family),
            str(len(contents.layers)),
            range_of(layer.rank for layer in contents.layers.values()),
            f"{contents.norm:.4g}" if contents.layers else "",
            escape(clean(", ".join(contents.description.triggers), 40)),
            f"[{COLORS.get(said.effect, 'red')}]{said.effect}[/]",
        ]
        table.add_row(*cells, *([contents.auto_v3] if hashes else []))
    hidden, unlimited = [], console.options.update(width=WIDE)
    for one in [
        column for name in LEAST_FIRST for column in table.columns if column.header == name
    ]:
        if console.measure(table, options=unlimited).maximum > console.width:
            table.columns.remove(one)
            hidden.append(str(one.header))
    console.print(table)
    if hidden:
        console.print(f"no room for {', '.join(hidden)}: --json FILE has all", soft_wrap=True)
    remarks: dict[tuple[str, str], list[str]] = {}
    for path, result in rows.items():
        effect, text = (
            ("", result) if isinstance(result, str) else (result[1].effect, result[1].text)
        )
        if effect != "whole":
            color = "red" if effect in ("", "family") else "yellow"
            remarks.setdefault((color, text), []).append(names[path])
    for (color, text), (first, *others) in remarks.items():
        more = f" and {len(others)} more" * bool(others)
        console.print(f"[{color}]{first}{more}[/]: {escape(text)}", soft_wrap=True)


Found = tuple[Contents, Answer] | str
"""What a file holds and what becomes of it, or why it is refused."""


def inspect(
    paths: list[str],
    base: str | None = None,
    layers: bool = False,
    hashes: bool = True,
    json: str | None = None,
    overwrite_output: bool = False,
) -> None:
    """Say what PATHS hold, files of adapters or folders of them, and why they may do nothing.

    One file is shown with its blocks; of several, each gets a row.

    Args:
        paths: Files of adapters, folders of PEFT, or folders that are searched for both.
        base: What the files are for: flux, sd3 or a folder of diffusers, whose layers they must
            fit; by default each file decides.
        layers: List every layer, with its size, rank, scale and the norm of its change.
        hashes: Compute the hashes AutoV2 and AutoV3, for which each file is read twice more.
        json: File to which everything is written as JSON, too.
        overwrite_output: Replace the file of --json if it exists.
    """
    files = find_files(paths)
    if json is not None:
        require_free(Path(json), overwrite=overwrite_output, option="--json")
        require_apart(Path(json), files, "--json")
    model = base_of(base)
    results: dict[Path, Found] = {}
    with counting("inspecting") if len(files) > 1 else nullcontext() as count:
        for path, root in files.items():
            results[path] = _examine(path, root, model, hashes=hashes)
            if count is not None:
                count(len(results), len(files))
    reasons = [result for result in results.values() if isinstance(result, str)]
    if len(reasons) == len(results):
        others = f", and {len(reasons) - 1} more files are refused" if len(reasons) > 1 else ""
        raise GatesError(reasons[0] + others)
    if json is not None:
        write_json(
            Path(json), {"files": [_state(path, result) for path, result in results.items()]}
        )
    console = plain_console()
    (first, *_) = results.values()
    if len(results) == 1 and not isinstance(first, str):
        show_contents(console, *first, layers=layers)
    else:
        show_summary(console, results, hashes=hashes)


def _examine(path: Path, root: Path, base: Base | None, *, hashes: bool) -> Found:
    """Examine a file; what is wrong with one is no reason not to show the others.

    A link that leads out of the folder ``root`` is not followed.
    """
    target = os.path.realpath(path / PEFT if path.is_dir() else path)
    if path != root and not Path(target).is_relative_to(os.path.realpath(root)):
        return f"{clean(str(path))} leads out of {clean(str(root))}: name the file that is meant"
    try:
        contents = examine(path, base, hashes=hashes)
        return contents, answer(path, contents)
    except GatesError as error:
        return str(error)


def _state(path: Path, found: Found) -> dict[str, Any]:
    if isinstance(found, str):
        return {"path": str(path), "refused": found}
    contents, said = found
    return {"path": str(path), "refused": None, **contents.state(), "answer": said._asdict()}
