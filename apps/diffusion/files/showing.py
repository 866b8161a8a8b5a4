"""What is in a file of adapters, on the terminal."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apps.diffusion.files.answer import Answer, listed_triggers
from apps.diffusion.files.sources import SUFFIX
from diffusion.lora_file.container import clean
from diffusion.lora_file.inspection import Contents
from diffusion.lora_file.report import Dialect
from harness.planning.table import readable

SHOWN = 8  # tags, tensors left out
COMMENT = 300  # letters
NAME = 120  # letters of a path
BAR = 20  # letters of the longest norm
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
    for name, reason in list(contents.left_out.items())[:SHOWN]:
        console.print(f"left out: {escape(clean(name, 160))}: {escape(reason)}")
    if (more := len(contents.left_out) - SHOWN) > 0:
        console.print(f"left out: {more} more tensors")
    for odd in contents.odd:
        console.print(f"[yellow]note[/]: {escape(odd)}")
    show_answer(console, said)


def show_answer(console: Console, said: Answer) -> None:
    """Print what becomes of a file where it is loaded; a command is never broken into lines."""
    color = COLORS.get(said.effect, "red")
    console.print(f"[{color}]answer[/]: {escape(said.text)}")
    if said.fix:
        console.print(f"fix: {escape(clean(said.fix))}", soft_wrap=True)


def facts(contents: Contents) -> dict[str, str]:
    """Return what a file is, as text."""
    told = contents.description
    tags = [f"{tag} {count}" if count else tag for tag, count in list(told.tags.items())[:SHOWN]]
    return {
        "family": f"{contents.family} ({contents.evidence})",
        "dialect": "; ".join(dialects(contents.dialects)),
        "layers": _counts(contents),
        "rank": _range(layer.rank for layer in contents.layers.values()),
        "scale": _range(layer.scale for layer in contents.layers.values()),
        "‖ΔW‖": f"{contents.norm:.4g}" if contents.layers else "",
        "stored as": f"{contents.storage} {readable(contents.size, 'bytes')}".strip(),
        "title": told.title,
        "author": told.author,
        "triggers": _triggers(contents),
        "tags": ", ".join(tags) + (" ..." if len(told.tags) > SHOWN else ""),
        "license": told.license or "none stated",
        "trained on": told.base,
        "comment": clean(told.comment, COMMENT),
        "AutoV2": contents.auto_v2,
        "AutoV3": contents.auto_v3,
    }


def dialects(found: Sequence[Dialect]) -> list[str]:
    """Return each way of naming layers, with the spellings of its factors."""
    groups: dict[tuple[str, str], list[Dialect]] = {}
    for one in found:
        groups.setdefault((one.prefix, one.names), []).append(one)
    lines = []
    for (prefix, names), own in groups.items():
        underscored = " with underscores" if any(one.underscored for one in own) else ""
        spellings = ", ".join(dict.fromkeys(one.factors for one in own))
        lines.append(f"{prefix or 'no prefix'}, {names} names{underscored} ({spellings})")
    return lines


def _counts(contents: Contents) -> str:
    if not contents.layers and not contents.text_encoders:
        return ""
    parts = [f"{len(contents.layers)} of the transformer"]
    parts += [f"{len(own)} of {name}" for name, own in contents.text_encoders.items()]
    dora = sum(layer.dora for layer in contents.layers.values())
    return ", ".join(parts) + (f"; {dora} are DoRA" if dora else "")


def _triggers(contents: Contents) -> str:
    told = contents.description
    if told.triggers:
        return listed_triggers(told.triggers)
    folders = f"; folder of training images: {listed_triggers(told.folders)}"
    return "none stated" + (folders if told.folders else "")


def _range(values: Iterable[float]) -> str:
    found = sorted(values)
    if not found:
        return ""
    low, high = f"{found[0]:.4g}", f"{found[-1]:.4g}"
    return low if low == high else f"{low} to {high}"


def _blocks(contents: Contents) -> Table:
    norms = contents.norms()
    table = Table("block", "layers", "rank", "‖ΔW‖", "")
    for block, names in contents.blocks().items():
        rank = _range(contents.layers[name].rank for name in names)
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
    return "█" * round(BAR * norm / most) if most > 0 and norm == norm and most == most else ""


def show_summary(
    console: Console, rows: Mapping[Path, tuple[Contents, Answer] | str], *, hashes: bool
) -> None:
    """Print one row per file; what could not be read is told below."""
    names = names_of(rows)
    table = Table()
    table.add_column("file", overflow="fold")
    columns = ["family", "layers", "rank", "‖ΔW‖", "triggers", "diffusers"]
    for column in [*columns, *(["AutoV3"] if hashes else [])]:
        table.add_column(column, no_wrap=column != "triggers")
    for path, found in rows.items():
        name = names[path].removesuffix(SUFFIX)
        if isinstance(found, str):
            table.add_row(name, "[red]refused[/]")
            continue
        contents, said = found
        color = COLORS.get(said.effect, "red")
        cells = [
            name,
            escape(contents.family),
            str(len(contents.layers)),
            _range(layer.rank for layer in contents.layers.values()),
            f"{contents.norm:.4g}" if contents.layers else "",
            escape(clean(", ".join(contents.description.triggers), 40)),
            f"[{color}]{said.effect}[/]",
        ]
        table.add_row(*cells, *([contents.auto_v3] if hashes else []))
    console.print(table)
    for path, found in rows.items():
        if isinstance(found, str):
            console.print(f"[red]{names[path]}[/]: {escape(found)}", soft_wrap=True)
    for path, found in rows.items():
        if not isinstance(found, str) and found[1].effect != "whole":
            console.print(f"[yellow]{names[path]}[/]: {escape(found[1].text)}", soft_wrap=True)


def names_of(paths: Iterable[Path]) -> dict[Path, str]:
    """Return paths without the folder that all lie in, as markup; many files are called alike."""
    found = list(paths)
    common = Path(os.path.commonpath([path.absolute().parent for path in found]))
    return {path: escape(clean(str(path.absolute().relative_to(common)), NAME)) for path in found}
