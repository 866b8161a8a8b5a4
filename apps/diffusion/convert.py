"""``gates diffusion convert``: an adapter in the format of another program."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from apps.diffusion.adapter_files import (
    Format,
    Numbers,
    base_of,
    require_place,
    shrunk,
    storable,
    write,
)
from apps.diffusion.inspect import dialects, plain_console, show_notes
from core_gates.errors import GatesError
from diffusion.lora_file import LoraBundle, load_lora
from diffusion.lora_file.container import clean
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
        file: Filled in by the command line.
        output: Filled in by the command line.
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
    require_place(target, to, overwrite=overwrite_output)
    require_apart(target, [source], "OUTPUT")
    bundle = load_lora(source, base_of(base), strict=not lenient)
    kept, lost = storable(bundle, to, lenient=lenient)
    small, losses = shrunk(kept, to, rank, energy)
    console = plain_console()
    _print_mapping(console, source, bundle)
    for name, count in lost.items():
        console.print(f"left out: {count} layers of {name}: {to} cannot hold them")
    if losses is not None:
        console.print(losses.table())
    write(console, small, target, to, dtype)


def _print_mapping(console: Console, source: Path, bundle: LoraBundle) -> None:
    """Print what became of the tensors of a file."""
    report = bundle.report
    assert report is not None
    changed = [f"{len(bundle.modules)} layers"]
    changed += [f"{len(own)} of {name}" for name, own in bundle.text_encoders.items()]
    names = "; ".join(dialects(report.dialects))
    console.print(escape(f"{clean(source.name)}: {bundle.family}, {names}"))
    console.print(
        f"used: {len(report.used)} of {len(report.fates)} tensors, for {', '.join(changed)}"
    )
    left_out = {fate.key: fate.reason for fate in report.unused}
    show_notes(console, left_out, (*report.problems, *report.notes))
