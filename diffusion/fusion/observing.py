"""Hooks that see the layers of a fusion while the model runs."""

from __future__ import annotations

from functools import partial
from types import TracebackType
from typing import Any, Self

from torch import nn
from torch.utils.hooks import RemovableHandle

from core_gates.errors import GatesError
from diffusion.fusion.gated_fusion import GatedFusion


class Observer:
    """See the calls of some layers of an attached fusion; what the model returns stays as it is.

    A subclass says what :meth:`see` does with them.

    Args:
        fusion: A fusion, which has to be attached before this is entered.

    Attributes:
        held: Site -> names of the adapters that change it, in order; sites without any are absent.
    """

    def __init__(self, fusion: GatedFusion) -> None:
        self.fusion, self.held = fusion, _held(fusion)
        self._handles: list[RemovableHandle] = []

    def see(self, site: str, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Take up a call of a layer.

        Args:
            site: Its name.
            layer: The layer with its adapters.
            args: Of the call.
            output: Of the call.
        """
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Begin to observe; what was seen before still counts.

        Raises:
            GatesError: The fusion is not attached.
        """
        if not self.fusion.attached:
            raise GatesError("the fusion is not attached, so there are no gates: attach it first")
        self.held = _held(self.fusion)
        for site in self.held:
            hook = partial(self.see, site)
            self._handles.append(self.fusion.layers[site].register_forward_hook(hook))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop observing."""
        while self._handles:
            self._handles.pop().remove()


def _held(fusion: GatedFusion) -> dict[str, list[str]]:
    found = {
        site.name: [
            name
            for name, bundle in fusion.adapters.items()
            if any(part in bundle.modules for part in site.parts)
        ]
        for site in fusion.sites
    }
    return {site: names for site, names in found.items() if names}
