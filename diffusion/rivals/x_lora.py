"""Adapters weighed for each token by what a first pass of the model ends with (X-LoRA)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from core_gates.adapters import GatedLoraLinear, LowRank, OpenGate
from core_gates.errors import GatesError
from diffusion.fusion.protocol import Adapters, by_name, modules_of, plain_factors
from diffusion.lora_file import LoraBundle
from diffusion.lora_file.container import listed
from diffusion.lora_file.family import Placed
from diffusion.rivals.weighing import Weighing


class Scalings(nn.Module):
    """Read scalings of adapters off the hidden state of every token (Buehler and Buehler, 2024).

    Parameters have the names that PEFT gives them.

    Args:
        features: Features d of the hidden state.
        adapters: Number of adapters K.
        layers: Number of layers L.
        layerwise: Give each layer its own scalings; else all have the same.
        depth: Number of linear layers of the classifier.
        width: Features between them.
        dropout: Probability between them while training.
        temperature: Divides logits; lower is sharper.
        top_k: Keep the largest scalings of a token, none of the others; all if None.
        normalize: Where softmax is taken: over ``all`` adapters, over the ``kept`` ones, ``never``.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        Hidden states (B, S, d) to scalings (B, S, L, K).

    Raises:
        GatesError: An option is out of range.
    """

    def __init__(
        self,
        features: int,
        adapters: int,
        layers: int,
        *,
        layerwise: bool = False,
        depth: int = 1,
        width: int = 2048,
        dropout: float = 0.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        normalize: str = "all",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if depth < 1 or not temperature > 0:
            raise GatesError(f"depth {depth} must be at least 1, temperature {temperature} above 0")
        if top_k is not None and not 1 <= top_k <= adapters:
            raise GatesError(f"top_k is {top_k}, expected 1 to {adapters}, the number of adapters")
        if normalize not in ("all", "kept", "never"):
            raise GatesError(f"normalize is {normalize!r}; choose one of all, kept, never")
        self.adapters, self.num_layers, self.layerwise = adapters, layers, layerwise
        self.temperature, self.top_k, self.normalize = temperature, top_k, normalize
        sizes = [features, *[width] * (depth - 1)]
        inner: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            inner += [nn.Linear(inputs, outputs, device=device, dtype=dtype), nn.ReLU()]
            inner += [nn.Dropout(dropout)] if dropout > 0 else []
        outputs = adapters * (layers if layerwise else 1)
        last = nn.Linear(sizes[-1], outputs, device=device, dtype=dtype)
        self.layers = nn.Sequential(*inner, last)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the scalings (B, S, L, K) of all layers."""
        logits = self.layers(hidden)
        layers = self.num_layers if self.layerwise else 1
        scalings = logits.unflatten(-1, (layers, self.adapters))
        if self.normalize == "all":
            scalings = (scalings / self.temperature).softmax(-1)
        return self._kept(scalings).expand(*hidden.shape[:-1], self.num_layers, self.adapters)

    def _kept(self, scalings: Tensor) -> Tensor:
        """Return scalings with those outside of the largest set to zero."""
        if self.top_k is None and self.normalize != "kept":
            return scalings
        best = scalings.topk(self.top_k or self.adapters, -1).indices
        mask = torch.zeros_like(scalings, dtype=torch.bool).scatter(-1, best, True)
        if self.normalize == "kept":
            return scalings.masked_fill(~mask, -torch.inf).softmax(-1)
        return scalings * mask


def owners(ranks: Sequence[int]) -> Tensor:
    """Return the number of the adapter that each component (R,) belongs to."""
    return torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))


def refuse_magnitudes(adapters: Mapping[str, LoraBundle]) -> None:
    """Refuse DoRA adapters, which do more than their factors.

    Raises:
        GatesError: There is one, or sizes of a layer differ.
    """
    for module in modules_of(adapters):
        plain_factors(adapters, module)


TEXT = (
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "ff_context.",
    "norm1_context.", "context_embedder",
)  # fmt: skip
"""What names of layers contain that see no tokens of the image."""


class TokenWeightedLora(GatedLoraLinear):
    """Add the outputs of adapters, each weighed by token.

    Args:
        base: The layer.
        adapters: Its adapters, in order, without magnitudes; rank 0 where one does nothing.
        scalings: Returns those of the tokens of an input, broadcast to (..., K), where K counts
            all adapters; None if there are none at the moment.
    """

    owners: Tensor

    def __init__(
        self,
        base: nn.Module,
        adapters: Sequence[LowRank],
        scalings: Callable[[Tensor], Tensor | None],
    ) -> None:
        super().__init__(base, adapters, gate=OpenGate(cast(int, base.out_features)))
        self.scalings = scalings

    def set_adapters(self, adapters: Sequence[LowRank]) -> None:
        """Exchange the adapters.

        Raises:
            ValueError: The factors of one do not fit the layer.
        """
        super().set_adapters(adapters)
        self.owners = owners([adapter.rank for adapter in adapters])

    def forward(self, x: Tensor, *, time: Tensor | None = None) -> Tensor:
        """Return the output (..., D') of the layer with the weighed adapters."""
        del time
        base: Tensor = self.base(x)
        scalings = self.scalings(x)
        if scalings is None or not self.ranks:
            return base
        hidden = self.hidden(x)
        hidden = hidden * scalings.to(hidden.dtype)[..., self.owners.to(x.device)]
        return base + (hidden @ self.up.to(x.device, hidden.dtype)).to(base.dtype)


