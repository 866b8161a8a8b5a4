"""A world drawn on demand: a shape in a color on a ground, in a style; captions and drawings."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product
from typing import Literal, NamedTuple, TypeVar

import lightning as L
import numpy as np
import torch
from torch import Tensor

from diffusion.data.shapes import BASE_SHAPES, distances
from diffusion.data.styles import BASE_STYLES, LUMINANCE, PLAIN, SIDE, STYLES, Canvas, Image

T = TypeVar("T")

WORLD = 1
"""Number of the world: what it draws or says has not changed while this has not."""

COLORS = {
    "red": (0.86, 0.12, 0.13),
    "orange": (0.97, 0.55, 0.08),
    "yellow": (0.98, 0.87, 0.20),
    "green": (0.16, 0.62, 0.24),
    "blue": (0.14, 0.33, 0.82),
    "purple": (0.52, 0.19, 0.66),
    "pink": (0.97, 0.56, 0.72),
    "white": (0.98, 0.98, 0.98),
    "black": (0.06, 0.06, 0.08),
}  # name -> red, green and blue

SIZES = {"": 9.5, "large": 12.5}  # what captions call it -> radius in pixels

CONTRAST, LIGHTER = 0.55, 0.1
"""Distance of the colors of a shape and its ground, and of their luminances, at least."""

MOVED, SCALED, TURNED = 1.0, 0.05, 0.105
"""How a drawing differs from another of the same scene, at most: pixels, share, radians."""

Part = Literal["adapter", "gate", "test"]
PARTS: tuple[Part, ...] = ("test", "gate", *("adapter",) * 8)
"""What each tenth of the colors of a shape on its grounds serves.

