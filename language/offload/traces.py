"""Traces: which experts tokens used, layer by layer, and which were guessed. JSON lines."""

import json
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core_gates.errors import GatesError, check_whole
from harness.files import write_text
from language.offload.guesses import ORDER, Profile, RoutedTokens, cross_layer, last_tokens
from language.offload.setup import Sizes

FIELDS = ("experts", "guesses", "tokens")
"""Names of the fields of a step in the file, in their order."""

RECORDED = 4
"""Guesses that are recorded, in experts of a token."""


class Step(NamedTuple):
    """One call of the model with T tokens.

    Attributes:
        routed: Experts (L, T, K).
        ranked: Guesses of ``cross-layer`` for all layers but the first (L - 1, T, W), the best
            first.
        tokens: Each token and those before it (T, ORDER), see `last_tokens`.
    """

    routed: Tensor
    ranked: Tensor
    tokens: Tensor

    def split(self, prompt: int) -> list["Step"]:
        """Return the steps of a text: its prompt at once, then token by token.

        Args:
            prompt: Tokens of the prompt.
        """
        ends = [0, *range(prompt, len(self.tokens) + 1)]
        return [
            Step(self.routed[:, a:b], self.ranked[:, a:b], self.tokens[a:b])
            for a, b in pairwise(ends)
        ]


class Trace(NamedTuple):
    """Steps of one model in order, for each document; caches are empty before each of these."""

    sizes: Sizes
    documents: Sequence[Sequence[Step]]

    def profile(self) -> Profile:
        """Return the experts that each token of all documents was routed to."""
        routed, _, tokens = zip(*chain(*self.documents), strict=True)
        return Profile(torch.cat(routed, 1), torch.cat(tokens), self.sizes.digest)


@torch.no_grad()
def record(model: Any, tokens: Tensor) -> tuple[Step, Tensor]:
    """Return a text as one step and the logits (T, V) of an offloaded model.

    The text is read at once, which routes its tokens as decoding does.

    Args:
        model: A model after ``load_offloaded``.
        tokens: Of the text (T,).

    Raises:
        GatesError: There is no next layer to guess.
    """
    offload, dim = model.offload, model.config.get_text_config().hidden_size
    if offload.sizes.layers < 2:
        raise GatesError("there is nothing to guess in one layer of experts: give another model")
    width = min(RECORDED * offload.sizes.k, offload.sizes.experts)
    guess = cross_layer(model, offload.store.names, dim, width)
    routed: list[Tensor] = []
    ranked: list[Tensor] = []

    def observe(layer: int, seen: RoutedTokens) -> None:
        routed.append(seen.routed.cpu())
        if layer + 1 < offload.sizes.layers:
            ranked.append(guess(layer, seen).cpu())

    offload.observers.append(observe)
    try:
        logits = model(tokens.unsqueeze(0), use_cache=False).logits[0]
    finally:
        offload.observers.remove(observe)
    return Step(torch.stack(routed), torch.stack(ranked), last_tokens(tokens)), logits


def write_trace(path: Path, trace: Trace) -> None:
    """Write a trace: a line of sizes, then a line for each step."""
    lines: list[dict[str, Any]] = [trace.sizes._asdict()]
    for document, steps in enumerate(trace.documents):
        for number, step in enumerate(steps, 1):
            arrays = dict(zip(FIELDS, (one.tolist() for one in step), strict=True))
            lines.append({"document": document, "step": number, **arrays})
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
    documents: dict[int, list[Step]] = {}
    last, number, wide = (0, 0), 1, 0
    try:
        sizes = Sizes(**json.loads(lines[0])) if lines else Sizes(0, 0, 0, 0, 0)
        check_whole(1, **{name: n for name, n in sizes._asdict().items() if name != "digest"})
        for line in lines[1:]:
            number += 1
            entry = json.loads(line)
            here = entry["document"], entry["step"]
            check_whole(0, document=here[0], step=here[1])
            if here <= last:
                what = "document {}, step {} after document {}, step {}: steps must grow"
                raise ValueError(what.format(*here, *last))
            last, step = here, _step(entry, sizes, wide)
            documents.setdefault(here[0], []).append(step)
            wide = step.ranked.shape[2]
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise GatesError(
            f"{path}, line {number}: {what}; write it again by `offload profile`"
        ) from error
    if not documents:
        raise GatesError(f"{path} has no steps: write it again by `offload profile`")
    return Trace(sizes, [*documents.values()])


def _step(entry: dict[str, Any], sizes: Sizes, wide: int) -> Step:
    routed, ranked, tokens = (torch.tensor(entry[name]) for name in FIELDS)
    for name, found, layers in (
        ("experts", routed, sizes.layers),
        ("guesses", ranked, sizes.layers - 1),
    ):
        if found.ndim != 3 or found.dtype != torch.int64 or len(found) != layers:
            raise ValueError(f"{name} are no whole numbers of {layers} layers by tokens")
        wrong = found[(found < 0) | (found >= sizes.experts)]
        if len(wrong):
            raise ValueError(f"there is no expert {int(wrong[0])} of {sizes.experts}")
        if not found.sort(-1).values.diff().all():
            raise ValueError(f"{name} of a token name one twice")
    if routed.shape[2] != sizes.k or routed.shape[1] != ranked.shape[1]:
        raise ValueError(f"{tuple(routed.shape)} experts and {tuple(ranked.shape)} guesses")
    if wide and ranked.shape[2] != wide:
        raise ValueError(f"{ranked.shape[2]} guesses for a token, {wide} in the line before")
    if tokens.dtype != torch.int64 or tokens.shape != (routed.shape[1], ORDER):
        raise ValueError(f"tokens are no {routed.shape[1]} rows of {ORDER} whole numbers")
    return Step(routed, ranked, tokens)
