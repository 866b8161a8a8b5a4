"""A linear model of the inputs with a network on top, which starts as the linear model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError
from recsys.models.mmoe import Linear
from recsys.models.net import ExpertLayer, Towers
from recsys.schema import Labels


class WideAndDeep(Linear):
    """``logit_t = w_t v + b_t + Deep_t(v)`` (Cheng et al. 2016, arXiv 1606.07792).

    The last layer of the deep network starts at zero, so that all of it starts as `Linear`:
    with a product among the inputs as a factorization machine, a trained one after
    `recsys.ranker.Ranker.start_from`. With several sets of embeddings the linear model reads
    the first.

    Args:
        input_dim: Inputs D of a row.
        tasks: What is predicted: tasks, their names, or names with categories.
        deep: Name of the deep network, see `recsys.models.network`.
        deep_options: Its options by name.
        device: Device of the parameters.
        dtype: Floating dtype of the linear model.

    Raises:
        GatesError: There is no such network, it has no such option, it has no
            `recsys.models.net.Towers`, or is linear, too.
        TypeError: ``deep`` is no text, or ``deep_options`` are no mapping.
    """

    def __init__(
        self,
        input_dim: int,
        tasks: Labels,
        *,
        deep: str = "HoME",
        deep_options: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        from recsys.models import build

        super().__init__(input_dim, tasks, device=device, dtype=dtype)
        if not isinstance(deep, str) or not isinstance(deep_options or {}, Mapping):
            raise TypeError(
                f"deep is {deep!r} with {deep_options!r}, expected a name and a mapping"
            )
        self.deep = build(deep, deep_options or {}, input_dim, self.tasks, device=device)
        last = [module for module in self.deep.modules() if isinstance(module, Towers)]
        if not last or isinstance(self.deep, Linear):
            raise GatesError(f"{deep} cannot be deep: it has no Towers that start at zero alone")
        for towers in last:
            nn.init.zeros_(towers.weight)
            nn.init.zeros_(towers.bias)
        self.copies, self.prior_dim = self.deep.copies, self.deep.prior_dim
        self.id_feature, self.num_ids = self.deep.id_feature, self.deep.num_ids

    def forward(self, v: Tensor, prior: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """Return the logits (B, T) of rows (B, D), or (B, copies, D)."""
        deep: Tensor = self.deep(v, prior, ids)
        return deep + super().forward(v if v.ndim == 2 else v[:, 0])

    @property
    def shared_copies(self) -> Sequence[int]:
        """Sets of embeddings that two or more tasks read; the linear model shares the first."""
        return sorted({0, *self.deep.shared_copies})

    def losses(self, logits: Tensor) -> dict[str, Tensor]:
        """Return further losses of the deep network."""
        return self.deep.losses(logits)

    def all_shared(self) -> list[tuple[nn.Parameter, slice]]:
        """Return what tasks share in the deep network."""
        return self.deep.all_shared()

    def expert_layers(self) -> list[ExpertLayer]:
        """Return the layers of experts of the deep network."""
        return self.deep.expert_layers()
