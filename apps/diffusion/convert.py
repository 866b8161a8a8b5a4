"""``gates diffusion convert`` and ``resize``: a file of an adapter written as another."""

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from apps.diffusion.adapter_files import (
    DTYPES,
    Format,
    Numbers,
    base_of,
    layers_in,
    require_place,
    shrunk,
    storable,
    write,
)
from apps.diffusion.inspect import dialects, plain_console, show_notes
from core_gates.errors import GatesError
from diffusion.lora_file import LoraBundle, load_lora
from diffusion.lora_file.container import FamilyError, clean
from diffusion.lora_file.dialects import Style, own_style, refuse_unlike, style_of
from harness.files import require_apart


def convert(
    file: str,
    output: str,
    to: Format = "diffusers",
    rank: int | None = None,
    energy: float | None = None,
    dtype: Numbers | None = None,
    base: str | None = None,
    lenient: bool = False,
    overwrite_output: bool = False,
) -> None:
    """Write the adapter in FILE as OUTPUT, in the format of another program.

    FILE is a .safetensors file in any dialect, or a folder of PEFT; OUTPUT a .safetensors file, or
    a folder for peft. Nothing is left out silently: what cannot be read or written is an error.

    Args:
        file: Adapter that is read, a .safetensors file or a folder of PEFT.
        output: File that is written; a folder for peft.
        to: Format of the output.
        rank: Components per layer that are kept at most; the best approximation is written.
        energy: Fraction of the squared norm of each change that is kept at least, in (0, 1].
        dtype: Numbers of the output; by default those of the file, where they are exact.
        base: What the file is for: flux, sd3 or a folder of diffusers, whose layers it must fit; by
            default the file decides.
        lenient: Leave out what cannot be used or written, and list it, instead of refusing it.
        overwrite_output: Replace the output if it exists.
    """
    source, target = Path(file), Path(output)
    if not source.exists():
        raise GatesError(f"{source} does not exist: name a .safetensors file or a folder of PEFT")
    require_place(target, to, overwrite=overwrite_output, option="OUTPUT")
    require_apart(target, [source], "OUTPUT")
    style: Style | str = to
    try:
        bundle = load_lora(source, base_of(base), strict=not lenient)
    except FamilyError:  # of other families, files are written in their own dialect alone
        bundle = load_lora(source, base_of(base), strict=not lenient, any_family=True)
        if (own := own_style(bundle, to)) is None:
            raise
        refuse_unlike({source.stem: bundle})
        style = own
    console = plain_console()
    _print_mapping(console, source, bundle)
    kept = storable(console, bundle, style, lenient=lenient)
    write(console, shrunk(console, kept, style, rank, energy), target, style, dtype)


def resize(
    file: str,
    output: str,
    rank: int | None = None,
    energy: float | None = None,
    dtype: Numbers | None = None,
    overwrite_output: bool = False,
) -> None:
    """Write the best approximation of FILE, for any model, with lower ranks as OUTPUT.

    Args:
        file: Adapter that is read, a .safetensors file or a folder of PEFT.
        output: File that is written; a folder if FILE is one.
        rank: Components per layer that are kept at most.
        energy: Fraction of the squared norm of each change that is kept at least, in (0, 1].
        dtype: Numbers of the output; by default those of the file.
        overwrite_output: Replace the output if it exists.
    """
    source, target = Path(file), Path(output)
    if not source.exists():
        raise GatesError(f"{source} does not exist: name a .safetensors file or a folder of PEFT")
    if rank is None and energy is None:
        raise GatesError("nothing says how far to shrink: give --rank or --energy")
    folder: Format | None = "peft" if source.is_dir() else None
    require_place(target, folder, overwrite=overwrite_output, option="OUTPUT")
    require_apart(target, [source], "OUTPUT")
    bundle, console = named_after(target, load_lora(source, any_family=True)), plain_console()
    to = folder or style_of(bundle)
    small = shrunk(console, bundle, to, rank, energy)
    numbers = {f"torch.{name}": short for short, name in DTYPES.items()}
    write(console, small, target, to, dtype or numbers.get(str(small.storage)))


def named_after(output: Path, bundle: LoraBundle) -> LoraBundle:
    """Return an adapter whose name for kohya's programs, if it has one, is that of the output."""
    names = {"ss_output_name": output.name.removesuffix(".safetensors")}
    metadata = {key: names.get(key, text) for key, text in bundle.metadata.items()}
    return dataclasses.replace(bundle, metadata=metadata)


def _print_mapping(console: Console, source: Path, bundle: LoraBundle) -> None:
    """Print what became of the tensors of a file."""
    report = bundle.report
    assert report is not None
    names = "; ".join(dialects(report.dialects))
    console.print(escape(f"{clean(source.name)}: {bundle.family}, {names}"))
    counts = f"{len(report.used)} of {len(report.fates)} tensors, for {layers_in(bundle)}"
    console.print(f"used: {counts}")
    show_unused(console, bundle)


def show_unused(console: Console, bundle: LoraBundle, label: str = "") -> None:
    """Print the tensors of a file that are left out, and what is unusual, after a label."""
    report = bundle.report
    assert report is not None
    left_out = {f"{label}{fate.key}": fate.reason for fate in report.unused}
    show_notes(console, left_out, [f"{label}{note}" for note in (*report.problems, *report.notes)])
