"""Text of mixture models whose experts stay on disk, and what it takes."""

import time
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from apps.language.generate import EXPERTS, models_in, print_texts, shipped
from core_gates.errors import GatesError
from harness.command.verbs import Place
from harness.runs.cost import interleaved_times
from harness.runs.terminal import working
from language.generation import generate as continued
from language.hf.locate import require_transformers
from language.hf.model_folder import read_marks
from language.hf.pregating import restore_pregates
from language.hf.pretrained import Pretrained, pretrained_folder
from language.offload.guesses import FROM_PROFILE, Profile
from language.offload.loading import load_offloaded
from language.offload.setup import Setup
from language.offload.traces import read_trace
from language.seer.streaming import StreamedModel
from language.tokenizer import load_tokenizer

MAPPED = "mapped"


class WithoutGates(StreamedModel):
    """A model of transformers as a decoder of ours, with all of its attention."""

    def caches(self) -> list[Any]:
        """Return the empty cache of a batch, which all layers share."""
        self._seen = None
        return [DynamicCache(config=self.model.config)]


def offloaded(model: str, cache: Path, **options: Any) -> Pretrained:
    """Open a mixture model whose experts stay in its folder.

    Args:
        model: Folder as transformers writes it, or ``experts``, the mixture of bytes that ships.
        cache: Folder of experts in few bits.
        options: Those of ``load_offloaded``.
    """
    name = models_in(shipped(EXPERTS))[0] if model == EXPERTS else model
    folder = pretrained_folder(name, cache)
    with working(f"opening {model}"):
        streamed = load_offloaded(folder, cache=cache, **options)
    context = getattr(streamed.config.get_text_config(), "max_position_embeddings", None)
    return Pretrained(streamed, load_tokenizer(folder), folder, context)


def setup_text(setup: Setup) -> str:
    """Return a setup in words."""
    width = f", width {setup.width}" if setup.width else ""
    return f"{setup.policy}, {setup.allocation}, guesses {setup.predictor}{width}"


def learned(profile: str | None, setup: Setup) -> Profile | None:
    """Return the profile of routing in the trace ``profile``; None without one.

    Raises:
        GatesError: ``--profile`` is given, and the setup does not use it; or see
            `language.offload.traces.read_trace`.
    """
    if profile is None:
        return None
    if setup.policy != "static" and setup.predictor not in FROM_PROFILE:
        raise GatesError(
            f"--profile is not used by --policy {setup.policy} --predictor {setup.predictor}: drop"
            f" it, or choose --policy static or --predictor {' or '.join(FROM_PROFILE)}"
        )
    return read_trace(Path(profile)).profile()


def generate(
    place: Place,
    model: str,
    setup: Setup,
    prompt: str,
    max_tokens: int = 100,
    temperature: float = 1.0,
    seed: int = 0,
    budget: float = 0.25,
    profile: str | None = None,
) -> None:
    """Continue a prompt by MODEL within a budget for experts, and print what was read.

    Args:
        place: Filled in by the command line.
        model: Folder of a mixture model, or experts, the mixture of bytes that ships.
        setup: Filled in by the command line.
        prompt: Text that is continued.
        max_tokens: The most tokens that are added.
        temperature: Scale of the randomness; 0 always takes the most likely token.
        seed: Seed of all random choices.
        budget: Bytes for experts, or a fraction of the bytes of all experts up to 1.0.
        profile: File of ``offload profile`` for the policy static, and the predictors that learn
            from it; none if null.
    """
    if not prompt:
        raise GatesError("--prompt is empty: give a text that is continued")
    used = learned(profile, setup)
    cache = place.run_folder.path.parent / "cache"
    pretrained = offloaded(model, cache, budget=budget, setup=setup, profile=used)
    begin, ends = read_marks(pretrained.folder)
    streamed: Any = WithoutGates(pretrained)
    begun = time.monotonic()
    chunks = continued(
        streamed,
        [[pretrained.tokenizer.end if begin is None else begin,
          *pretrained.tokenizer.encode(prompt).tolist()]],
        decode=pretrained.tokenizer.decode, max_tokens=max_tokens, temperature=temperature,
        seed=seed, end=ends or pretrained.tokenizer.end,
    )  # fmt: skip
    tokens = print_texts(chunks, [prompt], alone=True)
    seconds, counts = time.monotonic() - begun, pretrained.model.offload.counts
    pretrained.model.offload.close()
    uses, right = counts.hits + counts.guessed + counts.loads, max(1, counts.guessed)
    print(
        f"{tokens / seconds:.1f} tokens/s, {counts.stall / seconds:.0%} of the time stalled;"
        f" {(counts.bytes - counts.unread) / 1e6:,.1f} MB read; of {uses:,} uses"
        f" {counts.hits / uses:.1%} were there,"
        f" {counts.guessed / uses:.1%} guessed, {counts.late / right:.1%} of them late"
    )


def bench(
    place: Place,
    model: str,
    setup: Setup,
    budget: float = 0.25,
    tokens: int = 32,
    repeats: int = 5,
    profile: str | None = None,
) -> None:
    """Measure seconds per token of MODEL in memory, on demand and with a setup, alternately.

    The system keeps in its page cache what was read before: drop it to measure a disk.

    Args:
        place: Filled in by the command line.
        model: Folder of a mixture model, or experts, the mixture of bytes that ships.
        setup: Filled in by the command line.
        budget: Bytes for experts, or a fraction of the bytes of all experts up to 1.0.
        tokens: Tokens that are generated.
        repeats: Runs of each.
        profile: File of ``offload profile`` for the policy static, and the predictors that learn
            from it; none if null.
    """
    if tokens < 1 or repeats < 1:
        raise GatesError(f"--tokens is {tokens} and --repeats {repeats}: expected 1 or more")
    used = learned(profile, setup)
    cache = place.run_folder.path.parent / "cache"
    opened = {
        "on-demand": offloaded(model, cache, budget=budget),
        setup_text(setup): offloaded(model, cache, budget=budget, setup=setup, profile=used),
    }
    whole = require_transformers().AutoModelForCausalLM.from_pretrained(
        opened["on-demand"].folder, dtype="auto", experts_implementation="eager"
    )
    restore_pregates(whole)
    models = {MAPPED: whole.eval()} | {
        name: pretrained.model for name, pretrained in opened.items()
    }
    ids = torch.tensor([[*opened["on-demand"].tokenizer.encode("import ").tolist()]])
    runs = {
        name: partial(
            runner.generate, ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
        for name, runner in models.items()
    }
    with working("generating"):
        seconds = interleaved_times(runs, repeats)
    table = Table(*("method", "ms per token", "quartiles", "MB read"))
    for name, durations in seconds.items():
        low, middle, high = (f"{1e3 * s / tokens:.2f}" for s in quantiles(durations * 2, n=4))
        counts = opened[name].model.offload.counts if name in opened else None
        read = f"{(counts.bytes - counts.unread) / 1e6 / (repeats + 1):,.1f}" if counts else ""
        table.add_row(name, middle, f"{low}–{high}", read)
    Console().print(table)
    for pretrained in opened.values():
        pretrained.model.offload.close()
