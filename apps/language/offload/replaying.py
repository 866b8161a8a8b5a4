"""Traces of mixture models whose experts stay on disk, and the time that they would take."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from apps.language.diagnose import beginnings, require_documents
from apps.language.offload.running import MAPPED, offloaded, setup_text
from core_gates.errors import GatesError
from harness.command.verbs import Place
from harness.files import require_free
from harness.runs.cost import interleaved_seconds
from harness.runs.terminal import ticking, working
from language.corpus import read_corpus
from language.offload.quantization import GROUP, quantize, unpack
from language.offload.setup import ON_DEMAND, Setup, Transferred
from language.offload.simulation import (
    Cost,
    Replayed,
    Simulation,
    Times,
    choose,
    left_out,
    rivals,
)
from language.offload.traces import Step, Trace, read_trace, record, write_trace

AUTO = "auto"
PRINTED = ("wall", "stall", "bytes", "uses", "hits", "guessed", "late")


def profile(
    place: Place,
    model: str,
    output: str,
    corpus: tuple[str, ...] = ("python",),
    documents: int = 8,
    tokens: int = 256,
    prompt: int = 32,
    budget: float = 0.5,
    overwrite_output: bool = False,
) -> None:
    """Record in OUTPUT which experts of MODEL the tokens of documents use, and which are guessed.

    Args:
        place: Filled in by the command line.
        model: Folder of a mixture model, or experts, the mixture of bytes that ships.
        output: File of JSON lines that is written.
        corpus: Files, folders, or python, of whose held-out documents the beginnings are read.
        documents: The most documents that are read.
        tokens: Tokens of a document that are read.
        prompt: Tokens of them that are read at once; the others count as decoded one by one.
        budget: Bytes for experts, or a fraction of the bytes of all experts up to 1.0.
        overwrite_output: Replace the output if it exists.
    """
    path = Path(output)
    require_free(path, overwrite=overwrite_output, option="OUTPUT", file=True)
    if documents < 1 or not 1 <= prompt < tokens:
        raise GatesError(
            f"--documents is {documents}, --tokens {tokens} and --prompt {prompt}: expected a"
            " document or more, and a prompt of one token or more that is not all of it"
        )
    pretrained = offloaded(model, place.run_folder.path.parent / "cache", budget=budget)
    pretrained.require_context(tokens)
    _, texts = beginnings(pretrained, read_corpus(corpus).part("validation"), tokens, documents)
    require_documents(texts, tokens)
    traced: list[list[Step]] = []
    with ticking("reading", len(texts), unit="documents") as tick:
        for text in texts:
            traced.append(record(pretrained.model, torch.tensor(text))[0].split(prompt))
            tick()
    write_trace(path, Trace(pretrained.model.offload.sizes, traced))
    pretrained.model.offload.close()
    each = seconds_to_unpack(pretrained.model.offload.sizes.weights, pretrained.model.dtype)
    print(
        f"{sum(map(len, traced)):,} steps of {len(texts)} documents;"
        f" --unpack {each:.2g} is what INT4 takes"
    )
    print(path)


def seconds_to_unpack(weights: int, dtype: torch.dtype) -> float:
    """Return the median of eleven measured times in which an expert in INT4 becomes numbers.

    Args:
        weights: Of the expert.
        dtype: Of the model.
    """
    packed = quantize(torch.randn(-(-weights // GROUP) * GROUP), 4)
    into = torch.empty(weights, dtype=dtype)
    return interleaved_seconds({"int4": lambda: unpack(packed, 4, into)}, rounds=11)["int4"]


def replay(
    trace: str,
    profile: str | None = None,
    budget: float = 0.25,
    compute: float = 1e-3,
    link: float = 1e9,
    transfer: Transferred = "stored",
    unpack: float = 0.0,
) -> None:
    """Simulate what the documents of TRACE take within a budget, by every method.

    Args:
        trace: File of ``offload profile``.
        profile: Another one, of which methods learn; the first half of the documents if null.
        budget: Fraction of all experts that there is memory for.
        compute: Seconds that a token takes in a layer.
        link: Bytes per second that experts are read with.
        transfer: Numbers that experts travel in.
        unpack: Seconds in which an expert in few bits becomes numbers of the model again; the
            command ``offload profile`` measures them.
    """
    if not 0 < budget <= 1 or not (
        0 < compute < math.inf and 0 < link < math.inf and 0 <= unpack < math.inf
    ):
        raise GatesError(
            f"--budget is {budget}, --compute {compute}, --link {link} and --unpack {unpack}:"
            " expected a fraction, two finite rates above 0 and seconds"
        )
    if unpack and transfer == "stored":
        raise GatesError(f"--unpack {unpack} is for few bits: give a --transfer, or drop it")
    recorded = read_trace(Path(trace))
    documents, half = recorded.documents, 0 if profile else len(recorded.documents) // 2
    learned = read_trace(Path(profile)) if profile else Trace(recorded.sizes, documents[:half])
    if learned.sizes != recorded.sizes:
        raise GatesError(f"{profile} is of {learned.sizes}, {trace} of {recorded.sizes}")
    if not learned.documents:
        raise GatesError(f"{trace} has one document: give another file by --profile")
    used = learned.profile()
    held = [Replayed(document, recorded.sizes, used) for document in documents[half:]]
    profiled = left_out(learned.documents, recorded.sizes)
    shared = [
        replayed
        for replayed in held
        if profile and any(_same(replayed, other) for other in profiled)
    ]
    if shared:
        raise GatesError(
            f"{profile} has {len(shared)} of {len(held)} documents of {trace}, so that methods"
            " would know them: give others, or drop --profile"
        )
    size = int(budget * recorded.sizes.layers * recorded.sizes.experts)
    with working("simulating"):
        times, setup = compared(profiled, held, size, Cost(compute, link, unpack), transfer)
    print_times(times)
    print(f"simulated, {len(held)} documents, {size} experts in memory; auto: {setup_text(setup)}")


def print_times(times: Mapping[str, Sequence[Times]]) -> None:
    """Print a line for each method, of all documents together."""
    table = Table(*("method", "seconds", "stalled", "MB read", "there", "guessed", "late"))
    for name, ones in times.items():
        wall, stall, volume, uses, *used = (sum(getattr(o, n) for o in ones) for n in PRINTED)
        shares = (f"{share / uses:.1%}" for share in used)
        table.add_row(name, f"{wall:.3f}", f"{stall:.3f}", f"{volume / 1e6:,.1f}", *shares)
    Console().print(table)


def _same(document: Replayed, other: Replayed) -> bool:
    """Whether two documents begin with the same tokens, as far as the shorter one reaches."""
    return all(map(torch.equal, document.last, other.last))


def compared(
    known: Sequence[Replayed], held: Sequence[Replayed], budget: int, cost: Cost,
    transfer: Transferred = "stored",
) -> tuple[dict[str, list[Times]], Setup]:  # fmt: skip
    """Return the times of held-out documents under every method, and the setup ``auto`` chose.

    Args:
        known: Documents that ``auto`` is chosen on.
        held: Documents that are simulated.
        budget: Experts that there is memory for.
        cost: Of computing and reading.
        transfer: Numbers that experts travel in.
    """
    sizes, setup = held[0].sizes, choose(known, budget, cost, transfer)
    setups = {**rivals(sizes, budget, transfer), AUTO: setup}
    times = {n: [Simulation(o, s, budget, cost).run() for o in held] for n, s in setups.items()}
    mapped = [Simulation(document, ON_DEMAND, budget, cost, mapped=True).run() for document in held]
    return {**times, MAPPED: mapped}, setup
