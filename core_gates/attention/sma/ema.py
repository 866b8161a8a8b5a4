"""The multi-head exponential moving average of MEGA: a convolution, or a recurrence."""

import math

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least
from core_gates.numerics import accumulation_dtype, zero_padding

_LARGEST_DECAY = 1 - 2**-24  # the logarithm of what is left stays finite


class MultiHeadEMA(nn.Module):
    """Average every feature over time by several exponentials (Ma et al., 2022, equation 4).

    Feature c has n states with decay ``q = 1 - p a``, where ``p = sigmoid(δ)`` and ``a =
    sigmoid(α)``: ``h_t = q h_{t-1} + p β x_t`` and ``y_t = Σ γ h_t / √n + ω x_t``. Over a whole
    sequence this is a convolution with ``k_t = Σ p β γ q^t / √n``, computed by a Fourier transform
    in O(T log T). A bidirectional average adds the same of the reversed sequence, with separate
    parameters; both count the present token.

    Args:
        dim: Features D.
        num_states: States n of a feature.
        bidirectional: Whether to average over later tokens too.
        truncation: Longest lag kept, in tokens; None for all.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters; the average is computed in float32 at least.

    Shape:
        ``x`` (B, T, D) to the same.

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(
        self,
        dim: int,
        num_states: int = 16,
        *,
        bidirectional: bool = False,
        truncation: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, dim=dim, num_states=num_states, truncation=truncation)
        self.dim = dim
        self.num_states = num_states
        self.bidirectional = bidirectional
        self.truncation = truncation
        rows = 2 * dim if bidirectional else dim  # forward rows first

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.delta = parameter(rows, num_states)
        self.alpha = parameter(rows, num_states)
        self.beta = parameter(rows, num_states)
        self.gamma = parameter(rows, num_states)
        self.omega = parameter(dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw from normal distributions cut at two standard deviations; β alternates in sign."""
        for parameter, std in (
            (self.delta, 0.2),
            (self.alpha, 0.2),
            (self.beta, 0.02),
            (self.gamma, 1.0),
            (self.omega, 1.0),
        ):
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
        with torch.no_grad():
            self.beta[:, 0::2] += 1
            self.beta[:, 1::2] -= 1

    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Average whole sequences.

        Args:
            x: Sequences (B, T, D).
            padding_mask: True (B, T) at tokens to ignore: they count as zero for all others. Their
                own result is ``ω x``, as published, or 0 where x is not finite.

        Raises:
            ValueError: ``x`` or the mask has another shape.
        """
        self._check(x)
        exact = x.to(accumulation_dtype(x))
        seen = zero_padding(exact, padding_mask)
        if padding_mask is not None:
            finite = exact.nan_to_num(0.0, 0.0, 0.0)
            exact = torch.where(padding_mask.unsqueeze(-1), finite, exact)
        return (self._convolve(seen) + self.omega * exact).to(x.dtype)

    def kernel(self, length: int) -> Tensor:
        """Return the first taps (rows, length) of the convolution, forward rows first."""
        decay, gain = self._coefficients()
        gain = gain * self.gamma / math.sqrt(self.num_states)
        # With t = i + m j, a power of q is a product of two, of which there are few each.
        inner = max(math.isqrt(length), 1)
        outer = -(-length // inner)
        steps = torch.arange(max(inner, outer), device=decay.device, dtype=decay.dtype)
        log_decay = decay.log().unsqueeze(-1)
        near = gain.unsqueeze(-1) * (log_decay * steps[:inner]).exp()
        far = (log_decay * (inner * steps[:outer])).exp()
        taps = far.mT @ near  # (rows, outer, inner)
        return taps.flatten(1)[:, :length]

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Average one more token.

        Args:
            x: The token of every sequence (B, D).
            state: States (B, D, n) after the tokens before it, from `state`.

        Returns:
            The average (B, D) and the states after this token.

        Raises:
            ValueError: The average is bidirectional.
        """
        self._check_causal()
        decay, gain = self._coefficients()
        exact = x.to(accumulation_dtype(x))
        state = decay * state + gain * exact.unsqueeze(-1)
        averaged = (self.gamma * state).sum(-1) / math.sqrt(self.num_states)
        return (averaged + self.omega * exact).to(x.dtype), state

    def state(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Return the states (B, D, n) after sequences ``x`` (B, T, D), zeros for T = 0.

        Raises:
            ValueError: The average is bidirectional, or ``x`` or the mask has another shape.
        """
        self._check_causal()
        self._check(x)
        decay, gain = self._coefficients()
        exact = x.to(accumulation_dtype(x))
        lags = torch.arange(x.shape[1] - 1, -1, -1, device=x.device, dtype=decay.dtype)
        powers = (decay.log().unsqueeze(-1) * lags).exp()  # (D, n, T)
        seen = zero_padding(exact, padding_mask)
        return gain * torch.einsum("btd,dnt->bdn", seen, powers)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(ema)``."""
        return f"dim={self.dim}, num_states={self.num_states}, bidirectional={self.bidirectional}"

    def _coefficients(self) -> tuple[Tensor, Tensor]:
        """Return the decay q and the gain p β, both (rows, n)."""
        exact = accumulation_dtype(self.delta)
        share = self.delta.to(exact).sigmoid()
        decay = 1 - (share * self.alpha.to(exact).sigmoid()).clamp(max=_LARGEST_DECAY)
        return decay, share * self.beta.to(exact)

    def _convolve(self, x: Tensor) -> Tensor:
        num_tokens = x.shape[1]
        if x.numel() == 0:
            return x * self.kernel(1).sum()  # empty, with a gradient for every parameter
        num_taps = min(num_tokens, self.truncation or num_tokens)
        size = num_tokens + num_taps  # neither the end nor the taps of the past wrap around
        taps = self.kernel(num_taps)
        kernel = nn.functional.pad(taps[: self.dim], (0, size - num_taps))
        if self.bidirectional:
            back = taps[self.dim :]
            kernel = kernel + nn.functional.pad(back[:, :1], (0, size - 1))
            kernel = kernel + nn.functional.pad(back[:, 1:].flip(-1), (size - num_taps + 1, 0))
        spectrum = torch.fft.rfft(x.mT, n=size) * torch.fft.rfft(kernel.to(x.dtype), n=size)
        averaged: Tensor = torch.fft.irfft(spectrum, n=size)[..., :num_tokens]
        return averaged.mT

    def _check(self, x: Tensor) -> None:
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (batch, tokens, {self.dim}), got {tuple(x.shape)}")

    def _check_causal(self) -> None:
        if self.bidirectional or self.truncation is not None:
            raise ValueError(
                "a bidirectional or truncated average has no recurrent form; process whole"
                " sequences"
            )
