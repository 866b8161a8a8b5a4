"""The plain sum of adapters."""

from diffusion.fusion.stacking import one_family, weighted_sum
from diffusion.lora_file import LoraBundle
from diffusion.rivals.weighing import Weighing


class Sum(Weighing):
    """Add what all adapters do, ``o + Σ s_k y_k``."""

    @property
    def bundle(self) -> LoraBundle:
        """One static adapter that does the same; ranks add up.

        Raises:
            GatesError: An adapter is a DoRA.
        """
        weights = dict(zip(self.adapters, self._weights(), strict=True))
        on = {name: bundle for name, bundle in self.adapters.items() if weights[name] != 0}
        return weighted_sum(on, weights) if on else LoraBundle(one_family(self.adapters), {})
