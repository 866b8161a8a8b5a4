"""A small U-Net that finds polyps where no location is given."""

import functools
import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.errors import GatesError
from endoscopy.inputs.image_files import SourceFrame
from endoscopy.inputs.locations import Located, Locator, lesions_of, trimmed
from harness.files.atomic import write_bytes

NO_POLYP = "no polyp found"
FILE = "segmenter.safetensors"
SHIPPED = ("segmenter", "segmenter", "unet-s0")  # configuration, kind and piece


class Segmenter(nn.Module):
    """U-Net (Ronneberger et al., 2015) with group normalization, 0.25 M weights by default.

    Every image is standardized by its own mean and deviation, so that exposure and color balance
    do not matter.

    Args:
        size: Side length in pixels of the square that frames are resized to; a multiple of 8.
        widths: Channels of the four resolutions, each a multiple of 8.

    Shape:
        Images (B, 3, size, size) in [0, 1] to logits (B, 1, size, size).

    Raises:
        ValueError: The size or a width is not a multiple of 8.
    """

    def __init__(
        self, size: int = 96, widths: tuple[int, int, int, int] = (16, 24, 48, 64)
    ) -> None:
        super().__init__()
        if size % 8 or any(width % 8 for width in widths):
            raise ValueError(f"size {size} and widths {widths} must be multiples of 8")
        self.arguments = {"size": size, "widths": list(widths)}
        self.size = size
        pairs = list(zip((3, *widths), widths, strict=False))
        self.down = nn.ModuleList(_double_conv(*pair) for pair in pairs)
        ups = zip(widths[:0:-1], widths[-2::-1], strict=True)
        self.up = nn.ModuleList(_double_conv(low + high, high) for low, high in ups)
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of the polyp."""
        std, mean = torch.std_mean(images, dim=(1, 2, 3), keepdim=True)
        x = (images - mean) / (std + 1e-3)
        skips: list[Tensor] = []
        for stage in self.down:
            x = stage(x if not skips else F.max_pool2d(x, 2))
            skips.append(x)
        for stage, skip in zip(self.up, skips[-2::-1], strict=True):
            x = stage(torch.cat([F.interpolate(x, scale_factor=2.0), skip], dim=1))
        return self.head(x)

    @torch.no_grad()
    def probability(self, image: np.ndarray) -> np.ndarray:
        """Return the probability of polyp (H, W) float32 of a frame (H, W, 3) uint8."""
        device = self.head.weight.device
        writable = np.require(image, requirements=["C", "W"])  # PyTorch warns of others
        pixels = torch.from_numpy(writable).to(device).permute(2, 0, 1)[None]
        small = F.interpolate(
            pixels / 255.0, (self.size, self.size), mode="bilinear", antialias=True
        )
        large = F.interpolate(self(small), image.shape[:2], mode="bilinear")
        return large[0, 0].sigmoid().cpu().numpy()

    def save(self, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write the weights and the arguments as safetensors; the file is complete or absent."""
        state = {name: value.to(dtype).contiguous() for name, value in self.state_dict().items()}
        content = save(state, metadata={"arguments": json.dumps(self.arguments)})
        write_bytes(Path(path), content)


def load_segmenter(path: str | Path) -> Segmenter:
    """Read a segmenter that `Segmenter.save` wrote, in float32 and for evaluation.

    Raises:
        GatesError: The file is absent or holds no segmenter.
    """
    try:
        with safe_open(path, framework="pt") as file:
            arguments = json.loads((file.metadata() or {})["arguments"])
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        segmenter = Segmenter(arguments["size"], tuple(arguments["widths"]))
        segmenter.load_state_dict(state)
    except Exception as error:  # safetensors raises its own errors
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise GatesError(f"{path}: holds no segmenter: {line}; train or copy it again") from error
    return segmenter.eval()


class Segmenters:
    """The form of results that are segmenters."""

    def save(self, folder: Path, result: Segmenter) -> None:
        """Write ``segmenter.safetensors``."""
        result.save(folder / FILE)

    def load(self, folder: Path) -> Segmenter:
        """Read what `save` wrote.

        Raises:
            GatesError: It is missing or damaged.
        """
        return load_segmenter(folder / FILE)


@functools.cache
def shipped_segmenter() -> Segmenter | None:
    """Return the shipped segmenter, which is trained on rendered frames; None if there is none."""
    path = Path(str(files("endoscopy")), "weights", *SHIPPED)
    return Segmenters().load(path) if path.is_dir() else None


class AutomaticLocations(Locator):
    """The likeliest polyp of every frame; outputs mark it as automatic.

    Args:
        segmenter: Trained network.
        threshold: Probability above which a pixel belongs to a polyp.
        max_lesions: Lesions kept of a frame, those of the largest summed probability.
    """

    def __init__(self, segmenter: Segmenter, threshold: float = 0.5, max_lesions: int = 1) -> None:
        super().__init__("automatic segmentation", "automatic")
        self.segmenter = segmenter.eval()
        self.threshold, self.max_lesions = threshold, max_lesions

    def locate(self, frame: SourceFrame, *, trim: bool) -> Located:
        """Return the frame without black borders if ``trim``, and its likeliest lesions."""
        part = trimmed(frame.image, trim=trim)
        probability = self.segmenter.probability(part.image)
        lesions = lesions_of(probability > self.threshold)
        lesions.sort(key=lambda lesion: -float(probability[lesion.mask].sum()))
        self.report.found += len(lesions)
        if not lesions:
            self.report.add("noted", NO_POLYP, [frame.key])
        self.report.add("excluded", "less likely part", [frame.key] * (len(lesions) - 1))
        return part._replace(lesions=lesions[: self.max_lesions])


def _double_conv(in_dim: int, dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_dim, dim, 3, padding=1, bias=False),
        nn.GroupNorm(8, dim),
        nn.SiLU(),
        nn.Conv2d(dim, dim, 3, padding=1, bias=False),
        nn.GroupNorm(8, dim),
        nn.SiLU(),
    )
