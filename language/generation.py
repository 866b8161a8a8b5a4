"""Text from a decoder, token by token: sampling, key-value caches, stop strings."""

import codecs
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from core_gates.errors import GatesError
from core_gates.numerics import accumulation_dtype, stable_sort, widest_float
from language.decoder import Decoder

Reason = Literal["end", "stop", "length", "context"]
Decode = Callable[[Sequence[int]], bytes]


class Chunk(NamedTuple):
    """What became known of the continuation of one prompt.

    Attributes:
        prompt: Index of the prompt.
        text: Text since the last chunk of this prompt; only that of the last one may be empty.
        tokens: Tokens since the last chunk, with the end token.
        reason: Why this chunk is the last one: the ``end`` token, a ``stop`` string, the
            ``length`` asked for, or the ``context`` of the model; None before.
    """

    prompt: int
    text: str
    tokens: tuple[int, ...]
    reason: Reason | None


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    decode: Decode,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    end: int | Collection[int] | None,
    stop: Sequence[str] = (),
) -> Iterator[Chunk]:
    """Continue prompts of any lengths, all at once, and yield text as soon as it is known.

    A character is held back until all its bytes are known, and so is what may be the beginning of a
    stop string. A prompt has its own random numbers, which depend on the seed and its tokens alone:
    its text is the same whatever else is in the batch. The model is in evaluation mode afterwards.

    Args:
        model: The decoder.
        prompts: Tokens of each prompt; one that begins a document is the end token.
        decode: ``tokenizer.decode``.
        max_tokens: Largest number of tokens to generate for each prompt.
        temperature: Divides the logits; 0 takes the most probable token.
        top_k: Only that many of the most probable tokens may be drawn; all if None.
        top_p: Only the fewest most probable tokens that have this probability together may be
            drawn, of those that ``top_k`` leaves; all if None.
        seed: Of the random numbers.
        end: Token, or tokens, that end a text; none if None.
        stop: Strings that end a text, before the first one that is complete.

    Returns:
        Chunks, those of different prompts interleaved.

    Raises:
        GatesError: A prompt does not fit the model, or an option is out of range; later, the logits
            are not finite.
    """
    starts = [[int(token) for token in prompt] for prompt in prompts]
    _refuse_misfit(starts, model)
    stops = [stop] if isinstance(stop, str) else [*stop]
    checks = (
        ("temperature", temperature, 0 <= temperature < math.inf, "a finite number from 0"),
        ("top-k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top-p", top_p, top_p is None or 0 < top_p <= 1, "more than 0 and at most 1"),
        ("the number of tokens", max_tokens, max_tokens >= 1, "at least 1"),
        ("the seed", seed, seed >= 0, "at least 0"),
        ("a stop string", "empty", all(stops), "at least one character"),
    )
    for name, given, fits, wanted in checks:
        if not fits:
            raise GatesError(f"{name} is {given}, expected {wanted}")
    choose = partial(next_probabilities, temperature=temperature, top_k=top_k, top_p=top_p)
    ends = () if end is None else (end,) if isinstance(end, int) else end
    texts = [
        _Continuation(number, prompt, model.context, max_tokens, decode, ends, stops, seed)
        for number, prompt in enumerate(starts)
    ]
    return _steps(model, starts, texts, choose)


def _refuse_misfit(prompts: Sequence[Sequence[int]], model: Decoder) -> None:
    """Refuse prompts that the model cannot read.

    Raises:
        GatesError: There is none, or one is empty, too long, or has unknown tokens.
    """
    if not prompts:
        raise GatesError("there is no prompt; expected at least one")
    for number, prompt in enumerate(prompts, 1):
        which = f"prompt {number} of {len(prompts)}"
        if not 1 <= len(prompt) <= model.context:
            raise GatesError(
                f"{which} has {len(prompt)} tokens, expected 1 to {model.context}, the context of"
                " the model; " + ("shorten it" if prompt else "begin with the end token")
            )
        if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            raise GatesError(
                f"{which} has tokens {min(prompt)} to {max(prompt)}, expected 0 to"
                f" {model.vocab_size - 1}; use the tokenizer that the model was trained with"
            )


def _steps(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    texts: Sequence["_Continuation"],
    choose: Callable[[Tensor], Tensor],
) -> Iterator[Chunk]:
    """Yield what every step of the model adds; rows of finished texts are computed in vain."""
    device, width = next(model.parameters()).device, max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + [*p] for p in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    padding = torch.arange(width, device=device) < width - lengths.unsqueeze(1)
    mask = padding if padding.any() else None
    caches, read = model.eval().caches(), 0
    while any(text.reason is None for text in texts):
        with torch.inference_mode():  # not around the yield, where other code runs
            logits = model(tokens, padding_mask=mask, caches=caches, last=True)[:, -1]
            read += tokens.shape[1]
            largest = logits.amax(-1)
            if not largest.isfinite().all():
                row = int(largest.isfinite().int().argmin())
                raise GatesError(
                    f"the largest logit after {read} tokens is {largest[row]} for prompt"
                    f" {row + 1} of {len(prompts)}, expected a finite one: the weights are not"
                    " those of a successful training run; use another checkpoint"
                )
            tokens = draw(choose(logits), [text.uniform() for text in texts]).unsqueeze(1)
        mask = None
        for text, token in zip(texts, tokens[:, 0].tolist(), strict=True):
            if text.reason is None and (chunk := text.add(token)) is not None:
                yield chunk


