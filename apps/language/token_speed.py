"""``gates language diagnose --speed``: tokens a second of decoding with block gates, by length."""

from pathlib import Path

from core_gates.errors import GatesError
from harness.runs.terminal import ticking
from language.hf.pretrained import Pretrained
from language.seer.block_files import load_block_gates
from language.seer.speed import BUDGET, LENGTHS, token_milliseconds, write_speed


def time_tokens(found: Pretrained, gates: str | None, folder: Path) -> None:
    """Time a token at all lengths that the model reads, and write from which on gates pay.

    Args:
        found: The model.
        gates: File of gates for decoding.
        folder: Where ``generate`` looks for the times.

    Raises:
        GatesError: There is no file, it holds gates for prompts, or the model reads too few tokens.
    """
    if gates is None:
        raise GatesError("--speed times block gates for decoding: give their file by --gates")
    attached = load_block_gates(found.model, gates)
    kind = next(iter(attached.values())).kind
    if kind != "decode":
        raise GatesError(f"{gates} holds gates for {kind}, expected gates for decode")
    lengths = [n for n in LENGTHS if found.context is None or n <= found.context]
    found.require_context(min(LENGTHS))
    times = {}
    with ticking("timing tokens", len(lengths), unit="lengths") as tick:
        for length in lengths:
            times[length] = token_milliseconds(found.model, length)
            tick()
    path, start = write_speed(folder, found.model, times)
    for length, of in times.items():
        print(f"after {length:,}: " + ", ".join(f"{n} {ms:.1f} ms" for n, ms in of.items()))
    print(f"with a budget of {BUDGET} tokens, gates are faster from {start or 'no length'} on")
    print(path)
