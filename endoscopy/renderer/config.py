"""What is rendered: everything that, with the number of an object, determines its frames."""

from dataclasses import dataclass
from typing import Literal

from endoscopy.data.options import check_option

Exposure = Literal["fixed", "agc"]
DepthMode = Literal["none", "relative", "metric"]
Frequencies = Literal["balanced", "real"]
BrandName = Literal["A", "B", "mixed"]

MIN_SIDE, MAX_SIDE = 16, 2048


@dataclass(frozen=True)
class RendererConfig:
    """Settings of the renderer.

    Args:
        seed: Object ``i`` depends only on the pair (seed, i).
        side: Height and width of a frame in pixels.
        frames: Frames per object.
        exposure: ``fixed`` gain, or ``agc``: mean luminance of every frame brought to 0.22.
        depth: ``metric``: distance along the ray in mm; ``relative``: what a monocular network
            returns, blurred, noisy, inverse depth known up to an affine map only; ``none``.
        frequencies: ``balanced``: sizes log-uniform over 2-20 mm; ``real``: 76 % up to 5 mm, 14 %
            below 10 mm, 10 % above, log-uniform within each class.
        shortcut_rho: The logarithm of the distance of the camera shifts by ``rho`` times the
            logarithm of the size, so that a network can guess the size from the view.
        brand: Endoscope ``A``, the shifted ``B`` (wider field, less gain, another color), or
            ``mixed``: either one by chance.

    Raises:
        ValueError: A setting lies outside its range.
    """

    seed: int = 0
    side: int = 64
    frames: int = 6
    exposure: Exposure = "fixed"
    depth: DepthMode = "metric"
    frequencies: Frequencies = "balanced"
    shortcut_rho: float = 0.0
    brand: BrandName = "A"

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if not MIN_SIDE <= self.side <= MAX_SIDE:
            raise ValueError(f"side must lie in {MIN_SIDE}-{MAX_SIDE} pixels, got {self.side}")
        if self.frames < 1:
            raise ValueError(f"frames must be at least 1, got {self.frames}")
        if not -2 <= self.shortcut_rho <= 2:
            raise ValueError(f"shortcut_rho must lie between -2 and 2, got {self.shortcut_rho}")
        for name, kind in (
            ("exposure", Exposure),
            ("depth", DepthMode),
            ("frequencies", Frequencies),
            ("brand", BrandName),
        ):
            check_option(name, getattr(self, name), kind)