class XLora(Weighing):
    """X-LoRA (Buehler and Buehler, 2024) for transformers of diffusion models.

    Every call of the model makes two passes. The first has no adapters and no gradients; its last
    hidden state goes through a small classifier, the only thing that is trained, and the second
    pass adds ``w Σ_k s_k y_k`` in each layer, with the scalings ``s_k`` of the token.

    The last hidden state is what comes after the last block: the input of ``norm_out``, which has
    the tokens of the image alone in FLUX.1 and SD3. Where a layer sees tokens of the text, or one
    vector per image, as modulations do, they take the mean of the scalings over the image. In
    layers of both, the tokens of the image are the last.

    The classifier weighs adapters by their place, so one that was trained on many pairs with the
    subject first serves others in that order.

    Args:
        model: A transformer of diffusers, or any model with a module ``state``.
        adapters: Name -> adapter; no DoRA.
        state: Name of the module whose input is the last hidden state.
        features: Features of that; by default the attribute ``inner_dim`` of the model.
        weight: Factor w of what all adapters add.
        options: Options of `diffusion.rivals.x_lora.Scalings`.

    Raises:
        GatesError: An adapter does not fit the model or is a DoRA, or an option is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, LoraBundle],
        *,
        state: str = "norm_out",
        features: int | None = None,
        weight: float = 1.0,
        **options: Any,
    ) -> None:
        refuse_magnitudes(adapters)
        super().__init__(model, adapters)
        if state not in dict(model.named_modules()):
            raise GatesError(
                f"{type(model).__name__} has no module {state!r}, whose input would be the last"
                " hidden state: name another"
            )
        features = features or getattr(model, "inner_dim", None)
        if features is None:
            raise GatesError("the features of the last hidden state are not known: give them")
        self._state, self.weight = (model.get_submodule(state),), weight
        self._numbers = {site.name: number for number, site in enumerate(self.sites)}
        self.classifier = Scalings(features, len(adapters), len(self._numbers), **options)
        self.scalings: Tensor | None = None

    def detach(self) -> None:
        """Leave the model with its own layers and without hooks."""
        super().detach()
        self.scalings = None

    def set_adapters(self, adapters: Adapters) -> None:
        """Exchange the adapters for as many others; strengths are 1 again.

        Raises:
            GatesError: The classifier is for another number of them or for other layers, or one
                does not fit the model.
        """
        adapters = by_name(adapters)
        if len(adapters) != self.classifier.adapters:
            raise GatesError(
                f"the classifier is for {self.classifier.adapters} adapters, found {len(adapters)}:"
                " train another"
            )
        refuse_magnitudes(adapters)
        unknown = sorted(set(modules_of(adapters)) - self._numbers.keys())
        if self.classifier.layerwise and unknown:
            raise GatesError(f"the classifier has no scalings for {listed(unknown)}: train another")
        super().set_adapters(adapters)

    def _adapted(self, linear: nn.Linear, site: Placed) -> GatedLoraLinear:
        return TokenWeightedLora(linear, self._factors(site), partial(self._of_tokens, site.name))

    def _attach(self) -> None:
        super()._attach()
        hook = self.model.register_forward_pre_hook(self._first_pass, with_kwargs=True)
        self._handles.append(hook)

    def _first_pass(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set the scalings of a call of the model."""
        self.scalings, inputs = None, []

        def catch(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs.append(given[0] if given else next(iter(named.values())))

        if not self.on:
            return
        handle = self._state[0].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with torch.no_grad():
                model.forward(*args, **kwargs)
        finally:
            handle.remove()
        hidden = inputs[-1]
        hidden = hidden.unsqueeze(1) if hidden.ndim == 2 else hidden
        self.scalings = self.classifier(hidden.to(next(self.classifier.parameters()).dtype))

    def _of_tokens(self, site: str, x: Tensor) -> Tensor | None:
        """Return what the tokens of the input of a layer take of each adapter (B, N or 1, K)."""
        if self.scalings is None:
            return None
        scaled = self.weight * self.scalings[:, :, self._numbers.get(site, 0)]
        mean, images = scaled.mean(1, keepdim=True), scaled.shape[1]
        if x.ndim < 3:
            return mean.squeeze(1)
        tokens = x.shape[1]
        if tokens < images or any(part in site for part in TEXT):
            return mean
        return torch.cat([mean.expand(-1, tokens - images, -1), scaled], 1)
