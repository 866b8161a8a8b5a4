"""Ways to make one adapter of several, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from core_gates.errors import GatesError
from diffusion.lora_file import Factors, LoraBundle

Name = Literal[
    "sum", "mean", "weighted", "cat", "svd", "linear", "ties", "dare_linear", "dare_ties",
    "magnitude_prune", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
]  # fmt: skip
"""The names of all methods. Those of one ``_svd`` combine ΔW itself, the others A and B."""

EXACT = ("sum", "mean", "weighted", "cat", "svd")
UNWEIGHTED = ("sum", "mean")
DENSE = (*EXACT, "linear")


class Settings(NamedTuple):
    """What is asked for.

    Attributes:
        method: Its name.
        weights: Strength of each adapter; None if none are given.
        density: Fraction of the entries that sparse methods keep; None for their default.
        rank: Components per layer that are kept at most; None for no limit.
        seed: Of what DARE drops.
    """

    method: Name
    weights: Mapping[str, float] | None
    density: float | None
    rank: int | None
    seed: int

    def check(self) -> None:
        """Refuse options that the method does not use.

        Raises:
            GatesError: One is given, or one that it needs is not.
        """
        if self.weights is not None and self.method in UNWEIGHTED:
            raise GatesError(
                f"--weights has no meaning for {self.method}: choose --method weighted, or leave "
                "it out"
            )
        if self.weights is None and self.method == "weighted":
            raise GatesError("--method weighted needs --weights, such as a:0.8,b:0.5")
        if self.density is not None and self.method in DENSE:
            raise GatesError(f"--density has no meaning for {self.method}: leave it out")
        if self.density is not None and not 0 < self.density <= 1:
            raise GatesError(f"--density is {self.density}, expected a fraction in (0, 1]")
        if self.weights is not None and not any(self.weights.values()):
            raise GatesError("--weights gives every adapter the strength 0: nothing is left")

    def strengths(self, names: Mapping[str, object]) -> dict[str, float]:
        """Return the factor of each adapter."""
        if self.weights is not None:
            return dict(self.weights)
        return dict.fromkeys(names, 1 / len(names) if self.method == "mean" else 1.0)


def merged(adapters: Mapping[str, LoraBundle], settings: Settings) -> LoraBundle:
    """Make one adapter of several; ranks add up where the method is exact.

    The parts for text encoders are merged, too, where the method is exact; the others leave them
    out.

    Args:
        adapters: Name -> adapter.
        settings: The method and its options.

    Raises:
        GatesError: The adapters do not fit each other or the method.
    """
    from diffusion.rivals.merging import merge

    settings.check()
    strengths = settings.strengths(adapters)
    if settings.method not in EXACT:
        options = {} if settings.density is None else {"density": settings.density}
        return merge(
            adapters,
            strengths,
            settings.method,
            rank=settings.rank,
            seed=settings.seed,
            **options,  # type: ignore[arg-type]
        )
    whole = merge(adapters, strengths, "cat")
    encoders = dict.fromkeys(name for one in adapters.values() for name in one.text_encoders)
    return LoraBundle(
        whole.family,
        whole.modules,
        {name: _encoder(adapters, strengths, name) for name in encoders},
    )


def _encoder(
    adapters: Mapping[str, LoraBundle], strengths: Mapping[str, float], component: str
) -> Mapping[str, Factors]:
    """Return the sum of the parts of adapters for one text encoder."""
    from diffusion.rivals.merging import merge

    own = {
        name: LoraBundle(bundle.family, bundle.text_encoders[component])
        for name, bundle in adapters.items()
        if component in bundle.text_encoders
    }
    return merge(own, {name: strengths[name] for name in own}, "cat").modules
