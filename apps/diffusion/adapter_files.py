"""Files of adapters on the command line: which are meant, their strengths, how they are written."""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from core_gates.errors import GatesError
from diffusion.fusion.protocol import ROLES, role_of, with_roles
from diffusion.lora_file import LoraBundle, save_lora, shrink_bundle
from diffusion.lora_file.container import FormatError
from diffusion.lora_file.dialects import Style, laid_out, program_style
from diffusion.lora_file.family import FAMILIES
from diffusion.lora_file.inspection import block_of, relative_errors
from diffusion.lora_file.reading import Base
from diffusion.lora_file.recognition import modules_in
from diffusion.lora_file.scales import CONFIG, WEIGHTS
from diffusion.lora_file.writing import text_encoders
from harness.files import require_free
from harness.runs.terminal import readable

SUFFIX = ".safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
PEFT = "adapter_model" + SUFFIX  # name of the file in a folder of PEFT


def find_files(paths: Iterable[str]) -> dict[Path, Path]:
    """Return the files and folders of PEFT among paths and in the folders among them.

    Args:
        paths: Files, or folders, which are searched with the folders below; links to folders are
            not followed.

    Returns:
        Each with the path that it was found by.

    Raises:
        GatesError: A path does not exist, or a folder holds no adapter.
    """
    folders: dict[Path, Path] = {}
    for name in paths:
        path = Path(name)
        if not path.exists():
            raise GatesError(f"{path} does not exist: name a {SUFFIX} file or a folder of them")
        inside = list(_within(path)) if path.is_dir() else [path]
        if not inside:
            raise GatesError(f"{path} holds no {SUFFIX} file: name a file, or another folder")
        folders |= dict.fromkeys(inside, path)
    return folders


