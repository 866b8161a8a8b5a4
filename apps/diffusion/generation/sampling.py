"""How images are sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core_gates.errors import GatesError
from diffusion.models.flow_matching import GUIDANCE

if TYPE_CHECKING:
    from apps.diffusion.generation.studio import Studio

LARGEST_SEED = 2**63 - 1
MOST = 1000  # images of a call


@dataclass(frozen=True)
class Sampling:
    """How images are sampled.

    Attributes:
        seed: Seed of the noise of the first image; the others follow.
        steps: Number of denoising steps.
        guidance: Scale of the guidance by the prompt.
        count: Number of images.
        negative_prompt: What the images should not show.
        size: Side of images in pixels, for other bases than the embedded one.
    """

    seed: int = 0
    steps: int = 20
    guidance: float = GUIDANCE
    count: int = 1
    negative_prompt: str = ""
    size: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            GatesError: One makes no sense.
        """
        if not 0 <= self.seed <= LARGEST_SEED - self.count:
            raise GatesError(f"--seed is {self.seed}, expected a number from 0 to 2^63")
        if self.steps < 1:
            raise GatesError(f"--steps is {self.steps}, expected 1 or more")
        if not math.isfinite(self.guidance) or self.guidance < 0:
            raise GatesError(f"--guidance is {self.guidance}, expected 0 or more; 1 is without")
        if not 1 <= self.count <= MOST:
            raise GatesError(f"--count is {self.count}, expected 1 to {MOST}")
        if self.size is not None and self.size < 1:
            raise GatesError(f"--size is {self.size}, expected 1 or more")

    def options(self, studio: Studio) -> dict[str, Any]:
        """Return the options of the pipeline of diffusers.

        Raises:
            GatesError: One would do nothing with this base.
        """
        if studio.guided and self.guidance < 1:
            raise GatesError(
                f"--guidance is {self.guidance}, which this base takes for 1, no guidance: give 1,"
                " or more"
            )
        if self.negative_prompt and not (studio.guided and self.guidance > 1):
            way = "give --guidance above 1" if studio.guided else "this base has none"
            raise GatesError(f"--negative_prompt does nothing without such guidance: {way}")
        found = studio.options(self.steps, self.guidance, self.size)
        return found | ({"negative_prompt": self.negative_prompt} if self.negative_prompt else {})
