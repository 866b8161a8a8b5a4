"""The mean of adapters."""

from diffusion.rivals.sum import Sum


class Mean(Sum):
    """Average what adapters do, ``o + Σ s_k y_k / K``; those with strength 0 do not count."""

    def _weights(self) -> list[float]:
        return [strength / max(len(self.on), 1) for strength in self.strengths.values()]
