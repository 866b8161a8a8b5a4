"""Slots of guesses: experts that are fetched before it is known that they are needed."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError
from language.offload.guesses import ORDER, Predictor, last_tokens
from language.offload.transfers import Transfer


class Guesses:
    """Experts of the next layer that are fetched because they are guessed, in separate slots.

    They enter the cache of their layer when they are used, and give way to the next guesses
    otherwise, so that a guess never displaces what is used.

    Args:
        predict: Guesses; None for no guesses.
        width: Experts that are guessed for one token, at most as many as there are slots.
        slots: Slots of the pool that hold them.
        alike: Whether guesses do not distinguish tokens, see
            `language.offload.guesses.ALIKE`.

    Attributes:
        free: Slots that hold nothing that is needed.
        staged: Transfers of guesses by layer and expert.
        padding: True (T,) at tokens of the batch that are padding, (0,) where there is none.
        tokens: Each token of the batch and those before it (T, ORDER), see `last_tokens`.
        last: Last tokens of the sequences (B, ORDER - 1).
        prompt: Whether sequences have several tokens in this call.
    """

    def __init__(
        self, predict: Predictor | None, width: int, slots: Sequence[int], *, alike: bool = False
    ) -> None:
        self.predict, self.width, self.free, self.alike = predict, width, list(slots), alike
        self.staged: dict[tuple[int, int], Transfer] = {}
        self.padding = torch.empty(0, dtype=torch.bool)
        self.tokens = self.last = torch.empty(0, ORDER - 1, dtype=torch.long)
        self.prompt = False

    def tokens_of(self, count: int) -> Tensor:
        """Return so many tokens and those before them (T, ORDER), -1 where they are not known."""
        return self.tokens if len(self.tokens) == count else torch.full((count, ORDER), -1)

    def exchange(self, layer: int, expert: int, slot: int) -> None:
        """Take a slot for that of a guess that turned out right."""
        del self.staged[layer, expert]
        self.free.append(slot)

    def recover(self, slots: Iterable[int]) -> None:
        """Give up all guesses after an error or an interrupt.

        Args:
            slots: Those of the pool that belong to no layer.
        """
        for transfer in self.staged.values():
            transfer.cancel()
        self.staged.clear()
        self.free[:] = slots

    def keep(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Give up all guesses but those of the experts of a layer; return those never read."""
        unread = []
        for layer_expert in self.staged.keys() - {(layer, expert) for expert in experts}:
            transfer = self.staged[layer_expert]
            if transfer.cancel():  # its reading had not begun
                unread.append(transfer.expert)
            self.exchange(*layer_expert, transfer.slot)
        return unread


def note_tokens(offload: Any, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Note the tokens of the call of a model, and which are padding, for offloaded experts.

    Raises:
        GatesError: There is no token.
    """
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    inputs = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]]
    if any(one is not None and not one.numel() for one in inputs):
        raise GatesError("there are no tokens to compute: give a prompt of one or more")
    length = next((one.shape[1] for one in inputs if one is not None), 0)
    guesses: Guesses = offload.guesses
    guesses.padding, guesses.prompt = torch.empty(0, dtype=torch.bool), length > 1
    if isinstance(mask, Tensor) and mask.ndim == 2 and length and not mask[:, -length:].all():
        guesses.padding = mask[:, -length:].flatten().cpu() == 0
    ids = next((one for one in inputs if one is not None and one.ndim == 2), guesses.last[:0])
    before = guesses.last if length == 1 and len(guesses.last) == len(ids) else None
    rows = last_tokens(ids, before)
    guesses.tokens, guesses.last = rows.flatten(0, 1), rows[:, -1, :-1].flip(-1)