def next_probabilities(
    logits: Tensor, *, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """Return the probabilities with which the next token is drawn.

    The temperature comes first, then ``top_k``, then ``top_p`` of what is left. Of equal logits,
    the one with the lowest index counts as larger.

    Args:
        logits: Logits (..., V).
        temperature: See `generate`; also for what follows.
        top_k: Number of tokens.
        top_p: Their probability.

    Returns:
        Probabilities (..., V), in float32 at least.
    """
    logits = logits.to(accumulation_dtype(logits))
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits)
    limits = torch.finfo(logits.dtype)  # neither 0 nor infinite in this dtype
    temperature = min(max(temperature, limits.tiny), limits.max)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is None and top_p is None:
        return logits.softmax(-1)
    ordered, order = stable_sort(logits, descending=True)
    probabilities = ordered[..., :top_k].softmax(-1)
    if top_p is not None and top_p < 1:
        before = F.pad(probabilities.cumsum(-1)[..., :-1], (1, 0), value=-1)  # the first is kept
        probabilities = probabilities.where(before < top_p, 0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, order[..., :top_k], probabilities)


def draw(probabilities: Tensor, uniform: Sequence[float]) -> Tensor:
    """Return the tokens (B,) at which the distribution functions exceed numbers.

    Args:
        probabilities: Probabilities (B, V).
        uniform: B numbers in [0, 1).
    """
    dtype = widest_float(probabilities.device)
    below = probabilities.to(dtype).cumsum(-1)
    below = below / below[:, -1:]
    wanted = torch.tensor(uniform, dtype=dtype, device=below.device).unsqueeze(1)
    wanted = wanted.clamp(max=1 - torch.finfo(dtype).eps)
    return torch.searchsorted(below, wanted, right=True).squeeze(1)


class _Continuation:
    """The text after one prompt.

    Args:
        number: Index of the prompt.
        prompt: Its tokens.
        context: Tokens that the model reads.
        max_tokens: Tokens to generate.
        decode: Turns tokens into bytes.
        ends: Tokens that end the text.
        stops: Strings that end it.
        seed: Of the random numbers.

    Attributes:
        reason: Why it ended; None before.
    """

    def __init__(
        self,
        number: int,
        prompt: Sequence[int],
        context: int,
        max_tokens: int,
        decode: Decode,
        ends: Collection[int],
        stops: Sequence[str],
        seed: int,
    ) -> None:
        self._number, self._decode, self._ends = number, decode, ends
        self._left = max_tokens, context - len(prompt) + 1
        self._new, self._count = list[int](), 0
        self._window, self._before = [*prompt], decode(prompt)
        self._text = _Text([stop.encode() for stop in stops])
        self._generator = np.random.default_rng([seed, *prompt])
        self.reason: Reason | None = None

    def uniform(self) -> float:
        """Return the next random number in [0, 1)."""
        return self._generator.random()

    def add(self, token: int) -> Chunk | None:
        """Add a token and return what is known now, if that is more than before."""
        self._new.append(token)
        self._count += 1
        length, context = self._left
        text = ""
        if token in self._ends:
            self.reason = "end"
        else:
            text = self._text.add(self._bytes(token))
            if self._text.stopped:
                self.reason = "stop"
            elif self._count == length:
                self.reason = "length"
            elif self._count == context:
                self.reason = "context"
        if self.reason is None and not text:
            return None
        if self.reason is not None:
            text += self._text.close()
        tokens, self._new = tuple(self._new), []
        return Chunk(self._number, text, tokens, self.reason)

    def _bytes(self, token: int) -> bytes:
        """Return what a token adds to the bytes of those before it.

        Some tokenizers drop the space in front of the first token, and show a part of a character
        as another one. So tokens are decoded from one on that is text by itself.
        """
        window = [*self._window, token]
        after, alone = self._decode(window), self._decode([token])
        new = after[len(self._before) :] if after.startswith(self._before) else alone
        try:
            alone.decode()
            self._window, self._before = [token], alone
        except UnicodeDecodeError:
            self._window, self._before = window, after
        return new


class _Text:
    """Bytes of a text, of which only what is certain is passed on.

    The text does not depend on how its bytes are split: of several stop strings, the one that is
    complete first ends it, the longest one of those.

    Args:
        stops: Strings that end it, as bytes.

    Attributes:
        stopped: Whether one of them was found.
    """

    def __init__(self, stops: Sequence[bytes]) -> None:
        self._stops, self._pending, self.stopped = stops, b"", False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, data: bytes) -> str:
        """Return the text that is certain with some more bytes."""
        data = self._pending + data
        ends = [(at + len(stop), at) for stop in self._stops if (at := data.find(stop)) >= 0]
        if ends:
            self.stopped, self._pending = True, b""
            return self._decoder.decode(data[: min(ends)[1]])
        begun = (n for stop in self._stops for n in range(1, len(stop)) if data.endswith(stop[:n]))
        complete = len(data) - max(begun, default=0)
        self._pending = data[complete:]
        return self._decoder.decode(data[:complete])

    def close(self) -> str:
        """Return the text that was held back, as the stream ends."""
        return self._decoder.decode(self._pending, final=True)
