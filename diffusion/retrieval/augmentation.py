"""Random changes of adapters during training, since files are few.

All of it comes from the global random number generator, so that a resumed run draws the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core_gates.errors import check_at_least, check_fraction
from diffusion.lora_file.family import Placed
from diffusion.retrieval.batch import AdapterBatch


@dataclass(frozen=True)
class Augmentation:
    """How adapters are changed at random.

    Attributes:
        smallest_scale: Lower end of the strength that an adapter is multiplied by.
        largest_scale: Upper end.
        dropped: Largest probability that a type of layers, and that a layer, is left out; each
            adapter draws its own below this. One layer always stays.
        kept_rank: Smallest fraction of the components that are kept, after a random rotation; 1
            keeps all of them.
        noise: Standard deviation of what is added to A, relative to its root mean square.

    Raises:
        ValueError: A number is out of range.
    """

    smallest_scale: float = 0.7
    largest_scale: float = 1.3
    dropped: float = 0.5
    kept_rank: float = 0.25
    noise: float = 0.1

    def __post_init__(self) -> None:
        check_at_least(0, smallest_scale=self.smallest_scale, noise=self.noise)
        check_at_least(self.smallest_scale, largest_scale=self.largest_scale)
        check_fraction(dropped=self.dropped)
        if not 0 < self.kept_rank <= 1:
            raise ValueError(f"kept_rank must lie in (0, 1], got {self.kept_rank}")

    @torch.no_grad()
    def __call__(self, batch: AdapterBatch, modules: tuple[Placed, ...]) -> AdapterBatch:
        """Return changed adapters; the given ones stay as they are.

        Args:
            batch: n adapters.
            modules: The fused layers that ``batch.present`` is about.
        """
        like = next(iter(batch.down.values()))
        spread = self.largest_scale - self.smallest_scale
        scale = self.smallest_scale + spread * _uniform(like, len(like), 1, 1)
        present = self._present(batch.present, modules, like)
        kept = self.kept_rank + (1 - self.kept_rank) * _uniform(like, len(like), 1)
        down, up = {}, {}
        for number, module in enumerate(modules):
            stays = present[:, number, None, None]
            for part in module.parts:
                if part in batch.down:
                    a, b = rotated(batch.down[part], batch.up[part])
                    keep = _kept(a, kept)[..., None]
                    down[part] = self._noisy(a * keep) * keep * stays
                    up[part] = b * keep.mT * scale * stays
        return AdapterBatch(down, up, present)

    def _present(self, present: Tensor, modules: tuple[Placed, ...], like: Tensor) -> Tensor:
        """Return which layers stay, (n, M)."""
        kinds = list(dict.fromkeys(module.type for module in modules))
        index = torch.tensor([kinds.index(module.type) for module in modules], device=like.device)
        rate = self.dropped * _uniform(like, len(like), 1)
        by_kind = _uniform(like, len(like), len(kinds)) >= rate
        stays = present & by_kind[:, index] & (_uniform(like, *present.shape) >= rate)
        return torch.where(stays.any(1, keepdim=True), stays, present)

    def _noisy(self, down: Tensor) -> Tensor:
        if not self.noise:
            return down
        size = down.square().mean((1, 2), keepdim=True).sqrt()
        return down + self.noise * size * torch.randn_like(down)


def rotated(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return other factors of the same product: A and B reflected at a random direction.

    Components that are zero in A, such as those of padding, stay zero.

    Args:
        down: A (n, r, in_features).
        up: B (n, out_features, r).
    """
    used = down.ne(0).any(2, keepdim=True)
    normal = torch.randn(*down.shape[:2], 1, dtype=down.dtype, device=down.device) * used
    length = torch.linalg.vector_norm(normal, dim=1, keepdim=True)
    normal = normal / length.clamp_min(torch.finfo(down.dtype).tiny)
    return down - 2 * normal @ (normal.mT @ down), up - 2 * (up @ normal) @ normal.mT


def _kept(down: Tensor, fraction: Tensor) -> Tensor:
    """Return which components (n, r) stay, the first of those that are not zero, at least one."""
    used = down.ne(0).any(2)
    count = (fraction * used.sum(1, keepdim=True)).ceil().clamp_min(1)
    return used & (used.cumsum(1) <= count)


def _uniform(like: Tensor, *shape: int) -> Tensor:
    return torch.rand(*shape, dtype=like.dtype, device=like.device)
