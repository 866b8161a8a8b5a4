"""A gate that says which of some retrieved adapters a caption needs."""

import torch
from torch import Tensor, nn

FEATURES, HIDDEN = 6, 32
MOST = 8  # adapters of a set
CENTER, SHARP = 0.25, 8.0  # of cosines of captions and adapters, as the network sees them
LEAST = 0.05  # what the best cosine is taken for, at least, in ratios to it
GAIN = 4.0  # of the output of the network
FEWEST, MANY = 1.0, 4.0  # expected numbers of open adapters, beyond which strengths stay


class RelevanceGate(nn.Module):
    """Open each of K adapters as far as a caption needs it, judged by embeddings alone.

    With the cosines ``c_k`` of the caption and the adapters, and features ``φ_k``::

        open_k = sigmoid((c_k - less max(s_k, 0) - threshold) / width + 4 network(φ_k))

    where ``s_k`` is the largest similarity of the adapter to one of a higher cosine, 0 if none.
    Features are the cosine, how far the next higher and the next lower one are, how many are
    higher, its ratio to the highest, and ``s_k``. All of them compare adapters in pairs, so their
    order decides nothing, not even between equal cosines. The network of 32 units is zero at the
    start, so the gate begins as a soft threshold of what is left of the cosine.

    A layer multiplies what its adapters make of its input, ``A_k x``, by ``open_k`` times a
    strength that follows the expected number ``n = Σ open_k`` of open adapters, cut to 1 to 4: with
    the layer's two ``factors``, that for two and that for three, ``f_2 + (n - 2) (f_3 - f_2)``.

    Args:
        threshold: Cosine at which an adapter is half open at the start.
        width: Of the soft threshold, in cosines.
        less: Part of the similarity to a better adapter that is taken off a cosine.
        fingerprint: 16 hexadecimal digits of what embeds adapters; empty if unknown.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Attributes:
        version: Rises whenever other adapters or captions are told.

    Raises:
        ValueError: The width is not positive, or the fingerprint has not 16 digits.
    """

    threshold: Tensor
    width: Tensor
    less: Tensor
    embedder: Tensor

    def __init__(
        self,
        threshold: float = 0.2,
        width: float = 0.05,
        less: float = 0.0,
        fingerprint: str = "",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not width > 0:
            raise ValueError(f"width is {width}, expected a positive number")
        digits = list(bytes.fromhex(fingerprint or "00" * 8))
        if len(digits) != 8:
            raise ValueError(f"fingerprint is {fingerprint!r}, expected 16 hexadecimal digits")
        self._start = {"threshold": threshold, "width": width, "less": less, "embedder": digits}
        for name in ("threshold", "width", "less"):
            self.register_buffer(name, torch.empty((), device=device, dtype=dtype))
        self.register_buffer("embedder", torch.empty(8, device=device, dtype=torch.int64))
        self.inner = nn.Linear(FEATURES, HIDDEN, device=device, dtype=dtype)
        self.outer = nn.Linear(HIDDEN, 1, device=device, dtype=dtype)
        self.version = 0
        self._open: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gate to the soft threshold that it was built as."""
        with torch.no_grad():
            for name, value in self._start.items():
                buffer = self.get_buffer(name)
                buffer.copy_(torch.tensor(value, dtype=buffer.dtype))
        self.inner.reset_parameters()
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    @property
    def fingerprint(self) -> str:
        """Of what embeds adapters; empty if unknown."""
        return bytes(self.embedder.tolist()).hex() if self.embedder.any() else ""

    def openness(self, cosines: Tensor, similarities: Tensor) -> Tensor:
        """Return how far adapters are open (..., K), from 0 to 1.

        Args:
            cosines: Of captions and adapters (..., K), K from 1 to 8.
            similarities: Of the adapters to each other (K, K).

        Raises:
            ValueError: There are no or too many adapters, or sizes differ.
        """
        count = cosines.shape[-1]
        if not 1 <= count <= MOST or similarities.shape != (count, count):
            raise ValueError(
                f"cosines of {count} adapters and similarities {tuple(similarities.shape)} are"
                f" given, expected 1 to {MOST} adapters and similarities (K, K)"
            )
        cosines, similarities = cosines.to(self.threshold), similarities.to(self.threshold)
        units = nn.functional.silu(self.inner(features(cosines, similarities)))
        learned: Tensor = GAIN * self.outer(units).squeeze(-1)
        rest = cosines - self.less * closest_higher(cosines, similarities).clamp_min(0)
        return ((rest - self.threshold) / self.width + learned).sigmoid()

    def set_openness(self, openness: Tensor | None) -> None:
        """Set how far adapters are open until the next call; with None the gate is not asked.

        Args:
            openness: (K,) for all samples of a batch, or (B, K), such as of `openness`.
        """
        self._open = openness
        self.version += 1

    def opening(self) -> Tensor | float:
        """Return how far adapters are open, (K,) or (B, K); 1 where that was not told."""
        return 1.0 if self._open is None else self._open

    def weights(self, factors: Tensor) -> Tensor:
        """Return the strength of a layer, (1,) or (B, 1).

        Args:
            factors: Of the layer (2, 1), for two and for three open adapters.
        """
        if self._open is None:
            return factors.new_ones(1)
        count = self._open.sum(-1, keepdim=True).clamp(FEWEST, MANY).to(factors)
        return torch.lerp(factors[0], factors[1], count - 2)

    def forward(self, factors: Tensor | None) -> Tensor | float:
        """Return what a layer multiplies adapters by, (K,) or (B, K): openness times strength."""
        if self._open is None or factors is None:
            return self.opening()
        return self._open.to(factors) * self.weights(factors)


def features(cosines: Tensor, similarities: Tensor) -> Tensor:
    """Return what the network of a `RelevanceGate` sees of adapters (..., K, 6).

    Args:
        cosines: Of captions and adapters (..., K).
        similarities: Of the adapters to each other (K, K).
    """
    apart = cosines.unsqueeze(-2) - cosines.unsqueeze(-1)  # (..., k, j): of j over k
    higher, lower = apart > 0, apart < 0
    none = torch.zeros_like(cosines)
    above = torch.where(higher, apart, torch.inf).amin(-1)
    below = torch.where(lower, -apart, torch.inf).amin(-1)
    return torch.stack(
        [
            SHARP * (cosines - CENTER),
            SHARP * torch.where(higher.any(-1), above, none),
            SHARP * torch.where(lower.any(-1), below, none),
            higher.sum(-1).to(cosines) / MOST,
            cosines / cosines.amax(-1, keepdim=True).clamp_min(LEAST),
            closest_higher(cosines, similarities),
        ],
        -1,
    )


def closest_higher(cosines: Tensor, similarities: Tensor) -> Tensor:
    """Return the largest similarity of each adapter to one of a higher cosine (..., K), 0 if none.

    Args:
        cosines: Of captions and adapters (..., K).
        similarities: Of the adapters to each other (K, K).
    """
    higher = cosines.unsqueeze(-2) > cosines.unsqueeze(-1)
    close = torch.where(higher, similarities, -torch.inf).amax(-1)
    return torch.where(higher.any(-1), close, torch.zeros_like(cosines))
