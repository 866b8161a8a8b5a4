"""Traces: which experts tokens used, layer by layer, and which were guessed. JSON lines."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core_gates.errors import GatesError
from harness.files import write_text
from language.offload.guesses import Seen, cross_layer
from language.offload.setup import Sizes

RECORDED = 4
"""Guesses that are recorded, in experts of a token."""


class Step(NamedTuple):
    """One call of the model with T tokens.

    Attributes:
        document: Number of the text; caches are empty before the first step of each.
        routed: Experts (L, T, K).
        ranked: Guesses of ``cross-layer`` for all layers but the first (L - 1, T, W), the best
            first.
    """

    document: int
    routed: Tensor
    ranked: Tensor


class Trace(NamedTuple):
    """Steps of one model, those of a document next to each other and in order."""

    sizes: Sizes
    steps: list[Step]

    def documents(self) -> list[list[Step]]:
        """Return the steps of each document."""
        numbers = dict.fromkeys(step.document for step in self.steps)
        return [[step for step in self.steps if step.document == one] for one in numbers]

    def profile(self) -> list[Tensor]:
        """Return for each layer the experts (N, K) of tokens in order of use."""
        return list(torch.cat([step.routed for step in self.steps], 1))


def steps_of(document: int, routed: Tensor, ranked: Tensor, prompt: int) -> list[Step]:
    """Return the steps of a text: its prompt at once, then token by token.

    Args:
        document: Its number.
        routed: Experts (L, T, K) of its tokens.
        ranked: Guesses (L - 1, T, W).
        prompt: Tokens of the prompt.
    """
    ends = [0, *range(prompt, routed.shape[1] + 1)]
    return [
        Step(document, routed[:, start:end], ranked[:, start:end]) for start, end in pairwise(ends)
    ]


@torch.no_grad()
def record(model: Any, document: int, tokens: Tensor, prompt: int) -> tuple[list[Step], Tensor]:
    """Return the steps of a text and the logits (T, V) of an offloaded model.

    The text is read at once, which routes its tokens as decoding does.

    Args:
        model: A model after ``load_offloaded``.
        document: Number of the text.
        tokens: Its tokens (T,).
        prompt: Those that count as read at once.
    """
    offload, dim = model.offload, model.config.get_text_config().hidden_size
    width = min(RECORDED * offload.sizes.k, offload.sizes.experts)
    guess = cross_layer(model, offload.store.names, dim, width)
    routed: list[Tensor] = []
    ranked: list[Tensor] = []

    def observe(layer: int, seen: Seen) -> None:
        routed.append(seen.routed.cpu())
        if layer + 1 < offload.sizes.layers:
            ranked.append(guess(layer, seen).cpu())

    offload.observers.append(observe)
    try:
        logits = model(tokens.unsqueeze(0), use_cache=False).logits[0]
    finally:
        offload.observers.remove(observe)
    return steps_of(document, torch.stack(routed), torch.stack(ranked), prompt), logits


def write_trace(path: Path, trace: Trace) -> None:
    """Write a trace: a line of sizes, then a line for each step."""
    lines: list[dict[str, Any]] = [trace.sizes._asdict()]
    place = dict.fromkeys((step.document for step in trace.steps), 0)
    for step in trace.steps:
        number = place[step.document] = place[step.document] + 1
        lines.append(
            {
                "document": step.document,
                "step": number,
                "experts": step.routed.tolist(),
                "guesses": step.ranked.tolist(),
            }
        )
    write_text(path, "".join(f"{json.dumps(line)}\n" for line in lines))


def read_trace(path: Path) -> Trace:
    """Read a trace.

    Raises:
        GatesError: It cannot be read, or a line is wrong; the error names it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GatesError(f"{path} cannot be read: give a trace of `offload profile`") from error
    steps: list[Step] = []
    last: dict[int, int] = {}
    number = 1
    try:
        sizes = Sizes(**json.loads(lines[0])) if lines else Sizes(0, 0, 0, 0, 0)
        if any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError("sizes are no whole numbers from 1")
        for line in lines[1:]:
            number += 1
            entry = json.loads(line)
            document, step = int(entry["document"]), int(entry["step"])
            if steps and document != steps[-1].document and document in last:
                raise ValueError(f"document {document} again, after another one")
            if step <= last.get(document, 0):
                raise ValueError(f"step {step} after step {last[document]}: steps must grow")
            last[document] = step
            steps.append(_step(document, entry, sizes))
            wide, first = steps[-1].ranked.shape[2], steps[0].ranked.shape[2]
            if wide != first:
                raise ValueError(f"{wide} guesses for a token, {first} in line 2")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise GatesError(
            f"{path}, line {number}: {what}; write it again by `offload profile`"
        ) from error
    if not steps:
        raise GatesError(f"{path} has no steps: write it again by `offload profile`")
    return Trace(sizes, steps)


def _step(document: int, entry: dict[str, Any], sizes: Sizes) -> Step:
    routed, ranked = torch.tensor(entry["experts"]), torch.tensor(entry["guesses"])
    for name, found, layers in (
        ("experts", routed, sizes.layers),
        ("guesses", ranked, sizes.layers - 1),
    ):
        if found.ndim != 3 or found.is_floating_point() or len(found) != layers:
            raise ValueError(f"{name} are no whole numbers of {layers} layers by tokens")
        if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < sizes.experts:
            wrong = int(found.max()) if int(found.min()) >= 0 else int(found.min())
            raise ValueError(f"there is no expert {wrong} of {sizes.experts}")
    if routed.shape[2] != sizes.k or routed.shape[1] != ranked.shape[1]:
        raise ValueError(f"{tuple(routed.shape)} experts and {tuple(ranked.shape)} guesses")
    return Step(document, routed, ranked)
