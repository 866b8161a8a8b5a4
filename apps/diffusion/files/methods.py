"""Ways to make one adapter of several, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from core_gates.errors import GatesError
from diffusion.lora_file import Factors, LoraBundle

Name = Literal[
    "sum", "mean", "weighted", "cat", "svd", "linear", "ties", "dare_linear", "dare_ties",
    "magnitude_prune", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
    "baked",
]  # fmt: skip
"""All methods. Sparse ones combine ΔW itself if they end with ``_svd``, else A and B; ``baked`` has
the mean gates of runs of a base."""

EXACT = ("sum", "mean", "weighted", "cat", "svd")
UNWEIGHTED = ("sum", "mean")
DENSE = (*EXACT, "linear", "baked")


class Settings(NamedTuple):
    """What is asked for.

    Attributes:
        method: Its name.
        weights: Strength of each adapter; None if none are given.
        density: Fraction of the entries that sparse methods keep; None for their default.
        rank: Components per layer that are kept at most; None for no limit.
        seed: Of what DARE drops, and of images on which gates are observed.
        base: Folder of the base that gates are observed in.
        gates: File of trained gates.
        prompts: What the base generates while gates are observed.
        steps: Denoising steps of each image.
    """

    method: Name
    weights: Mapping[str, float] | None = None
    density: float | None = None
    rank: int | None = None
    seed: int = 0
    base: Path | None = None
    gates: Path | None = None
    prompts: tuple[str, ...] = ()
    steps: int = 20

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
        self._check_baking()

    def _check_baking(self) -> None:
        if self.method != "baked":
            if self.gates is not None or self.prompts:
                raise GatesError(f"--gates and --prompts have no meaning for {self.method}")
            return
        if self.base is None or self.gates is None or not self.prompts:
            raise GatesError(
                "--method baked needs a base that runs with the gates: give --base FOLDER, "
                "--gates FILE and --prompts 'one; another'"
            )
        if not self.gates.is_file():
            raise GatesError(f"{self.gates} does not exist: name a file of gates")
        if self.steps < 1:
            raise GatesError(f"--steps is {self.steps}, expected at least one")

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
    if settings.method == "baked":
        return _baked(adapters, strengths, settings)
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


def _baked(
    adapters: Mapping[str, LoraBundle], strengths: Mapping[str, float], settings: Settings
) -> LoraBundle:
    from apps.diffusion.baking import Baking, baked

    assert settings.base is not None
    assert settings.gates is not None
    baking = Baking(settings.base, settings.gates, settings.prompts, settings.steps, settings.seed)
    return baked(adapters, strengths, baking)


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