def _within(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder, sorted; pickles, too, so that it is told that they are refused."""
    for place, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if PEFT in names:
            yield Path(place)
        for name in sorted(names):
            is_weights = name.endswith(SUFFIX) or name.endswith(PICKLES)
            if is_weights and name != PEFT and not name.startswith("."):
                yield Path(place, name)


def base_of(text: str | None) -> Base | None:
    """Return the base model that an option ``--base`` names; None without one.

    Args:
        text: A family, a folder of diffusers, or None.

    Raises:
        GatesError: It is neither.
    """
    if text is None or text in FAMILIES:
        return text
    if Path(text).is_dir():
        return modules_in(Path(text))
    families = " or ".join(FAMILIES)
    raise GatesError(f"--base is {text!r}, expected {families}, or a folder of diffusers")


_NAME = re.compile(r"[A-Za-z0-9._ +()-]{1,128}")


def named_files(files: Sequence[str]) -> dict[str, Path]:
    """Return the name of each adapter and where it lies.

    Args:
        files: Paths, whose stems are the names, or ``NAME=PATH``.

    Raises:
        GatesError: A file is missing, or two have one name.
    """
    paths: dict[str, Path] = {}
    for text in files:
        name, equals, place = text.partition("=")
        path = Path(place) if equals and not Path(text).exists() else Path(text)
        if path == Path(text):
            name = path.name if path.is_dir() else path.stem
        if not path.exists():
            raise GatesError(f"{path} does not exist: name a .safetensors file")
        if not _NAME.fullmatch(name):
            raise GatesError(
                f"{name!r} is no name for an adapter: name it by NAME=PATH, in letters, digits, "
                "dots and dashes"
            )
        if name in paths:
            raise GatesError(
                f"{paths[name]} and {path} are both called {name!r}: name one by NAME=PATH"
            )
        paths[name] = path
    return paths


STRONGEST = 1000  # strength of an adapter; beyond it, images are NaN


def strengths_of(text: str, names: Sequence[str], option: str = "--weights") -> dict[str, float]:
    """Return the strength of each adapter.

    Args:
        text: Such as ``a:0.8,b``, where b has strength 1, or ``0.8,1``, one number per adapter.
        names: Of the adapters; those that are not named have strength 1.
        option: That the text comes from.

    Raises:
        GatesError: A name is unknown or occurs twice, or a strength is no finite number of at
            most 1000.
    """
    parts = [part.strip() for part in text.split(",")]
    what = "blocks" if option == "--blocks" else "adapters"
    if not any(":" in part or part in names for part in parts):
        if len(parts) != len(names):
            raise GatesError(f"{option} gives {len(parts)} numbers for {len(names)} {what}")
        return {n: _number(part, n, option) for n, part in zip(names, parts, strict=True)}
    strengths: dict[str, float] = {}
    for part in parts:
        name, colon, number = part.partition(":")
        if name not in names:
            close = get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
            raise GatesError(f"{option} names {name!r}, which is none of the {what} ({hint})")
        if name in strengths:
            raise GatesError(f"{option} names {name!r} twice: name it once")
        strengths[name] = _number(number, name, option) if colon else 1.0
    return {name: strengths.get(name, 1.0) for name in names}


def roles_in(text: str | None) -> dict[str, str]:
    """Return the roles of adapters that ``--roles`` tells, such as ``a:subject,b:style``.

    Raises:
        GatesError: A part names no adapter or no role.
    """
    roles: dict[str, str] = {}
    for part in [] if text is None else text.split(","):
        name, _, role = part.strip().rpartition(":")
        if not name or role not in ROLES:
            raise GatesError(f"--roles is {text!r}, expected adapters with one of {list(ROLES)},"
                             " such as a:subject,b:style")  # fmt: skip
        if name in roles:
            raise GatesError(f"--roles names {name!r} twice: give each adapter one role")
        roles[name] = role
    return roles


def _number(text: str, name: str, option: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= STRONGEST:
        raise GatesError(
            f"{option} gives {name!r} the strength {text!r}, expected a finite number, at most "
            f"{STRONGEST} in size: 1 is as trained"
        )
    return value


def roles_of(
    adapters: Mapping[str, LoraBundle],
    given: Mapping[str, str],
    *,
    ask: bool = True,
) -> dict[str, str]:
    """Return the role of each adapter: as given, or by the tags of files.

    Args:
        adapters: Name -> adapter.
        given: Name -> role; others have the role of their tags, or ``any``.
        ask: Whether roles have to be known of two adapters and more.

    Raises:
        GatesError: A name or a role is unknown, or roles are to be given.
    """
    filled = with_roles({name: role_of(adapter) for name, adapter in adapters.items()}, given)
    if ask and not given and len(filled) > 1 and ROLES[0] in filled.values():
        raise GatesError(
            f"nothing decides which of {', '.join(filled)} is the subject: give"
            f" --roles, such as {':subject,'.join([*filled][:2])}:style"
        )
    return filled


Format = Literal["diffusers", "peft", "kohya", "bfl", "comfyui"]
Numbers = Literal["bf16", "fp16", "fp32"]
DTYPES: dict[Numbers, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def require_place(
    output: Path, to: Format | None, *, overwrite: bool, option: str = "--output"
) -> None:
    """Refuse a place for an adapter that cannot be written, before anything is read.

    Args:
        output: The place.
        to: Format of the adapter; None for a file in the dialect of another.
        overwrite: Whether an adapter may be replaced.
        option: Option that names the place.

    Raises:
        GatesError: It is taken and ``overwrite`` is not asked for, or is a folder with other files
            than those of an adapter, which are never replaced.
    """
    require_free(output, overwrite=overwrite, option=option)
    if to != "peft" and output.suffix != ".safetensors":
        raise GatesError(f"{output} must end with .safetensors, as it is a single file")
    if not output.is_dir():
        return
    others = sorted(path.name for path in output.iterdir() if path.name not in (CONFIG, WEIGHTS))
    if to != "peft" or others:
        what = f"with {others[0]} in it" if others else f"and {to or 'the result'} is a file"
        raise GatesError(
            f"{output} is a folder {what}, which is not replaced: choose another {option}"
        )


def range_of(values: Iterable[float]) -> str:
    """Return the smallest and the largest of some numbers in words; empty where there are none."""
    texts = [f"{value:.4g}" for value in sorted(values)]
    return " to ".join(dict.fromkeys(texts[:1] + texts[-1:]))


def shrunk(
    console: Console,
    bundle: LoraBundle,
    to: str | Style,
    rank: int | None,
    energy: float | None,
) -> LoraBundle:
    """Return an adapter of lower ranks and print what is lost, or the same where nothing is asked.

    Raises:
        LoraFileError: ``rank`` or ``energy`` is out of range.
    """
    if rank is None and energy is None:
        return bundle
    style = to if isinstance(to, Style) else program_style(to, bundle.family)
    small, errors = shrink_bundle(bundle, rank, energy, fused=style is not None and style.fuses)
    table = Table("block", "rank", "shrunk to", "‖ΔW − ΔW'‖ / ‖ΔW‖")
    ranks = bundle.ranks(), small.ranks()
    for block, error in relative_errors(errors, bundle.norms()).items():
        cells = [range_of(r for n, r in values.items() if block_of(n) == block) for values in ranks]
        table.add_row(block, *cells, f"{error:.2e}" if error else "0")
    console.print(table)
    return small


def with_names(console: Console, bundle: LoraBundle, to: str | Style) -> str | Style:
    """Return the format, or ``diffusers`` where the dialect of the first file lacks a name."""
    if isinstance(to, Style) and bundle.family in FAMILIES:
        try:
            laid_out(bundle, to)
        except FormatError as error:
            why = str(error).removesuffix("; choose another format")
            console.print(escape(f"written for diffusers: {why}"), soft_wrap=True)
            return "diffusers"
    return to


def storable(console: Console, bundle: LoraBundle, to: str | Style, *, lenient: bool) -> LoraBundle:
    """Return an adapter without the text encoders that a format cannot hold, and print these.

    Raises:
        GatesError: There are some and ``lenient`` is not asked for, or nothing else is left.
    """
    holds, trained = text_encoders(to, bundle.family), bundle.text_encoders
    lost = [f"{len(trained[name])} layers of {name}" for name in trained if name not in holds]
    kept = {name: layers for name, layers in trained.items() if name in holds}
    if lost and not (lenient and (bundle.modules or kept)):
        way = "choose another --to, or add --lenient to leave them out"
        if not bundle.modules and not kept:
            way = "and there is nothing else: choose another --to"
        raise GatesError(f"{to} cannot hold {', '.join(lost)}: {way}")
    for what in lost:
        console.print(escape(f"left out: {what}: {to} cannot hold them"))
    return dataclasses.replace(bundle, text_encoders=kept)


def layers_in(bundle: LoraBundle) -> str:
    """Return the number of layers of an adapter in words, also those of text encoders."""
    parts = [f"{len(layers)} of {name}" for name, layers in bundle.text_encoders.items()]
    return ", ".join([f"{len(bundle.modules)} layers", *parts])


def write(
    console: Console, bundle: LoraBundle, output: Path, to: str | Style, dtype: Numbers | None
) -> None:
    """Write an adapter and print what was written, the path last.

    Raises:
        GatesError: The format cannot hold it, or the place cannot be written.
    """
    save_lora(bundle, output, to, None if dtype is None else DTYPES[dtype])
    files = list(output.iterdir()) if output.is_dir() else [output]
    size = sum(file.stat().st_size for file in files)
    console.print(escape(f"written as {to}: {layers_in(bundle)}, {readable(size, 'bytes')}"))
    console.print(escape(str(output)), soft_wrap=True)
