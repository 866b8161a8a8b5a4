"""Rivals of SeqBoat on speech: a convolutional network, and regression on a spectrogram."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from core_gates.errors import check_at_least
from language.seqboat.front_ends import FilterBank, FrameProjection
from language.seqboat.sequence_model import mean_token
from language.seqboat.sequences import Part

SAMPLES, HOP = 128, 64  # of the spectrogram, as of the filter bank
SILENCE = 1e-6  # as of the filter bank


class ConvolutionBlock(nn.Module):
    """A norm, a convolution over neighboring tokens and SiLU, with a residual connection.

    Args:
        dim: Features D of a token.
        width: Tokens that a token sees, an odd number.

    Shape:
        (B, T, D) to the same.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.convolution = nn.Conv1d(dim, dim, width, padding=width // 2)

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        """Return the tokens; padding counts as zero for others."""
        seen = self.norm(x).masked_fill(padding_mask.unsqueeze(-1), 0)
        return x + nn.functional.silu(self.convolution(seen.mT)).mT


class ConvolutionNetwork(nn.Module):
    """Classify sequences by convolutions on the tokens of a front end, and their mean.

    Args:
        front: Turns samples into tokens; its ``dim`` is that of the network.
        outputs: Classes.
        num_layers: Number of convolutions.
        width: Tokens that a token sees in each.
        dropout: Rate of dropout before the head.

    Shape:
        Samples (B, S) to logits (B, outputs).

    Raises:
        ValueError: A size is below 1, or ``width`` is even.
    """

    causal = False

    def __init__(
        self,
        front: FrameProjection | FilterBank,
        outputs: int,
        num_layers: int = 8,
        width: int = 5,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_at_least(1, outputs=outputs, num_layers=num_layers, width=width)
        if width % 2 == 0:
            raise ValueError(f"width must be odd, got {width}")
        self.front, self.vocab_size = front, outputs
        self.layers = nn.ModuleList(ConvolutionBlock(front.dim, width) for _ in range(num_layers))
        self.norm, self.dropout = nn.LayerNorm(front.dim), nn.Dropout(dropout)
        self.head = nn.Linear(front.dim, outputs)

    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Return logits; ``padding_mask`` (B, S) is True at samples to ignore."""
        tokens, mask = self.front(x, padding_mask)
        ignored = tokens.new_zeros(tokens.shape[:2], dtype=torch.bool) if mask is None else mask
        for layer in self.layers:
            tokens = layer(tokens, ignored)
        logits: Tensor = self.head(self.dropout(mean_token(self.norm(tokens), mask)))
        return logits


def log_spectrogram(x: NDArray[np.float32], length: int) -> NDArray[np.float64]:
    """Return the logarithms of the power (frames, 65) of a recording, filled up with silence.

    Args:
        x: Samples (S,).
        length: Samples that are looked at.
    """
    whole = np.zeros(length)
    whole[: min(length, len(x))] = x[:length]
    frames = np.lib.stride_tricks.sliding_window_view(whole, SAMPLES)[::HOP]
    spectrum = np.fft.rfft(frames * np.hanning(SAMPLES + 1)[:-1])
    power: NDArray[np.float64] = np.log(np.abs(spectrum) ** 2 / SAMPLES + SILENCE)
    return power


def regression(train: Part, length: int, strength: float) -> Any:
    """Fit multinomial logistic regression to the log spectrogram of training recordings.

    Args:
        train: The recordings.
        length: Samples that are looked at.
        strength: C of scikit-learn, the inverse of the regularization.

    Returns:
        Its pipeline, from spectrograms (N, features) of `spectrograms`.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))
    return pipeline.fit(spectrograms(train, length), train.labels)


def spectrograms(part: Part, length: int) -> NDArray[np.float64]:
    """Return the log spectrogram of every recording in one row (N, features)."""
    return np.stack([log_spectrogram(x, length).ravel() for x in part.inputs])
