"""Front ends of SeqBoat: symbols, samples or a filter bank become tokens of equal width."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.errors import GatesError, check_at_least
from core_gates.numerics import check_padding_mask

QUIET = 1e-6  # added to energies of samples from -1 to 1, some 60 dB below a loud voice
LOG_MEAN, LOG_STD = -7.0, 4.0  # of the logarithms of energies in speech, about


class SymbolEmbedding(nn.Module):
    """Look up a learned vector for every symbol or byte.

    Args:
        dim: Features D of a token.
        vocab_size: Number of symbols V.

    Shape:
        ``x`` (B, T), int64, to tokens (B, T, D) and the padding mask (B, T) as it is.

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        check_at_least(1, dim=dim, vocab_size=vocab_size)
        self.dim, self.vocab_size = dim, vocab_size
        self.embedding = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the tokens and their padding mask.

        Raises:
            GatesError: A symbol is out of range.
        """
        try:
            return self.embedding(x), padding_mask
        except IndexError as error:
            raise GatesError(
                f"symbols from {int(x.min())} to {int(x.max())}, expected 0 to "
                f"{self.embedding.num_embeddings - 1}: raise vocab_size or check the symbols"
            ) from error


class FrameProjection(nn.Module):
    """Project frames of samples linearly; or take each sample, such as a pixel, as a frame.

    Args:
        dim: Features D of a token.
        samples: Samples of a frame.
        hop: Samples from the start of a frame to that of the next.

    Shape:
        ``x`` (B, S), float, to tokens (B, frames, D) and their padding mask. The last frame may end
        after the last sample, where zeros follow. A sequence of one sample at least has a frame.

    Raises:
        ValueError: A size is below 1, or samples between frames would be skipped.
    """

    def __init__(self, dim: int, samples: int = 1, hop: int = 1) -> None:
        super().__init__()
        check_at_least(1, dim=dim, samples=samples, hop=hop)
        if hop > samples:
            raise ValueError(f"hop is {hop}: at most {samples}, the samples of a frame")
        self.dim, self.samples, self.hop = dim, samples, hop
        self.projection = nn.Linear(samples, dim)

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the tokens and their padding mask.

        Args:
            x: Samples (B, S).
            padding_mask: True (B, S) at samples to ignore, which come last.
        """
        frames, mask = in_frames(x, padding_mask, self.samples, self.hop)
        return self.projection(frames), mask


class FilterBank(nn.Module):
    """Take the logarithm of the energies of learned filters, then project it linearly.

    The filters begin as pairs of windowed cosines and sines of equally spaced frequencies, so that
    the first energies are a power spectrogram.

    Args:
        dim: Features D of a token.
        filters: Pairs of filters.
        samples: Samples of a filter.
        hop: Samples from the start of a frame to that of the next.

    Shape:
        As `FrameProjection`.

    Raises:
        ValueError: A size is below 1, or samples between frames would be skipped.
    """

    def __init__(self, dim: int, filters: int = 64, samples: int = 128, hop: int = 64) -> None:
        super().__init__()
        check_at_least(1, dim=dim, filters=filters, samples=samples, hop=hop)
        if hop > samples:
            raise ValueError(f"hop is {hop}: at most {samples}, the samples of a filter")
        self.dim, self.samples, self.hop = dim, samples, hop
        window = torch.hann_window(samples, periodic=True)
        # In cycles per sample, from half a step above 0 to half a step below the highest one.
        frequency = (torch.arange(filters) + 0.5) / (2 * filters)
        phase = 2 * math.pi * frequency.unsqueeze(1) * torch.arange(samples)
        pairs = torch.stack([phase.cos(), phase.sin()], 1) * window * samples**-0.5
        self.bank = nn.Parameter(pairs.flatten(0, 1))
        self.projection = nn.Linear(filters, dim)

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the tokens and their padding mask; see `FrameProjection.forward`."""
        frames, mask = in_frames(x, padding_mask, self.samples, self.hop)
        energy = (frames @ self.bank.mT).square().unflatten(-1, (-1, 2)).sum(-1)
        logs = ((energy + QUIET).log() - LOG_MEAN) / LOG_STD
        return self.projection(logs), mask


def in_frames(
    x: Tensor, padding_mask: Tensor | None, samples: int, hop: int
) -> tuple[Tensor, Tensor | None]:
    """Cut sequences (B, S) into frames (B, frames, samples), and return the padding mask of these.

    A sequence of n samples has as many frames as cover it, one at least; none if n is 0.

    Raises:
        ValueError: ``x`` has another shape, or samples that are not padding follow some that are.
    """
    if x.ndim != 2:
        raise ValueError(f"x must be (batch, samples), got {tuple(x.shape)}")
    overlap = samples - hop
    count = int(_frames(torch.tensor(max(1, x.shape[1])), overlap, hop))
    mask = None
    if padding_mask is not None:
        check_padding_mask(padding_mask, x.shape)
        if (padding_mask[:, :-1] & ~padding_mask[:, 1:]).any():
            raise ValueError("padding must follow the samples of every sequence")
        x = x.masked_fill(padding_mask, 0)
        lengths = _frames((~padding_mask).sum(1), overlap, hop)
        mask = torch.arange(count, device=x.device) >= lengths.unsqueeze(1)
    whole = F.pad(x, (0, count * hop + overlap - x.shape[1]))
    return whole.unfold(1, samples, hop), mask


def _frames(lengths: Tensor, overlap: int, hop: int) -> Tensor:
    """Return how many frames cover sequences of some lengths."""
    needed = (lengths - overlap).clamp(min=1)
    return ((needed + hop - 1) // hop).masked_fill(lengths == 0, 0)
