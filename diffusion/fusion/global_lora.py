"""What several adapters have in common: one more adapter next to them (AutoLoRA, 2025)."""

from collections.abc import Mapping

from core_gates.errors import GatesError
from diffusion.fusion.stacking import weighted_sum
from diffusion.lora_file import LoraBundle, shrink_bundle


def global_lora(adapters: Mapping[str, LoraBundle], rank: int) -> LoraBundle:
    """Return the best approximation of a rank to the mean of all changes, layer by layer.

    The mean ``Σ ΔW_k / K`` has the factors of all adapters side by side; QR decompositions of both
    leave a core of Kr × Kr numbers, whose singular value decomposition gives the approximation
    (Eckart and Young, 1936). No ΔW is formed. An adapter without a layer counts as zero there.

    Args:
        adapters: Name -> adapter.
        rank: That of the result; a layer whose ranks add up to less keeps their sum.

    Raises:
        GatesError: There is no adapter, they do not fit each other, or the rank is below 1.
    """
    if not adapters:
        raise GatesError("there are no adapters to approximate: give at least one")
    mean = weighted_sum(adapters, dict.fromkeys(adapters, 1 / len(adapters)))
    return shrink_bundle(mean, rank)[0]