Training of the base and of adapters, training and tuning of gates, or tests.
"""

WORDINGS = 3  # captions of a scene


class Scene(NamedTuple):
    """What a drawing shows.

    Attributes:
        shape: One of `diffusion.data.shapes.SHAPES`.
        color: Of the shape.
        ground: Color around it.
        size: One of `SIZES`.
        styles: One style, or two of which the second is put on the whole image.
    """

    shape: str
    color: str
    ground: str
    size: str = ""
    styles: tuple[str, ...] = (PLAIN,)

    def caption(self, wording: int = 0) -> str:
        """Return one of the captions, such as ``a large dotted orange house on a black ground``."""
        styles = [name for name in self.styles if name != PLAIN]
        words = [word for word in (self.size, *styles) if word]
        thing = _with_article([*words, self.color, self.shape])
        if wording == 0:
            return f"{thing} on {_with_article([self.ground, 'ground'])}"
        if wording == 1:
            return f"on {self.ground}, {thing}"
        return ", ".join([f"{self.color} {self.shape} on {self.ground}", *words])


def _with_article(words: Sequence[str]) -> str:
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


@cache
def colors_of(shape: str, part: Part) -> list[tuple[str, str]]:
    """Return the colors of a shape on their grounds that belong to a part.

    One of the two is neither black nor white, so that every style can be seen.
    """
    apart = {
        pair: np.subtract(COLORS[pair[0]], COLORS[pair[1]]) for pair in product(COLORS, COLORS)
    }
    pairs = [
        pair
        for pair, gap in apart.items()
        if np.linalg.norm(gap) > CONTRAST
        and abs(gap @ LUMINANCE) > LIGHTER
        and set(pair) != {"white", "black"}
    ]
    pairs.sort(key=lambda pair: hashlib.sha256(" ".join((shape, *pair)).encode()).hexdigest())
    return [pair for place, pair in enumerate(pairs) if PARTS[place % len(PARTS)] == part]


def scenes(
    part: Part,
    shapes: Sequence[str] = tuple(BASE_SHAPES),
    styles: Sequence[tuple[str, ...]] = tuple(zip(BASE_STYLES, strict=True)),
) -> list[Scene]:
    """Return all scenes of some shapes in some styles that belong to a part.

    Args:
        part: Of the world.
        shapes: Those of the base unless given.
        styles: Each one or two; those of the base unless given.
    """
    return [
        Scene(shape, color, ground, size, style)
        for shape in shapes
        for style in styles
        for color, ground in colors_of(shape, part)
        for size in SIZES
    ]


def spread(found: Sequence[T], most: int) -> list[T]:
    """Return at most so many of a list, evenly spread over it in an order of no meaning."""
    order = np.random.default_rng(len(found)).permutation(len(found))[:most]
    return [found[place] for place in sorted(order)]


def drawn(found: Sequence[Scene], random: np.random.Generator | None = None) -> Image:
    """Return drawings (N, 32, 32, 3) float32 from 0 to 1.

    Args:
        found: N scenes.
        random: Draws how each is moved, scaled and turned; they are exact if None.
    """
    draw = np.zeros((len(found), 4)) if random is None else random.uniform(-1, 1, (len(found), 4))
    made = np.empty((len(found), SIDE, SIDE, 3), np.float32)
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, scene in enumerate(found):
        groups.setdefault(scene.styles, []).append(place)
    for styles, places in groups.items():
        canvas = _canvas([found[place] for place in places], draw[places])
        for name in styles:
            canvas.image = STYLES[name](canvas)
        made[places] = canvas.image
    return np.clip(made, 0, 1)


def _canvas(scenes: Sequence[Scene], draw: np.ndarray) -> Canvas:
    """Return the plain drawings of scenes; ``draw`` (N, 4) from -1 to 1 moves, scales and turns."""
    right, down, scaled, turned = draw.T[:, :, None, None].astype(np.float32)
    radius = np.array([SIZES[scene.size] for scene in scenes], np.float32)[:, None, None]
    radius = radius * (1 + SCALED * scaled)
    pixel = np.arange(SIDE, dtype=np.float32) + 0.5 - SIDE / 2
    x, y = np.broadcast_arrays(pixel - MOVED * right, pixel[:, None] - MOVED * down)
    cosine, sine = np.cos(TURNED * turned), np.sin(TURNED * turned)

    def away(moved_right: float, moved_down: float) -> np.ndarray:
        across, below = (x - moved_right) / radius, (y - moved_down) / radius
        at = across * cosine + below * sine, below * cosine - across * sine
        each = [
            distances(scene.shape, *(part[place] for part in at))
            for place, scene in enumerate(scenes)
        ]
        return np.stack(each) * radius

    color, ground = (
        np.array([COLORS[name] for name in names], np.float32)[:, None, None]
        for names in ([scene.color for scene in scenes], [scene.ground for scene in scenes])
    )
    return Canvas(x, y, away, radius, color, ground, np.empty(0))


def images_of(found: Sequence[Scene], seed: int | None = 0) -> Tensor:
    """Return drawings (N, 3, 32, 32) from -1 to 1, moved and turned by a seed unless it is None."""
    random = None if seed is None else np.random.default_rng(seed)
    return torch.from_numpy(drawn(found, random)).permute(0, 3, 1, 2).contiguous() * 2 - 1


class SceneDataModule(L.LightningDataModule):
    """Batches of new drawings, each a function of the seed and its number alone.

    One epoch is the whole training.

    Args:
        found: Scenes that are drawn equally often.
        make: Makes a batch of the places (B,) of scenes, the numbers (B,) of their wordings, and
            their images (B, 3, 32, 32) from -1 to 1.
        steps: Number of batches.
        batch_size: Drawings of each.
        seed: Of all that is drawn.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        make: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]],
        *,
        steps: int,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.scenes, self.make, self.steps = scenes, make, steps
        self.batch_size, self.seed = batch_size, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, ...]:
        """Return a batch."""
        random = np.random.default_rng([self.seed, step])
        rows = random.integers(len(self.scenes), size=self.batch_size)
        wordings = random.integers(WORDINGS, size=self.batch_size)
        images = torch.from_numpy(drawn([self.scenes[row] for row in rows], random))
        images = images.permute(0, 3, 1, 2).contiguous() * 2 - 1
        return self.make(torch.from_numpy(rows), torch.from_numpy(wordings), images)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for step in range(self.steps):
            yield self[step]

    def train_dataloader(self) -> "SceneDataModule":
        """Return the batches in order."""
        return self
