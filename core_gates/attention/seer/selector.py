"""Choice of the blocks that sparse attention attends to."""

import math

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError
from core_gates.numerics import accumulation_dtype


class BlockSelector(nn.Module):
    """Turn the logits of an attention gate into a block mask (arXiv 2410.13276 and 2506.08889).

    Exactly one rule is given. The block of the query itself is always kept, in addition to what the
    rule chooses, else a query could be left without any key. Equal scores go to the lowest index.

    Args:
        threshold: Keep blocks whose probability (softmax over the row) exceeds this.
        nz_ratio: Fraction of the causal area to keep: every row of a map of N blocks keeps its
            ``max(1, int((1 - sqrt(1 - nz_ratio)) * N))`` best.
        token_budget: Tokens to attend, in whole blocks of ``block_size``.
        k: Blocks to keep.
        p: Keep the best blocks until their probabilities sum to this.
        block_size: Tokens of a block, for ``token_budget``.
        dense_rows: Last rows of a square map that keep everything. A map with fewer rows than
            columns, as in decoding, has none.

    Shape:
        Logits (..., Nq, Nk) to bool (..., Nq, Nk). Row i is the block ``Nk - Nq + i``; later blocks
        are never kept, nor are logits of the lowest finite value, by which gates hide padding.

    Raises:
        ValueError: Not exactly one rule is given, or a value is out of range.
    """

    def __init__(
        self,
        *,
        threshold: float | None = None,
        nz_ratio: float | None = None,
        token_budget: int | None = None,
        k: int | None = None,
        p: float | None = None,
        block_size: int = 64,
        dense_rows: int = 2,
    ) -> None:
        super().__init__()
        rules = {
            "threshold": threshold,
            "nz_ratio": nz_ratio,
            "token_budget": token_budget,
            "k": k,
            "p": p,
        }
        given = {name: value for name, value in rules.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(rules)}, got {', '.join(given) or 'none'}")
        ((self.rule, self.value),) = given.items()
        if self.rule in ("threshold", "nz_ratio", "p") and not 0 <= self.value <= 1:
            raise ValueError(f"{self.rule} must lie in [0, 1], got {self.value}")
        if self.rule == "token_budget" and self.value < block_size:
            raise ValueError(
                f"token_budget must be at least one block of {block_size}, got {self.value}"
            )
        if self.rule == "k" and self.value < 1:
            raise ValueError(f"k must be at least 1, got {self.value}")
        if block_size < 1 or dense_rows < 0:
            raise ValueError(
                f"block_size must be at least 1 and dense_rows at least 0, got {block_size} and"
                f" {dense_rows}"
            )
        self.block_size, self.dense_rows = block_size, dense_rows

    def forward(self, logits: Tensor) -> Tensor:
        """Return the mask of kept blocks, True = keep.

        Raises:
            ValueError: There are more rows than columns.
            GatesError: A logit that is not in the future is NaN or infinite; not checked while
                compiling.
        """
        past = _past(logits)
        if not torch.compiler.is_compiling():
            _refuse_non_finite(logits, past)
        scores = logits.detach().to(accumulation_dtype(logits))
        lowest = torch.finfo(logits.dtype).min
        available = past & (scores > lowest)
        scores = scores.masked_fill(~available, torch.finfo(scores.dtype).min)
        kept = self._choose(scores) & available
        num_rows, num_blocks = logits.shape[-2:]
        if num_rows == num_blocks and self.dense_rows:
            first = max(0, num_rows - self.dense_rows)
            kept[..., first:, :] = available[..., first:, :]
        return kept | past & ~past.tril(num_blocks - num_rows - 1)

    def _choose(self, scores: Tensor) -> Tensor:
        if self.rule == "threshold":
            return scores.softmax(-1) > self.value
        order = scores.argsort(dim=-1, descending=True, stable=True)
        if self.rule == "p":
            probs = scores.softmax(-1).gather(-1, order)
            before = probs.cumsum(-1) - probs
            chosen = before < self.value
        else:
            rank = torch.arange(scores.shape[-1], device=scores.device)
            chosen = (rank < self._count(scores.shape[-1])).expand(scores.shape)
        return torch.zeros_like(chosen).scatter(-1, order, chosen)

    def _count(self, num_blocks: int) -> int:
        if self.rule == "nz_ratio":
            return max(1, int((1 - math.sqrt(1 - self.value)) * num_blocks))
        return int(self.value // self.block_size if self.rule == "token_budget" else self.value)

    def extra_repr(self) -> str:
        """Show the rule."""
        return f"{self.rule}={self.value}, dense_rows={self.dense_rows}"


def block_density(block_mask: Tensor) -> Tensor:
    """Return the kept fraction of the blocks that causality allows, a float32 scalar.

    Args:
        block_mask: Bool (..., Nq, Nk), aligned as in `BlockSelector`.

    Raises:
        ValueError: There are more rows than columns.
    """
    past = _past(block_mask).expand(block_mask.shape)
    return (block_mask & past).sum() / past.sum()


def _refuse_non_finite(logits: Tensor, past: Tensor) -> None:
    wrong = int((past & ~logits.isfinite()).sum())
    if wrong:
        raise GatesError(
            f"{wrong} of the logits to choose from are not finite; look for NaN in queries or keys,"
            " give the gate the padding_mask, and hide blocks by the lowest finite value"
        )


def _past(blocks: Tensor) -> Tensor:
    """Return the pairs of blocks that are not in the future, bool (Nq, Nk)."""
    num_rows, num_blocks = blocks.shape[-2:]
    if num_rows > num_blocks:
        raise ValueError(f"a map of {num_rows} rows needs as many columns, got {num_blocks}")
    everything = torch.ones(num_rows, num_blocks, dtype=torch.bool, device=blocks.device)
    return everything.tril(num_blocks - num_rows)
